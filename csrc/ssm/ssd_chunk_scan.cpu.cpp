// The scan of Mamba-2 (Dao and Gu, 2024), forward. Since a head has one decay, a chunk of steps is a few products of
// matrices: with the state before the chunk, with the inputs of the chunk, and the state after it.
#include "ssd.h"

namespace layerzoo::LZ_ISA {
namespace {

template <class S>
void load_plane(const SsdArgs& a, const Heads& x, const Spot& spot, S* plane) {
  constexpr int P = kPitch<S>;
  std::memset(plane, 0, a.n * P * sizeof(S));
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    const T* p = static_cast<const T*>(x.data) + x.at(spot.b, spot.t0, spot.h);
    load_matrix_as<S>(p, x.lane, x.time, static_cast<int>(a.n), spot.steps, plane, P);
  })
  for (int t = 0; spot.marks && t < spot.steps; ++t)
    for (int64_t i = 0; spot.padding(t) && i < a.n; ++i) plane[i * P + t] = 0;
}

template <class S>
void pack_as(const SsdArgs& a, int64_t begin, int64_t end) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.chunks(), g = task / a.chunks() % a.g, b = task / a.chunks() / a.g;
    const Spot spot = Spot::at(a, b, chunk, g);
    const Packed<S> packed(a, b, g, chunk);
    load_plane<S>(a, a.B, spot, packed.B);
    load_plane<S>(a, a.C, spot, packed.C);
    std::memset(packed.products, 0, Q * P * sizeof(S));
    for_each_block(0, spot.steps, [&](int64_t t, auto rows) {
      constexpr int R = rows();
      for (int64_t s = 0; s < t + R; s += V) {
        Vec<S> acc[R][2] = {};
        multiply<1, P, P>(acc, packed.C + t, packed.B + s, a.n);
        store_block<S, R>(packed.products + t * P + s, P, acc);
      }
    });
  }
}

template <class S>
struct Scratch {
  S *x, *y, *state;     // all panels of a head
  S *weighted, *mixed;  // one panel, one plane

  static int64_t count(const SsdArgs& a) {
    return panels_of(a.p, kPanel<S>) * (2 * Q + a.n) * kPanel<S> + Q * kPanel<S> + Q * kPitch<S>;
  }
  Scratch(const SsdArgs& a, void* memory) {
    const int64_t width = panels_of(a.p, kPanel<S>) * kPanel<S>;
    Room<S> room{static_cast<S*>(memory)};
    x = room.take(Q * width), y = room.take(Q * width), state = room.take(a.n * width);
    weighted = room.take(Q * kPanel<S>), mixed = room.take(Q * kPitch<S>);
  }
};

template <class S>
void scan_panel(const SsdArgs& a, const Spot& spot, const Packed<S>& packed, const Steps<S>& steps, int64_t j,
                bool zero, const Scratch<S>& scratch, Soon& soon) {
  constexpr int V = kPanel<S>;
  const S* x = scratch.x + j * Q * V;
  S* state = scratch.state + j * a.n * V;
  Vec<S> D[2];
  load_D<S>(a, spot.h, j, D);
  for (int t = 0; t < spot.steps; ++t)
    for (int i = 0; i < V; i += kLanes<S>)
      store<S>(scratch.weighted + t * V + i, load<S>(x + t * V + i) * steps.weight[t]);
  for_each_sequence(spot, [&](int begin, int end, bool restart) {
    const bool from_zero = zero || restart;
    read_out<S>(a, packed, steps, scratch.mixed, begin, end, x, from_zero ? nullptr : state, D, scratch.y + j * Q * V);
    advance<S>(a, packed.B, begin, end, scratch.weighted, steps.from_start[end - 1], from_zero, soon, state);
    zero = false;
  });
}

template <class S>
void scan_chunk(const SsdArgs& a, const Spot& spot, int64_t chunk, bool zero, const Scratch<S>& scratch) {
  constexpr int W = kLanes<S>;
  const int64_t panels = panels_of(a.p, kPanel<S>);
  const Packed<S> packed(a, spot.b, spot.h / (a.h / a.g), chunk);
  Soon soon;
  if (chunk + 1 < a.chunks()) soon = Soon(a, a.x, Spot::at(a, spot.b, chunk + 1, spot.h), panels * (a.n + 5) / 6);
  Steps<S> steps;
  steps.load(a, spot);
  for_each_sequence(spot, [&](int begin, int end, bool) {
    steps.decay(static_cast<const S*>(a.A)[spot.h], begin, end);
    mix<S>(steps, packed.products, begin, end, scratch.mixed);
  });
  load_head<S>(a, a.x, spot, scratch.x);
  for (int64_t j = 0; j < panels; ++j) scan_panel<S>(a, spot, packed, steps, j, zero, scratch, soon);
  if (a.z) {
    load_head<S>(a, a.z, spot, scratch.x);
    silu<S>(static_cast<int>(2 * Q * panels), scratch.x);
    for (int64_t i = 0; i < 2 * Q * panels * W; i += W)
      store<S>(scratch.y + i, load<S>(scratch.y + i) * load<S>(scratch.x + i));
  }
  store_head<S>(a, a.out, spot, scratch.y);
}

template <class S>
void scan(const SsdArgs& a, void* memory, int64_t begin, int64_t end) {
  const Scratch<S> scratch(a, memory);
  std::memset(memory, 0, Scratch<S>::count(a) * sizeof(S));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.h, h = task % a.h;
    std::memset(scratch.state, 0, panels_of(a.p, kPanel<S>) * a.n * kPanel<S> * sizeof(S));
    if (a.initial) load_state<S>(a, static_cast<const S*>(a.initial) + task * a.p * a.n, 1, a.n, scratch.state);
    for (int64_t chunk = 0; chunk < a.chunks(); ++chunk) {
      if (a.states) {
        S* kept = static_cast<S*>(a.states) + ((b * a.chunks() + chunk) * a.h + h) * a.n * a.p;
        store_state<S>(a, scratch.state, kept, a.p, 1);
      }
      scan_chunk<S>(a, Spot::at(a, b, chunk, h), chunk, chunk == 0 && !a.initial, scratch);
    }
    store_state<S>(a, scratch.state, static_cast<S*>(a.final_states) + task * a.p * a.n, 1, a.n);
  }
}

}  // namespace

int64_t ssd_packed_size(const SsdArgs& a) { return a.f64 ? Packed<double>::size(a) : Packed<float>::size(a); }

void ssd_pack(const SsdArgs& a, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? pack_as<double>(a, begin, end) : pack_as<float>(a, begin, end);
}

int64_t ssd_chunk_scan_scratch(const SsdArgs& a) {
  return a.f64 ? Scratch<double>::count(a) * 8 : Scratch<float>::count(a) * 4;
}

void ssd_chunk_scan(const SsdArgs& a, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? scan<double>(a, scratch, begin, end) : scan<float>(a, scratch, begin, end);
}

}  // namespace layerzoo::LZ_ISA
