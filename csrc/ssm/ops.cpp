// The family's CPU ops over whole sequences: checks of values, allocation, strides; the work is in the kernels. Schemas
// and the checks that users see are in layerzoo/ops/ssm; the ops that work in place are in update_ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/pages.h"
#include "../common/parallel.h"
#include "../kernels.h"
#include "values.h"

namespace layerzoo {
namespace {

CallCounter scan_calls("selective_scan"), scan_backward_calls("selective_scan_backward"), conv_calls("causal_conv1d"),
    conv_backward_calls("causal_conv1d_backward");

constexpr double kScanNanoseconds = 0.4, kScanBackwardNanoseconds = 0.9;  // per element on one AVX2 core

PackArgs pack_args(const Tensor& t, const char* name, bool f64, bool reverse, void* packed, int64_t parts = 1) {
  PackArgs a{};
  a.f64 = f64;
  a.b = t.size(0), a.g = t.dim() == 4 ? t.size(1) : 1, a.n = t.size(-2), a.l = t.size(-1);
  a.x.dtype = dtype_of(t, name);
  a.x.data = t.data_ptr();
  a.x.batch = t.stride(0), a.x.channel = t.stride(-2), a.x.time = t.stride(-1);
  a.group = t.dim() == 4 ? t.stride(1) : 0;
  if (reverse && a.l > 0) {
    a.x.data = static_cast<char*>(a.x.data) + (a.l - 1) * a.x.time * t.element_size();
    a.x.time = -a.x.time;
  }
  a.packed = packed;
  a.parts = parts;
  return a;
}

// B or C as the kernel wants it: (b, g, l, n) in the order of the scan, or (d, n).
Tensor coefficients(const Tensor& t, const char* name, ScalarType type, bool reverse) {
  if (t.dim() == 2) return contiguous_as(t, type);
  const int64_t groups = t.dim() == 4 ? t.size(1) : 1;
  Tensor packed = torch::stable::new_empty(t, {t.size(0), groups, t.size(-1), t.size(-2)}, type);
  const PackArgs a = pack_args(t, name, type == ScalarType::Double, reverse, packed.data_ptr());
  parallel(a.b * a.g, static_cast<double>(a.l * a.n),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.pack(a, begin, end); });
  return packed;
}

// Everything both passes share. The tensors keep alive what `args` points at.
struct Scan {
  ScalarType type;
  Tensor A, B, C;
  OptionalTensor D, bias, initial_state;
  std::vector<uint8_t> marks;

  template <class Args>
  Args prepare(const Tensor& u, const Tensor& delta, const OptionalTensor& z, bool softplus,
               const OptionalTensor& seq_idx, bool reverse) {
    Args a{};
    a.f64 = type == ScalarType::Double, a.softplus = softplus;
    a.b = u.size(0), a.d = u.size(1), a.l = u.size(2), a.n = A.size(1);
    a.constant_B = B.dim() == 2, a.constant_C = C.dim() == 2;
    a.g = !a.constant_B ? B.size(1) : !a.constant_C ? C.size(1) : 1;
    STD_TORCH_CHECK(a.g > 0 && a.d % a.g == 0, "selective_scan: the channels must divide into the groups of B and C");
    check_shape(delta, "delta", {a.b, a.d, a.l});
    check_shape(z, "z", {a.b, a.d, a.l});
    check_shape(A, "A", {a.d, a.n});
    a.constant_B ? check_shape(B, "B", {a.d, a.n}) : check_shape(B, "packed B", {a.b, a.g, a.l, a.n});
    a.constant_C ? check_shape(C, "C", {a.d, a.n}) : check_shape(C, "packed C", {a.b, a.g, a.l, a.n});
    check_shape(D, "D", {a.d});
    check_shape(bias, "delta_bias", {a.d});
    check_shape(initial_state, "initial_state", {a.b, a.d, a.n});
    check_no_nan(A, "selective_scan");
    const std::vector<int64_t> ids = sequence_marks(seq_idx, "selective_scan", a.b, a.l);
    marks = scan_marks(ids, a.b, a.l, reverse);
    a.marks = marks.empty() ? nullptr : marks.data();
    a.u = operand(u, "u", reverse), a.delta = operand(delta, "delta", reverse), a.z = operand(z, "z", reverse);
    a.A = A.data_ptr(), a.B = B.data_ptr(), a.C = C.data_ptr();
    a.D = data_or_null(D), a.bias = data_or_null(bias), a.initial_state = data_or_null(initial_state);
    // Channel-last rows should be long; time-last ones, one for each channel, few. Smaller where there would be too few
    // tasks for many threads.
    for (a.unit = a.u.channel == 1 ? 256 : 64; a.unit > 16 && a.tasks() < 12;) a.unit /= 2;
    return a;
  }

  Scan(const Tensor& u, const Tensor& A_, const Tensor& B_, const Tensor& C_, const OptionalTensor& D_,
       const OptionalTensor& bias_, const OptionalTensor& initial, bool reverse)
      : type(accumulate_type(u)),
        A(contiguous_as(A_, type)),
        B(coefficients(B_, "B", type, reverse)),
        C(coefficients(C_, "C", type, reverse)),
        D(contiguous_as(D_, type)),
        bias(contiguous_as(bias_, type)),
        initial_state(contiguous_as(initial, type)) {}
};

double scan_work(const ScanArgs& a, double nanoseconds) {
  return nanoseconds * static_cast<double>(a.unit * a.l * (a.n + 8));
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  bool delta_softplus, const OptionalTensor& initial_state,
                                                  const OptionalTensor& seq_idx, bool reverse, int64_t chunk) {
  STD_TORCH_CHECK(chunk == 0 || chunk == kScanChunk, "selective_scan: chunk must be 0 or ", kScanChunk);
  ++scan_calls;
  Scan scan(u, A, B, C, D, delta_bias, initial_state, reverse);
  auto a = scan.prepare<ScanArgs>(u, delta, z, delta_softplus, seq_idx, reverse);
  Tensor out = in_large_pages(torch::stable::empty_like(u));
  Tensor last = torch::stable::new_empty(u, {a.b, a.d, a.n}, scan.type);
  Tensor states = in_large_pages(torch::stable::new_empty(u, {a.b, chunk ? a.chunks() : 0, a.n, a.d}, scan.type));
  a.out = operand(out, "out", reverse);
  a.last_state = last.data_ptr();
  a.states = chunk ? states.data_ptr() : nullptr;
  const SsmKernels& k = kernels().ssm;
  parallel_with_scratch(a.tasks(), scan_work(a, kScanNanoseconds), k.selective_scan_scratch(a),
                        [&](void* scratch, int64_t begin, int64_t end) { k.selective_scan(a, scratch, begin, end); });
  return {out, last, states};
}

// Partial sums of the gradient of B or C into its own layout and type.
Tensor gather_coefficients(const Tensor& partial, const Tensor& like, bool reverse) {
  if (like.dim() == 2) return sum_parts(partial, like);
  Tensor out = torch::stable::empty_like(like);
  const PackArgs a = pack_args(out, "gradient", partial.scalar_type() == ScalarType::Double, reverse,
                               partial.data_ptr(), partial.size(0));
  parallel(a.b * a.g * a.chunks(), 0.3 * static_cast<double>(kScanChunk * a.n * a.parts),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.unpack(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_out, const OptionalTensor& grad_last_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, bool reverse, const Tensor& states) {
  ++scan_backward_calls;
  Scan scan(u, A, B, C, D, delta_bias, initial_state, reverse);
  auto a = scan.prepare<ScanGradArgs>(u, delta, z, delta_softplus, seq_idx, reverse);
  check_shape(grad_out, "grad_out", {a.b, a.d, a.l});
  check_shape(grad_last_state, "grad_last_state", {a.b, a.d, a.n});
  check_shape(states, "states", {a.b, a.chunks(), a.n, a.d});
  STD_TORCH_CHECK(states.is_contiguous() && states.scalar_type() == scan.type, "states must come from selective_scan");
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return in_large_pages(torch::stable::new_empty(u, std::vector<int64_t>(sizes), scan.type));
  };
  const auto coefficient_parts = [&](bool constant) {
    const int64_t units = a.units_per_group();
    return constant ? empty({a.b, a.d, a.n}) : empty({units, a.b, a.g, a.l, a.n});
  };
  Tensor grad_u = in_large_pages(torch::stable::empty_like(u));
  Tensor grad_delta = in_large_pages(torch::stable::empty_like(delta));
  Tensor grad_z = z ? in_large_pages(torch::stable::empty_like(*z)) : empty({0});
  Tensor part_A = empty({a.b, a.d, a.n}), part_D = empty({a.b, a.d}), part_bias = empty({a.b, a.d});
  Tensor part_B = coefficient_parts(a.constant_B), part_C = coefficient_parts(a.constant_C);
  Tensor grad_initial = empty({initial_state ? a.b : 0, a.d, a.n});
  const OptionalTensor grad_last = contiguous_as(grad_last_state, scan.type);

  a.grad_out = operand(grad_out, "grad_out", reverse);
  a.grad_u = operand(grad_u, "grad_u", reverse), a.grad_delta = operand(grad_delta, "grad_delta", reverse);
  a.grad_z = z ? operand(grad_z, "grad_z", reverse) : Operand{};
  a.grad_last_state = data_or_null(grad_last);
  a.grad_initial_state = initial_state ? grad_initial.data_ptr() : nullptr;
  a.grad_A = part_A.data_ptr(), a.grad_D = part_D.data_ptr(), a.grad_bias = part_bias.data_ptr();
  a.grad_B = part_B.data_ptr(), a.grad_C = part_C.data_ptr();
  a.states = states.data_ptr();
  const SsmKernels& k = kernels().ssm;
  parallel_with_scratch(
      a.tasks(), scan_work(a, kScanBackwardNanoseconds), k.selective_scan_backward_scratch(a),
      [&](void* scratch, int64_t begin, int64_t end) { k.selective_scan_backward(a, scratch, begin, end); });
  return {grad_u,
          grad_delta,
          sum_parts(part_A, A),
          gather_coefficients(part_B, B, reverse),
          gather_coefficients(part_C, C, reverse),
          D ? sum_parts(part_D, *D) : empty({0}),
          grad_z,
          delta_bias ? sum_parts(part_bias, *delta_bias) : empty({0}),
          initial_state ? contiguous_as(grad_initial, initial_state->scalar_type()) : grad_initial};
}

template <class Args>
Args conv_args(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu, bool reverse) {
  Args a{};
  a.f64 = accumulate_type(x) == ScalarType::Double, a.silu = silu;
  a.b = x.size(0), a.d = x.size(1), a.l = x.size(2), a.w = weight.size(1);
  check_shape(weight, "weight", {a.d, a.w});
  check_shape(bias, "bias", {a.d});
  STD_TORCH_CHECK(a.w > 0, "causal_conv1d: weight must have at least one tap");
  a.x = operand(x, "x", reverse);
  a.weight = weight.data_ptr(), a.bias = data_or_null(bias);
  return a;
}

// The ids of seq_idx in the order of the convolution.
std::vector<int64_t> conv_ids(const OptionalTensor& seq_idx, int64_t b, int64_t l, bool reverse) {
  std::vector<int64_t> ids = sequence_marks(seq_idx, "causal_conv1d", b, l);
  for (int64_t i = 0; reverse && seq_idx && i < b; ++i) std::reverse(ids.begin() + i * l, ids.begin() + (i + 1) * l);
  return ids;
}

double conv_work(const ConvArgs& a, double passes) { return passes * 16 * static_cast<double>(a.l * (a.w + 4)) * 0.2; }

constexpr int64_t kLeastRow = 16;  // channels that are worth reading as a row

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight_, const OptionalTensor& bias_,
                                         const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                                         bool reverse) {
  ++conv_calls;
  const ScalarType type = accumulate_type(x);
  const Tensor weight = contiguous_as(weight_, type);
  const OptionalTensor bias = contiguous_as(bias_, type);
  auto a = conv_args<ConvArgs>(x, weight, bias, silu, reverse);
  check_shape(initial_states, "initial_states", {a.b, a.d, a.w - 1});
  const std::vector<int64_t> ids = conv_ids(seq_idx, a.b, a.l, reverse);
  a.seq_idx = seq_idx ? ids.data() : nullptr;
  a.initial = operand(initial_states, "initial_states", reverse);
  Tensor out = in_large_pages(torch::stable::empty_like(x)),
         final_state = torch::stable::new_empty(x, {a.b, a.d, a.w - 1});
  a.out = operand(out, "out", reverse), a.final_state = operand(final_state, "final_states", reverse);
  const SsmKernels& k = kernels().ssm;
  if (a.x.channel == 1 && a.out.channel == 1 && a.d >= kLeastRow && !seq_idx)
    parallel_with_scratch(
        a.row_tasks(), conv_work(a, 1) * a.tasks() / a.row_tasks(), k.causal_conv1d_rows_scratch(a),
        [&](void* scratch, int64_t begin, int64_t end) { k.causal_conv1d_rows(a, scratch, begin, end); });
  else
    parallel_with_scratch(a.tasks(), conv_work(a, 1), k.causal_conv1d_scratch(a),
                          [&](void* scratch, int64_t begin, int64_t end) { k.causal_conv1d(a, scratch, begin, end); });
  return {out, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& grad_out,
                                                                  const OptionalTensor& grad_final, const Tensor& x,
                                                                  const Tensor& weight_, const OptionalTensor& bias_,
                                                                  const OptionalTensor& seq_idx,
                                                                  const OptionalTensor& initial_states, bool silu,
                                                                  bool reverse) {
  ++conv_backward_calls;
  const ScalarType type = accumulate_type(x);
  const Tensor weight = contiguous_as(weight_, type);
  const OptionalTensor bias = contiguous_as(bias_, type);
  auto a = conv_args<ConvGradArgs>(x, weight, bias, silu, reverse);
  check_shape(grad_out, "grad_out", {a.b, a.d, a.l});
  check_shape(initial_states, "initial_states", {a.b, a.d, a.w - 1});
  check_shape(grad_final, "grad_final_states", {a.b, a.d, a.w - 1});
  const std::vector<int64_t> ids = conv_ids(seq_idx, a.b, a.l, reverse);
  a.seq_idx = seq_idx ? ids.data() : nullptr;
  a.initial = operand(initial_states, "initial_states", reverse);
  Tensor grad_x = in_large_pages(torch::stable::empty_like(x));
  Tensor grad_initial = initial_states ? torch::stable::empty_like(*initial_states) : torch::stable::new_empty(x, {0});
  Tensor part_weight = torch::stable::new_empty(x, {a.b, a.d, a.w}, type);
  Tensor part_bias = torch::stable::new_empty(x, {a.b, a.d}, type);
  a.grad_out = operand(grad_out, "grad_out", reverse), a.grad_x = operand(grad_x, "grad_x", reverse);
  a.grad_final = operand(grad_final, "grad_final_states", reverse);
  if (initial_states) a.grad_initial = operand(grad_initial, "grad_initial_states", reverse);
  a.grad_weight = part_weight.data_ptr(), a.grad_bias = part_bias.data_ptr();
  const SsmKernels& k = kernels().ssm;
  parallel_with_scratch(
      a.tasks(), conv_work(a, 3), k.causal_conv1d_scratch(a),
      [&](void* scratch, int64_t begin, int64_t end) { k.causal_conv1d_backward(a, scratch, begin, end); });
  return {grad_x, sum_parts(part_weight, weight_),
          bias_ ? sum_parts(part_bias, *bias_) : torch::stable::new_empty(x, {0}), grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}

}  // namespace layerzoo
