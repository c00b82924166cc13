// One step of the selective scan, in place on the state. Lanes are states, which lie together; what is one value a
// channel (dt, the gate) is done for kUnit channels at a time, so that it is not scalar either.
#include "../common/tile.h"
#include "kernels.h"

namespace layerzoo::LZ_ISA {
namespace {

constexpr int kUnit = 16;  // channels per task, whatever the lanes
constexpr int kTile = 64;  // states per pass

// `count` values of a row of any element type and stride, as S, zero up to whole vectors.
template <class S>
void load_row(const Operand& x, int64_t offset, int64_t count, S* row) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    const T* p = static_cast<const T*>(x.data) + offset;
    int64_t i = 0;
    if (x.time == 1)
      for (; i + kLanes<S> <= count; i += kLanes<S>) store<S>(row + i, load_as<S>(p + i));
    for (; i < count; ++i) row[i] = to<S>(p[i * x.time]);
  })
  for (int64_t i = count; i % kLanes<S> != 0; ++i) row[i] = 0;
}

template <class S>
void store_row(const Operand& x, int64_t offset, int64_t count, const S* row) {
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    T* p = static_cast<T*>(x.data) + offset;
    int64_t i = 0;
    if (x.time == 1)
      for (; i + kLanes<S> <= count; i += kLanes<S>) store_as<S>(p + i, load<S>(row + i));
    for (; i < count; ++i) p[i * x.time] = from<T>(row[i]);
  })
}

// Whether a row can be read and written where it lies.
template <class S>
bool plain(const Operand& x, int64_t count) {
  return x.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32) && x.time == 1 && count % kLanes<S> == 0;
}

// A row where it lies if it is plain, else a copy of it in `buffer`.
template <class S>
S* row_of(const Operand& x, int64_t offset, int64_t count, S* buffer) {
  if (plain<S>(x, count)) return static_cast<S*>(x.data) + offset;
  load_row<S>(x, offset, count, buffer);
  return buffer;
}

template <class S>
void update(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  constexpr int W = kLanes<S>;
  const int64_t units = (a.d + kUnit - 1) / kUnit;
  alignas(64) S dt[kUnit], dtx[kUnit], y[kUnit], z[W], A_[kTile], B_[kTile], C_[kTile], h_[kTile];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / units, d0 = task % units * kUnit;
    const int64_t channels = a.d - d0 < kUnit ? a.d - d0 : kUnit;
    const auto lanes = [&](int64_t i) { return static_cast<int>(channels - i < W ? channels - i : W); };
    const auto row = [&](const void* p, int64_t i) {
      return p ? load_lanes<S>(static_cast<const S*>(p) + d0 + i, lanes(i)) : Vec<S>{};
    };
    for (int64_t i = 0; i < channels; i += W) {
      load_tile<S>(a.dt, b, d0 + i, 0, lanes(i), 1, dt + i);
      load_tile<S>(a.x, b, d0 + i, 0, lanes(i), 1, dtx + i);
      const Vec<S> x = load<S>(dtx + i);
      Vec<S> step[1] = {load<S>(dt + i) + row(a.bias, i)};
      if (a.softplus) softplus<S, 1>(step);
      store<S>(dt + i, step[0]);
      store<S>(dtx + i, step[0] * x);
      store<S>(y + i, row(a.D, i) * x);
    }
    for (int64_t n0 = 0; n0 < a.n; n0 += kTile) {
      const int64_t n = a.n - n0 < kTile ? a.n - n0 : kTile;
      const S *B = row_of<S>(a.B, a.B.at(b, 0, n0), n, B_), *C = row_of<S>(a.C, a.C.at(b, 0, n0), n, C_);
      for (int64_t c = 0; c < channels; ++c) {
        const S* A = row_of<S>(a.A, a.A.at(0, d0 + c, n0), n, A_);
        S* h = row_of<S>(a.state, a.state.at(b, d0 + c, n0), n, h_);
        Vec<S> sum{};
        for (int64_t i = 0; i < n; i += W) {
          const Vec<S> decay = exp2<S>(load<S>(A + i) * (dt[c] * static_cast<S>(M_LOG2E)));
          const Vec<S> state = decay * load<S>(h + i) + load<S>(B + i) * dtx[c];
          sum += state * load<S>(C + i);
          store<S>(h + i, state);
        }
        y[c] += reduce_add<S>(sum);
        if (h == h_) store_row<S>(a.state, a.state.at(b, d0 + c, n0), n, h);
      }
    }
    for (int64_t i = 0; i < channels; i += W) {
      if (a.z) {
        load_tile<S>(a.z, b, d0 + i, 0, lanes(i), 1, z);
        silu<S>(1, z);
        store<S>(y + i, load<S>(y + i) * load<S>(z));
      }
      store_tile<S>(a.out, b, d0 + i, 0, lanes(i), 1, y + i);
    }
  }
}

}  // namespace

void selective_state_update(const StateUpdateArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? update<double>(a, begin, end) : update<float>(a, begin, end);
}

}  // namespace layerzoo::LZ_ISA
