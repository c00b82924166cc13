// layerzoo::causal_conv1d on CUDA. Shapes and types were checked in layerzoo/ops/ssm; what is checked again here is
// what would let a direct call of the op read outside its tensors. seq_idx is taken as it comes: its values are not
// looked at on the host, which would cost a synchronisation.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "causal_conv1d.cuh"

namespace layerzoo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxBlocks = 1 << 20;

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "causal_conv1d: ", name, " must be float32, float64, bfloat16 or float16");
  }
}

// `x` as (batch, channel, time) with `sizes`; axes lists which of these three the tensor has.
Operand operand(const char* name, const Tensor& x, const Tensor& like, const char* axes,
                std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), "causal_conv1d: ", name,
                  " must be on the device of x");
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(same, "causal_conv1d: ", name, " has the wrong shape");
  Operand o;
  o.data = x.data_ptr();
  for (int64_t i = 0; i < x.dim(); ++i) (axes[i] == 'b' ? o.batch : axes[i] == 'c' ? o.channel : o.time) = x.stride(i);
  return o;
}

Operand real_operand(const char* name, const Tensor& x, const Tensor& like, const char* axes,
                     std::initializer_list<int64_t> sizes) {
  Operand o = operand(name, x, like, axes, sizes);
  o.dtype = dtype_of(name, x);
  return o;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& seq_idx,
                                         const std::optional<Tensor>& initial_states, bool silu, bool reverse) {
  STD_TORCH_CHECK(!reverse, "causal_conv1d: reverse must be false on CUDA, where its caller turns the arguments round");
  STD_TORCH_CHECK(x.dim() == 3, "causal_conv1d: x must have 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "causal_conv1d: weight must be (dim, width) with width > 0");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CudaConvArgs a{};
  a.b = x.size(0), a.d = x.size(1), a.l = x.size(2), a.w = weight.size(1), a.silu = silu;
  a.x = real_operand("x", x, x, "bct", {a.b, a.d, a.l});
  a.weight = real_operand("weight", weight, x, "ct", {a.d, a.w});
  if (bias) a.bias = real_operand("bias", *bias, x, "c", {a.d});
  if (initial_states) a.initial = real_operand("initial_states", *initial_states, x, "bct", {a.b, a.d, a.w - 1});
  if (seq_idx) {
    const ScalarType type = seq_idx->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                    "causal_conv1d: seq_idx must be int32 or int64");
    const Operand ids = operand("seq_idx", *seq_idx, x, "bt", {a.b, a.l});
    a.seq_idx = ids.data, a.seq_batch = ids.batch, a.seq_time = ids.time, a.seq_int64 = type == ScalarType::Long;
  }
  Tensor out = torch::stable::empty_like(x);
  Tensor final_states = torch::stable::new_empty(x, {a.b, a.d, a.w - 1});
  a.out = real_operand("out", out, x, "bct", {a.b, a.d, a.l});
  a.final_state = final_states.data_ptr();

  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  LZ_DISPATCH_DTYPE(a.x.dtype, T, causal_conv1d_launch<T>(a, kMaxBlocks, static_cast<cudaStream_t>(stream)))
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, final_states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) { m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d)); }

}  // namespace layerzoo
