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
  void* packed;   // S: (b, g, l, n); when unpacking (parts, b, g, l, n), summed in order, in place of the first
  int64_t parts;

  int64_t chunks() const { return (l + kScanChunk - 1) / kScanChunk; }
};

// out[i] = sum over p, in order, of in[p * size + i].
struct SumArgs {
  bool f64;
  int64_t parts, size;
  const void* in;
  Operand out;  // contiguous, `size` elements
};

// A task where channels lie together: a block of rows, long enough for its start to be cheap, of as many channels as a
// page holds.
constexpr int kConvRowSteps = 64, kConvRowChannels = 1024;

struct ConvArgs {
  bool f64, silu;
  int64_t b, d, l, w;
  Operand x, out;
  Operand initial;  // (b, d, w - 1) or null; of an update: the state (rows, d, state_length), changed in place
  const void *weight, *bias;  // S: (d, w), (d); bias may be null
  const int64_t* seq_idx;     // (b, l) or null
  Operand final_state;        // (b, d, w - 1); not of an update
  int64_t state_length;       // of an update only, like what follows: at least w - 1
  const int64_t* slots;       // (b): the row of the state, below 0: padding; null: row b
  const int64_t* positions;   // (b), below state_length: the state is a ring, written from there on; null: it is moved

  int64_t tasks() const { return b * ((d + 15) / 16); }
  int64_t row_blocks() const { return l > 0 ? (l + kConvRowSteps - 1) / kConvRowSteps : 1; }
  int64_t row_tasks() const { return b * row_blocks() * ((d + kConvRowChannels - 1) / kConvRowChannels); }
};

struct ConvGradArgs : ConvArgs {  // `out`, `final_state` unused
  Operand grad_out, grad_x;
  Operand grad_final, grad_initial;  // (b, d, w - 1), either may be null
  void *grad_weight, *grad_bias;     // S: (b, d, w), (b, d): sums over time
};

// (batch, head, channel, state), the last in place of time; a stride is 0 where a tensor lacks the dimension.
struct HeadOperand : Operand {
  int64_t head = 0;

  int64_t at(int64_t b, int64_t h, int64_t c, int64_t n) const { return Operand::at(b, c, n) + h * head; }
};

// Channels per task of the update: so many that the chain from dt to the gate is not waited for too often.
constexpr int kUpdateUnit = 64;

struct StateUpdateArgs {
  bool f64, softplus;
  int64_t b, h, p, n, g;      // p: channels of a head; head k reads B and C of group k / (h / g)
  HeadOperand state;          // (rows, h, p, n), updated in place
  HeadOperand x, dt, z, out;  // (b, h, p); z may be null
  HeadOperand A;              // (h, p, n)
  HeadOperand B, C;           // (b, g, n), with the group as head
  HeadOperand D, bias;        // (h, p); may be null
  const int64_t* slots;       // (b): the row of the state, below 0: padding; null: row b

  int64_t tasks() const { return b * h * ((p + kUpdateUnit - 1) / kUpdateUnit); }
  bool one_decay() const { return A.time == 0; }  // one exponential then does for all states of a channel
};

// A (batch, time, head, lane) tensor: sequences of heads, or B and C with groups for heads; `lane` is 0 for dt.
struct Heads {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, time = 0, head = 0, lane = 0;

  int64_t at(int64_t b, int64_t t, int64_t h) const { return b * batch + t * time + h * head; }
  explicit operator bool() const { return data != nullptr; }
};

// Steps that ssd_chunk_scan turns into products of matrices: its work on a step grows with n p + chunk p / 2, so a
// chunk stays short against n, and still long enough for loops over it to run at full speed.
constexpr int kSsdChunk = 64;

// Letters besides: h heads, p channels of a head.
struct SsdArgs {
  bool f64, softplus, wide_D;
  double low, high;  // bounds of dt
  int64_t b, l, h, p, g, n;
  Heads x, dt, z, out;       // z may be null
  Heads B, C;                // (b, l, g, n)
  const void *A, *D, *bias;  // S: (h), (h) or with wide_D (h, p), (h); D and bias may be null
  const void* initial;       // S: (b, h, p, n) or null
  void* final_states;        // S: (b, h, p, n)
  void* states;              // S: (b, chunks, h, n, p), the state before each chunk, or null
  const uint8_t* marks;      // Mark: (b, l) or null
  void* packed;              // S: (b, g, chunks, as many as ssd_packed_size says)

  int64_t chunks() const { return (l + kSsdChunk - 1) / kSsdChunk; }
  int steps(int64_t chunk) const {
    const int64_t left = l - chunk * kSsdChunk;
    return static_cast<int>(left < kSsdChunk ? left : kSsdChunk);
  }
};

struct SsdGradArgs : SsdArgs {  // `out` and `final_states` unused
  Heads grad_out, grad_x, grad_dt, grad_z, grad_B, grad_C;
  const void* grad_final;             // S: (b, h, p, n) or null
  void* grad_initial;                 // S: (b, h, p, n) or null
  void* carries;                      // S: (b, chunks, h, n, p), the gradient of the state after each chunk
  void *grad_A, *grad_D, *grad_bias;  // S: (b, chunks, h), (b, chunks, h) or (b, chunks, h, p), (b, chunks, h)
  int64_t unit;                       // heads per task, within a group
  void* parts;                        // S: (units, b, g, chunks, as many as ssd_part_size says)

  int64_t units() const { return (h / g + unit - 1) / unit; }
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
  void (*unpack)(const PackArgs&, int64_t begin, int64_t end);  // tasks: b * g * chunks
  void (*sum)(const SumArgs&, int64_t begin, int64_t end);      // tasks: elements
  int64_t (*selective_scan_scratch)(const ScanArgs&);
  void (*selective_scan)(const ScanArgs&, void* scratch, int64_t begin, int64_t end);
  int64_t (*selective_scan_backward_scratch)(const ScanGradArgs&);
  void (*selective_scan_backward)(const ScanGradArgs&, void* scratch, int64_t begin, int64_t end);
  int64_t (*causal_conv1d_scratch)(const ConvArgs&);
  void (*causal_conv1d)(const ConvArgs&, void* scratch, int64_t begin, int64_t end);
  int64_t (*causal_conv1d_rows_scratch)(const ConvArgs&);  // forward, channels together, not packed
  void (*causal_conv1d_rows)(const ConvArgs&, void* scratch, int64_t begin, int64_t end);  // tasks: row_tasks
  void (*causal_conv1d_backward)(const ConvGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*causal_conv1d_update)(const ConvArgs&, void* scratch, int64_t begin, int64_t end);
  void (*selective_state_update)(const StateUpdateArgs&, int64_t begin, int64_t end);
  int64_t (*ssd_packed_size)(const SsdArgs&);
  void (*ssd_pack)(const SsdArgs&, int64_t begin, int64_t end);  // tasks: b * g * chunks
  int64_t (*ssd_chunk_scan_scratch)(const SsdArgs&);
  void (*ssd_chunk_scan)(const SsdArgs&, void* scratch, int64_t begin, int64_t end);  // tasks: b * h
  int64_t (*ssd_carry_scratch)(const SsdGradArgs&);
  void (*ssd_carry)(const SsdGradArgs&, void* scratch, int64_t begin, int64_t end);  // tasks: b * h
  int64_t (*ssd_part_size)(const SsdGradArgs&);
  int64_t (*ssd_chunk_scan_backward_scratch)(const SsdGradArgs&);
  void (*ssd_chunk_scan_backward)(const SsdGradArgs&, void* scratch, int64_t begin,
                                  int64_t end);                        // tasks: units * b * g * chunks
  void (*ssd_unpack)(const SsdGradArgs&, int64_t begin, int64_t end);  // tasks: b * g * chunks
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
int64_t causal_conv1d_rows_scratch(const ConvArgs&);
void causal_conv1d_rows(const ConvArgs&, void*, int64_t, int64_t);
void causal_conv1d_backward(const ConvGradArgs&, void*, int64_t, int64_t);
void causal_conv1d_update(const ConvArgs&, void*, int64_t, int64_t);
void selective_state_update(const StateUpdateArgs&, int64_t, int64_t);
int64_t ssd_packed_size(const SsdArgs&);
void ssd_pack(const SsdArgs&, int64_t, int64_t);
int64_t ssd_chunk_scan_scratch(const SsdArgs&);
void ssd_chunk_scan(const SsdArgs&, void*, int64_t, int64_t);
int64_t ssd_carry_scratch(const SsdGradArgs&);
void ssd_carry(const SsdGradArgs&, void*, int64_t, int64_t);
int64_t ssd_part_size(const SsdGradArgs&);
int64_t ssd_chunk_scan_backward_scratch(const SsdGradArgs&);
void ssd_chunk_scan_backward(const SsdGradArgs&, void*, int64_t, int64_t);
void ssd_unpack(const SsdGradArgs&, int64_t, int64_t);
void linear_scan(const LinearScanArgs&, int64_t, int64_t);
void linear_scan_backward(const LinearScanGradArgs&, int64_t, int64_t);
}  // namespace LZ_ISA
#endif

}  // namespace layerzoo
