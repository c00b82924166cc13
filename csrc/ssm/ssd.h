// What both passes of the chunked scan of Mamba-2 (Dao and Gu, 2024) are made of: products of small matrices in
// registers, the step sizes and decays of a chunk, tiles of a head.
//
// Everything lies in one of two forms. A panel has one row for each step or state and kPanel channels: the lanes of a
// product. A plane has one row for each state or channel, or for each step, and a column for each step, kPitch apart.
#pragma once

#include <cmath>

#include "../common/matrix.h"
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {

constexpr int Q = kSsdChunk;
template <class S>
constexpr int kPanel = 2 * kLanes<S>;
// Rows of Q elements would fall on a few sets of the cache. The room behind also lets a panel of columns start
// anywhere.
template <class S>
constexpr int kPitch = Q + kPanel<S>;

inline int64_t panels_of(int64_t lanes, int64_t panel) { return (lanes + panel - 1) / panel; }

// ---- products ----

// acc[r] += sum over k of a[r * kRow + k * kStep] b[k], with b[k] the panel row at b + k * kPitchB. With up to six rows
// it all fits into sixteen registers, and loads do not hold up the multiply-adds.
template <int kRow, int kStep, int kPitchB, class S, int R>
__attribute__((always_inline)) inline void multiply(Vec<S> (&acc)[R][2], const S* a, const S* b, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += kStep, b += kPitchB) {
    const Vec<S> low = load<S>(b), high = load<S>(b + kLanes<S>);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec<S> x = splat<S>(a[r * kRow]);
      acc[r][0] += x * low;
      acc[r][1] += x * high;
    }
  }
}

// The square on the diagonal of such a product with R steps: row r takes the steps k <= r, or k >= r where kUpper.
// Nothing else is touched: a zero there would not keep out NaN.
template <bool kUpper, int kRow, int kStep, int kPitchB, class S, int R>
__attribute__((always_inline)) inline void multiply_triangle(Vec<S> (&acc)[R][2], const S* a, const S* b) {
#pragma GCC unroll 6
  for (int k = 0; k < R; ++k) {
    const Vec<S> low = load<S>(b + k * kPitchB), high = load<S>(b + k * kPitchB + kLanes<S>);
#pragma GCC unroll 6
    for (int r = kUpper ? 0 : k; r < (kUpper ? k + 1 : R); ++r) {
      const Vec<S> x = splat<S>(a[r * kRow + k * kStep]);
      acc[r][0] += x * low;
      acc[r][1] += x * high;
    }
  }
}

template <class S, int R>
__attribute__((always_inline)) inline void load_block(const S* p, int64_t pitch, Vec<S> (&acc)[R][2]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] = load<S>(p + r * pitch), acc[r][1] = load<S>(p + r * pitch + kLanes<S>);
}

template <class S, int R>
__attribute__((always_inline)) inline void store_block(S* p, int64_t pitch, const Vec<S> (&acc)[R][2]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) store<S>(p + r * pitch, acc[r][0]), store<S>(p + r * pitch + kLanes<S>, acc[r][1]);
}

template <class S, int R>
__attribute__((always_inline)) inline void scale_block(Vec<S> (&acc)[R][2], S factor) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] *= factor, acc[r][1] *= factor;
}

template <class S, int R>
__attribute__((always_inline)) inline void scale_rows(Vec<S> (&acc)[R][2], const S* factors) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] *= factors[r], acc[r][1] *= factors[r];
}

// ---- time ----

// What a head has in one chunk.
struct Spot {
  int64_t b, t0, h;
  int steps;
  const uint8_t* marks;

  static Spot at(const SsdArgs& a, int64_t b, int64_t chunk, int64_t h) {
    const int64_t t0 = chunk * Q;
    return {b, t0, h, a.steps(chunk), a.marks ? a.marks + b * a.l + t0 : nullptr};
  }
  bool padding(int t) const { return marks && marks[t] == kPadding; }
};

// Calls f(begin, end, restart) for the runs of steps that belong to one sequence. Padding stays inside a run: its dt
// and everything else read there is zero, so the state goes over it.
template <class F>
inline void for_each_sequence(const Spot& spot, const F& f) {
  for (int begin = 0; begin < spot.steps;) {
    int end = begin + 1;
    while (end < spot.steps && !(spot.marks && spot.marks[end] == kRestart)) ++end;
    f(begin, end, spot.marks && spot.marks[begin] == kRestart);
    begin = end;
  }
}

template <class S>
struct Steps {
  alignas(64) S dt[kPitch<S>], slope[kPitch<S>];  // slope: the derivative of dt by what was given
  // The sum over the run up to a step of dt A, in powers of two, as a value and what rounding took from it: where one
  // step decays by thousands, small differences behind it would be lost in a single number.
  alignas(64) S sum[kPitch<S>], rest[kPitch<S>];
  alignas(64) S from_start[kPitch<S>], to_end[kPitch<S>];  // decays between a step and the ends of its run
  alignas(64) S weight[kPitch<S>];                         // to_end dt

  void load(const SsdArgs& a, const Spot& spot) {
    constexpr int W = kLanes<S>, kTogether = 2;
    std::memset(dt, 0, sizeof dt);
    LZ_DISPATCH_DTYPE(a.dt.dtype, T, {
      const T* p = static_cast<const T*>(a.dt.data) + a.dt.at(spot.b, spot.t0, spot.h);
      for (int t = 0; t < spot.steps; ++t) dt[t] = to<S>(p[t * a.dt.time]);
    })
    const Vec<S> bias = splat<S>(a.bias ? static_cast<const S*>(a.bias)[spot.h] : S(0));
    const Vec<S> low = splat<S>(static_cast<S>(a.low)), high = splat<S>(static_cast<S>(a.high)), one = splat<S>(1);
    for (int t = 0; t < Q; t += kTogether * W) {
      Vec<S> x[kTogether], sig[kTogether];
      for (int i = 0; i < kTogether; ++i) sig[i] = x[i] = LZ_ISA::load<S>(dt + t + i * W) + bias;
      if (a.softplus) {
        sigmoid<S, kTogether>(sig);
        for (int i = 0; i < kTogether; ++i) sig[i] = x[i] > splat<S>(20) ? one : sig[i];
        softplus<S, kTogether>(x);
      }
      for (int i = 0; i < kTogether; ++i) {
        const Vec<S> rise = a.softplus ? sig[i] : one;
        store<S>(slope + t + i * W, x[i] < low || x[i] > high ? Vec<S>{} : rise);
        x[i] = x[i] < low ? low : x[i];
        store<S>(dt + t + i * W, x[i] > high ? high : x[i]);
      }
    }
    for (int t = 0; t < Q; ++t)
      if (t >= spot.steps || spot.padding(t)) dt[t] = slope[t] = 0;
  }

  // The decays of the run [begin, end) of a head with rate A.
  void decay(S A, int begin, int end) {
    // Far below the range of exp, where the decay is zero whatever the sum; it keeps A = -inf from making NaN.
    constexpr double kSteepest = -4096;
    const double rate = static_cast<double>(A) * M_LOG2E;
    double exponent = 0;
    for (int t = begin; t < end; ++t) {
      const double step = dt[t] == 0 ? 0 : static_cast<double>(dt[t]) * rate;  // padding, whatever the rate
      exponent += step < kSteepest ? kSteepest : step;
      sum[t] = static_cast<S>(exponent);
      rest[t] = static_cast<S>(exponent - static_cast<double>(sum[t]));
    }
    const Vec<S> last = splat<S>(sum[end - 1]), last_rest = splat<S>(rest[end - 1]);
    for (int t = begin; t < end; t += kLanes<S>) {
      const Vec<S> at = LZ_ISA::load<S>(sum + t), at_rest = LZ_ISA::load<S>(rest + t);
      Vec<S> x[2] = {at, (last - at) + (last_rest - at_rest)};
      exp2<S, 2>(x);
      store<S>(from_start + t, x[0]);
      store<S>(to_end + t, x[1]);
      store<S>(weight + t, x[1] * LZ_ISA::load<S>(dt + t));
    }
  }

  // exp of the sum of dt A over the steps after s, up to t, for the lanes s.
  template <int N>
  __attribute__((always_inline)) void between(int s, int t, Vec<S> (&x)[N]) const {
    const Vec<S> at = splat<S>(sum[t]), at_rest = splat<S>(rest[t]);
    for (int i = 0; i < N; ++i)
      x[i] = (at - LZ_ISA::load<S>(sum + s + i * kLanes<S>)) + (at_rest - LZ_ISA::load<S>(rest + s + i * kLanes<S>));
    exp2<S, N>(x);
  }
};

template <class S>
inline Vec<S> lane_numbers() {
  Vec<S> v;
  for (int i = 0; i < kLanes<S>; ++i) v[i] = static_cast<S>(i);
  return v;
}

// Plane [t][s]: C_t B_s times the decay from s to t and dt_s, for s <= t in a run.
template <class S>
inline void mix(const Steps<S>& steps, const S* products, int begin, int end, S* plane) {
  constexpr int W = kLanes<S>, kTogether = 2;
  const Vec<S> lanes = lane_numbers<S>();
  for (int t = begin; t < end; ++t)
    for (int s = begin; s <= t; s += kTogether * W) {
      Vec<S> x[kTogether];
      steps.between(s, t, x);
      for (int i = 0; i < kTogether; ++i) {
        const int first = s + i * W;
        const Vec<S> y = x[i] * load<S>(products + t * kPitch<S> + first) * load<S>(steps.dt + first);
        store<S>(plane + t * kPitch<S> + first, lanes <= splat<S>(static_cast<S>(t - first)) ? y : Vec<S>{});
      }
    }
}

// ---- tiles ----

// A matrix of `rows` rows from and to panels [panel][height][kPanel]; columns beyond its own are read as zero. Row by
// row where columns lie together, so that what is neighbour in memory is read together.
template <class S, class T>
inline void load_panels_as(const T* p, int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t height,
                           S* panels) {
  constexpr int V = kPanel<S>, W = kLanes<S>;
  const int64_t whole = col == 1 ? cols / V : 0;
  for (int64_t r = 0; whole && r < rows; ++r)
    for (int64_t j = 0; j < whole; ++j)
      for (int i = 0; i < V; i += W) store<S>(panels + (j * height + r) * V + i, load_as<S>(p + r * row + j * V + i));
  for (int64_t c = whole * V; c < cols; c += V) {
    S* panel = panels + c * height;
    if (cols - c < V) std::memset(panel, 0, rows * V * sizeof(S));
    load_matrix_as<S>(p + c * col, row, col, static_cast<int>(rows), static_cast<int>(cols - c < V ? cols - c : V),
                      panel, V);
  }
}

template <class S, class T>
inline void store_panels_as(T* p, int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t height,
                            const S* panels) {
  constexpr int V = kPanel<S>, W = kLanes<S>;
  const int64_t whole = col == 1 ? cols / V : 0;
  for (int64_t r = 0; whole && r < rows; ++r)
    for (int64_t j = 0; j < whole; ++j)
      for (int i = 0; i < V; i += W) store_as<S>(p + r * row + j * V + i, load<S>(panels + (j * height + r) * V + i));
  for (int64_t c = whole * V; c < cols; c += V)
    store_matrix_as<S>(p + c * col, row, col, static_cast<int>(rows), static_cast<int>(cols - c < V ? cols - c : V),
                       panels + c * height, V);
}

template <class S>
inline void zero_padding(const SsdArgs& a, const Spot& spot, S* panels) {
  constexpr int V = kPanel<S>;
  for (int t = 0; spot.marks && t < spot.steps; ++t)
    for (int64_t j = 0; spot.padding(t) && j < panels_of(a.p, V); ++j)
      std::memset(panels + (j * Q + t) * V, 0, V * sizeof(S));
}

// A head over a chunk, zero beyond the steps and at padding.
template <class S>
inline void load_head(const SsdArgs& a, const Heads& x, const Spot& spot, S* panels) {
  constexpr int V = kPanel<S>;
  if (spot.steps < Q) std::memset(panels, 0, panels_of(a.p, V) * Q * V * sizeof(S));
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    const T* p = static_cast<const T*>(x.data) + x.at(spot.b, spot.t0, spot.h);
    load_panels_as<S>(p, x.time, x.lane, spot.steps, a.p, Q, panels);
  })
  zero_padding<S>(a, spot, panels);
}

// The other way; padding gets zeros.
template <class S>
inline void store_head(const SsdArgs& a, const Heads& x, const Spot& spot, S* panels) {
  zero_padding<S>(a, spot, panels);
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    T* p = static_cast<T*>(x.data) + x.at(spot.b, spot.t0, spot.h);
    store_panels_as<S>(p, x.time, x.lane, spot.steps, a.p, Q, panels);
  })
}

// States in panels from and to a matrix (n, p) of these strides.
template <class S>
inline void load_state(const SsdArgs& a, const S* state, int64_t row, int64_t col, S* panels) {
  load_panels_as<S, S>(state, row, col, a.n, a.p, a.n, panels);
}

template <class S>
inline void store_state(const SsdArgs& a, const S* panels, S* state, int64_t row, int64_t col) {
  store_panels_as<S, S>(state, row, col, a.n, a.p, a.n, panels);
}

// Cache lines of a head that will be read soon. Its rows are too far apart for the processor to guess; each turn of a
// loop over other work asks for a few.
class Soon {
 public:
  Soon() = default;
  Soon(const SsdArgs& a, const Heads& x, const Spot& spot, int64_t turns) {
    if (!x || x.lane != 1) return;
    const int64_t size = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
    row_ = static_cast<const char*>(x.data) + size * x.at(spot.b, spot.t0, spot.h);
    stride_ = size * x.time, bytes_ = size * a.p, rows_ = spot.steps;
    each_ = ((bytes_ + 63) / 64 * rows_ + turns - 1) / turns;
  }
  void fetch() {
    for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_);
      if ((at_ += 64) >= bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, at_ = 0, each_ = 0;
};

// What ssd_pack leaves for a chunk of a group: B and C as planes [n][steps], and the plane [t][s] of their products.
template <class S>
struct Packed {
  S *B, *C, *products;

  static int64_t size(const SsdArgs& a) { return (2 * a.n + Q) * kPitch<S>; }
  Packed(const SsdArgs& a, int64_t b, int64_t g, int64_t chunk) {
    B = static_cast<S*>(a.packed) + ((b * a.g + g) * a.chunks() + chunk) * size(a);
    C = B + a.n * kPitch<S>;
    products = C + a.n * kPitch<S>;
  }
};

// y = C h + (sum over s of mixed x) + D x for the steps of a run in one panel; no C h where `state` is null.
template <class S>
inline void read_out(const SsdArgs& a, const Packed<S>& packed, const Steps<S>& steps, const S* mixed, int begin,
                     int end, const S* x, const S* state, const Vec<S> (&D)[2], S* y) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  for_each_block(begin, end, [&](int64_t t, auto rows) {
    constexpr int R = rows();
    Vec<S> acc[R][2] = {};
    if (state) {
      multiply<1, P, V>(acc, packed.C + t, state, a.n);
      scale_rows<S, R>(acc, steps.from_start + t);
    }
    multiply<P, 1, V>(acc, mixed + t * P + begin, x + begin * V, t - begin);
    multiply_triangle<false, P, 1, V>(acc, mixed + t * P + t, x + t * V);
    if (a.D)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) acc[r][i] += D[i] * load<S>(x + (t + r) * V + i * kLanes<S>);
    store_block<S, R>(y + t * V, V, acc);
  });
}

// h <- total h + sum over s of B_s (weight x)_s in one panel; nothing of h where it counts as zero.
template <class S>
inline void advance(const SsdArgs& a, const S* B, int begin, int end, const S* weighted, S total, bool from_zero,
                    Soon& soon, S* state) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  for_each_block(0, a.n, [&](int64_t i, auto rows) {
    constexpr int R = rows();
    soon.fetch();
    Vec<S> acc[R][2] = {};
    if (!from_zero) {
      load_block<S, R>(state + i * V, V, acc);
      scale_block<S, R>(acc, total);
    }
    multiply<P, 1, V>(acc, B + i * P + begin, weighted + begin * V, end - begin);
    store_block<S, R>(state + i * V, V, acc);
  });
}

// D of the channels of a panel.
template <class S>
inline void load_D(const SsdArgs& a, int64_t h, int64_t j, Vec<S> (&D)[2]) {
  const S* p = static_cast<const S*>(a.D);
  for (int i = 0; i < 2; ++i) {
    const int64_t first = j * kPanel<S> + i * kLanes<S>, left = a.p - first;
    if (!p || left <= 0)
      D[i] = Vec<S>{};
    else if (a.wide_D)
      D[i] = load_lanes<S>(p + h * a.p + first, static_cast<int>(left < kLanes<S> ? left : kLanes<S>));
    else
      D[i] = splat<S>(p[h]);
  }
}

// Hands out scratch.
template <class S>
struct Room {
  S* next;
  S* take(int64_t count) {
    S* p = next;
    next += count;
    return p;
  }
};

}  // namespace layerzoo::LZ_ISA
