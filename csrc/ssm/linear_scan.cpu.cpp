// Linear recurrence h_t = a_t h_{t-1} + x_t, forward and backward, real or complex. It does one multiply-add for three
// numbers that pass through memory, so all that counts is how memory is walked: rows of many channels where channels
// lie together, read and written in place; else tiles, transposed in registers where steps lie together. A complex
// number is two neighbouring scalars of a row.
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int kSteps = 256;  // of a tile, at most: short pieces of many rows are slow to read
template <class S>
constexpr int kTile = 16384 / sizeof(S);  // scalars of a buffer, and at least those of a unit

template <class S>
constexpr DType kType = sizeof(S) == 8 ? DType::f64 : DType::f32;

// One row of scalars for each step.
template <class S>
struct Rows {
  S* first;
  int64_t stride;
  S* at(int t) const { return first + t * stride; }
};

// a b, or conj(a) b; a complex number is a pair of lanes.
template <bool kConj, class V, int... I>
__attribute__((always_inline)) inline V complex_product(V a, V b, std::integer_sequence<int, I...>) {
  const V real = __builtin_shufflevector(a, a, (I & ~1)...), imaginary = __builtin_shufflevector(a, a, (I | 1)...);
  const V cross = imaginary * __builtin_shufflevector(b, b, (I ^ 1)...) * V{(I & 1 ? 1 : -1)...};
  return kConj ? real * b - cross : real * b + cross;
}

template <class S, bool kComplex, bool kConj = false>
__attribute__((always_inline)) inline Vec<S> product(Vec<S> a, Vec<S> b) {
  if constexpr (kComplex)
    return complex_product<kConj>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
  else
    return a * b;
}

// f(i, count) for the vectors of a row of n scalars; the last may have fewer than all lanes.
template <class S, class F>
__attribute__((always_inline)) inline void for_each_vector(int n, const F& f) {
  int i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) f(i, std::integral_constant<int, kLanes<S>>{});
  if (i < n) f(i, n - i);
}

// The channels that one task walks through time with: a row of them where they lie together, else a vector.
template <class S, bool kComplex>
struct Block {
  static constexpr int kParts = kComplex ? 2 : 1;
  static constexpr int kLaneChannels = kLanes<S> / kParts;
  int64_t b, c0;
  int channels;
  int scalars;  // of a row of a buffer
  bool rows;

  Block(const LinearScanArgs& a, int64_t task, int64_t offset) : rows(a.rows) {
    const int64_t units = (a.d + a.unit - 1) / a.unit, unit_first = task % units * a.unit;
    const int64_t unit_end = unit_first + a.unit < a.d ? unit_first + a.unit : a.d;
    b = task / units, c0 = unit_first + offset;
    const int64_t left = unit_end - c0, most = rows ? a.unit : kLaneChannels;
    channels = static_cast<int>(left < most ? left : most);
    scalars = rows ? channels * kParts : kLanes<S>;
  }

  int steps(const LinearScanArgs& a, int64_t t0) const {
    const int most = kTile<S> / scalars < kSteps ? kTile<S> / scalars : kSteps;
    return static_cast<int>(a.l - t0 < most ? a.l - t0 : most);
  }

  bool in_place(const Operand& x) const { return rows && x.dtype == kType<S>; }
  Rows<S> memory(const Operand& x, int64_t t) const {
    return {static_cast<S*>(x.data) + kParts * x.at(b, c0, t), kParts * x.time};
  }

  Rows<S> read(const Operand& x, int64_t t, int steps, S* buffer) const {
    if (in_place(x)) return memory(x, t);
    if (rows) {
      convert(x, t, steps, buffer);
    } else if constexpr (!kComplex) {
      load_tile<S>(x, b, c0, t, channels, steps, buffer);
    } else if constexpr (sizeof(S) == 4) {  // pairs of floats move like doubles
      Operand bits = x;
      bits.dtype = DType::f64;
      load_tile<double>(bits, b, c0, t, channels, steps, reinterpret_cast<double*>(buffer));
    } else {
      const Rows<S> from = memory(x, t);
      std::memset(buffer, 0, steps * scalars * sizeof(S));
      for (int i = 0; i < steps; ++i)
        for (int c = 0; c < channels; ++c)
          std::memcpy(buffer + i * scalars + 2 * c, from.at(i) + 2 * c * x.channel, 2 * sizeof(S));
    }
    return {buffer, scalars};
  }

  // Where results are to be put: then `write` sees to it that they reach memory.
  Rows<S> place(const Operand& x, int64_t t, S* buffer) const {
    return in_place(x) ? memory(x, t) : Rows<S>{buffer, scalars};
  }

  void write(const Operand& x, int64_t t, int steps, const S* buffer) const {
    if (in_place(x)) return;
    if (rows) {
      LZ_DISPATCH_DTYPE(x.dtype, T, {
        for (int i = 0; i < steps; ++i) {
          T* to_row = static_cast<T*>(x.data) + x.at(b, c0, t + i);
          const S* row = buffer + i * scalars;
          int c = 0;
          for (; c + kLanes<S> <= scalars; c += kLanes<S>) store_as<S>(to_row + c, load<S>(row + c));
          for (; c < scalars; ++c) to_row[c] = from<T>(row[c]);
        }
      })
    } else if constexpr (!kComplex) {
      store_tile<S>(x, b, c0, t, channels, steps, buffer);
    } else if constexpr (sizeof(S) == 4) {
      Operand bits = x;
      bits.dtype = DType::f64;
      store_tile<double>(bits, b, c0, t, channels, steps, reinterpret_cast<const double*>(buffer));
    } else {
      const Rows<S> to_rows = memory(x, t);
      for (int i = 0; i < steps; ++i)
        for (int c = 0; c < channels; ++c)
          std::memcpy(to_rows.at(i) + 2 * c * x.channel, buffer + i * scalars + 2 * c, 2 * sizeof(S));
    }
  }

  // Zero in whole vectors: lanes beyond a row are computed too.
  void clear(S* row) const { std::memset(row, 0, (scalars + kLanes<S> - 1) / kLanes<S> * kLanes<S> * sizeof(S)); }

  // The state before the first step.
  void initial(const LinearScanArgs& a, S* state) const {
    clear(state);
    if (a.initial_state)
      std::memcpy(state, static_cast<const S*>(a.initial_state) + (b * a.d + c0) * kParts,
                  channels * kParts * sizeof(S));
  }

 private:
  void convert(const Operand& x, int64_t t, int steps, S* buffer) const {
    LZ_DISPATCH_DTYPE(x.dtype, T, {
      for (int i = 0; i < steps; ++i) {
        const T* row = static_cast<const T*>(x.data) + x.at(b, c0, t + i);
        S* out = buffer + i * scalars;
        int c = 0;
        for (; c + kLanes<S> <= scalars; c += kLanes<S>) store<S>(out + c, load_as<S>(row + c));
        for (; c < scalars; ++c) out[c] = to<S>(row[c]);
      }
    })
  }
};

template <class S, bool kComplex, class F>
void for_each_block(const LinearScanArgs& a, int64_t begin, int64_t end, const F& f) {
  for (int64_t task = begin; task < end; ++task)
    for (int64_t offset = 0;;) {
      const Block<S, kComplex> block(a, task, offset);
      if (block.channels <= 0) break;
      f(block);
      if ((offset += block.channels) >= a.unit) break;
    }
}

template <class S, bool kComplex>
void scan(const LinearScanArgs& a, int64_t begin, int64_t end) {
  alignas(64) S state[kTile<S>], a_[kTile<S>], x_[kTile<S>], h_[kTile<S>];
  for_each_block<S, kComplex>(a, begin, end, [&](const Block<S, kComplex>& block) {
    block.initial(a, state);
    for (int64_t t0 = 0; t0 < a.l;) {
      const int steps = block.steps(a, t0);
      const Rows<S> decay = block.read(a.a, t0, steps, a_), input = block.read(a.x, t0, steps, x_);
      const Rows<S> out = block.place(a.h, t0, h_);
      for (int t = 0; t < steps; ++t) {
        const S *at = decay.at(t), *xt = input.at(t);
        S* ht = out.at(t);
        for_each_vector<S>(block.scalars, [&](int i, auto count) __attribute__((always_inline)) {
          const Vec<S> h =
              product<S, kComplex>(load_lanes<S>(at + i, count), load<S>(state + i)) + load_lanes<S>(xt + i, count);
          store<S>(state + i, h);
          store_lanes<S>(ht + i, h, count);
        });
      }
      block.write(a.h, t0, steps, h_);
      t0 += steps;
    }
  });
}

// With lam_t the gradient of h_t through all that follows: lam_t = grad_t + conj(a_{t+1}) lam_{t+1}, last step first.
template <class S, bool kComplex>
void scan_backward(const LinearScanGradArgs& a, int64_t begin, int64_t end) {
  alignas(64) S first[kTile<S>], carry[kTile<S>], a_[kTile<S>], h_[kTile<S>], grad_[kTile<S>], grad_a_[kTile<S>],
      grad_x_[kTile<S>];
  for_each_block<S, kComplex>(a, begin, end, [&](const Block<S, kComplex>& block) {
    block.initial(a, first);
    block.clear(carry);
    for (int64_t end_of_tile = a.l; end_of_tile > 0;) {
      const int steps = block.steps(a, a.l - end_of_tile);
      const int64_t t0 = end_of_tile - steps;
      const Rows<S> decay = block.read(a.a, t0, steps, a_), grad = block.read(a.grad_h, t0, steps, grad_);
      const int without_first = t0 == 0;  // row t of `before` is then h_{t - 1 + without_first}
      const Rows<S> before = block.read(a.h, t0 - 1 + without_first, steps - without_first, h_);
      const Rows<S> grad_a = block.place(a.grad_a, t0, grad_a_), grad_x = block.place(a.grad_x, t0, grad_x_);
      for (int t = steps - 1; t >= 0; --t) {
        const S *at = decay.at(t), *gt = grad.at(t), *ht = t < without_first ? first : before.at(t - without_first);
        S *gat = grad_a.at(t), *gxt = grad_x.at(t);
        for_each_vector<S>(block.scalars, [&](int i, auto count) __attribute__((always_inline)) {
          const Vec<S> lam = load_lanes<S>(gt + i, count) + load<S>(carry + i);
          store_lanes<S>(gxt + i, lam, count);
          store_lanes<S>(gat + i, product<S, kComplex, true>(load_lanes<S>(ht + i, count), lam), count);
          store<S>(carry + i, product<S, kComplex, true>(load_lanes<S>(at + i, count), lam));
        });
      }
      block.write(a.grad_a, t0, steps, grad_a_);
      block.write(a.grad_x, t0, steps, grad_x_);
      end_of_tile = t0;
    }
    if (a.grad_initial)
      std::memcpy(static_cast<S*>(a.grad_initial) + (block.b * a.d + block.c0) * block.kParts, carry,
                  block.channels * block.kParts * sizeof(S));
  });
}

}  // namespace

void linear_scan(const LinearScanArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  if (a.f64)
    a.complex ? scan<double, true>(a, begin, end) : scan<double, false>(a, begin, end);
  else
    a.complex ? scan<float, true>(a, begin, end) : scan<float, false>(a, begin, end);
}

void linear_scan_backward(const LinearScanGradArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  if (a.f64)
    a.complex ? scan_backward<double, true>(a, begin, end) : scan_backward<double, false>(a, begin, end);
  else
    a.complex ? scan_backward<float, true>(a, begin, end) : scan_backward<float, false>(a, begin, end);
}

}  // namespace layerzoo::LZ_ISA
