// A linear layer for few rows: limited by reading the weight, so each of its rows is read once, from one end to the
// other, and meets every row of x while it is in the L1 cache.
#include "../common/vec.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int kMost = 8;  // rows of x at once: one sum in registers for each, and several where there are few

// y[m * out] = the dot product of `weight` and row m of x, for M rows.
template <class S, class T, int M>
void dot(const SkinnyLinearArgs& a, const S* x, const T* weight, S* y) {
  constexpr int W = kLanes<S>, U = kMost / M;
  Vec<S> sum[M][U] = {};
  int64_t k = 0;
  for (; k + U * W <= a.in; k += U * W)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Vec<S> w = load_as<S>(weight + k + u * W);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][u] += w * load<S>(x + m * a.in + k + u * W);
    }
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sum[m][0] += sum[m][u];
    S rest = 0;
    for (int64_t i = k; i < a.in; ++i) rest += to<S>(weight[i]) * x[m * a.in + i];
    y[m * kLinearRows] = reduce_add<S>(sum[m][0]) + rest;
  }
}

template <class S, class T>
void dots(const SkinnyLinearArgs& a, const S* x, int rows, const T* weight, S* y) {
  switch (rows) {
    case 1:
      return dot<S, T, 1>(a, x, weight, y);
    case 2:
      return dot<S, T, 2>(a, x, weight, y);
    case 3:
      return dot<S, T, 3>(a, x, weight, y);
    case 4:
      return dot<S, T, 4>(a, x, weight, y);
    case 5:
      return dot<S, T, 5>(a, x, weight, y);
    case 6:
      return dot<S, T, 6>(a, x, weight, y);
    case 7:
      return dot<S, T, 7>(a, x, weight, y);
    default:
      return dot<S, T, kMost>(a, x, weight, y);
  }
}

template <class S, class T>
void tasks(const SkinnyLinearArgs& a, int64_t begin, int64_t end) {
  const S *x = static_cast<const S*>(a.x), *bias = static_cast<const S*>(a.bias);
  for (int64_t o0 = begin * kLinearRows; o0 < a.out && o0 < end * kLinearRows; o0 += kLinearRows) {
    const int count = static_cast<int>(a.out - o0 < kLinearRows ? a.out - o0 : kLinearRows);
    for (int64_t m0 = 0; m0 < a.rows; m0 += kMost) {
      const int rows = static_cast<int>(a.rows - m0 < kMost ? a.rows - m0 : kMost);
      S y[kMost * kLinearRows];
      for (int o = 0; o < count; ++o) {
        dots<S, T>(a, x + m0 * a.in, rows, static_cast<const T*>(a.weight) + (o0 + o) * a.weight_stride, y + o);
        if (bias)
          for (int m = 0; m < rows; ++m) y[m * kLinearRows + o] += bias[o0 + o];
      }
      LZ_DISPATCH_DTYPE(a.y_dtype, Y, {
        Y* out = static_cast<Y*>(a.y) + m0 * a.out + o0;
        for (int m = 0; m < rows; ++m)
          for (int o = 0; o < count; ++o) out[m * a.out + o] = from<Y>(y[m * kLinearRows + o]);
      })
    }
  }
}

}  // namespace

void skinny_linear(const SkinnyLinearArgs& a, int64_t begin, int64_t end) {
  LZ_DISPATCH_DTYPE(a.weight_dtype, T, a.f64 ? tasks<double, T>(a, begin, end) : tasks<float, T>(a, begin, end))
}

}  // namespace layerzoo::LZ_ISA
