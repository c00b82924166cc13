// selective_state_update's kernel under the emulator.
#include "ssm/selective_state_update.cuh"

#include "cases.h"

extern "C" const char* selective_state_update(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const layerzoo::CudaStateUpdateArgs*>(arguments);
  return emu::run_checked([&] {
    EMU_DISPATCH(a.x.dtype, T, layerzoo::selective_state_update_launch<layerzoo::Compute<T>>(a, max_blocks, nullptr))
  });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {selective_state_update}); }
#endif
