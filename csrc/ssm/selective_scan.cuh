// The selective scan of Mamba, forward and backward: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t + D u_t.
//
// A block takes one batch and some channels of one group, and goes through time in chunks of 64 steps, which it loads
// in the order in which they lie in memory. Four lanes share a channel and have some states each, in registers; they
// step serially, so that nothing is composed: what overflows or is NaN stays in its own sequence. Sums over the states
// of a channel, and in the backward over channels, are by shuffles in which each lane ends up with a sum of its own.
//
// The backward starts each chunk from the state that the forward kept there. It runs through once to the start of every
// eighth step, and from the last of them back: eight steps forward in registers, then eight back. Gradients of B and C
// are summed over the channels of a block, then over blocks by sum_parts, always in the same order.
//
// Run in the emulator (tests/cuda_emulation) and compiled by nvcc; no figure was measured on a GPU: sizes are
// estimates.
#pragma once

#include "../common/math.cuh"
#include "kernels.h"
#include "sum_parts.cuh"

namespace layerzoo {

struct Coefficient : Operand {  // B or C: (b, state as channel, l); where constant (d as channel, state as time)
  int64_t group;                // stride of the group
  bool constant;
};

struct CudaScanArgs {
  int64_t b, d, l, n, g;
  Operand u, delta, z, out;  // (b, d, l) in the order of the scan; z may be none
  Operand A, D, bias;        // (d, n as time), (d), (d); D and bias may be none
  Operand initial;           // (b, d, n as time), or none
  Coefficient B, C;          // where they vary, in the order of the scan
  Ids seq_idx;               // (b, l) in the order of the scan, or none
  uint8_t* marks;            // Mark: (b, l), made from seq_idx; null without
  void* last;                // S: (b, d, n)
  void* states;              // S: (b, chunks, n, d), the state before each chunk; null: not kept
  bool softplus;
};

// Sums of the gradient of a parameter, and where the sum over `parts` of them goes.
struct GradParts {
  int64_t parts, size;
  void* data;   // S: (parts, size)
  Operand out;  // as many elements, dense, in the same order; none if nobody wants them

  template <class S>
  void sum(int64_t max_blocks, LZ_STREAM stream) const {
    if (out.data) sum_parts<S>({parts, size, data, out}, max_blocks, stream);
  }
};

struct CudaScanGradArgs {
  CudaScanArgs scan;                     // `out` and `last` unused
  Operand grad_out, grad_u, grad_delta;  // (b, d, l) in the order of the scan
  Operand grad_z;                        // the same, if there is a z
  Operand grad_last;                     // (b, d, n as time), or none
  void* carry;                           // S: (b, d, n), in the end the gradient of the initial state
  GradParts A, D, bias;                  // parts: b; (d, n), (d), (d)
  GradParts B, C;                        // parts: blocks of a group; constant: b; (d, n)
  Coefficient grad_B, grad_C;            // of the first part, where they vary, in the order of the scan
};

constexpr int kScanLanes = 4;  // of a channel
constexpr int kScanRun = 8;    // steps that the backward holds in registers
constexpr unsigned kAllLanes = 0xffffffff;

template <class S>
struct ScanBlock {
  static constexpr int kStates = 16 / sizeof(S);  // of a lane at a time
  static constexpr int kPass = kStates * kScanLanes;
  static constexpr int kChannels = 64 / sizeof(S);
  static constexpr int kThreads = kChannels * kScanLanes;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSums = 2 * kPass;  // for B and for C

  int64_t b, g, first;  // the first channel
  int64_t part;         // of the channels of its group
  int channels;

  static int64_t parts(int64_t channels_of_group) { return (channels_of_group + kChannels - 1) / kChannels; }
};

// Rows of odd length: what is stored along time then meets different banks.
template <class S>
using ScanTile = S[kScanChunk][ScanBlock<S>::kChannels + 1];
template <class S>
using StateTile = S[kScanChunk][ScanBlock<S>::kPass + 1];

template <class S>
LZ_DEVICE ScanBlock<S> scan_block(const CudaScanArgs& a, int64_t item) {
  constexpr int kChannels = ScanBlock<S>::kChannels;
  const int64_t per_group = a.d / a.g, parts = (per_group + kChannels - 1) / kChannels;
  const int64_t part = item % parts, g = item / parts % a.g, left = per_group - part * kChannels;
  return {item / parts / a.g, g, g * per_group + part * kChannels, part,
          static_cast<int>(left < kChannels ? left : kChannels)};
}

// Sums each of the kValues over the lanes that differ in the bits from kBit to below kEnd. A lane gets the sum of one
// value, the one that `spread_index` says; if there are more lanes than values, some get the same.
template <int kBit, int kEnd, int kValues, class S>
LZ_DEVICE S spread_sum(S* values, int lane) {
  if constexpr (kBit == kEnd) {
    return values[0];
  } else if constexpr (kValues == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kBit);
    return spread_sum<2 * kBit, kEnd, 1>(values, lane);
  } else {
    constexpr int kHalf = kValues / 2;
    const bool upper = lane & kBit;
    LZ_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const S give = upper ? values[i] : values[kHalf + i], keep = upper ? values[kHalf + i] : values[i];
      values[i] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
    }
    return spread_sum<2 * kBit, kEnd, kHalf>(values, lane);
  }
}

template <int kBit, int kEnd, int kValues>
LZ_DEVICE int spread_index(int lane) {
  if constexpr (kBit == kEnd || kValues == 1)
    return 0;
  else
    return (lane & kBit ? kValues / 2 : 0) + spread_index<2 * kBit, kEnd, kValues / 2>(lane);
}

LZ_DEVICE bool along_time(const Operand& x) {
  return (x.time < 0 ? -x.time : x.time) <= (x.channel < 0 ? -x.channel : x.channel);
}

template <class S, class T>
LZ_DEVICE void load_tile_as(const Operand& x, const ScanBlock<S>& block, int64_t t0, int steps, ScanTile<S>& tile) {
  constexpr int kChannels = ScanBlock<S>::kChannels;
  const bool along = along_time(x);
  LZ_UNROLL_4
  for (int i = threadIdx.x; i < kChannels * kScanChunk; i += ScanBlock<S>::kThreads) {
    const int c = along ? i / kScanChunk : i % kChannels, t = along ? i % kScanChunk : i / kChannels;
    tile[t][c] = c < block.channels && t < steps ? load_as<S, T>(x, block.b, block.first + c, t0 + t) : S(0);
  }
}

// Zero where there is no such channel or step.
template <class S>
LZ_DEVICE void load_tile(const Operand& x, const ScanBlock<S>& block, int64_t t0, int steps, ScanTile<S>& tile) {
  LZ_DISPATCH_DTYPE(x.dtype, T, (load_tile_as<S, T>(x, block, t0, steps, tile)))
}

template <class S, class T, class F>
LZ_DEVICE void store_tile_as(const Operand& x, const ScanBlock<S>& block, int64_t t0, int steps, const F& value) {
  constexpr int kChannels = ScanBlock<S>::kChannels;
  const bool along = along_time(x);
  LZ_UNROLL_4
  for (int i = threadIdx.x; i < kChannels * kScanChunk; i += ScanBlock<S>::kThreads) {
    const int c = along ? i / kScanChunk : i % kChannels, t = along ? i % kScanChunk : i / kChannels;
    if (c < block.channels && t < steps) store_as<T>(x, block.b, block.first + c, t0 + t, value(t, c));
  }
}

template <class S, class F>
LZ_DEVICE void store_tile(const Operand& x, const ScanBlock<S>& block, int64_t t0, int steps, const F& value) {
  LZ_DISPATCH_DTYPE(x.dtype, T, (store_tile_as<S, T>(x, block, t0, steps, value)))
}

template <class S, class T>
LZ_DEVICE void load_states_as(const Coefficient& x, const ScanBlock<S>& block, int64_t n, int64_t t0, int64_t n0,
                              const uint8_t* marks, StateTile<S>& tile) {
  constexpr int kPass = ScanBlock<S>::kPass;
  const bool along = along_time(x);
  const T* data = static_cast<const T*>(x.data) + block.b * x.batch + block.g * x.group;
  LZ_UNROLL_4
  for (int i = threadIdx.x; i < kPass * kScanChunk; i += ScanBlock<S>::kThreads) {
    const int s = along ? i / kScanChunk : i % kPass, t = along ? i % kScanChunk : i / kPass;
    const bool exists = n0 + s < n && marks[t] != kPadding;
    tile[t][s] = exists ? static_cast<S>(widen(data[(n0 + s) * x.channel + (t0 + t) * x.time])) : S(0);
  }
}

// States from n0 on of a B or C that varies; zero where there is no such state, and in padding.
template <class S>
LZ_DEVICE void load_states(const Coefficient& x, const ScanBlock<S>& block, int64_t n, int64_t t0, int64_t n0,
                           const uint8_t* marks, StateTile<S>& tile) {
  if (!x.constant) LZ_DISPATCH_DTYPE(x.dtype, T, (load_states_as<S, T>(x, block, n, t0, n0, marks, tile)))
}

// Of a chunk, with padding behind the end.
LZ_DEVICE void load_marks(const CudaScanArgs& a, int64_t b, int64_t t0, int steps, uint8_t* marks) {
  for (int t = threadIdx.x; t < kScanChunk; t += blockDim.x)
    marks[t] = t >= steps ? kPadding : a.marks ? a.marks[b * a.l + t0 + t] : kContinue;
}

LZ_DEVICE int steps_of(const CudaScanArgs& a, int64_t t0) {
  return static_cast<int>(a.l - t0 < kScanChunk ? a.l - t0 : kScanChunk);
}

// The states of a lane, kStates from n0 on, and what of A, B and C does not depend on time. Where there is no such
// state or channel all is zero.
template <class S>
struct Lane {
  static constexpr int kStates = ScanBlock<S>::kStates;

  int channel, first;                    // in the block; the first of its states in a pass
  int64_t b, d, n0;                      // the channel, the first state
  int count;                             // states that exist
  S A[kStates], B[kStates], C[kStates];  // A log2(e)

  LZ_DEVICE Lane(const CudaScanArgs& a, const ScanBlock<S>& block, int64_t pass) {
    channel = threadIdx.x / kScanLanes, first = threadIdx.x % kScanLanes * kStates;
    b = block.b, d = block.first + channel, n0 = pass + first;
    const int64_t left = channel < block.channels ? a.n - n0 : 0;
    count = static_cast<int>(left < 0 ? 0 : left < kStates ? left : kStates);
  }

  LZ_DEVICE void load_parameters(const CudaScanArgs& a) {
    constexpr S kLog2E = static_cast<S>(1.4426950408889634), kMost = static_cast<S>(sizeof(S) == 8 ? 1e308 : 3e38);
    LZ_UNROLL
    for (int j = 0; j < kStates; ++j) {
      const S rate = j < count ? load<S>(a.A, 0, d, n0 + j) * kLog2E : S(0);
      A[j] = rate < -kMost ? -kMost : rate > kMost ? kMost : rate;  // finite, so that no step (dt = 0) changes nothing
      B[j] = j < count && a.B.constant ? load<S>(a.B, 0, d, n0 + j) : S(0);
      C[j] = j < count && a.C.constant ? load<S>(a.C, 0, d, n0 + j) : S(0);
    }
  }

  // Its place in (b, d, n).
  LZ_DEVICE int64_t at(const CudaScanArgs& a) const { return (b * a.d + d) * a.n + n0; }

  LZ_DEVICE void load_from(const void* p, const CudaScanArgs& a, S (&x)[kStates]) const {
    LZ_UNROLL
    for (int j = 0; j < kStates; ++j) x[j] = j < count ? static_cast<const S*>(p)[at(a) + j] : S(0);
  }

  LZ_DEVICE void store_to(void* p, const CudaScanArgs& a, const S (&x)[kStates]) const {
    LZ_UNROLL
    for (int j = 0; j < kStates; ++j)
      if (j < count) static_cast<S*>(p)[at(a) + j] = x[j];
  }

  LZ_DEVICE void add_to(void* p, const CudaScanArgs& a, const S (&x)[kStates]) const {
    LZ_UNROLL
    for (int j = 0; j < kStates; ++j)
      if (j < count) static_cast<S*>(p)[at(a) + j] += x[j];
  }

  // (b, chunks, n, d)
  LZ_DEVICE int64_t kept_at(const CudaScanArgs& a, int64_t t0, int j) const {
    const int64_t chunks = (a.l + kScanChunk - 1) / kScanChunk;
    return ((b * chunks + t0 / kScanChunk) * a.n + n0 + j) * a.d + d;
  }
};

template <class S>
LZ_DEVICE S step_size(const CudaScanArgs& a, S delta, S bias) {
  return a.softplus ? softplus(delta + bias) : delta + bias;
}

// `last` or `carry` before the first chunk.
template <class S>
LZ_DEVICE void start(const CudaScanArgs& a, const ScanBlock<S>& block, const Operand& from, void* to) {
  constexpr int kStates = Lane<S>::kStates;
  for (int64_t pass = 0; pass < a.n; pass += ScanBlock<S>::kPass) {
    const Lane<S> lane(a, block, pass);
    S x[kStates];
    LZ_UNROLL
    for (int j = 0; j < kStates; ++j)
      x[j] = from.data && j < lane.count ? load<S>(from, lane.b, lane.d, lane.n0 + j) : S(0);
    lane.store_to(to, a, x);
  }
}

// What seq_idx says of each step. An id is compared with that of the last step before it that is no padding; to look
// for that costs no more than the length of the padding between.
static LZ_KERNEL(256) scan_marks_kernel(const CudaScanArgs a) {
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < a.b * a.l; i += int64_t(gridDim.x) * 256) {
    const int64_t b = i / a.l, id = load_id(a.seq_idx, b, i % a.l);
    int64_t before = i % a.l - 1;
    while (id >= 0 && before >= 0 && load_id(a.seq_idx, b, before) < 0) --before;
    const bool restart = before >= 0 && load_id(a.seq_idx, b, before) != id;
    a.marks[i] = id < 0 ? kPadding : restart ? kRestart : kContinue;
  }
}

// kConstant: B or C may be constant. Any grid of one dimension is right, here and below.
template <class S, bool kConstant>
LZ_KERNEL(ScanBlock<S>::kThreads)
selective_scan_kernel(const CudaScanArgs a) {
  constexpr int kStates = ScanBlock<S>::kStates, kChannels = ScanBlock<S>::kChannels;
  LZ_SHARED(dt, ScanTile<S>);     // delta, then dt, then z
  LZ_SHARED(input, ScanTile<S>);  // u, then dt u
  LZ_SHARED(y, ScanTile<S>);
  LZ_SHARED(B, StateTile<S>);
  LZ_SHARED(C, StateTile<S>);
  LZ_SHARED(marks, uint8_t[kScanChunk]);

  const int part = threadIdx.x % kScanLanes, channel = threadIdx.x / kScanLanes;
  const int64_t items = a.b * a.g * ((a.d / a.g + kChannels - 1) / kChannels);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const ScanBlock<S> block = scan_block<S>(a, item);
    const bool exists = channel < block.channels;
    const S bias = exists && a.bias.data ? load<S>(a.bias, 0, block.first + channel, 0) : S(0);
    const S D = exists && a.D.data ? load<S>(a.D, 0, block.first + channel, 0) : S(0);
    start(a, block, a.initial, a.last);
    for (int64_t t0 = 0; t0 < a.l; t0 += kScanChunk) {
      const int steps = steps_of(a, t0);
      load_marks(a, block.b, t0, steps, marks);
      load_tile(a.u, block, t0, steps, input);
      load_tile(a.delta, block, t0, steps, dt);
      __syncthreads();  // u, delta and marks are there
      for (int t = part; t < kScanChunk; t += kScanLanes) {
        const bool padding = marks[t] == kPadding;
        const S u = padding ? S(0) : input[t][channel];
        const S step = padding ? S(0) : step_size(a, dt[t][channel], bias);
        dt[t][channel] = step, input[t][channel] = step * u, y[t][channel] = D * u;
      }
      for (int64_t pass = 0; pass < a.n; pass += ScanBlock<S>::kPass) {
        load_states(a.B, block, a.n, t0, pass, marks, B);
        load_states(a.C, block, a.n, t0, pass, marks, C);
        Lane<S> lane(a, block, pass);
        lane.load_parameters(a);
        S x[kStates];
        lane.load_from(a.last, a, x);
        LZ_UNROLL
        for (int j = 0; j < kStates; ++j)
          if (a.states && j < lane.count) static_cast<S*>(a.states)[lane.kept_at(a, t0, j)] = x[j];
        __syncthreads();  // dt u, B and C are there
        for (int t = 0; t < steps; t += kScanLanes) {
          S sum[kScanLanes];
          LZ_UNROLL
          for (int r = 0; r < kScanLanes; ++r) {
            const S step = dt[t + r][channel], in = input[t + r][channel];
            const bool restart = a.marks && marks[t + r] == kRestart;
            sum[r] = 0;
            LZ_UNROLL
            for (int j = 0; j < kStates; ++j) {
              const S b = kConstant && a.B.constant ? lane.B[j] : B[t + r][lane.first + j];
              const S c = kConstant && a.C.constant ? lane.C[j] : C[t + r][lane.first + j];
              x[j] = (restart ? S(0) : exp2(step * lane.A[j]) * x[j]) + in * b;
              sum[r] += c * x[j];
            }
          }
          const int r = spread_index<1, kScanLanes, kScanLanes>(part);
          y[t + r][channel] += spread_sum<1, kScanLanes, kScanLanes>(sum, part);
        }
        lane.store_to(a.last, a, x);
        __syncthreads();  // B and C are read, y is there
      }
      if (a.z.data) {
        load_tile(a.z, block, t0, steps, dt);
        __syncthreads();  // z is there
      }
      store_tile(a.out, block, t0, steps, [&](int t, int c) {
        return marks[t] == kPadding ? S(0) : a.z.data ? y[t][c] * silu(dt[t][c]) : y[t][c];
      });
      __syncthreads();  // the chunk is stored
    }
  }
}

template <class S, bool kConstant>
LZ_KERNEL(ScanBlock<S>::kThreads)
selective_scan_backward_kernel(const CudaScanGradArgs grad) {
  constexpr int kStates = ScanBlock<S>::kStates, kChannels = ScanBlock<S>::kChannels;
  constexpr int kThreads = ScanBlock<S>::kThreads, kWarps = ScanBlock<S>::kWarps, kSums = ScanBlock<S>::kSums;
  LZ_SHARED(dt, ScanTile<S>);  // delta, then dt, then grad_out
  LZ_SHARED(u, ScanTile<S>);   // u, then z
  LZ_SHARED(grad_y, ScanTile<S>);
  LZ_SHARED(grad_u, ScanTile<S>);   // first the sum over states of lambda B
  LZ_SHARED(grad_dt, ScanTile<S>);  // first that of lambda h A, then the gradient of delta
  LZ_SHARED(y, ScanTile<S>);        // z, then y
  LZ_SHARED(B, StateTile<S>);
  LZ_SHARED(C, StateTile<S>);
  LZ_SHARED(before, S[kScanChunk / kScanRun][kStates][kThreads]);  // the state before each run
  LZ_SHARED(sums, S[kWarps][kScanRun][kSums]);                     // over the channels of a warp, for B and C
  LZ_SHARED(marks, uint8_t[kScanChunk]);

  const CudaScanArgs& a = grad.scan;
  const int thread = threadIdx.x, part = thread % kScanLanes, channel = thread / kScanLanes, warp = thread / 32;
  const bool varying = !kConstant || !(a.B.constant && a.C.constant);
  const int64_t items = a.b * a.g * ((a.d / a.g + kChannels - 1) / kChannels);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const ScanBlock<S> block = scan_block<S>(a, item);
    const bool exists = channel < block.channels;
    const S bias = exists && a.bias.data ? load<S>(a.bias, 0, block.first + channel, 0) : S(0);
    const S D = exists && a.D.data ? load<S>(a.D, 0, block.first + channel, 0) : S(0);
    S sum_D = 0, sum_bias = 0;
    start(a, block, grad.grad_last, grad.carry);
    start(a, block, Operand{}, grad.A.data);
    if (a.B.constant) start(a, block, Operand{}, grad.B.data);
    if (a.C.constant) start(a, block, Operand{}, grad.C.data);

    for (int64_t t0 = (a.l - 1) / kScanChunk * kScanChunk; a.l > 0 && t0 >= 0; t0 -= kScanChunk) {
      const int steps = steps_of(a, t0), runs = (steps + kScanRun - 1) / kScanRun;
      load_marks(a, block.b, t0, steps, marks);
      load_tile(a.u, block, t0, steps, u);
      load_tile(a.delta, block, t0, steps, dt);
      load_tile(grad.grad_out, block, t0, steps, grad_y);
      if (a.z.data) load_tile(a.z, block, t0, steps, y);
      __syncthreads();  // inputs and marks are there
      for (int t = part; t < kScanChunk; t += kScanLanes) {
        if (marks[t] == kPadding || !exists) {
          dt[t][channel] = u[t][channel] = grad_y[t][channel] = 0;
        } else {
          dt[t][channel] = step_size(a, dt[t][channel], bias);
          if (a.z.data) grad_y[t][channel] *= silu(y[t][channel]);
        }
        grad_u[t][channel] = grad_dt[t][channel] = 0, y[t][channel] = D * u[t][channel];
      }

      for (int64_t pass = 0; pass < a.n; pass += ScanBlock<S>::kPass) {
        load_states(a.B, block, a.n, t0, pass, marks, B);
        load_states(a.C, block, a.n, t0, pass, marks, C);
        Lane<S> lane(a, block, pass);
        lane.load_parameters(a);
        S x[kStates], carry[kStates], sum_A[kStates] = {}, sum_B[kStates] = {}, sum_C[kStates] = {};
        LZ_UNROLL
        for (int j = 0; j < kStates; ++j)
          x[j] = j < lane.count ? static_cast<const S*>(a.states)[lane.kept_at(a, t0, j)] : S(0);
        lane.load_from(grad.carry, a, carry);
        __syncthreads();  // steps, B and C are there
        const auto b_at = [&](int t, int j) { return kConstant && a.B.constant ? lane.B[j] : B[t][lane.first + j]; };
        const auto c_at = [&](int t, int j) { return kConstant && a.C.constant ? lane.C[j] : C[t][lane.first + j]; };
        for (int run = 0; run < runs; ++run) {
          LZ_UNROLL
          for (int j = 0; j < kStates; ++j) before[run][j][thread] = x[j];
          LZ_UNROLL_4
          for (int t = run * kScanRun; run + 1 < runs && t < (run + 1) * kScanRun; ++t) {
            const S step = dt[t][channel], in = step * u[t][channel];
            const bool restart = a.marks && marks[t] == kRestart;
            LZ_UNROLL
            for (int j = 0; j < kStates; ++j) x[j] = (restart ? S(0) : exp2(step * lane.A[j]) * x[j]) + in * b_at(t, j);
          }
        }
        for (int run = runs - 1; run >= 0; --run) {
          S decay[kScanRun][kStates], h[kScanRun][kStates];  // h: the state before a step, decayed
          LZ_UNROLL
          for (int j = 0; j < kStates; ++j) x[j] = before[run][j][thread];
          LZ_UNROLL
          for (int r = 0; r < kScanRun; ++r) {
            const int t = run * kScanRun + r;
            const S step = dt[t][channel], in = step * u[t][channel];
            const bool restart = a.marks && marks[t] == kRestart;
            LZ_UNROLL
            for (int j = 0; j < kStates; ++j) {
              decay[r][j] = exp2(step * lane.A[j]);
              h[r][j] = restart ? S(0) : decay[r][j] * x[j];
              x[j] = h[r][j] + in * b_at(t, j);
            }
          }
          LZ_UNROLL
          for (int r0 = kScanRun - kScanLanes; r0 >= 0; r0 -= kScanLanes) {
            S lambda_B[kScanLanes] = {}, lambda_hA[kScanLanes] = {}, C_x[kScanLanes] = {};
            LZ_UNROLL
            for (int r = kScanLanes - 1; r >= 0; --r) {
              const int t = run * kScanRun + r0 + r;
              const S step = dt[t][channel], in = step * u[t][channel], gy = grad_y[t][channel];
              const bool restart = a.marks && marks[t] == kRestart;
              S over_channels[2 * kStates];
              LZ_UNROLL
              for (int j = 0; j < kStates; ++j) {
                const S b = b_at(t, j), c = c_at(t, j), state = h[r0 + r][j] + in * b;
                const S lambda = gy * c + carry[j], lambda_h = lambda * h[r0 + r][j];
                carry[j] = restart ? S(0) : decay[r0 + r][j] * lambda;
                lambda_B[r] += lambda * b, lambda_hA[r] += lambda_h * lane.A[j], C_x[r] += c * state;
                over_channels[j] = lambda * in, over_channels[kStates + j] = gy * state;
                sum_A[j] += lambda_h * step;
                if (kConstant) sum_B[j] += over_channels[j], sum_C[j] += over_channels[kStates + j];
              }
              if (varying) {
                constexpr int kValues = 2 * kStates;
                const int value = spread_index<kScanLanes, 32, kValues>(thread);
                const S sum = spread_sum<kScanLanes, 32, kValues>(over_channels, thread);
                if (thread % 32 < kValues * kScanLanes) sums[warp][r0 + r][value * kScanLanes + part] = sum;
              }
            }
            const int t = run * kScanRun + r0 + spread_index<1, kScanLanes, kScanLanes>(part);
            grad_u[t][channel] += spread_sum<1, kScanLanes, kScanLanes>(lambda_B, part);
            grad_dt[t][channel] += spread_sum<1, kScanLanes, kScanLanes>(lambda_hA, part);
            y[t][channel] += spread_sum<1, kScanLanes, kScanLanes>(C_x, part);
          }
          if (!varying) continue;
          __syncthreads();  // the sums of the warps are there
          for (int i = thread; i < kScanRun * kSums; i += kThreads) {
            const int r = i % kScanRun, value = i / kScanRun / kScanLanes, owner = i / kScanRun % kScanLanes;
            const int64_t t = t0 + run * kScanRun + r, n = pass + owner * kStates + value % kStates;
            const bool of_B = value < kStates;
            const Coefficient& to = of_B ? grad.grad_B : grad.grad_C;
            if (to.constant || n >= a.n || t >= a.l) continue;
            S sum = 0;
            for (int w = 0; w < kWarps && marks[t - t0] != kPadding; ++w) sum += sums[w][r][value * kScanLanes + owner];
            const int64_t first = block.part * (of_B ? grad.B : grad.C).size + block.g * to.group;
            static_cast<S*>(to.data)[first + block.b * to.batch + n * to.channel + t * to.time] = sum;
          }
          __syncthreads();  // the sums are read
        }
        lane.store_to(grad.carry, a, carry);
        lane.add_to(grad.A.data, a, sum_A);
        if (a.B.constant) lane.add_to(grad.B.data, a, sum_B);
        if (a.C.constant) lane.add_to(grad.C.data, a, sum_C);
      }
      __syncthreads();  // sums over states are there

      for (int t = part; t < steps; t += kScanLanes) {
        const S step = dt[t][channel], gy = grad_y[t][channel], lambda_B = grad_u[t][channel];
        S grad_delta = u[t][channel] * lambda_B + grad_dt[t][channel] * static_cast<S>(0.6931471805599453);
        if (a.softplus) grad_delta *= -expm1(-step);  // its slope, 1 - e^-dt
        const bool padding = marks[t] == kPadding;    // its state may be NaN, of a sequence before it
        if (!padding) sum_D += gy * u[t][channel], sum_bias += grad_delta;
        grad_u[t][channel] = padding ? S(0) : D * gy + step * lambda_B;
        grad_dt[t][channel] = padding ? S(0) : grad_delta;
      }
      __syncthreads();  // gradients are there
      store_tile(grad.grad_u, block, t0, steps, [&](int t, int c) { return grad_u[t][c]; });
      store_tile(grad.grad_delta, block, t0, steps, [&](int t, int c) { return grad_dt[t][c]; });
      if (a.z.data) {
        load_tile(grad.grad_out, block, t0, steps, dt);
        load_tile(a.z, block, t0, steps, u);
        __syncthreads();  // grad_out and z are there again
        store_tile(grad.grad_z, block, t0, steps, [&](int t, int c) {
          return marks[t] == kPadding ? S(0) : dt[t][c] * y[t][c] * silu_slope(u[t][c]);
        });
      }
      __syncthreads();  // gradients are stored
    }

    for (int bit = 1; bit < kScanLanes; bit *= 2) {
      sum_D += __shfl_xor_sync(kAllLanes, sum_D, bit);
      sum_bias += __shfl_xor_sync(kAllLanes, sum_bias, bit);
    }
    if (exists && part == 0) {
      const int64_t at = block.b * a.d + block.first + channel;
      static_cast<S*>(grad.D.data)[at] = sum_D, static_cast<S*>(grad.bias.data)[at] = sum_bias;
    }
  }
}

template <class S>
int64_t scan_items(const CudaScanArgs& a) {
  return a.b * a.g * ScanBlock<S>::parts(a.d / a.g);
}

// In float64, which need not be fast, one kernel does for both values of kConstant.
template <class S>
constexpr bool kOne = std::is_same_v<S, double>;

inline void scan_marks(const CudaScanArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.marks && a.b * a.l > 0)
    LZ_LAUNCH(scan_marks_kernel, blocks_for((a.b * a.l + 255) / 256, max_blocks), 256, 0, stream, a);
}

// `max_blocks` bounds the grid; blocks then take several parts of the work each.
template <class S>
void selective_scan_launch(const CudaScanArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const int64_t items = scan_items<S>(a);
  if (items == 0) return;
  scan_marks(a, max_blocks, stream);
  const auto kernel = a.B.constant || a.C.constant ? selective_scan_kernel<S, true> : selective_scan_kernel<S, kOne<S>>;
  LZ_LAUNCH(kernel, blocks_for(items, max_blocks), ScanBlock<S>::kThreads, 0, stream, a);
}

template <class S>
void selective_scan_backward_launch(const CudaScanGradArgs& grad, int64_t max_blocks, LZ_STREAM stream) {
  const CudaScanArgs& a = grad.scan;
  const int64_t items = scan_items<S>(a);
  if (items > 0) {
    scan_marks(a, max_blocks, stream);
    const auto kernel = a.B.constant || a.C.constant ? selective_scan_backward_kernel<S, true>
                                                     : selective_scan_backward_kernel<S, kOne<S>>;
    LZ_LAUNCH(kernel, blocks_for(items, max_blocks), ScanBlock<S>::kThreads, 0, stream, grad);
  }
  for (const GradParts* parts : {&grad.A, &grad.B, &grad.C, &grad.D, &grad.bias}) parts->sum<S>(max_blocks, stream);
}

}  // namespace layerzoo
