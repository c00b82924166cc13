// Causal convolution over time, forward: out[t] = act(bias + sum over k < w of weight[k] * x[t - (w - 1) + k]).
//
// A block takes tiles of 32 channels x 128 steps. It loads a tile in the order in which x lies in memory, so that
// channel-last and time-last both read whole lines; computes with one channel a lane and 16 steps a thread, weights and
// sums in registers; and stores through the same tile in the order of the output. Widths other than 2, 3 and 4 go
// through groups of 8 taps. Run in the emulator (tests/cuda_emulation) and compiled by nvcc; no figure was measured on
// a GPU: the tile sizes are estimates.
#pragma once

#include "../common/launch.h"

namespace layerzoo {

struct CudaConvArgs {
  int64_t b, d, l, w;
  Operand x, out;       // (b, d, l), both of the kernel's element type
  Operand weight;       // (d, w) as channel, time
  Operand bias;         // (d) as channel, or none
  Operand initial;      // (b, d, w - 1), or none
  void* final_state;    // (b, d, w - 1) contiguous, of the kernel's element type
  const void* seq_idx;  // (b, l) of int32 or int64, or null
  int64_t seq_batch, seq_time;
  bool seq_int64, silu;
};

constexpr int kConvThreads = 256;
constexpr int kTileChannels = 32;  // one a lane
constexpr int kRun = 16;           // consecutive steps of a thread
constexpr int kTileSteps = kConvThreads / kTileChannels * kRun;

struct ConvCell {
  int channel, step;
};

// The n-th element of a tile of `steps` steps, in the order that makes neighbouring threads neighbours in `x`.
LZ_DEVICE ConvCell conv_cell(int n, int steps, bool along_time) {
  return along_time ? ConvCell{n / steps, n % steps} : ConvCell{n % kTileChannels, n / kTileChannels};
}

LZ_DEVICE bool conv_along_time(const Operand& x) {
  return (x.time < 0 ? -x.time : x.time) <= (x.channel < 0 ? -x.channel : x.channel);
}

// The id of step t. Left of the sequence lies the initial state, which belongs to the first id; right of it, nothing.
LZ_DEVICE int64_t conv_id(const CudaConvArgs& a, int64_t b, int64_t t) {
  if (t >= a.l) return -1;
  const int64_t i = b * a.seq_batch + (t < 0 ? 0 : t) * a.seq_time;
  return a.seq_int64 ? static_cast<const int64_t*>(a.seq_idx)[i] : static_cast<const int32_t*>(a.seq_idx)[i];
}

// Left of the sequence, t < 0.
template <class S>
LZ_DEVICE S conv_initial(const CudaConvArgs& a, int64_t b, int64_t channel, int64_t t) {
  return a.initial.data ? load<S>(a.initial, b, channel, a.w - 1 + t) : S(0);
}

// The last w - 1 inputs, led by the end of the initial state where the sequence is shorter.
template <class T>
LZ_DEVICE void conv_store_final_state(const CudaConvArgs& a) {
  using S = Compute<T>;
  const int64_t size = a.b * a.d * (a.w - 1), stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    const int64_t b = i / (a.w - 1) / a.d, channel = i / (a.w - 1) % a.d, t = a.l - (a.w - 1) + i % (a.w - 1);
    const S v = t >= 0 ? load_as<S, T>(a.x, b, channel, t) : conv_initial<S>(a, b, channel, t);
    narrow(v, static_cast<T*>(a.final_state) + i);
  }
}

// kWidth: the width, or 0 for any. Any grid of one dimension is right.
template <class T, int kWidth>
LZ_KERNEL(kConvThreads)
causal_conv1d_kernel(const CudaConvArgs a) {
  using S = Compute<T>;
  constexpr int kTaps = kWidth > 0 ? kWidth : 8;
  constexpr int kColumns = kTileSteps + kTaps - 1;
  LZ_SHARED(tile, S[kTileChannels][kColumns | 1]);  // an odd pitch: the lanes of a warp meet 32 different banks
  LZ_SHARED(taps, S[kTaps][kTileChannels]);
  LZ_SHARED(ids, int64_t[kColumns]);
  LZ_SHARED(own, int64_t[kTileSteps]);

  conv_store_final_state<T>(a);

  const int thread = threadIdx.x, lane = thread % kTileChannels, run = thread / kTileChannels * kRun;
  const bool packed = a.seq_idx != nullptr, in_along = conv_along_time(a.x), out_along = conv_along_time(a.out);
  const int64_t step_tiles = (a.l + kTileSteps - 1) / kTileSteps;
  const int64_t channel_tiles = (a.d + kTileChannels - 1) / kTileChannels;
  const int64_t items = a.b * channel_tiles * step_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t b = item / step_tiles / channel_tiles;
    const int64_t c0 = item / step_tiles % channel_tiles * kTileChannels, t0 = item % step_tiles * kTileSteps;
    S sum[kRun];
    const S bias = a.bias.data && c0 + lane < a.d ? load<S>(a.bias, 0, c0 + lane, 0) : S(0);
    LZ_UNROLL
    for (int r = 0; r < kRun; ++r) sum[r] = bias;

    for (int64_t k0 = 0; k0 < a.w; k0 += kTaps) {
      const int count = kWidth > 0 ? kWidth : static_cast<int>(a.w - k0 < kTaps ? a.w - k0 : kTaps);
      const int columns = kTileSteps + count - 1;
      const int64_t first = t0 + k0 - (a.w - 1);  // the time of column 0
      LZ_UNROLL_4
      for (int n = thread; n < kTileChannels * columns; n += kConvThreads) {
        const ConvCell at = conv_cell(n, columns, in_along);
        const int64_t channel = c0 + at.channel, t = first + at.step;
        if (t >= 0) tile[at.channel][at.step] = channel < a.d && t < a.l ? load_as<S, T>(a.x, b, channel, t) : S(0);
      }
      const int halo = first >= 0 ? 0 : static_cast<int>(-first < columns ? -first : columns);
      for (int n = thread; n < kTileChannels * halo; n += kConvThreads) {
        const ConvCell at = conv_cell(n, halo, in_along);
        const int64_t channel = c0 + at.channel;
        tile[at.channel][at.step] = channel < a.d ? conv_initial<S>(a, b, channel, first + at.step) : S(0);
      }
      for (int n = thread; n < kTileChannels * count; n += kConvThreads) {
        const int64_t channel = c0 + n / count;
        taps[n % count][n / count] = channel < a.d ? load<S>(a.weight, 0, channel, k0 + n % count) : S(0);
      }
      for (int n = thread; packed && n < columns; n += kConvThreads) ids[n] = conv_id(a, b, first + n);
      for (int n = thread; packed && n < kTileSteps; n += kConvThreads) own[n] = conv_id(a, b, t0 + n);
      __syncthreads();  // tile, taps and ids are full

      S weight[kTaps];
      LZ_UNROLL
      for (int k = 0; k < kTaps; ++k) weight[k] = k < count ? taps[k][lane] : S(0);
      LZ_UNROLL
      for (int r = 0; r < kRun; ++r) {
        LZ_UNROLL
        for (int k = 0; k < kTaps; ++k)
          if (k < count && (!packed || ids[run + r + k] == own[run + r])) sum[r] += weight[k] * tile[lane][run + r + k];
      }
      __syncthreads();  // all have read the tile
    }

    LZ_UNROLL
    for (int r = 0; r < kRun; ++r) {
      const S v = a.silu ? sum[r] / (1 + exp(-sum[r])) : sum[r];
      tile[lane][run + r] = packed && own[run + r] < 0 ? S(0) : v;
    }
    __syncthreads();  // the tile holds results
    LZ_UNROLL_4
    for (int n = thread; n < kTileChannels * kTileSteps; n += kConvThreads) {
      const ConvCell at = conv_cell(n, kTileSteps, out_along);
      const int64_t channel = c0 + at.channel, t = t0 + at.step;
      if (channel < a.d && t < a.l)
        narrow(tile[at.channel][at.step],
               static_cast<T*>(a.out.data) + b * a.out.batch + channel * a.out.channel + t * a.out.time);
    }
    __syncthreads();  // results are stored, the tile is free
  }
}

// `max_blocks` bounds the grid; blocks then take several tiles each.
template <class T>
void causal_conv1d_launch(const CudaConvArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.b == 0 || a.d == 0) return;
  const int64_t tiles = a.b * ((a.d + kTileChannels - 1) / kTileChannels) * ((a.l + kTileSteps - 1) / kTileSteps);
  const int64_t blocks = tiles < 1 ? 1 : tiles < max_blocks ? tiles : max_blocks;  // one for the final state at least
  const auto kernel = a.w == 2   ? causal_conv1d_kernel<T, 2>
                      : a.w == 3 ? causal_conv1d_kernel<T, 3>
                      : a.w == 4 ? causal_conv1d_kernel<T, 4>
                                 : causal_conv1d_kernel<T, 0>;
  LZ_LAUNCH(kernel, static_cast<unsigned>(blocks), kConvThreads, 0, stream, a);
}

}  // namespace layerzoo
