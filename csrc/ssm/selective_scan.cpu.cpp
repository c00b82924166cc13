// The selective scan (Gu and Dao, 2023), forward and backward. Lanes are channels, time runs in registers: no
// horizontal sum in the forward pass, and one exp per (channel, step, state), which is three quarters of the work.
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int K = kScanChunk;
constexpr int kStates = 4;  // states swept together: that many independent chains hide the latency of a multiply-add

// Calls f(begin, end, restart, run) for every run of steps without a boundary, or the same from the last to the first.
template <class F>
inline void for_each_run(const uint8_t* marks, int steps, bool descending, const F& f) {
  if (!marks) return f(0, steps, false, 0);
  int begins[K], ends[K], runs = 0;
  for (int t = 0; t < steps; ++t) {
    if (marks[t] == kPadding) continue;
    if (t > 0 && marks[t] == kContinue && marks[t - 1] != kPadding) {
      ends[runs - 1] = t + 1;
    } else {
      begins[runs] = t;
      ends[runs++] = t + 1;
    }
  }
  for (int i = 0; i < runs; ++i) {
    const int r = descending ? runs - 1 - i : i;
    f(begins[r], ends[r], marks[begins[r]] == kRestart, r);
  }
}

template <class S>
inline void zero_padding(const uint8_t* marks, int steps, S* tile) {
  if (!marks) return;
  for (int t = 0; t < steps; ++t)
    if (marks[t] == kPadding) store<S>(tile + t * kLanes<S>, Vec<S>{});
}

// The lanes of one block of channels and what they read: shared by both passes.
template <class S>
struct Block {
  static constexpr int W = kLanes<S>;
  int64_t b, g, d0;
  int channels;
  const S *B, *C;  // this batch and group: (l, n); or lanes [n][W] where constant

  // (d, n) -> [n][W], zero beyond the channels.
  void gather(const void* rows, int64_t first, int64_t n, S scale, S* lanes) const {
    const S* p = static_cast<const S*>(rows) + first * n;
    for (int64_t i = 0; i < n; ++i)
      for (int c = 0; c < W; ++c) lanes[i * W + c] = c < channels ? p[c * n + i] * scale : S(0);
  }
  void scatter(const S* lanes, int64_t first, int64_t n, void* rows) const {
    S* p = static_cast<S*>(rows) + first * n;
    for (int64_t i = 0; i < n; ++i)
      for (int c = 0; c < channels; ++c) p[c * n + i] = lanes[i * W + c];
  }
};

// The tile that will be read after this one: of the next block, or of the first block in the next chunk.
struct Next {
  int64_t b = 0, d0 = 0, t0 = 0;
  int steps = 0;

  template <class S>
  static Next after(const ScanArgs& a, const Block<S>& block, int64_t index, int64_t blocks, int64_t chunk, int turn) {
    if (index + 1 < blocks) return {block.b, block.d0 + kLanes<S>, chunk * K, a.steps(chunk)};
    if (chunk + turn < 0 || chunk + turn >= a.chunks()) return {};
    return {block.b, block.d0 - index * kLanes<S>, (chunk + turn) * K, a.steps(chunk + turn)};
  }
  template <class S>
  Ahead tile(const Operand& x) const {
    return steps > 0 ? Ahead::tile<S>(x, b, d0, t0, steps) : Ahead{};
  }
};

template <class S>
inline Vec<S> lanes_or_zero(const void* row, int64_t d0, int channels) {
  return row ? load_lanes<S>(static_cast<const S*>(row) + d0, channels) : Vec<S>{};
}

// Largest magnitude among `count` vectors.
template <class S>
inline S largest_of(const S* lanes, int64_t count) {
  Vec<S> largest{};
  for (int64_t i = 0; i < count; ++i) {
    const Vec<S> x = load<S>(lanes + i * kLanes<S>), size = x < splat<S>(0) ? -x : x;
    largest = size > largest ? size : largest;
  }
  S most = 0;
  for (int i = 0; i < kLanes<S>; ++i) most = largest[i] > most ? largest[i] : most;
  return most;
}

// dt = softplus(delta + bias), in place; `slope`, where given, gets its derivative. Returns the largest |dt|.
template <class S>
inline S step_sizes(const ScanArgs& a, Vec<S> bias, int steps, S* tile, S* slope = nullptr) {
  for_each_row(steps, [&](int t, auto count) {
    Vec<S> x[count()], sig[count()];
    load_rows<S>(tile, t, x);
    for (int i = 0; i < count(); ++i) x[i] += bias;
    if (a.softplus) {
      if (slope) {
        softplus<S, count()>(x, sig);
        store_rows<S>(slope, t, sig);
      } else {
        softplus<S, count()>(x);
      }
    }
    store_rows<S>(tile, t, x);
  });
  if (slope && !a.softplus)
    for (int t = 0; t < steps; ++t) store<S>(slope + t * kLanes<S>, splat<S>(1));
  return largest_of<S>(tile, steps);
}

template <class S, bool kConstant, int G>
inline Vec<S> coefficient(const S* p, int t, int64_t n, int j) {
  if constexpr (kConstant) return load<S>(p + j * kLanes<S>);
  return splat<S>(p[t * n + j]);
}

// decays[t][j] = exp(dt[t] A[j]) for G states. A loop of its own: exp is a long chain, and only with nothing else
// between do enough of them fit into the processor's window to hide it.
template <class S, int G, bool kClamp>
inline void decay(const S* A, const S* dt, int begin, int end, const Ahead& ahead, S* decays) {
  constexpr int W = kLanes<S>;
  for (int t = begin; t < end; ++t) {
    ahead.fetch(t);
    const Vec<S> step = load<S>(dt + t * W);
    Vec<S> x[G];
    for (int j = 0; j < G; ++j) x[j] = step * load<S>(A + j * W);
    exp2<S, G, kClamp>(x);
    for (int j = 0; j < G; ++j) store<S>(decays + (t * G + j) * W, x[j]);
  }
}

// `steepest` is the largest |dt A|, in powers of two.
template <class S, int G>
inline void decay(const S* A, const S* dt, S steepest, int begin, int end, const Ahead& ahead, S* decays) {
  if (steepest < Exp2<S>::kHigh - 2)
    decay<S, G, false>(A, dt, begin, end, ahead, decays);
  else
    decay<S, G, true>(A, dt, begin, end, ahead, decays);
}

// h <- exp(dt A) h + dt u B, y += C h, for G states over the steps [begin, end).
template <class S, bool kConstB, bool kConstC, int G>
inline void advance(const S* decays, const S* B, const S* C, int64_t n, const S* dtu, int begin, int end, S* h, S* y) {
  constexpr int W = kLanes<S>;
  Vec<S> x[G];
  for (int j = 0; j < G; ++j) x[j] = load<S>(h + j * W);
  for (int t = begin; t < end; ++t) {
    const Vec<S> input = load<S>(dtu + t * W);
    Vec<S> sum = load<S>(y + t * W);
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) {
      x[j] = load<S>(decays + (t * G + j) * W) * x[j] + input * coefficient<S, kConstB, G>(B, t, n, j);
      sum += x[j] * coefficient<S, kConstC, G>(C, t, n, j);
    }
    store<S>(y + t * W, sum);
  }
  for (int j = 0; j < G; ++j) store<S>(h + j * W, x[j]);
}

// Calls f(first, integral_constant<G>) over the states in groups of kStates, then 2, then 1.
template <class F>
inline void for_each_state_group(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kStates <= n; i += kStates) f(i, std::integral_constant<int, kStates>{});
  for (; i + 2 <= n; i += 2) f(i, std::integral_constant<int, 2>{});
  for (; i < n; ++i) f(i, std::integral_constant<int, 1>{});
}

// What the forward pass of one task keeps: lanes [blocks][n][W].
template <class S>
struct Scratch {
  S *A, *B, *C, *h;  // B and C where constant

  static int64_t bytes(const ScanArgs& a) { return a.unit / kLanes<S> * 4 * a.n * kBytes; }
  Scratch(const ScanArgs& a, void* memory) {
    S* p = static_cast<S*>(memory);
    for (S** field : {&A, &B, &C, &h}) *field = p, p += a.unit * a.n;
  }
};

template <class S, bool kConstB, bool kConstC>
void scan_chunk(const ScanArgs& a, const Block<S>& block, int64_t index, int64_t chunk, const Next& next,
                const Scratch<S>& scratch) {
  constexpr int W = kLanes<S>;
  const int64_t n = a.n, b = block.b, d0 = block.d0, t0 = chunk * K;
  const int channels = block.channels;
  const int steps = a.steps(chunk);
  const uint8_t* marks = a.marks ? a.marks + b * a.l + t0 : nullptr;
  const Vec<S> bias = lanes_or_zero<S>(a.bias, d0, channels), D = lanes_or_zero<S>(a.D, d0, channels);
  S* h = scratch.h + index * n * W;
  if (a.states) {
    S* states = static_cast<S*>(a.states) + (b * a.chunks() + chunk) * n * a.d + d0;
    for (int64_t i = 0; i < n; ++i) store_lanes<S>(states + i * a.d, load<S>(h + i * W), channels);
  }

  alignas(64) S dt[K * W], dtu[K * W], y[K * W], decays[K * kStates * W];
  load_tile<S>(a.delta, b, d0, t0, channels, steps, dt);
  const S steepest = step_sizes<S>(a, bias, steps, dt) * largest_of<S>(scratch.A + index * n * W, n);
  load_tile<S>(a.u, b, d0, t0, channels, steps, dtu);
  for (int t = 0; t < steps; ++t) {
    const Vec<S> u = load<S>(dtu + t * W);
    store<S>(y + t * W, u * D);
    store<S>(dtu + t * W, u * load<S>(dt + t * W));
  }
  const Ahead ahead[] = {next.tile<S>(a.u), next.tile<S>(a.delta), next.tile<S>(a.z),
                         Ahead::tile<S>(a.out, b, d0, t0, steps)};
  for_each_run(marks, steps, false, [&](int begin, int end, bool restart, int) {
    if (restart) std::memset(h, 0, n * W * sizeof(S));
    for_each_state_group(n, [&](int64_t i, auto group) {
      const int64_t lanes = (index * n + i) * W;
      const S* B = kConstB ? scratch.B + lanes : block.B + t0 * n + i;
      const S* C = kConstC ? scratch.C + lanes : block.C + t0 * n + i;
      decay<S, group()>(scratch.A + lanes, dt, steepest, begin, end, ahead[i / kStates % 4], decays);
      advance<S, kConstB, kConstC, group()>(decays, B, C, n, dtu, begin, end, h + i * W, y);
    });
  });
  if (a.z) {
    load_tile<S>(a.z, b, d0, t0, channels, steps, dt);
    silu<S>(steps, dt);
    for (int t = 0; t < steps; ++t) store<S>(y + t * W, load<S>(y + t * W) * load<S>(dt + t * W));
  }
  zero_padding<S>(marks, steps, y);
  store_tile<S>(a.out, b, d0, t0, channels, steps, y);
}

// What the backward pass of one task keeps. Lanes as everywhere; `W` lanes of S are kBytes.
template <class S>
struct GradScratch {
  S *A, *B, *C, *carry, *grad_A, *grad_B, *grad_C;  // [blocks][n][W]; B, C and their gradients there where constant
  S *D, *bias;                                      // [blocks][W]
  S* sums;                                          // [n][K][W]: ChannelSums of each group of states, over the blocks

  static int64_t bytes(const ScanGradArgs& a) {
    const int64_t blocks = a.unit / kLanes<S>;
    return (blocks * (7 * a.n + 2) + K * a.n) * kBytes;
  }
  GradScratch(const ScanGradArgs& a, void* memory) {
    constexpr int W = kLanes<S>;
    const int64_t blocks = a.unit / W;
    S* p = static_cast<S*>(memory);
    for (S** field : {&A, &B, &C, &carry, &grad_A, &grad_B, &grad_C}) *field = p, p += blocks * a.n * W;
    for (S** field : {&D, &bias}) *field = p, p += blocks * W;
    sums = p;
  }
};

template <class S>
struct GradTiles {  // of one block and chunk, [K][W]
  alignas(64) S dt[K * kLanes<S>], dtu[K * kLanes<S>], grad_y[K * kLanes<S>], y[K * kLanes<S>];
  alignas(64) S lambda_B[K * kLanes<S>], lambda_hA[K * kLanes<S>];  // sums over n: gradients of dt u and (base 2) of dt
};

// The states of one group over one run again, from `h`: history[t] = the state before step t, history[end] the last
// one, and y where the gate needs it.
template <class S, bool kConstB, bool kConstC, bool kNeedY, int G>
inline void replay(const S* decays, const S* B, const S* C, int64_t n, int begin, int end, GradTiles<S>& tiles,
                   S* history, S* h) {
  constexpr int W = kLanes<S>;
  Vec<S> x[G];
  for (int j = 0; j < G; ++j) {
    x[j] = load<S>(h + j * W);
    store<S>(history + (begin * G + j) * W, x[j]);
  }
  for (int t = begin; t < end; ++t) {
    const Vec<S> input = load<S>(tiles.dtu + t * W);
    Vec<S> sum = load<S>(tiles.y + t * W);
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) {
      x[j] = load<S>(decays + (t * G + j) * W) * x[j] + input * coefficient<S, kConstB, G>(B, t, n, j);
      store<S>(history + ((t + 1) * G + j) * W, x[j]);
      if constexpr (kNeedY) sum += x[j] * coefficient<S, kConstC, G>(C, t, n, j);
    }
    if constexpr (kNeedY) store<S>(tiles.y + t * W, sum);
  }
  for (int j = 0; j < G; ++j) store<S>(h + j * W, x[j]);
}

// Gradients of B and C are sums over channels, so across lanes. For G states of one step, the products for B and C are
// folded together until one vector is left (or several, where there are more of them than lanes). What lanes are left
// for each value is summed when a chunk is done.
template <class S, bool kConstB, bool kConstC, int G>
struct ChannelSums {
  static constexpr int W = kLanes<S>;
  static constexpr bool kBoth = !kConstB && !kConstC, kAny = !kConstB || !kConstC;
  static constexpr int kSpan = kBoth ? W / 2 : W;                          // lanes of one tensor
  static constexpr int kVectors = kAny ? (G > kSpan ? G / kSpan : 1) : 0;  // left for each step
  static constexpr int kLeft = kSpan * kVectors / G;                       // lanes left for each value

  static Vec<S> pair(Vec<S> grad_B, Vec<S> grad_C) {
    if constexpr (kBoth) return fold<W / 2, S>(grad_B, grad_C);
    return kConstB ? grad_C : grad_B;
  }

  template <int kSide = kSpan / 2, int kCount = G>
  static void add(Vec<S> (&values)[G], S* sums) {
    if constexpr (kCount > kVectors) {
      for (int i = 0; i < kCount / 2; ++i) values[i] = fold<kSide, S>(values[i], values[i + kCount / 2]);
      add<kSide / 2, kCount / 2>(values, sums);
    } else {
      for (int i = 0; i < kVectors; ++i) store<S>(sums + i * W, load<S>(sums + i * W) + values[i]);
    }
  }

  // rows[t][j] = the sum of state j; sums are [steps][kVectors][W].
  static void finish(const S* sums, int64_t n, int steps, S* rows_B, S* rows_C) {
    for (int t = 0; t < steps; ++t)
      for (int j = 0; j < G; ++j)
        for (int tensor = 0; tensor < (kBoth ? 2 : 1); ++tensor) {
          const S* lanes = sums + (t * kVectors + j % kVectors) * W + tensor * kSpan + j / kVectors * kLeft;
          S sum = 0;
          for (int i = 0; i < kLeft; ++i) sum += lanes[i];
          (kConstB || tensor == 1 ? rows_C : rows_B)[t * n + j] = sum;
        }
  }
};

// The adjoint over the same run, last step first, from `carry`, which ends as the gradient of the state before the run.
template <class S, bool kConstB, bool kConstC, int G>
inline void adjoint(const S* A, const S* B, const S* C, int64_t n, int begin, int end, GradTiles<S>& tiles,
                    const S* history, const S* decays, const Ahead& ahead, S* carry_lanes, S* grad_A, S* grad_B,
                    S* grad_C, S* sums) {
  constexpr int W = kLanes<S>;
  using Sums = ChannelSums<S, kConstB, kConstC, G>;
  Vec<S> carry[G], sum_A[G], sum_B[G], sum_C[G];
  for (int j = 0; j < G; ++j) {
    carry[j] = load<S>(carry_lanes + j * W), sum_A[j] = load<S>(grad_A + j * W);
    if constexpr (kConstB) sum_B[j] = load<S>(grad_B + j * W);
    if constexpr (kConstC) sum_C[j] = load<S>(grad_C + j * W);
  }
  for (int t = end - 1; t >= begin; --t) {
    ahead.fetch(t);
    const Vec<S> step = load<S>(tiles.dt + t * W), input = load<S>(tiles.dtu + t * W);
    const Vec<S> grad_y = load<S>(tiles.grad_y + t * W);
    Vec<S> lambda_B = load<S>(tiles.lambda_B + t * W), lambda_hA = load<S>(tiles.lambda_hA + t * W), across[G];
#pragma GCC unroll 4
    for (int j = 0; j < G; ++j) {
      const Vec<S> b = coefficient<S, kConstB, G>(B, t, n, j), c = coefficient<S, kConstC, G>(C, t, n, j);
      const Vec<S> lambda = grad_y * c + carry[j];
      carry[j] = load<S>(decays + (t * G + j) * W) * lambda;
      const Vec<S> lambda_h = carry[j] * load<S>(history + (t * G + j) * W);
      lambda_B += lambda * b;
      lambda_hA += lambda_h * load<S>(A + j * W);
      sum_A[j] += lambda_h * step;
      const Vec<S> for_B = lambda * input, for_C = grad_y * load<S>(history + ((t + 1) * G + j) * W);
      if constexpr (kConstB) sum_B[j] += for_B;
      if constexpr (kConstC) sum_C[j] += for_C;
      if constexpr (Sums::kAny) across[j] = Sums::pair(for_B, for_C);
    }
    if constexpr (Sums::kAny) Sums::add(across, sums + t * Sums::kVectors * W);
    store<S>(tiles.lambda_B + t * W, lambda_B);
    store<S>(tiles.lambda_hA + t * W, lambda_hA);
  }
  for (int j = 0; j < G; ++j) {
    store<S>(carry_lanes + j * W, carry[j]), store<S>(grad_A + j * W, sum_A[j]);
    if constexpr (kConstB) store<S>(grad_B + j * W, sum_B[j]);
    if constexpr (kConstC) store<S>(grad_C + j * W, sum_C[j]);
  }
}

template <class S, bool kConstB, bool kConstC, bool kNeedY>
void grad_chunk(const ScanGradArgs& a, const Block<S>& block, int64_t index, int64_t chunk, const Next& next,
                const GradScratch<S>& scratch) {
  constexpr int W = kLanes<S>;
  const int64_t n = a.n, b = block.b, d0 = block.d0, t0 = chunk * K;
  const int channels = block.channels;
  const int steps = a.steps(chunk);
  const uint8_t* marks = a.marks ? a.marks + b * a.l + t0 : nullptr;
  const Vec<S> bias = lanes_or_zero<S>(a.bias, d0, channels), D = lanes_or_zero<S>(a.D, d0, channels);

  GradTiles<S> tiles;
  alignas(64) S u[K * W], slope[K * W], z[K * W], gate[K * W], decays[K * kStates * W];
  alignas(64) S history[2 * K * kStates * W];  // a row more than steps for every run
  load_tile<S>(a.u, b, d0, t0, channels, steps, u);
  load_tile<S>(a.delta, b, d0, t0, channels, steps, tiles.dt);
  load_tile<S>(a.grad_out, b, d0, t0, channels, steps, tiles.grad_y);
  zero_padding<S>(marks, steps, tiles.grad_y);
  const S steepest = step_sizes<S>(a, bias, steps, tiles.dt, slope) * largest_of<S>(scratch.A + index * n * W, n);
  if constexpr (kNeedY) {  // gate becomes grad_out silu'(z), grad_y becomes grad_out silu(z)
    load_tile<S>(a.z, b, d0, t0, channels, steps, z);
    std::memcpy(gate, tiles.grad_y, sizeof gate);
    silu_backward<S>(z, steps, gate, tiles.grad_y);
  }
  for (int t = 0; t < steps; ++t) {
    const Vec<S> x = load<S>(u + t * W);
    store<S>(tiles.dtu + t * W, x * load<S>(tiles.dt + t * W));
    store<S>(tiles.y + t * W, x * D);
    store<S>(tiles.lambda_B + t * W, Vec<S>{});
    store<S>(tiles.lambda_hA + t * W, Vec<S>{});
  }

  const S* states = static_cast<const S*>(a.states) + (b * a.chunks() + chunk) * n * a.d + d0;
  const Ahead reads[] = {next.tile<S>(a.u), next.tile<S>(a.delta), next.tile<S>(a.z), next.tile<S>(a.grad_out)};
  const Ahead writes[] = {Ahead::tile<S>(a.grad_u, b, d0, t0, steps), Ahead::tile<S>(a.grad_delta, b, d0, t0, steps),
                          Ahead::tile<S>(a.grad_z, b, d0, t0, steps), Ahead{}};
  for_each_state_group(n, [&](int64_t i, auto group) {
    constexpr int G = group();
    const int64_t lanes = (index * n + i) * W;
    const S* A = scratch.A + lanes;
    const S* B = kConstB ? scratch.B + lanes : block.B + t0 * n + i;
    const S* C = kConstC ? scratch.C + lanes : block.C + t0 * n + i;
    alignas(64) S h[G * W];
    for (int j = 0; j < G; ++j) store<S>(h + j * W, load_lanes<S>(states + (i + j) * a.d, channels));
    for_each_run(marks, steps, false, [&](int begin, int end, bool restart, int run) {
      if (restart) std::memset(h, 0, sizeof h);
      decay<S, G>(A, tiles.dt, steepest, begin, end, reads[i / kStates % 4], decays);
      replay<S, kConstB, kConstC, kNeedY, G>(decays, B, C, n, begin, end, tiles, history + run * G * W, h);
    });
    for_each_run(marks, steps, true, [&](int begin, int end, bool restart, int run) {
      adjoint<S, kConstB, kConstC, G>(A, B, C, n, begin, end, tiles, history + run * G * W, decays,
                                      writes[i / kStates % 4], scratch.carry + lanes, scratch.grad_A + lanes,
                                      scratch.grad_B + lanes, scratch.grad_C + lanes, scratch.sums + i * K * W);
      if (restart) std::memset(scratch.carry + lanes, 0, sizeof h);
    });
  });

  Vec<S> sum_D = load<S>(scratch.D + index * W), sum_bias = load<S>(scratch.bias + index * W);
  for (int t = 0; t < steps; ++t) {  // dt becomes the gradient of delta, dtu that of u, gate that of z
    if (marks && marks[t] == kPadding) {
      for (S* tile : {tiles.dt, tiles.dtu, gate}) store<S>(tile + t * W, Vec<S>{});
      continue;
    }
    const Vec<S> x = load<S>(u + t * W), grad_y = load<S>(tiles.grad_y + t * W);
    const Vec<S> lambda_B = load<S>(tiles.lambda_B + t * W);
    const Vec<S> grad_dt = x * lambda_B + load<S>(tiles.lambda_hA + t * W) * static_cast<S>(M_LN2);
    const Vec<S> grad_delta = grad_dt * load<S>(slope + t * W);
    store<S>(tiles.dtu + t * W, grad_y * D + load<S>(tiles.dt + t * W) * lambda_B);
    store<S>(tiles.dt + t * W, grad_delta);
    if constexpr (kNeedY) store<S>(gate + t * W, load<S>(gate + t * W) * load<S>(tiles.y + t * W));
    sum_D += grad_y * x;
    sum_bias += grad_delta;
  }
  store<S>(scratch.D + index * W, sum_D);
  store<S>(scratch.bias + index * W, sum_bias);
  store_tile<S>(a.grad_u, b, d0, t0, channels, steps, tiles.dtu);
  store_tile<S>(a.grad_delta, b, d0, t0, channels, steps, tiles.dt);
  if constexpr (kNeedY) store_tile<S>(a.grad_z, b, d0, t0, channels, steps, gate);
}

template <class S>
Block<S> block_at(const ScanArgs& a, int64_t task, int64_t index) {
  const int64_t units = a.units_per_group(), per_group = a.d / a.g;
  const int64_t unit = task % units, g = task / units % a.g, b = task / units / a.g;
  const int64_t first = unit * a.unit + index * kLanes<S>, left = per_group - first;
  const int64_t rows = (b * a.g + g) * a.l * a.n;
  return {b,
          g,
          g * per_group + first,
          static_cast<int>(left < kLanes<S> ? left : kLanes<S>),
          static_cast<const S*>(a.B) + rows,
          static_cast<const S*>(a.C) + rows};
}

template <class S>
int64_t block_count(const ScanArgs& a, int64_t task) {
  const int64_t left = a.d / a.g - task % a.units_per_group() * a.unit;
  return ((left < a.unit ? left : a.unit) + kLanes<S> - 1) / kLanes<S>;
}

// Chunks outside, blocks of lanes inside: what lies together in memory, whatever the layout, is then read together.
template <class S, bool kConstB, bool kConstC>
void scan(const ScanArgs& a, void* memory, int64_t begin, int64_t end) {
  const Scratch<S> scratch(a, memory);
  const int64_t n = a.n, lanes = n * kLanes<S>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t blocks = block_count<S>(a, task);
    for (int64_t index = 0; index < blocks; ++index) {
      const Block<S> block = block_at<S>(a, task, index);
      block.gather(a.A, block.d0, n, static_cast<S>(M_LOG2E), scratch.A + index * lanes);
      if constexpr (kConstB) block.gather(a.B, block.d0, n, S(1), scratch.B + index * lanes);
      if constexpr (kConstC) block.gather(a.C, block.d0, n, S(1), scratch.C + index * lanes);
      if (a.initial_state)
        block.gather(a.initial_state, block.b * a.d + block.d0, n, S(1), scratch.h + index * lanes);
      else
        std::memset(scratch.h + index * lanes, 0, lanes * sizeof(S));
    }
    for (int64_t chunk = 0; chunk < a.chunks(); ++chunk)
      for (int64_t index = 0; index < blocks; ++index) {
        const Block<S> block = block_at<S>(a, task, index);
        scan_chunk<S, kConstB, kConstC>(a, block, index, chunk, Next::after(a, block, index, blocks, chunk, 1),
                                        scratch);
      }
    for (int64_t index = 0; index < blocks; ++index) {
      const Block<S> block = block_at<S>(a, task, index);
      block.scatter(scratch.h + index * lanes, block.b * a.d + block.d0, n, a.last_state);
    }
  }
}

template <class S, bool kConstB, bool kConstC>
void scan_backward(const ScanGradArgs& a, void* memory, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>;
  const int64_t n = a.n;
  const GradScratch<S> scratch(a, memory);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t unit = task % a.units_per_group();
    const Block<S> first = block_at<S>(a, task, 0);
    std::memset(memory, 0, GradScratch<S>::bytes(a));
    const int64_t blocks = block_count<S>(a, task);
    for (int64_t index = 0; index < blocks; ++index) {
      const Block<S> block = block_at<S>(a, task, index);
      block.gather(a.A, block.d0, n, static_cast<S>(M_LOG2E), scratch.A + index * n * W);
      if constexpr (kConstB) block.gather(a.B, block.d0, n, S(1), scratch.B + index * n * W);
      if constexpr (kConstC) block.gather(a.C, block.d0, n, S(1), scratch.C + index * n * W);
      if (a.grad_last_state)
        block.gather(a.grad_last_state, block.b * a.d + block.d0, n, S(1), scratch.carry + index * n * W);
    }
    for (int64_t chunk = a.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t t0 = chunk * K;
      const int steps = a.steps(chunk);
      for_each_state_group(n, [&](int64_t i, auto group) {
        constexpr int vectors = ChannelSums<S, kConstB, kConstC, group()>::kVectors;
        std::memset(scratch.sums + i * K * W, 0, steps * vectors * W * sizeof(S));
      });
      for (int64_t index = 0; index < blocks; ++index) {
        const Block<S> block = block_at<S>(a, task, index);
        const Next next = Next::after(a, block, index, blocks, chunk, -1);
        if (a.z)
          grad_chunk<S, kConstB, kConstC, true>(a, block, index, chunk, next, scratch);
        else
          grad_chunk<S, kConstB, kConstC, false>(a, block, index, chunk, next, scratch);
      }
      const int64_t row = (((unit * a.b + first.b) * a.g + first.g) * a.l + t0) * n;
      for_each_state_group(n, [&](int64_t i, auto group) {
        using Sums = ChannelSums<S, kConstB, kConstC, group()>;
        if constexpr (Sums::kAny)
          Sums::finish(scratch.sums + i * K * W, n, steps, static_cast<S*>(a.grad_B) + row + i,
                       static_cast<S*>(a.grad_C) + row + i);
      });
    }
    for (int64_t index = 0; index < blocks; ++index) {
      const Block<S> block = block_at<S>(a, task, index);
      const int64_t row = block.b * a.d + block.d0, lanes = index * n * W;
      block.scatter(scratch.grad_A + lanes, row, n, a.grad_A);
      if constexpr (kConstB) block.scatter(scratch.grad_B + lanes, row, n, a.grad_B);
      if constexpr (kConstC) block.scatter(scratch.grad_C + lanes, row, n, a.grad_C);
      if (a.grad_initial_state) block.scatter(scratch.carry + lanes, row, n, a.grad_initial_state);
      if (a.grad_D) store_lanes<S>(static_cast<S*>(a.grad_D) + row, load<S>(scratch.D + index * W), block.channels);
      if (a.grad_bias)
        store_lanes<S>(static_cast<S*>(a.grad_bias) + row, load<S>(scratch.bias + index * W), block.channels);
    }
  }
}

template <class S>
void pack_as(const PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    S* rows = static_cast<S*>(a.packed) + i * a.l * a.n;
    LZ_DISPATCH_DTYPE(a.x.dtype, T, {
      const T* p = static_cast<const T*>(a.x.data) + i / a.g * a.x.batch + i % a.g * a.group;
      for (int64_t t = 0; t < a.l; ++t)
        for (int64_t j = 0; j < a.n; ++j) rows[t * a.n + j] = to<S>(p[j * a.x.channel + t * a.x.time]);
    })
  }
}

// The sum comes first, along the rows and into the first part, and only its result goes to where x wants it.
template <class S>
void unpack_as(const PackArgs& a, int64_t begin, int64_t end) {
  const int64_t part = a.b * a.g * a.l * a.n, chunks = a.chunks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i = task / chunks, first = task % chunks * K, steps = a.l - first < K ? a.l - first : K;
    S* rows = static_cast<S*>(a.packed) + (i * a.l + first) * a.n;
    for (int64_t k = 1; k < a.parts; ++k)
      for (int64_t j = 0; j < steps * a.n; ++j) rows[j] += rows[k * part + j];
    LZ_DISPATCH_DTYPE(a.x.dtype, T, {
      T* p = static_cast<T*>(a.x.data) + i / a.g * a.x.batch + i % a.g * a.group + first * a.x.time;
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t j = 0; j < a.n; ++j) p[j * a.x.channel + t * a.x.time] = from<T>(rows[t * a.n + j]);
    })
  }
}

template <class S>
void sum_as(const SumArgs& a, int64_t begin, int64_t end) {
  LZ_DISPATCH_DTYPE(a.out.dtype, T, {
    for (int64_t i = begin; i < end; ++i) {
      S sum = 0;
      for (int64_t k = 0; k < a.parts; ++k) sum += static_cast<const S*>(a.in)[k * a.size + i];
      static_cast<T*>(a.out.data)[i] = from<T>(sum);
    }
  })
}

}  // namespace

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  a.f64 ? pack_as<double>(a, begin, end) : pack_as<float>(a, begin, end);
}

void unpack(const PackArgs& a, int64_t begin, int64_t end) {
  a.f64 ? unpack_as<double>(a, begin, end) : unpack_as<float>(a, begin, end);
}

void sum(const SumArgs& a, int64_t begin, int64_t end) {
  a.f64 ? sum_as<double>(a, begin, end) : sum_as<float>(a, begin, end);
}

#define LZ_SCAN(f, S)                                                   \
  (a.constant_B ? (a.constant_C ? f<S, true, true> : f<S, true, false>) \
                : (a.constant_C ? f<S, false, true> : f<S, false, false>))

int64_t selective_scan_scratch(const ScanArgs& a) {
  return a.f64 ? Scratch<double>::bytes(a) : Scratch<float>::bytes(a);
}

void selective_scan(const ScanArgs& a, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  (a.f64 ? LZ_SCAN(scan, double) : LZ_SCAN(scan, float))(a, scratch, begin, end);
}

int64_t selective_scan_backward_scratch(const ScanGradArgs& a) {
  return a.f64 ? GradScratch<double>::bytes(a) : GradScratch<float>::bytes(a);
}

void selective_scan_backward(const ScanGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  (a.f64 ? LZ_SCAN(scan_backward, double) : LZ_SCAN(scan_backward, float))(a, scratch, begin, end);
}

}  // namespace layerzoo::LZ_ISA
