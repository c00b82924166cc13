// One step of the selective scan, in place on the state.
//
// 16 lanes have a channel, each every 16th of its states, which lie together; the sum over them is by shuffles, always
// in the same order. Run in the emulator and compiled by nvcc; never measured on a GPU.
#pragma once

#include "../common/math.cuh"
#include "kernels.h"
#include "slot.cuh"

namespace layerzoo {

struct CudaStateUpdateArgs : StateUpdateArgs {  // `slots` unused
  int64_t rows;                                 // of the state
  Ids indices;                                  // (b): the row of the state; none: row b. Below 0: padding
};

constexpr int kStateThreads = 256, kStateLanes = 16;

template <class S>
LZ_DEVICE S load(const HeadOperand& x, int64_t b, int64_t head, int64_t channel, int64_t n) {
  S v = 0;
  const int64_t at = b * x.batch + head * x.head + channel * x.channel + n * x.time;
  LZ_DISPATCH_DTYPE(x.dtype, T, v = static_cast<S>(widen(static_cast<const T*>(x.data)[at])))
  return v;
}

template <class S>
LZ_DEVICE void store(const HeadOperand& x, int64_t b, int64_t head, int64_t channel, int64_t n, S v) {
  const int64_t at = b * x.batch + head * x.head + channel * x.channel + n * x.time;
  LZ_DISPATCH_DTYPE(x.dtype, T, narrow(v, static_cast<T*>(x.data) + at))
}

// Any grid of one dimension is right, if no two rows of the batch have the same row of the state.
template <class S>
LZ_KERNEL(kStateThreads)
selective_state_update_kernel(const CudaStateUpdateArgs a) {
  constexpr int kChannels = kStateThreads / kStateLanes;
  const int lane = threadIdx.x % kStateLanes;
  const unsigned lanes = 0xffffu << threadIdx.x % 32 / kStateLanes * kStateLanes;  // of this channel in the warp
  const bool one_decay = a.A.time == 0;
  const int64_t items = a.b * a.h * a.p, stride = int64_t(gridDim.x) * kChannels;
  for (int64_t i = int64_t(blockIdx.x) * kChannels + threadIdx.x / kStateLanes; i < items; i += stride) {
    const int64_t b = i / a.p / a.h, h = i / a.p % a.h, p = i % a.p, group = h / (a.h / a.g);
    const Slot<S> slot(a.indices, b, a.rows);
    if (!slot.exists) {
      if (lane == 0) store<S>(a.out, b, h, p, 0, slot.instead);
      continue;
    }
    S dt = load<S>(a.dt, b, h, p, 0) + (a.bias.data ? load<S>(a.bias, 0, h, p, 0) : S(0));
    if (a.softplus) dt = softplus(dt);
    const S x = load<S>(a.x, b, h, p, 0), input = dt * x;
    S decay = one_decay ? exp(dt * load<S>(a.A, 0, h, p, 0)) : S(0), y = 0;
    for (int64_t n = lane; n < a.n; n += kStateLanes) {
      if (!one_decay) decay = exp(dt * load<S>(a.A, 0, h, p, n));
      const S state = decay * load<S>(a.state, slot.row, h, p, n) + input * load<S>(a.B, b, group, 0, n);
      store<S>(a.state, slot.row, h, p, n, state);
      y += state * load<S>(a.C, b, group, 0, n);
    }
    for (int d = kStateLanes / 2; d > 0; d /= 2) y += __shfl_xor_sync(lanes, y, d, kStateLanes);
    if (lane > 0) continue;
    if (a.D.data) y += load<S>(a.D, 0, h, p, 0) * x;
    if (a.z.data) y *= silu(load<S>(a.z, b, h, p, 0));
    store<S>(a.out, b, h, p, 0, y);
  }
}

template <class S>
void selective_state_update_launch(const CudaStateUpdateArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  constexpr int kChannels = kStateThreads / kStateLanes;
  const int64_t items = a.b * a.h * a.p;
  if (items == 0) return;
  const unsigned blocks = blocks_for((items + kChannels - 1) / kChannels, max_blocks);
  LZ_LAUNCH(selective_state_update_kernel<S>, blocks, kStateThreads, 0, stream, a);
}

}  // namespace layerzoo
