// causal_conv1d_update's kernel under the emulator.
#include "ssm/causal_conv1d_update.cuh"

#include "cases.h"

extern "C" const char* causal_conv1d_update(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const layerzoo::CudaConvUpdateArgs*>(arguments);
  return emu::run_checked([&] {
    EMU_DISPATCH(a.x.dtype, T, layerzoo::causal_conv1d_update_launch<layerzoo::Compute<T>>(a, max_blocks, nullptr))
  });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {causal_conv1d_update}); }
#endif
