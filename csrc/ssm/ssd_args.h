// The arguments that both passes of ssd_chunk_scan share, checked, on any device.
#pragma once

#include "../common/checks.h"
#include "kernels.h"

namespace layerzoo {

// (b, l, h, p), or (b, l, h).
inline Heads heads(const Tensor& t, const char* name) {
  Heads x;
  x.data = t.data_ptr(), x.dtype = dtype_of(t, name);
  x.batch = t.stride(0), x.time = t.stride(1), x.head = t.stride(2), x.lane = t.dim() == 4 ? t.stride(3) : 0;
  return x;
}

inline Heads heads(const OptionalTensor& t, const char* name) { return t ? heads(*t, name) : Heads{}; }

// Parameters in the type computed in. The tensors keep alive what the arguments point at.
struct SsdParameters {
  ScalarType type;
  Tensor A;
  OptionalTensor D, bias, initial;

  SsdParameters(const Tensor& x, const Tensor& A_, const OptionalTensor& D_, const OptionalTensor& bias_,
                const OptionalTensor& initial_)
      : type(accumulate_type(x)),
        A(contiguous_as(A_, type)),
        D(contiguous_as(D_, type)),
        bias(contiguous_as(bias_, type)),
        initial(contiguous_as(initial_, type)) {}

  // Args is SsdArgs or SsdGradArgs, or derives from one.
  template <class Args>
  Args arguments(const Tensor& x, const Tensor& dt, const Tensor& B, const Tensor& C, const OptionalTensor& z,
                 bool softplus, double low, double high) const {
    Args a{};
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "ssd_chunk_scan: x and B must have four dimensions");
    a.f64 = type == ScalarType::Double, a.softplus = softplus, a.low = low, a.high = high;
    a.b = x.size(0), a.l = x.size(1), a.h = x.size(2), a.p = x.size(3), a.g = B.size(2), a.n = B.size(3);
    STD_TORCH_CHECK(a.g > 0 && a.h % a.g == 0, "ssd_chunk_scan: the heads must divide into the groups of B and C");
    check_shape(dt, "dt", {a.b, a.l, a.h});
    check_shape(B, "B", {a.b, a.l, a.g, a.n});
    check_shape(C, "C", {a.b, a.l, a.g, a.n});
    check_shape(z, "z", {a.b, a.l, a.h, a.p});
    check_shape(A, "A", {a.h});
    a.wide_D = D && D->dim() == 2;
    a.wide_D ? check_shape(D, "D", {a.h, a.p}) : check_shape(D, "D", {a.h});
    check_shape(bias, "dt_bias", {a.h});
    check_shape(initial, "initial_states", {a.b, a.h, a.p, a.n});
    a.x = heads(x, "x"), a.dt = heads(dt, "dt"), a.z = heads(z, "z"), a.B = heads(B, "B"), a.C = heads(C, "C");
    a.A = A.data_ptr(), a.D = data_or_null(D), a.bias = data_or_null(bias), a.initial = data_or_null(initial);
    return a;
  }
};

}  // namespace layerzoo
