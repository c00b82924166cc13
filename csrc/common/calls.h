// Counts the calls of each op's kernel, so that a test can tell a kernel from a fallback that gives the same numbers.
#pragma once

#include <atomic>
#include <cstdint>

namespace layerzoo {

// One per op, made when the library is loaded: `static CallCounter calls("op");` at namespace level.
class CallCounter {
 public:
  explicit CallCounter(const char* op);
  void operator++() { count_.fetch_add(1, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t>& count_;
};

}  // namespace layerzoo
