// layerzoo::causal_conv1d_update on CUDA. Indices and lengths are taken as they come: that no index is there twice, and
// no length negative, is the caller's promise; an index beyond the state gives NaN (slot.cuh).
#include <torch/csrc/stable/library.h>

#include "../common/cuda_checks.h"
#include "causal_conv1d_update.cuh"

namespace layerzoo {
namespace {

// (batch, channels) or (batch, channels, length).
Operand sequence(const Tensor& t, const char* name) {
  Operand x{t.data_ptr(), dtype_of(t, name), t.stride(0), t.stride(1)};
  if (t.dim() == 3) x.time = t.stride(2);
  return x;
}

Tensor causal_conv1d_update(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
                            bool silu, const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "causal_conv1d_update: x must have two or three dimensions");
  STD_TORCH_CHECK(weight.dim() == 2 && conv_state.dim() == 3,
                  "causal_conv1d_update: weight must have two dimensions, conv_state three");
  check_device("causal_conv1d_update", x, x, conv_state, weight, bias, cache_seqlens, conv_state_indices);
  CudaConvUpdateArgs a{};
  a.b = x.size(0), a.d = x.size(1), a.l = x.dim() == 3 ? x.size(2) : 1, a.w = weight.size(1), a.silu = silu;
  a.rows = conv_state.size(0), a.kept = conv_state.size(2);
  check_shape(weight, "weight", {a.d, a.w});
  check_shape(bias, "bias", {a.d});
  check_shape(conv_state, "conv_state", {conv_state_indices ? a.rows : a.b, a.d, a.kept});
  STD_TORCH_CHECK(a.w > 0, "causal_conv1d_update: weight must have at least one tap");
  STD_TORCH_CHECK(a.kept >= a.w - 1, "causal_conv1d_update: conv_state must keep at least width - 1 inputs");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  a.x = sequence(x, "x"), a.out = sequence(out, "out"), a.state = operand(conv_state, "conv_state");
  a.weight = {weight.data_ptr(), dtype_of(weight, "weight"), 0, weight.stride(0), weight.stride(1)};
  if (bias) a.bias = {bias->data_ptr(), dtype_of(*bias, "bias"), 0, bias->stride(0)};
  a.slots = ids(conv_state_indices, "conv_state_indices", {a.b});
  a.positions = ids(cache_seqlens, "cache_seqlens", {a.b});
  accumulate_type(x) == ScalarType::Double ? causal_conv1d_update_launch<double>(a, kMaxBlocks, current_stream(x))
                                           : causal_conv1d_update_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) { m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update)); }

}  // namespace layerzoo
