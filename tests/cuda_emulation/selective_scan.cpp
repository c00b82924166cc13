// selective_scan's kernels under the emulator.
#include "ssm/selective_scan.cuh"

#include "cases.h"

using layerzoo::Compute, layerzoo::CudaScanArgs, layerzoo::CudaScanGradArgs;

extern "C" int selective_scan_channels(bool f64) {
  return f64 ? layerzoo::ScanBlock<double>::kChannels : layerzoo::ScanBlock<float>::kChannels;
}

extern "C" const char* selective_scan(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaScanArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.u.dtype, T, layerzoo::selective_scan_launch<Compute<T>>(a, max_blocks, nullptr)) });
}

extern "C" const char* selective_scan_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaScanGradArgs*>(arguments);
  return emu::run_checked([&] {
    EMU_DISPATCH(a.scan.u.dtype, T, layerzoo::selective_scan_backward_launch<Compute<T>>(a, max_blocks, nullptr))
  });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {selective_scan, selective_scan_backward}); }
#endif
