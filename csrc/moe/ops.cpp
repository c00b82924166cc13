// The family's CPU ops. Schemas and the checks that users see are in layerzoo/ops/moe/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/calls.h"
#include "../common/pages.h"
#include "../common/parallel.h"
#include "../kernels.h"
#include "dispatch.h"
#include "experts_args.h"

namespace layerzoo {
namespace {

CallCounter calls("moe_experts"), backward_calls("moe_experts_backward");

// On one AVX2 core.
constexpr double kProductNanoseconds = 0.0125, kBytesPerNanosecond = 14;

struct Experts : ExpertsInputs {
  Sorted sorted;

  Experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const OptionalTensor& offsets, const Tensor& w13,
          const OptionalTensor& b13, const OptionalTensor& b2, int64_t first)
      : ExpertsInputs(x, weights, b13, b2),
        sorted(offsets ? Sorted::by_offsets(ids, *offsets, x.size(0)) : Sorted::by_ids(ids, w13.size(0), first)) {
    STD_TORCH_CHECK(pairs == ids.numel(), "moe_experts: weights must have the shape of ids");
  }

  Tensor empty(const std::vector<int64_t>& sizes) const {
    return in_large_pages(torch::stable::new_empty(x, sizes, type));
  }
};

// Of a task that multiplies the rows of one expert with `columns` of a matrix.
double work(const Dispatch& d, int64_t columns, int64_t length, int64_t element_size) {
  const double elements = static_cast<double>(columns * length);
  const double rows = static_cast<double>(d.rows) / static_cast<double>(std::max<int64_t>(d.active, 1));
  return elements * (rows * kProductNanoseconds + static_cast<double>(element_size) / kBytesPerNanosecond);
}

double combine_work(const Dispatch& d, int64_t outer) {
  return static_cast<double>(outer * (d.rows / std::max<int64_t>(d.tokens, 1) + 1)) * 0.25;
}

std::tuple<Tensor, Tensor> moe_experts(const Tensor& x, const Tensor& ids, const Tensor& weights,
                                       const OptionalTensor& offsets, const Tensor& w13, const Tensor& w2,
                                       const OptionalTensor& b13, const OptionalTensor& b2, int64_t activation,
                                       bool gated, bool transposed, bool interleaved, double alpha, double shift,
                                       double limit, int64_t first, bool save) {
  ++calls;
  const Experts experts(x, ids, weights, offsets, w13, b13, b2, first);
  auto a = experts.arguments<ExpertsArgs>(experts.sorted, w13, w2, activation, gated, transposed, interleaved, alpha,
                                          shift, limit);
  Tensor out = torch::stable::new_empty(x, {a.tokens, a.outer});
  Tensor hidden = experts.empty({save ? experts.pairs : 0, a.width()});
  Tensor inner = experts.empty({a.rows, a.inner}), y = experts.empty({a.rows, a.outer});
  a.hidden = save ? hidden.data_ptr() : nullptr, a.a = inner.data_ptr(), a.y = y.data_ptr();
  a.out = out.data_ptr(), a.out_dtype = dtype_of(x, "x");
  const MoeKernels& k = kernels().moe;
  const int64_t scratch = k.experts_scratch(a), size = w13.element_size();
  parallel_with_scratch(a.active * a.inner_tasks(), work(a, 2 * kMoeInner, a.outer, size), scratch,
                        [&](void* own, int64_t begin, int64_t end) { k.experts_up(a, own, begin, end); });
  parallel_with_scratch(a.active * a.outer_tasks(), work(a, kMoeOuter, a.inner, size), scratch,
                        [&](void* own, int64_t begin, int64_t end) { k.experts_down(a, own, begin, end); });
  parallel(a.tokens, combine_work(a, a.outer),
           [&](int64_t, int64_t begin, int64_t end) { k.experts_combine(a, begin, end); });
  return {out, hidden};
}

// Bits of `needed`: x, weights, w13, w2, b13, b2.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& ids, const Tensor& weights, const OptionalTensor& offsets,
    const Tensor& w13, const Tensor& w2, const OptionalTensor& b13, const OptionalTensor& b2, int64_t activation,
    bool gated, bool transposed, bool interleaved, double alpha, double shift, double limit, int64_t first,
    const Tensor& hidden, int64_t needed) {
  ++backward_calls;
  const Experts experts(x, ids, weights, offsets, w13, b13, b2, first);
  auto a = experts.arguments<ExpertsGradArgs>(experts.sorted, w13, w2, activation, gated, transposed, interleaved,
                                              alpha, shift, limit);
  const ExpertsGradients grads(experts, a, needed, grad_out, hidden, weights, w13, w2, transposed);
  for (const Tensor& t : {grads.w13, grads.w2}) in_large_pages(t);
  torch::stable::fill_(Tensor(grads.weights), 0);  // of what is dropped
  Tensor inner = experts.empty({a.rows, a.inner}), grad_hidden = experts.empty({a.rows, a.width()});
  Tensor parts = experts.empty({a.rows, a.inner_tasks()}), y = experts.empty({grads.wanted(0) ? a.rows : 0, a.outer});
  a.a = inner.data_ptr(), a.grad_hidden = grad_hidden.data_ptr(), a.parts = parts.data_ptr(), a.y = y.data_ptr();
  const MoeKernels& k = kernels().moe;
  const int64_t scratch = k.experts_backward_scratch(a), size = w13.element_size();
  parallel_with_scratch(a.active * a.inner_tasks(), work(a, kMoeInner, a.outer, size), scratch,
                        [&](void* own, int64_t begin, int64_t end) { k.experts_grad_hidden(a, own, begin, end); });
  if (grads.wanted(0)) {
    parallel_with_scratch(a.active * a.outer_tasks(), work(a, kMoeOuter, a.width(), size), scratch,
                          [&](void* own, int64_t begin, int64_t end) { k.experts_grad_x(a, own, begin, end); });
    ExpertsArgs sum = a;
    sum.weights = nullptr;
    parallel(a.tokens, combine_work(a, a.outer),
             [&](int64_t, int64_t begin, int64_t end) { k.experts_combine(sum, begin, end); });
  }
  if (grads.wanted(2))
    parallel_with_scratch(a.w13_tasks(), work(a, kMoeGradient, a.outer, size), scratch,
                          [&](void* own, int64_t begin, int64_t end) { k.experts_grad_w13(a, own, begin, end); });
  if (grads.wanted(3))
    parallel_with_scratch(a.w2_tasks(), work(a, kMoeGradient, a.inner, size), scratch,
                          [&](void* own, int64_t begin, int64_t end) { k.experts_grad_w2(a, own, begin, end); });
  if (grads.wanted(1) || grads.wanted(4) || grads.wanted(5))
    parallel(a.experts, work(a, 1, a.width() + a.outer, 4),
             [&](int64_t, int64_t begin, int64_t end) { k.experts_grad_small(a, begin, end); });
  return grads.results(weights, b13, b2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace layerzoo
