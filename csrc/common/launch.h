// The little that device code (`*.cuh`) needs from its compiler: nvcc for a GPU, or g++ for the emulator in
// tests/cuda_emulation, where the threads of a block are fibres and every access is checked.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "operand.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LZ_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define LZ_DEVICE __device__ __forceinline__
#define LZ_UNROLL _Pragma("unroll")
#define LZ_UNROLL_4 _Pragma("unroll 4")
// LZ_SHARED(tile, float[32][33]): a variable that the block shares. Its content is undefined at first.
#define LZ_SHARED(name, ...)         \
  using name##_shared = __VA_ARGS__; \
  __shared__ name##_shared name
// LZ_DYNAMIC_SHARED(row, float): a pointer to the bytes that the launch asked for; one a kernel.
#define LZ_DYNAMIC_SHARED(name, ...)                                 \
  extern __shared__ __align__(16) unsigned char lz_dynamic_shared[]; \
  __VA_ARGS__* const name = reinterpret_cast<__VA_ARGS__*>(lz_dynamic_shared)
// A kernel template with a comma goes in parentheses.
#define LZ_LAUNCH(kernel, grid, block, bytes, stream, ...) (kernel)<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define LZ_STREAM cudaStream_t

namespace layerzoo {

LZ_DEVICE float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
LZ_DEVICE float widen(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
LZ_DEVICE void narrow(float v, Half* p) { p->bits = __half_as_ushort(__float2half_rn(v)); }
LZ_DEVICE void narrow(float v, BFloat16* p) { p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }

}  // namespace layerzoo

#else

#include <emulator.h>  // defines the same macros and thread functions

namespace layerzoo {

LZ_DEVICE float widen(Half v) {
  _Float16 half;
  std::memcpy(&half, &v.bits, sizeof half);
  return half;
}

LZ_DEVICE float widen(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

LZ_DEVICE void narrow(float v, Half* p) {
  const _Float16 half = v;
  std::memcpy(&p->bits, &half, sizeof half);
}

LZ_DEVICE void narrow(float v, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

}  // namespace layerzoo

#endif

namespace layerzoo {

LZ_DEVICE float widen(float v) { return v; }
LZ_DEVICE double widen(double v) { return v; }
LZ_DEVICE void narrow(float v, float* p) { *p = v; }
LZ_DEVICE void narrow(double v, double* p) { *p = v; }
LZ_DEVICE void narrow(float v, double* p) { *p = v; }
LZ_DEVICE void narrow(double v, float* p) { *p = static_cast<float>(v); }

// What an element type is computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class S, class T>
LZ_DEVICE S load_as(const Operand& x, int64_t b, int64_t channel, int64_t time) {
  return static_cast<S>(widen(static_cast<const T*>(x.data)[b * x.batch + channel * x.channel + time * x.time]));
}

// For operands that are read rarely and come in a type of their own (under autocast weights and states stay fp32).
template <class S>
LZ_DEVICE S load(const Operand& x, int64_t b, int64_t channel, int64_t time) {
  S v = 0;
  LZ_DISPATCH_DTYPE(x.dtype, T, v = load_as<S, T>(x, b, channel, time))
  return v;
}

template <class T, class S>
LZ_DEVICE void store_as(const Operand& x, int64_t b, int64_t channel, int64_t time, S v) {
  narrow(v, static_cast<T*>(x.data) + b * x.batch + channel * x.channel + time * x.time);
}

template <class S>
LZ_DEVICE void store(const Operand& x, int64_t b, int64_t channel, int64_t time,
                     S v){LZ_DISPATCH_DTYPE(x.dtype, T, (store_as<T>(x, b, channel, time, v)))}

LZ_DEVICE int64_t load_id(const Ids& x, int64_t b, int64_t time) {
  const int64_t i = b * x.batch + time * x.time;
  return x.wide ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}

// Blocks for that many items: at least one, at most `max_blocks`.
inline unsigned blocks_for(int64_t items, int64_t max_blocks) {
  return static_cast<unsigned>(items < 1 ? 1 : items < max_blocks ? items : max_blocks);
}

}  // namespace layerzoo
