// What an op makes sure of before it writes anything, for callers that come past the checks in Python, and the values
// that Python cannot look at without breaking a compiled graph.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "operand.h"

namespace layerzoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    same = same && t.size(i++) == size;
    wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, name, " must have shape (", wanted, ")");
}

inline void check_shape(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  if (t) check_shape(*t, name, sizes);
}

// A 3-d tensor as (batch, channel, time); `reverse` counts time from the end.
inline Operand operand(const Tensor& t, const char* name, bool reverse = false) {
  Operand x;
  x.dtype = dtype_of(t, name);
  x.data = t.data_ptr();
  x.batch = t.stride(0), x.channel = t.stride(1), x.time = t.stride(2);
  if (reverse && t.size(2) > 0) {
    x.data = static_cast<char*>(x.data) + (t.size(2) - 1) * x.time * t.element_size();
    x.time = -x.time;
  }
  return x;
}

inline Operand operand(const OptionalTensor& t, const char* name, bool reverse = false) {
  return t ? operand(*t, name, reverse) : Operand{};
}

// Parameters are small: kernels get them contiguous and in the type they compute in.
inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline OptionalTensor contiguous_as(const OptionalTensor& t, ScalarType dtype) {
  return t ? OptionalTensor(contiguous_as(*t, dtype)) : t;
}

// The type computed in: float64 for float64, float32 for everything else.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

}  // namespace layerzoo
