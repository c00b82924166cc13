// gates.h in device code: what stands between the two matrices of an expert.
#pragma once

#include "../common/math.cuh"
#include "kernels.h"

namespace layerzoo {

template <class S>
struct Activated {
  S value, slope;
};

template <class S>
LZ_DEVICE Activated<S> activate(const ExpertsArgs& a, S g) {
  switch (a.activation) {
    case Activation::gelu: {
      const S below = S(0.5) * erfc(-g * S(0.7071067811865476));
      return {g * below, below + g * exp(S(-0.5) * g * g) * S(0.3989422804014327)};
    }
    case Activation::gelu_tanh: {  // g sigmoid(2 t): the same as g (1 + tanh(t)) / 2
      const S root = S(2 * 0.7978845608028654), cube = S(0.044715), s = sigmoid(root * g * (1 + cube * g * g));
      return {g * s, s * (1 + (1 - s) * root * g * (1 + 3 * cube * g * g))};
    }
    case Activation::relu:
      return {g < 0 ? S(0) : g, g > 0 ? S(1) : S(0)};
    case Activation::relu2: {
      const S r = g < 0 ? S(0) : g;
      return {r * r, r + r};
    }
    default: {  // g sigmoid(alpha g)
      const S alpha = static_cast<S>(a.alpha), s = sigmoid(alpha * g);
      return {g * s, s * (1 + alpha * g * (1 - s))};
    }
  }
}

template <class S>
struct Gated {
  S value, by_g, by_u;  // and its derivatives
};

// What the second matrix gets; `u` is ignored where there is no gate.
template <class S>
LZ_DEVICE Gated<S> gate(const ExpertsArgs& a, S g, S u) {
  if (!a.gated) {
    const Activated<S> y = activate(a, g);
    return {y.value, y.slope, S(0)};
  }
  const S limit = static_cast<S>(a.limit);
  const Activated<S> y = activate(a, g > limit ? limit : g);
  const S up = (u > limit ? limit : u < -limit ? -limit : u) + static_cast<S>(a.shift);
  return {y.value * up, g > limit ? S(0) : y.slope * up, u > limit || u < -limit ? S(0) : y.value};
}

}  // namespace layerzoo
