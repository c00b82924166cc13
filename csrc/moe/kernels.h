// What csrc/moe/*.cpp hand to the kernels of an instruction set. `S`: the type computed in, double where `f64` is set,
// else float. Strides are in elements.
#pragma once

#include "../common/dtype.h"

namespace layerzoo {

// Columns of an expert's inner layer in a task, and of its output: multiples of what the products do at once.
constexpr int64_t kMoeInner = 96, kMoeOuter = 192;
constexpr int64_t kMoeGradient = 96;  // rows of the gradient of a matrix in a task

// Rows of any type, one beside the other in memory or picked by `index`.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  const int32_t* index = nullptr;

  int64_t at(int64_t row) const { return (index ? index[row] : row) * stride; }
};

// One matrix for each expert, (rows, columns) with the columns beside each other.
struct Matrices {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t expert = 0, row = 0;
  bool transposed = false;  // a row holds what one input gives to every output

  explicit operator bool() const { return data != nullptr; }
};

enum class Activation : int64_t { silu, gelu, gelu_tanh, relu, relu2 };

// Which row goes through which expert. A "pair" is an element of ids and weights; rows are the pairs that are not
// dropped, sorted by expert, pairs of one expert in their own order.
struct Dispatch {
  int64_t tokens = 0, experts = 0, rows = 0, largest = 0, active = 0;
  const int32_t* offsets = nullptr;        // (experts + 1): the rows of each
  const int32_t* by_size = nullptr;        // (experts): the largest first; `active` of them have rows
  const int32_t* token = nullptr;          // (rows)
  const int32_t* pair = nullptr;           // (rows)
  const int32_t* token_offsets = nullptr;  // (tokens + 1): the rows of each token are row_of[...]
  const int32_t* row_of = nullptr;         // (rows), in the order of the pairs
};

struct ExpertsArgs : Dispatch {
  bool f64 = false, gated = true, interleaved = false;
  Activation activation = Activation::silu;
  double alpha = 1, shift = 0, limit = 0;  // of the gate: see gates.h; no limit where it is infinite
  int64_t outer = 0, inner = 0;
  Rows x;  // (tokens, outer)
  Matrices w13, w2;
  const void *b13 = nullptr, *b2 = nullptr;  // S: (experts, width), (experts, outer)
  const void* weights = nullptr;             // S: (pairs)
  void* hidden = nullptr;                    // S: (rows, width), before the activation, gates first; may be null
  void* a = nullptr;                         // S: (rows, inner), after it
  void* y = nullptr;                         // S: (rows, outer)
  void* out = nullptr;                       // (tokens, outer)
  DType out_dtype = DType::f32;

  int64_t width() const { return gated ? 2 * inner : inner; }
  int64_t inner_tasks() const { return (inner + kMoeInner - 1) / kMoeInner; }
  int64_t outer_tasks() const { return (outer + kMoeOuter - 1) / kMoeOuter; }
};

struct ExpertsGradArgs : ExpertsArgs {
  Rows grad_out;                                 // (tokens, outer)
  void* grad_hidden = nullptr;                   // S: (rows, width), in the order of w13
  void* parts = nullptr;                         // S: (rows, inner_tasks): of the gradient of the weights
  Matrices grad_w13, grad_w2;                    // what nobody asked for is null, like the biases and weights
  void *grad_b13 = nullptr, *grad_b2 = nullptr;  // S: (experts, width), (experts, outer)
  void* grad_weights = nullptr;                  // S: (pairs)

  int64_t w13_tasks() const { return tasks(grad_w13.transposed ? outer : width()); }
  int64_t w2_tasks() const { return tasks(grad_w2.transposed ? inner : outer); }

 private:
  int64_t tasks(int64_t size) const { return (size + kMoeGradient - 1) / kMoeGradient * experts; }
};

constexpr int64_t kRouteTokens = 32;  // in a task of routing

enum class Score : int64_t { softmax, sigmoid, topk_softmax };

struct RouteArgs {
  bool f64 = false, normalize = false, top2 = false;
  Score score = Score::softmax;
  int64_t tokens = 0, experts = 0, top_k = 0, n_group = 1, topk_group = 1;
  double scale = 1;
  const void* logits = nullptr;                  // (tokens, experts)
  DType dtype = DType::f32;                      // of them, and of their gradient
  const void *bias = nullptr, *noise = nullptr;  // S: (experts), (tokens, experts); may be null
  void* weights = nullptr;                       // S: (tokens, top_k)
  int64_t* ids = nullptr;                        // (tokens, top_k)
  void* parts = nullptr;                         // S: (tasks, experts + 1): importance and squared sums, for each task

  int64_t tasks() const { return (tokens + kRouteTokens - 1) / kRouteTokens; }
};

struct RouteGradArgs : RouteArgs {                     // `weights`: their gradient, may be null
  const int64_t* kept = nullptr;                       // (tokens, top_k): the ids, `experts` where the pair was dropped
  const void* grad_importance = nullptr;               // S: (experts)
  double grad_z = 0;                                   // of the sum of all squares
  void *grad_logits = nullptr, *grad_noise = nullptr;  // (tokens, experts), S: the same; may be null
};

struct MoeKernels {
  int64_t (*experts_scratch)(const ExpertsArgs&);
  void (*experts_up)(const ExpertsArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_down)(const ExpertsArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_combine)(const ExpertsArgs&, int64_t begin, int64_t end);
  int64_t (*experts_backward_scratch)(const ExpertsGradArgs&);
  void (*experts_grad_hidden)(const ExpertsGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_grad_x)(const ExpertsGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_grad_w13)(const ExpertsGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_grad_w2)(const ExpertsGradArgs&, void* scratch, int64_t begin, int64_t end);
  void (*experts_grad_small)(const ExpertsGradArgs&, int64_t begin, int64_t end);
  int64_t (*route_scratch)(const RouteArgs&);
  void (*route)(const RouteArgs&, void* scratch, int64_t begin, int64_t end);
  void (*route_backward)(const RouteGradArgs&, void* scratch, int64_t begin, int64_t end);
};

#ifdef LZ_ISA
namespace LZ_ISA {
int64_t experts_scratch(const ExpertsArgs&);
void experts_up(const ExpertsArgs&, void*, int64_t, int64_t);
void experts_down(const ExpertsArgs&, void*, int64_t, int64_t);
void experts_combine(const ExpertsArgs&, int64_t, int64_t);
int64_t experts_backward_scratch(const ExpertsGradArgs&);
void experts_grad_hidden(const ExpertsGradArgs&, void*, int64_t, int64_t);
void experts_grad_x(const ExpertsGradArgs&, void*, int64_t, int64_t);
void experts_grad_w13(const ExpertsGradArgs&, void*, int64_t, int64_t);
void experts_grad_w2(const ExpertsGradArgs&, void*, int64_t, int64_t);
void experts_grad_small(const ExpertsGradArgs&, int64_t, int64_t);
int64_t route_scratch(const RouteArgs&);
void route(const RouteArgs&, void*, int64_t, int64_t);
void route_backward(const RouteGradArgs&, void*, int64_t, int64_t);
}  // namespace LZ_ISA
#endif

}  // namespace layerzoo
