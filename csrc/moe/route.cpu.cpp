// Which experts each token goes to, and with what weight; and the way back. A row of logits stays in the first cache
// through all steps: softmax or sigmoid, the sums for the statistics, the choice.
#include <algorithm>
#include <limits>
#include <numeric>

#include "../common/matrix.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr double kTiny = 1e-20;     // as in layerzoo/reference/moe.py
constexpr int64_t kInsertion = 64;  // more experts for a token than this are sorted

template <class S>
constexpr S kInfinity = std::numeric_limits<S>::infinity();
template <class S>
constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();

template <class S>
constexpr int64_t kStep = 2 * kLanes<S>;  // what loops over a row do at once

template <class S>
int64_t padded(int64_t count) {
  return (count + kStep<S> - 1) / kStep<S> * kStep<S>;
}

// Signed integers in the order of numbers, -0 equal to +0; NaN counts as -inf. Only a pair that must not be chosen has
// the lowest integer.
template <class S>
constexpr Int<S> kNever = std::numeric_limits<Int<S>>::min();

template <class S>
inline IVec<S> ordered(Vec<S> x) {
  x = x != x ? splat<S>(-kInfinity<S>) : x + splat<S>(0);
  const IVec<S> bits = (IVec<S>)x;
  return bits ^ (IVec<S>)((bits >> (8 * sizeof(S) - 1)) & std::numeric_limits<Int<S>>::max());
}

// Bit i is set where lane i of a comparison's result is.
template <class S>
inline unsigned lanes_of(IVec<S> mask) {
#if defined(__AVX512DQ__)
  if constexpr (kBytes == 64)
    return sizeof(S) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (kBytes == 32)
    return sizeof(S) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#endif
  unsigned bits = 0;
  for (int i = 0; i < kLanes<S>; ++i) bits |= mask[i] ? 1u << i : 0;
  return bits;
}

template <class S>
S largest(const S* x, int64_t size) {
  Vec<S> top[2] = {splat<S>(-kInfinity<S>), splat<S>(-kInfinity<S>)};
  for (int64_t i = 0; i < size; i += kStep<S>)
    for (int j = 0; j < 2; ++j) {
      const Vec<S> v = load<S>(x + i + j * kLanes<S>);
      top[j] = v > top[j] ? v : top[j];
    }
  top[0] = top[1] > top[0] ? top[1] : top[0];
  S most = top[0][0];
  for (int i = 1; i < kLanes<S>; ++i) most = std::max(most, static_cast<S>(top[0][i]));
  return most;
}

template <class S>
bool has_nan(const S* x, int64_t size) {
  IVec<S> any{};
  for (int64_t i = 0; i < size; i += kLanes<S>) {
    const Vec<S> v = load<S>(x + i);
    any |= v != v;
  }
  return lanes_of<S>(any) != 0;
}

template <class S>
S total(const S* x, int64_t size) {
  Vec<S> sum[2] = {};
  for (int64_t i = 0; i < size; i += kStep<S>)
    for (int j = 0; j < 2; ++j) sum[j] += load<S>(x + i + j * kLanes<S>);
  return reduce_add<S>(sum[0] + sum[1]);
}

template <class S>
S dot(const S* x, const S* y, int64_t size) {
  Vec<S> sum[2] = {};
  for (int64_t i = 0; i < size; i += kStep<S>)
    for (int j = 0; j < 2; ++j) sum[j] += load<S>(x + i + j * kLanes<S>) * load<S>(y + i + j * kLanes<S>);
  return reduce_add<S>(sum[0] + sum[1]);
}

// x[i] = f(x[i], vectors at i of `more`...) over whole vectors.
template <class S, class F, class... More>
inline void map(S* x, int64_t size, const F& f, const More*... more) {
  for (int64_t i = 0; i < size; i += kLanes<S>) store<S>(x + i, f(load<S>(x + i), load<S>(more + i)...));
}

// p = softmax(x), padded with -inf; returns log(sum(exp(x))). Both are NaN where `x` has NaN, +inf or nothing but -inf.
template <class S>
S softmax(const S* x, int64_t size, S* p) {
  const S top = largest(x, size);
  if (!std::isfinite(top) || has_nan(x, size)) {
    std::fill(p, p + size, kNaN<S>);
    return kNaN<S>;
  }
  Vec<S> sum[2] = {};
  for (int64_t i = 0; i < size; i += kStep<S>) {
    Vec<S> v[2];
    for (int j = 0; j < 2; ++j)
      v[j] = (load<S>(x + i + j * kLanes<S>) - splat<S>(top)) * splat<S>(static_cast<S>(M_LOG2E));
    exp2<S, 2>(v);
    for (int j = 0; j < 2; ++j) store<S>(p + i + j * kLanes<S>, v[j]), sum[j] += v[j];
  }
  const S all = reduce_add<S>(sum[0] + sum[1]);
  map(p, size, [scale = splat<S>(1 / all)](Vec<S> v) { return v * scale; });
  return top + std::log(all);
}

template <class S>
void sigmoids(const S* x, int64_t size, S* p) {
  if (has_nan(x, size)) return std::fill(p, p + size, kNaN<S>);
  for (int64_t i = 0; i < size; i += kStep<S>) {
    Vec<S> v[2];
    for (int j = 0; j < 2; ++j) v[j] = load<S>(x + i + j * kLanes<S>);
    sigmoid<S, 2>(v);
    for (int j = 0; j < 2; ++j) store<S>(p + i + j * kLanes<S>, v[j]);
  }
}

// What one token's row needs, in the scratch of a worker. Rows are padded: h with -inf, p with what comes of that.
template <class S, class T>
struct Row {
  const RouteArgs& a;
  const int64_t size, few;
  S *h, *clean_p, *p, *scored, *group, *sums, *gates;  // p is clean_p where the two are the same
  Int<S>*key, *best;
  int32_t* order;
  S log_sum = 0;  // of the logits without noise, like clean_p

  Row(const RouteArgs& args, void* scratch) : a(args), size(padded<S>(a.experts)), few(padded<S>(a.top_k)) {
    h = static_cast<S*>(scratch), clean_p = h + size, scored = clean_p + 2 * size, group = scored + size;
    p = a.score == Score::softmax && !a.noise ? clean_p : clean_p + size;
    sums = group + size, gates = sums + size;
    key = reinterpret_cast<Int<S>*>(gates + few), best = key + size;
    order = reinterpret_cast<int32_t*>(best + few);
  }

  static int64_t bytes(const RouteArgs& a) {
    const int64_t size = padded<S>(a.experts), few = padded<S>(a.top_k);
    return (7 * size + 2 * few) * sizeof(S) + size * sizeof(int32_t);
  }

  void load_row(int64_t token) {
    widen<S>(static_cast<const T*>(a.logits) + token * a.experts, a.experts, h);
    std::fill(h + a.experts, h + size, -kInfinity<S>);
    log_sum = softmax(h, size, clean_p);
    if (a.noise) {
      const S* noise = static_cast<const S*>(a.noise) + token * a.experts;
      for (int64_t i = 0; i < a.experts; ++i) h[i] += noise[i];
    }
    if (a.score == Score::sigmoid)
      sigmoids(h, size, p);
    else if (a.score == Score::softmax && p != clean_p)
      softmax(h, size, p);
  }

  void choose(int64_t* ids) {
    const S *choice = h, *from = a.score == Score::topk_softmax ? h : p;
    if (const S* bias = static_cast<const S*>(a.bias)) {
      for (int64_t i = 0; i < a.experts; ++i) scored[i] = from[i] + bias[i];
      choice = from = scored;
    }
    for (int64_t i = 0; i < size; i += kLanes<S>) {
      const IVec<S> k = ordered<S>(load<S>(choice + i));
      std::memcpy(key + i, &k, sizeof k);
    }
    std::fill(key + a.experts, key + size, kNever<S>);
    if (a.topk_group < a.n_group) mask_groups(a.top2 ? from : choice);
    a.top_k <= kInsertion ? insert(ids) : sort(ids);
  }

  void mask_groups(const S* values) {
    const int64_t each = a.experts / a.n_group;
    for (int64_t g = 0; g < a.n_group; ++g) {
      S first = -kInfinity<S>, second = first;
      for (int64_t i = 0; i < each; ++i) {
        const S v = values[g * each + i];
        if (v > first)
          second = first, first = v;
        else if (v > second)
          second = v;
      }
      const S sum = a.top2 && each > 1 ? first + second : first;
      group[g] = sum != sum ? -kInfinity<S> : sum;
    }
    std::iota(order, order + a.n_group, 0);
    std::partial_sort(order, order + a.topk_group, order + a.n_group,
                      [&](int32_t x, int32_t y) { return group[x] != group[y] ? group[x] > group[y] : x < y; });
    for (int64_t g = a.topk_group; g < a.n_group; ++g) std::fill_n(key + order[g] * each, each, kNever<S>);
  }

  // The largest keys so far stay sorted; most vectors have none that is larger than the last of them.
  void insert(int64_t* ids) {
    const int64_t k = a.top_k;
    std::fill(best, best + k, kNever<S>);
    for (int64_t i = 0; i < size; i += kLanes<S>) {
      IVec<S> v;
      std::memcpy(&v, key + i, sizeof v);
      for (unsigned more = lanes_of<S>(v > best[k - 1]); more; more &= more - 1) {
        const int64_t id = i + __builtin_ctz(more);
        if (key[id] <= best[k - 1]) continue;
        int64_t j = k - 1;
        for (; j > 0 && best[j - 1] < key[id]; --j) best[j] = best[j - 1], ids[j] = ids[j - 1];
        best[j] = key[id], ids[j] = id;
      }
    }
  }

  void sort(int64_t* ids) {
    std::iota(order, order + a.experts, 0);
    std::partial_sort(order, order + a.top_k, order + a.experts,
                      [&](int32_t x, int32_t y) { return key[x] != key[y] ? key[x] > key[y] : x < y; });
    std::copy(order, order + a.top_k, ids);
  }

  // The gates of the chosen, before they are divided by their sum.
  void load_gates(const int64_t* ids) {
    const bool late = a.score == Score::topk_softmax;
    for (int64_t j = 0; j < a.top_k; ++j) gates[j] = late ? h[ids[j]] : p[ids[j]];
    if (late) {
      if (has_nan(h, size)) gates[0] = kNaN<S>;
      std::fill(gates + a.top_k, gates + few, -kInfinity<S>);
      softmax(gates, few, gates);
    }
    std::fill(gates + a.top_k, gates + few, S(0));
  }
};

template <class S, class T>
void forward(const RouteArgs& a, void* scratch, int64_t begin, int64_t end) {
  Row<S, T> row(a, scratch);
  const int64_t k = a.top_k;
  for (int64_t task = begin; task < end; ++task) {
    std::fill(row.sums, row.sums + row.size, S(0));
    S squares = 0;
    for (int64_t t = task * kRouteTokens; t < std::min((task + 1) * kRouteTokens, a.tokens); ++t) {
      int64_t* ids = a.ids + t * k;
      row.load_row(t);
      row.choose(ids);
      row.load_gates(ids);
      squares += row.log_sum * row.log_sum;
      if (a.score == Score::topk_softmax) {
        for (int64_t j = 0; j < k; ++j) row.sums[ids[j]] += row.gates[j];
      } else {
        const S scale = a.score == Score::sigmoid ? 1 / (total(row.p, row.size) + S(kTiny)) : 1;
        map(row.sums, row.size, [s = splat<S>(scale)](Vec<S> sum, Vec<S> p) { return sum + p * s; }, row.p);
      }
      const S by = a.normalize ? total(row.gates, row.few) + S(kTiny) : 1;
      S* weights = static_cast<S*>(a.weights) + t * k;
      for (int64_t j = 0; j < k; ++j) weights[j] = row.gates[j] / by * static_cast<S>(a.scale);
    }
    S* part = static_cast<S*>(a.parts) + task * (a.experts + 1);
    std::copy(row.sums, row.sums + a.experts, part);
    part[a.experts] = squares;
  }
}

template <class S, class T>
void backward(const RouteGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  Row<S, T> row(a, scratch);
  const int64_t k = a.top_k, size = row.size;
  S *by_importance = row.sums, *by_gate = row.group, *out = row.scored;
  const S *p = row.p, *gates = row.gates;
  std::copy_n(static_cast<const S*>(a.grad_importance), a.experts, by_importance);
  std::fill(by_importance + a.experts, by_importance + size, S(0));
  std::fill(by_gate, by_gate + row.few, S(0));
  const int64_t last = std::min(end * kRouteTokens, a.tokens);
  for (int64_t t = begin * kRouteTokens; t < last; ++t) {
    const int64_t* ids = a.ids + t * k;
    row.load_row(t);
    row.load_gates(ids);
    for (int64_t j = 0; j < k; ++j)
      by_gate[j] = a.weights && a.kept[t * k + j] < a.experts
                       ? static_cast<const S*>(a.weights)[t * k + j] * static_cast<S>(a.scale)
                       : S(0);
    if (a.normalize) {
      const S sum = total(gates, row.few) + S(kTiny), mean = dot(by_gate, gates, row.few) / sum;
      for (int64_t j = 0; j < k; ++j) by_gate[j] = (by_gate[j] - mean) / sum;
    }
    if (a.score == Score::topk_softmax) {
      for (int64_t j = 0; j < k; ++j) by_gate[j] += by_importance[ids[j]];
      const S mean = dot(by_gate, gates, row.few);
      std::fill(out, out + size, S(0));
      for (int64_t j = 0; j < k; ++j) out[ids[j]] = gates[j] * (by_gate[j] - mean);
    } else if (a.score == Score::sigmoid) {
      const S sum = total(p, size) + S(kTiny), mean = dot(by_importance, p, size) / sum;
      for (int64_t i = 0; i < size; ++i) out[i] = (by_importance[i] - mean) / sum;
      for (int64_t j = 0; j < k; ++j) out[ids[j]] += by_gate[j];
      for (int64_t i = 0; i < size; ++i) out[i] *= p[i] * (1 - p[i]);
    } else {
      S mean = dot(by_importance, p, size);
      for (int64_t j = 0; j < k; ++j) mean += by_gate[j] * gates[j];
      for (int64_t i = 0; i < size; ++i) out[i] = p[i] * (by_importance[i] - mean);
      for (int64_t j = 0; j < k; ++j) out[ids[j]] += gates[j] * by_gate[j];
    }
    if (a.grad_noise) std::copy_n(out, a.experts, static_cast<S*>(a.grad_noise) + t * a.experts);
    if (!a.grad_logits) continue;
    const S z = static_cast<S>(a.grad_z) * 2 * row.log_sum;
    if (a.grad_z != 0) map(out, size, [z = splat<S>(z)](Vec<S> x, Vec<S> y) { return x + z * y; }, row.clean_p);
    narrow<S>(out, a.experts, static_cast<T*>(a.grad_logits) + t * a.experts);
  }
}

}  // namespace

int64_t route_scratch(const RouteArgs& a) {
  return a.f64 ? Row<double, double>::bytes(a) : Row<float, float>::bytes(a);
}

void route(const RouteArgs& a, void* scratch, int64_t begin, int64_t end) {
  if (a.f64) return forward<double, double>(a, scratch, begin, end);
  LZ_DISPATCH_DTYPE(a.dtype, T, forward<float, T>(a, scratch, begin, end))
}

void route_backward(const RouteGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  if (a.f64) return backward<double, double>(a, scratch, begin, end);
  LZ_DISPATCH_DTYPE(a.dtype, T, backward<float, T>(a, scratch, begin, end))
}

}  // namespace layerzoo::LZ_ISA
