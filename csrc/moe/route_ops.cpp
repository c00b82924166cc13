// The CPU ops that decide which expert a token goes to.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>
#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/parallel.h"
#include "../kernels.h"

namespace layerzoo {
namespace {

CallCounter calls("moe_route"), backward_calls("moe_route_backward"), assignment_calls("balanced_assignment");

constexpr double kExpertNanoseconds = 4;  // of one expert for one token on one AVX2 core

Rows rows(const Tensor& t, const char* name) {
  Rows r;
  r.data = t.data_ptr(), r.dtype = dtype_of(t, name), r.stride = t.stride(0);
  return r;
}

// What both passes share; the tensors keep alive what `args` points at.
struct Route {
  ScalarType type;
  Tensor logits;
  OptionalTensor noise, bias;

  Route(const Tensor& logits_, const OptionalTensor& bias_, const OptionalTensor& noise_)
      : type(accumulate_type(logits_)),
        logits(torch::stable::contiguous(logits_)),
        noise(noise_ ? OptionalTensor(torch::stable::contiguous(*noise_)) : noise_),
        bias(contiguous_as(bias_, type)) {}

  template <class Args>
  Args arguments(int64_t k, int64_t score, int64_t groups, int64_t topk_group, bool top2, bool normalize,
                 double scale) const {
    Args a{};
    a.tokens = logits.size(0), a.experts = logits.size(1), a.k = k;
    STD_TORCH_CHECK(k >= 1 && k <= a.experts, "moe_route: top_k must be in [1, ", a.experts, "], got ", k);
    STD_TORCH_CHECK(groups >= 1 && a.experts % groups == 0 && topk_group >= 1 && topk_group <= groups &&
                        topk_group * (a.experts / groups) >= k,
                    "moe_route: groups do not fit the number of experts and top_k");
    check_shape(noise, "noise", {a.tokens, a.experts});
    check_shape(bias, "bias", {a.experts});
    a.f64 = type == ScalarType::Double, a.score = static_cast<Score>(score), a.normalize = normalize;
    a.groups = groups, a.topk_group = topk_group, a.top2 = top2, a.scale = scale;
    a.logits = rows(logits, "logits"), a.bias = data_or_null(bias);
    if (noise) a.noise = rows(*noise, "noise");
    return a;
  }
};

// Drops what is over the capacity of an expert: first choices count before second ones, and earlier tokens before later
// ones; or, `by_weight`, larger weights before smaller ones. Returns how many it dropped.
template <class S>
int64_t drop(int64_t tokens, int64_t k, int64_t experts, int64_t capacity, bool by_weight, int64_t* ids, S* weights) {
  std::vector<int64_t> order(tokens * k), taken(experts);
  for (int64_t j = 0, i = 0; j < k; ++j)
    for (int64_t t = 0; t < tokens; ++t) order[i++] = t * k + j;
  if (by_weight)
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
  int64_t dropped = 0;
  for (const int64_t pair : order)
    if (taken[ids[pair]]++ >= capacity) ids[pair] = experts, weights[pair] = 0, ++dropped;
  return dropped;
}

// weights, ids, ids before any was dropped (empty where none can be), counts, importance, lse, dropped
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(
    const Tensor& logits, int64_t top_k, int64_t score, const OptionalTensor& bias, int64_t groups, int64_t topk_group,
    bool top2, bool normalize, double scale, const OptionalTensor& noise, int64_t capacity, bool by_weight) {
  ++calls;
  const Route shared(logits, bias, noise);
  auto a = shared.arguments<RouteArgs>(top_k, score, groups, topk_group, top2, normalize, scale);
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(logits, std::vector<int64_t>(sizes), type);
  };
  Tensor weights = empty({a.tokens, a.k}, shared.type), ids = empty({a.tokens, a.k}, ScalarType::Long);
  Tensor chosen = empty({capacity > 0 ? a.tokens : 0, a.k}, ScalarType::Long);
  Tensor counts = empty({a.experts}, ScalarType::Long), dropped = empty({}, ScalarType::Long);
  Tensor lse = empty({a.tokens}, shared.type), parts = empty({a.tasks(), a.experts}, shared.type);
  Tensor importance = empty({a.experts}, shared.type);
  a.weights = weights.data_ptr(), a.ids = static_cast<int64_t*>(ids.data_ptr());
  a.lse = lse.data_ptr(), a.parts = parts.data_ptr();
  const MoeKernels& k = kernels().moe;
  parallel_with_scratch(a.tasks(), kExpertNanoseconds * static_cast<double>(kRouteTokens * a.experts),
                        k.route_scratch(a),
                        [&](void* own, int64_t begin, int64_t end) { k.route(a, own, begin, end); });
  auto* count = static_cast<int64_t*>(counts.data_ptr());
  std::fill(count, count + a.experts, 0);
  for (int64_t i = 0; i < a.tokens * a.k; ++i) ++count[a.ids[i]];
  const auto add_up = [&](auto* sum, const auto* part) {
    std::fill(sum, sum + a.experts, 0);
    for (int64_t i = 0; i < a.tasks(); ++i)
      for (int64_t e = 0; e < a.experts; ++e) sum[e] += part[i * a.experts + e];
  };
  auto& lost = *static_cast<int64_t*>(dropped.data_ptr()) = 0;
  if (capacity > 0) std::copy(a.ids, a.ids + a.tokens * a.k, static_cast<int64_t*>(chosen.data_ptr()));
  const auto finish = [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    add_up(static_cast<S*>(importance.data_ptr()), static_cast<const S*>(parts.data_ptr()));
    if (capacity > 0) lost = drop(a.tokens, a.k, a.experts, capacity, by_weight, a.ids, static_cast<S*>(a.weights));
  };
  a.f64 ? finish(static_cast<double*>(nullptr)) : finish(static_cast<float*>(nullptr));
  return {contiguous_as(weights, logits.scalar_type()), ids, chosen, counts, importance, lse, dropped};
}

Tensor moe_route_backward(const Tensor& grad_weights_, const OptionalTensor& grad_importance_,
                          const OptionalTensor& grad_lse_, const Tensor& logits, const Tensor& ids_,
                          const Tensor& chosen_, const Tensor& lse_, int64_t score, const OptionalTensor& noise,
                          bool normalize, double scale) {
  ++backward_calls;
  const Route shared(logits, std::nullopt, noise);
  auto a = shared.arguments<RouteGradArgs>(ids_.size(1), score, 1, 1, false, normalize, scale);
  check_shape(grad_weights_, "grad_weights", {a.tokens, a.k});
  check_shape(ids_, "ids", {a.tokens, a.k});
  check_shape(grad_importance_, "grad_importance", {a.experts});
  check_shape(grad_lse_, "grad_lse", {a.tokens});
  const Tensor grad_weights = contiguous_as(grad_weights_, shared.type), lse = contiguous_as(lse_, shared.type);
  const OptionalTensor grad_importance = contiguous_as(grad_importance_, shared.type);
  const OptionalTensor grad_lse = contiguous_as(grad_lse_, shared.type);
  const Tensor ids = torch::stable::contiguous(ids_);
  const Tensor chosen = chosen_.size(0) == a.tokens ? torch::stable::contiguous(chosen_) : ids;
  Tensor grad = torch::stable::new_empty(logits, {a.tokens, a.experts});
  a.ids = static_cast<int64_t*>(ids.data_ptr()), a.chosen = static_cast<const int64_t*>(chosen.data_ptr());
  a.lse = lse.data_ptr(), a.grad_weights = grad_weights.data_ptr(), a.grad_logits = grad.data_ptr();
  a.grad_importance = data_or_null(grad_importance), a.grad_lse = data_or_null(grad_lse);
  const MoeKernels& k = kernels().moe;
  parallel_with_scratch(a.tasks(), kExpertNanoseconds * static_cast<double>(kRouteTokens * a.experts),
                        k.route_scratch(a),
                        [&](void* own, int64_t begin, int64_t end) { k.route_backward(a, own, begin, end); });
  return grad;
}

// ---- balanced assignment ----

// The auction of Bertsekas and Castañón for many alike places: each expert has `places` of them, each at a price of its
// own; whoever has no place bids for the one that is worth most to it. `score` (tokens, experts); tokens beyond are
// worth nothing to nobody, and fill up.
class Auction {
 public:
  Auction(const double* score, int64_t tokens, int64_t experts)
      : score_(score),
        tokens_(tokens),
        experts_(experts),
        places_((tokens + experts - 1) / experts),
        bidders_(places_ * experts),
        price_(places_ * experts),
        holder_(places_ * experts) {}

  std::vector<int64_t> run() {
    double low = 0, high = 0;
    for (int64_t i = 0; i < tokens_ * experts_; ++i) low = std::min(low, score_[i]), high = std::max(high, score_[i]);
    const double range = std::max(high - low, 1e-12);
    std::vector<int64_t> expert;
    // From coarse to fine: prices found with a large step need few bids, and are nearly right for the next one.
    for (double step = range / 4; step > range * kFinest; step /= 5) expert = bid(std::max(step, range * kFinest));
    return expert;
  }

 private:
  static constexpr double kFinest = 1e-5;
  static constexpr int64_t kMostBids = 400;  // for each token, at one step; beyond, places are given away

  std::vector<int64_t> bid(double step) {
    std::fill(holder_.begin(), holder_.end(), -1);
    std::vector<int64_t> expert(bidders_, -1), waiting(bidders_);
    std::iota(waiting.rbegin(), waiting.rend(), 0);
    heaps();
    for (int64_t left = kMostBids * bidders_; !waiting.empty() && left > 0; --left) {
      const int64_t who = waiting.back();
      waiting.pop_back();
      double best = -std::numeric_limits<double>::infinity(), second = best;
      int64_t where = 0;
      for (int64_t e = 0; e < experts_; ++e) {
        const double value = worth(who, e) - price_[cheapest(e)];
        if (value > best)
          second = best, best = value, where = e;
        else if (value > second)
          second = value;
      }
      // the next cheapest place of the same expert is a second choice too
      if (places_ > 1) second = std::max(second, worth(who, where) - price_[next_cheapest(where)]);
      const int64_t place = cheapest(where);
      price_[place] += (std::isfinite(second) ? best - second : 0) + step;
      if (holder_[place] >= 0) expert[holder_[place]] = -1, waiting.push_back(holder_[place]);
      holder_[place] = who, expert[who] = where;
      sink(where);
    }
    for (int64_t e = 0; e < experts_; ++e)
      for (int64_t i = 0; i < places_ && !waiting.empty(); ++i)
        if (holder_[e * places_ + i] < 0) {
          holder_[e * places_ + i] = waiting.back(), expert[waiting.back()] = e;
          waiting.pop_back();
        }
    expert.resize(tokens_);
    return expert;
  }

  double worth(int64_t who, int64_t e) const { return who < tokens_ ? score_[who * experts_ + e] : 0; }

  // The places of an expert are a heap with the cheapest in front.
  int64_t cheapest(int64_t e) const { return e * places_; }
  int64_t next_cheapest(int64_t e) const {
    const int64_t first = e * places_;
    return places_ > 2 && price_[first + 2] < price_[first + 1] ? first + 2 : first + 1;
  }
  void heaps() {
    for (int64_t e = 0; e < experts_; ++e) std::sort(price_.begin() + e * places_, price_.begin() + (e + 1) * places_);
  }
  void sink(int64_t e) {
    double* price = price_.data() + e * places_;
    int64_t* holder = holder_.data() + e * places_;
    for (int64_t i = 0;;) {
      int64_t child = 2 * i + 1;
      if (child >= places_) return;
      if (child + 1 < places_ && price[child + 1] < price[child]) ++child;
      if (price[i] <= price[child]) return;
      std::swap(price[i], price[child]), std::swap(holder[i], holder[child]);
      i = child;
    }
  }

  const double* score_;
  int64_t tokens_, experts_, places_, bidders_;
  std::vector<double> price_;
  std::vector<int64_t> holder_;
};

Tensor balanced_assignment(const Tensor& scores_) {
  ++assignment_calls;
  STD_TORCH_CHECK(scores_.dim() == 2 && scores_.size(1) > 0, "balanced_assignment: scores must be (tokens, experts)");
  const Tensor scores = contiguous_as(scores_, ScalarType::Double);
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  const auto* given = static_cast<const double*>(scores.data_ptr());
  std::vector<double> score(given, given + tokens * experts);
  double least = 0, most = 0;
  for (const double s : score)
    if (std::isfinite(s)) least = std::min(least, s), most = std::max(most, s);
  for (double& s : score)
    if (!std::isfinite(s)) s = s > 0 ? most : least;
  Tensor ids = torch::stable::new_empty(scores, {tokens, 1}, ScalarType::Long);
  if (tokens == 0) return ids;
  const std::vector<int64_t> expert = Auction(score.data(), tokens, experts).run();
  std::copy(expert.begin(), expert.end(), static_cast<int64_t*>(ids.data_ptr()));
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("balanced_assignment", TORCH_BOX(&balanced_assignment));
}

}  // namespace layerzoo
