// A kernel that is right as it stands (FAULT 0) and wrong in one way under each -DFAULT=n: what the emulator must
// catch. Prints nothing and returns 0 where all is well, else the first error. Arguments: seeds.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "common/launch.h"

#ifndef FAULT
#define FAULT 0
#endif

namespace {

constexpr int kThreads = 64, kChunks = 3, kSize = kThreads * kChunks;

struct alignas(16) Four {
  float x, y, z, w;
};

// out[i] = in[i - 1] + in[i] in chunks; mean[w] = sum over a warp's threads; *total += each block's sum; copy = in.
LZ_KERNEL(kThreads) neighbours(const float* in, float* out, float* mean, float* total, float* copy) {
  LZ_SHARED(tile, float[kThreads + 1]);
  LZ_SHARED(rows, float[2][33]);
  LZ_DYNAMIC_SHARED(lanes, float);
  const int t = threadIdx.x;
  float sum = 0;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int i = chunk * kThreads + t;
    tile[t + 1] = in[i + (FAULT == 1)];
#if FAULT != 2
    if (t == 0) tile[0] = chunk ? in[i - 1] : 0;
#endif
#if FAULT == 3
    if (t < 32) __syncthreads();
#endif
#if FAULT != 4
    __syncthreads();
#endif
    const float pair = tile[t] + tile[t + 1];
#if FAULT != 6
    if (blockIdx.x == 0)
#endif
      out[i] = pair;
    sum += pair;
#if FAULT != 7
    __syncthreads();
#endif
  }

#if FAULT == 5
  lanes[t + t / 63] = sum;
#else
  lanes[t] = sum;
#endif
#if FAULT != 8
  __syncwarp();
#endif
  float both = lanes[t] + lanes[t ^ 1];
  for (int d = 2; d < 32; d *= 2) both += __shfl_xor_sync(0xffffffff, both, d);
#if FAULT == 9
  if (t % 32 < 16) both += __shfl_down_sync(0xffff, both, 15);
#endif
  if (t % 32 == 0 && blockIdx.x == 0) mean[t / 32] = both / 32;
#if FAULT == 10
  if (t % 32 == 0) *total += both;
#else
  if (t % 32 == 0) atomicAdd(total, both);
#endif

#if FAULT == 11
  rows[t / 32][t % 32 + t / 31] = 1;
#else
  rows[t / 32][t % 32] = 1;
#endif
#if FAULT == 12
  if (t == 0) const_cast<float*>(in)[0] = 0;
#endif
  constexpr int kShift = FAULT == 13, kFours = kThreads / 4 - (FAULT == 14);
  if (t < kFours && blockIdx.x == 0)
    *reinterpret_cast<Four*>(copy + 4 * t) = *reinterpret_cast<const Four*>(in + 4 * t + kShift);
}

LZ_KERNEL(1) zero(float* p) { *p = 0; }

void check(uint64_t seed) {
  // Exactly sized heap buffers, aligned to 16 bytes.
  std::vector<Four> storage(kSize / 4), target(kThreads / 4);
  float* const in = &storage[0].x;
  for (int i = 0; i < kSize; ++i) in[i] = static_cast<float>(i % 7);
  std::vector<float> out(kSize), mean(2), total(1);
  emu::reset(seed);
  emu::array("in", in, kSize * 4, 4, emu::kInput);
  emu::array("out", out.data(), kSize * 4, 4, emu::kOutput);
  emu::array("mean", mean.data(), 2 * 4, 4, emu::kOutput);
  emu::array("total", total.data(), 4, 4, emu::kOutput);
  emu::array("copy", target.data(), kThreads * 4, 4, emu::kOutput);
  LZ_LAUNCH(zero, 1, 1, 0, nullptr, total.data());
  LZ_LAUNCH(neighbours, 2, kThreads, kThreads * sizeof(float), nullptr, in, out.data(), mean.data(), total.data(),
            &target[0].x);
  emu::check_written();
  float sum = 0;
  for (int i = 0; i < kSize; ++i) {
    const float right = (i ? in[i - 1] : 0) + in[i];
    sum += right;
    if (out[i] != right) throw std::runtime_error("wrong value");
  }
  if (*total.data() != 2 * sum || (mean[0] + mean[1]) * 32 != sum) throw std::runtime_error("wrong sum");
}

}  // namespace

int main(int count, char** arguments) {
  try {
    for (int i = 1; i < count; ++i) check(std::strtoull(arguments[i], nullptr, 10));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
