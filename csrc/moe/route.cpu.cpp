// Routing: the score of each expert for a token, the k best and their weights; and back. A task is a block of tokens.
#include <algorithm>
#include <cmath>
#include <limits>

#include "products.h"

namespace layerzoo::LZ_ISA {
namespace {

template <class S>
int64_t padded(int64_t experts) {
  return (experts + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// The logits of token t, and minus infinity in the lanes beyond.
template <class S>
void load_logits(const RouteArgs& a, int64_t t, S* z) {
  LZ_DISPATCH_DTYPE(a.logits.dtype, T, widen<S>(static_cast<const T*>(a.logits.data) + a.logits.at(t), a.experts, z))
  if (a.noise.data) {
    LZ_DISPATCH_DTYPE(a.noise.dtype, T, {
      const T* noise = static_cast<const T*>(a.noise.data) + a.noise.at(t);
      for (int64_t e = 0; e < a.experts; ++e) z[e] += to<S>(noise[e]);
    })
  }
  std::fill(z + a.experts, z + padded<S>(a.experts), -std::numeric_limits<S>::infinity());
}

// p = e^(z - shift) and its sum. NaN stays NaN.
template <class S>
S exponentials(int64_t experts, const S* z, S shift, S* p) {
  constexpr int W = kLanes<S>;
  Vec<S> sum{};
  for (int64_t e = 0; e < padded<S>(experts); e += W) {
    const Vec<S> x = load<S>(z + e) - shift;
    Vec<S> y = exp2<S>(x * static_cast<S>(M_LOG2E));
    y = x != x ? x : y;
    store<S>(p + e, y);
    sum += y;
  }
  return reduce_add<S>(sum);
}

template <class S>
S largest(int64_t experts, const S* z) {
  S most = -std::numeric_limits<S>::infinity();
  for (int64_t e = 0; e < experts; ++e) most = z[e] > most ? z[e] : most;
  // a row of infinities: any finite shift keeps the difference from being NaN where it need not
  return std::isfinite(most) ? most : S(0);
}

template <class S>
void sigmoids(int64_t experts, const S* z, S* p) {
  constexpr int W = kLanes<S>;
  for (int64_t e = 0; e < padded<S>(experts); e += W) {
    const Vec<S> x = load<S>(z + e);
    Vec<S> y[1] = {x};
    sigmoid<S, 1>(y);
    store<S>(p + e, x != x ? x : y[0]);
  }
}

// The lowest index of the largest number, passing over NaN; `count` if there is nothing else.
template <class S>
int64_t first_largest(const S* x, int64_t count) {
  constexpr int W = kLanes<S>;
  const S least = -std::numeric_limits<S>::infinity();
  Vec<S> best = splat<S>(least);
  IVec<S> at{}, here;
  for (int i = 0; i < W; ++i) here[i] = i;
  for (int64_t e = 0; e < count; e += W, here += W) {
    const Vec<S> v = load<S>(x + e);
    at = v > best ? here : at;
    best = v > best ? v : best;
  }
  S most = least;
  int64_t first = count;
  for (int i = 0; i < W; ++i)
    if (best[i] > most || (best[i] == most && most > least && at[i] < first)) most = best[i], first = at[i];
  if (most == least) {
    first = 0;
    while (first < count && x[first] != least) ++first;
  }
  return first;
}

// Masks the experts of all but the best groups.
template <class S>
void keep_groups(const RouteArgs& a, S* choice, S* score) {
  const int64_t size = a.experts / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    S first = -std::numeric_limits<S>::infinity(), second = first;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > first)
        second = first, first = choice[e];
      else if (choice[e] > second)
        second = choice[e];
    }
    score[g] = a.top2 && size > 1 ? first + second : first;
  }
  for (int64_t left = a.groups - a.topk_group; left > 0; --left) {  // the worst goes; of equals, the last
    int64_t worst = -1;
    for (int64_t g = 0; g < a.groups; ++g)
      if (score[g] == score[g] && (worst < 0 || score[g] <= score[worst])) worst = g;
    std::fill(choice + worst * size, choice + (worst + 1) * size, -std::numeric_limits<S>::infinity());
    score[worst] = std::numeric_limits<S>::quiet_NaN();
  }
}

template <class S>
void choose(const RouteArgs& a, const S* p, int64_t* ids, S* choice, S* groups) {
  const S* bias = static_cast<const S*>(a.bias);
  for (int64_t e = 0; e < a.experts; ++e) {
    const S x = p[e] + (bias ? bias[e] : S(0));
    choice[e] = x != x ? -std::numeric_limits<S>::infinity() : x;
  }
  const S taken = std::numeric_limits<S>::quiet_NaN();
  std::fill(choice + a.experts, choice + padded<S>(a.experts), taken);
  if (a.groups > 1) keep_groups(a, choice, groups);
  for (int64_t k = 0; k < a.k; ++k) {
    ids[k] = first_largest(choice, padded<S>(a.experts));
    choice[ids[k]] = taken;
  }
}

// The softmax over the chosen logits.
template <class S>
void softmax_of(const int64_t* chosen, int64_t count, const S* z, S* weights) {
  S most = -std::numeric_limits<S>::infinity(), sum = 0;
  for (int64_t k = 0; k < count; ++k) most = z[chosen[k]] > most ? z[chosen[k]] : most;
  for (int64_t k = 0; k < count; ++k) sum += weights[k] = std::exp(z[chosen[k]] - most);
  for (int64_t k = 0; k < count; ++k) weights[k] /= sum;
}

template <class S>
void route(const RouteArgs& a, S* scratch, int64_t begin, int64_t end) {
  const int64_t width = padded<S>(a.experts);
  S *z = scratch, *p = z + width, *choice = p + width, *groups = choice + width;
  for (int64_t block = begin; block < end; ++block) {
    S* importance = static_cast<S*>(a.parts) + block * a.experts;
    std::fill(importance, importance + a.experts, S(0));
    for (int64_t t = block * kRouteTokens; t < std::min((block + 1) * kRouteTokens, a.tokens); ++t) {
      load_logits<S>(a, t, z);
      const S shift = largest(a.experts, z);
      S total = exponentials(a.experts, z, shift, p);
      static_cast<S*>(a.lse)[t] = shift + std::log(total);
      if (a.score == Score::sigmoid) {
        sigmoids(a.experts, z, p);
        total = 0;
        for (int64_t e = 0; e < a.experts; ++e) total += p[e];
      }
      const S share = 1 / total;
      for (int64_t e = 0; e < a.experts; ++e) importance[e] += p[e] / total;
      if (a.score == Score::softmax)
        for (int64_t e = 0; e < a.experts; ++e) p[e] *= share;
      int64_t* ids = a.ids + t * a.k;
      S *weights = static_cast<S*>(a.weights) + t * a.k, sum = 0;
      choose(a, a.score == Score::topk_softmax ? z : p, ids, choice, groups);
      if (a.score == Score::topk_softmax)
        softmax_of(ids, a.k, z, weights);
      else
        for (int64_t k = 0; k < a.k; ++k) weights[k] = p[ids[k]];
      for (int64_t k = 0; k < a.k; ++k) sum += weights[k];
      const S factor = static_cast<S>(a.scale) / (a.normalize ? sum + static_cast<S>(kRouteTiny) : S(1));
      const bool nan = static_cast<S*>(a.lse)[t] != static_cast<S*>(a.lse)[t];  // a token with one has no weights
      for (int64_t k = 0; k < a.k; ++k) weights[k] = nan ? std::numeric_limits<S>::quiet_NaN() : weights[k] * factor;
    }
  }
}

// Adds the gradients of a token's weights to those of its scores `s`.
template <class S>
void add_chosen(const RouteGradArgs& a, const int64_t* chosen, const int64_t* ids, const S* grad_weights, const S* s,
                S* grad) {
  S sum = static_cast<S>(kRouteTiny), inner = 0;
  for (int64_t k = 0; k < a.k; ++k) sum += s[chosen[k]];
  if (!a.normalize) sum = 1;
  for (int64_t k = 0; k < a.k; ++k)
    if (ids[k] < a.experts && a.normalize) inner += grad_weights[k] * s[chosen[k]] / sum;
  for (int64_t k = 0; k < a.k; ++k)
    grad[chosen[k]] += static_cast<S>(a.scale) / sum * ((ids[k] < a.experts ? grad_weights[k] : S(0)) - inner);
}

template <class S>
void route_backward(const RouteGradArgs& a, S* scratch, int64_t begin, int64_t end) {
  const int64_t width = padded<S>(a.experts);
  S *z = scratch, *p = z + width, *s = p + width, *grad = s + width;
  const S *importance = static_cast<const S*>(a.grad_importance), *lse = static_cast<const S*>(a.lse);
  for (int64_t t = begin * kRouteTokens; t < std::min(end * kRouteTokens, a.tokens); ++t) {
    load_logits<S>(a, t, z);
    exponentials(a.experts, z, lse[t], p);  // probabilities
    const int64_t *chosen = a.chosen + t * a.k, *ids = a.ids + t * a.k;
    const S* grad_weights = static_cast<const S*>(a.grad_weights) + t * a.k;
    const S of_lse = a.grad_lse ? static_cast<const S*>(a.grad_lse)[t] : S(0);
    S mean = 0;
    std::fill(grad, grad + width, S(0));  // of the scores, at first
    if (a.score == Score::sigmoid) {
      sigmoids(a.experts, z, s);
      S total = 0;
      for (int64_t e = 0; importance && e < a.experts; ++e) total += s[e], mean += importance[e] * s[e];
      for (int64_t e = 0; importance && e < a.experts; ++e) grad[e] = (importance[e] - mean / total) / total;
      add_chosen(a, chosen, ids, grad_weights, s, grad);
      for (int64_t e = 0; e < a.experts; ++e) grad[e] = grad[e] * s[e] * (1 - s[e]) + of_lse * p[e];
    } else {
      if (importance) std::copy(importance, importance + a.experts, grad);
      if (a.score == Score::softmax) add_chosen(a, chosen, ids, grad_weights, p, grad);
      for (int64_t e = 0; e < a.experts; ++e) mean += grad[e] * p[e];
      for (int64_t e = 0; e < a.experts; ++e) grad[e] = p[e] * (grad[e] - mean + of_lse);
      if (a.score == Score::topk_softmax) {
        S* r = s;  // which nobody needs any more
        softmax_of(chosen, a.k, z, r);
        S inner = 0;
        for (int64_t k = 0; k < a.k; ++k)
          if (ids[k] < a.experts) inner += grad_weights[k] * r[k];
        for (int64_t k = 0; k < a.k; ++k) {
          const S g = ids[k] < a.experts ? grad_weights[k] : S(0);
          grad[chosen[k]] += static_cast<S>(a.scale) * r[k] * (g - inner);
        }
      }
    }
    LZ_DISPATCH_DTYPE(a.logits.dtype, T, narrow<S>(grad, a.experts, static_cast<T*>(a.grad_logits) + t * a.experts))
  }
}

}  // namespace

int64_t route_scratch(const RouteArgs& a) {
  return a.f64 ? 4 * 8 * padded<double>(a.experts) : 4 * 4 * padded<float>(a.experts);
}

void route(const RouteArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? route(a, static_cast<double*>(scratch), begin, end) : route(a, static_cast<float*>(scratch), begin, end);
}

void route_backward(const RouteGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? route_backward(a, static_cast<double*>(scratch), begin, end)
        : route_backward(a, static_cast<float*>(scratch), begin, end);
}

}  // namespace layerzoo::LZ_ISA
