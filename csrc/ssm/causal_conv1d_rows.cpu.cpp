// Depthwise causal convolution, forward, where channels lie together: rows of channels are read and written from end to
// end, which memory likes best. Time is cut into blocks, since a step needs no more than the w - 1 rows before it.
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int kRows = 8;  // read at once
constexpr int kPitch =
    kConvRowChannels + 16;  // of a buffer's rows: a page apart they would share lines of the L1 cache

// The channels [c0, c0 + count) of one task, and its buffers: rows of kConvRowChannels values, zero beyond `count` up
// to whole vectors.
template <class S>
struct RowBlock {
  static constexpr int W = kLanes<S>, C = kConvRowChannels;
  const ConvArgs& a;
  int64_t b, c0, t0, t1;
  int count, padded;
  S *weight, *bias, *x;  // (w), one, (w - 1 + kRows): the rows before the first step, and those of kRows steps

  RowBlock(const ConvArgs& a, void* scratch, int64_t task) : a(a) {
    const int64_t chunks = (a.d + C - 1) / C, blocks = a.row_blocks();
    c0 = task % chunks * C;
    count = static_cast<int>(a.d - c0 < C ? a.d - c0 : C);
    padded = (count + W - 1) / W * W;
    b = task / chunks / blocks;
    t0 = task / chunks % blocks * kConvRowSteps;
    t1 = t0 + kConvRowSteps < a.l ? t0 + kConvRowSteps : a.l;
    weight = static_cast<S*>(scratch), bias = weight + a.w * kPitch, x = bias + kPitch;
    std::memset(weight, 0, (a.w + 1) * kPitch * sizeof(S));
    for (int64_t k = 0; k < a.w; ++k)
      for (int c = 0; c < count; ++c) weight[k * kPitch + c] = static_cast<const S*>(a.weight)[(c0 + c) * a.w + k];
    if (a.bias) std::memcpy(bias, static_cast<const S*>(a.bias) + c0, count * sizeof(S));
  }

  // Input of step t, which is before 0 the initial state or zero.
  void read(int64_t t, S* row) const {
    if (t < 0) {
      std::memset(row, 0, padded * sizeof(S));
      if (a.initial)
        LZ_DISPATCH_DTYPE(a.initial.dtype, T, {
          const T* p = static_cast<const T*>(a.initial.data) + a.initial.at(b, c0, t + a.w - 1);
          for (int c = 0; c < count; ++c) row[c] = to<S>(p[c * a.initial.channel]);
        })
      return;
    }
    LZ_DISPATCH_DTYPE(a.x.dtype, T, {
      const T* p = static_cast<const T*>(a.x.data) + a.x.at(b, c0, t);
      int c = 0;
      for (; c + W <= count; c += W) store<S>(row + c, load_as<S>(p + c));
      if (c < count) store<S>(row + c, Vec<S>{});
      for (; c < count; ++c) row[c] = to<S>(p[c]);
    })
  }
};

// N steps from t on together, which share the loaded weights, and whose activations overlap; the first has its taps
// from x on. Meanwhile memory fetches the rows that come kRows later. `kWidth` 0 means any.
template <class S, class T, int kWidth, int N>
inline void convolve(const RowBlock<S>& block, const S* x, int64_t t, T* out) {
  constexpr int W = kLanes<S>;
  const int64_t w = kWidth ? kWidth : block.a.w, stride = block.a.out.time;
  const int64_t size = block.a.x.dtype == DType::f64 ? 8 : block.a.x.dtype == DType::f32 ? 4 : 2;
  const char* next = static_cast<const char*>(block.a.x.data) + size * block.a.x.at(block.b, block.c0, t + kRows);
  out += block.a.out.at(block.b, block.c0, t);
  for (int c = 0; c < block.count; c += W) {
    Vec<S> sum[N], sig[N];
    for (int i = 0; i < N; ++i) {
      sum[i] = load<S>(block.bias + c);
      __builtin_prefetch(next + size * (i * block.a.x.time + c));
      __builtin_prefetch(out + (i + kRows) * stride + c, 1);
    }
    for (int64_t k = 0; k < w; ++k) {
      const Vec<S> weight = load<S>(block.weight + k * kPitch + c);
      for (int i = 0; i < N; ++i) sum[i] += weight * load<S>(x + (i + k) * kPitch + c);
    }
    if (block.a.silu) {
      for (int i = 0; i < N; ++i) sig[i] = sum[i];
      sigmoid<S, N>(sig);
      for (int i = 0; i < N; ++i) sum[i] *= sig[i];
    }
    if (c + W <= block.count)
      for (int i = 0; i < N; ++i) store_as<S>(out + i * stride + c, sum[i]);
    else
      for (int i = 0; i < N; ++i)
        for (int j = 0; c + j < block.count; ++j) out[i * stride + c + j] = from<T>(sum[i][j]);
  }
}

template <class S, class T, int N>
inline void convolve(const RowBlock<S>& block, const S* x, int64_t t, T* out) {
  switch (block.a.w) {
    case 2:
      return convolve<S, T, 2, N>(block, x, t, out);
    case 3:
      return convolve<S, T, 3, N>(block, x, t, out);
    case 4:
      return convolve<S, T, 4, N>(block, x, t, out);
    default:
      return convolve<S, T, 0, N>(block, x, t, out);
  }
}

// Streams the rows of one block.
template <class S, class T>
void conv_rows(const RowBlock<S>& block, T* out) {
  const ConvArgs& a = block.a;
  const int64_t halo = a.w - 1;
  for (int64_t i = 0; i < halo; ++i) block.read(block.t0 - halo + i, block.x + i * kPitch);
  for (int64_t t = block.t0; t < block.t1; t += kRows) {
    const int rows = static_cast<int>(block.t1 - t < kRows ? block.t1 - t : kRows);
    for (int i = 0; i < rows; ++i) block.read(t + i, block.x + (halo + i) * kPitch);
    for_each_row(rows, [&](int i, auto count) { convolve<S, T, count()>(block, block.x + i * kPitch, t + i, out); });
    std::memmove(block.x, block.x + rows * kPitch, halo * kPitch * sizeof(S));
  }
}

template <class S>
void conv_rows(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const RowBlock<S> block(a, scratch, task);
    LZ_DISPATCH_DTYPE(a.out.dtype, T, conv_rows<S>(block, static_cast<T*>(a.out.data)))
    if (block.t1 < a.l) continue;
    LZ_DISPATCH_DTYPE(a.final_state.dtype, T, {
      for (int64_t k = 0; k < a.w - 1; ++k) {
        T* p = static_cast<T*>(a.final_state.data) + a.final_state.at(block.b, block.c0, k);
        for (int c = 0; c < block.count; ++c) p[c * a.final_state.channel] = from<T>(block.x[k * kPitch + c]);
      }
    })
  }
}

}  // namespace

int64_t causal_conv1d_rows_scratch(const ConvArgs& a) { return (2 * a.w + kRows) * kPitch * (a.f64 ? 8 : 4); }

void causal_conv1d_rows(const ConvArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? conv_rows<double>(a, scratch, begin, end) : conv_rows<float>(a, scratch, begin, end);
}

}  // namespace layerzoo::LZ_ISA
