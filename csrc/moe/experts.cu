// layerzoo::moe_experts and its backward on CUDA: allocation and launches. How many rows there are is known on the
// device alone, so that nothing waits for it: there is room for all pairs. Ids out of range drop their pair.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../common/cuda_checks.h"
#include "experts_args.h"
#include "experts_backward.cuh"

namespace layerzoo {
namespace {

Dispatch numbers(const Tensor& x, const Tensor& w13) {
  Dispatch d;
  d.tokens = x.size(0), d.experts = w13.size(0);
  return d;
}

// What both passes share; the tensors keep alive what `args` points at.
struct CudaExperts : ExpertsInputs {
  CudaExpertsArgs a;
  std::vector<Tensor> scratch;

  CudaExperts(const Tensor& x, const Tensor& ids_, const Tensor& weights, const OptionalTensor& offsets,
              const Tensor& w13, const Tensor& w2, const OptionalTensor& b13, const OptionalTensor& b2,
              int64_t activation, bool gated, bool transposed, bool interleaved, double alpha, double shift,
              double limit, int64_t first)
      : ExpertsInputs(x, weights, b13, b2),
        a(arguments<CudaExpertsArgs>(numbers(x, w13), w13, w2, activation, gated, transposed, interleaved, alpha, shift,
                                     limit)) {
    check_device("moe_experts", x, ids_, weights, offsets, w13, w2, b13, b2);
    STD_TORCH_CHECK(pairs < std::numeric_limits<int32_t>::max(), "moe_experts: too many pairs: ", pairs);
    CudaSort& s = a.sort;
    s.k = offsets || a.tokens == 0 ? 0 : pairs / a.tokens;
    s.ids = offsets ? ids(ids_, "tokens", {pairs}) : ids(ids_, "ids", {a.tokens, s.k});
    if (offsets) s.choices = ids(offsets, "offsets", {a.experts + 1});
    s.tokens = a.tokens, s.experts = a.experts, s.pairs = pairs, s.first = first;
    s.tile = moe_tile(pairs, a.experts), s.parts = sort_parts(pairs);
    for (int32_t** p : {&s.expert, &s.pair, &s.row, &s.token, &s.spare}) *p = integers(pairs);
    for (int32_t** p : {&s.offsets, &s.tiles}) *p = integers(a.experts + 1);
    s.counts = integers(sort_counts(s.parts, a.tokens, a.experts));
    if (offsets) {
      for (int32_t** p : {&s.chooser, &s.pairs_of_token}) *p = integers(pairs);
      s.token_begin = integers(a.tokens + 1);
    }
  }

  Tensor empty(const std::vector<int64_t>& sizes) const { return torch::stable::new_empty(x, sizes, type); }

  void* keep(const Tensor& t) {
    scratch.push_back(t);
    return t.data_ptr();
  }

  int32_t* integers(int64_t count) {
    return static_cast<int32_t*>(keep(torch::stable::new_empty(x, std::vector<int64_t>{count}, ScalarType::Int)));
  }
};

std::tuple<Tensor, Tensor> moe_experts(const Tensor& x, const Tensor& ids, const Tensor& weights,
                                       const OptionalTensor& offsets, const Tensor& w13, const Tensor& w2,
                                       const OptionalTensor& b13, const OptionalTensor& b2, int64_t activation,
                                       bool gated, bool transposed, bool interleaved, double alpha, double shift,
                                       double limit, int64_t first, bool save) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CudaExperts experts(x, ids, weights, offsets, w13, w2, b13, b2, activation, gated, transposed, interleaved, alpha,
                      shift, limit, first);
  CudaExpertsArgs& a = experts.a;
  Tensor out = torch::stable::new_empty(x, {a.tokens, a.outer});
  Tensor hidden = experts.empty({save ? experts.pairs : 0, a.width()});
  a.hidden = save ? hidden.data_ptr() : nullptr;
  a.a = experts.keep(experts.empty({experts.pairs, a.inner}));
  a.y = experts.keep(experts.empty({experts.pairs, a.outer}));
  a.out = out.data_ptr(), a.out_dtype = dtype_of(x, "x");
  a.f64 ? moe_experts_launch<double>(a, kMaxBlocks, current_stream(x))
        : moe_experts_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, hidden};
}

// Bits of `needed`: x, weights, w13, w2, b13, b2.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& ids, const Tensor& weights, const OptionalTensor& offsets,
    const Tensor& w13, const Tensor& w2, const OptionalTensor& b13, const OptionalTensor& b2, int64_t activation,
    bool gated, bool transposed, bool interleaved, double alpha, double shift, double limit, int64_t first,
    const Tensor& hidden, int64_t needed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CudaExperts experts(x, ids, weights, offsets, w13, w2, b13, b2, activation, gated, transposed, interleaved, alpha,
                      shift, limit, first);
  CudaExpertsArgs& a = experts.a;
  check_device("moe_experts", x, grad_out, hidden);
  const ExpertsGradients grads(experts, a, needed, grad_out, hidden, weights, w13, w2, transposed);
  a.a = experts.keep(experts.empty({experts.pairs, a.inner}));
  a.grad_hidden = experts.keep(experts.empty({experts.pairs, a.width()}));
  a.parts = experts.keep(experts.empty({experts.pairs, moe_tiles(a.inner)}));
  if (grads.wanted(0)) a.y = experts.keep(experts.empty({experts.pairs, a.outer}));
  a.f64 ? moe_experts_backward_launch<double>(a, kMaxBlocks, current_stream(x))
        : moe_experts_backward_launch<float>(a, kMaxBlocks, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grads.results(weights, b13, b2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CUDA, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace layerzoo
