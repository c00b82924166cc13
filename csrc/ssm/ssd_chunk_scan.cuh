// The scan of Mamba-2 (Dao and Gu, 2024), forward and backward. Since a head has one decay, a chunk of 64 steps is a
// few products of matrices, each done in tiles of 64 x 64 through shared memory:
//
//   ssd_marks, ssd_steps        where sequences begin; step sizes, and the decays as sums of exponents
//   ssd_products                C_t B_s of a group
//   ssd_states, ssd_pass        what a chunk adds to the state; from chunk to chunk
//   ssd_output                  out, from the state before the chunk and the inputs in it
//
// and backward, after the same with the gradient of the state carried from the last chunk to the first:
//
//   ssd_grad_pairs              grad_y_t x_s: gradients of C_t B_s and of the decays within a chunk
//   ssd_grad_inputs             gradients of x, dt, z, and what a chunk adds to those of A, D and dt_bias
//   ssd_grad_coefficients       gradients of B and C
//
// A product passes over factors that are exactly zero: what lies in another sequence, in the future or in padding must
// not make NaN. No sum is a difference of two others (as on the CPU: where a decay is strong, only rounding would be
// left), and none depends on the grid. Matrix units are not used. Run in the emulator and compiled by nvcc; never
// measured on a GPU.
#pragma once

#include "../common/math.cuh"
#include "kernels.h"
#include "sum_parts.cuh"

namespace layerzoo {

struct CudaSsdArgs : SsdGradArgs {  // `marks`, `packed`, `unit` and `parts` unused; grad_... as well in the forward
  int64_t spots, spots_per_row;     // chunks of all rows, and of one
  Ids seq_idx;                      // (b, l), or none
  // Between the kernels; Q = kSsdChunk, S the type computed in:
  int32_t* first;  // (spots, Q): where the sequence of a step begins in the chunk; -1: before it
  uint8_t* live;   // (spots, Q): 0 for padding, and beyond the last step
  void *step, *slope, *sum,
      *rest;            // S: (spots, h, Q): dt, its derivative, the sum of dt A from `first` and its rounding
  void* products;       // S: (spots, g, Q, Q): C_t B_s
  void* grad_products;  // S: (spots, h, Q, Q)
  void* grad_decay;     // S: (spots, h, Q)
  Operand sum_A, sum_D, sum_bias;  // contiguous gradients of A, D and dt_bias; the last two may be none
};

constexpr int kSsdThreads = 256, kSsdLanes = 16, kSsdCells = 4;  // a thread has 4 x 4 cells of a tile, 16 apart
static_assert(kSsdLanes * kSsdCells == kSsdChunk && kSsdLanes * kSsdLanes == kSsdThreads);

template <class S>
LZ_DEVICE S load(const Heads& x, int64_t b, int64_t t, int64_t head, int64_t lane) {
  S v = 0;
  const int64_t at = b * x.batch + t * x.time + head * x.head + lane * x.lane;
  LZ_DISPATCH_DTYPE(x.dtype, T, v = static_cast<S>(widen(static_cast<const T*>(x.data)[at])))
  return v;
}

template <class S>
LZ_DEVICE void store(const Heads& x, int64_t b, int64_t t, int64_t head, int64_t lane, S v) {
  const int64_t at = b * x.batch + t * x.time + head * x.head + lane * x.lane;
  LZ_DISPATCH_DTYPE(x.dtype, T, narrow(v, static_cast<T*>(x.data) + at))
}

// ---- tiles ----

template <class S>
constexpr int kSsdDepth = 64 / sizeof(S);

template <class S>
using SsdTile = S[kSsdDepth<S>][kSsdChunk + 1];  // an odd pitch: few lanes of a warp meet in a bank

template <class S>
using SsdCells = S[kSsdCells][kSsdCells];

enum class Along { kDepth, kSide };  // in which direction an operand's elements lie together

struct SsdAt {  // row and column of cell [i][j] of this thread
  int i, j, row, column;
};

// f(at, cell) for this thread's cells of a tile.
template <class S, class F>
LZ_DEVICE void for_each_cell(SsdCells<S>& cells, const F& f) {
  const int row = threadIdx.x / kSsdLanes, column = threadIdx.x % kSsdLanes;
  LZ_UNROLL
  for (int i = 0; i < kSsdCells; ++i) {
    LZ_UNROLL
    for (int j = 0; j < kSsdCells; ++j) f(SsdAt{i, j, row + i * kSsdLanes, column + j * kSsdLanes}, cells[i][j]);
  }
}

template <class S>
struct SsdProduct {
  SsdTile<S>&left_tile, &right_tile;

  template <class F>
  LZ_DEVICE void fill(SsdTile<S>& tile, int64_t k0, int64_t depth, Along along, const F& element) const {
    constexpr int kDepth = kSsdDepth<S>;
    for (int n = threadIdx.x; n < kDepth * kSsdChunk; n += kSsdThreads) {
      const int k = along == Along::kDepth ? n % kDepth : n / kSsdChunk;
      const int side = along == Along::kDepth ? n / kDepth : n % kSsdChunk;
      tile[k][side] = k0 + k < depth ? element(k0 + k, side) : S(0);
    }
  }

  // cells[row][column] += sum over k < depth of left(k, row) right(k, column). All threads of the block call it.
  template <class L, class R>
  LZ_DEVICE void add(int64_t depth, Along along_left, const L& left, Along along_right, const R& right,
                     SsdCells<S>& cells) const {
    const int row = threadIdx.x / kSsdLanes, column = threadIdx.x % kSsdLanes;
    for (int64_t k0 = 0; k0 < depth; k0 += kSsdDepth<S>) {
      fill(left_tile, k0, depth, along_left, left);
      fill(right_tile, k0, depth, along_right, right);
      __syncthreads();  // both tiles are full
      LZ_UNROLL
      for (int k = 0; k < kSsdDepth<S>; ++k) {
        S y[kSsdCells];
        LZ_UNROLL
        for (int j = 0; j < kSsdCells; ++j) y[j] = right_tile[k][column + j * kSsdLanes];
        LZ_UNROLL
        for (int i = 0; i < kSsdCells; ++i) {
          const S x = left_tile[k][row + i * kSsdLanes];
          LZ_UNROLL
          for (int j = 0; j < kSsdCells; ++j)
            if (x != 0) cells[i][j] += x * y[j];
        }
      }
      __syncthreads();  // both tiles are read
    }
  }
};

// rows[row] += the sum of f(at, cell) over a tile's columns.
template <class S, class F>
LZ_DEVICE void add_rows(SsdCells<S>& cells, const F& f, S* rows) {
  S sums[kSsdCells] = {};
  for_each_cell<S>(cells, [&](SsdAt at, S v) { sums[at.i] += f(at, v); });
  LZ_UNROLL
  for (int i = 0; i < kSsdCells; ++i) {
    for (int d = kSsdLanes / 2; d > 0; d /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], d, kSsdLanes);
    if (threadIdx.x % kSsdLanes == 0) rows[threadIdx.x / kSsdLanes + i * kSsdLanes] += sums[i];
  }
}

// The sum over a block, for each of its threads.
template <class S>
LZ_DEVICE S block_sum(S v, S (&warps)[kSsdThreads / 32]) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();  // every warp has its sum
  S total = 0;
  for (int i = 0; i < kSsdThreads / 32; ++i) total += warps[i];
  __syncthreads();  // the sums are read
  return total;
}

// ---- a head in a chunk ----

template <class S>
struct SsdChunk {
  static constexpr int Q = kSsdChunk;
  const CudaSsdArgs& a;
  int64_t spot, b, t0, h, g;
  const int32_t* first;
  const uint8_t* live;
  const S *step, *slope, *sum, *rest;

  LZ_DEVICE SsdChunk(const CudaSsdArgs& a, int64_t spot, int64_t h)
      : a(a),
        spot(spot),
        b(spot / a.spots_per_row),
        t0(spot % a.spots_per_row * Q),
        h(h),
        g(h / (a.h / a.g)),
        first(a.first + spot * Q),
        live(a.live + spot * Q),
        step(of_head(a.step)),
        slope(of_head(a.slope)),
        sum(of_head(a.sum)),
        rest(of_head(a.rest)) {}

  LZ_DEVICE int64_t head_spot() const { return spot * a.h + h; }
  LZ_DEVICE const S* of_head(const void* p) const { return static_cast<const S*>(p) + head_spot() * Q; }
  LZ_DEVICE bool inside(int t) const { return t0 + t < a.l; }
  LZ_DEVICE S rate() const { return static_cast<const S*>(a.A)[h]; }

  // Zero where there is nothing; t and s are steps of the chunk.
  LZ_DEVICE S B(int t, int64_t n) const { return live[t] && n < a.n ? load<S>(a.B, b, t0 + t, g, n) : S(0); }
  LZ_DEVICE S C(int t, int64_t n) const { return live[t] && n < a.n ? load<S>(a.C, b, t0 + t, g, n) : S(0); }
  LZ_DEVICE S x(int t, int64_t p) const { return live[t] && p < a.p ? load<S>(a.x, b, t0 + t, h, p) : S(0); }
  LZ_DEVICE S z(int t, int64_t p) const { return live[t] && p < a.p ? load<S>(a.z, b, t0 + t, h, p) : S(0); }
  LZ_DEVICE S D(int64_t p) const {
    return !a.D || p >= a.p ? S(0) : static_cast<const S*>(a.D)[a.wide_D ? h * a.p + p : h];
  }
  LZ_DEVICE S grad_out(int t, int64_t p) const {
    return live[t] && p < a.p ? load<S>(a.grad_out, b, t0 + t, h, p) : S(0);
  }
  LZ_DEVICE S grad_y(int t, int64_t p) const {  // before the gate
    return a.z.data ? grad_out(t, p) * silu(z(t, p)) : grad_out(t, p);
  }

  // Of (spots, h, n, p): the state before the chunk, the gradient of that after it.
  LZ_DEVICE S* state_of(void* states) const { return static_cast<S*>(states) + head_spot() * a.n * a.p; }
  LZ_DEVICE S state(int64_t n, int64_t p) const { return n < a.n && p < a.p ? state_of(a.states)[n * a.p + p] : S(0); }
  LZ_DEVICE S carry(int64_t n, int64_t p) const { return n < a.n && p < a.p ? state_of(a.carries)[n * a.p + p] : S(0); }

  // Decays from the step s to t of one sequence, from before the chunk, to its end.
  LZ_DEVICE bool meet(int s, int t) const { return s <= t && s >= first[t]; }
  LZ_DEVICE S between(int s, int t) const { return exp((sum[t] - sum[s]) + (rest[t] - rest[s])); }
  LZ_DEVICE S from_start(int t) const { return first[t] < 0 ? exp(sum[t]) : S(0); }
  LZ_DEVICE S to_end(int s) const { return meet(s, Q - 1) ? between(s, Q - 1) : S(0); }
  LZ_DEVICE S product(int t, int s) const {
    return static_cast<const S*>(a.products)[((spot * a.g + g) * Q + t) * Q + s];
  }

  // cells += C h times the decay from before the chunk; rows are steps, columns channels from p0 on.
  LZ_DEVICE void read_state(const SsdProduct<S>& tiles, int64_t p0, SsdCells<S>& cells) const {
    tiles.add(
        a.n, Along::kDepth, [&](int64_t n, int t) { return first[t] < 0 ? C(t, n) * from_start(t) : S(0); },
        Along::kSide, [&](int64_t n, int column) { return state(n, p0 + column); }, cells);
  }
  // cells += sum over s of C_t B_s times the decay from s to t and dt_s x_s.
  LZ_DEVICE void read_inputs(const SsdProduct<S>& tiles, int64_t p0, SsdCells<S>& cells) const {
    tiles.add(
        Q, Along::kDepth,
        [&](int64_t s, int t) { return live[s] && meet(s, t) ? product(t, s) * between(s, t) * step[s] : S(0); },
        Along::kSide, [&](int64_t s, int column) { return x(s, p0 + column); }, cells);
  }
};

// ---- time ----

// Where sequences begin, as csrc/ssm/values.h has it: at an id other than the last one that is no padding.
LZ_KERNEL(kSsdChunk) ssd_marks_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(ids, int64_t[Q]);
  const int t = threadIdx.x;
  for (int64_t spot = blockIdx.x; spot < a.spots; spot += gridDim.x) {
    const int64_t b = spot / a.spots_per_row, t0 = spot % a.spots_per_row * Q;
    int64_t last = -1;  // the same in all threads
    for (int64_t begin = t0 - Q; a.seq_idx.data && begin >= 0 && last < 0; begin -= Q) {
      ids[t] = load_id(a.seq_idx, b, begin + t);
      __syncthreads();  // the ids of an earlier chunk are there
      for (int s = Q - 1; s >= 0 && last < 0; --s) last = ids[s];
      __syncthreads();  // they are read
    }
    ids[t] = t0 + t >= a.l ? -1 : a.seq_idx.data ? load_id(a.seq_idx, b, t0 + t) : 0;
    __syncthreads();  // the ids are there
    int first = -1;
    for (int s = 0; s <= t; ++s) {
      if (ids[s] < 0) continue;
      if (last >= 0 && ids[s] != last) first = s;
      last = ids[s];
    }
    a.first[spot * Q + t] = first;
    a.live[spot * Q + t] = ids[t] >= 0;
    __syncthreads();  // the ids are read
  }
}

// A thread has a head in a chunk.
template <class S>
LZ_KERNEL(kSsdThreads)
ssd_steps_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  // Far below the range of exp, where the decay is zero whatever the sum; it keeps A = -inf from making NaN.
  constexpr double kSteepest = -4096;
  const int64_t stride = int64_t(gridDim.x) * kSsdThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSsdThreads + threadIdx.x; i < a.spots * a.h; i += stride) {
    const SsdChunk<S> chunk(a, i / a.h, i % a.h);
    const S bias = a.bias ? static_cast<const S*>(a.bias)[chunk.h] : S(0);
    const S low = static_cast<S>(a.low), high = static_cast<S>(a.high);
    double exponent = 0;
    for (int t = 0; t < Q; ++t) {
      S dt = 0, slope = 0;
      if (chunk.live[t]) {
        const S given = load<S>(a.dt, chunk.b, chunk.t0 + t, chunk.h, 0) + bias;
        dt = a.softplus ? softplus(given) : given;
        slope = dt < low || dt > high ? S(0) : a.softplus ? sigmoid(given) : S(1);
        dt = dt < low ? low : dt > high ? high : dt;
      }
      const double step = dt == 0 ? 0 : static_cast<double>(dt) * static_cast<double>(chunk.rate());
      if (chunk.first[t] == t) exponent = 0;
      exponent += step < kSteepest ? kSteepest : step;
      const S sum = static_cast<S>(exponent);
      static_cast<S*>(a.step)[i * Q + t] = dt;
      static_cast<S*>(a.slope)[i * Q + t] = slope;
      static_cast<S*>(a.sum)[i * Q + t] = sum;
      static_cast<S*>(a.rest)[i * Q + t] = static_cast<S>(exponent - static_cast<double>(sum));
    }
  }
}

template <class S>
LZ_KERNEL(kSsdThreads)
ssd_products_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  for (int64_t item = blockIdx.x; item < a.spots * a.g; item += gridDim.x) {
    const SsdChunk<S> chunk(a, item / a.g, item % a.g * (a.h / a.g));
    SsdCells<S> cells = {};
    SsdProduct<S>{left, right}.add(
        a.n, Along::kDepth, [&](int64_t n, int t) { return chunk.C(t, n); }, Along::kDepth,
        [&](int64_t n, int s) { return chunk.B(s, n); }, cells);
    for_each_cell<S>(cells,
                     [&](SsdAt at, S v) { static_cast<S*>(a.products)[(item * Q + at.row) * Q + at.column] = v; });
  }
}

// ---- from chunk to chunk ----

// What a chunk adds to the state after it, or backward to the gradient of the state before it.
template <class S, bool kBackward>
LZ_KERNEL(kSsdThreads)
ssd_states_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  const int64_t n_tiles = (a.n + Q - 1) / Q, p_tiles = (a.p + Q - 1) / Q;
  for (int64_t item = blockIdx.x; item < a.spots * a.h * n_tiles * p_tiles; item += gridDim.x) {
    const int64_t head = item / p_tiles / n_tiles, n0 = item / p_tiles % n_tiles * Q, p0 = item % p_tiles * Q;
    const SsdChunk<S> chunk(a, head / a.h, head % a.h);
    SsdCells<S> cells = {};
    SsdProduct<S>{left, right}.add(
        Q, Along::kSide,
        [&](int64_t t, int row) {
          if (kBackward) return chunk.first[t] < 0 ? chunk.C(t, n0 + row) * chunk.from_start(t) : S(0);
          return chunk.meet(t, Q - 1) ? chunk.B(t, n0 + row) * chunk.to_end(t) * chunk.step[t] : S(0);
        },
        Along::kSide,
        [&](int64_t t, int column) { return kBackward ? chunk.grad_y(t, p0 + column) : chunk.x(t, p0 + column); },
        cells);
    S* to = chunk.state_of(kBackward ? a.carries : a.states);
    for_each_cell<S>(cells, [&](SsdAt at, S v) {
      if (n0 + at.row < a.n && p0 + at.column < a.p) to[(n0 + at.row) * a.p + p0 + at.column] = v;
    });
  }
}

// The states before each chunk from what each adds, in place; backward the gradients of the states after each. A
// thread has one number of a state.
template <class S, bool kBackward>
LZ_KERNEL(kSsdThreads)
ssd_pass_kernel(const CudaSsdArgs a) {
  const int64_t size = a.n * a.p, items = a.b * a.h * size, stride = int64_t(gridDim.x) * kSsdThreads;
  const void* begin = kBackward ? a.grad_final : a.initial;
  void* end = kBackward ? a.grad_initial : a.final_states;
  for (int64_t i = int64_t(blockIdx.x) * kSsdThreads + threadIdx.x; i < items; i += stride) {
    const int64_t b = i / size / a.h, h = i / size % a.h, n = i % size / a.p, p = i % a.p;
    const int64_t turned = ((b * a.h + h) * a.p + p) * a.n + n;  // in (b, h, p, n)
    S state = begin ? static_cast<const S*>(begin)[turned] : S(0);
    for (int64_t k = 0; k < a.spots_per_row; ++k) {
      const SsdChunk<S> chunk(a, b * a.spots_per_row + (kBackward ? a.spots_per_row - 1 - k : k), h);
      S* place = chunk.state_of(kBackward ? a.carries : a.states) + n * a.p + p;
      const S added = *place;
      *place = state;
      state = chunk.first[kSsdChunk - 1] < 0 ? chunk.from_start(kSsdChunk - 1) * state + added : added;
    }
    if (end) static_cast<S*>(end)[turned] = state;
  }
}

template <class S>
LZ_KERNEL(kSsdThreads)
ssd_output_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  const SsdProduct<S> tiles{left, right};
  const int64_t p_tiles = (a.p + Q - 1) / Q;
  for (int64_t item = blockIdx.x; item < a.spots * a.h * p_tiles; item += gridDim.x) {
    const int64_t head = item / p_tiles, p0 = item % p_tiles * Q;
    const SsdChunk<S> chunk(a, head / a.h, head % a.h);
    SsdCells<S> cells = {};
    chunk.read_state(tiles, p0, cells);
    chunk.read_inputs(tiles, p0, cells);
    for_each_cell<S>(cells, [&](SsdAt at, S v) {
      const int t = at.row;
      const int64_t p = p0 + at.column;
      if (!chunk.inside(t) || p >= a.p) return;
      const S y = a.D ? v + chunk.D(p) * chunk.x(t, p) : v;
      const S gated = a.z.data ? y * silu(chunk.z(t, p)) : y;
      store<S>(a.out, chunk.b, chunk.t0 + t, chunk.h, p, chunk.live[t] ? gated : S(0));
    });
  }
}

// ---- backward within a chunk ----

// From grad_y_t x_s: the gradient of C_t B_s for each head, and for each step r what its decay stands in, which are all
// pairs s < r <= t.
template <class S>
LZ_KERNEL(kSsdThreads)
ssd_grad_pairs_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  LZ_SHARED(pairs, S[Q][Q + 1]);
  const int thread = threadIdx.x;
  for (int64_t item = blockIdx.x; item < a.spots * a.h; item += gridDim.x) {
    const SsdChunk<S> chunk(a, item / a.h, item % a.h);
    SsdCells<S> cells = {};
    SsdProduct<S>{left, right}.add(
        a.p, Along::kDepth, [&](int64_t p, int t) { return chunk.grad_y(t, p); }, Along::kDepth,
        [&](int64_t p, int s) { return chunk.x(s, p); }, cells);
    for_each_cell<S>(cells, [&](SsdAt at, S v) {
      const int t = at.row, s = at.column;
      const bool counts = chunk.live[t] && chunk.live[s] && chunk.meet(s, t);
      const S grad = counts ? v * chunk.between(s, t) * chunk.step[s] : S(0);
      static_cast<S*>(a.grad_products)[(item * Q + t) * Q + s] = grad;
      pairs[t][s] = counts && s < t ? chunk.product(t, s) * grad : S(0);
    });
    __syncthreads();  // all pairs are there
    if (thread < Q) {
      // pairs[r][s] becomes the sum over t >= r.
      S sum = 0;
      for (int t = Q - 1; t >= 0; --t) pairs[t][thread] = sum += pairs[t][thread];
    }
    __syncthreads();  // columns are summed
    if (thread < Q) {
      S sum = 0;
      for (int s = 0; s < thread; ++s) sum += pairs[thread][s];
      static_cast<S*>(a.grad_decay)[item * Q + thread] = sum;
    }
  }
}

// Sums over the channels of a head, for each step of a chunk.
template <class S>
struct SsdRows {
  S* readout;  // grad_y_t C_t h, decayed: what stands in the decays from before the chunk to t
  S* into;     // dt_s x_s B_s carry, decayed: what stands in those from s to the end
  S* direct;   // of the gradient of dt_t x_t times x_t
};

// From the gradients of the decays and of dt x to those of dt, A and dt_bias; `across`: what stands in all decays of
// the chunk. For the threads of the first Q.
template <class S>
LZ_DEVICE void ssd_grad_step(const SsdChunk<S>& chunk, const SsdRows<S>& rows, S across, int t, S* grad_A,
                             S* grad_bias) {
  constexpr int Q = kSsdChunk;
  S decay = chunk.of_head(chunk.a.grad_decay)[t];
  for (int later = t; later < Q; ++later)
    if (chunk.first[t] < 0 && chunk.first[later] < 0) decay += rows.readout[later];
  for (int earlier = 0; earlier < t; ++earlier)
    if (chunk.meet(t, Q - 1) && chunk.meet(earlier, Q - 1)) decay += rows.into[earlier];
  decay += across;
  const bool live = chunk.live[t];
  const S grad = live ? (rows.direct[t] + chunk.rate() * decay) * chunk.slope[t] : S(0);
  if (chunk.inside(t)) store<S>(chunk.a.grad_dt, chunk.b, chunk.t0 + t, chunk.h, 0, grad);
  *grad_A = live ? decay * chunk.step[t] : S(0);
  *grad_bias = grad;
}

template <class S>
LZ_KERNEL(kSsdThreads)
ssd_grad_inputs_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  LZ_SHARED(rows, S[3][Q]);
  LZ_SHARED(warps, S[kSsdThreads / 32]);
  const SsdProduct<S> tiles{left, right};
  const SsdRows<S> sums{rows[0], rows[1], rows[2]};
  const int thread = threadIdx.x;
  for (int64_t item = blockIdx.x; item < a.spots * a.h; item += gridDim.x) {
    const SsdChunk<S> chunk(a, item / a.h, item % a.h);
    if (thread < Q) sums.readout[thread] = sums.into[thread] = sums.direct[thread] = 0;
    __syncthreads();  // sums are zero
    for (int64_t p0 = 0; p0 < a.p; p0 += Q) {
      SsdCells<S> x, grad_y, y = {}, grad = {};  // grad: of dt x
      for_each_cell<S>(x, [&](SsdAt at, S& v) { v = chunk.x(at.row, p0 + at.column); });
      for_each_cell<S>(grad_y, [&](SsdAt at, S& v) { v = chunk.grad_y(at.row, p0 + at.column); });
      chunk.read_state(tiles, p0, y);
      add_rows<S>(
          y, [&](SsdAt at, S v) { return chunk.first[at.row] < 0 ? v * grad_y[at.i][at.j] : S(0); }, sums.readout);
      if (a.z.data) {
        chunk.read_inputs(tiles, p0, y);
        for_each_cell<S>(y, [&](SsdAt at, S v) {
          const int64_t p = p0 + at.column;
          if (!chunk.inside(at.row) || p >= a.p) return;
          const S slope = chunk.grad_out(at.row, p) * silu_slope(chunk.z(at.row, p));
          const S whole = a.D ? v + chunk.D(p) * x[at.i][at.j] : v;
          store<S>(a.grad_z, chunk.b, chunk.t0 + at.row, chunk.h, p, chunk.live[at.row] ? slope * whole : S(0));
        });
      }
      tiles.add(
          a.n, Along::kDepth,
          [&](int64_t n, int s) { return chunk.meet(s, Q - 1) ? chunk.B(s, n) * chunk.to_end(s) : S(0); }, Along::kSide,
          [&](int64_t n, int column) { return chunk.carry(n, p0 + column); }, grad);
      add_rows<S>(
          grad, [&](SsdAt at, S v) { return chunk.live[at.row] ? v * chunk.step[at.row] * x[at.i][at.j] : S(0); },
          sums.into);
      tiles.add(
          Q, Along::kSide,
          [&](int64_t t, int s) {
            return chunk.live[s] && chunk.meet(s, t) ? chunk.product(t, s) * chunk.between(s, t) : S(0);
          },
          Along::kSide, [&](int64_t t, int column) { return chunk.grad_y(t, p0 + column); }, grad);
      add_rows<S>(grad, [&](SsdAt at, S v) { return chunk.live[at.row] ? v * x[at.i][at.j] : S(0); }, sums.direct);
      for_each_cell<S>(grad, [&](SsdAt at, S v) {
        const int64_t p = p0 + at.column;
        if (!chunk.inside(at.row) || p >= a.p) return;
        const S input = chunk.step[at.row] * v;
        const S whole = a.D ? input + chunk.D(p) * grad_y[at.i][at.j] : input;
        store<S>(a.grad_x, chunk.b, chunk.t0 + at.row, chunk.h, p, chunk.live[at.row] ? whole : S(0));
      });
    }

    S across = 0;  // state before the chunk times the gradient of the state after it
    if (chunk.first[Q - 1] < 0) {
      for (int64_t i = thread; i < a.n * a.p; i += kSsdThreads)
        across += chunk.state_of(a.carries)[i] * static_cast<const S*>(a.states)[item * a.n * a.p + i];
      across *= chunk.from_start(Q - 1);
    }
    across = block_sum<S>(across, warps);
    S grad_A = 0, grad_bias = 0, grad_D = 0;
    if (thread < Q) ssd_grad_step<S>(chunk, sums, across, thread, &grad_A, &grad_bias);
    for (int64_t p = thread; p < a.p; p += kSsdThreads) {
      S sum = 0;
      for (int t = 0; t < Q; ++t)
        if (chunk.live[t]) sum += chunk.x(t, p) * chunk.grad_y(t, p);
      if (a.wide_D) static_cast<S*>(a.grad_D)[item * a.p + p] = sum;
      grad_D += sum;
    }
    grad_A = block_sum<S>(grad_A, warps);
    grad_bias = block_sum<S>(grad_bias, warps);
    grad_D = block_sum<S>(grad_D, warps);
    if (thread == 0) {
      static_cast<S*>(a.grad_A)[item] = grad_A;
      static_cast<S*>(a.grad_bias)[item] = grad_bias;
      if (!a.wide_D) static_cast<S*>(a.grad_D)[item] = grad_D;
    }
  }
}

// The gradient of C, or that of B: from the states of all heads of a group, and from the products with the other one.
template <class S, bool kOfC>
LZ_KERNEL(kSsdThreads)
ssd_grad_coefficients_kernel(const CudaSsdArgs a) {
  constexpr int Q = kSsdChunk;
  LZ_SHARED(left, SsdTile<S>);
  LZ_SHARED(right, SsdTile<S>);
  const SsdProduct<S> tiles{left, right};
  const int64_t n_tiles = (a.n + Q - 1) / Q, heads = a.h / a.g;
  for (int64_t item = blockIdx.x; item < a.spots * a.g * n_tiles; item += gridDim.x) {
    const int64_t spot = item / n_tiles / a.g, h0 = item / n_tiles % a.g * heads, n0 = item % n_tiles * Q;
    SsdCells<S> cells = {};
    for (int64_t i = 0; i < heads; ++i) {
      const SsdChunk<S> chunk(a, spot, h0 + i);
      tiles.add(
          a.p, Along::kDepth,
          [&](int64_t p, int t) {
            if (kOfC) return chunk.first[t] < 0 ? chunk.grad_y(t, p) * chunk.from_start(t) : S(0);
            return chunk.meet(t, Q - 1) ? chunk.x(t, p) * chunk.to_end(t) * chunk.step[t] : S(0);
          },
          Along::kDepth,
          [&](int64_t p, int column) { return kOfC ? chunk.state(n0 + column, p) : chunk.carry(n0 + column, p); },
          cells);
    }
    const SsdChunk<S> chunk(a, spot, h0);
    const auto grad_product = [&](int64_t t, int64_t s) {
      S sum = 0;
      for (int64_t i = 0; i < heads; ++i)
        sum += static_cast<const S*>(a.grad_products)[((chunk.head_spot() + i) * Q + t) * Q + s];
      return sum;
    };
    if (kOfC)
      tiles.add(
          Q, Along::kDepth, [&](int64_t s, int t) { return grad_product(t, s); }, Along::kSide,
          [&](int64_t s, int column) { return chunk.B(s, n0 + column); }, cells);
    else
      tiles.add(
          Q, Along::kSide, [&](int64_t t, int s) { return grad_product(t, s); }, Along::kSide,
          [&](int64_t t, int column) { return chunk.C(t, n0 + column); }, cells);
    for_each_cell<S>(cells, [&](SsdAt at, S v) {
      const int t = at.row, column = at.column;
      if (chunk.inside(t) && n0 + column < a.n)
        store<S>(kOfC ? a.grad_C : a.grad_B, chunk.b, chunk.t0 + t, chunk.g, n0 + column, chunk.live[t] ? v : S(0));
    });
  }
}

// ---- launches ----

// What both passes begin with.
template <class S>
void ssd_prepare_launch(const CudaSsdArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const int64_t heads = a.spots * a.h;
  if (heads == 0) return;
  LZ_LAUNCH(ssd_marks_kernel, blocks_for(a.spots, max_blocks), kSsdChunk, 0, stream, a);
  LZ_LAUNCH(ssd_steps_kernel<S>, blocks_for((heads + kSsdThreads - 1) / kSsdThreads, max_blocks), kSsdThreads, 0,
            stream, a);
  LZ_LAUNCH(ssd_products_kernel<S>, blocks_for(a.spots * a.g, max_blocks), kSsdThreads, 0, stream, a);
}

template <class S, bool kBackward>
void ssd_pass_launch(const CudaSsdArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  const auto tiles = [](int64_t size) { return (size + kSsdChunk - 1) / kSsdChunk; };
  const int64_t items = a.spots * a.h * tiles(a.n) * tiles(a.p), numbers = a.b * a.h * a.n * a.p;
  if (items > 0) LZ_LAUNCH((ssd_states_kernel<S, kBackward>), blocks_for(items, max_blocks), kSsdThreads, 0, stream, a);
  if (numbers > 0)
    LZ_LAUNCH((ssd_pass_kernel<S, kBackward>), blocks_for((numbers + kSsdThreads - 1) / kSsdThreads, max_blocks),
              kSsdThreads, 0, stream, a);
}

template <class S>
void ssd_chunk_scan_launch(const CudaSsdArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  ssd_prepare_launch<S>(a, max_blocks, stream);
  ssd_pass_launch<S, false>(a, max_blocks, stream);
  const int64_t items = a.spots * a.h * ((a.p + kSsdChunk - 1) / kSsdChunk);
  if (items > 0) LZ_LAUNCH(ssd_output_kernel<S>, blocks_for(items, max_blocks), kSsdThreads, 0, stream, a);
}

template <class S>
void ssd_chunk_scan_backward_launch(const CudaSsdArgs& a, int64_t max_blocks, LZ_STREAM stream) {
  ssd_prepare_launch<S>(a, max_blocks, stream);
  ssd_pass_launch<S, true>(a, max_blocks, stream);
  const int64_t heads = a.spots * a.h, coefficients = a.spots * a.g * ((a.n + kSsdChunk - 1) / kSsdChunk);
  if (heads > 0) {
    LZ_LAUNCH(ssd_grad_pairs_kernel<S>, blocks_for(heads, max_blocks), kSsdThreads, 0, stream, a);
    LZ_LAUNCH(ssd_grad_inputs_kernel<S>, blocks_for(heads, max_blocks), kSsdThreads, 0, stream, a);
    const unsigned blocks = blocks_for(coefficients, max_blocks);
    LZ_LAUNCH((ssd_grad_coefficients_kernel<S, true>), blocks, kSsdThreads, 0, stream, a);
    LZ_LAUNCH((ssd_grad_coefficients_kernel<S, false>), blocks, kSsdThreads, 0, stream, a);
  }
  sum_parts<S>({a.spots, a.h, a.grad_A, a.sum_A}, max_blocks, stream);
  if (a.sum_D.data) sum_parts<S>({a.spots, a.wide_D ? a.h * a.p : a.h, a.grad_D, a.sum_D}, max_blocks, stream);
  if (a.sum_bias.data) sum_parts<S>({a.spots, a.h, a.grad_bias, a.sum_bias}, max_blocks, stream);
}

}  // namespace layerzoo
