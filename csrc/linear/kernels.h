// What csrc/linear/ops.cpp hands to the kernels of an instruction set. `S`: the type computed in.
#pragma once

#include "../common/dtype.h"

namespace layerzoo {

constexpr int kLinearRows = 16;  // rows of the weight in a task

struct SkinnyLinearArgs {
  bool f64;
  int64_t rows, in, out;
  const void* x;       // S: (rows, in)
  const void* weight;  // (out, in), its rows `weight_stride` elements apart
  DType weight_dtype;
  int64_t weight_stride;
  const void* bias;  // S: (out), may be null
  void* y;           // (rows, out)
  DType y_dtype;

  int64_t tasks() const { return (out + kLinearRows - 1) / kLinearRows; }
};

struct LinearKernels {
  void (*skinny_linear)(const SkinnyLinearArgs&, int64_t begin, int64_t end);
};

#ifdef LZ_ISA
namespace LZ_ISA {
void skinny_linear(const SkinnyLinearArgs&, int64_t, int64_t);
}  // namespace LZ_ISA
#endif

}  // namespace layerzoo
