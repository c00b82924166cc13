// layerzoo::linear_scan and its backward on CUDA: checks as on the CPU, allocation, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_checks.h"
#include "linear_scan.cuh"
#include "linear_scan_args.h"

namespace layerzoo {
namespace {

Tensor linear_scan(const Tensor& a, const Tensor& x, const OptionalTensor& initial_, bool reverse) {
  check_device("linear_scan", x, x, a, initial_);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType type = accumulate_type(x.scalar_type());
  const OptionalTensor initial = contiguous_as(initial_, type);
  auto args = prepare<LinearScanArgs>(a, x, initial);
  Tensor h = torch::stable::empty_like(x);
  args.a = sequence(a, "a", type, reverse), args.x = sequence(x, "x", type, reverse);
  args.h = sequence(h, "h", type, reverse);
  const cudaStream_t stream = current_stream(x);
  if (args.complex)
    args.f64 ? linear_scan_launch<Complex<double>>(args, kMaxBlocks, stream)
             : linear_scan_launch<Complex<float>>(args, kMaxBlocks, stream);
  else
    args.f64 ? linear_scan_launch<double>(args, kMaxBlocks, stream)
             : linear_scan_launch<float>(args, kMaxBlocks, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return h;
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(const Tensor& grad_h, const Tensor& a, const Tensor& h,
                                                        const OptionalTensor& initial_, bool reverse) {
  check_device("linear_scan", h, h, grad_h, a, initial_);
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const ScalarType type = accumulate_type(h.scalar_type());
  const OptionalTensor initial = contiguous_as(initial_, type);
  auto args = prepare<LinearScanGradArgs>(a, h, initial);
  check_shape(grad_h, "grad", {args.b, args.l, args.d});
  Tensor grad_a = torch::stable::empty_like(a), grad_x = torch::stable::empty_like(h);
  Tensor grad_initial =
      initial ? torch::stable::new_empty(h, {args.b, args.d}, type) : torch::stable::new_empty(h, {0}, h.scalar_type());
  args.a = sequence(a, "a", type, reverse), args.h = sequence(h, "h", type, reverse);
  args.grad_h = sequence(grad_h, "grad", type, reverse);
  args.grad_a = sequence(grad_a, "grad_a", type, reverse), args.grad_x = sequence(grad_x, "grad_x", type, reverse);
  args.grad_initial = initial ? grad_initial.data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(h);
  if (args.complex)
    args.f64 ? linear_scan_backward_launch<Complex<double>>(args, kMaxBlocks, stream)
             : linear_scan_backward_launch<Complex<float>>(args, kMaxBlocks, stream);
  else
    args.f64 ? linear_scan_backward_launch<double>(args, kMaxBlocks, stream)
             : linear_scan_backward_launch<float>(args, kMaxBlocks, stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (initial_) grad_initial = contiguous_as(grad_initial, initial_->scalar_type());
  return {grad_a, grad_x, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) {
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace layerzoo
