// The experts of a mixture on the device, backward, after the same sorting as forward. As on the CPU, what the second
// matrix gave is not kept: the gradient of a pair's weight comes from that of the hidden layer (SonicMoE, 2025).
//
//   moe_grad_hidden    gradients of what the first matrix gave, and the weighted inner layer once more
//   moe_product        gradients of the rows of x, which moe_combine adds up
//   moe_outer          gradients of the matrices: one expert's rows against each other
//   moe_grad_weights   of the weights of the pairs
//   moe_grad_bias
#pragma once

#include "experts.cuh"

namespace layerzoo {

template <class S>
constexpr DType kMoeType = sizeof(S) == 8 ? DType::f64 : DType::f32;

template <class S>
LZ_DEVICE S load(const Rows& x, int64_t row, int64_t column) {
  S v = 0;
  const int64_t at = (x.index ? x.index[row] : row) * x.stride + column;
  LZ_DISPATCH_DTYPE(x.dtype, T, v = static_cast<S>(widen(static_cast<const T*>(x.data)[at])))
  return v;
}

template <class S, int R>
LZ_KERNEL(kMoeThreads)
moe_grad_hidden_kernel(const CudaExpertsArgs a) {
  LZ_MOE_PRODUCT(product, S, R, 1);
  const int64_t parts = (a.inner + kMoeTile - 1) / kMoeTile;
  Rows grad_out = a.grad_out;
  grad_out.index = a.sort.token;
  for_each_tile(a.sort, a.inner, [&](const MoeTile& t) {
    const Factor w[1] = {matrix_sides(a.w2, t.expert, false)};
    S cells[1][R][kMoeCells] = {}, sums[R] = {};
    product.multiply(row_sides(grad_out, t.first), 0, t.count, w, t.column0, a.inner, a.outer, cells);
    product.for_each_cell([&](int i, int j, int row, int column) {
      const int64_t at = t.first + row, c = t.column0 + column;
      if (row >= t.count || c >= a.inner) return;
      const S weight = static_cast<const S*>(a.weights)[a.sort.pair[at]], grad = cells[0][i][j];
      const S* hidden = static_cast<const S*>(a.hidden) + at * width(a) + c;
      S* grad_hidden = static_cast<S*>(a.grad_hidden) + at * width(a);
      const Gated<S> y = gate<S>(a, hidden[0], a.gated ? hidden[a.inner] : S(0));
      sums[i] += grad * y.value;
      static_cast<S*>(a.a)[at * a.inner + c] = weight * y.value;
      grad_hidden[output_of(a, 0, c)] = weight * grad * y.by_g;
      if (a.gated) grad_hidden[output_of(a, 1, c)] = weight * grad * y.by_u;
    });
    LZ_UNROLL
    for (int i = 0; i < R; ++i) {
      const int row = threadIdx.x / kMoeLanes + i * kMoeLanes;
      for (int d = kMoeLanes / 2; d > 0; d /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], d, kMoeLanes);
      if (threadIdx.x % kMoeLanes == 0 && row < t.count)
        static_cast<S*>(a.parts)[(t.first + row) * parts + t.column0 / kMoeTile] = sums[i];
    }
  });
}

struct MoeOuter {  // the gradient of a matrix (rows, columns) of each expert: the sum over its rows of left times right
  CudaSort sort;
  Rows left, right;
  int64_t rows, columns;
  Matrices grad;
};

template <class S>
LZ_KERNEL(kMoeThreads)
moe_outer_kernel(const MoeOuter a) {
  LZ_MOE_PRODUCT(product, S, kMoeCells, 1);
  const int64_t down = (a.rows + kMoeTile - 1) / kMoeTile, across = (a.columns + kMoeTile - 1) / kMoeTile;
  for (int64_t item = blockIdx.x; item < a.sort.experts * down * across; item += gridDim.x) {
    const int64_t expert = item / across / down, row0 = item / across % down * kMoeTile,
                  column0 = item % across * kMoeTile;
    const int64_t first = a.sort.offsets[expert], depth = a.sort.offsets[expert + 1] - first;
    const Factor right[1] = {column_sides(a.right, first)};
    S cells[1][kMoeCells][kMoeCells] = {};
    product.multiply(column_sides(a.left, first), row0, a.rows, right, column0, a.columns, depth, cells);
    product.for_each_cell([&](int i, int j, int row, int column) {
      const int64_t r = row0 + row, c = column0 + column, at = expert * a.grad.expert + r * a.grad.row + c;
      if (r >= a.rows || c >= a.columns) return;
      LZ_DISPATCH_DTYPE(a.grad.dtype, T, narrow(cells[0][i][j], static_cast<T*>(a.grad.data) + at))
    });
  }
}

// A warp takes a pair; `grad_weights` of what is dropped is zero.
template <class S>
LZ_KERNEL(kMoeThreads)
moe_grad_weights_kernel(const CudaExpertsArgs a) {
  const int64_t parts = (a.inner + kMoeTile - 1) / kMoeTile;
  const int lane = threadIdx.x % 32;
  Rows grad_out = a.grad_out;
  grad_out.index = a.sort.token;
  for (int64_t pair = (int64_t(blockIdx.x) * kMoeThreads + threadIdx.x) / 32; pair < a.sort.pairs;
       pair += int64_t(gridDim.x) * (kMoeThreads / 32)) {
    const int64_t row = a.sort.row[pair];
    S sum = 0;
    if (row >= 0) {
      for (int64_t i = lane; i < parts; i += 32) sum += static_cast<const S*>(a.parts)[row * parts + i];
      const S* bias = a.b2 ? static_cast<const S*>(a.b2) + a.sort.expert[pair] * a.outer : nullptr;
      for (int64_t c = lane; bias && c < a.outer; c += 32) sum += load<S>(grad_out, row, c) * bias[c];
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) static_cast<S*>(a.grad_weights)[pair] = sum;
  }
}

struct MoeBias {  // grad (experts, columns): the sum of an expert's rows, weighted or not
  CudaSort sort;
  Rows rows;
  const void* weights;  // S: (pairs), or null
  int64_t columns;
  void* grad;  // S
};

constexpr int kMoeWarps = kMoeThreads / 32;  // each sums every eighth row

template <class S>
LZ_KERNEL(kMoeThreads)
moe_grad_bias_kernel(const MoeBias a) {
  LZ_SHARED(sums, S[kMoeWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t across = (a.columns + 31) / 32;
  for (int64_t item = blockIdx.x; item < a.sort.experts * across; item += gridDim.x) {
    const int64_t expert = item / across, c = item % across * 32 + lane;
    S sum = 0;
    for (int64_t row = a.sort.offsets[expert] + warp; c < a.columns && row < a.sort.offsets[expert + 1];
         row += kMoeWarps) {
      const S v = load<S>(a.rows, row, c);
      sum += a.weights ? static_cast<const S*>(a.weights)[a.sort.pair[row]] * v : v;
    }
    sums[warp][lane] = sum;
    __syncthreads();  // every warp has its sum
    for (int w = 1; warp == 0 && w < kMoeWarps; ++w) sum += sums[w][lane];
    if (warp == 0 && c < a.columns) static_cast<S*>(a.grad)[expert * a.columns + c] = sum;
    __syncthreads();  // the sums are read
  }
}

// ---- launches ----

template <class S>
void moe_outer_launch(const CudaExpertsArgs& a, const Matrices& grad, const Rows& outputs, int64_t out,
                      const Rows& inputs, int64_t in, int64_t max_blocks, LZ_STREAM stream) {
  if (!grad) return;
  const MoeOuter outer = grad.transposed ? MoeOuter{a.sort, inputs, outputs, in, out, grad}
                                         : MoeOuter{a.sort, outputs, inputs, out, in, grad};
  const unsigned blocks = blocks_for(a.experts * moe_tiles(in) * moe_tiles(out), max_blocks);
  LZ_LAUNCH(moe_outer_kernel<S>, blocks, kMoeThreads, 0, stream, outer);
}

template <class S>
void moe_bias_launch(const MoeBias& a, int64_t max_blocks, LZ_STREAM stream) {
  if (a.grad)
    LZ_LAUNCH(moe_grad_bias_kernel<S>, blocks_for(a.sort.experts * ((a.columns + 31) / 32), max_blocks), kMoeThreads, 0,
              stream, a);
}

template <class S>
void moe_experts_backward_launch(const CudaExpertsArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const int64_t width = a.width();
  Rows x = a.x, grad_out = a.grad_out;
  x.index = grad_out.index = a.sort.token;
  const Rows grad_hidden{a.grad_hidden, kMoeType<S>, width}, inner{a.a, kMoeType<S>, a.inner};
  sort_launch(a.sort, max_blocks, stream);
  const unsigned blocks = blocks_for(moe_row_tiles(a.sort) * moe_tiles(a.inner), max_blocks);
  if (a.sort.tile == kMoeFew)
    LZ_LAUNCH((moe_grad_hidden_kernel<S, 1>), blocks, kMoeThreads, 0, stream, a);
  else
    LZ_LAUNCH((moe_grad_hidden_kernel<S, kMoeCells>), blocks, kMoeThreads, 0, stream, a);
  if (a.out) {  // the gradient of x
    moe_product_launch<S>({a.sort, a.grad_hidden, a.w13, false, width, a.outer, nullptr, a.y}, max_blocks, stream);
    moe_combine_launch<S>({a.sort, a.y, nullptr, a.out, a.out_dtype, a.outer}, max_blocks, stream);
  }
  moe_outer_launch<S>(a, a.grad_w13, grad_hidden, width, x, a.outer, max_blocks, stream);
  moe_outer_launch<S>(a, a.grad_w2, grad_out, a.outer, inner, a.inner, max_blocks, stream);
  if (a.grad_weights)
    LZ_LAUNCH(moe_grad_weights_kernel<S>, blocks_for((a.sort.pairs + kMoeWarps - 1) / kMoeWarps, max_blocks),
              kMoeThreads, 0, stream, a);
  moe_bias_launch<S>({a.sort, grad_hidden, nullptr, width, a.grad_b13}, max_blocks, stream);
  moe_bias_launch<S>({a.sort, grad_out, a.weights, a.outer, a.grad_b2}, max_blocks, stream);
}

}  // namespace layerzoo
