// layerzoo::selective_state_update on CUDA. Indices are taken as they come: that none is there twice is the caller's
// promise; one beyond the state gives NaN (slot.cuh).
#include <torch/csrc/stable/library.h>

#include "../common/cuda_checks.h"
#include "selective_state_update.cuh"
#include "state_update_args.h"

namespace layerzoo {
namespace {

Tensor selective_state_update(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                              const OptionalTensor& bias, bool dt_softplus, const OptionalTensor& state_batch_indices) {
  check_device("selective_state_update", x, x, state, dt, A, B, C, D, z, bias, state_batch_indices);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  auto a = state_update_args<CudaStateUpdateArgs>(state, x, dt, A, B, C, D, z, bias, dt_softplus,
                                                  state_batch_indices.has_value(), out);
  a.rows = state.size(0);
  a.indices = ids(state_batch_indices, "state_batch_indices", {a.b});
  a.f64 ? selective_state_update_launch<double>(a, kMaxBlocks, current_stream(x))
        : selective_state_update_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) { m.impl("selective_state_update", TORCH_BOX(&selective_state_update)); }

}  // namespace layerzoo
