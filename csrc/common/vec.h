// SIMD for kernels, on the compiler's own vector types (GCC and Clang): one source for every instruction set.
//
// A `*.cpu.cpp` file is compiled once per set with LZ_ISA a name of it, and everything here sits in that namespace, so
// that no inline function compiled for one set can be the linker's copy for another. `Vec<float>` has kBytes / 4 lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef LZ_ISA
#error "compile kernels with -DLZ_ISA=<namespace of the instruction set>"
#endif

namespace layerzoo::LZ_ISA {

#if defined(LZ_VEC_BYTES)  // tests compile the 64-byte code for machines that have 32-byte registers
constexpr int kBytes = LZ_VEC_BYTES;
#elif defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class S>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(S));
template <class S>
using Int = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
template <class S>
using Vec = typename VecOf<S, kLanes<S>>::type;
template <class S>
using IVec = typename VecOf<Int<S>, kLanes<S>>::type;

template <class S>
inline Vec<S> load(const S* p) {
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class S>
inline void store(S* p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class S>
inline Vec<S> splat(S x) {
  return x - Vec<S>{};  // not `x + Vec<S>{}`: that would turn -0 into +0
}

// The larger of the two; where `x` is NaN, x (so not std::max). Intrinsics because GCC turns a comparison and a choice
// into two instructions, and this stands in the innermost loops.
template <class S>
inline Vec<S> at_least(Vec<S> x, S bound) {
  const Vec<S> b = splat<S>(bound);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && sizeof(S) == 4) return (Vec<S>)_mm512_max_ps((__m512)b, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (kBytes == 32 && sizeof(S) == 4) return (Vec<S>)_mm256_max_ps((__m256)b, (__m256)x);
#endif
  return b > x ? b : x;
}
template <class S>
inline Vec<S> at_most(Vec<S> x, S bound) {
  const Vec<S> b = splat<S>(bound);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && sizeof(S) == 4) return (Vec<S>)_mm512_min_ps((__m512)b, (__m512)x);
#elif defined(__AVX2__)
  if constexpr (kBytes == 32 && sizeof(S) == 4) return (Vec<S>)_mm256_min_ps((__m256)b, (__m256)x);
#endif
  return b < x ? b : x;
}

// ---- exp, softplus, sigmoid: ours, because libm has no vector form and torch's needs Sleef ----
//
// They take N vectors at once, step by step: the chain of one would only wait for its own latency. For NaN they give
// anything, so callers multiply by what was NaN.

template <class S>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kMantissa = 23;
  static constexpr float kLow = -127, kHigh = 128;  // 2^-127 has exponent bits 0: zero; 2^128: infinity
  static constexpr float kShift = 12582912;         // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  // Minimax on [-0.5, 0.5] with the last two fixed: 1.05e-7
  static constexpr float kPolynomial[] = {0.00133002643f, 0.00966970809f, 0.0555055998f, 0.240222812f, 0.693147182f, 1};
  static constexpr float kLog1p[] = {0.140059948f, 0.140009031f, 0.200107634f, 0.333332092f, 1};  // 5e-9
};

template <>
struct Exp2<double> {
  static constexpr int kMantissa = 52;
  static constexpr double kLow = -1023, kHigh = 1024, kShift = 6755399441055744;
  // ln(2)^k / k!, k = 13 ... 0: the first term left out is 2e-18
  static constexpr double kPolynomial[] = {1.3691488853904124e-12, 2.5678435993488196e-11,
                                           4.44553827187081e-10,   7.054911620801121e-09,
                                           1.0178086009239696e-07, 1.3215486790144305e-06,
                                           1.5252733804059838e-05, 0.00015403530393381606,
                                           0.0013333558146428441,  0.009618129107628477,
                                           0.055504108664821576,   0.2402265069591007,
                                           0.6931471805599453,     1.0};
  // 1 / (2k + 1), k = 16 ... 0: the first term left out is 7e-18
  static constexpr double kLog1p[] = {1. / 33, 1. / 31, 1. / 29, 1. / 27, 1. / 25, 1. / 23, 1. / 21, 1. / 19, 1. / 17,
                                      1. / 15, 1. / 13, 1. / 11, 1. / 9,  1. / 7,  1. / 5,  1. / 3,  1};
};

// Highest power first.
template <class S, int N, int Terms>
__attribute__((always_inline)) inline void polynomial(const S (&c)[Terms], const Vec<S> (&x)[N], Vec<S> (&p)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = x[i] * c[0] + c[1];
#pragma GCC unroll 16
  for (int k = 2; k < Terms; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + c[k];
}

// 2^x, in place. Relative error < 1.1e-7 (float), 4e-16 (double) besides the rounding of x; exactly 1 at 0 with slope
// ln 2, because in a scan the error at 0 compounds with every step. Below the smallest normal number it gives 0, above
// the largest infinity; without kClamp, |x| must stay below kHigh - 2.
template <class S, int N, bool kClamp = true>
__attribute__((always_inline)) inline void exp2(Vec<S> (&x)[N]) {
  using E = Exp2<S>;
  Vec<S> shifted[N], p[N];
  if constexpr (kClamp) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) x[i] = at_most<S>(at_least<S>(x[i], E::kLow), E::kHigh);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) shifted[i] = x[i] + E::kShift;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = x[i] - (shifted[i] - E::kShift);  // [-0.5, 0.5]
  polynomial<S, N>(E::kPolynomial, x, p);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = (Vec<S>)((IVec<S>)p[i] + ((IVec<S>)shifted[i] << E::kMantissa));
}

// 1 / (1 + e^-x), in place. Relative error < 5e-7 (float), 2e-15 (double), and |x| half ulps from rounding x log2(e).
template <class S, int N>
__attribute__((always_inline)) inline void sigmoid(Vec<S> (&x)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = x[i] * static_cast<S>(-M_LOG2E);
  exp2<S, N>(x);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = splat<S>(1) / (x[i] + static_cast<S>(1));
}

// log(1 + e^x), in place, given w = e^-|x|, which it overwrites.
template <class S, int N>
__attribute__((always_inline)) inline void softplus_of(Vec<S> (&w)[N], Vec<S> (&x)[N]) {
  Vec<S> w2[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) w[i] = w[i] / (w[i] + static_cast<S>(2));  // log1p(e) = 2 artanh(w), w in (0, 1/3]
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) w2[i] = w[i] * w[i];
  polynomial<S, N>(Exp2<S>::kLog1p, w2, p);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const Vec<S> y = p[i] * (w[i] + w[i]) + at_least<S>(x[i], 0);
    if constexpr (sizeof(S) == 8)
      x[i] = x[i] > splat<S>(20) ? x[i] : y;  // in float the two are the same
    else
      x[i] = y;
  }
}

// e^-|x|.
template <class S, int N>
__attribute__((always_inline)) inline void exp_of_minus_size(const Vec<S> (&x)[N], Vec<S> (&w)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) w[i] = (x[i] > splat<S>(0) ? -x[i] : x[i]) * static_cast<S>(M_LOG2E);
  exp2<S, N>(w);  // (0, 1]
}

// log(1 + e^x), in place, with the error of `sigmoid`, for negative x too; identity above 20, as torch has it.
template <class S, int N>
__attribute__((always_inline)) inline void softplus(Vec<S> (&x)[N]) {
  Vec<S> w[N];
  exp_of_minus_size<S, N>(x, w);
  softplus_of<S, N>(w, x);
}

// The same with its derivative, which is the sigmoid of x, from one exp.
template <class S, int N>
__attribute__((always_inline)) inline void softplus(Vec<S> (&x)[N], Vec<S> (&slope)[N]) {
  Vec<S> w[N];
  exp_of_minus_size<S, N>(x, w);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) slope[i] = (x[i] > splat<S>(0) ? splat<S>(1) : w[i]) / (w[i] + static_cast<S>(1));
  if constexpr (sizeof(S) == 8)
    for (int i = 0; i < N; ++i) slope[i] = x[i] > splat<S>(20) ? splat<S>(1) : slope[i];
  softplus_of<S, N>(w, x);
}

template <class S>
inline Vec<S> exp2(Vec<S> x) {
  Vec<S> one[1] = {x};
  exp2<S, 1>(one);
  return one[0];
}

// ---- conversions ----

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude << 13) : (magnitude << 13) + (112u << 23);
  float f;
  if (magnitude < 0x400) {  // zero and subnormals: an integer times 2^-24
    f = static_cast<float>(magnitude) * 5.9604645e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

template <class S, class T>
inline S to(T x) {
  if constexpr (std::is_arithmetic_v<T>)
    return static_cast<S>(x);
  else
    return static_cast<S>(to_float(x));
}

inline BFloat16 to_bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

inline Half to_half(float f) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more round to infinity
  if (bits < 0x38800000) {                                                // below 2^-14: adding 0.5 rounds to 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits >> 13))};
#endif
}

template <class T, class S>
inline T from(S x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return to_bfloat16(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, Half>)
    return to_half(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// kLanes<S> consecutive elements of any type, as S.
template <class S, class T>
inline Vec<S> load_as(const T* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load<S>(p);
  } else if constexpr (std::is_same_v<S, float> && std::is_same_v<T, BFloat16>) {
    typename VecOf<uint16_t, kLanes<S>>::type h;
    std::memcpy(&h, p, sizeof h);
    return (Vec<S>)(__builtin_convertvector(h, typename VecOf<uint32_t, kLanes<S>>::type) << 16);
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<S, float> && std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64) return (Vec<S>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
    Vec<S> v;
    for (int i = 0; i < kLanes<S>; i += 8) {
      const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
      std::memcpy(reinterpret_cast<char*>(&v) + i * 4, &part, sizeof part);
    }
    return v;
#endif
  } else {
    Vec<S> v;
    for (int i = 0; i < kLanes<S>; ++i) v[i] = to<S>(p[i]);
    return v;
  }
}

template <class S, class T>
inline void store_as(T* p, Vec<S> v) {
  if constexpr (std::is_same_v<S, T>) {
    store<S>(p, v);
  } else if constexpr (std::is_same_v<S, float> && std::is_same_v<T, BFloat16>) {
    typedef typename VecOf<uint32_t, kLanes<S>>::type U;
    const U bits = (U)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const auto h = __builtin_convertvector((v != v ? (bits | 0x400000) : rounded) >> 16,
                                           typename VecOf<uint16_t, kLanes<S>>::type);
    std::memcpy(p, &h, sizeof h);
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<S, float> && std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64)
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#endif
    for (int i = 0; i < kLanes<S>; i += 8) {
      __m256 part;
      std::memcpy(&part, reinterpret_cast<const char*>(&v) + i * 4, sizeof part);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
  } else {
    for (int i = 0; i < kLanes<S>; ++i) p[i] = from<T>(v[i]);
  }
}

// ---- transpose ----

// Swaps the upper right and lower left block of every 2 x 2 blocks of side kSide in two rows kSide apart.
template <int kSide, class V, int... I>
__attribute__((always_inline)) inline void swap_blocks(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const V top = __builtin_shufflevector(a, b, ((I & kSide) ? n + I - kSide : I)...);
  b = __builtin_shufflevector(a, b, ((I & kSide) ? n + I : I + kSide)...);
  a = top;
}

// Rows become columns, in place.
template <class S, int kSide = kLanes<S> / 2>
__attribute__((always_inline)) inline void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int n = kLanes<S>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (!(i & kSide)) swap_blocks<kSide>(rows[i], rows[i + kSide], std::make_integer_sequence<int, n>{});
  if constexpr (kSide > 1) transpose<S, kSide / 2>(rows);
}

// Lanes of `a` where bit kSide of the index is clear, of `b` where it is set. An intrinsic because GCC takes shuffles
// for some of these, and fewer ports do those.
template <int kSide, class V, int... I>
__attribute__((always_inline)) inline V blend(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if defined(__AVX2__)
  if constexpr (n == 8 && sizeof(V) == 32)
    return (V)_mm256_blend_ps((__m256)a, (__m256)b, (((I & kSide) ? 1 << I : 0) | ...));
#endif
  return __builtin_shufflevector(a, b, ((I & kSide) ? n + I : I)...);
}

// Halves what is left to sum across lanes: lane i of the result is a[i] + a[i + kSide] where bit kSide of i is clear,
// and b[i] + b[i - kSide] where it is set.
template <int kSide, class V, int... I>
__attribute__((always_inline)) inline V fold(V a, V b, std::integer_sequence<int, I...> lanes) {
  constexpr int n = sizeof...(I);
  const V here = blend<kSide>(a, b, lanes);
  if constexpr (kSide > 1 || sizeof(V) != 32)
    return here + __builtin_shufflevector(a, b, ((I & kSide) ? n + I - kSide : I + kSide)...);
  const V there = blend<kSide>(b, a, lanes);  // AVX2 has no instruction that swaps neighbours and merges
  return here + __builtin_shufflevector(there, there, (I ^ kSide)...);
}
template <int kSide, class S>
__attribute__((always_inline)) inline Vec<S> fold(Vec<S> a, Vec<S> b) {
  return fold<kSide>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
}

// Sum of the lanes in a fixed order.
template <class S>
inline S reduce_add(Vec<S> v) {
  S s[kLanes<S>];
  store<S>(s, v);
  for (int n = kLanes<S> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// While one lives, subnormal numbers count as zero: a long decay drives states there, and each such operation would
// cost a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace layerzoo::LZ_ISA
