// The experts of a mixture, backward. What the second matrix gave is not kept: the gradient of a pair's weight comes
// from that of the hidden layer, which is needed anyway (SonicMoE, 2025).
#include <algorithm>

#include "gates.h"
#include "products.h"

namespace layerzoo::LZ_ISA {
namespace {

template <class S>
constexpr DType kType = sizeof(S) == 8 ? DType::f64 : DType::f32;

Rows picked(Rows rows, const Dispatch& d) {
  rows.index = d.token;
  return rows;
}

template <class S>
Rows own(const void* data, int64_t stride) {
  return {data, kType<S>, stride};
}

template <class S>
void grad_hidden(const ExpertsGradArgs& a, S* scratch, int64_t begin, int64_t end) {
  constexpr int64_t C = kMoeInner;
  const int64_t block = block_rows(a.outer), width = a.width();
  const Rows grad_out = picked(a.grad_out, a);
  S* y = scratch + Product<S>::scratch(a.outer);
  for (int64_t number = begin; number < end; ++number) {
    const Task t = Task::at(a, number, C, a.inner);
    const int64_t columns = t.end - t.begin;
    Product<S> product(a.w2, t.expert, a.w2.transposed, a.outer, scratch);
    for (int64_t m0 = 0; m0 < t.count; m0 += block) {
      const int64_t rows = std::min(block, t.count - m0);
      product.load(grad_out, t.first + m0, rows);
      product.multiply(t.begin, columns, y, C);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t at = t.first + m0 + m;
        const S weight = static_cast<const S*>(a.weights)[a.pair[at]];
        const S* hidden = static_cast<const S*>(a.hidden) + at * width + t.begin;
        S g[C], u[C], out[C];
        std::memcpy(g, hidden, columns * sizeof(S));
        if (a.gated) std::memcpy(u, hidden + a.inner, columns * sizeof(S));
        const S* grad = y + m * C;
        with_activation(a.activation, [&](auto which) { gate_backward<S, which()>(a, columns, grad, g, u, out); });
        S part = 0;
        for (int64_t i = 0; i < columns; ++i) part += grad[i] * out[i];
        static_cast<S*>(a.parts)[at * a.inner_tasks() + t.begin / C] = part;
        S* to = static_cast<S*>(a.grad_hidden) + at * width;
        if (a.interleaved) {
          for (int64_t i = 0; i < columns; ++i)
            to[2 * (t.begin + i)] = weight * g[i], to[2 * (t.begin + i) + 1] = weight * u[i];
        } else {
          for (int64_t i = 0; i < columns; ++i) to[t.begin + i] = weight * g[i];
          for (int64_t i = 0; a.gated && i < columns; ++i) to[a.inner + t.begin + i] = weight * u[i];
        }
        S* weighted = static_cast<S*>(a.a) + at * a.inner + t.begin;
        for (int64_t i = 0; i < columns; ++i) weighted[i] = weight * out[i];
      }
    }
  }
}

template <class S>
void grad_x(const ExpertsGradArgs& a, S* scratch, int64_t begin, int64_t end) {
  const int64_t width = a.width(), block = block_rows(width);
  const Rows grad = own<S>(a.grad_hidden, width);
  for (int64_t number = begin; number < end; ++number) {
    const Task t = Task::at(a, number, kMoeOuter, a.outer);
    Product<S> product(a.w13, t.expert, a.w13.transposed, width, scratch);
    for (int64_t m0 = 0; m0 < t.count; m0 += block) {
      const int64_t rows = std::min(block, t.count - m0);
      product.load(grad, t.first + m0, rows);
      product.multiply(t.begin, t.end - t.begin, static_cast<S*>(a.y) + (t.first + m0) * a.outer + t.begin, a.outer);
    }
  }
}

// ---- gradients of the matrices ----

constexpr int kBlock = 6;

// Rows of the gradient that are worked on together: their factors stay in the second-level cache.
int64_t gradient_rows(const Dispatch& d) {
  constexpr int64_t kElements = 48 << 10;
  const int64_t rows = kElements / (d.largest + 1) / kBlock * kBlock;
  return std::clamp<int64_t>(rows, kBlock, kMoeGradient);
}

template <class S>
int64_t gradient_scratch(const Dispatch& d) {
  return d.largest * (gradient_rows(d) + kStrip<S>)+kPanelColumns<S>;
}

// Columns [begin, begin + columns) of rows, kStep of them in each of the panels [row][kStep], zero beyond.
template <class S, int kStep>
void pack_strips(const Rows& x, int64_t first, int64_t count, int64_t begin, int64_t columns, S* out) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    for (int64_t m = 0; m < count; ++m) {
      const T* p = static_cast<const T*>(x.data) + x.at(first + m) + begin;
      S* to = out + m * kStep;
      int64_t c = 0;
      for (; c + kStep <= columns; c += kStep, to += count * kStep)
        for (int i = 0; i < kStep; ++i) to[i] = LZ_ISA::to<S>(p[c + i]);
      for (int64_t i = 0; c < columns && i < kStep; ++i) to[i] = c + i < columns ? LZ_ISA::to<S>(p[c + i]) : S(0);
    }
  })
}

// The gradient of one matrix of a task's expert: the sum over its rows of the outer products of `left` and `right`.
template <class S, class T>
void outer_products(const ExpertsGradArgs& a, const Task& t, const Rows& left, const Rows& right, int64_t columns,
                    T* grad, int64_t stride, S* scratch) {
  constexpr int V = kPanelColumns<S>;
  if (t.count == 0) {
    for (int64_t r = t.begin; r < t.end; ++r)
      std::memset(static_cast<void*>(grad + r * stride), 0, columns * sizeof(T));
    return;
  }
  const int64_t most = gradient_rows(a);
  S *strips = scratch, *panels = strips + a.largest * most;
  for (int64_t r0 = t.begin; r0 < t.end; r0 += most) {
    const int64_t rows = std::min(most, t.end - r0);
    pack_strips<S, kBlock>(left, t.first, t.count, r0, rows, strips);
    for (int64_t strip = 0; strip < columns; strip += kStrip<S>) {
      const int64_t end = std::min(strip + kStrip<S>, columns);
      pack_strips<S, V>(right, t.first, t.count, strip, end - strip, panels);
      const S* panel = panels;
      for (int64_t c = strip; c < end; c += V, panel += t.count * V)
        for (int64_t r = 0; r < rows; r += kBlock) {
          Vec<S> acc[kBlock][2];
          multiply<S, kBlock>(acc, strips + r * t.count, 1, kBlock, panel, t.count);
          for (int64_t i = 0; i < kBlock && r + i < rows; ++i)
            store_some<S>(acc[i], end - c, grad + (r0 + r + i) * stride + c);
        }
    }
  }
}

template <class S>
void grad_matrix(const ExpertsGradArgs& a, const Matrices& grad, const Rows& left, int64_t rows, const Rows& right,
                 int64_t columns, S* scratch, int64_t begin, int64_t end) {
  Dispatch all = a;
  all.active = a.experts;
  for (int64_t number = begin; number < end; ++number) {
    const Task t = Task::at(all, number, kMoeGradient, rows);
    LZ_DISPATCH_DTYPE(grad.dtype, T,
                      outer_products<S>(a, t, left, right, columns, static_cast<T*>(grad.data) + t.expert * grad.expert,
                                        grad.row, scratch))
  }
}

// Of the biases and of the weights of the pairs; a task is an expert.
template <class S>
void grad_small(const ExpertsGradArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.width(), parts = a.inner_tasks();
  const S *b2 = static_cast<const S*>(a.b2), *weights = static_cast<const S*>(a.weights);
  for (int64_t e = begin; e < end; ++e) {
    S *b13 = static_cast<S*>(a.grad_b13), *grad_b2 = static_cast<S*>(a.grad_b2);
    if (b13) std::memset(b13 += e * width, 0, width * sizeof(S));
    if (grad_b2) std::memset(grad_b2 += e * a.outer, 0, a.outer * sizeof(S));
    for (int64_t row = a.offsets[e]; row < a.offsets[e + 1]; ++row) {
      if (b13) add(b13, static_cast<const S*>(a.grad_hidden) + row * width, width);
      S sum = 0;
      for (int64_t i = 0; i < parts; ++i) sum += static_cast<const S*>(a.parts)[row * parts + i];
      if (b2) {
        const S weight = weights[a.pair[row]];
        LZ_DISPATCH_DTYPE(a.grad_out.dtype, T, {
          const T* grad = static_cast<const T*>(a.grad_out.data) + a.token[row] * a.grad_out.stride;
          for (int64_t i = 0; i < a.outer; ++i) {
            const S g = to<S>(grad[i]);
            sum += g * b2[e * a.outer + i];
            if (grad_b2) grad_b2[i] += weight * g;
          }
        })
      }
      if (a.grad_weights) static_cast<S*>(a.grad_weights)[a.pair[row]] = sum;
    }
  }
}

template <class S>
int64_t backward_scratch(const ExpertsGradArgs& a) {
  const int64_t hidden = Product<S>::scratch(a.outer) + block_rows(a.outer) * kMoeInner;
  return static_cast<int64_t>(sizeof(S)) * std::max({hidden, Product<S>::scratch(a.width()), gradient_scratch<S>(a)});
}

template <class S>
void grad_w13(const ExpertsGradArgs& a, S* scratch, int64_t begin, int64_t end) {
  const Rows x = picked(a.x, a), hidden = own<S>(a.grad_hidden, a.width());
  if (a.grad_w13.transposed)
    grad_matrix<S>(a, a.grad_w13, x, a.outer, hidden, a.width(), scratch, begin, end);
  else
    grad_matrix<S>(a, a.grad_w13, hidden, a.width(), x, a.outer, scratch, begin, end);
}

template <class S>
void grad_w2(const ExpertsGradArgs& a, S* scratch, int64_t begin, int64_t end) {
  const Rows grad_out = picked(a.grad_out, a), hidden = own<S>(a.a, a.inner);
  if (a.grad_w2.transposed)
    grad_matrix<S>(a, a.grad_w2, hidden, a.inner, grad_out, a.outer, scratch, begin, end);
  else
    grad_matrix<S>(a, a.grad_w2, grad_out, a.outer, hidden, a.inner, scratch, begin, end);
}

}  // namespace

int64_t experts_backward_scratch(const ExpertsGradArgs& a) {
  return a.f64 ? backward_scratch<double>(a) : backward_scratch<float>(a);
}

#define LZ_BOTH(name)                                                                                               \
  void experts_##name(const ExpertsGradArgs& a, void* scratch, int64_t begin, int64_t end) {                        \
    a.f64 ? name(a, static_cast<double*>(scratch), begin, end) : name(a, static_cast<float*>(scratch), begin, end); \
  }
LZ_BOTH(grad_hidden)
LZ_BOTH(grad_x)
LZ_BOTH(grad_w13)
LZ_BOTH(grad_w2)
#undef LZ_BOTH

void experts_grad_small(const ExpertsGradArgs& a, int64_t begin, int64_t end) {
  a.f64 ? grad_small<double>(a, begin, end) : grad_small<float>(a, begin, end);
}

}  // namespace layerzoo::LZ_ISA
