// The arguments of selective_state_update, checked, on any device.
#pragma once

#include "../common/checks.h"
#include "kernels.h"

namespace layerzoo {

// A tensor of selective_state_update by its dimensions, one letter each: b(atch), h(ead), c(hannel), n (state). In the
// plain form, where all channels are one head, the h is missing.
inline HeadOperand by_letters(const Tensor& t, const char* name, const char* letters, bool heads) {
  HeadOperand o{{t.data_ptr(), dtype_of(t, name)}};
  for (int64_t i = 0; *letters; ++letters) {
    if (*letters == 'h' && !heads) continue;
    (*letters == 'b' ? o.batch : *letters == 'h' ? o.head : *letters == 'c' ? o.channel : o.time) = t.stride(i++);
  }
  return o;
}

inline HeadOperand by_letters(const OptionalTensor& t, const char* name, const char* letters, bool heads) {
  return t ? by_letters(*t, name, letters, heads) : HeadOperand{};
}

// Both forms: x (batch, channels), or (batch, heads, channels) with groups of heads. `pool`: the state has any number
// of rows. Args is StateUpdateArgs, or derives from it; which row belongs to which is left to the caller.
template <class Args>
Args state_update_args(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& bias,
                       bool dt_softplus, bool pool, const Tensor& out) {
  const bool heads = x.dim() == 3;
  STD_TORCH_CHECK(heads || x.dim() == 2, "selective_state_update: x must have two or three dimensions");
  STD_TORCH_CHECK(A.dim() == (heads ? 3 : 2) && B.dim() == A.dim() && state.dim() == A.dim() + 1,
                  "selective_state_update: A and B must have as many dimensions as x, and state one more");
  Args a{};
  a.f64 = accumulate_type(x) == ScalarType::Double, a.softplus = dt_softplus;
  a.b = x.size(0), a.h = heads ? x.size(1) : 1, a.p = x.size(-1), a.n = A.size(-1), a.g = heads ? B.size(1) : 1;
  STD_TORCH_CHECK(a.g > 0 && a.h % a.g == 0,
                  "selective_state_update: the heads must divide into the groups of B and C");
  const auto shaped = [heads](const auto& t, const char* name, std::initializer_list<int64_t> in_heads,
                              std::initializer_list<int64_t> plain) { check_shape(t, name, heads ? in_heads : plain); };
  const int64_t rows = pool ? state.size(0) : a.b;
  shaped(state, "state", {rows, a.h, a.p, a.n}, {rows, a.p, a.n});
  shaped(dt, "dt", {a.b, a.h, a.p}, {a.b, a.p});
  shaped(z, "z", {a.b, a.h, a.p}, {a.b, a.p});
  shaped(A, "A", {a.h, a.p, a.n}, {a.p, a.n});
  shaped(B, "B", {a.b, a.g, a.n}, {a.b, a.n});
  shaped(C, "C", {a.b, a.g, a.n}, {a.b, a.n});
  shaped(D, "D", {a.h, a.p}, {a.p});
  shaped(bias, "dt_bias", {a.h, a.p}, {a.p});
  a.state = by_letters(state, "state", "bhcn", heads);
  a.x = by_letters(x, "x", "bhc", heads), a.dt = by_letters(dt, "dt", "bhc", heads);
  a.z = by_letters(z, "z", "bhc", heads), a.out = by_letters(out, "out", "bhc", heads);
  a.A = by_letters(A, "A", "hcn", heads), a.D = by_letters(D, "D", "hc", heads);
  a.bias = by_letters(bias, "dt_bias", "hc", heads);
  a.B = by_letters(B, "B", "bhn", heads), a.C = by_letters(C, "C", "bhn", heads);
  return a;
}

}  // namespace layerzoo
