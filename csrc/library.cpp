// Chooses and loads the kernels of one instruction set, and tells Python (by ctypes) what it did.
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/calls.h"
#include "common/load.h"

namespace layerzoo {
namespace {

constexpr const char* kSets[] = {"avx512", "avx2", "default"};  // best first

std::mutex mutex;
std::atomic<const Kernels*> chosen{nullptr};
std::string message;

// `isa` empty: the best that the processor has and that was built.
const Kernels* choose(const std::string& isa) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!chosen) {
    message.clear();
    if (!isa.empty()) {
      chosen = load_kernels(isa, message);
    } else {
      for (const char* set : kSets) {
        std::string error;
        if ((chosen = load_kernels(set, error))) break;
        message += (message.empty() ? "" : "; ") + error;
      }
    }
  }
  return chosen;
}

std::map<std::string, std::atomic<int64_t>>& counters() {
  static std::map<std::string, std::atomic<int64_t>> map;
  return map;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen;
  if (!table && !(table = choose(""))) throw std::runtime_error("layerzoo: no kernels: " + message);
  return *table;
}

CallCounter::CallCounter(const char* op) : count_(counters()[op]) {}

}  // namespace layerzoo

#define LZ_EXPORT extern "C" __attribute__((visibility("default")))

// Loads the kernels of `isa` ("" for the best) unless some are loaded. Returns the name of the set in use, or null.
LZ_EXPORT const char* layerzoo_select(const char* isa) {
  const layerzoo::Kernels* table = layerzoo::choose(isa);
  return table ? table->isa : nullptr;
}

// Why the last `layerzoo_select` returned null.
LZ_EXPORT const char* layerzoo_error() { return layerzoo::message.c_str(); }

LZ_EXPORT int layerzoo_cpu_has(const char* isa) { return layerzoo::cpu_has(isa); }

// How often the kernel of `op` ran in this process.
LZ_EXPORT int64_t layerzoo_calls(const char* op) {
  const auto found = layerzoo::counters().find(op);
  return found == layerzoo::counters().end() ? 0 : found->second.load();
}
