// ssd_chunk_scan's kernels under the emulator.
#include "ssm/ssd_chunk_scan.cuh"

#include "cases.h"

using layerzoo::Compute, layerzoo::CudaSsdArgs;

extern "C" const char* ssd_chunk_scan(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaSsdArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.x.dtype, T, layerzoo::ssd_chunk_scan_launch<Compute<T>>(a, max_blocks, nullptr)) });
}

extern "C" const char* ssd_chunk_scan_backward(const void* arguments, int64_t max_blocks) {
  const auto& a = *static_cast<const CudaSsdArgs*>(arguments);
  return emu::run_checked(
      [&] { EMU_DISPATCH(a.x.dtype, T, layerzoo::ssd_chunk_scan_backward_launch<Compute<T>>(a, max_blocks, nullptr)) });
}

#if defined(__SANITIZE_ADDRESS__)
int main(int, char** argv) { return emu::run_cases(argv, {ssd_chunk_scan, ssd_chunk_scan_backward}); }
#endif
