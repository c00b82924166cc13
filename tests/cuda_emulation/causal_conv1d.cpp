// causal_conv1d's kernels under the emulator.
#include "ssm/causal_conv1d.cuh"

#include "cases.h"

using layerzoo::CudaConvArgs, layerzoo::CudaConvGradArgs;

extern "C" int causal_conv1d_tile_channels() { return layerzoo::kTileChannels; }
extern "C" int causal_conv1d_tile_steps() { return layerzoo::kTileSteps; }

extern "C" const char* causal_conv1d(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaConvArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.x.dtype, T, layerzoo::causal_conv1d_launch<T>(a, max_blocks, nullptr)) });
}

extern "C" const char* causal_conv1d_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaConvGradArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.conv.x.dtype, T, layerzoo::causal_conv1d_backward_launch<T>(a, max_blocks, nullptr)) });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {causal_conv1d, causal_conv1d_backward}); }
#endif
