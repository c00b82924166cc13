// `layerzoo._C`: what this build is and what this machine can do. Benchmarks and `layerzoo doctor` use it; no op needs
// it.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/load.h"

// Half as wide, loads cannot keep up with an L2 cache.
#if defined(__x86_64__)
#define LZ_WIDE_LOADS __attribute__((target_clones("avx2", "default")))
#else
#define LZ_WIDE_LOADS
#endif

namespace py = pybind11;

namespace {

// ---- arguments ----

template <class T>
[[noreturn]] void refuse(const char* probe, const char* argument, const std::string& allowed, const T& got) {
  std::ostringstream text;
  text << probe << ": " << argument << " must be " << allowed << ", got " << got;
  throw py::value_error(text.str());
}

void check_threads(const char* probe, int64_t threads) {
  if (threads < 1 || threads > 1024) refuse(probe, "threads", "from 1 to 1024", threads);
}

int64_t bytes_of(const char* probe, double megabytes) {
  if (!(megabytes >= 0.0625 && megabytes <= 16384)) refuse(probe, "megabytes", "from 0.0625 to 16384", megabytes);
  return static_cast<int64_t>(megabytes * (1 << 20)) / 128 * 128;
}

// ---- timing ----

constexpr double kSample = 2e-3;  // seconds at least; short, so that some samples pass undisturbed on a busy machine
constexpr double kSeconds = 0.1;  // for all samples
constexpr double kRounds[] = {9, 50};  // at least, at most

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Where all threads wait for the last one. They yield, since there may be fewer cores.
class Gate {
 public:
  explicit Gate(int64_t threads) : threads_(threads) {}

  void pass() {
    const int64_t all = (arrived_.fetch_add(1) / threads_ + 1) * threads_;
    while (arrived_.load() < all) std::this_thread::yield();
  }

 private:
  const int64_t threads_;
  std::atomic<int64_t> arrived_{0};
};

double seconds_of(int64_t repeats, const auto& pass) {
  const double start = now();
  for (int64_t i = 0; i < repeats; ++i) pass();
  return now() - start;
}

// How many passes make a sample, and how many samples are taken.
struct Plan {
  int64_t repeats, rounds;
};

Plan plan_for(const auto& pass) {
  for (int64_t repeats = 1;; repeats *= 2) {
    const double sample = seconds_of(repeats, pass);
    if (sample >= kSample)
      return {repeats, static_cast<int64_t>(std::clamp(kSeconds / sample, kRounds[0], kRounds[1]))};
  }
}

// Passes per second of all threads together in the best sample. `prepare(i)` runs in thread i, so that memory is
// touched first by the thread that uses it, and returns the pass. A sample lasts from the first start to the last end;
// threads start once, and wait for each other outside of it.
double best_rate(int64_t threads, const auto& prepare) {
  Gate gate(threads);
  Plan plan{};
  double best = 0;
  std::vector<double> starts(threads), ends(threads);
  const auto work = [&](int64_t i) {
    const auto pass = prepare(i);
    pass();
    gate.pass();
    if (i == 0) plan = plan_for(pass);
    gate.pass();
    for (int64_t round = 0; round < plan.rounds; ++round) {
      gate.pass();
      starts[i] = now();
      ends[i] = starts[i] + seconds_of(plan.repeats, pass);
      gate.pass();
      if (i != 0) continue;  // the others write nothing before this thread has come to the next gate
      const double elapsed =
          *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
      best = std::max(best, static_cast<double>(plan.repeats * threads) / elapsed);
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  return best;
}

// ---- memory ----

// Pages that nobody has touched yet, which an allocator does not promise.
class Pages {
 public:
  explicit Pages(int64_t bytes)
      : bytes_(bytes), data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  Pages(Pages&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = MAP_FAILED; }
  Pages& operator=(Pages&&) = delete;
  ~Pages() {
    if (data_ != MAP_FAILED) munmap(data_, bytes_);
  }

  template <class T = char>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void touch() const { std::memset(data_, 1, bytes_); }

 private:
  int64_t bytes_;
  void* data_;
};

std::vector<Pages> pages_for(int64_t threads, int64_t bytes) {
  std::vector<Pages> pages;
  for (int64_t i = 0; i < threads; ++i) pages.emplace_back(bytes);
  return pages;
}

typedef uint64_t Words __attribute__((vector_size(32)));
constexpr int kLine = 64;

// Adds N consecutive vectors to as many sums, so that no load is left out.
template <int N>
__attribute__((always_inline)) inline void add(const char* data, Words (&sum)[N]) {
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    Words words;
    std::memcpy(&words, data + k * sizeof words, sizeof words);
    sum[k] += words;
  }
}

LZ_WIDE_LOADS uint64_t read_in_order(const char* data, int64_t bytes) {
  Words sum[4] = {};
  for (int64_t i = 0; i + 2 * kLine <= bytes; i += 2 * kLine) add(data + i, sum);
  sum[0] += sum[1] + sum[2] + sum[3];
  return sum[0][0] + sum[0][1] + sum[0][2] + sum[0][3];
}

// Asks for each row sixteen rows ahead: measured, twice as fast from memory as what the processor finds by itself.
LZ_WIDE_LOADS uint64_t read_rows(const char* data, const uint32_t* order, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kAhead = 16;
  Words sum[2] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const char *row = data + order[i] * row_bytes, *later = data + order[std::min(i + kAhead, rows - 1)] * row_bytes;
    for (int64_t j = 0; j < row_bytes; j += kLine) {
      __builtin_prefetch(later + j);
      add(row + j, sum);
    }
  }
  sum[0] += sum[1];
  return sum[0][0] + sum[0][1] + sum[0][2] + sum[0][3];
}

// Makes the compiler believe that a value, and memory, is looked at.
void keep(auto value) { __asm__ volatile("" : : "r"(value) : "memory"); }

double read_bandwidth(double megabytes, int64_t threads) {
  const int64_t bytes = bytes_of("read_bandwidth", megabytes);
  check_threads("read_bandwidth", threads);
  const py::gil_scoped_release release;
  const auto pages = pages_for(threads, bytes);
  const double passes = best_rate(threads, [&](int64_t i) {
    pages[i].touch();
    return [data = pages[i].as(), bytes] { keep(read_in_order(data, bytes)); };
  });
  return passes * static_cast<double>(bytes);
}

double copy_bandwidth(double megabytes, int64_t threads) {
  const int64_t bytes = bytes_of("copy_bandwidth", megabytes);
  check_threads("copy_bandwidth", threads);
  const py::gil_scoped_release release;
  const auto from = pages_for(threads, bytes), to = pages_for(threads, bytes);
  const double passes = best_rate(threads, [&](int64_t i) {
    from[i].touch();
    to[i].touch();
    // memcpy knows when it pays to write past the caches, which spares reading what is overwritten
    return [source = from[i].as(), target = to[i].as(), bytes] { keep(std::memcpy(target, source, bytes)); };
  });
  return passes * 2 * static_cast<double>(bytes);
}

double gather_bandwidth(double megabytes, int64_t threads, int64_t row_bytes) {
  const int64_t bytes = bytes_of("gather_bandwidth", megabytes);
  check_threads("gather_bandwidth", threads);
  if (row_bytes < kLine || row_bytes > 65536 || row_bytes % kLine != 0)
    refuse("gather_bandwidth", "row_bytes", "a multiple of 64 from 64 to 65536", row_bytes);
  const py::gil_scoped_release release;
  const int64_t rows = bytes / row_bytes;
  const auto pages = pages_for(threads, bytes), orders = pages_for(threads, rows * sizeof(uint32_t));
  const double passes = best_rate(threads, [&](int64_t i) {
    pages[i].touch();
    uint32_t* order = orders[i].as<uint32_t>();
    std::iota(order, order + rows, 0u);
    std::shuffle(order, order + rows, std::mt19937(static_cast<uint32_t>(i)));
    return [data = pages[i].as(), order, rows, row_bytes] { keep(read_rows(data, order, rows, row_bytes)); };
  });
  return passes * static_cast<double>(rows * row_bytes);
}

// ---- arithmetic ----

const layerzoo::ProbeKernels& probes_of(const char* probe, const std::string& isa) {
  std::string allowed, error;
  for (const char* set : {"default", "avx2", "avx512"})
    if (layerzoo::cpu_has(set)) allowed += (allowed.empty() ? "" : ", ") + std::string(set);
  if (!layerzoo::cpu_has(isa)) refuse(probe, "isa", "one that this processor has (" + allowed + ")", "'" + isa + "'");
  const layerzoo::Kernels* kernels = layerzoo::load_kernels(isa, error);
  if (!kernels) throw std::runtime_error(std::string(probe) + ": no kernels: " + error);
  return kernels->probe;
}

py::dict rates(int64_t threads, int64_t (*kernel)(bool, int64_t)) {
  constexpr int64_t kLoops = 256;  // some microseconds
  double rate[2];
  {
    const py::gil_scoped_release release;
    for (const bool f64 : {false, true})
      rate[f64] = best_rate(threads, [&](int64_t) { return [=] { kernel(f64, kLoops); }; }) *
                  static_cast<double>(kernel(f64, kLoops));
  }
  py::dict found;
  found["float32"] = rate[false];
  found["float64"] = rate[true];
  return found;
}

py::dict fma_peak(const std::string& isa, int64_t threads) {
  check_threads("fma_peak", threads);
  return rates(threads, probes_of("fma_peak", isa).multiply_add);
}

py::dict exp_rate(const std::string& isa, int64_t threads) {
  check_threads("exp_rate", threads);
  return rates(threads, probes_of("exp_rate", isa).exponentials);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "How layerzoo was built, and probes of this machine.\n\n"
      "Each probe is the best of several samples, of all threads together. `megabytes` (2**20 bytes, from 0.0625 to "
      "16384)\n"
      "is the size of each buffer, and every thread has its own; `isa` the instruction set, whose kernels lie beside\n"
      "this module. Another value than allowed is a ValueError; missing kernels are a RuntimeError.";
  m.def("compiler", [] { return __VERSION__; }, "The compiler that built the native libraries.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("megabytes") = 256, py::arg("threads") = 1,
        "Bytes per second read from a buffer, one after the other.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("megabytes") = 256, py::arg("threads") = 1,
        "Bytes per second read plus written, copying one buffer to another of its size.");
  m.def(
      "gather_bandwidth", &gather_bandwidth, py::arg("megabytes") = 256, py::arg("threads") = 1,
      py::arg("row_bytes") = 256,
      "Bytes per second read from a buffer in rows of `row_bytes` (a multiple of 64 up to 65536), each once, in random "
      "order.");
  m.def("fma_peak", &fma_peak, py::arg("isa"), py::arg("threads") = 1,
        "Operations per second by multiply-adds in registers, two for each, as {\"float32\": ..., \"float64\": ...}.");
  m.def("exp_rate", &exp_rate, py::arg("isa"), py::arg("threads") = 1,
        "Results per second of the kernels' own exp2, as {\"float32\": ..., \"float64\": ...}.");
}
