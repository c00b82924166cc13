// Loops that only keep the arithmetic units of an instruction set busy; csrc/module.cpp takes their time.
#pragma once

#include <cstdint>

namespace layerzoo {

// Each goes through its loop `rounds` times and returns how much that was.
struct ProbeKernels {
  int64_t (*multiply_add)(bool f64, int64_t rounds);  // operations, two for each multiply-add
  int64_t (*exponentials)(bool f64, int64_t rounds);  // results of exp2
};

#ifdef LZ_ISA
namespace LZ_ISA {
int64_t multiply_add(bool, int64_t);
int64_t exponentials(bool, int64_t);
}  // namespace LZ_ISA
#endif

}  // namespace layerzoo
