// The experts of a mixture on the device. After sorting (sort.cuh) the rows of an expert lie together, and each product
// of rows with the matrices of their experts is done in tiles, which are numbered through all experts: a block finds
// the expert of a tile by a search among the tiles before each.
//
//   moe_up        the first matrix, rows of x picked as they are loaded (ScatterMoE; Tan et al., 2024), and the gate
//   moe_product   the second
//   moe_combine   the weighted sum of a token's rows, in the order of its pairs
//
// A sum is taken in one order whatever the tile and the grid, so that a token's result does not depend on the others.
// Matrix units are not used. Run in the emulator and compiled by nvcc; never measured on a GPU.
#pragma once

#include "gates.cuh"
#include "sort.cuh"

namespace layerzoo {

struct CudaExpertsArgs : ExpertsGradArgs {  // of Dispatch, `tokens` and `experts` alone
  CudaSort sort;
};

constexpr int kMoeThreads = 256, kMoeLanes = 16, kMoeCells = 4;  // a thread has R x 4 cells of a tile, 16 apart
constexpr int kMoeTile = kMoeLanes * kMoeCells;                  // columns of a tile, and rows unless there are few
constexpr int kMoeFew = kMoeLanes;
static_assert(kMoeLanes * kMoeLanes == kMoeThreads);

// Rows of a tile: few where experts have few rows, which then wait for their matrix and not for products.
inline int64_t moe_tile(int64_t pairs, int64_t experts) { return pairs <= kMoeFew * experts ? kMoeFew : kMoeTile; }

inline int64_t moe_tiles(int64_t size) { return (size + kMoeTile - 1) / kMoeTile; }

// At most so many tiles of rows, of all experts.
inline int64_t moe_row_tiles(const CudaSort& s) {
  return s.pairs / s.tile + (s.pairs < s.experts ? s.pairs : s.experts);
}

// ---- products ----

// A factor of a product: for each row or column of the result, its "side", `depth` numbers that are multiplied.
struct Factor {
  const void* data;
  DType dtype;
  int64_t base, side, depth;                          // where the first is, and strides
  const int32_t *sides = nullptr, *depths = nullptr;  // which ones of the data these are, if not all in order
};

// Rows from `first` on as sides; columns are the depth.
LZ_DEVICE Factor row_sides(const Rows& x, int64_t first) {
  return x.index ? Factor{x.data, x.dtype, 0, x.stride, 1, x.index + first, nullptr}
                 : Factor{x.data, x.dtype, first * x.stride, x.stride, 1};
}

// Columns as sides; rows from `first` on are the depth.
LZ_DEVICE Factor column_sides(const Rows& x, int64_t first) {
  return x.index ? Factor{x.data, x.dtype, 0, 1, x.stride, nullptr, x.index + first}
                 : Factor{x.data, x.dtype, first * x.stride, 1, x.stride};
}

// The outputs of an expert's matrix as sides, or its inputs.
LZ_DEVICE Factor matrix_sides(const Matrices& w, int64_t expert, bool outputs) {
  const bool rows = outputs != w.transposed;
  return {w.data, w.dtype, expert * w.expert, rows ? w.row : 1, rows ? 1 : w.row};
}

template <class S>
constexpr int kMoeDepth = 128 / sizeof(S);

template <class S, int kSides>
using MoeFill = S[kMoeDepth<S>][kSides + 1];  // an odd pitch: few lanes of a warp meet in a bank

// Sides [first, first + kSides) at depths [k0, ...); zero beyond `sides` and `depth`.
template <class S, int kSides>
LZ_DEVICE void fill(MoeFill<S, kSides>& tile, const Factor& f, int64_t first, int64_t sides, int64_t k0,
                    int64_t depth) {
  constexpr int kDepth = kMoeDepth<S>;
  const bool along = f.depth == 1;  // neighbours in depth lie beside each other
  LZ_DISPATCH_DTYPE(f.dtype, T, {
    LZ_UNROLL
    for (int n = threadIdx.x; n < kDepth * kSides; n += kMoeThreads) {
      const int k = along ? n % kDepth : n / kSides, side = along ? n / kDepth : n % kSides;
      S v = 0;
      if (first + side < sides && k0 + k < depth) {
        const int64_t i = f.sides ? f.sides[first + side] : first + side, j = f.depths ? f.depths[k0 + k] : k0 + k;
        v = static_cast<S>(widen(static_cast<const T*>(f.data)[f.base + i * f.side + j * f.depth]));
      }
      tile[k][side] = v;
    }
  })
}

// R x 4 cells of each of P results that share their rows.
template <class S, int R, int P>
struct MoeProduct {
  using Left = MoeFill<S, R * kMoeLanes>;
  using Right = MoeFill<S, kMoeTile>[P];
  using Cells = S[P][R][kMoeCells];

  Left& left_tile;
  Right& right_tiles;

  // cells[p][row][column] = sum over the depth of left(row) right[p](column). All threads of the block call it.
  LZ_DEVICE void multiply(const Factor& left, int64_t row0, int64_t rows, const Factor (&right)[P], int64_t column0,
                          int64_t columns, int64_t depth, Cells& cells) const {
    const int row = threadIdx.x / kMoeLanes, column = threadIdx.x % kMoeLanes;
    for (int64_t k0 = 0; k0 < depth; k0 += kMoeDepth<S>) {
      fill<S, R * kMoeLanes>(left_tile, left, row0, rows, k0, depth);
      LZ_UNROLL
      for (int p = 0; p < P; ++p) fill<S, kMoeTile>(right_tiles[p], right[p], column0, columns, k0, depth);
      __syncthreads();  // the tiles are full
      LZ_UNROLL
      for (int k = 0; k < kMoeDepth<S>; ++k) {
        S x[R];
        LZ_UNROLL
        for (int i = 0; i < R; ++i) x[i] = left_tile[k][row + i * kMoeLanes];
        LZ_UNROLL
        for (int p = 0; p < P; ++p) {
          LZ_UNROLL
          for (int j = 0; j < kMoeCells; ++j) {
            const S y = right_tiles[p][k][column + j * kMoeLanes];
            LZ_UNROLL
            for (int i = 0; i < R; ++i) cells[p][i][j] += x[i] * y;
          }
        }
      }
      __syncthreads();  // the tiles are read
    }
  }

  // f(i, j, row, column) for this thread's cells, in the tile.
  template <class F>
  LZ_DEVICE static void for_each_cell(const F& f) {
    LZ_UNROLL
    for (int i = 0; i < R; ++i) {
      LZ_UNROLL
      for (int j = 0; j < kMoeCells; ++j)
        f(i, j, threadIdx.x / kMoeLanes + i * kMoeLanes, threadIdx.x % kMoeLanes + j * kMoeLanes);
    }
  }
};

#define LZ_MOE_PRODUCT(name, S, R, P)                    \
  LZ_SHARED(left, typename MoeProduct<S, R, P>::Left);   \
  LZ_SHARED(right, typename MoeProduct<S, R, P>::Right); \
  const MoeProduct<S, R, P> name { left, right }

// Rows [first, first + count) of one expert, and columns from column0 on. Tiles of the same columns are neighbours:
// what they read of a matrix is read by all at about one time.
struct MoeTile {
  int64_t expert, first, count, column0;

  LZ_DEVICE MoeTile(const CudaSort& s, int64_t row_tiles, int64_t item) {
    const int64_t number = item % row_tiles;
    expert = count_less(s.experts + 1, number + 1, [&](int64_t e) { return int64_t(s.tiles[e]); }) - 1;
    first = s.offsets[expert] + (number - s.tiles[expert]) * s.tile;
    const int64_t left = s.offsets[expert + 1] - first;
    count = left < s.tile ? left : s.tile;
    column0 = item / row_tiles * kMoeTile;
  }
};

// f(tile) for a block's share of all tiles of rows, each with all columns.
template <class F>
LZ_DEVICE void for_each_tile(const CudaSort& s, int64_t columns, const F& f) {
  const int64_t row_tiles = s.tiles[s.experts], items = row_tiles * ((columns + kMoeTile - 1) / kMoeTile);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) f(MoeTile(s, row_tiles, item));
}

// ---- forward ----

LZ_DEVICE int64_t width(const ExpertsArgs& a) { return a.gated ? 2 * a.inner : a.inner; }

// Which output of the first matrix is the gate (part 0), or what it gates (part 1), of a column of the inner layer.
LZ_DEVICE int64_t output_of(const ExpertsArgs& a, int part, int64_t column) {
  return a.interleaved ? 2 * column + part : part * a.inner + column;
}

template <class S, int R, bool kGated>
LZ_KERNEL(kMoeThreads)
moe_up_kernel(const CudaExpertsArgs a) {
  constexpr int P = kGated ? 2 : 1;
  LZ_MOE_PRODUCT(product, S, R, P);
  Rows x = a.x;
  x.index = a.sort.token;
  for_each_tile(a.sort, a.inner, [&](const MoeTile& t) {
    Factor w[P];
    for (int p = 0; p < P; ++p) {
      w[p] = matrix_sides(a.w13, t.expert, true);
      w[p].base += output_of(a, p, 0) * w[p].side;
      if (a.interleaved) w[p].side *= 2;
    }
    S cells[P][R][kMoeCells] = {};
    product.multiply(row_sides(x, t.first), 0, t.count, w, t.column0, a.inner, a.outer, cells);
    const S* bias = a.b13 ? static_cast<const S*>(a.b13) + t.expert * width(a) : nullptr;
    product.for_each_cell([&](int i, int j, int row, int column) {
      const int64_t at = t.first + row, c = t.column0 + column;
      if (row >= t.count || c >= a.inner) return;
      S h[2] = {};
      for (int p = 0; p < P; ++p) {
        h[p] = bias ? cells[p][i][j] + bias[output_of(a, p, c)] : cells[p][i][j];
        if (a.hidden) static_cast<S*>(a.hidden)[at * width(a) + p * a.inner + c] = h[p];
      }
      static_cast<S*>(a.a)[at * a.inner + c] = gate<S>(a, h[0], h[1]).value;
    });
  });
}

struct MoeRowsProduct {  // y = x w + bias: x (rows, depth), y (rows, columns)
  CudaSort sort;
  const void* x;  // S
  Matrices w;
  bool by_outputs;  // columns are the outputs of w, or else its inputs
  int64_t depth, columns;
  const void* bias;  // S: (experts, columns), or null
  void* y;           // S
};

template <class S, int R>
LZ_KERNEL(kMoeThreads)
moe_product_kernel(const MoeRowsProduct a) {
  LZ_MOE_PRODUCT(product, S, R, 1);
  const Rows x{a.x, sizeof(S) == 8 ? DType::f64 : DType::f32, a.depth};
  for_each_tile(a.sort, a.columns, [&](const MoeTile& t) {
    const Factor w[1] = {matrix_sides(a.w, t.expert, a.by_outputs)};
    S cells[1][R][kMoeCells] = {};
    product.multiply(row_sides(x, t.first), 0, t.count, w, t.column0, a.columns, a.depth, cells);
    product.for_each_cell([&](int i, int j, int row, int column) {
      const int64_t c = t.column0 + column;
      if (row >= t.count || c >= a.columns) return;
      S v = cells[0][i][j];
      if (a.bias) v += static_cast<const S*>(a.bias)[t.expert * a.columns + c];
      static_cast<S*>(a.y)[(t.first + row) * a.columns + c] = v;
    });
  });
}

struct MoeCombine {
  CudaSort sort;
  const void *y, *weights;  // S: (rows, outer), (pairs) or null for 1
  void* out;                // (tokens, outer)
  DType dtype;
  int64_t outer;
};

template <class S>
LZ_KERNEL(kMoeThreads)
moe_combine_kernel(const MoeCombine a) {
  const CudaSort& s = a.sort;
  const int64_t numbers = s.tokens * a.outer, step = int64_t(gridDim.x) * kMoeThreads;
  for (int64_t n = int64_t(blockIdx.x) * kMoeThreads + threadIdx.x; n < numbers; n += step) {
    const int64_t token = n / a.outer, c = n % a.outer;
    const int64_t begin = s.token_begin ? s.token_begin[token] : token * s.k;
    const int64_t end = s.token_begin ? s.token_begin[token + 1] : begin + s.k;
    S sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = s.token_begin ? s.pairs_of_token[i] : i, row = s.row[pair];
      if (row < 0) continue;
      const S y = static_cast<const S*>(a.y)[row * a.outer + c];
      sum += a.weights ? static_cast<const S*>(a.weights)[pair] * y : y;
    }
    LZ_DISPATCH_DTYPE(a.dtype, T, narrow(sum, static_cast<T*>(a.out) + n))
  }
}

// ---- launches ----

template <class S>
void moe_product_launch(const MoeRowsProduct& a, int64_t max_blocks, LZ_STREAM stream) {
  const unsigned blocks = blocks_for(moe_row_tiles(a.sort) * moe_tiles(a.columns), max_blocks);
  if (a.sort.tile == kMoeFew)
    LZ_LAUNCH((moe_product_kernel<S, 1>), blocks, kMoeThreads, 0, stream, a);
  else
    LZ_LAUNCH((moe_product_kernel<S, kMoeCells>), blocks, kMoeThreads, 0, stream, a);
}

template <class S>
void moe_combine_launch(const MoeCombine& a, int64_t max_blocks, LZ_STREAM stream) {
  const int64_t numbers = a.sort.tokens * a.outer;
  LZ_LAUNCH(moe_combine_kernel<S>, blocks_for((numbers + kMoeThreads - 1) / kMoeThreads, max_blocks), kMoeThreads, 0,
            stream, a);
}

template <class S, int R>
void moe_up_launch(const CudaExpertsArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const unsigned blocks = blocks_for(moe_row_tiles(a.sort) * moe_tiles(a.inner), max_blocks);
  if (a.gated)
    LZ_LAUNCH((moe_up_kernel<S, R, true>), blocks, kMoeThreads, 0, stream, a);
  else
    LZ_LAUNCH((moe_up_kernel<S, R, false>), blocks, kMoeThreads, 0, stream, a);
}

template <class S>
void moe_experts_launch(const CudaExpertsArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  sort_launch(a.sort, max_blocks, stream);
  if (a.sort.tile == kMoeFew)
    moe_up_launch<S, 1>(a, max_blocks, stream);
  else
    moe_up_launch<S, kMoeCells>(a, max_blocks, stream);
  moe_product_launch<S>({a.sort, a.a, a.w2, true, a.inner, a.outer, a.b2, a.y}, max_blocks, stream);
  moe_combine_launch<S>({a.sort, a.y, a.weights, a.out, a.out_dtype, a.outer}, max_blocks, stream);
}

}  // namespace layerzoo
