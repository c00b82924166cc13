// Matrices of any strides and element type, from and to rows of the kernel's own type.
#pragma once

#include "vec.h"

namespace layerzoo::LZ_ISA {

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
