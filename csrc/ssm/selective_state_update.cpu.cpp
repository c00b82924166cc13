// One step of the selective scan, in place on the state. Lanes are states, which lie together; what is one value a
// channel (dt, the gate, the decay where A is one number for all states) is done for kUnit channels at a time, so that
// it is not scalar either.
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int kUnit = kUpdateUnit;
constexpr int kTile = 256;    // states per pass
constexpr int kChannels = 4;  // swept together, as `for_each_row` has them: exp is a long chain of dependent operations
constexpr int kAhead = 2048;  // bytes: so far ahead the state is asked for, since the processor stops where a page ends

// `count` values of any element type, `stride` apart, as S; zero up to whole vectors.
template <class S>
void load_row(const Operand& x, int64_t offset, int64_t stride, int64_t count, S* row) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    const T* p = static_cast<const T*>(x.data) + offset;
    int64_t i = 0;
    if (stride == 1)
      for (; i + kLanes<S> <= count; i += kLanes<S>) store<S>(row + i, load_as<S>(p + i));
    else if (stride == 0)
      for (; i + kLanes<S> <= count; i += kLanes<S>) store<S>(row + i, splat<S>(to<S>(*p)));
    for (; i < count; ++i) row[i] = to<S>(p[i * stride]);
  })
  for (int64_t i = count; i % kLanes<S> != 0; ++i) row[i] = 0;
}

template <class S>
void store_row(const Operand& x, int64_t offset, int64_t stride, int64_t count, const S* row) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    T* p = static_cast<T*>(x.data) + offset;
    int64_t i = 0;
    if (stride == 1)
      for (; i + kLanes<S> <= count; i += kLanes<S>) store_as<S>(p + i, load<S>(row + i));
    for (; i < count; ++i) p[i * stride] = from<T>(row[i]);
  })
}

// States from `offset` on as S: where they lie, or in `buffer`.
template <class S>
const S* states_of(const Operand& x, int64_t offset, int64_t count, S* buffer) {
  if (x.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32) && x.time == 1 && count % kLanes<S> == 0)
    return static_cast<const S*>(x.data) + offset;
  load_row<S>(x, offset, x.time, count, buffer);
  return buffer;
}

// Lane i is the sum of row i of kLanes rows.
template <class S, int kSide = kLanes<S> / 2>
inline Vec<S> sum_rows(Vec<S> (&rows)[kLanes<S>]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) rows[i] = fold<kSide, S>(rows[i], rows[i + kSide]);
  if constexpr (kSide > 1)
    return sum_rows<S, kSide / 2>(rows);
  else
    return rows[0];
}

// What the states of R channels meet. `rate` is dt log2(e), or the decay itself where that is one for all of them.
template <class S, int R>
struct Channels {
  const S *A[R], *B, *C, *rate, *input;
};

// Moves n states on, a multiple of the lanes, of R channels; adds partial sums of C h.
template <class S, class T, int R, bool kOneDecay>
inline void advance(const Channels<S, R> c, int64_t n, T* h, int64_t stride, S* sums) {
  constexpr int W = kLanes<S>;
  Vec<S> sum[R], decay[R], input[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sum[r] = load<S>(sums + r * W);
    input[r] = splat<S>(c.input[r]);
    if (kOneDecay) decay[r] = splat<S>(c.rate[r]);
  }
  for (int64_t i = 0; i < n; i += W) {
    const Vec<S> B = load<S>(c.B + i), C = load<S>(c.C + i);
    if constexpr (!kOneDecay) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) decay[r] = load<S>(c.A[r] + i) * c.rate[r];
      exp2<S, R>(decay);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<S> state = decay[r] * load_as<S>(h + r * stride + i) + B * input[r];
      sum[r] += state * C;
      store_as<S>(h + r * stride + i, state);
      __builtin_prefetch(h + r * stride + i + kAhead / sizeof(T), 1);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store<S>(sums + r * W, sum[r]);
}

// The same for n states of any number, type and stride.
template <class S, int R, bool kOneDecay>
inline void advance(const Channels<S, R>& c, int64_t n, const Operand& state, int64_t offset, S* sums) {
  if (state.time == 1 && n % kLanes<S> == 0) {
    LZ_DISPATCH_DTYPE(
        state.dtype, T,
        return (advance<S, T, R, kOneDecay>(c, n, static_cast<T*>(state.data) + offset, state.channel, sums)))
  }
  alignas(64) S h[R * kTile];
  for (int r = 0; r < R; ++r) load_row<S>(state, offset + r * state.channel, state.time, n, h + r * kTile);
  advance<S, S, R, kOneDecay>(c, (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>, h, kTile, sums);
  for (int r = 0; r < R; ++r) store_row<S>(state, offset + r * state.channel, state.time, n, h + r * kTile);
}

// The channels of one task.
template <class S>
struct Unit {
  static constexpr int W = kLanes<S>;
  int64_t b, head, first, count, slot;
  alignas(64) S rate[kUnit], input[kUnit], y[kUnit], sums[kUnit * W];

  Unit(const StateUpdateArgs& a, int64_t task) {
    const int64_t units = (a.p + kUnit - 1) / kUnit, left = a.p - (first = task % units * kUnit);
    count = left < kUnit ? left : kUnit;
    head = task / units % a.h;
    b = task / units / a.h;
    slot = a.slots ? a.slots[b] : b;
  }

  int vectors() const { return static_cast<int>((count + W - 1) / W); }
  void row(const HeadOperand& x, S* values) const { load_row<S>(x, x.at(b, head, first, 0), x.channel, count, values); }
  void row_or_zero(const HeadOperand& x, S* values) const {
    if (x)
      row(x, values);
    else
      std::memset(values, 0, kUnit * sizeof(S));
  }

  // Step sizes, dt x, D x.
  template <bool kOneDecay>
  void prepare(const StateUpdateArgs& a) {
    alignas(64) S x[kUnit], bias[kUnit], A[kUnit];
    row(a.x, x);
    row(a.dt, rate);
    row_or_zero(a.bias, bias);
    row_or_zero(a.D, y);
    if (kOneDecay) row(a.A, A);
    for_each_row(vectors(), [&](int i, auto some) {
      Vec<S> dt[some()], values[some()];
      load_rows<S>(rate, i, dt);
      load_rows<S>(bias, i, values);
      for (int j = 0; j < some(); ++j) dt[j] += values[j];
      if (a.softplus) softplus<S, some()>(dt);
      load_rows<S>(x, i, values);
      for (int j = 0; j < some(); ++j) {
        const int at = (i + j) * W;
        store<S>(input + at, dt[j] * values[j]);
        store<S>(y + at, load<S>(y + at) * values[j]);
        dt[j] *= static_cast<S>(M_LOG2E);
        if (kOneDecay) dt[j] *= load<S>(A + at);
      }
      if (kOneDecay) exp2<S, some()>(dt);
      store_rows<S>(rate, i, dt);
    });
    std::memset(sums, 0, vectors() * W * W * sizeof(S));
  }

  // y += C h, with the state moved on.
  template <bool kOneDecay>
  void update(const StateUpdateArgs& a) {
    alignas(64) S A_[kChannels * kTile], B_[kTile], C_[kTile];
    const int64_t group = head / (a.h / a.g);
    for (int64_t n0 = 0; n0 < a.n; n0 += kTile) {
      const int64_t n = a.n - n0 < kTile ? a.n - n0 : kTile;
      const S *B = states_of<S>(a.B, a.B.at(b, group, 0, n0), n, B_),
              *C = states_of<S>(a.C, a.C.at(b, group, 0, n0), n, C_);
      for_each_row(static_cast<int>(count), [&](int i, auto some) {
        Channels<S, some()> channels{{}, B, C, rate + i, input + i};
        for (int r = 0; !kOneDecay && r < some(); ++r)
          channels.A[r] = states_of<S>(a.A, a.A.at(0, head, first + i + r, n0), n, A_ + r * kTile);
        advance<S, some(), kOneDecay>(channels, n, a.state, a.state.at(slot, head, first + i, n0), sums + i * W);
      });
    }
    for (int64_t i = 0; i < count; i += W) {
      Vec<S> rows[W];
      load_rows<S>(sums, static_cast<int>(i), rows);
      store<S>(y + i, load<S>(y + i) + sum_rows<S>(rows));
    }
  }

  void finish(const StateUpdateArgs& a) {
    if (a.z) {
      alignas(64) S z[kUnit];
      row(a.z, z);
      silu<S>(vectors(), z);
      for (int64_t i = 0; i < count; i += W) store<S>(y + i, load<S>(y + i) * load<S>(z + i));
    }
    write(a);
  }
  void write(const StateUpdateArgs& a) const {
    store_row<S>(a.out, a.out.at(b, head, first, 0), a.out.channel, count, y);
  }
};

template <class S, bool kOneDecay>
void update(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    Unit<S> unit(a, task);
    if (unit.slot < 0) {
      std::memset(unit.y, 0, sizeof unit.y);
      unit.write(a);
      continue;
    }
    unit.template prepare<kOneDecay>(a);
    unit.template update<kOneDecay>(a);
    unit.finish(a);
  }
}

template <class S>
void update(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  a.one_decay() ? update<S, true>(a, begin, end) : update<S, false>(a, begin, end);
}

}  // namespace

void selective_state_update(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? update<double>(a, begin, end) : update<float>(a, begin, end);
}

}  // namespace layerzoo::LZ_ISA
