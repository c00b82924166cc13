// The causal convolution of the next inputs, with those before them in a state that is brought up to date in place.
//
// A thread has a channel of a row of the batch: decoding reads and writes few numbers for each, and channels lie
// together. Run in the emulator and compiled by nvcc; never measured on a GPU.
#pragma once

#include "../common/math.cuh"
#include "slot.cuh"

namespace layerzoo {

struct CudaConvUpdateArgs {
  int64_t b, d, l, w;
  int64_t rows, kept;  // of the state
  Operand x, out;      // (b, d, l)
  Operand state;       // (rows, d, kept), changed in place
  Operand weight;      // (d, w) as channel, time
  Operand bias;        // (d) as channel, or none
  Ids slots;           // (b): the row of the state; none: row b. Below 0: padding
  Ids positions;       // (b): the state is a ring, written from there on; none: it is moved
  bool silu;
};

constexpr int kConvUpdateThreads = 128;

template <class S>
struct ConvUpdate {
  const CudaConvUpdateArgs& a;
  int64_t b, channel, row;
  int64_t first;  // where in the state the first input belongs; one that is moved has it behind its end

  LZ_DEVICE ConvUpdate(const CudaConvUpdateArgs& a, int64_t b, int64_t channel, int64_t row)
      : a(a), b(b), channel(channel), row(row), first(a.kept) {
    if (!a.positions.data || a.kept == 0) return;
    first = load_id(a.positions, b, 0) % a.kept;
    if (first < 0) first += a.kept;  // the caller broke a promise; stay in the state all the same
  }

  // Input t, those before the new ones from the state.
  LZ_DEVICE S input(int64_t t) const {
    return t >= 0 ? load<S>(a.x, b, channel, t) : load<S>(a.state, row, channel, (first + t + a.kept) % a.kept);
  }
  LZ_DEVICE void output(int64_t t) const {
    S sum = a.bias.data ? load<S>(a.bias, 0, channel, 0) : S(0);
    for (int64_t k = 0; k < a.w; ++k) sum += load<S>(a.weight, 0, channel, k) * input(t - (a.w - 1) + k);
    store<S>(a.out, b, channel, t, a.silu ? silu(sum) : sum);
  }
  LZ_DEVICE void keep() const {
    if (a.positions.data)
      for (int64_t t = a.l < a.kept ? 0 : a.l - a.kept; t < a.l; ++t)
        store<S>(a.state, row, channel, (first + t) % a.kept, input(t));
    else  // each place is read before it is written
      for (int64_t i = 0; i < a.kept; ++i) store<S>(a.state, row, channel, i, input(i + a.l - a.kept));
  }
};

// Any grid of one dimension is right, if no two rows of the batch have the same row of the state.
template <class S>
LZ_KERNEL(kConvUpdateThreads)
causal_conv1d_update_kernel(const CudaConvUpdateArgs a) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.b * a.d; i += stride) {
    const int64_t b = i / a.d, channel = i % a.d;
    const Slot<S> slot(a.slots, b, a.rows);
    if (!slot.exists) {
      for (int64_t t = 0; t < a.l; ++t) store<S>(a.out, b, channel, t, slot.instead);
      continue;
    }
    const ConvUpdate<S> update(a, b, channel, slot.row);
    for (int64_t t = 0; t < a.l; ++t) update.output(t);
    update.keep();
  }
}

template <class S>
void causal_conv1d_update_launch(const CudaConvUpdateArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.b == 0 || a.d == 0) return;
  const unsigned blocks = blocks_for((a.b * a.d + kConvUpdateThreads - 1) / kConvUpdateThreads, max_blocks);
  LZ_LAUNCH(causal_conv1d_update_kernel<S>, blocks, kConvUpdateThreads, 0, stream, a);
}

}  // namespace layerzoo
