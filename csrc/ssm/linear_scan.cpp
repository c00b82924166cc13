// The linear recurrence's CPU op: checks, allocation, strides; the work is in linear_scan.cpu.cpp. Schemas and the
// checks that users see are in layerzoo/ops/ssm.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/pages.h"
#include "../common/parallel.h"
#include "../kernels.h"
#include "linear_scan_args.h"

namespace layerzoo {
namespace {

CallCounter calls("linear_scan"), backward_calls("linear_scan_backward");

constexpr double kNanoseconds = 0.8, kBackwardNanoseconds = 1.6;  // per scalar on one core

// Memory is fastest where a row is read from end to end: half a page costs almost twice the time (measured on a Zen).
// So rows are only cut for want of tasks. Channels have nothing to do with each other: any cut gives the same bits.
void cut(LinearScanArgs& a, std::initializer_list<const Operand*> operands) {
  a.rows = true;
  for (const Operand* x : operands) a.rows = a.rows && x->channel == 1;
  const int64_t threads = torch::stable::get_num_threads();
  for (a.unit = !a.rows ? 64 : a.complex ? 512 : 1024; a.unit > 16 && a.tasks() < threads;) a.unit /= 2;
}

double work(const LinearScanArgs& a, double nanoseconds) {
  return nanoseconds * static_cast<double>(a.unit * a.l) * (a.complex ? 2 : 1);
}

Tensor linear_scan(const Tensor& a, const Tensor& x, const OptionalTensor& initial_, bool reverse) {
  ++calls;
  const ScalarType type = accumulate_type(x.scalar_type());
  const OptionalTensor initial = contiguous_as(initial_, type);
  auto args = prepare<LinearScanArgs>(a, x, initial);
  Tensor h = in_large_pages(torch::stable::empty_like(x));
  args.a = sequence(a, "a", type, reverse), args.x = sequence(x, "x", type, reverse);
  args.h = sequence(h, "h", type, reverse);
  cut(args, {&args.a, &args.x, &args.h});
  parallel(args.tasks(), work(args, kNanoseconds),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.linear_scan(args, begin, end); });
  return h;
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(const Tensor& grad_h, const Tensor& a, const Tensor& h,
                                                        const OptionalTensor& initial_, bool reverse) {
  ++backward_calls;
  const ScalarType type = accumulate_type(h.scalar_type());
  const OptionalTensor initial = contiguous_as(initial_, type);
  auto args = prepare<LinearScanGradArgs>(a, h, initial);
  check_shape(grad_h, "grad", {args.b, args.l, args.d});
  Tensor grad_a = in_large_pages(torch::stable::empty_like(a)), grad_x = in_large_pages(torch::stable::empty_like(h));
  Tensor grad_initial =
      initial ? torch::stable::new_empty(h, {args.b, args.d}, type) : torch::stable::new_empty(h, {0}, h.scalar_type());
  args.a = sequence(a, "a", type, reverse), args.h = sequence(h, "h", type, reverse);
  args.grad_h = sequence(grad_h, "grad", type, reverse);
  args.grad_a = sequence(grad_a, "grad_a", type, reverse), args.grad_x = sequence(grad_x, "grad_x", type, reverse);
  args.grad_initial = initial ? grad_initial.data_ptr() : nullptr;
  cut(args, {&args.a, &args.h, &args.grad_h, &args.grad_a, &args.grad_x});
  parallel(args.tasks(), work(args, kBackwardNanoseconds),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.linear_scan_backward(args, begin, end); });
  return {grad_a, grad_x, initial_ ? contiguous_as(grad_initial, initial_->scalar_type()) : grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace layerzoo
