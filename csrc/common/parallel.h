// Work on torch's own thread pool. Tasks are cut by shape, never by the number of threads: same bits for any number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace layerzoo {

// Work of about this many nanoseconds is worth another thread.
constexpr double kGrain = 20e3;

// Does tasks [0, tasks) as f(worker, begin, end), worker < get_num_threads(). Workers take the next few tasks when they
// are done with theirs: one that is held up by another program holds up nobody else.
template <class F>
void parallel(int64_t tasks, double nanoseconds_each, const F& f) {
  if (tasks <= 0) return;
  const double useful = std::max(1.0, static_cast<double>(tasks) * nanoseconds_each / kGrain);
  const int64_t most = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t workers = useful < static_cast<double>(most) ? static_cast<int64_t>(useful) : most;
  if (workers == 1) return f(0, 0, tasks);
  const int64_t step = std::max<int64_t>(1, tasks / (workers * 8));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t begin; (begin = next.fetch_add(step)) < tasks;) f(worker, begin, std::min(begin + step, tasks));
  });
}

// The same with `bytes` of scratch for each worker, allocated before any starts: f(scratch, begin, end).
template <class F>
void parallel_with_scratch(int64_t tasks, double nanoseconds_each, int64_t bytes, const F& f) {
  const auto free = [](char* p) { ::operator delete(p, std::align_val_t(64)); };
  bytes = (bytes + 63) / 64 * 64;
  const std::unique_ptr<char, decltype(free)> memory(
      static_cast<char*>(::operator new(bytes * torch::stable::get_num_threads(), std::align_val_t(64))), free);
  parallel(tasks, nanoseconds_each,
           [&](int64_t worker, int64_t begin, int64_t end) { f(memory.get() + bytes * worker, begin, end); });
}

}  // namespace layerzoo
