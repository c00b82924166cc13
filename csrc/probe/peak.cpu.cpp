// The most that the arithmetic units do with the vectors and the exp2 that kernels use. What is computed is of no use,
// so the compiler must not know it: values come from and go to volatile variables, or pass through memory that it has
// to believe in.
#include "../common/vec.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

// Two units with a latency of five cycles need ten sums; with the two constants, sixteen registers hold twelve.
constexpr int kSums = 12;

template <class S>
int64_t multiply_adds(int64_t rounds) {
  volatile S unknown = static_cast<S>(0.5);  // x / 2 + 1/2 stays between 0 and 1
  const Vec<S> factor = splat<S>(unknown), term = splat<S>(unknown);
  Vec<S> sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = splat<S>(unknown);  // each read anew, or the sums would be one and the same
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + term;
  }
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  unknown = reduce_add<S>(sum[0]);
  return rounds * kSums * kLanes<S> * 2;
}

template <class S>
int64_t exps(int64_t rounds) {
  constexpr int W = kLanes<S>, N = 4, kElements = 4096 / sizeof(S);  // twice this lies in every L1 cache
  S x[kElements], y[kElements];
  for (int i = 0; i < kElements; ++i) x[i] = static_cast<S>(i % 64) - 32;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kElements; i += N * W) {
      Vec<S> v[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) v[k] = load<S>(x + i + k * W);
      exp2<S, N, false>(v);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) store<S>(y + i + k * W, v[k]);
    }
    __asm__ volatile("" : : "r"(x), "r"(y) : "memory");
  }
  return rounds * kElements;
}

}  // namespace

int64_t multiply_add(bool f64, int64_t rounds) {
  return f64 ? multiply_adds<double>(rounds) : multiply_adds<float>(rounds);
}

int64_t exponentials(bool f64, int64_t rounds) { return f64 ? exps<double>(rounds) : exps<float>(rounds); }

}  // namespace layerzoo::LZ_ISA
