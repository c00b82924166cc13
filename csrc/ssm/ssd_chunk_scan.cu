// layerzoo::ssd_chunk_scan and its backward on CUDA: allocation and launches. NaN in A and ids that decrease are not
// looked for, which would cost a synchronisation; whatever the ids, nothing outside the tensors is read.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../common/cuda_checks.h"
#include "ssd_args.h"
#include "ssd_chunk_scan.cuh"

namespace layerzoo {
namespace {

// What both passes share. The tensors keep alive what `args` points at.
struct CudaSsd : SsdParameters {
  CudaSsdArgs a;
  std::vector<Tensor> scratch;

  CudaSsd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
          const OptionalTensor& z, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
          const OptionalTensor& seq_idx, bool softplus, double low, double high)
      : SsdParameters(x, A, D, dt_bias, initial_states),
        a(arguments<CudaSsdArgs>(x, dt, B, C, z, softplus, low, high)) {
    check_device("ssd_chunk_scan", x, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx);
    a.spots_per_row = a.chunks(), a.spots = a.b * a.spots_per_row;
    a.seq_idx = ids(seq_idx, "seq_idx", {a.b, a.l});
    const std::vector<int64_t> steps{a.spots, a.h, kSsdChunk};
    a.first = static_cast<int32_t*>(keep(x, {a.spots, kSsdChunk}, ScalarType::Int));
    a.live = static_cast<uint8_t*>(keep(x, {a.spots, kSsdChunk}, ScalarType::Byte));
    for (void** p : {&a.step, &a.slope, &a.sum, &a.rest}) *p = keep(x, steps, type);
    a.products = keep(x, {a.spots, a.g, kSsdChunk, kSsdChunk}, type);
  }

  void* keep(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
    scratch.push_back(torch::stable::new_empty(like, sizes, dtype));
    return scratch.back().data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> ssd_chunk_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                  const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                                                  const OptionalTensor& seq_idx, bool dt_softplus, double dt_low,
                                                  double dt_high, int64_t chunk) {
  STD_TORCH_CHECK(chunk == 0 || chunk == kSsdChunk, "ssd_chunk_scan: chunk must be 0 or ", kSsdChunk);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CudaSsd ssd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high);
  CudaSsdArgs& a = ssd.a;
  Tensor out = torch::stable::empty_like(x);
  Tensor last = torch::stable::new_empty(x, {a.b, a.h, a.p, a.n}, ssd.type);
  Tensor states = torch::stable::new_empty(x, {a.b, a.spots_per_row, a.h, a.n, a.p}, ssd.type);
  a.out = heads(out, "out");
  a.final_states = last.data_ptr(), a.states = states.data_ptr();
  a.f64 ? ssd_chunk_scan_launch<double>(a, kMaxBlocks, current_stream(x))
        : ssd_chunk_scan_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, last, chunk ? states : torch::stable::new_empty(x, {a.b, 0, a.h, a.n, a.p}, ssd.type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_chunk_scan_backward(
    const Tensor& grad_out, const OptionalTensor& grad_final_, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx, bool dt_softplus, double dt_low,
    double dt_high, const Tensor& states) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CudaSsd ssd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high);
  CudaSsdArgs& a = ssd.a;
  check_device("ssd_chunk_scan", x, grad_out, grad_final_, states);
  check_shape(grad_out, "grad_out", {a.b, a.l, a.h, a.p});
  check_shape(grad_final_, "grad_final_states", {a.b, a.h, a.p, a.n});
  check_shape(states, "states", {a.b, a.spots_per_row, a.h, a.n, a.p});
  STD_TORCH_CHECK(states.is_contiguous() && states.scalar_type() == ssd.type, "states must come from ssd_chunk_scan");
  const OptionalTensor grad_final = contiguous_as(grad_final_, ssd.type);
  const auto none = [&] { return torch::stable::new_empty(x, {0}, ssd.type); };
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor grad_x = torch::stable::empty_like(x), grad_dt = torch::stable::empty_like(dt);
  Tensor grad_B = torch::stable::empty_like(B), grad_C = torch::stable::empty_like(C);
  Tensor grad_z = z ? torch::stable::empty_like(*z) : none();
  Tensor grad_A = like(A), grad_D = D ? like(*D) : none(), grad_bias = dt_bias ? like(*dt_bias) : none();
  Tensor grad_initial = torch::stable::new_empty(x, {initial_states ? a.b : 0, a.h, a.p, a.n}, ssd.type);

  a.grad_out = heads(grad_out, "grad_out");
  a.grad_x = heads(grad_x, "grad_x"), a.grad_dt = heads(grad_dt, "grad_dt");
  a.grad_B = heads(grad_B, "grad_B"), a.grad_C = heads(grad_C, "grad_C");
  if (z) a.grad_z = heads(grad_z, "grad_z");
  a.grad_final = data_or_null(grad_final);
  a.grad_initial = initial_states ? grad_initial.data_ptr() : nullptr;
  a.states = states.data_ptr();
  a.carries = ssd.keep(x, {a.spots, a.h, a.n, a.p}, ssd.type);
  a.grad_products = ssd.keep(x, {a.spots, a.h, kSsdChunk, kSsdChunk}, ssd.type);
  a.grad_decay = ssd.keep(x, {a.spots, a.h, kSsdChunk}, ssd.type);
  a.grad_A = ssd.keep(x, {a.spots, a.h}, ssd.type), a.grad_bias = ssd.keep(x, {a.spots, a.h}, ssd.type);
  a.grad_D = ssd.keep(x, {a.spots, a.h, a.wide_D ? a.p : 1}, ssd.type);
  a.sum_A = {grad_A.data_ptr(), dtype_of(A, "A")};
  if (D) a.sum_D = {grad_D.data_ptr(), dtype_of(*D, "D")};
  if (dt_bias) a.sum_bias = {grad_bias.data_ptr(), dtype_of(*dt_bias, "dt_bias")};
  a.f64 ? ssd_chunk_scan_backward_launch<double>(a, kMaxBlocks, current_stream(x))
        : ssd_chunk_scan_backward_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (initial_states) grad_initial = contiguous_as(grad_initial, initial_states->scalar_type());
  return {grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) {
  m.impl("ssd_chunk_scan", TORCH_BOX(&ssd_chunk_scan));
  m.impl("ssd_chunk_scan_backward", TORCH_BOX(&ssd_chunk_scan_backward));
}

}  // namespace layerzoo
