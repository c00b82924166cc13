// moe_route on a CPU: rows by the kernels, then what needs all tokens: counts, the limit on each expert, statistics.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/parallel.h"
#include "../kernels.h"

namespace layerzoo {
namespace {

CallCounter calls("moe_route"), backward_calls("moe_route_backward");

constexpr double kNanosecondsPerLogit = 4;  // of one core

// The tensors keep alive what `args` points at.
struct Routed {
  ScalarType type;
  Tensor logits;
  OptionalTensor noise;

  Routed(const Tensor& logits_, const OptionalTensor& noise_)
      : type(accumulate_type(logits_)),
        logits(torch::stable::contiguous(logits_)),
        noise(contiguous_as(noise_, type)) {}

  template <class Args>
  Args arguments(int64_t top_k, int64_t score, bool normalize, double scale) const {
    STD_TORCH_CHECK(logits.dim() == 2, "moe_route: logits must have shape (T, E)");
    Args a{};
    a.f64 = type == ScalarType::Double, a.normalize = normalize, a.score = static_cast<Score>(score), a.scale = scale;
    a.tokens = logits.size(0), a.experts = logits.size(1), a.top_k = top_k;
    STD_TORCH_CHECK(top_k >= 1 && top_k <= a.experts, "moe_route: top_k must be from 1 to ", a.experts, ", got ",
                    top_k);
    STD_TORCH_CHECK(a.experts < std::numeric_limits<int32_t>::max(), "moe_route: too many experts: ", a.experts);
    STD_TORCH_CHECK(score >= 0 && score <= 2, "moe_route: score must be 0, 1 or 2, got ", score);
    check_shape(noise, "noise", {a.tokens, a.experts});
    a.logits = logits.data_ptr(), a.dtype = dtype_of(logits, "logits"), a.noise = data_or_null(noise);
    return a;
  }

  Tensor empty(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(logits, std::vector<int64_t>(sizes), type);
  }
  Tensor integers(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(logits, std::vector<int64_t>(sizes), ScalarType::Long);
  }
};

// Which pairs are among the first `capacity` of their expert. Sets the others' ids to `experts`, their weights to 0.
template <class S>
int64_t drop(const RouteArgs& a, int64_t capacity, bool by_weight) {
  S* weights = static_cast<S*>(a.weights);
  const int64_t pairs = a.tokens * a.top_k;
  std::vector<int64_t> first(a.experts + 1), order(pairs);
  for (int64_t i = 0; i < pairs; ++i) ++first[a.ids[i] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t j = 0; j < a.top_k; ++j)  // all first choices before all second ones
    for (int64_t i = j; i < pairs; i += a.top_k) order[next[a.ids[i]]++] = i;
  int64_t dropped = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const auto begin = order.begin() + first[e], end = order.begin() + first[e + 1];
    if (end - begin <= capacity) continue;
    if (by_weight)
      std::stable_sort(begin, end, [&](int64_t x, int64_t y) {
        return weights[x] > weights[y] || (weights[x] == weights[x] && weights[y] != weights[y]);
      });
    for (auto pair = begin + capacity; pair != end; ++pair) a.ids[*pair] = a.experts, weights[*pair] = 0;
    dropped += end - begin - capacity;
  }
  return dropped;
}

struct Totals {
  void *importance, *load, *z_loss, *entropy;
  int64_t* counts;
};

template <class S>
void add_up(const RouteArgs& a, const Totals& to) {
  const S* parts = static_cast<const S*>(a.parts);
  const double rows = static_cast<double>(std::max<int64_t>(a.tokens, 1));
  std::vector<double> sum(a.experts + 1);
  for (int64_t task = 0; task < a.tasks(); ++task)
    for (int64_t e = 0; e <= a.experts; ++e) sum[e] += parts[task * (a.experts + 1) + e];
  std::fill_n(to.counts, a.experts, 0);
  for (int64_t i = 0; i < a.tokens * a.top_k; ++i) ++to.counts[a.ids[i]];
  double entropy = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const double mean = sum[e] / rows;
    entropy -= mean == 0 ? 0 : mean * std::log(mean);
    static_cast<S*>(to.importance)[e] = static_cast<S>(sum[e]);
    static_cast<S*>(to.load)[e] = static_cast<S>(static_cast<double>(to.counts[e]) / rows);
  }
  *static_cast<S*>(to.z_loss) = static_cast<S>(sum[a.experts] / rows);
  *static_cast<S*>(to.entropy) = static_cast<S>(entropy);
}

using Route = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Route moe_route(const Tensor& logits_, const OptionalTensor& bias_, const OptionalTensor& noise, int64_t top_k,
                int64_t score, int64_t n_group, int64_t topk_group, bool top2, bool normalize, double scale,
                int64_t capacity, bool by_weight) {
  ++calls;
  const Routed routed(logits_, noise);
  auto a = routed.arguments<RouteArgs>(top_k, score, normalize, scale);
  const OptionalTensor bias = contiguous_as(bias_, routed.type);
  check_shape(bias, "bias", {a.experts});
  STD_TORCH_CHECK(n_group >= 1 && a.experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group &&
                      a.experts / n_group * topk_group >= top_k,
                  "moe_route: groups do not fit ", a.experts, " experts");
  a.bias = data_or_null(bias), a.n_group = n_group, a.topk_group = topk_group, a.top2 = top2;
  Tensor weights = routed.empty({a.tokens, top_k}), ids = routed.integers({a.tokens, top_k});
  Tensor chosen = routed.integers({capacity ? a.tokens : 0, top_k}), counts = routed.integers({a.experts});
  Tensor parts = routed.empty({a.tasks(), a.experts + 1}), importance = routed.empty({a.experts});
  Tensor load = routed.empty({a.experts}), z_loss = routed.empty({}), entropy = routed.empty({});
  Tensor dropped = routed.integers({});
  a.weights = weights.data_ptr(), a.ids = static_cast<int64_t*>(ids.data_ptr()), a.parts = parts.data_ptr();
  const MoeKernels& k = kernels().moe;
  parallel_with_scratch(a.tasks(), kNanosecondsPerLogit * static_cast<double>(kRouteTokens * a.experts),
                        k.route_scratch(a),
                        [&](void* own, int64_t begin, int64_t end) { k.route(a, own, begin, end); });
  const Totals to{importance.data_ptr(), load.data_ptr(), z_loss.data_ptr(), entropy.data_ptr(),
                  static_cast<int64_t*>(counts.data_ptr())};
  a.f64 ? add_up<double>(a, to) : add_up<float>(a, to);
  int64_t& lost = *static_cast<int64_t*>(dropped.data_ptr());
  lost = 0;
  if (capacity) {
    std::copy_n(a.ids, a.tokens * top_k, static_cast<int64_t*>(chosen.data_ptr()));
    lost = a.f64 ? drop<double>(a, capacity, by_weight) : drop<float>(a, capacity, by_weight);
  }
  return {
      contiguous_as(weights, logits_.scalar_type()), ids, counts, importance, load, z_loss, entropy, dropped, chosen};
}

// Adds the gradient that comes through the entropy of the mean.
template <class S>
void add_entropy(const RouteArgs& a, const Tensor& importance, const Tensor& grad_entropy, const Tensor& to) {
  const S *sum = static_cast<const S*>(importance.data_ptr()), grad = *static_cast<const S*>(grad_entropy.data_ptr());
  const S rows = static_cast<S>(std::max<int64_t>(a.tokens, 1));
  for (int64_t e = 0; e < a.experts; ++e) {
    const S mean = std::max(sum[e] / rows, std::numeric_limits<S>::min());
    static_cast<S*>(to.data_ptr())[e] -= grad / rows * (std::log(mean) + 1);
  }
}

// Bits of `needed`: logits, noise.
std::tuple<Tensor, Tensor> moe_route_backward(const OptionalTensor& grad_weights, const OptionalTensor& grad_importance,
                                              const OptionalTensor& grad_z_loss, const OptionalTensor& grad_entropy,
                                              const Tensor& logits_, const OptionalTensor& noise, const Tensor& ids_,
                                              const Tensor& chosen_, const Tensor& importance, int64_t score,
                                              bool normalize, double scale, int64_t needed) {
  ++backward_calls;
  const Routed routed(logits_, noise);
  STD_TORCH_CHECK(ids_.dim() == 2, "moe_route: ids must have shape (T, k)");
  auto a = routed.arguments<RouteGradArgs>(ids_.size(1), score, normalize, scale);
  check_shape(ids_, "ids", {a.tokens, a.top_k});
  check_shape(grad_weights, "grad_weights", {a.tokens, a.top_k});
  check_shape(grad_importance, "grad_importance", {a.experts});
  check_shape(importance, "importance", {a.experts});
  const Tensor ids = contiguous_as(ids_, ScalarType::Long);
  const Tensor chosen = chosen_.size(0) == a.tokens ? contiguous_as(chosen_, ScalarType::Long) : ids;
  check_shape(chosen, "chosen", {a.tokens, a.top_k});
  const OptionalTensor weights = contiguous_as(grad_weights, routed.type);
  a.weights = data_or_null(weights), a.ids = static_cast<int64_t*>(chosen.data_ptr());
  a.kept = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < a.tokens * a.top_k; ++i)
    STD_TORCH_CHECK(a.ids[i] >= 0 && a.ids[i] < a.experts, "moe_route: ids must come from moe_route, got ", a.ids[i]);
  Tensor by_importance = routed.empty({a.experts});
  torch::stable::fill_(by_importance, 0);
  if (grad_importance) torch::stable::copy_(by_importance, *grad_importance);
  if (grad_entropy) {
    const Tensor grad = contiguous_as(*grad_entropy, routed.type), sum = contiguous_as(importance, routed.type);
    a.f64 ? add_entropy<double>(a, sum, grad, by_importance) : add_entropy<float>(a, sum, grad, by_importance);
  }
  a.grad_importance = by_importance.data_ptr();
  if (grad_z_loss) {
    const Tensor grad = contiguous_as(*grad_z_loss, ScalarType::Double);
    a.grad_z = *static_cast<const double*>(grad.data_ptr()) / static_cast<double>(std::max<int64_t>(a.tokens, 1));
  }
  const auto made = [&](bool wanted, ScalarType type) {
    const std::vector<int64_t> none{0}, all{a.tokens, a.experts};
    return torch::stable::new_empty(logits_, wanted ? all : none, type);
  };
  const bool by_logits = needed & 1, by_noise = needed >> 1 & 1;
  Tensor grad_logits = made(by_logits, logits_.scalar_type()), grad_noise = made(by_noise, routed.type);
  if (by_logits) a.grad_logits = grad_logits.data_ptr();
  if (by_noise) a.grad_noise = grad_noise.data_ptr();
  const MoeKernels& k = kernels().moe;
  parallel_with_scratch(a.tasks(), kNanosecondsPerLogit * static_cast<double>(kRouteTokens * a.experts),
                        k.route_scratch(a),
                        [&](void* own, int64_t begin, int64_t end) { k.route_backward(a, own, begin, end); });
  return {grad_logits, contiguous_as(grad_noise, (noise ? *noise : logits_).scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

}  // namespace layerzoo
