// `layerzoo._C`: what this build is and what this machine can do. Benchmarks and `layerzoo doctor` use it; no op needs
// it.
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

double seconds_of(const auto& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best of `rounds` of f(thread index) on `threads` threads at once, in seconds.
double best_of(int rounds, int threads, const auto& f) {
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    const double elapsed = seconds_of([&] {
      std::vector<std::thread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back([&f, i] { f(i); });
      f(0);
      for (auto& other : others) other.join();
    });
    best = elapsed < best ? elapsed : best;
  }
  return best;
}

void check(int64_t megabytes, int threads) {
  if (megabytes < 1) throw py::value_error("megabytes must be at least 1");
  if (threads < 1) throw py::value_error("threads must be at least 1");
}

// Bytes read per second from a buffer of `megabytes` for each thread.
double read_bandwidth(int64_t megabytes, int threads) {
  check(megabytes, threads);
  const py::gil_scoped_release release;
  const int64_t words = megabytes * (1 << 20) / 8;
  std::vector<std::vector<uint64_t>> buffers(threads, std::vector<uint64_t>(words, 1));
  std::vector<uint64_t> sums(threads);
  const double elapsed = best_of(5, threads, [&](int i) {
    uint64_t sum[8] = {};
    const uint64_t* p = buffers[i].data();
    for (int64_t j = 0; j + 8 <= words; j += 8)
      for (int k = 0; k < 8; ++k) sum[k] += p[j + k];
    for (uint64_t part : sum) sums[i] += part;
  });
  volatile uint64_t keep = sums[0];
  (void)keep;
  return static_cast<double>(words) * 8 * threads / elapsed;
}

// Bytes read plus bytes written per second, copying a buffer of `megabytes` for each thread.
double copy_bandwidth(int64_t megabytes, int threads) {
  check(megabytes, threads);
  const py::gil_scoped_release release;
  const int64_t bytes = megabytes * (1 << 20);
  std::vector<std::vector<char>> from(threads, std::vector<char>(bytes, 1)), to(threads, std::vector<char>(bytes, 2));
  const double elapsed = best_of(5, threads, [&](int i) { std::memcpy(to[i].data(), from[i].data(), bytes); });
  return 2.0 * static_cast<double>(bytes) * threads / elapsed;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How layerzoo was built, and probes of this machine.";
  m.def("compiler", [] { return __VERSION__; }, "The compiler that built the native libraries.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("megabytes") = 256, py::arg("threads") = 1,
        "Bytes per second read from memory, best of five, with a buffer of `megabytes` for each of `threads` threads.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("megabytes") = 256, py::arg("threads") = 1,
        "Bytes per second read plus written by a copy, best of five.");
}
