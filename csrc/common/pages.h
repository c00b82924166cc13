// Results of many megabytes are new memory in every call, and the system hands that out page by page. Where it may use
// large pages when asked (Linux: /sys/kernel/mm/transparent_hugepage/enabled is `madvise`, the usual setting), one
// fault then does for 512, and rows of channel-last tensors no longer miss the TLB.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace layerzoo {

// Asks for large pages under a tensor that was just allocated; a hint, without effect on small ones.
inline torch::stable::Tensor in_large_pages(torch::stable::Tensor t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + t.numel() * t.element_size()) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace layerzoo
