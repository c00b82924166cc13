// The scan of Mamba-2, backward. First the gradient of the state is carried from the last chunk to the first; then each
// chunk, which has the state before it and the gradient after it, is a task without regard to any other.
#include "ssd.h"

namespace layerzoo::LZ_ISA {
namespace {

// One head's state in (b, chunks, h, n, p).
template <class S>
S* state_at(const SsdArgs& a, void* states, int64_t b, int64_t chunk, int64_t h) {
  return static_cast<S*>(states) + ((b * a.chunks() + chunk) * a.h + h) * a.n * a.p;
}

// The gradient of y over a chunk. With a gate, `slope` becomes that of out by z, times grad_out.
template <class S>
void load_grad_y(const SsdGradArgs& a, const Spot& spot, S* z, S* slope, S* grad_y) {
  constexpr int W = kLanes<S>;
  load_head<S>(a, a.grad_out, spot, grad_y);
  if (!a.z) return;
  const int64_t rows = 2 * Q * panels_of(a.p, kPanel<S>);
  std::memcpy(slope, grad_y, rows * W * sizeof(S));
  load_head<S>(a, a.z, spot, z);
  silu_backward<S>(z, static_cast<int>(rows), slope, grad_y);
}

// ---- from chunk to chunk ----

template <class S>
struct CarryScratch {
  S *grad_y, *z, *slope, *carry;

  static int64_t count(const SsdArgs& a) { return panels_of(a.p, kPanel<S>) * kPanel<S> * (3 * Q + a.n); }
  CarryScratch(const SsdArgs& a, void* memory) {
    const int64_t width = panels_of(a.p, kPanel<S>) * kPanel<S>;
    Room<S> room{static_cast<S*>(memory)};
    for (S** head : {&grad_y, &z, &slope}) *head = room.take(Q * width);
    carry = room.take(a.n * width);
  }
};

// The gradient of the state before a chunk from that of the state after it: only its first sequence comes from there.
template <class S>
void carry_over(const SsdGradArgs& a, const Spot& spot, int64_t chunk, const CarryScratch<S>& scratch) {
  constexpr int V = kPanel<S>;
  const int64_t panels = panels_of(a.p, V);
  const Packed<S> packed(a, spot.b, spot.h / (a.h / a.g), chunk);
  int end = 0;
  for_each_sequence(spot, [&](int first, int last, bool restart) {
    if (first == 0 && !restart) end = last;
  });
  if (end == 0) return void(std::memset(scratch.carry, 0, panels * a.n * V * sizeof(S)));
  Soon soon;
  if (chunk > 0) soon = Soon(a, a.grad_out, Spot::at(a, spot.b, chunk - 1, spot.h), panels * (a.n + 5) / 6);
  Steps<S> steps;
  steps.load(a, spot);
  steps.decay(static_cast<const S*>(a.A)[spot.h], 0, end);
  load_grad_y<S>(a, spot, scratch.z, scratch.slope, scratch.grad_y);
  for (int64_t j = 0; j < panels; ++j) {
    S* grad_y = scratch.grad_y + j * Q * V;
    for (int t = 0; t < end; ++t)
      for (int i = 0; i < V; i += kLanes<S>)
        store<S>(grad_y + t * V + i, load<S>(grad_y + t * V + i) * steps.from_start[t]);
    advance<S>(a, packed.C, 0, end, grad_y, steps.from_start[end - 1], end < spot.steps, soon,
               scratch.carry + j * a.n * V);
  }
}

template <class S>
void carry(const SsdGradArgs& a, void* memory, int64_t begin, int64_t end) {
  const CarryScratch<S> scratch(a, memory);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.h, h = task % a.h, state = task * a.p * a.n;
    std::memset(memory, 0, CarryScratch<S>::count(a) * sizeof(S));
    if (a.grad_final) load_state<S>(a, static_cast<const S*>(a.grad_final) + state, 1, a.n, scratch.carry);
    for (int64_t chunk = a.chunks() - 1; chunk >= 0; --chunk) {
      store_state<S>(a, scratch.carry, state_at<S>(a, a.carries, b, chunk, h), a.p, 1);
      carry_over<S>(a, Spot::at(a, b, chunk, h), chunk, scratch);
    }
    if (a.grad_initial) store_state<S>(a, scratch.carry, static_cast<S*>(a.grad_initial) + state, 1, a.n);
  }
}

// ---- within a chunk ----

template <class S>
struct GradScratch {
  S *x, *grad_y, *grad_x, *slope, *z;               // all panels of a head
  S* y;                                             // one panel
  S *x_plane, *grad_y_plane;                        // [channel][step]
  S *pairs, *mixed, *mixed_dt, *products, *turned;  // [t][s]; `products` the gradient of C_t B_s, `turned` its [s][t]
  S *state, *carry;
  S *dot_x, *dot_state;  // [step][lanes]

  static int64_t count(const SsdArgs& a) {
    constexpr int64_t V = kPanel<S>, P = kPitch<S>;
    const int64_t panels = panels_of(a.p, V);
    return panels * (5 * Q * V + 2 * V * P + 2 * a.n * V) + Q * V + 5 * Q * P + 2 * Q * kLanes<S>;
  }
  GradScratch(const SsdArgs& a, void* memory) {
    constexpr int64_t V = kPanel<S>, P = kPitch<S>;
    const int64_t panels = panels_of(a.p, V);
    Room<S> room{static_cast<S*>(memory)};
    for (S** field : {&x, &grad_y, &grad_x, &slope, &z}) *field = room.take(panels * Q * V);
    y = room.take(Q * V);
    for (S** field : {&x_plane, &grad_y_plane}) *field = room.take(panels * V * P);
    for (S** field : {&pairs, &mixed, &mixed_dt, &products, &turned}) *field = room.take(Q * P);
    for (S** field : {&state, &carry}) *field = room.take(panels * a.n * V);
    for (S** field : {&dot_x, &dot_state}) *field = room.take(Q * kLanes<S>);
  }
};

// One run of one head: where it lies, and whether the state reaches into it from before and its gradient from behind.
template <class S>
struct Run {
  int begin, end;
  bool from_before, from_behind;
  alignas(64) S decay[kPitch<S>];    // gradient of dt A by what lies inside the run
  alignas(64) S readout[kPitch<S>];  // of C_t h by the decay since the start
  S product;                         // of the state by its gradient, over the run
};

// pairs[t][s] = sum over channels of grad_y_t x_s.
template <class S>
void pair_up(const SsdArgs& a, const GradScratch<S>& scratch, const Run<S>& run) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  for_each_block(run.begin, run.end, [&](int64_t t, auto rows) {
    constexpr int R = rows();
    for (int64_t s = run.begin; s < t + R; s += V) {
      Vec<S> acc[R][2] = {};
      multiply<1, P, P>(acc, scratch.grad_y_plane + t, scratch.x_plane + s, a.p);
      store_block<S, R>(scratch.pairs + t * P + s, P, acc);
    }
  });
}

// mixed[t][s] = C_t B_s times the decay from s to t. Adds to the gradient of C_t B_s, and sums what each step's decay
// stands in: all pairs s < t <= t'. Sums alone, without a difference of them: that would leave only rounding where a
// decay is strong.
template <class S>
void mix_backward(const Steps<S>& steps, const Packed<S>& packed, const GradScratch<S>& scratch, Run<S>& run) {
  constexpr int W = kLanes<S>, P = kPitch<S>, kTogether = 2;
  const Vec<S> lanes = lane_numbers<S>();
  alignas(64) S columns[P] = {};
  for (int t = run.end - 1; t >= run.begin; --t) {
    Vec<S> sum{};
    for (int s = run.begin; s <= t; s += kTogether * W) {
      Vec<S> x[kTogether];
      steps.between(s, t, x);
      for (int i = 0; i < kTogether; ++i) {
        const int first = s + i * W;
        const int64_t at = t * P + first;
        const Vec<S> last = splat<S>(static_cast<S>(t - first));
        const Vec<S> product = x[i] * load<S>(packed.products + at);
        const Vec<S> pair = load<S>(scratch.pairs + at) * load<S>(steps.dt + first);
        const Vec<S> column = load<S>(columns + first) + (lanes < last ? product * pair : Vec<S>{});
        store<S>(columns + first, column);
        sum += lanes < last ? column : Vec<S>{};
        store<S>(scratch.mixed + at, lanes <= last ? product : Vec<S>{});
        store<S>(scratch.products + at, load<S>(scratch.products + at) + (lanes <= last ? x[i] * pair : Vec<S>{}));
      }
    }
    run.decay[t] = reduce_add<S>(sum);
  }
}

// lanes += the products of the rows of two blocks.
template <class S, int R>
__attribute__((always_inline)) inline void add_dots(const Vec<S> (&acc)[R][2], const S* x, S* lanes) {
  for (int r = 0; r < R; ++r) {
    const S* row = x + r * kPanel<S>;
    S* to = lanes + r * kLanes<S>;
    store<S>(to, load<S>(to) + acc[r][0] * load<S>(row) + acc[r][1] * load<S>(row + kLanes<S>));
  }
}

// The gradient of dt x in panel j, and with it those of x and dt.
template <class S>
void grad_inputs(const SsdGradArgs& a, const Steps<S>& steps, const Packed<S>& packed, const GradScratch<S>& scratch,
                 const Run<S>& run, int64_t j, const Vec<S> (&D)[2]) {
  constexpr int V = kPanel<S>, P = kPitch<S>, W = kLanes<S>;
  const S *x = scratch.x + j * Q * V, *grad_y = scratch.grad_y + j * Q * V, *carry = scratch.carry + j * a.n * V;
  for_each_block(run.begin, run.end, [&](int64_t s, auto rows) {
    constexpr int R = rows();
    Vec<S> acc[R][2] = {};
    if (run.from_behind) {
      multiply<1, P, V>(acc, packed.B + s, carry, a.n);
      scale_rows<S, R>(acc, steps.to_end + s);
      add_dots<S, R>(acc, x + s * V, scratch.dot_state + s * W);
    }
    multiply_triangle<true, 1, P, V>(acc, scratch.mixed + s * P + s, grad_y + s * V);
    multiply<1, P, V>(acc, scratch.mixed + (s + R) * P + s, grad_y + (s + R) * V, run.end - s - R);
    add_dots<S, R>(acc, x + s * V, scratch.dot_x + s * W);
    scale_rows<S, R>(acc, steps.dt + s);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) acc[r][i] += D[i] * load<S>(grad_y + (s + r) * V + i * W);
    store_block<S, R>(scratch.grad_x + j * Q * V + s * V, V, acc);
  });
}

// grad[i][t] += factor_t sum over channels of state[i] plane[t]; where given, sums[t] = the sum of that times by[i][t].
template <class S>
void grad_coefficients(const SsdArgs& a, const S* state, const S* plane, const S* factors, int begin, int end, S* grad,
                       const S* by, S* sums, Soon soon) {
  constexpr int V = kPanel<S>, P = kPitch<S>, W = kLanes<S>;
  const Vec<S> lanes = lane_numbers<S>();
  for (int t = begin; t < end; t += V) {
    Vec<S> sum[2] = {};
    for_each_block(0, a.n, [&](int64_t i, auto rows) {
      constexpr int R = rows();
      soon.fetch();
      Vec<S> acc[R][2] = {};
      for (int64_t p0 = 0; p0 < a.p; p0 += V)
        multiply<V, 1, P>(acc, state + p0 * a.n + i * V, plane + p0 * P + t, a.p - p0 < V ? a.p - p0 : V);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < 2; ++k) {
          const int first = t + k * W;
          const Vec<S> inside = acc[r][k] * load<S>(factors + first);
          const Vec<S> add = lanes < splat<S>(static_cast<S>(end - first)) ? inside : Vec<S>{};
          S* to = grad + (i + r) * P + first;
          store<S>(to, load<S>(to) + add);
          if (by) sum[k] += add * load<S>(by + (i + r) * P + first);
        }
    });
    if (sums)
      for (int k = 0; k < 2; ++k) store<S>(sums + t + k * W, sum[k]);
  }
}

// Sum of a state times its gradient.
template <class S>
S inner_product(const SsdArgs& a, const GradScratch<S>& scratch) {
  Vec<S> sum[2] = {};
  for (int64_t i = 0; i < panels_of(a.p, kPanel<S>) * a.n * 2; i += 2)
    for (int k = 0; k < 2; ++k)
      sum[k] += load<S>(scratch.state + (i + k) * kLanes<S>) * load<S>(scratch.carry + (i + k) * kLanes<S>);
  return reduce_add<S>(sum[0] + sum[1]);
}

template <class S>
struct HeadSums {
  S A = 0, bias = 0;
};

// From the gradients of the decays and of dt x to that of dt as it was given, left in run.decay.
template <class S>
void grad_steps(S A, const Steps<S>& steps, const GradScratch<S>& scratch, Run<S>& run, HeadSums<S>& sums) {
  constexpr int W = kLanes<S>;
  if (run.from_before) {
    S behind = 0;
    for (int t = run.end - 1; t >= run.begin; --t) run.decay[t] += behind += run.readout[t];
  }
  S before = run.product;
  for (int t = run.begin; t < run.end; ++t) {
    const S decay = run.decay[t] + before;
    if (run.from_behind) before += steps.dt[t] * reduce_add<S>(load<S>(scratch.dot_state + t * W));
    const S grad = (reduce_add<S>(load<S>(scratch.dot_x + t * W)) + A * decay) * steps.slope[t];
    sums.A += decay * steps.dt[t];
    sums.bias += grad;
    run.decay[t] = grad;
  }
}

template <class S>
void grad_run(const SsdGradArgs& a, const Spot& spot, const Spot& next, const Steps<S>& steps, const Packed<S>& packed,
              const GradScratch<S>& scratch, S* grad_B, S* grad_C, Run<S>& run, HeadSums<S>& sums) {
  constexpr int V = kPanel<S>;
  const int64_t turns = (Q + V - 1) / V * ((a.n + 5) / 6);
  pair_up<S>(a, scratch, run);
  mix_backward<S>(steps, packed, scratch, run);
  if (a.z) mix<S>(steps, packed.products, run.begin, run.end, scratch.mixed_dt);
  for (int64_t j = 0; j < panels_of(a.p, V); ++j) {
    Vec<S> D[2];
    load_D<S>(a, spot.h, j, D);
    if (a.z) {
      read_out<S>(a, packed, steps, scratch.mixed_dt, run.begin, run.end, scratch.x + j * Q * V,
                  run.from_before ? scratch.state + j * a.n * V : nullptr, D, scratch.y);
      S* slope = scratch.slope + j * Q * V;
      for (int i = run.begin * V; i < run.end * V; i += kLanes<S>)
        store<S>(slope + i, load<S>(slope + i) * load<S>(scratch.y + i));
    }
    grad_inputs<S>(a, steps, packed, scratch, run, j, D);
  }
  if (run.from_behind)
    grad_coefficients<S>(a, scratch.carry, scratch.x_plane, steps.weight, run.begin, run.end, grad_B, nullptr, nullptr,
                         Soon(a, a.x, next, turns));
  if (run.from_before)
    grad_coefficients<S>(a, scratch.state, scratch.grad_y_plane, steps.from_start, run.begin, run.end, grad_C, packed.C,
                         run.readout, Soon(a, a.grad_out, next, turns));
  run.product =
      run.from_before && run.from_behind ? steps.from_start[run.end - 1] * inner_product<S>(a, scratch) : S(0);
  grad_steps<S>(static_cast<const S*>(a.A)[spot.h], steps, scratch, run, sums);
}

// The gradient of D, over the steps of a chunk.
template <class S>
void grad_D(const SsdGradArgs& a, int64_t part, int64_t h, const GradScratch<S>& scratch) {
  constexpr int V = kPanel<S>, W = kLanes<S>;
  Vec<S> all{};
  for (int64_t p = 0; p < a.p; p += W) {
    const S *x = scratch.x + p / V * Q * V + p % V, *grad_y = scratch.grad_y + p / V * Q * V + p % V;
    Vec<S> sum{};
    for (int t = 0; t < Q; ++t) sum += load<S>(x + t * V) * load<S>(grad_y + t * V);
    all += sum;
    if (a.wide_D)
      store_lanes<S>(static_cast<S*>(a.grad_D) + (part * a.h + h) * a.p + p, sum,
                     static_cast<int>(a.p - p < W ? a.p - p : W));
  }
  if (!a.wide_D) static_cast<S*>(a.grad_D)[part * a.h + h] = reduce_add<S>(all);
}

template <class S>
void grad_head(const SsdGradArgs& a, const Spot& spot, const Spot& next, int64_t chunk, const Packed<S>& packed,
               const GradScratch<S>& scratch, S* grad_B, S* grad_C) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  const int64_t b = spot.b, h = spot.h, panels = panels_of(a.p, V), part = b * a.chunks() + chunk;
  const bool state_before = chunk > 0 || a.initial, carry_behind = chunk + 1 < a.chunks() || a.grad_final;
  Steps<S> steps;
  steps.load(a, spot);
  load_head<S>(a, a.x, spot, scratch.x);
  load_grad_y<S>(a, spot, scratch.z, scratch.slope, scratch.grad_y);
  for (int64_t j = 0; j < panels; ++j) {
    load_matrix_as<S, S>(scratch.x + j * Q * V, 1, V, V, Q, scratch.x_plane + j * V * P, P);
    load_matrix_as<S, S>(scratch.grad_y + j * Q * V, 1, V, V, Q, scratch.grad_y_plane + j * V * P, P);
  }
  if (state_before) load_state<S>(a, state_at<S>(a, a.states, b, chunk, h), a.p, 1, scratch.state);
  if (carry_behind) load_state<S>(a, state_at<S>(a, a.carries, b, chunk, h), a.p, 1, scratch.carry);
  std::memset(scratch.dot_x, 0, Q * kLanes<S> * sizeof(S));
  std::memset(scratch.dot_state, 0, Q * kLanes<S> * sizeof(S));

  HeadSums<S> sums;
  Run<S> run;
  for_each_sequence(spot, [&](int begin, int end, bool restart) {
    run.begin = begin, run.end = end;
    run.from_before = state_before && begin == 0 && !restart;
    run.from_behind = carry_behind && end == spot.steps;
    steps.decay(static_cast<const S*>(a.A)[h], begin, end);
    grad_run<S>(a, spot, next, steps, packed, scratch, grad_B, grad_C, run, sums);
    LZ_DISPATCH_DTYPE(a.grad_dt.dtype, T, {
      T* to = static_cast<T*>(a.grad_dt.data) + a.grad_dt.at(b, spot.t0, h);
      for (int t = begin; t < end; ++t) to[t * a.grad_dt.time] = from<T>(spot.padding(t) ? S(0) : run.decay[t]);
    })
  });

  store_head<S>(a, a.grad_x, spot, scratch.grad_x);
  if (a.z) store_head<S>(a, a.grad_z, spot, scratch.slope);
  static_cast<S*>(a.grad_A)[part * a.h + h] = sums.A;
  static_cast<S*>(a.grad_bias)[part * a.h + h] = sums.bias;
  grad_D<S>(a, part, h, scratch);
}

// grad_C += (gradient of C_t B_s) B and grad_B += its transpose C, for all heads of the task at once.
template <class S>
void grad_products(const SsdArgs& a, const Packed<S>& packed, const GradScratch<S>& scratch, int steps, S* grad_B,
                   S* grad_C) {
  constexpr int V = kPanel<S>, P = kPitch<S>;
  load_matrix_as<S, S>(scratch.products, 1, P, Q, Q, scratch.turned, P);
  for (int t = 0; t < steps; t += V) {
    const int end = t + V < steps ? t + V : steps;
    for_each_block(0, a.n, [&](int64_t i, auto rows) {
      constexpr int R = rows();
      Vec<S> acc[R][2];
      load_block<S, R>(grad_C + i * P + t, P, acc);
      multiply<P, 1, P>(acc, packed.B + i * P, scratch.turned + t, end);
      store_block<S, R>(grad_C + i * P + t, P, acc);
      load_block<S, R>(grad_B + i * P + t, P, acc);
      multiply<P, 1, P>(acc, packed.C + i * P + t, scratch.products + t * P + t, steps - t);
      store_block<S, R>(grad_B + i * P + t, P, acc);
    });
  }
}

template <class S>
int64_t part_size(const SsdArgs& a) {
  return 2 * a.n * kPitch<S>;
}

template <class S>
void backward(const SsdGradArgs& a, void* memory, int64_t begin, int64_t end) {
  constexpr int P = kPitch<S>;
  const GradScratch<S> scratch(a, memory);
  std::memset(memory, 0, GradScratch<S>::count(a) * sizeof(S));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.chunks(), g = task / a.chunks() % a.g, b = task / a.chunks() / a.g % a.b;
    const int64_t unit = task / a.chunks() / a.g / a.b, heads = a.h / a.g;
    const int64_t first = unit * a.unit, last = first + a.unit < heads ? first + a.unit : heads;
    const Packed<S> packed(a, b, g, chunk);
    S* grad_B = static_cast<S*>(a.parts) + task * part_size<S>(a);
    S* grad_C = grad_B + a.n * P;
    std::memset(grad_B, 0, part_size<S>(a) * sizeof(S));
    std::memset(scratch.products, 0, Q * P * sizeof(S));
    for (int64_t h = first; h < last; ++h)
      grad_head<S>(a, Spot::at(a, b, chunk, g * heads + h),
                   Spot::at(a, b, chunk, g * heads + (h + 1 < last ? h + 1 : h)), chunk, packed, scratch, grad_B,
                   grad_C);
    grad_products<S>(a, packed, scratch, a.steps(chunk), grad_B, grad_C);
  }
}

template <class S>
void unpack_as(const SsdGradArgs& a, int64_t begin, int64_t end) {
  constexpr int P = kPitch<S>;
  const int64_t size = part_size<S>(a), tasks = a.b * a.g * a.chunks();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % a.chunks(), g = task / a.chunks() % a.g, b = task / a.chunks() / a.g;
    const Spot spot = Spot::at(a, b, chunk, g);
    S* part = static_cast<S*>(a.parts) + task * size;
    for (int64_t unit = 1; unit < a.units(); ++unit)
      for (int64_t i = 0; i < size; ++i) part[i] += part[unit * tasks * size + i];
    for (int t = 0; spot.marks && t < spot.steps; ++t)
      for (int64_t i = 0; spot.padding(t) && i < 2 * a.n; ++i) part[i * P + t] = 0;
    for (const Heads* to : {&a.grad_B, &a.grad_C}) {
      LZ_DISPATCH_DTYPE(to->dtype, T, {
        T* p = static_cast<T*>(to->data) + to->at(b, spot.t0, g);
        store_matrix_as<S>(p, to->lane, to->time, static_cast<int>(a.n), spot.steps, part, P);
      })
      part += a.n * P;
    }
  }
}

}  // namespace

int64_t ssd_carry_scratch(const SsdGradArgs& a) {
  return a.f64 ? CarryScratch<double>::count(a) * 8 : CarryScratch<float>::count(a) * 4;
}

void ssd_carry(const SsdGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? carry<double>(a, scratch, begin, end) : carry<float>(a, scratch, begin, end);
}

int64_t ssd_part_size(const SsdGradArgs& a) { return a.f64 ? part_size<double>(a) : part_size<float>(a); }

int64_t ssd_chunk_scan_backward_scratch(const SsdGradArgs& a) {
  return a.f64 ? GradScratch<double>::count(a) * 8 : GradScratch<float>::count(a) * 4;
}

void ssd_chunk_scan_backward(const SsdGradArgs& a, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  a.f64 ? backward<double>(a, scratch, begin, end) : backward<float>(a, scratch, begin, end);
}

void ssd_unpack(const SsdGradArgs& a, int64_t begin, int64_t end) {
  a.f64 ? unpack_as<double>(a, begin, end) : unpack_as<float>(a, begin, end);
}

}  // namespace layerzoo::LZ_ISA
