// The arguments that both passes of moe_experts share, checked, on any device.
#pragma once

#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace layerzoo {

inline Rows rows(const Tensor& t, const char* name) {
  Rows r;
  r.data = t.data_ptr(), r.dtype = dtype_of(t, name), r.stride = t.stride(0);
  return r;
}

inline Tensor with_unit_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// `transposed`: the tensor is (experts, in, out).
inline Matrices matrices(const Tensor& t, const char* name, bool transposed) {
  const bool flipped = t.size(2) > 1 && t.stride(2) != 1;
  STD_TORCH_CHECK(!flipped || t.size(1) <= 1 || t.stride(1) == 1, name,
                  " must have neighbouring rows or columns beside each other, got strides ", t.stride(0), ", ",
                  t.stride(1), ", ", t.stride(2));
  Matrices m;
  m.data = t.data_ptr(), m.dtype = dtype_of(t, name);
  m.expert = t.stride(0), m.row = t.stride(flipped ? 2 : 1), m.transposed = transposed != flipped;
  return m;
}

// What both passes share; the tensors keep alive what the arguments point at.
struct ExpertsInputs {
  ScalarType type;
  Tensor x, weights;
  OptionalTensor b13, b2;
  int64_t pairs;

  ExpertsInputs(const Tensor& x_, const Tensor& weights_, const OptionalTensor& b13_, const OptionalTensor& b2_)
      : type(accumulate_type(x_)),
        x(with_unit_columns(x_)),
        weights(contiguous_as(weights_, type)),
        b13(contiguous_as(b13_, type)),
        b2(contiguous_as(b2_, type)),
        pairs(weights.numel()) {}

  // Args is ExpertsArgs or ExpertsGradArgs, or derives from one.
  template <class Args>
  Args arguments(const Dispatch& sorted, const Tensor& w13, const Tensor& w2, int64_t activation, bool gated,
                 bool transposed, bool interleaved, double alpha, double shift, double limit) const {
    Args a{};
    static_cast<Dispatch&>(a) = sorted;
    STD_TORCH_CHECK(a.tokens == x.size(0) && a.experts == w13.size(0),
                    "moe_experts: x, ids, weights and w13 do not fit together");
    a.f64 = type == ScalarType::Double, a.gated = gated, a.interleaved = interleaved;
    a.activation = static_cast<Activation>(activation), a.alpha = alpha, a.shift = shift, a.limit = limit;
    a.outer = x.size(1), a.inner = w2.size(transposed ? 1 : 2);
    const int64_t e = a.experts, h = a.outer, i = a.inner, width = a.width();
    transposed ? check_shape(w13, "w13", {e, h, width}) : check_shape(w13, "w13", {e, width, h});
    transposed ? check_shape(w2, "w2", {e, i, h}) : check_shape(w2, "w2", {e, h, i});
    check_shape(b13, "b13", {e, width});
    check_shape(b2, "b2", {e, h});
    a.x = rows(x, "x"), a.w13 = matrices(w13, "w13", transposed), a.w2 = matrices(w2, "w2", transposed);
    STD_TORCH_CHECK(a.f64 == (a.w13.dtype == DType::f64) && a.f64 == (a.w2.dtype == DType::f64),
                    "moe_experts: float64 needs x, w13 and w2 all in float64");
    a.b13 = data_or_null(b13), a.b2 = data_or_null(b2), a.weights = weights.data_ptr();
    return a;
  }
};

}  // namespace layerzoo
