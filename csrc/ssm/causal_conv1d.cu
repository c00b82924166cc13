// layerzoo::causal_conv1d and its backward on CUDA. Shapes and types were checked in layerzoo/ops/ssm; what is
// checked again here is what would let a direct call of the op read outside its tensors. seq_idx is taken as it comes:
// its values are not looked at on the host, which would cost a synchronisation.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_checks.h"
#include "causal_conv1d.cuh"

namespace layerzoo {
namespace {

// One dimension, (channel).
Operand row(const OptionalTensor& t, const char* name) {
  if (!t) return {};
  Operand x{t->data_ptr(), dtype_of(*t, name)};
  x.channel = t->stride(0);
  return x;
}

CudaConvArgs arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                       const OptionalTensor& initial_states, bool silu, bool reverse) {
  STD_TORCH_CHECK(!reverse, "causal_conv1d: reverse must be false on CUDA, where its caller turns the arguments round");
  STD_TORCH_CHECK(x.dim() == 3, "causal_conv1d: x must have 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "causal_conv1d: weight must be (dim, width) with width > 0");
  check_device("causal_conv1d", x, x, weight, bias, seq_idx, initial_states);
  CudaConvArgs a{};
  a.b = x.size(0), a.d = x.size(1), a.l = x.size(2), a.w = weight.size(1), a.silu = silu;
  check_shape(weight, "weight", {a.d, a.w});
  check_shape(bias, "bias", {a.d});
  check_shape(initial_states, "initial_states", {a.b, a.d, a.w - 1});
  a.x = operand(x, "x"), a.bias = row(bias, "bias"), a.initial = operand(initial_states, "initial_states");
  a.weight = row(weight, "weight"), a.weight.time = weight.stride(1);
  a.seq_idx = ids(seq_idx, "seq_idx", {a.b, a.l});
  return a;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                                         bool reverse) {
  CudaConvArgs a = arguments(x, weight, bias, seq_idx, initial_states, silu, reverse);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  Tensor final_states = torch::stable::new_empty(x, {a.b, a.d, a.w - 1});
  a.out = operand(out, "out");
  a.final_state = final_states.data_ptr();
  LZ_DISPATCH_DTYPE(a.x.dtype, T, causal_conv1d_launch<T>(a, kMaxBlocks, current_stream(x)))
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, final_states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& grad_out,
                                                                  const OptionalTensor& grad_final, const Tensor& x,
                                                                  const Tensor& weight, const OptionalTensor& bias,
                                                                  const OptionalTensor& seq_idx,
                                                                  const OptionalTensor& initial_states, bool silu,
                                                                  bool reverse) {
  CudaConvGradArgs a{};
  CudaConvArgs& conv = a.conv;
  conv = arguments(x, weight, bias, seq_idx, initial_states, silu, reverse);
  check_device("causal_conv1d", x, grad_out, grad_final);
  check_shape(grad_out, "grad_out", {conv.b, conv.d, conv.l});
  check_shape(grad_final, "grad_final_states", {conv.b, conv.d, conv.w - 1});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType type = accumulate_type(x);
  const auto empty = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(x, sizes, type); };
  // Between the passes in the order of x.
  const bool time_last = x.stride(2) <= x.stride(1);
  Tensor between =
      time_last ? empty({conv.b, conv.d, conv.l}) : torch::stable::transpose(empty({conv.b, conv.l, conv.d}), 1, 2);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_initial = initial_states ? torch::stable::empty_like(*initial_states) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = bias ? torch::stable::new_empty(*bias, bias->sizes()) : torch::stable::new_empty(x, {0});
  const int64_t parts = conv.b * a.grad_tiles();
  Tensor weight_parts = empty({parts, conv.d, conv.w}), bias_parts = empty({parts, conv.d});

  conv.grad_out = operand(grad_out, "grad_out"), conv.out = operand(between, "out");
  a.grad_x = operand(grad_x, "grad_x"), a.grad_final = operand(grad_final, "grad_final_states");
  if (initial_states) a.grad_initial = operand(grad_initial, "grad_initial_states");
  a.weight_parts = weight_parts.data_ptr(), a.bias_parts = bias_parts.data_ptr();
  a.grad_weight = {grad_weight.data_ptr(), dtype_of(weight, "weight")};
  if (bias) a.grad_bias = {grad_bias.data_ptr(), dtype_of(*bias, "bias")};
  LZ_DISPATCH_DTYPE(conv.x.dtype, T, causal_conv1d_backward_launch<T>(a, kMaxBlocks, current_stream(x)))
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_weight, grad_bias, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}

}  // namespace layerzoo
