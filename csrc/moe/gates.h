// What stands between the two matrices of an expert: a = activation(g) (u + shift), or activation(g) alone.
#pragma once

#include <cmath>

#include "../common/vec.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {

// Calls f(integral_constant of the activation).
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>{});
    default:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

// The activation of g and, where kSlope, its derivative.
template <class S, Activation kWhich, bool kSlope, int N>
__attribute__((always_inline)) inline void activate(const ExpertsArgs& args, const Vec<S> (&g)[N], Vec<S> (&y)[N],
                                                    Vec<S> (&slope)[N]) {
  const Vec<S> one = splat<S>(1);
  if constexpr (kWhich == Activation::silu) {  // g sigmoid(alpha g)
    const S alpha = static_cast<S>(args.alpha);
    Vec<S> s[N];
    for (int i = 0; i < N; ++i) s[i] = g[i] * alpha;
    sigmoid<S, N>(s);
    for (int i = 0; i < N; ++i) {
      y[i] = g[i] * s[i];
      if constexpr (kSlope) slope[i] = s[i] * (one + g[i] * alpha * (one - s[i]));
    }
  } else if constexpr (kWhich == Activation::gelu_tanh) {  // g sigmoid(2 t): the same as g (1 + tanh(t)) / 2
    constexpr S kRoot = static_cast<S>(2 * 0.7978845608028654), kCube = static_cast<S>(0.044715);
    Vec<S> s[N];
    for (int i = 0; i < N; ++i) s[i] = kRoot * g[i] * (one + kCube * g[i] * g[i]);
    sigmoid<S, N>(s);
    for (int i = 0; i < N; ++i) {
      y[i] = g[i] * s[i];
      if constexpr (kSlope) slope[i] = s[i] * (one + (one - s[i]) * kRoot * g[i] * (one + 3 * kCube * g[i] * g[i]));
    }
  } else if constexpr (kWhich == Activation::gelu) {  // g times the normal distribution's share below g
    for (int i = 0; i < N; ++i) {
      Vec<S> below;
      for (int j = 0; j < kLanes<S>; ++j)
        below[j] = static_cast<S>(0.5) * std::erfc(-g[i][j] * static_cast<S>(0.7071067811865476));
      y[i] = g[i] * below;
      if constexpr (kSlope) {
        const Vec<S> power = g[i] * g[i] * static_cast<S>(-0.5 * M_LOG2E);
        slope[i] = below + g[i] * exp2<S>(power) * static_cast<S>(0.3989422804014327);
      }
    }
  } else {  // relu, or its square
    constexpr bool kSquare = kWhich == Activation::relu2;
    for (int i = 0; i < N; ++i) {
      const Vec<S> r = at_least<S>(g[i], 0);
      y[i] = kSquare ? r * r : r;
      if constexpr (kSlope) slope[i] = kSquare ? r + r : g[i] > splat<S>(0) ? one : Vec<S>{};
    }
  }
}

// `count` columns of a row of the hidden layer; all arrays have room for whole vectors. `g` and `u`: before clamping.
template <class S, Activation kWhich>
void gate(const ExpertsArgs& args, int64_t count, const S* g, const S* u, S* a) {
  constexpr int W = kLanes<S>, N = 2;
  const S limit = static_cast<S>(args.limit);
  for (int64_t i = 0; i < count; i += N * W) {
    Vec<S> x[N], y[N], none[N];
    for (int j = 0; j < N; ++j) {
      x[j] = load<S>(g + i + j * W);
      if (args.gated) x[j] = at_most<S>(x[j], limit);
    }
    activate<S, kWhich, false, N>(args, x, y, none);
    for (int j = 0; j < N; ++j) {
      if (args.gated) {
        const Vec<S> up = at_least<S>(at_most<S>(load<S>(u + i + j * W), limit), -limit);
        y[j] *= up + static_cast<S>(args.shift);
      }
      store<S>(a + i + j * W, y[j]);
    }
  }
}

// From the gradient of `a` over those of g and u, which replace them; `a` is overwritten with itself.
template <class S, Activation kWhich>
void gate_backward(const ExpertsArgs& args, int64_t count, const S* grad, S* g, S* u, S* a) {
  constexpr int W = kLanes<S>, N = 2;
  const S limit = static_cast<S>(args.limit);
  for (int64_t i = 0; i < count; i += N * W) {
    Vec<S> x[N], y[N], slope[N];
    for (int j = 0; j < N; ++j) {
      x[j] = load<S>(g + i + j * W);
      if (args.gated) x[j] = at_most<S>(x[j], limit);
    }
    activate<S, kWhich, true, N>(args, x, y, slope);
    for (int j = 0; j < N; ++j) {
      const int64_t at = i + j * W;
      const Vec<S> d = load<S>(grad + at);
      if (args.gated) {
        const Vec<S> raw = load<S>(u + at), top = splat<S>(limit);
        const Vec<S> up = at_least<S>(at_most<S>(raw, limit), -limit) + static_cast<S>(args.shift);
        store<S>(u + at, raw <= top && raw >= -top ? d * y[j] : Vec<S>{});
        slope[j] = load<S>(g + at) <= top ? slope[j] * up : Vec<S>{};
        y[j] *= up;
      }
      store<S>(g + at, d * slope[j]);
      store<S>(a + at, y[j]);
    }
  }
}

}  // namespace layerzoo::LZ_ISA
