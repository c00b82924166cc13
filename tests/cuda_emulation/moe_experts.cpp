// moe_experts' kernels under the emulator.
#include "cases.h"
#include "moe/experts_backward.cuh"

using layerzoo::Compute, layerzoo::CudaExpertsArgs;

extern "C" const char* moe_experts(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaExpertsArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.x.dtype, T, layerzoo::moe_experts_launch<Compute<T>>(a, max_blocks, nullptr)) });
}

extern "C" const char* moe_experts_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaExpertsArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.x.dtype, T, layerzoo::moe_experts_backward_launch<Compute<T>>(a, max_blocks, nullptr)) });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {moe_experts, moe_experts_backward}); }
#endif
