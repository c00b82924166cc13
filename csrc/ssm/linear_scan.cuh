// The linear recurrence h_t = a_t h_{t-1} + x_t, real or complex, and its gradients.
//
// A thread has a channel and goes through its steps in order, as on the CPU: no product of many factors, which would
// overflow where the states do not. It loads some steps ahead, since loads do not wait for the chain. So it is fast for
// many channels that lie together, and leaves a GPU idle for few. Run in the emulator and compiled by nvcc; never
// measured on a GPU.
#pragma once

#include "../common/launch.h"
#include "kernels.h"

namespace layerzoo {

constexpr int kLinearThreads = 128, kLinearAhead = 8;

template <class S>
struct Complex {
  S re, im;
};

template <class S>
LZ_DEVICE Complex<S> operator+(Complex<S> x, Complex<S> y) {
  return {x.re + y.re, x.im + y.im};
}

template <class S>
LZ_DEVICE Complex<S> operator*(Complex<S> x, Complex<S> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

template <class S>
LZ_DEVICE Complex<S> conj(Complex<S> x) {
  return {x.re, -x.im};
}
LZ_DEVICE float conj(float x) { return x; }
LZ_DEVICE double conj(double x) { return x; }

// Numbers N of a sequence: complex ones as they lie, real ones of any type.
template <class N>
LZ_DEVICE N load_number(const Operand& x, int64_t b, int64_t channel, int64_t time) {
  if constexpr (std::is_floating_point_v<N>)
    return load<N>(x, b, channel, time);
  else
    return static_cast<const N*>(x.data)[b * x.batch + channel * x.channel + time * x.time];
}

template <class N>
LZ_DEVICE void store_number(const Operand& x, int64_t b, int64_t channel, int64_t time, N v) {
  if constexpr (std::is_floating_point_v<N>)
    store<N>(x, b, channel, time, v);
  else
    static_cast<N*>(x.data)[b * x.batch + channel * x.channel + time * x.time] = v;
}

// Any grid of one dimension is right for both kernels.
template <class N>
LZ_KERNEL(kLinearThreads)
linear_scan_kernel(const LinearScanArgs s) {
  const int64_t stride = int64_t(gridDim.x) * kLinearThreads;
  for (int64_t i = int64_t(blockIdx.x) * kLinearThreads + threadIdx.x; i < s.b * s.d; i += stride) {
    const int64_t b = i / s.d, channel = i % s.d;
    N h = s.initial_state ? static_cast<const N*>(s.initial_state)[i] : N{};
    for (int64_t t0 = 0; t0 < s.l; t0 += kLinearAhead) {
      N a[kLinearAhead], x[kLinearAhead];
      LZ_UNROLL
      for (int k = 0; k < kLinearAhead; ++k) {
        if (t0 + k >= s.l) continue;
        a[k] = load_number<N>(s.a, b, channel, t0 + k);
        x[k] = load_number<N>(s.x, b, channel, t0 + k);
      }
      LZ_UNROLL
      for (int k = 0; k < kLinearAhead; ++k)
        if (t0 + k < s.l) store_number<N>(s.h, b, channel, t0 + k, h = a[k] * h + x[k]);
    }
  }
}

// With g_t the gradient of h_t: g_t = grad_t + conj(a_{t+1}) g_{t+1}, from the last step to the first.
template <class N>
LZ_KERNEL(kLinearThreads)
linear_scan_backward_kernel(const LinearScanGradArgs s) {
  const int64_t stride = int64_t(gridDim.x) * kLinearThreads;
  for (int64_t i = int64_t(blockIdx.x) * kLinearThreads + threadIdx.x; i < s.b * s.d; i += stride) {
    const int64_t b = i / s.d, channel = i % s.d;
    const N initial = s.initial_state ? static_cast<const N*>(s.initial_state)[i] : N{};
    N carry{};
    for (int64_t end = s.l; end > 0; end -= kLinearAhead) {
      N a[kLinearAhead], grad[kLinearAhead], before[kLinearAhead];
      LZ_UNROLL
      for (int k = 0; k < kLinearAhead; ++k) {
        const int64_t t = end - 1 - k;
        if (t < 0) continue;
        a[k] = load_number<N>(s.a, b, channel, t);
        grad[k] = load_number<N>(s.grad_h, b, channel, t);
        before[k] = t > 0 ? load_number<N>(s.h, b, channel, t - 1) : initial;
      }
      LZ_UNROLL
      for (int k = 0; k < kLinearAhead; ++k) {
        const int64_t t = end - 1 - k;
        if (t < 0) continue;
        const N g = grad[k] + carry;
        store_number<N>(s.grad_x, b, channel, t, g);
        store_number<N>(s.grad_a, b, channel, t, g * conj(before[k]));
        carry = conj(a[k]) * g;
      }
    }
    if (s.grad_initial) static_cast<N*>(s.grad_initial)[i] = carry;
  }
}

template <class N>
void linear_scan_launch(const LinearScanArgs& s, int64_t max_blocks, LZ_STREAM stream) {
  if (s.b * s.d == 0) return;
  const unsigned blocks = blocks_for((s.b * s.d + kLinearThreads - 1) / kLinearThreads, max_blocks);
  LZ_LAUNCH(linear_scan_kernel<N>, blocks, kLinearThreads, 0, stream, s);
}

template <class N>
void linear_scan_backward_launch(const LinearScanGradArgs& s, int64_t max_blocks, LZ_STREAM stream) {
  if (s.b * s.d == 0) return;
  const unsigned blocks = blocks_for((s.b * s.d + kLinearThreads - 1) / kLinearThreads, max_blocks);
  LZ_LAUNCH(linear_scan_backward_kernel<N>, blocks, kLinearThreads, 0, stream, s);
}

}  // namespace layerzoo
