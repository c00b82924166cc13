// Matrices of any strides and element type, from and to rows of the kernel's own type.
#pragma once

#include "vec.h"

namespace layerzoo::LZ_ISA {

// Calls f(first, integral_constant<R>) over the rows [begin, end) in blocks of six, and of four where fewer are left.
template <class F>
__attribute__((always_inline)) inline void for_each_block(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; end - i > 8 || end - i == 6; i += 6) f(i, std::integral_constant<int, 6>{});
  for (; end - i >= 4; i += 4) f(i, std::integral_constant<int, 4>{});
  for (; end - i >= 2; i += 2) f(i, std::integral_constant<int, 2>{});
  for (; i < end; ++i) f(i, std::integral_constant<int, 1>{});
}

// ---- one row ----

// The first `count` elements; zero beyond.
template <class S, class T>
inline Vec<S> load_some(const T* p, int64_t count) {
  S s[kLanes<S>] = {};
  for (int64_t i = 0; i < count; ++i) s[i] = to<S>(p[i]);
  return load<S>(s);
}

template <class S, class T>
inline void widen(const T* p, int64_t count, S* out) {
  constexpr int W = kLanes<S>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store<S>(out + i, load_as<S>(p + i));
  for (; i < count; ++i) out[i] = to<S>(p[i]);
}

template <class S, class T>
inline void narrow(const S* p, int64_t count, T* out) {
  constexpr int W = kLanes<S>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store_as<S>(out + i, load<S>(p + i));
  for (; i < count; ++i) out[i] = from<T>(p[i]);
}

// ---- any strides ----

template <class S, class T>
inline void load_matrix_as(const T* p, int64_t row, int64_t col, int rows, int cols, S* out, int64_t pitch) {
  constexpr int W = kLanes<S>;
  const int whole_rows = row == 1 && col != 1 ? rows / W * W : 0;
  const int whole_cols = col == 1 || whole_rows ? cols / W * W : 0;
  for (int r = 0; r < whole_rows; r += W)
    for (int c = 0; c < whole_cols; c += W) {
      Vec<S> block[W];
      for (int i = 0; i < W; ++i) block[i] = load_as<S>(p + r + (c + i) * col);
      transpose<S>(block);
      for (int i = 0; i < W; ++i) store<S>(out + (r + i) * pitch + c, block[i]);
    }
  for (int r = 0; r < rows; ++r) {
    int c = r < whole_rows ? whole_cols : 0;
    if (col == 1)
      for (; c < whole_cols; c += W) store<S>(out + r * pitch + c, load_as<S>(p + r * row + c));
    for (; c < cols; ++c) out[r * pitch + c] = to<S>(p[r * row + c * col]);
  }
}

template <class S, class T>
inline void store_matrix_as(T* p, int64_t row, int64_t col, int rows, int cols, const S* in, int64_t pitch) {
  constexpr int W = kLanes<S>;
  const int whole_rows = row == 1 && col != 1 ? rows / W * W : 0;
  const int whole_cols = col == 1 || whole_rows ? cols / W * W : 0;
  for (int r = 0; r < whole_rows; r += W)
    for (int c = 0; c < whole_cols; c += W) {
      Vec<S> block[W];
      for (int i = 0; i < W; ++i) block[i] = load<S>(in + (r + i) * pitch + c);
      transpose<S>(block);
      for (int i = 0; i < W; ++i) store_as<S>(p + r + (c + i) * col, block[i]);
    }
  for (int r = 0; r < rows; ++r) {
    int c = r < whole_rows ? whole_cols : 0;
    if (col == 1)
      for (; c < whole_cols; c += W) store_as<S>(p + r * row + c, load<S>(in + r * pitch + c));
    for (; c < cols; ++c) p[r * row + c * col] = from<T>(in[r * pitch + c]);
  }
}

}  // namespace layerzoo::LZ_ISA
