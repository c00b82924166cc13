// Products of a few rows with one expert's matrix, and of rows with rows. The matrix is read in place, once for a block
// of rows. Each element of a result is summed in one order whatever the number of rows: a token's result does not
// depend on its neighbours.
#pragma once

#include <algorithm>

#include "../common/matrix.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {

constexpr int kPanelRows = 4;  // rows of x that meet a row of the matrix at once
template <class S>
constexpr int64_t kPanelColumns = 2 * kLanes<S>;  // columns of a matrix that meet rows of x at once

// Rows of x that are kept at hand together: in the second-level cache, and in whole panels and blocks.
inline int64_t block_rows(int64_t length) {
  constexpr int64_t kElements = 96 << 10, kMost = 96, kLeast = 12;
  const int64_t rows = kElements / (length + 1) / kLeast * kLeast;
  return rows < kLeast ? kLeast : rows > kMost ? kMost : rows;
}

// Rows lie this far apart: neither at a multiple of a page, nor at one of a cache line's sets.
template <class S>
int64_t pitch_of(int64_t length) {
  return (length + kLanes<S> - 1) / kLanes<S> * kLanes<S> + kLanes<S>;
}

template <class S>
inline void add(S* to, const S* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += x[i];
}

// ---- with the rows of a matrix: each element of the result is a dot product of two rows ----

// Sums of the lanes: out[i] = sum of v[i], added as `reduce_add` does.
template <class S, int kSide = kLanes<S> / 2>
__attribute__((always_inline)) inline Vec<S> sums_of_lanes(Vec<S> (&v)[kLanes<S>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) v[i] = fold<kSide, S>(v[i], v[i + kSide]);
  if constexpr (kSide > 1) return sums_of_lanes<S, kSide / 2>(v);
  return v[0];
}

// Rows of a matrix that come next: the processor's own guess ends with the page. Asked for in the second-level cache:
// rows of a power of two would push each other out of the first.
template <class T>
struct NextRows {
  const T* rows;
  int64_t stride;

  template <int kStep>
  __attribute__((always_inline)) void fetch(int row, int64_t step) const {
    constexpr int64_t kEvery = 64 / (kStep * sizeof(T)) > 1 ? 64 / (kStep * sizeof(T)) : 1;  // once for a cache line
    if (step % kEvery == 0) __builtin_prefetch(rows + row * stride + step * kStep, 0, 2);
  }
};

// y[m * pitch + r] = the dot product of row r of the matrix and row m of a panel [length / lanes][M][lanes].
template <class S, class T, class U, int M, int R>
void dots(const S* x, const T* w, int64_t stride, int64_t length, NextRows<U> next, S* y, int64_t pitch) {
  constexpr int W = kLanes<S>;
  Vec<S> sum[M * R];
#pragma GCC unroll 16
  for (int i = 0; i < M * R; ++i) sum[i] = Vec<S>{};  // `= {}` would become a call
  const int64_t whole = length / W;
  for (int64_t v = 0; v < whole; ++v, x += M * W) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) next.template fetch<W>(r, v);
    Vec<S> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load_as<S>(w + r * stride + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<S> column = load<S>(x + m * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[m * R + r] += row[r] * column;
    }
  }
  if (whole * W < length)
    for (int r = 0; r < R; ++r) {
      const Vec<S> row = load_some<S>(w + r * stride + whole * W, length - whole * W);
      for (int m = 0; m < M; ++m) sum[m * R + r] += row * load<S>(x + m * W);
    }
#pragma GCC unroll 8
  for (int i = 0; i < M * R; i += W) {
    Vec<S> some[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) some[j] = i + j < M * R ? sum[i + j] : Vec<S>{};
    S all[W];
    store<S>(all, sums_of_lanes<S>(some));
    for (int j = 0; j < W && i + j < M * R; ++j) y[(i + j) / R * pitch + (i + j) % R] = all[j];
  }
}

template <class S, class T, class U, int R>
inline void dots(int m, const S* x, const T* w, int64_t stride, int64_t length, NextRows<U> next, S* y, int64_t pitch) {
  switch (m) {
    case 1:
      return dots<S, T, U, 1, R>(x, w, stride, length, next, y, pitch);
    case 2:
      if constexpr (R <= 4) return dots<S, T, U, 2, R>(x, w, stride, length, next, y, pitch);
      break;
    case 3:
      if constexpr (R <= 3) return dots<S, T, U, 3, R>(x, w, stride, length, next, y, pitch);
      break;
    default:
      if constexpr (R <= 3) return dots<S, T, U, kPanelRows, R>(x, w, stride, length, next, y, pitch);
  }
}

template <class S>
int64_t panel_size(int64_t length) {
  return kPanelRows * pitch_of<S>(length);
}

// `count` rows into panels; the last may have fewer than kPanelRows.
template <class S>
void pack_panels(const Rows& x, int64_t first, int64_t count, int64_t length, S* panels) {
  constexpr int W = kLanes<S>;
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t left = count - i / kPanelRows * kPanelRows, rows = left < kPanelRows ? left : kPanelRows;
      const T* p = static_cast<const T*>(x.data) + x.at(first + i);
      S* out = panels + i / kPanelRows * panel_size<S>(length) + i % kPanelRows * W;
      int64_t k = 0;
      for (; k + W <= length; k += W, out += rows * W) store<S>(out, load_as<S>(p + k));
      if (k < length) store<S>(out, load_some<S>(p + k, length - k));
    }
  })
}

// y (count, rows) = x times the transpose of `rows` rows of a matrix.
template <class S, class T>
void multiply_rows(const S* panels, int64_t count, const T* w, int64_t stride, int64_t rows, int64_t length, S* wide,
                   S* y, int64_t pitch) {
  // From so many rows on, those of the matrix are worth a copy: in S, and apart from each other in the cache.
  constexpr int64_t kCopy = std::is_same_v<S, T> ? 4 * kPanelRows : kPanelRows;
  const int64_t apart = pitch_of<S>(length);
  const auto some = [&](int64_t r, auto count_of_rows) {
    constexpr int R = count_of_rows();
    const T* p = w + r * stride;
    const NextRows<T> next{p + R * stride, stride};
    const auto all = [&](const auto* from, int64_t from_stride) {
      for (int64_t i = 0; i < count; i += kPanelRows)
        dots<S, std::decay_t<decltype(*from)>, T, R>(static_cast<int>(std::min<int64_t>(count - i, kPanelRows)),
                                                     panels + i / kPanelRows * panel_size<S>(length), from, from_stride,
                                                     length, next, y + i * pitch + r, pitch);
    };
    if (count <= kCopy) return all(p, stride);
    for (int i = 0; i < R; ++i) widen<S>(p + i * stride, length, wide + i * apart);
    all(static_cast<const S*>(wide), apart);
  };
  int64_t r = 0;
  if (count == 1)
    for (; r + 8 <= rows; r += 8) some(r, std::integral_constant<int, 8>{});
  if (count == 2)
    for (; r + 4 <= rows; r += 4) some(r, std::integral_constant<int, 4>{});
  for (; r + 3 <= rows; r += 3) some(r, std::integral_constant<int, 3>{});
  for (; r < rows; ++r) some(r, std::integral_constant<int, 1>{});
}

// ---- with the columns of a matrix ----

// acc[r] = sum over k of a[r * row + k * step] b[k], where b[k] is a row of a panel.
template <class S, int R>
__attribute__((always_inline)) inline void multiply(Vec<S> (&acc)[R][2], const S* a, int64_t row, int64_t step,
                                                    const S* b, int64_t count) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec<S>{};
  for (int64_t k = 0; k < count; ++k, a += step, b += kPanelColumns<S>) {
    const Vec<S> low = load<S>(b), high = load<S>(b + kLanes<S>);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec<S> x = splat<S>(a[r * row]);
      acc[r][0] += x * low;
      acc[r][1] += x * high;
    }
  }
}

// Two vectors of a result, or as much of them as there are columns.
template <class S, class T>
__attribute__((always_inline)) inline void store_some(const Vec<S> (&v)[2], int64_t columns, T* to) {
  if (columns >= kPanelColumns<S>) {
    store_as<S>(to, v[0]);
    store_as<S>(to + kLanes<S>, v[1]);
  } else {
    S row[kPanelColumns<S>];
    store<S>(row, v[0]);
    store<S>(row + kLanes<S>, v[1]);
    narrow<S>(row, columns, to);
  }
}

template <class S>
void pack_rows(const Rows& x, int64_t first, int64_t count, int64_t length, S* out) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    for (int64_t i = 0; i < count; ++i)
      widen<S>(static_cast<const T*>(x.data) + x.at(first + i), length, out + i * pitch_of<S>(length));
  })
}

// y (count, columns) = x times a matrix of `length` rows, for so few rows of x that the matrix is best read in order.
template <class S, class T>
void multiply_few(const S* x, int64_t count, const T* w, int64_t stride, int64_t length, int64_t columns, S* y,
                  int64_t pitch) {
  constexpr int W = kLanes<S>, kAhead = 8;
  for (int64_t m = 0; m < count; ++m) std::memset(y + m * pitch, 0, columns * sizeof(S));
  const auto add = [&](int64_t k, auto steps) {
    constexpr int K = steps();
    for (int i = 0; i < K; ++i)
      for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(w + (k + kAhead + i) * stride + c);
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      Vec<S> row[K];
      for (int i = 0; i < K; ++i) row[i] = load_as<S>(w + (k + i) * stride + c);
      for (int64_t m = 0; m < count; ++m) {
        Vec<S> sum = load<S>(y + m * pitch + c);
        for (int i = 0; i < K; ++i) sum += splat<S>(x[m * pitch_of<S>(length) + k + i]) * row[i];
        store<S>(y + m * pitch + c, sum);
      }
    }
    if (c < columns)
      for (int64_t m = 0; m < count; ++m) {
        Vec<S> sum = load_some<S>(y + m * pitch + c, columns - c);
        for (int i = 0; i < K; ++i)
          sum += splat<S>(x[m * pitch_of<S>(length) + k + i]) * load_some<S>(w + (k + i) * stride + c, columns - c);
        std::memcpy(y + m * pitch + c, &sum, (columns - c) * sizeof(S));
      }
  };
  int64_t k = 0;
  for (; k + 4 <= length; k += 4) add(k, std::integral_constant<int, 4>{});
  for (; k < length; ++k) add(k, std::integral_constant<int, 1>{});
}

// Columns [0, columns) of a matrix in panels [panel][length][kPanelColumns], zero beyond. Rows are read by a few cache
// lines each, because single ones that lie a page apart would wait for memory one after the other.
template <class S, class T>
void pack_columns(const T* w, int64_t stride, int64_t length, int64_t columns, S* panels) {
  constexpr int64_t V = kPanelColumns<S>, W = kLanes<S>, kAhead = 16;
  for (int64_t k = 0; k < length; ++k) {
    const T* p = w + k * stride;
    for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(p + kAhead * stride + c, 0, 2);
    S* to = panels + k * V;
    int64_t c = 0;
    for (; c + V <= columns; c += V, to += length * V) {
      store<S>(to, load_as<S>(p + c));
      store<S>(to + W, load_as<S>(p + c + W));
    }
    if (c < columns) {
      store<S>(to, load_some<S>(p + c, std::min(W, columns - c)));
      store<S>(to + W, columns - c > W ? load_some<S>(p + c + W, columns - c - W) : Vec<S>{});
    }
  }
}

// Columns of a matrix that are packed together.
template <class S>
constexpr int64_t kStrip = 192 / (kPanelColumns<S> * sizeof(S)) > 1 ? 192 / sizeof(S) : kPanelColumns<S>;

template <class S, class T>
void multiply_columns(const S* x, int64_t count, const T* w, int64_t stride, int64_t length, int64_t columns, S* panels,
                      S* y, int64_t pitch) {
  constexpr int64_t V = kPanelColumns<S>;
  if (count <= kPanelRows) return multiply_few<S>(x, count, w, stride, length, columns, y, pitch);
  const int64_t apart = pitch_of<S>(length);
  for (int64_t strip = 0; strip < columns; strip += kStrip<S>) {
    const int64_t end = std::min(strip + kStrip<S>, columns);
    pack_columns<S>(w + strip, stride, length, end - strip, panels);
    const S* panel = panels;
    for (int64_t c = strip; c < end; c += V, panel += length * V)
      for_each_block(0, count, [&](int64_t m, auto rows) {
        constexpr int R = rows();
        Vec<S> acc[R][2];
        multiply<S, R>(acc, x + m * apart, apart, 1, panel, length);
        for (int r = 0; r < R; ++r) store_some<S>(acc[r], end - c, y + (m + r) * pitch + c);
      });
  }
}

// ---- rows of x with the matrix of an expert ----

// A block of rows of x at a time, against the same columns of the result. Scratch: block_rows of x, and kStrip of the
// matrix.
template <class S>
class Product {
 public:
  // `across`: each column of the result is a dot product with a row of the matrix.
  Product(const Matrices& w, int64_t expert, bool across, int64_t length, S* scratch)
      : w_(w),
        base_(expert * w.expert),
        across_(across),
        length_(length),
        x_(scratch),
        part_(scratch + block_rows(length) * pitch_of<S>(length)) {}

  static int64_t scratch(int64_t length) { return (block_rows(length) + kStrip<S>)*pitch_of<S>(length); }

  void load(const Rows& x, int64_t first, int64_t count) {
    count_ = count;
    across_ ? pack_panels<S>(x, first, count, length_, x_) : pack_rows<S>(x, first, count, length_, x_);
  }
  // y (rows, columns) for the columns [begin, begin + columns) of the result.
  void multiply(int64_t begin, int64_t columns, S* y, int64_t pitch) const {
    if constexpr (sizeof(S) == 8) {
      multiply_as<double>(begin, columns, y, pitch);
    } else {
      switch (w_.dtype) {
        case DType::bf16:
          return multiply_as<BFloat16>(begin, columns, y, pitch);
        case DType::f16:
          return multiply_as<Half>(begin, columns, y, pitch);
        default:
          return multiply_as<float>(begin, columns, y, pitch);
      }
    }
  }

 private:
  template <class T>
  void multiply_as(int64_t begin, int64_t columns, S* y, int64_t pitch) const {
    const T* w = static_cast<const T*>(w_.data) + base_;
    if (across_)
      multiply_rows<S>(x_, count_, w + begin * w_.row, w_.row, columns, length_, part_, y, pitch);
    else
      multiply_columns<S>(x_, count_, w + begin, w_.row, length_, columns, part_, y, pitch);
  }

  const Matrices& w_;
  int64_t base_;
  bool across_;
  int64_t length_, count_ = 0;
  S *x_, *part_;
};

// The part of a matrix that a task has, for all rows of its expert.
struct Task {
  int64_t expert, begin, end, first, count;  // columns, rows

  // Neighbours in number are of different experts: one with many rows is shared by all threads.
  static Task at(const Dispatch& d, int64_t number, int64_t size, int64_t columns) {
    const int64_t e = d.by_size[number % d.active], begin = number / d.active * size;
    return {e, begin, std::min(begin + size, columns), d.offsets[e], d.offsets[e + 1] - d.offsets[e]};
  }
};

}  // namespace layerzoo::LZ_ISA
