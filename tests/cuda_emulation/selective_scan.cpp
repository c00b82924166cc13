// selective_scan's kernels under the emulator.
#include "ssm/selective_scan.cuh"

#include "cases.h"

using layerzoo::CudaScanArgs, layerzoo::CudaScanGradArgs, layerzoo::DType;

extern "C" int selective_scan_channels(bool f64) {
  return f64 ? layerzoo::ScanBlock<double>::kChannels : layerzoo::ScanBlock<float>::kChannels;
}

extern "C" const char* selective_scan(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaScanArgs*>(arguments);
  const auto launch =
      a.u.dtype == DType::f64 ? layerzoo::selective_scan_launch<double> : layerzoo::selective_scan_launch<float>;
  return emu::run_checked([&] { launch(a, max_blocks, nullptr); });
}

extern "C" const char* selective_scan_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaScanGradArgs*>(arguments);
  const auto launch = a.scan.u.dtype == DType::f64 ? layerzoo::selective_scan_backward_launch<double>
                                                   : layerzoo::selective_scan_backward_launch<float>;
  return emu::run_checked([&] { launch(a, max_blocks, nullptr); });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {selective_scan, selective_scan_backward}); }
#endif
