// Sorts pairs of a token and an expert by expert: a stable counting sort, so that everything after it is deterministic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace layerzoo {

struct Sorted : Dispatch {
  Sorted(Sorted&&) = default;  // no copy: what Dispatch points at would stay behind

  // `ids` (tokens, k): experts from `first` on are ours. Without a range (`first` < 0) the id behind the last expert
  // drops the pair, and any other id outside is an error; with one, every id outside of it drops.
  static Sorted by_ids(const Tensor& ids_, int64_t experts, int64_t first) {
    const Tensor ids = int64(ids_);
    Sorted s(ids.size(0), experts, ids.numel());
    const int64_t *id = static_cast<const int64_t*>(ids.data_ptr()), k = ids.size(1), pairs = ids.numel();
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t e = first < 0 ? id[i] : id[i] - first;
      STD_TORCH_CHECK(id[i] >= 0 && (first >= 0 || e <= experts), "moe_experts: ids must be in [0, ", experts,
                      "], where ", experts, " drops the pair, got ", id[i], " for token ", i / k);
      const bool kept = e >= 0 && e < experts;
      s.expert_[i] = static_cast<int32_t>(kept ? e : experts);
      if (kept) ++s.offsets_[e + 1];
    }
    s.finish([&](int64_t i) { return i / k; });
    return s;
  }

  // `tokens` (pairs), those of expert e at [offsets[e], offsets[e + 1]).
  static Sorted by_offsets(const Tensor& tokens_, const Tensor& offsets_, int64_t count) {
    const Tensor tokens = int64(tokens_), offsets = int64(offsets_);
    const int64_t experts = offsets.numel() - 1, pairs = tokens.numel();
    const auto *token = static_cast<const int64_t*>(tokens.data_ptr()),
               *offset = static_cast<const int64_t*>(offsets.data_ptr());
    STD_TORCH_CHECK(offset[0] == 0 && offset[experts] == pairs, "moe_experts: offsets must go from 0 to ", pairs,
                    ", the number of tokens, got ", offset[0], " to ", offset[experts]);
    for (int64_t e = 0; e < experts; ++e)  // all of them before any is used as an index
      STD_TORCH_CHECK(offset[e] <= offset[e + 1], "moe_experts: offsets must not descend, got ", offset[e], ", ",
                      offset[e + 1]);
    Sorted s(count, experts, pairs);
    for (int64_t e = 0; e < experts; ++e) {
      s.offsets_[e + 1] = static_cast<int32_t>(offset[e + 1] - offset[e]);
      std::fill(s.expert_.begin() + offset[e], s.expert_.begin() + offset[e + 1], static_cast<int32_t>(e));
    }
    for (int64_t i = 0; i < pairs; ++i)
      STD_TORCH_CHECK(token[i] >= 0 && token[i] < count, "moe_experts: tokens must be in [0, ", count, "), got ",
                      token[i]);
    s.finish([&](int64_t i) { return token[i]; });
    return s;
  }

 private:
  Sorted(int64_t count, int64_t experts_, int64_t pairs)
      : expert_(pairs), offsets_(experts_ + 1), by_size_(experts_), token_offsets_(count + 1) {
    STD_TORCH_CHECK(pairs < std::numeric_limits<int32_t>::max(), "moe_experts: too many pairs: ", pairs);
    tokens = count, experts = experts_;
  }

  static Tensor int64(const Tensor& t) {
    return torch::stable::contiguous(t.scalar_type() == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long));
  }

  template <class TokenOf>
  void finish(const TokenOf& token_of) {
    for (int64_t e = 0; e < experts; ++e) largest = std::max<int64_t>(largest, offsets_[e + 1]);
    std::iota(by_size_.begin(), by_size_.end(), 0);
    std::stable_sort(by_size_.begin(), by_size_.end(),
                     [&](int32_t a, int32_t b) { return offsets_[a + 1] > offsets_[b + 1]; });
    for (const int32_t e : by_size_) active += offsets_[e + 1] > 0;
    std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
    rows = offsets_[experts];
    token_.resize(rows), pair_.resize(rows), row_of_.resize(rows);
    std::vector<int32_t> next(offsets_.begin(), offsets_.end() - 1);
    const int64_t pairs = static_cast<int64_t>(expert_.size());
    for (int64_t i = 0; i < pairs; ++i) {
      if (expert_[i] == experts) continue;
      const int64_t row = next[expert_[i]]++, t = token_of(i);
      token_[row] = static_cast<int32_t>(t), pair_[row] = static_cast<int32_t>(i);
      ++token_offsets_[t + 1];
    }
    std::partial_sum(token_offsets_.begin(), token_offsets_.end(), token_offsets_.begin());
    next.assign(token_offsets_.begin(), token_offsets_.end() - 1);
    // The rows of a token in the order of its pairs: for that, the rows once more in the order of all pairs.
    std::vector<int32_t> row(pairs, -1);
    for (int64_t r = 0; r < rows; ++r) row[pair_[r]] = static_cast<int32_t>(r);
    for (int64_t i = 0; i < pairs; ++i)
      if (row[i] >= 0) row_of_[next[token_of(i)]++] = row[i];
    offsets = offsets_.data(), by_size = by_size_.data(), token = token_.data(), pair = pair_.data();
    token_offsets = token_offsets_.data(), row_of = row_of_.data();
  }

  std::vector<int32_t> expert_, offsets_, by_size_, token_, pair_, token_offsets_, row_of_;
};

}  // namespace layerzoo
