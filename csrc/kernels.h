// The table that the library of one instruction set exports, and csrc/library.cpp loads.
#pragma once

#include "linear/kernels.h"
#include "moe/kernels.h"
#include "probe/kernels.h"
#include "ssm/kernels.h"

namespace layerzoo {

struct Kernels {
  const char* isa;
  LinearKernels linear;
  MoeKernels moe;
  ProbeKernels probe;
  SsmKernels ssm;
};

// The kernels of this process's instruction set, loaded at the first call. Throws if there are none.
const Kernels& kernels();

}  // namespace layerzoo
