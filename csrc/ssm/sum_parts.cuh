// out[i] = the sum over p of in[p][i], always in the same order: the end of reductions over blocks, without atomics.
#pragma once

#include "../common/launch.h"

namespace layerzoo {

struct SumPartsArgs {
  int64_t parts, size;
  const void* in;  // (parts, size)
  Operand out;     // contiguous, `size` elements of any type
};

constexpr int kSumRows = 8;  // warps of a block, each of which sums every eighth part

template <class S>
LZ_KERNEL(kSumRows * 32)
sum_parts_kernel(const SumPartsArgs a) {
  LZ_SHARED(sums, S[kSumRows][32]);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  for (int64_t i0 = int64_t(blockIdx.x) * 32; i0 < a.size; i0 += int64_t(gridDim.x) * 32) {
    const int64_t i = i0 + lane;
    S sum = 0;
    for (int64_t p = row; i < a.size && p < a.parts; p += kSumRows) sum += static_cast<const S*>(a.in)[p * a.size + i];
    sums[row][lane] = sum;
    __syncthreads();  // every row has its sum
    for (int r = 1; row == 0 && r < kSumRows; ++r) sum += sums[r][lane];
    if (row == 0 && i < a.size) LZ_DISPATCH_DTYPE(a.out.dtype, T, narrow(sum, static_cast<T*>(a.out.data) + i))
    __syncthreads();  // sums are read
  }
}

template <class S>
void sum_parts(const SumPartsArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.size > 0)
    LZ_LAUNCH(sum_parts_kernel<S>, blocks_for((a.size + 31) / 32, max_blocks), kSumRows * 32, 0, stream, a);
}

}  // namespace layerzoo
