// The experts of a mixture, forward: every row through its expert's first matrix and gate, then through the second,
// then the weighted sum of a token's rows. A task is a range of columns for all rows of one expert, so that each matrix
// is read once and skewed loads are shared out too.
#include <algorithm>

#include "gates.h"
#include "products.h"

namespace layerzoo::LZ_ISA {
namespace {

template <class S>
void up(const ExpertsArgs& a, S* scratch, int64_t begin, int64_t end) {
  constexpr int64_t C = kMoeInner, kPitch = 2 * C + kLanes<S>;
  const int64_t block = block_rows(a.outer), width = a.width();
  S* y = scratch + Product<S>::scratch(a.outer);
  Rows x = a.x;
  x.index = a.token;
  for (int64_t number = begin; number < end; ++number) {
    const Task t = Task::at(a, number, C, a.inner);
    const int64_t columns = t.end - t.begin;
    Product<S> product(a.w13, t.expert, !a.w13.transposed, a.outer, scratch);
    const S* bias = a.b13 ? static_cast<const S*>(a.b13) + t.expert * width : nullptr;
    for (int64_t m0 = 0; m0 < t.count; m0 += block) {
      const int64_t rows = std::min(block, t.count - m0);
      product.load(x, t.first + m0, rows);
      if (a.interleaved) {
        product.multiply(2 * t.begin, 2 * columns, y, kPitch);
      } else {
        product.multiply(t.begin, columns, y, kPitch);
        if (a.gated) product.multiply(a.inner + t.begin, columns, y + C, kPitch);
      }
      for (int64_t m = 0; m < rows; ++m) {
        S *row = y + m * kPitch, *g = row, *u = row + C, apart[2 * C], out[C];
        if (a.interleaved) {
          if (bias) add(row, bias + 2 * t.begin, 2 * columns);
          for (int64_t i = 0; i < columns; ++i) apart[i] = row[2 * i], apart[C + i] = row[2 * i + 1];
          g = apart, u = apart + C;
        } else if (bias) {
          add(g, bias + t.begin, columns);
          if (a.gated) add(u, bias + a.inner + t.begin, columns);
        }
        const int64_t at = t.first + m0 + m;
        if (a.hidden) {
          S* hidden = static_cast<S*>(a.hidden) + at * width + t.begin;
          std::memcpy(hidden, g, columns * sizeof(S));
          if (a.gated) std::memcpy(hidden + a.inner, u, columns * sizeof(S));
        }
        with_activation(a.activation, [&](auto which) { gate<S, which()>(a, columns, g, u, out); });
        std::memcpy(static_cast<S*>(a.a) + at * a.inner + t.begin, out, columns * sizeof(S));
      }
    }
  }
}

template <class S>
void down(const ExpertsArgs& a, S* scratch, int64_t begin, int64_t end) {
  const int64_t block = block_rows(a.inner);
  const Rows x{a.a, sizeof(S) == 8 ? DType::f64 : DType::f32, a.inner};
  for (int64_t number = begin; number < end; ++number) {
    const Task t = Task::at(a, number, kMoeOuter, a.outer);
    Product<S> product(a.w2, t.expert, !a.w2.transposed, a.inner, scratch);
    for (int64_t m0 = 0; m0 < t.count; m0 += block) {
      const int64_t rows = std::min(block, t.count - m0);
      S* y = static_cast<S*>(a.y) + (t.first + m0) * a.outer + t.begin;
      product.load(x, t.first + m0, rows);
      product.multiply(t.begin, t.end - t.begin, y, a.outer);
      for (int64_t m = 0; a.b2 && m < rows; ++m)
        add(y + m * a.outer, static_cast<const S*>(a.b2) + t.expert * a.outer + t.begin, t.end - t.begin);
    }
  }
}

template <class S, class T>
void combine(const ExpertsArgs& a, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>, N = 4;
  const S* weights = static_cast<const S*>(a.weights);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t *first = a.row_of + a.token_offsets[t], *last = a.row_of + a.token_offsets[t + 1];
    T* out = static_cast<T*>(a.out) + t * a.outer;
    const auto weight = [&](int32_t row) { return weights ? weights[a.pair[row]] : S(1); };
    int64_t c = 0;
    for (; c + N * W <= a.outer; c += N * W) {
      Vec<S> sum[N] = {};
      for (const int32_t* row = first; row < last; ++row)
        for (int i = 0; i < N; ++i)
          sum[i] += splat<S>(weight(*row)) * load<S>(static_cast<const S*>(a.y) + *row * a.outer + c + i * W);
      for (int i = 0; i < N; ++i) store_as<S>(out + c + i * W, sum[i]);
    }
    for (; c < a.outer; ++c) {
      S sum = 0;
      for (const int32_t* row = first; row < last; ++row)
        sum += weight(*row) * static_cast<const S*>(a.y)[*row * a.outer + c];
      out[c] = from<T>(sum);
    }
  }
}

template <class S>
int64_t forward_scratch(const ExpertsArgs& a) {
  const int64_t hidden = Product<S>::scratch(a.outer) + block_rows(a.outer) * (2 * kMoeInner + kLanes<S>);
  return static_cast<int64_t>(sizeof(S)) * std::max(hidden, Product<S>::scratch(a.inner));
}

}  // namespace

int64_t experts_scratch(const ExpertsArgs& a) { return a.f64 ? forward_scratch<double>(a) : forward_scratch<float>(a); }

void experts_up(const ExpertsArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? up(a, static_cast<double*>(scratch), begin, end) : up(a, static_cast<float*>(scratch), begin, end);
}

void experts_down(const ExpertsArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.f64 ? down(a, static_cast<double*>(scratch), begin, end) : down(a, static_cast<float*>(scratch), begin, end);
}

void experts_combine(const ExpertsArgs& a, int64_t begin, int64_t end) {
  if (a.f64) return combine<double, double>(a, begin, end);
  LZ_DISPATCH_DTYPE(a.out_dtype, T, combine<float, T>(a, begin, end))
}

}  // namespace layerzoo::LZ_ISA
