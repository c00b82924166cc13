// Depthwise causal convolution, forward, backward and step by step. Lanes are channels; taps roll through a tile that
// keeps the last w - 1 rows of the one before (the halo).
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int K = 32;      // steps per tile
constexpr int kUnit = 16;  // channels per task, whatever the lanes

// Does tap k of step t read a step of the same sequence? What lies left of step 0 belongs to the sequence of step 0;
// padding reads nothing, whatever stands there.
inline bool same_sequence(const int64_t* seq_idx, int64_t t, int64_t k, int64_t w) {
  const int64_t source = t - (w - 1) + k;
  return seq_idx[t] >= 0 && seq_idx[source < 0 ? 0 : source] == seq_idx[t];
}

// Convolution of one tile, before bias and activation: out[t] = sum of weight[k] x[t + k], x beginning with the halo.
// `kWidth` 0 means any.
template <class S, int kWidth, bool kPacked>
inline void taps(const S* weight, int64_t width, const S* x, const int64_t* seq_idx, int64_t t0, int steps, S* out) {
  constexpr int W = kLanes<S>;
  const int64_t w = kWidth ? kWidth : width;
  for (int t = 0; t < steps; ++t) {
    Vec<S> sum = load<S>(out + t * W);
    for (int64_t k = 0; k < w; ++k)
      if (!kPacked || same_sequence(seq_idx, t0 + t, k, w)) sum += load<S>(weight + k * W) * load<S>(x + (t + k) * W);
    store<S>(out + t * W, sum);
  }
}

template <class S, bool kPacked>
inline void taps(const S* weight, int64_t w, const S* x, const int64_t* seq_idx, int64_t t0, int steps, S* out) {
  switch (w) {
    case 2:
      return taps<S, 2, kPacked>(weight, w, x, seq_idx, t0, steps, out);
    case 3:
      return taps<S, 3, kPacked>(weight, w, x, seq_idx, t0, steps, out);
    case 4:
      return taps<S, 4, kPacked>(weight, w, x, seq_idx, t0, steps, out);
    default:
      return taps<S, 0, kPacked>(weight, w, x, seq_idx, t0, steps, out);
  }
}

template <class S>
struct ConvBlock {
  static constexpr int W = kLanes<S>;
  int64_t b, d0;
  int channels;
  const int64_t* seq_idx;  // of this batch, or null
  Vec<S> bias;

  ConvBlock(const ConvArgs& a, int64_t task, int index) {
    const int64_t units = (a.d + kUnit - 1) / kUnit, left = a.d - (d0 = task % units * kUnit + index * W);
    b = task / units;
    channels = static_cast<int>(left < W ? left : W);
    seq_idx = a.seq_idx ? a.seq_idx + b * a.l : nullptr;
    bias = a.bias && channels > 0 ? load_lanes<S>(static_cast<const S*>(a.bias) + d0, channels) : Vec<S>{};
  }

  void weights(const ConvArgs& a, S* lanes) const {
    const S* p = static_cast<const S*>(a.weight) + d0 * a.w;
    for (int64_t k = 0; k < a.w; ++k)
      for (int c = 0; c < W; ++c) lanes[k * W + c] = c < channels ? p[c * a.w + k] : S(0);
  }

  // Inputs of the steps [first, first + rows); those before 0 from `initial` or zero.
  void inputs(const ConvArgs& a, int64_t first, int64_t rows, S* tile) const {
    const int64_t before = first < 0 ? (-first < rows ? -first : rows) : 0;
    if (before > 0 && a.initial)
      load_tile<S>(a.initial, b, d0, first + a.w - 1, channels, static_cast<int>(before), tile);
    else
      std::memset(tile, 0, before * W * sizeof(S));
    if (rows > before)
      load_tile<S>(a.x, b, d0, first + before, channels, static_cast<int>(rows - before), tile + before * W);
  }

  // The convolution with its bias, where sequences are packed or not; rows of padding get the bias alone.
  void convolve(const ConvArgs& a, const S* weight, const S* x, int64_t t0, int steps, S* out) const {
    for (int t = 0; t < steps; ++t) store<S>(out + t * W, bias);
    if (seq_idx)
      taps<S, true>(weight, a.w, x, seq_idx, t0, steps, out);
    else
      taps<S, false>(weight, a.w, x, nullptr, t0, steps, out);
  }

  void zero_padding(int64_t t0, int steps, S* tile) const {
    if (!seq_idx) return;
    for (int t = 0; t < steps; ++t)
      if (seq_idx[t0 + t] < 0) store<S>(tile + t * W, Vec<S>{});
  }
};

template <class S>
void conv(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>;
  const int64_t halo = a.w - 1;
  S *weight = static_cast<S*>(scratch), *x = weight + a.w * W;
  alignas(64) S out[K * W];
  for (int64_t task = begin; task < end; ++task)
    for (int index = 0; index < kUnit / W; ++index) {
      const ConvBlock<S> block(a, task, index);
      if (block.channels <= 0) break;
      block.weights(a, weight);
      block.inputs(a, -halo, halo, x);
      for (int64_t t0 = 0; t0 < a.l; t0 += K) {
        const int steps = static_cast<int>(a.l - t0 < K ? a.l - t0 : K);
        load_tile<S>(a.x, block.b, block.d0, t0, block.channels, steps, x + halo * W);
        const int next = static_cast<int>(a.l - t0 - steps < K ? a.l - t0 - steps : K);
        const Ahead read = next > 0 ? Ahead::tile<S>(a.x, block.b, block.d0, t0 + steps, next) : Ahead{};
        const Ahead written = Ahead::tile<S>(a.out, block.b, block.d0, t0, steps);
        for (int t = 0; t < steps; ++t) read.fetch(t), written.fetch(t);
        block.convolve(a, weight, x, t0, steps, out);
        if (a.silu) silu<S>(steps, out);
        block.zero_padding(t0, steps, out);
        store_tile<S>(a.out, block.b, block.d0, t0, block.channels, steps, out);
        std::memmove(x, x + steps * W, halo * W * sizeof(S));
      }
      if (halo > 0) store_tile<S>(a.final_state, block.b, block.d0, 0, block.channels, static_cast<int>(halo), x);
    }
}

// Gradient of the input of step t where sequences are packed; `row` is the row of step t in `grad`.
template <class S>
Vec<S> packed_adjoint(const ConvArgs& a, const int64_t* seq_idx, const S* weight, const S* grad, int64_t t,
                      int64_t row) {
  constexpr int W = kLanes<S>;
  Vec<S> sum{};
  for (int64_t k = 0; k < a.w; ++k) {
    const int64_t ahead = a.w - 1 - k;
    if (t + ahead >= 0 && t + ahead < a.l && same_sequence(seq_idx, t + ahead, k, a.w))
      sum += load<S>(weight + k * W) * load<S>(grad + (row + ahead) * W);
  }
  return sum;
}

template <class S>
void conv_backward(const ConvGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>;
  const int64_t w = a.w, halo = w - 1;
  S *weight = static_cast<S*>(scratch), *mirrored = weight + w * W, *grad_weight = mirrored + w * W;
  S *x = grad_weight + w * W,
    *grad = x + (K + halo) * W;               // grad: of the value before the activation, this tile and after
  S* grad_final = grad + (K + 2 * halo) * W;  // `grad` begins with halo rows of zeros, for the initial state
  alignas(64) S grad_x[K * W];
  for (int64_t task = begin; task < end; ++task)
    for (int index = 0; index < kUnit / W; ++index) {
      const ConvBlock<S> block(a, task, index);
      if (block.channels <= 0) break;
      const int64_t b = block.b, d0 = block.d0;
      block.weights(a, weight);
      for (int64_t k = 0; k < w; ++k) store<S>(mirrored + k * W, load<S>(weight + (halo - k) * W));
      std::memset(grad_weight, 0, w * W * sizeof(S));
      std::memset(grad, 0, (K + 2 * halo) * W * sizeof(S));
      if (a.grad_final)
        load_tile<S>(a.grad_final, b, d0, 0, block.channels, static_cast<int>(halo), grad_final);
      else
        std::memset(grad_final, 0, halo * W * sizeof(S));
      S* rows = grad + halo * W;  // of this tile
      Vec<S> grad_bias{};
      // Gradients of the inputs of the steps [t0, t0 + steps), which begin at row `first` of this tile.
      const auto adjoint = [&](int64_t t0, int64_t first, int steps, S* out) {
        for (int t = 0; t < steps; ++t) {
          const int64_t last = t0 + t + halo - a.l;
          store<S>(out + t * W, last >= 0 ? load<S>(grad_final + last * W) : Vec<S>{});
          if (block.seq_idx)
            store<S>(out + t * W,
                     load<S>(out + t * W) + packed_adjoint<S>(a, block.seq_idx, weight, rows, t0 + t, first + t));
        }
        if (!block.seq_idx) taps<S, false>(mirrored, w, rows + first * W, nullptr, t0, steps, out);
      };
      for (int64_t t0 = a.l > 0 ? (a.l - 1) / K * K : -1; t0 >= 0; t0 -= K) {
        const int steps = static_cast<int>(a.l - t0 < K ? a.l - t0 : K);
        std::memmove(rows + steps * W, rows, halo * W * sizeof(S));
        block.inputs(a, t0 - halo, steps + halo, x);
        load_tile<S>(a.grad_out, b, d0, t0, block.channels, steps, rows);
        if (a.silu) {
          block.convolve(a, weight, x, t0, steps, grad_x);
          silu_backward<S>(grad_x, steps, rows);
        }
        block.zero_padding(t0, steps, rows);
        for (int t = 0; t < steps; ++t) grad_bias += load<S>(rows + t * W);
        for (int64_t k = 0; k < w; ++k) {
          Vec<S> sum = load<S>(grad_weight + k * W);
          for (int t = 0; t < steps; ++t)
            if (!block.seq_idx || same_sequence(block.seq_idx, t0 + t, k, w))
              sum += load<S>(rows + t * W) * load<S>(x + (t + k) * W);
          store<S>(grad_weight + k * W, sum);
        }
        adjoint(t0, 0, steps, grad_x);
        store_tile<S>(a.grad_x, b, d0, t0, block.channels, steps, grad_x);
      }
      if (a.grad_initial) {
        adjoint(-halo, -halo, static_cast<int>(halo), x);
        store_tile<S>(a.grad_initial, b, d0, 0, block.channels, static_cast<int>(halo), x);
      }
      S* out = static_cast<S*>(a.grad_weight) + (b * a.d + d0) * w;
      for (int64_t k = 0; k < w; ++k)
        for (int c = 0; c < block.channels; ++c) out[c * w + k] = grad_weight[k * W + c];
      store_lanes<S>(static_cast<S*>(a.grad_bias) + b * a.d + d0, grad_bias, block.channels);
    }
}

// Calls f(position, step, count) for `steps` positions of a ring from `first` on, once for each stretch without a
// break.
template <class F>
inline void along_ring(int64_t length, int64_t first, int64_t steps, const F& f) {
  for (int64_t step = 0; step < steps && length > 0;) {
    const int64_t position = (first + step) % length;
    const int64_t count = length - position < steps - step ? length - position : steps - step;
    f(position, step, static_cast<int>(count));
    step += count;
  }
}

// The convolution again, with the state as the halo: of the row `slot`, moved on so that it ends with the new inputs,
// or a ring that is written from `position` on. Before the new inputs `kept` rows of it stand in `rows`.
template <class S>
struct ConvState {
  static constexpr int W = kLanes<S>;
  const ConvArgs& a;
  const ConvBlock<S>& block;
  int64_t slot, kept;

  ConvState(const ConvArgs& a, const ConvBlock<S>& block)
      : a(a), block(block), slot(a.slots ? a.slots[block.b] : block.b), kept(a.positions ? a.w - 1 : a.state_length) {}

  void read(S* rows) const {
    if (!a.positions) return load_tile<S>(a.initial, slot, block.d0, 0, block.channels, static_cast<int>(kept), rows);
    along_ring(a.state_length, a.positions[block.b] + a.state_length - kept, kept,
               [&](int64_t position, int64_t step, int count) {
                 load_tile<S>(a.initial, slot, block.d0, position, block.channels, count, rows + step * W);
               });
  }
  void write_inputs(int64_t t0, int steps, const S* x) const {
    if (!a.positions) return;
    along_ring(a.state_length, a.positions[block.b] + t0, steps, [&](int64_t position, int64_t step, int count) {
      store_tile<S>(a.initial, slot, block.d0, position, block.channels, count, x + step * W);
    });
  }
  void write_moved(const S* rows) const {
    if (a.positions) return;
    store_tile<S>(a.initial, slot, block.d0, 0, block.channels, static_cast<int>(kept), rows);
  }
};

template <class S>
void zero_outputs(const ConvArgs& a, const ConvBlock<S>& block) {
  alignas(64) const S zeros[K * kLanes<S>] = {};
  for (int64_t t0 = 0; t0 < a.l; t0 += K)
    store_tile<S>(a.out, block.b, block.d0, t0, block.channels, static_cast<int>(a.l - t0 < K ? a.l - t0 : K), zeros);
}

template <class S>
void conv_update(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>;
  S *weight = static_cast<S*>(scratch), *rows = weight + a.w * W;
  alignas(64) S out[K * W];
  for (int64_t task = begin; task < end; ++task)
    for (int index = 0; index < kUnit / W; ++index) {
      const ConvBlock<S> block(a, task, index);
      if (block.channels <= 0) break;
      const ConvState<S> state(a, block);
      if (state.slot < 0) {
        zero_outputs<S>(a, block);
        continue;
      }
      block.weights(a, weight);
      state.read(rows);
      S* x = rows + state.kept * W;
      for (int64_t t0 = 0; t0 < a.l; t0 += K) {
        const int steps = static_cast<int>(a.l - t0 < K ? a.l - t0 : K);
        load_tile<S>(a.x, block.b, block.d0, t0, block.channels, steps, x);
        block.convolve(a, weight, x - (a.w - 1) * W, t0, steps, out);
        if (a.silu) silu<S>(steps, out);
        store_tile<S>(a.out, block.b, block.d0, t0, block.channels, steps, out);
        state.write_inputs(t0, steps, x);
        std::memmove(rows, rows + steps * W, state.kept * W * sizeof(S));
      }
      state.write_moved(rows);
    }
}

}  // namespace

int64_t causal_conv1d_scratch(const ConvArgs& a) { return (3 * a.w + 2 * K + 4 * a.w + a.state_length) * kBytes; }

void causal_conv1d(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? conv<double>(a, scratch, begin, end) : conv<float>(a, scratch, begin, end);
}

void causal_conv1d_backward(const ConvGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? conv_backward<double>(a, scratch, begin, end) : conv_backward<float>(a, scratch, begin, end);
}

void causal_conv1d_update(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? conv_update<double>(a, scratch, begin, end) : conv_update<float>(a, scratch, begin, end);
}

}  // namespace layerzoo::LZ_ISA
