// The family's CPU ops. Schemas and the checks that users see are in layerzoo/ops/linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../common/calls.h"
#include "../common/checks.h"
#include "../common/parallel.h"
#include "../kernels.h"

namespace layerzoo {
namespace {

CallCounter skinny_linear_calls("skinny_linear");

constexpr double kBytesPerNanosecond = 20;  // that one core reads

Tensor skinny_linear(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) {
  ++skinny_linear_calls;
  STD_TORCH_CHECK(x_.dim() >= 1 && weight_.dim() == 2, "skinny_linear: x must have a dimension, weight two");
  const bool f64 = x_.scalar_type() == ScalarType::Double;
  const ScalarType type = f64 ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> shape(x_.sizes().begin(), x_.sizes().end());
  SkinnyLinearArgs a{};
  a.f64 = f64, a.in = weight_.size(1), a.out = weight_.size(0);
  STD_TORCH_CHECK(shape.back() == a.in, "skinny_linear: the last dimension of x must be ", a.in);
  check_shape(bias_, "bias", {a.out});
  a.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) a.rows *= shape[i];
  shape.back() = a.out;
  const Tensor x = contiguous_as(x_, type);
  const Tensor weight = weight_.stride(1) == 1 || a.in <= 1 ? weight_ : torch::stable::contiguous(weight_);
  const OptionalTensor bias = contiguous_as(bias_, type);
  Tensor y = torch::stable::new_empty(x_, shape);
  a.x = x.data_ptr(), a.bias = data_or_null(bias);
  a.weight = weight.data_ptr(), a.weight_dtype = dtype_of(weight, "weight"), a.weight_stride = weight.stride(0);
  a.y = y.data_ptr(), a.y_dtype = dtype_of(x_, "x");
  const double bytes = static_cast<double>(kLinearRows * a.in * weight.element_size());
  parallel(a.tasks(), bytes / kBytesPerNanosecond * static_cast<double>(1 + a.rows / 8),
           [&](int64_t, int64_t begin, int64_t end) { kernels().linear.skinny_linear(a, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerzoo, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&skinny_linear)); }

}  // namespace layerzoo
