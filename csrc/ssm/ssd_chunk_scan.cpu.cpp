// The scan of Mamba-2 (Dao and Gu, 2024), forward. Since a head has one decay, a chunk of steps is a few products of
// matrices: with the state before the chunk, with the inputs of the chunk, and the state after it.
#include "ssd.h"

namespace layerzoo::LZ_ISA {
namespace {

template <class S>
void load_plane(const Heads& x, const SsdArgs& a, int64_t b, int64_t t0, int64_t g, int steps, S* plane) {
  constexpr int P = kPitch<S>;
  std::memset(plane, 0, a.n * P * sizeof(S));
  LZ_DISPATCH_DTYPE(x.dtype, T, {
    const T* p = static_cast<const T*>(x.data) + x.at(b, t0, g);
    load_matrix_as<S>(p, x.lane, x.time, static_cast<int>(a.n), steps, plane, P);
  })
  if (const uint8_t* marks = marks_at(a, b, t0))
    for (int t = 0; t < steps; ++t)
      if (marks[t] == kPadding)
        for (int64_t i = 0; i < a.n; ++i) plane[i * P + t] = 0;
}

template <class S>
void pack_as(const SsdArgs& a, int64_t begin, int64_t end) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.chunks(), g = task / a.chunks() % a.g, b = task / a.chunks() / a.g;
    const int steps = a.steps(chunk);
    const Packed<S> packed(a, b, g, chunk);
    load_plane<S>(a.B, a, b, chunk * Q, g, steps, packed.B);
    load_plane<S>(a.C, a, b, chunk * Q, g, steps, packed.C);
    std::memset(packed.products, 0, Q * P * sizeof(S));
    for_each_block(0, steps, [&](int64_t t, auto rows) {
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
  S *x, *y, *weighted, *mixed, *state;  // of one panel; the state of all

  static int64_t count(const SsdArgs& a) {
    return 3 * Q * kPanel<S> + Q * kPitch<S> + panels_of(a.p, kPanel<S>) * a.n * kPanel<S>;
  }
  Scratch(const SsdArgs& a, void* memory) {
    Room<S> room{static_cast<S*>(memory)};
    for (S** panel : {&x, &y, &weighted}) *panel = room.take(Q * kPanel<S>);
    mixed = room.take(Q * kPitch<S>);
    state = room.take(panels_of(a.p, kPanel<S>) * a.n * kPanel<S>);
  }
};

template <class S>
void gate(const SsdArgs& a, int64_t b, int64_t t0, int64_t h, int64_t j, int steps, S* z, S* y) {
  constexpr int W = kLanes<S>;
  load_panel<S>(a.z, a, b, t0, h, j, steps, z);
  silu<S>(2 * steps, z);
  for (int i = 0; i < 2 * steps; ++i) store<S>(y + i * W, load<S>(y + i * W) * load<S>(z + i * W));
}

template <class S>
void scan_chunk(const SsdArgs& a, int64_t b, int64_t h, int64_t chunk, bool& zero, const Scratch<S>& scratch) {
  constexpr int V = kPanel<S>;
  const int64_t t0 = chunk * Q, panels = panels_of(a.p, V);
  const int count = a.steps(chunk);
  const uint8_t* marks = marks_at(a, b, t0);
  const Packed<S> packed(a, b, h / (a.h / a.g), chunk);
  Steps<S> steps;
  steps.load(a, b, h, t0, count, marks);
  for_each_sequence(marks, count, [&](int begin, int end, bool restart) {
    steps.decay(static_cast<const S*>(a.A)[h], begin, end);
    mix<S>(steps, packed.products, begin, end, scratch.mixed);
  });
  for (int64_t j = 0; j < panels; ++j) {
    S* state = scratch.state + j * a.n * V;
    Vec<S> D[2];
    load_D<S>(a, h, j, D);
    load_panel<S>(a.x, a, b, t0, h, j, count, scratch.x);
    for (int t = 0; t < count; ++t)
      for (int i = 0; i < V; i += kLanes<S>)
        store<S>(scratch.weighted + t * V + i, load<S>(scratch.x + t * V + i) * steps.weight[t]);
    bool from_zero = zero;
    for_each_sequence(marks, count, [&](int begin, int end, bool restart) {
      from_zero |= restart;
      read_out<S>(a, packed, steps, scratch.mixed, begin, end, scratch.x, from_zero ? nullptr : state, D, scratch.y);
      advance<S>(a, packed.B, begin, end, scratch.weighted, steps.from_start[end - 1], from_zero, state);
      from_zero = false;
    });
    if (a.z) gate<S>(a, b, t0, h, j, count, scratch.x, scratch.y);
    store_panel<S>(a.out, a, b, t0, h, j, count, scratch.y);
  }
  zero = false;
}

template <class S>
void scan(const SsdArgs& a, void* memory, int64_t begin, int64_t end) {
  const Scratch<S> scratch(a, memory);
  std::memset(memory, 0, Scratch<S>::count(a) * sizeof(S));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.h, h = task % a.h;
    bool zero = !a.initial;
    if (zero)
      std::memset(scratch.state, 0, panels_of(a.p, kPanel<S>) * a.n * kPanel<S> * sizeof(S));
    else
      load_state<S>(a, static_cast<const S*>(a.initial) + task * a.p * a.n, 1, a.n, scratch.state);
    for (int64_t chunk = 0; chunk < a.chunks(); ++chunk) {
      if (a.states) {
        S* kept = static_cast<S*>(a.states) + ((b * a.chunks() + chunk) * a.h + h) * a.n * a.p;
        store_state<S>(a, scratch.state, kept, a.p, 1);
      }
      scan_chunk<S>(a, b, h, chunk, zero, scratch);
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
