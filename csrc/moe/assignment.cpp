// balanced_assignment on a CPU: Bertsekas' auction with scaled eps, one bidder after the other. As in
// layerzoo/reference/moe.py an expert has `least` places, and, where experts do not divide tokens, one more, in which
// an extra bidder may stand instead of a token. Places of one kind share a price: the lowest bid in them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"

namespace layerzoo {
namespace {

CallCounter calls("moe_balanced_assignment");

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Between 0 and 1; NaN and -inf count as the smallest finite score, +inf as the largest.
std::vector<double> finite_scores(const Tensor& scores) {
  const Tensor wide = contiguous_as(scores, ScalarType::Double);
  const double* from = static_cast<const double*>(wide.data_ptr());
  std::vector<double> s(from, from + wide.numel());
  double low = kInfinity, high = -kInfinity;
  for (const double x : s)
    if (std::isfinite(x)) low = std::min(low, x), high = std::max(high, x);
  const double range = high - low;
  for (double& x : s) {
    const double y = std::isfinite(x) ? (x - low) / range : x == kInfinity ? 1 : 0;
    x = range > 0 ? y : 0;
  }
  return s;
}

class Auction {
 public:
  Auction(std::vector<double> scores, int64_t tokens, int64_t experts)
      : s_(std::move(scores)),
        tokens_(tokens),
        experts_(experts),
        rest_(tokens % experts),
        regular_(tokens >= experts ? experts : 0),
        bidders_(rest_ ? tokens + experts - rest_ : tokens) {
    room_.assign(regular_, tokens / experts);
    room_.resize(regular_ + (rest_ ? experts : 0), 1);
    price_.assign(room_.size(), 0);
    held_.resize(room_.size());
  }

  void run(double epsilon, int64_t bids, int64_t* ids) {
    int64_t left = bids * bidders_;
    for (double eps = 0.25; left > 0 && eps > epsilon;) {
      eps = std::max(eps / 5, epsilon);
      left = round(eps, left);
    }
    if (left <= 0) return take_turns(ids);
    for (size_t kind = 0; kind < held_.size(); ++kind)
      for (const auto& [bid, who] : held_[kind])
        if (who < tokens_) ids[who] = static_cast<int64_t>(kind) % experts_;
  }

 private:
  // At the prices so far everybody bids anew. Returns how many bids are left: none if somebody has no place.
  int64_t round(double eps, int64_t left) {
    for (auto& held : held_) held.clear();
    std::deque<int64_t> free(bidders_);
    std::iota(free.begin(), free.end(), 0);
    for (; !free.empty(); free.pop_front()) {
      if (left-- <= 0) return 0;
      const int64_t who = free.front(), evicted = bid(who, eps);
      if (evicted >= 0) free.push_back(evicted);
    }
    return std::max<int64_t>(left, 1);
  }

  // Returns who loses a place by it, or -1.
  int64_t bid(int64_t who, double eps) {
    double top = -kInfinity, second = -kInfinity;
    int64_t best = 0;
    const auto look = [&](int64_t kind, double value) {
      if (value > top)
        second = top, top = value, best = kind;
      else if (value > second)
        second = value;
    };
    const double* row = s_.data() + who * experts_;
    const bool token = who < tokens_;
    for (int64_t e = 0; token && e < regular_; ++e) look(e, row[e] - price_[e]);
    for (int64_t e = 0; rest_ && e < experts_; ++e) look(regular_ + e, (token ? row[e] : 0) - price_[regular_ + e]);
    auto& held = held_[best];
    held.emplace_back(price_[best] + eps + (second > -kInfinity ? top - second : 0), who);
    std::push_heap(held.begin(), held.end(), std::greater<>());
    int64_t evicted = -1;
    if (static_cast<int64_t>(held.size()) > room_[best]) {
      std::pop_heap(held.begin(), held.end(), std::greater<>());
      evicted = held.back().second;
      held.pop_back();
    }
    if (static_cast<int64_t>(held.size()) == room_[best]) price_[best] = held.front().first;
    return evicted;
  }

  // Each token in turn to where it gains most of what is left; `rest_` experts fill their one more place.
  void take_turns(int64_t* ids) {
    std::vector<int64_t> room = room_;
    int64_t rest = rest_;
    for (int64_t t = 0; t < tokens_; ++t) {
      double top = -kInfinity;
      int64_t best = 0;
      for (int64_t kind = 0; kind < static_cast<int64_t>(room.size()); ++kind) {
        const double gain = s_[t * experts_ + kind % experts_] - price_[kind];
        if (room[kind] && (kind < regular_ || rest > 0) && gain > top) top = gain, best = kind;
      }
      --room[best], rest -= best >= regular_ ? 1 : 0;
      ids[t] = best % experts_;
    }
  }

  std::vector<double> s_;
  int64_t tokens_, experts_, rest_, regular_, bidders_;
  std::vector<int64_t> room_;
  std::vector<double> price_;
  std::vector<std::vector<std::pair<double, int64_t>>> held_;  // heaps of bids, the lowest on top
};

Tensor moe_balanced_assignment(const Tensor& scores, double epsilon, int64_t bids) {
  ++calls;
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "balanced_assignment: scores must have shape (T, E)");
  const int64_t tokens = scores.size(0);
  Tensor ids = torch::stable::new_empty(scores, {tokens, 1}, ScalarType::Long);
  if (tokens > 0)
    Auction(finite_scores(scores), tokens, scores.size(1)).run(epsilon, bids, static_cast<int64_t*>(ids.data_ptr()));
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) { m.impl("moe_balanced_assignment", TORCH_BOX(&moe_balanced_assignment)); }

}  // namespace layerzoo
