// The CPU op of Mamba-2's scan: checks of values, allocation, strides; the work is in the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../common/calls.h"
#include "../common/pages.h"
#include "ssd_args.h"
#include "values.h"

namespace layerzoo {
namespace {

CallCounter calls("ssd_chunk_scan"), backward_calls("ssd_chunk_scan_backward");

constexpr double kProductNanoseconds = 0.03;  // per multiply-add on one AVX2 core

// What both passes share. The tensors keep alive what `args` points at.
struct Ssd : SsdParameters {
  Tensor packed;
  std::vector<uint8_t> marks;

  template <class Args>
  Args prepare(const Tensor& x, const Tensor& dt, const Tensor& B, const Tensor& C, const OptionalTensor& z,
               const OptionalTensor& seq_idx, bool softplus, double low, double high) {
    Args a = arguments<Args>(x, dt, B, C, z, softplus, low, high);
    check_no_nan(A, "ssd_chunk_scan");
    marks = scan_marks(sequence_marks(seq_idx, "ssd_chunk_scan", a.b, a.l), a.b, a.l, false);
    a.marks = marks.empty() ? nullptr : marks.data();
    packed = torch::stable::new_empty(x, {a.b * a.g * a.chunks() * kernels().ssm.ssd_packed_size(a)}, type);
    a.packed = packed.data_ptr();
    const SsdArgs& plain = a;
    parallel(a.b * a.g * a.chunks(), kProductNanoseconds * kSsdChunk * kSsdChunk * static_cast<double>(a.n),
             [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.ssd_pack(plain, begin, end); });
    return a;
  }

  Ssd(const Tensor& x, const Tensor& A, const OptionalTensor& D, const OptionalTensor& bias,
      const OptionalTensor& initial)
      : SsdParameters(x, A, D, bias, initial), packed(this->A) {}
};

// Of `products` sums over the states for each step and channel.
double work(const SsdArgs& a, double products) {
  return products * kProductNanoseconds * static_cast<double>(a.l * a.p * (a.n + kSsdChunk / 4));
}

std::tuple<Tensor, Tensor, Tensor> ssd_chunk_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                                  const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                                                  const OptionalTensor& seq_idx, bool dt_softplus, double dt_low,
                                                  double dt_high, int64_t chunk) {
  STD_TORCH_CHECK(chunk == 0 || chunk == kSsdChunk, "ssd_chunk_scan: chunk must be 0 or ", kSsdChunk);
  ++calls;
  Ssd ssd(x, A, D, dt_bias, initial_states);
  auto a = ssd.prepare<SsdArgs>(x, dt, B, C, z, seq_idx, dt_softplus, dt_low, dt_high);
  Tensor out = in_large_pages(torch::stable::empty_like(x));
  Tensor last = torch::stable::new_empty(x, {a.b, a.h, a.p, a.n}, ssd.type);
  Tensor states = in_large_pages(torch::stable::new_empty(x, {a.b, chunk ? a.chunks() : 0, a.h, a.n, a.p}, ssd.type));
  a.out = heads(out, "out");
  a.final_states = last.data_ptr();
  a.states = chunk ? states.data_ptr() : nullptr;
  const SsmKernels& k = kernels().ssm;
  parallel_with_scratch(a.b * a.h, work(a, 2), k.ssd_chunk_scan_scratch(a),
                        [&](void* scratch, int64_t begin, int64_t end) { k.ssd_chunk_scan(a, scratch, begin, end); });
  return {out, last, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_chunk_scan_backward(
    const Tensor& grad_out, const OptionalTensor& grad_final_, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx, bool dt_softplus, double dt_low,
    double dt_high, const Tensor& states) {
  ++backward_calls;
  Ssd ssd(x, A, D, dt_bias, initial_states);
  auto a = ssd.prepare<SsdGradArgs>(x, dt, B, C, z, seq_idx, dt_softplus, dt_low, dt_high);
  const int64_t chunks = a.chunks();
  check_shape(grad_out, "grad_out", {a.b, a.l, a.h, a.p});
  check_shape(grad_final_, "grad_final_states", {a.b, a.h, a.p, a.n});
  check_shape(states, "states", {a.b, chunks, a.h, a.n, a.p});
  STD_TORCH_CHECK(states.is_contiguous() && states.scalar_type() == ssd.type, "states must come from ssd_chunk_scan");
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return in_large_pages(torch::stable::new_empty(x, std::vector<int64_t>(sizes), ssd.type));
  };
  const auto like = [](const Tensor& t) { return in_large_pages(torch::stable::empty_like(t)); };
  Tensor grad_x = like(x), grad_dt = like(dt), grad_B = like(B), grad_C = like(C), grad_z = z ? like(*z) : empty({0});
  Tensor grad_initial = empty({initial_states ? a.b : 0, a.h, a.p, a.n}), carries = empty({a.b, chunks, a.h, a.n, a.p});
  Tensor part_A = empty({a.b * chunks, a.h}), part_bias = empty({a.b * chunks, a.h});
  Tensor part_D = a.wide_D ? empty({a.b * chunks, a.h, a.p}) : empty({a.b * chunks, a.h});
  const OptionalTensor grad_final = contiguous_as(grad_final_, ssd.type);

  a.grad_out = heads(grad_out, "grad_out");
  a.grad_x = heads(grad_x, "grad_x"), a.grad_dt = heads(grad_dt, "grad_dt");
  a.grad_B = heads(grad_B, "grad_B"), a.grad_C = heads(grad_C, "grad_C");
  if (z) a.grad_z = heads(grad_z, "grad_z");
  a.grad_final = data_or_null(grad_final);
  a.grad_initial = initial_states ? grad_initial.data_ptr() : nullptr;
  a.states = states.data_ptr(), a.carries = carries.data_ptr();
  a.grad_A = part_A.data_ptr(), a.grad_D = part_D.data_ptr(), a.grad_bias = part_bias.data_ptr();
  // All heads of a group in one task add up the gradients of B and C in place; fewer where there would be too few
  // tasks.
  for (a.unit = a.h / a.g; a.unit > 4 && a.b * a.g * chunks * a.units() < 16;) a.unit = (a.unit + 1) / 2;
  const SsmKernels& k = kernels().ssm;
  Tensor parts = empty({a.units() * a.b * a.g * chunks * k.ssd_part_size(a)});
  a.parts = parts.data_ptr();
  parallel_with_scratch(a.b * a.h, work(a, 1), k.ssd_carry_scratch(a),
                        [&](void* scratch, int64_t begin, int64_t end) { k.ssd_carry(a, scratch, begin, end); });
  const double tasks = static_cast<double>(a.units() * a.b * a.g * chunks);
  parallel_with_scratch(a.units() * a.b * a.g * chunks, work(a, 4) * static_cast<double>(a.b * a.h) / tasks,
                        k.ssd_chunk_scan_backward_scratch(a), [&](void* scratch, int64_t begin, int64_t end) {
                          k.ssd_chunk_scan_backward(a, scratch, begin, end);
                        });
  parallel(a.b * a.g * chunks, static_cast<double>(2 * kSsdChunk * a.n * a.units()),
           [&](int64_t, int64_t begin, int64_t end) { k.ssd_unpack(a, begin, end); });
  return {grad_x,
          grad_dt,
          sum_parts(part_A, A),
          grad_B,
          grad_C,
          D ? sum_parts(part_D, *D) : empty({0}),
          grad_z,
          dt_bias ? sum_parts(part_bias, *dt_bias) : empty({0}),
          initial_states ? contiguous_as(grad_initial, initial_states->scalar_type()) : grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("ssd_chunk_scan", TORCH_BOX(&ssd_chunk_scan));
  m.impl("ssd_chunk_scan_backward", TORCH_BOX(&ssd_chunk_scan_backward));
}

}  // namespace layerzoo
