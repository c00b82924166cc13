// Tiles: [time][lane] blocks of a (batch, channel, time) tensor of any strides and element type, in the kernel's own
// type.
#pragma once

#include "operand.h"
#include "vec.h"

namespace layerzoo::LZ_ISA {

template <class S, class T>
inline void load_tile_as(const T* p, int64_t channel_stride, int64_t time_stride, int channels, int steps, S* tile) {
  constexpr int n = kLanes<S>;
  int t = 0;
  if (channels == n && channel_stride == 1) {
    for (; t < steps; ++t) store<S>(tile + t * n, load_as<S>(p + t * time_stride));
  } else if (channels == n && (time_stride == 1 || time_stride == -1)) {
    const bool backwards = time_stride < 0;
    for (; t + n <= steps; t += n) {
      const T* first = backwards ? p - t - (n - 1) : p + t;
      Vec<S> rows[n];
      for (int c = 0; c < n; ++c) rows[c] = load_as<S>(first + c * channel_stride);
      transpose<S>(rows);
      for (int i = 0; i < n; ++i) store<S>(tile + (t + (backwards ? n - 1 - i : i)) * n, rows[i]);
    }
  }
  for (; t < steps; ++t)
    for (int c = 0; c < n; ++c) tile[t * n + c] = c < channels ? to<S>(p[c * channel_stride + t * time_stride]) : S(0);
}

template <class S, class T>
inline void store_tile_as(T* p, int64_t channel_stride, int64_t time_stride, int channels, int steps, const S* tile) {
  constexpr int n = kLanes<S>;
  int t = 0;
  if (channels == n && channel_stride == 1) {
    for (; t < steps; ++t) store_as<S>(p + t * time_stride, load<S>(tile + t * n));
  } else if (channels == n && (time_stride == 1 || time_stride == -1)) {
    const bool backwards = time_stride < 0;
    for (; t + n <= steps; t += n) {
      T* first = backwards ? p - t - (n - 1) : p + t;
      Vec<S> rows[n];
      for (int i = 0; i < n; ++i) rows[i] = load<S>(tile + (t + (backwards ? n - 1 - i : i)) * n);
      transpose<S>(rows);
      for (int c = 0; c < n; ++c) store_as<S>(first + c * channel_stride, rows[c]);
    }
  }
  for (; t < steps; ++t)
    for (int c = 0; c < channels; ++c) p[c * channel_stride + t * time_stride] = from<T>(tile[t * n + c]);
}

// Lanes beyond `channels` are read as zero.
template <class S>
inline void load_tile(const Operand& x, int64_t b, int64_t channel, int64_t time, int channels, int steps, S* tile) {
  LZ_DISPATCH_DTYPE(
      x.dtype, T,
      load_tile_as<S>(static_cast<const T*>(x.data) + x.at(b, channel, time), x.channel, x.time, channels, steps, tile))
}

// Lanes beyond `channels` are not written.
template <class S>
inline void store_tile(const Operand& x, int64_t b, int64_t channel, int64_t time, int channels, int steps,
                       const S* tile) {
  LZ_DISPATCH_DTYPE(
      x.dtype, T,
      store_tile_as<S>(static_cast<T*>(x.data) + x.at(b, channel, time), x.channel, x.time, channels, steps, tile))
}

// The cache lines of a tile that will be read or written soon. Its rows are too far apart for the processor to guess,
// and asked for all at once they would have to wait for each other: a loop over other work asks for one in each turn.
struct Ahead {
  const char* first = reinterpret_cast<const char*>(this);  // nothing to ask for: a line that is there already
  int64_t row = 0;
  int shift = 0;  // log2 of the lines in a row

  template <class S>
  static Ahead tile(const Operand& x, int64_t b, int64_t channel, int64_t time, int steps) {
    if (!x || (x.channel != 1 && x.time != 1 && x.time != -1)) return {};
    const int64_t size = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
    const bool backwards = x.channel != 1 && x.time == -1;
    Ahead a{static_cast<const char*>(x.data) + size * x.at(b, channel, backwards ? time + steps - 1 : time)};
    a.row = size * (x.channel == 1 ? x.time : x.channel);
    for (int64_t bytes = size * (x.channel == 1 ? kLanes<S> : steps); bytes > 64 << a.shift;) ++a.shift;
    return a;
  }
  void fetch(int i) const { __builtin_prefetch(first + (i >> shift) * row + (i & ((1 << shift) - 1)) * 64); }
};

// Calls f(first row, integral_constant<rows>) for the rows of a tile, several at once where there are.
template <class F>
inline void for_each_row(int steps, const F& f) {
  int t = 0;
  for (; t + 4 <= steps; t += 4) f(t, std::integral_constant<int, 4>{});
  for (; t < steps; ++t) f(t, std::integral_constant<int, 1>{});
}

// N rows of a tile, from row t on.
template <class S, int N>
inline void load_rows(const S* tile, int t, Vec<S> (&rows)[N]) {
  for (int i = 0; i < N; ++i) rows[i] = load<S>(tile + (t + i) * kLanes<S>);
}
template <class S, int N>
inline void store_rows(S* tile, int t, const Vec<S> (&rows)[N]) {
  for (int i = 0; i < N; ++i) store<S>(tile + (t + i) * kLanes<S>, rows[i]);
}

// tile = silu(tile).
template <class S>
inline void silu(int steps, S* tile) {
  for_each_row(steps, [&](int t, auto count) {
    Vec<S> x[count()], sig[count()];
    load_rows<S>(tile, t, x);
    load_rows<S>(tile, t, sig);
    sigmoid<S, count()>(sig);
    for (int i = 0; i < count(); ++i) x[i] *= sig[i];
    store_rows<S>(tile, t, x);
  });
}

// grad = grad silu'(x); where `out` is given, out = the old grad times silu(x).
template <class S>
inline void silu_backward(const S* x, int steps, S* grad, S* out = nullptr) {
  for_each_row(steps, [&](int t, auto count) {
    Vec<S> z[count()], sig[count()], g[count()];
    load_rows<S>(x, t, z);
    load_rows<S>(x, t, sig);
    load_rows<S>(grad, t, g);
    sigmoid<S, count()>(sig);
    for (int i = 0; i < count(); ++i) {
      if (out) store<S>(out + (t + i) * kLanes<S>, g[i] * z[i] * sig[i]);
      g[i] *= sig[i] * (z[i] * (splat<S>(1) - sig[i]) + splat<S>(1));
    }
    store_rows<S>(grad, t, g);
  });
}

// `channels` values of a contiguous row as one vector, zero beyond.
template <class S>
inline Vec<S> load_lanes(const S* row, int channels) {
  if (channels == kLanes<S>) return load<S>(row);
  Vec<S> v{};
  std::memcpy(&v, row, channels * sizeof(S));
  return v;
}

template <class S>
inline void store_lanes(S* row, Vec<S> v, int channels) {
  std::memcpy(row, &v, channels * sizeof(S));
}

}  // namespace layerzoo::LZ_ISA
