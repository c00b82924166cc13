// Functions of device code, in the type that they are given.
#pragma once

#include "launch.h"

namespace layerzoo {

template <class S>
LZ_DEVICE S sigmoid(S x) {
  return 1 / (1 + exp(-x));
}

template <class S>
LZ_DEVICE S silu(S x) {
  return x * sigmoid(x);
}

template <class S>
LZ_DEVICE S silu_slope(S x) {
  const S gate = sigmoid(x);
  return gate * (1 + x * (1 - gate));
}

template <class S>
LZ_DEVICE S softplus(S x) {
  return (x > 0 ? x : S(0)) + log1p(exp(x > 0 ? -x : x));
}

}  // namespace layerzoo
