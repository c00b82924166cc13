// Causal convolution over time: out[t] = act(bias + sum over k < w of weight[k] * x[t - (w - 1) + k]), and its
// gradients.
//
// A block takes tiles of 32 channels x 128 steps. It loads a tile in the order in which x lies in memory, so that
// channel-last and time-last both read whole lines; computes with one channel a lane and 16 steps a thread, weights and
// sums in registers; and stores through the same tile in the order of the output. Widths other than 2, 3 and 4 go
// through groups of 8 taps. The backward is two passes: the forward again, which leaves the
// gradient before the activation, and one that convolves that with the mirrored weights and sums its products with x.
// Run in the emulator (tests/cuda_emulation) and compiled by nvcc; no figure was measured on a GPU: the tile sizes are
// estimates.
#pragma once

#include "../common/math.cuh"
#include "sum_parts.cuh"

namespace layerzoo {

struct CudaConvArgs {
  int64_t b, d, l, w;
  Operand x, out;     // (b, d, l), both of the kernel's element type; with grad_out, out is of the type computed in
  Operand weight;     // (d, w) as channel, time
  Operand bias;       // (d) as channel, or none
  Operand initial;    // (b, d, w - 1), or none
  Operand grad_out;   // (b, d, l), or none; if given, out becomes the gradient before the activation
  void* final_state;  // (b, d, w - 1) contiguous, of the kernel's element type; none with grad_out
  Ids seq_idx;        // (b, l), or none
  bool silu;
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
  const int64_t source = t < 0 ? 0 : t;
  return source < a.l ? load_id(a.seq_idx, b, source) : -1;
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

// Stores what the taps and the bias sum up to.
template <class T>
LZ_DEVICE void conv_store(const CudaConvArgs& a, int64_t b, int64_t channel, int64_t t, Compute<T> sum, bool padding) {
  using S = Compute<T>;
  const int64_t at = b * a.out.batch + channel * a.out.channel + t * a.out.time;
  if (a.grad_out.data)
    static_cast<S*>(a.out.data)[at] =
        padding ? S(0) : load<S>(a.grad_out, b, channel, t) * (a.silu ? silu_slope(sum) : S(1));
  else
    narrow(padding ? S(0) : a.silu ? silu(sum) : sum, static_cast<T*>(a.out.data) + at);
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

  if (a.final_state) conv_store_final_state<T>(a);

  const int thread = threadIdx.x, lane = thread % kTileChannels, run = thread / kTileChannels * kRun;
  const bool packed = a.seq_idx.data != nullptr, in_along = conv_along_time(a.x), out_along = conv_along_time(a.out);
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
    for (int r = 0; r < kRun; ++r) tile[lane][run + r] = sum[r];
    __syncthreads();  // the tile holds results
    LZ_UNROLL_4
    for (int n = thread; n < kTileChannels * kTileSteps; n += kConvThreads) {
      const ConvCell at = conv_cell(n, kTileSteps, out_along);
      const int64_t channel = c0 + at.channel, t = t0 + at.step;
      if (channel < a.d && t < a.l)
        conv_store<T>(a, b, channel, t, tile[at.channel][at.step], packed && own[at.step] < 0);
    }
    __syncthreads();  // results are stored, the tile is free
  }
}

struct CudaConvGradArgs {
  CudaConvArgs conv;                // with grad_out; its `out` lies between the passes
  Operand grad_x;                   // (b, d, l), of the kernel's element type
  Operand grad_final;               // (b, d, w - 1), or none
  Operand grad_initial;             // (b, d, w - 1); none if there is no initial state
  void *weight_parts, *bias_parts;  // of the type computed in: (b * grad_tiles, d, w), (b * grad_tiles, d)
  Operand grad_weight, grad_bias;   // contiguous: (d, w), (d) or none

  int64_t lead() const { return conv.initial.data ? conv.w - 1 : 0; }
  int64_t grad_tiles() const { return (conv.l + lead() + kTileSteps - 1) / kTileSteps; }
};

// The gradient of the input of time t, below 0 in the initial state, which grad_final adds to.
template <class T>
LZ_DEVICE void conv_store_grad(const CudaConvGradArgs& a, int64_t b, int64_t channel, int64_t t, Compute<T> sum) {
  using S = Compute<T>;
  const int64_t last = t - a.conv.l + a.conv.w - 1;
  if (last >= 0 && a.grad_final.data) sum += load<S>(a.grad_final, b, channel, last);
  if (t >= 0)
    store_as<T>(a.grad_x, b, channel, t, sum);
  else
    store<S>(a.grad_initial, b, channel, t + a.conv.w - 1, sum);
}

// The gradients of the inputs, and what each tile of them adds to that of the weights. Tiles begin with the initial
// state; any grid of one dimension is right.
template <class T, int kWidth>
LZ_KERNEL(kConvThreads)
causal_conv1d_grad_kernel(const CudaConvGradArgs grad, int64_t lead, int64_t step_tiles) {
  using S = Compute<T>;
  constexpr int kTaps = kWidth > 0 ? kWidth : 8;
  constexpr int kColumns = kTileSteps + kTaps - 1, kRuns = kTileSteps / kRun;
  static_assert(kRuns * (kTaps + 1) <= kColumns);
  LZ_SHARED(tile, S[kTileChannels][kColumns | 1]);
  LZ_SHARED(taps, S[kTaps][kTileChannels]);
  LZ_SHARED(ids, int64_t[kColumns]);
  LZ_SHARED(own, int64_t[kTileSteps]);

  const CudaConvArgs& a = grad.conv;
  const int thread = threadIdx.x, lane = thread % kTileChannels, run = thread / kTileChannels * kRun;
  const bool packed = a.seq_idx.data != nullptr, x_along = conv_along_time(a.x), grad_along = conv_along_time(a.out),
             out_along = conv_along_time(grad.grad_x);
  const int64_t channel_tiles = (a.d + kTileChannels - 1) / kTileChannels;
  const int64_t items = a.b * channel_tiles * step_tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t b = item / step_tiles / channel_tiles, part = b * step_tiles + item % step_tiles;
    const int64_t c0 = item / step_tiles % channel_tiles * kTileChannels, t0 = item % step_tiles * kTileSteps - lead;
    LZ_UNROLL_4
    for (int n = thread; n < kTileChannels * kTileSteps; n += kConvThreads) {
      const ConvCell at = conv_cell(n, kTileSteps, x_along);
      const int64_t channel = c0 + at.channel, t = t0 + at.step;
      S v = 0;
      if (channel < a.d && t < a.l) v = t >= 0 ? load_as<S, T>(a.x, b, channel, t) : conv_initial<S>(a, b, channel, t);
      tile[at.channel][at.step] = v;
    }
    for (int n = thread; packed && n < kTileSteps; n += kConvThreads) own[n] = conv_id(a, b, t0 + n);
    __syncthreads();  // inputs are in the tile
    S x[kRun], sum[kRun];
    LZ_UNROLL
    for (int r = 0; r < kRun; ++r) {
      x[r] = packed && own[run + r] < 0 ? S(0) : tile[lane][run + r];
      sum[r] = 0;
    }
    __syncthreads();  // inputs are in registers

    for (int64_t k0 = 0; k0 < a.w; k0 += kTaps) {
      const int count = kWidth > 0 ? kWidth : static_cast<int>(a.w - k0 < kTaps ? a.w - k0 : kTaps);
      const int columns = kTileSteps + count - 1;
      const int64_t first = t0 + a.w - k0 - count;  // the time of column 0
      LZ_UNROLL_4
      for (int n = thread; n < kTileChannels * columns; n += kConvThreads) {
        const ConvCell at = conv_cell(n, columns, grad_along);
        const int64_t channel = c0 + at.channel, t = first + at.step;
        tile[at.channel][at.step] = channel < a.d && t >= 0 && t < a.l ? load_as<S, S>(a.out, b, channel, t) : S(0);
      }
      for (int n = thread; n < kTileChannels * count; n += kConvThreads) {
        const int64_t channel = c0 + n / count;
        taps[n % count][n / count] = channel < a.d ? load<S>(a.weight, 0, channel, k0 + n % count) : S(0);
      }
      for (int n = thread; packed && n < columns; n += kConvThreads) ids[n] = conv_id(a, b, first + n);
      __syncthreads();  // gradients and taps are full

      S grad_weight[kTaps], grad_bias = 0;
      LZ_UNROLL
      for (int k = 0; k < kTaps; ++k) {
        grad_weight[k] = 0;
        const S weight = k < count ? taps[k][lane] : S(0);
        LZ_UNROLL
        for (int r = 0; r < kRun; ++r) {
          const int column = run + r + count - 1 - k;  // of the step that meets this input at tap k
          if (k >= count || (packed && ids[column] != own[run + r])) continue;
          const S g = tile[lane][column];
          sum[r] += weight * g;
          grad_weight[k] += x[r] * g;
          if (k0 + k == a.w - 1) grad_bias += g;
        }
      }
      __syncthreads();  // all have read the gradients
      LZ_UNROLL
      for (int k = 0; k < kTaps; ++k) tile[lane][run / kRun * (kTaps + 1) + k] = grad_weight[k];
      tile[lane][run / kRun * (kTaps + 1) + kTaps] = grad_bias;
      __syncthreads();  // the tile holds sums
      const bool last = k0 + count == a.w;
      for (int n = thread; n < kTileChannels * (kTaps + 1); n += kConvThreads) {
        const int64_t channel = c0 + n / (kTaps + 1);
        const int k = n % (kTaps + 1);
        S total = 0;
        for (int i = 0; i < kRuns; ++i) total += tile[n / (kTaps + 1)][i * (kTaps + 1) + k];
        if (channel < a.d && k < count)
          static_cast<S*>(grad.weight_parts)[(part * a.d + channel) * a.w + k0 + k] = total;
        if (channel < a.d && k == kTaps && last) static_cast<S*>(grad.bias_parts)[part * a.d + channel] = total;
      }
      __syncthreads();  // sums are stored
    }

    LZ_UNROLL
    for (int r = 0; r < kRun; ++r) tile[lane][run + r] = sum[r];
    __syncthreads();  // the tile holds gradients of inputs
    LZ_UNROLL_4
    for (int n = thread; n < kTileChannels * kTileSteps; n += kConvThreads) {
      const ConvCell at = conv_cell(n, kTileSteps, out_along);
      const int64_t channel = c0 + at.channel, t = t0 + at.step;
      if (channel < a.d && t < a.l) conv_store_grad<T>(grad, b, channel, t, tile[at.channel][at.step]);
    }
    __syncthreads();  // gradients are stored
  }
}

// `max_blocks` bounds the grid; blocks then take several tiles each.
template <class T>
void causal_conv1d_launch(const CudaConvArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.b == 0 || a.d == 0) return;
  const int64_t tiles = a.b * ((a.d + kTileChannels - 1) / kTileChannels) * ((a.l + kTileSteps - 1) / kTileSteps);
  const auto kernel = a.w == 2   ? causal_conv1d_kernel<T, 2>
                      : a.w == 3 ? causal_conv1d_kernel<T, 3>
                      : a.w == 4 ? causal_conv1d_kernel<T, 4>
                                 : causal_conv1d_kernel<T, 0>;
  LZ_LAUNCH(kernel, blocks_for(tiles, max_blocks), kConvThreads, 0, stream, a);  // one for the final state at least
}

template <class T>
void causal_conv1d_backward_launch(const CudaConvGradArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const CudaConvArgs& conv = a.conv;
  const int64_t tiles = conv.b * ((conv.d + kTileChannels - 1) / kTileChannels) * a.grad_tiles();
  if (tiles > 0) {
    causal_conv1d_launch<T>(conv, max_blocks, stream);
    const auto kernel = conv.w == 2   ? causal_conv1d_grad_kernel<T, 2>
                        : conv.w == 3 ? causal_conv1d_grad_kernel<T, 3>
                        : conv.w == 4 ? causal_conv1d_grad_kernel<T, 4>
                                      : causal_conv1d_grad_kernel<T, 0>;
    LZ_LAUNCH(kernel, blocks_for(tiles, max_blocks), kConvThreads, 0, stream, a, a.lead(), a.grad_tiles());
  }
  using S = Compute<T>;
  const int64_t parts = conv.b * a.grad_tiles();
  sum_parts<S>({parts, conv.d * conv.w, a.weight_parts, a.grad_weight}, max_blocks, stream);
  if (a.grad_bias.data) sum_parts<S>({parts, conv.d, a.bias_parts, a.grad_bias}, max_blocks, stream);
}

}  // namespace layerzoo
