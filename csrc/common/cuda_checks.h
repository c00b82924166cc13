// What the launches of all CUDA ops share. Shapes are checked as on the CPU (checks.h); values are not looked at, which
// would cost a synchronisation: that is left to LAYERZOO_CHECK=1, in Python.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace layerzoo {

constexpr int64_t kMaxBlocks = 1 << 20;  // of a grid; blocks then take several items each

inline bool on_device(const Tensor& like, const OptionalTensor& t) {
  return !t || (t->is_cuda() && t->get_device_index() == like.get_device_index());
}

template <class... T>
void check_device(const char* op, const Tensor& like, const T&... tensors) {
  STD_TORCH_CHECK((on_device(like, tensors) && ...), op, ": all tensors must be on one device");
}

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Ids ids(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  if (!t) return {};
  check_shape(*t, name, sizes);
  const ScalarType type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64");
  return {t->data_ptr(), t->stride(0), t->dim() > 1 ? t->stride(1) : 0, type == ScalarType::Long};
}

}  // namespace layerzoo
