// What csrc/ssm/ops.cpp hands to the kernels of an instruction set: plain pointers, sizes, strides. Letters: b batch,
// d channel, l time, n state, g group of channels that share B and C, w convolution width.
//
// `S` below is the type computed in: double if `f64`, else float. `range` functions do tasks [begin, end) and may run
// on several threads at once; tasks are cut by shape alone, so that no result depends on the number of threads.
#pragma once

#include "../common/operand.h"

namespace layerzoo {

enum Mark : uint8_t { kContinue = 0, kRestart = 1, kPadding = 2 };  // what seq_idx says of a time step

// Steps between two saved states, which are also the rows of a tile: long enough to start loops seldom, short enough
// for the past states and decays of four states in the L1 cache.
constexpr int kScanChunk = 64;

struct ScanArgs {
  bool f64, softplus;
  int64_t b, d, l, n, g;
  int64_t unit;  // channels per task, within a group; a multiple of 16
  Operand u, delta, z, out;
  const void *A, *D, *bias;  // S: (d, n), (d), (d); D and bias may be null
  const void *B, *C;         // S: (b, g, l, n) in the order of the scan, or (d, n) where constant
  bool constant_B, constant_C;
  const void* initial_state;  // S: (b, d, n) or null
  void* last_state;           // S: (b, d, n)
  void* states;               // S: (b, chunks, n, d), the state before each chunk, or null
  const uint8_t* marks;       // Mark: (b, l) in the order of the scan, or null

  int64_t units_per_group() const { return (d / g + unit - 1) / unit; }
  int64_t tasks() const { return b * g * units_per_group(); }
  int64_t chunks() const { return (l + kScanChunk - 1) / kScanChunk; }
  int steps(int64_t chunk) const {
    const int64_t left = l - chunk * kScanChunk;
    return static_cast<int>(left < kScanChunk ? left : kScanChunk);
  }
};

struct ScanGradArgs : ScanArgs {  // `out` unused
  Operand grad_out, grad_u, grad_delta, grad_z;
  const void* grad_last_state;        // S: (b, d, n) or null
  void* grad_initial_state;           // S: (b, d, n) or null
  void *grad_A, *grad_D, *grad_bias;  // S: (b, d, n), (b, d), (b, d): sums over time; D and bias may be null
  void *grad_B, *grad_C;  // S: (units per group, b, g, l, n): sums over a unit's channels; (b, d, n) where constant
};

// (b, g, l, n) from and to any layout; `x` holds strides of b, n (as channel), l and of g apart.
struct PackArgs {
  bool f64;
  int64_t b, g, l, n;
  Operand x;
  int64_t group;  // stride of g in x
  void* packed;   // S: (b, g, l, n); when unpacking (parts, b, g, l, n), summed over parts in order
  int64_t parts;
};

// out[i] = sum over p, in order, of in[p * size + i].
struct SumArgs {
  bool f64;
  int64_t parts, size;
  const void* in;
  Operand out;  // contiguous, `size` elements
};

struct ConvArgs {
  bool f64, silu;
  int64_t b, d, l, w;
  Operand x, out;
  Operand initial;            // (b, d, w - 1) or null; of an update: the state (b, d, state_length), changed in place
  const void *weight, *bias;  // S: (d, w), (d); bias may be null
  const int64_t* seq_idx;     // (b, l) or null
  Operand final_state;        // (b, d, w - 1); not of an update
  int64_t state_length;       // of an update only: at least w - 1

  int64_t tasks() const { return b * ((d + 15) / 16); }
};

struct ConvGradArgs : ConvArgs {  // `out`, `final_state` unused
  Operand grad_out, grad_x;
  Operand grad_final, grad_initial;  // (b, d, w - 1), either may be null
  void *grad_weight, *grad_bias;     // S: (b, d, w), (b, d): sums over time
};

struct StateUpdateArgs {
  bool f64, softplus;
  int64_t b, d, n;
  Operand state;          // (b, d, n), updated in place
  Operand x, dt, z, out;  // (b, d); z may be null
  Operand A;              // (d, n) as channel, time
  Operand B, C;           // (b, n) as batch, time
  const void *D, *bias;   // S: (d); may be null

  int64_t tasks() const { return b * ((d + 15) / 16); }
};

struct LinearScanArgs {
  bool f64, complex;
  int64_t b, d, l;
  int64_t unit;               // channels per task; a multiple of 16, and at most 1024 scalars
  bool rows;                  // channels lie together in every operand
  Operand a, x, h;            // (b, d, l); strides count complex numbers where these are
  const void* initial_state;  // S, or pairs: (b, d) or null

  int64_t tasks() const { return b * ((d + unit - 1) / unit); }
};

struct LinearScanGradArgs : LinearScanArgs {  // `x` unused
  Operand grad_h, grad_a, grad_x;
  void* grad_initial;  // as `initial_state`
};

// `scratch`: that many bytes for each thread, aligned to 64.
struct SsmKernels {
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);    // tasks: b * g
  void (*unpack)(const PackArgs&, int64_t begin, int64_t end);  // tasks: b * g
  void (*sum)(const SumArgs&, int64_t begin, int64_t end);      // tasks: elements
  int64_t (*selective_scan_scratch)(const ScanArgs&);
  void (*selective_scan)(const ScanArgs&, void* scratch, int64_t begin, int64_t end);
  int64_t (*selective_scan_backward_scratch)(const ScanGradArgs&);
  void (*selective_scan_backward)(const ScanGradArgs&, void* scratch, int64_t begin, int64_t end);
  int64_t (*causal_conv1d_scratch)(const ConvArgs&);
  void (*causal_conv1d)(const ConvArgs&, void* scratch, int64_t begin, int64_t end);
  void (*causal_conv1d_backward)(const ConvGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*causal_conv1d_update)(const ConvArgs&, void* scratch, int64_t begin, int64_t end);
  void (*selective_state_update)(const StateUpdateArgs&, int64_t begin, int64_t end);
  void (*linear_scan)(const LinearScanArgs&, int64_t begin, int64_t end);
  void (*linear_scan_backward)(const LinearScanGradArgs&, int64_t begin, int64_t end);
};

#ifdef LZ_ISA
namespace LZ_ISA {
void pack(const PackArgs&, int64_t, int64_t);
void unpack(const PackArgs&, int64_t, int64_t);
void sum(const SumArgs&, int64_t, int64_t);
int64_t selective_scan_scratch(const ScanArgs&);
void selective_scan(const ScanArgs&, void*, int64_t, int64_t);
int64_t selective_scan_backward_scratch(const ScanGradArgs&);
void selective_scan_backward(const ScanGradArgs&, void*, int64_t, int64_t);
int64_t causal_conv1d_scratch(const ConvArgs&);
void causal_conv1d(const ConvArgs&, void*, int64_t, int64_t);
void causal_conv1d_backward(const ConvGradArgs&, void*, int64_t, int64_t);
void causal_conv1d_update(const ConvArgs&, void*, int64_t, int64_t);
void selective_state_update(const StateUpdateArgs&, int64_t, int64_t);
void linear_scan(const LinearScanArgs&, int64_t, int64_t);
void linear_scan_backward(const LinearScanGradArgs&, int64_t, int64_t);
}  // namespace LZ_ISA
#endif

}  // namespace layerzoo
