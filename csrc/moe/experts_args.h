// The arguments that both passes of moe_experts share, checked, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
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

// What the backward pass returns. Bits of `needed`: x, weights, w13, w2, b13, b2; the others are empty.
struct ExpertsGradients {
  using Sizes = std::vector<int64_t>;

  int64_t needed;
  Tensor grad_out, x, weights, w13, w2, b13, b2;

  // Points `a` at what is needed, at `grad_out_` and at `hidden`; all of these have to outlive it.
  ExpertsGradients(const ExpertsInputs& in, ExpertsGradArgs& a, int64_t needed_, const Tensor& grad_out_,
                   const Tensor& hidden, const Tensor& weights_, const Tensor& w13_, const Tensor& w2_, bool transposed)
      : needed(needed_),
        grad_out(grad_out_.dim() == 2 ? with_unit_columns(grad_out_) : grad_out_),
        x(torch::stable::new_empty(in.x, sizes(0, {a.tokens, a.outer}))),
        weights(
            torch::stable::new_empty(in.x, sizes(1, Sizes(weights_.sizes().begin(), weights_.sizes().end())), in.type)),
        w13(like(w13_, 2)),
        w2(like(w2_, 3)),
        b13(torch::stable::new_empty(in.x, sizes(4, {a.experts, a.width()}), in.type)),
        b2(torch::stable::new_empty(in.x, sizes(5, {a.experts, a.outer}), in.type)) {
    check_shape(grad_out, "grad_out", {a.tokens, a.outer});
    check_shape(hidden, "hidden", {in.pairs, a.width()});
    STD_TORCH_CHECK(hidden.is_contiguous() && hidden.scalar_type() == in.type, "hidden must come from moe_experts");
    a.grad_out = rows(grad_out, "grad_out"), a.hidden = hidden.data_ptr();
    if (wanted(0)) a.out = x.data_ptr(), a.out_dtype = dtype_of(x, "x");
    if (wanted(1)) a.grad_weights = weights.data_ptr();
    if (wanted(2)) a.grad_w13 = matrices(w13, "w13", transposed);
    if (wanted(3)) a.grad_w2 = matrices(w2, "w2", transposed);
    if (wanted(4)) a.grad_b13 = b13.data_ptr();
    if (wanted(5)) a.grad_b2 = b2.data_ptr();
  }

  bool wanted(int bit) const { return (needed >> bit & 1) != 0; }

  // Each in the type of what it is the gradient of.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results(const Tensor& weights_, const OptionalTensor& b13_,
                                                                     const OptionalTensor& b2_) const {
    return {
        x,  contiguous_as(weights, weights_.scalar_type()),       w13,
        w2, contiguous_as(b13, (b13_ ? *b13_ : x).scalar_type()), contiguous_as(b2, (b2_ ? *b2_ : x).scalar_type())};
  }

 private:
  Sizes sizes(int bit, const Sizes& given) const { return wanted(bit) ? given : Sizes{0}; }
  Tensor like(const Tensor& t, int bit) const {
    return wanted(bit) ? torch::stable::empty_like(t) : torch::stable::new_empty(t, {0});
  }
};

}  // namespace layerzoo
