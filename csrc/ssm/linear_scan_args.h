// The arguments of linear_scan, checked, on any device.
#pragma once

#include "../common/checks.h"
#include "kernels.h"

namespace layerzoo {

inline bool is_complex(ScalarType type) {
  return type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
}

// The type computed in, for h or x of this type.
inline ScalarType accumulate_type(ScalarType type) {
  return is_complex(type) || type == ScalarType::Double ? type : ScalarType::Float;
}

// (batch, length, channels) as (batch, channel, time); strides count complex numbers where these are.
inline Operand sequence(const Tensor& t, const char* name, ScalarType type, bool reverse) {
  Operand x;
  if (is_complex(type)) {
    STD_TORCH_CHECK(t.scalar_type() == type, "linear_scan: ", name, " must have the complex type of x");
    x.dtype = type == ScalarType::ComplexDouble ? DType::f64 : DType::f32;
  } else {
    x.dtype = dtype_of(t, name);
  }
  x.data = t.data_ptr();
  x.batch = t.stride(0), x.channel = t.stride(2), x.time = t.stride(1);
  if (reverse && t.size(1) > 0) {
    x.data = static_cast<char*>(x.data) + (t.size(1) - 1) * x.time * t.element_size();
    x.time = -x.time;
  }
  return x;
}

// Args is LinearScanArgs or LinearScanGradArgs; sequences, and how tasks are cut, are left to the caller.
template <class Args>
Args prepare(const Tensor& a, const Tensor& h, const OptionalTensor& initial_state) {
  Args args{};
  const ScalarType type = accumulate_type(h.scalar_type());
  args.complex = is_complex(type), args.f64 = type == ScalarType::Double || type == ScalarType::ComplexDouble;
  args.b = h.size(0), args.l = h.size(1), args.d = h.size(2);
  check_shape(a, "a", {args.b, args.l, args.d});
  check_shape(initial_state, "initial_state", {args.b, args.d});
  args.initial_state = data_or_null(initial_state);
  return args;
}

}  // namespace layerzoo
