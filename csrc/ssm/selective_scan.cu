// layerzoo::selective_scan and its backward on CUDA. Shapes and types were checked in layerzoo/ops; what is checked
// again here is what would let a direct call of the op read outside its tensors. A and seq_idx are taken as they come:
// their values are not looked at on the host, which would cost a synchronisation.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_checks.h"
#include "selective_scan.cuh"

namespace layerzoo {
namespace {

constexpr const char* kOp = "selective_scan";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class X>
X from_the_end(X x, int64_t steps, int64_t element_size) {
  x.data = static_cast<char*>(const_cast<void*>(static_cast<const void*>(x.data))) +
           (steps > 0 ? steps - 1 : 0) * x.time * element_size;
  x.time = -x.time;
  return x;
}

// A parameter: (channel) or (channel, state as time).
Operand parameter(const OptionalTensor& t, const char* name) {
  if (!t) return {};
  Operand x{t->data_ptr(), dtype_of(*t, name)};
  x.channel = t->stride(0);
  if (t->dim() == 2) x.time = t->stride(1);
  return x;
}

// B, C or what becomes their gradient; `data` has the strides of `t` and elements of type `type`.
Coefficient coefficient(const Tensor& t, void* data, DType type, int64_t element_size, bool reverse) {
  Coefficient x{};
  x.data = data, x.dtype = type, x.constant = t.dim() == 2;
  if (x.constant) {
    x.channel = t.stride(0), x.time = t.stride(1);
    return x;
  }
  x.batch = t.stride(0), x.channel = t.stride(-2), x.time = t.stride(-1);
  x.group = t.dim() == 4 ? t.stride(1) : 0;
  return reverse ? from_the_end(x, t.size(-1), element_size) : x;
}

void check_coefficient(const Tensor& t, const char* name, const CudaScanArgs& a) {
  if (t.dim() == 2)
    check_shape(t, name, {a.d, a.n});
  else if (t.dim() == 3 && a.g == 1)
    check_shape(t, name, {a.b, a.n, a.l});
  else
    check_shape(t, name, {a.b, a.g, a.n, a.l});
}

int64_t groups_of(const Tensor& t) { return t.dim() == 4 ? t.size(1) : t.dim() == 3 ? 1 : 0; }

// `marks` keeps alive what the arguments point at.
CudaScanArgs arguments(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& bias, bool softplus,
                       const OptionalTensor& initial, const OptionalTensor& seq_idx, bool reverse,
                       OptionalTensor& marks) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, kOp, ": u must have 3 dimensions and A 2");
  check_device(kOp, u, u, delta, A, B, C, D, z, bias, initial, seq_idx);
  CudaScanArgs a{};
  a.b = u.size(0), a.d = u.size(1), a.l = u.size(2), a.n = A.size(1), a.softplus = softplus;
  a.g = groups_of(B) ? groups_of(B) : groups_of(C) ? groups_of(C) : 1;
  STD_TORCH_CHECK(a.d % a.g == 0, kOp, ": the channels must divide into the groups of B and C");
  check_shape(delta, "delta", {a.b, a.d, a.l});
  check_shape(A, "A", {a.d, a.n});
  check_coefficient(B, "B", a);
  check_coefficient(C, "C", a);
  check_shape(D, "D", {a.d});
  check_shape(z, "z", {a.b, a.d, a.l});
  check_shape(bias, "delta_bias", {a.d});
  check_shape(initial, "initial_state", {a.b, a.d, a.n});
  a.u = operand(u, "u", reverse), a.delta = operand(delta, "delta", reverse), a.z = operand(z, "z", reverse);
  a.A = parameter(A, "A"), a.D = parameter(D, "D"), a.bias = parameter(bias, "delta_bias");
  a.initial = operand(initial, "initial_state");
  a.B = coefficient(B, B.data_ptr(), dtype_of(B, "B"), B.element_size(), reverse);
  a.C = coefficient(C, C.data_ptr(), dtype_of(C, "C"), C.element_size(), reverse);
  if (seq_idx) {
    a.seq_idx = ids(seq_idx, "seq_idx", {a.b, a.l});
    if (reverse) a.seq_idx = from_the_end(a.seq_idx, a.l, seq_idx->element_size());
    marks = torch::stable::new_empty(u, {a.b, a.l}, ScalarType::Byte);
    a.marks = static_cast<uint8_t*>(marks->data_ptr());
  }
  return a;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  bool delta_softplus, const OptionalTensor& initial_state,
                                                  const OptionalTensor& seq_idx, bool reverse, int64_t chunk) {
  STD_TORCH_CHECK(chunk == 0 || chunk == kScanChunk, kOp, ": chunk must be 0 or ", kScanChunk);
  check_device(kOp, u, u);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  OptionalTensor marks;
  CudaScanArgs a =
      arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, reverse, marks);
  const ScalarType type = accumulate_type(u);
  Tensor out = torch::stable::empty_like(u);
  Tensor last = torch::stable::new_empty(u, {a.b, a.d, a.n}, type);
  Tensor states = torch::stable::new_empty(u, {a.b, chunk ? ceil_div(a.l, kScanChunk) : 0, a.n, a.d}, type);
  a.out = operand(out, "out", reverse);
  a.last = last.data_ptr(), a.states = chunk ? states.data_ptr() : nullptr;
  const auto launch = type == ScalarType::Double ? selective_scan_launch<double> : selective_scan_launch<float>;
  launch(a, kMaxBlocks, current_stream(u));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, last, states};
}

// A gradient, and memory for its parts.
struct Gradient {
  Tensor grad, parts;

  Gradient(const OptionalTensor& like, const Tensor& u, int64_t parts_, int64_t size, ScalarType type)
      : grad(!like             ? torch::stable::new_empty(u, {0}, type)
             : like->dim() > 2 ? torch::stable::empty_like(*like)
                               : torch::stable::new_empty(*like, like->sizes())),
        parts(torch::stable::new_empty(u, {parts_, size}, type)) {}

  GradParts arguments(const OptionalTensor& like, const char* name) const {
    GradParts g{parts.size(0), parts.size(1), parts.data_ptr(), {}};
    if (like) g.out.data = grad.data_ptr(), g.out.dtype = dtype_of(*like, name);
    return g;
  }

  // Of B or C: where the kernel writes the first part.
  Coefficient first(bool reverse) const {
    const DType type = parts.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
    return coefficient(grad, parts.data_ptr(), type, parts.element_size(), reverse);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_out, const OptionalTensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, bool reverse, const Tensor& states) {
  check_device(kOp, u, u);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  OptionalTensor marks;
  CudaScanGradArgs grad{};
  CudaScanArgs& a = grad.scan;
  a = arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, reverse, marks);
  check_device(kOp, u, grad_out, grad_last_state, states);
  check_shape(grad_out, "grad_out", {a.b, a.d, a.l});
  check_shape(grad_last_state, "grad_last_state", {a.b, a.d, a.n});
  check_shape(states, "states", {a.b, ceil_div(a.l, kScanChunk), a.n, a.d});
  const ScalarType type = accumulate_type(u);
  STD_TORCH_CHECK(states.is_contiguous() && states.scalar_type() == type, "states must come from selective_scan");

  const bool f64 = type == ScalarType::Double;
  const int64_t units = f64 ? ScanBlock<double>::parts(a.d / a.g) : ScanBlock<float>::parts(a.d / a.g);
  const auto coefficient_gradient = [&](const Tensor& x) {
    return x.dim() == 2 ? Gradient(x, u, a.b, a.d * a.n, type) : Gradient(x, u, units, x.numel(), type);
  };
  Tensor grad_u = torch::stable::empty_like(u), grad_delta = torch::stable::empty_like(delta);
  Tensor grad_z = z ? torch::stable::empty_like(*z) : torch::stable::new_empty(u, {0}, type);
  Tensor carry = torch::stable::new_empty(u, {a.b, a.d, a.n}, type);
  const Gradient of_A(A, u, a.b, a.d * a.n, type), of_B = coefficient_gradient(B), of_C = coefficient_gradient(C);
  const Gradient of_D(D, u, a.b, a.d, type), of_bias(delta_bias, u, a.b, a.d, type);

  a.states = states.data_ptr();
  grad.grad_out = operand(grad_out, "grad_out", reverse), grad.grad_last = operand(grad_last_state, "grad_last_state");
  grad.grad_u = operand(grad_u, "grad_u", reverse), grad.grad_delta = operand(grad_delta, "grad_delta", reverse);
  if (z) grad.grad_z = operand(grad_z, "grad_z", reverse);
  grad.carry = carry.data_ptr();
  grad.A = of_A.arguments(A, "A"), grad.B = of_B.arguments(B, "B"), grad.C = of_C.arguments(C, "C");
  grad.D = of_D.arguments(D, "D"), grad.bias = of_bias.arguments(delta_bias, "delta_bias");
  grad.grad_B = of_B.first(reverse), grad.grad_C = of_C.first(reverse);
  const auto launch = f64 ? selective_scan_backward_launch<double> : selective_scan_backward_launch<float>;
  launch(grad, kMaxBlocks, current_stream(u));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_u,
          grad_delta,
          of_A.grad,
          of_B.grad,
          of_C.grad,
          of_D.grad,
          grad_z,
          of_bias.grad,
          !initial_state ? torch::stable::new_empty(u, {0, a.d, a.n}, type)
                         : contiguous_as(carry, initial_state->scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace layerzoo
