// The family's CPU ops that work in place on a state, step by step: see ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/parallel.h"
#include "../kernels.h"
#include "state_update_args.h"

namespace layerzoo {
namespace {

CallCounter conv_update_calls("causal_conv1d_update"), state_update_calls("selective_state_update");

// An argument (batch,) of int32 or int64 by its name.
std::vector<int64_t> integers(const OptionalTensor& t, const char* op, const char* name, int64_t batch) {
  if (!t) return {};
  check_shape(t, name, {batch});
  const ScalarType type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ", name, " must be int32 or int64");
  std::vector<int64_t> values(batch);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t at = i * t->stride(0);
    values[i] = type == ScalarType::Int ? static_cast<const int32_t*>(t->data_ptr())[at]
                                        : static_cast<const int64_t*>(t->data_ptr())[at];
  }
  return values;
}

// Which row of a pool of states each row of the batch has; below 0: none. Two that had the same one would write it at
// once.
std::vector<int64_t> rows_of_pool(const OptionalTensor& indices, const char* op, const char* name, int64_t batch,
                                  int64_t rows) {
  std::vector<int64_t> slots = integers(indices, op, name, batch);
  for (size_t i = 0; i < slots.size(); ++i)
    STD_TORCH_CHECK(slots[i] < rows, op, ": ", name, " must be below the ", rows, " rows of the state, but ", name, "[",
                    i, "] = ", slots[i]);
  std::vector<int64_t> sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    STD_TORCH_CHECK(sorted[i] < 0 || sorted[i] != sorted[i - 1], op, ": ", name,
                    " must not name a row of the state twice, but ", sorted[i], " is there twice");
  return slots;
}

// Where in its ring of `kept` inputs each row of the batch writes; rows of padding have no place.
std::vector<int64_t> ring_positions(const OptionalTensor& cache_seqlens, const std::vector<int64_t>& slots,
                                    int64_t batch, int64_t kept) {
  std::vector<int64_t> positions = integers(cache_seqlens, "causal_conv1d_update", "cache_seqlens", batch);
  for (size_t i = 0; i < positions.size(); ++i) {
    const bool padding = !slots.empty() && slots[i] < 0;
    STD_TORCH_CHECK(padding || positions[i] >= 0,
                    "causal_conv1d_update: cache_seqlens must not be negative, but cache_seqlens[", i,
                    "] = ", positions[i]);
    positions[i] = padding || kept == 0 ? 0 : positions[i] % kept;
  }
  return positions;
}

Tensor causal_conv1d_update(const Tensor& x, Tensor conv_state, const Tensor& weight_, const OptionalTensor& bias_,
                            bool silu, const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices) {
  ++conv_update_calls;
  const ScalarType type = accumulate_type(x);
  const Tensor weight = contiguous_as(weight_, type);
  const OptionalTensor bias = contiguous_as(bias_, type);
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "causal_conv1d_update: x must have two or three dimensions");
  STD_TORCH_CHECK(weight.dim() == 2 && conv_state.dim() == 3,
                  "causal_conv1d_update: weight must have two dimensions, "
                  "conv_state three");
  const auto sequence = [](const Tensor& t, const char* name) {  // (b, d) or (b, d, l)
    Operand o{t.data_ptr(), dtype_of(t, name), t.stride(0), t.stride(1)};
    if (t.dim() == 3) o.time = t.stride(2);
    return o;
  };
  ConvArgs a{};
  a.f64 = type == ScalarType::Double, a.silu = silu;
  a.b = x.size(0), a.d = x.size(1), a.l = x.dim() == 3 ? x.size(2) : 1, a.w = weight.size(1);
  a.state_length = conv_state.size(2);
  const int64_t rows = conv_state_indices ? conv_state.size(0) : a.b;
  check_shape(weight, "weight", {a.d, a.w});
  check_shape(bias, "bias", {a.d});
  check_shape(conv_state, "conv_state", {rows, a.d, a.state_length});
  STD_TORCH_CHECK(a.w > 0, "causal_conv1d_update: weight must have at least one tap");
  STD_TORCH_CHECK(a.state_length >= a.w - 1, "causal_conv1d_update: conv_state must keep at least width - 1 inputs");
  const auto slots = rows_of_pool(conv_state_indices, "causal_conv1d_update", "conv_state_indices", a.b, rows);
  const auto positions = ring_positions(cache_seqlens, slots, a.b, a.state_length);
  if (conv_state_indices) a.slots = slots.data();
  if (cache_seqlens) a.positions = positions.data();
  a.weight = weight.data_ptr(), a.bias = data_or_null(bias);
  a.x = sequence(x, "x"), a.initial = operand(conv_state, "conv_state");
  Tensor out = torch::stable::empty_like(x);
  a.out = sequence(out, "out");
  const SsmKernels& k = kernels().ssm;
  parallel_with_scratch(
      a.tasks(), 16 * static_cast<double>(a.l * (a.w + 4)) * 0.2, k.causal_conv1d_scratch(a),
      [&](void* scratch, int64_t begin, int64_t end) { k.causal_conv1d_update(a, scratch, begin, end); });
  return out;
}

// Both forms: x (batch, channels), or (batch, heads, channels) with groups of heads.
Tensor selective_state_update(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                              const OptionalTensor& bias, bool dt_softplus, const OptionalTensor& state_batch_indices) {
  ++state_update_calls;
  Tensor out = torch::stable::empty_like(x);
  auto a = state_update_args<StateUpdateArgs>(state, x, dt, A, B, C, D, z, bias, dt_softplus,
                                              state_batch_indices.has_value(), out);
  const auto slots =
      rows_of_pool(state_batch_indices, "selective_state_update", "state_batch_indices", a.b, state.size(0));
  if (state_batch_indices) a.slots = slots.data();
  parallel(a.tasks(), (a.one_decay() ? 0.3 : 0.5) * kUpdateUnit * static_cast<double>(a.n + 8),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.selective_state_update(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace layerzoo
