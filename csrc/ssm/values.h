// What the family's ops have in common: the type computed in, checks of values, sums of partial gradients.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "../common/checks.h"
#include "../common/parallel.h"
#include "../kernels.h"

namespace layerzoo {

template <class S>
void check_no_nan(const Tensor& A, const char* op) {
  const S* p = static_cast<const S*>(A.data_ptr());
  bool found = false;
  for (int64_t i = 0; i < A.numel(); ++i) found |= std::isnan(p[i]);
  STD_TORCH_CHECK(!found, op, ": A must not contain NaN");
}

inline void check_no_nan(const Tensor& A, const char* op) {
  A.scalar_type() == ScalarType::Double ? check_no_nan<double>(A, op) : check_no_nan<float>(A, op);
}

// seq_idx (batch, length) as int64 in memory order, after the check that it never goes back (marks < 0 are padding).
inline std::vector<int64_t> sequence_marks(const OptionalTensor& seq_idx, const char* op, int64_t b, int64_t l) {
  if (!seq_idx) return {};
  check_shape(seq_idx, "seq_idx", {b, l});
  const ScalarType type = seq_idx->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": seq_idx must be int32 or int64");
  const Tensor ids = torch::stable::contiguous(*seq_idx);
  std::vector<int64_t> marks(b * l);
  for (int64_t i = 0; i < b * l; ++i)
    marks[i] = type == ScalarType::Int ? static_cast<const int32_t*>(ids.data_ptr())[i]
                                       : static_cast<const int64_t*>(ids.data_ptr())[i];
  for (int64_t i = 0; i < b; ++i) {
    int64_t last = -1;
    for (int64_t t = 0; t < l; ++t) {
      const int64_t mark = marks[i * l + t];
      STD_TORCH_CHECK(mark < 0 || mark >= last, op, ": seq_idx must not decrease along a row, but seq_idx[", i, ", ", t,
                      "] = ", mark, " follows ", last);
      if (mark >= 0) last = mark;
    }
  }
  return marks;
}

inline std::vector<uint8_t> scan_marks(const std::vector<int64_t>& ids, int64_t b, int64_t l, bool reverse) {
  std::vector<uint8_t> marks(ids.size());
  if (ids.empty()) return marks;
  for (int64_t i = 0; i < b; ++i) {
    int64_t last = -1;  // the first sequence goes on from the initial state
    for (int64_t t = 0; t < l; ++t) {
      const int64_t id = ids[i * l + (reverse ? l - 1 - t : t)];
      marks[i * l + t] = id < 0 ? kPadding : last >= 0 && id != last ? kRestart : kContinue;
      if (id >= 0) last = id;
    }
  }
  return marks;
}

// Sum over the first dimension of `partial`, in order, into a new tensor shaped and typed like `like`.
inline Tensor sum_parts(const Tensor& partial, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, like.sizes());
  SumArgs a{};
  a.f64 = partial.scalar_type() == ScalarType::Double;
  a.parts = partial.size(0), a.size = like.numel();
  a.in = partial.data_ptr();
  a.out.data = out.data_ptr(), a.out.dtype = dtype_of(like, "gradient");
  parallel(a.size, 0.5 * static_cast<double>(a.parts),
           [&](int64_t, int64_t begin, int64_t end) { kernels().ssm.sum(a, begin, end); });
  return out;
}

}  // namespace layerzoo
