// linear_scan's kernels under the emulator.
#include "ssm/linear_scan.cuh"

#include "cases.h"

using layerzoo::Complex, layerzoo::LinearScanArgs, layerzoo::LinearScanGradArgs;

extern "C" const char* linear_scan(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const LinearScanArgs*>(arguments);
  return emu::run_checked([&] {
    if (a.complex)
      a.f64 ? layerzoo::linear_scan_launch<Complex<double>>(a, max_blocks, nullptr)
            : layerzoo::linear_scan_launch<Complex<float>>(a, max_blocks, nullptr);
    else
      a.f64 ? layerzoo::linear_scan_launch<double>(a, max_blocks, nullptr)
            : layerzoo::linear_scan_launch<float>(a, max_blocks, nullptr);
  });
}

extern "C" const char* linear_scan_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const LinearScanGradArgs*>(arguments);
  return emu::run_checked([&] {
    if (a.complex)
      a.f64 ? layerzoo::linear_scan_backward_launch<Complex<double>>(a, max_blocks, nullptr)
            : layerzoo::linear_scan_backward_launch<Complex<float>>(a, max_blocks, nullptr);
    else
      a.f64 ? layerzoo::linear_scan_backward_launch<double>(a, max_blocks, nullptr)
            : layerzoo::linear_scan_backward_launch<float>(a, max_blocks, nullptr);
  });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {linear_scan, linear_scan_backward}); }
#endif
