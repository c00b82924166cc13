// The emulator's runtime: fibres, schedules, shared memory, and the checks of two builds.
//
// 1. Everything with -fsanitize=address,undefined: a program of its own; AddressSanitizer sees the bounds of heap
//    buffers and of shared variables, which lie in a poisoned arena.
// 2. Kernels with -fsanitize=thread, this file without, and libtsan not linked: the hooks below, under the names that
//    g++ calls, keep a shadow of every registered array. They see what ASan does not: races within and across blocks,
//    reads of undefined elements, writes to inputs, outputs never written.
//
// A race is a write and another access by two threads that nothing orders: __syncthreads orders the threads of a
// block, __syncwarp the lanes of its mask, shuffles order nothing, and two atomics never race.
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
constexpr bool kShadow = false;
#else
#define ASAN(...)
constexpr bool kShadow = true;
#endif

namespace emu {
namespace {

constexpr size_t kStack = 256 << 10, kMaxThreads = 1024, kArena = 64 << 10, kSharedLimit = 48 << 10, kRedZone = 256;
constexpr unsigned kWarp = 32;

struct Fibre {
  jmp_buf point;
  bool started;
  enum { kReady, kBlock, kWarpLanes, kDone } state;
  const char* file;  // of the barrier that it waits at
  int line;
  unsigned mask, source;
  bool ordered;
  uint64_t value;
  uint16_t clock[kWarp];  // the last step of each lane of its warp that is ordered before now
};

struct Touch {         // an access of the past
  uint32_t block = 0;  // serial number over all launches
  uint32_t epoch = 0;  // barriers of the block before it
  uint16_t thread = 0, clock = 0;
  bool atomic = false;
};

struct Cell {
  Touch write, read[2];  // the last reads of two different threads: one of them is not the next writer
  bool defined = false;
};

struct Array {
  std::string name;
  uintptr_t base;
  size_t bytes;
  unsigned element;
  Access access;
  const void* key;  // of a shared variable, else null
  std::vector<Cell> cells;
};

// Shared state; one launch at a time.
std::vector<Array> arrays;
std::unique_ptr<Fibre[]> fibres;
char* stacks = nullptr;
alignas(256) char arena[kArena];
size_t arena_used, shared_used, dynamic_size;
jmp_buf scheduler;
int current = -1;  // the thread that runs
unsigned threads;
dim3 grid_dim, block_dim, block_at;
uint32_t block_serial = 0, first_serial = 0, epoch;
uint64_t schedule_seed = 0;
std::mt19937_64 random_bits;
std::string error;
void (*kernel_call)(void*);
void* kernel_arguments;
size_t kernel_argument_bytes;

dim3 index_of(unsigned t) { return {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y}; }

std::string text(dim3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

// setcontext gives a fibre its stack; after that _longjmp, which makes no system call, switches.
ASAN(const void* host_stack; size_t host_stack_size;)

// Switches to the scheduler, which comes back when the fibre's turn does.
void leave() {
  ASAN(void* fake = nullptr;)
  if (_setjmp(fibres[current].point) == 0) {
    ASAN(__sanitizer_start_switch_fiber(&fake, host_stack, host_stack_size);)
    _longjmp(scheduler, 1);
  }
  ASAN(__sanitizer_finish_switch_fiber(fake, &host_stack, &host_stack_size);)
}

void fibre_main() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);)
  for (;;) {
    kernel_call(kernel_arguments);
    fibres[current].state = Fibre::kDone;
    leave();
  }
}

void resume(unsigned t) {
  Fibre& f = fibres[t];
  current = static_cast<int>(t);
  f.state = Fibre::kReady;
  ASAN(void* fake = nullptr;)
  if (_setjmp(scheduler) == 0) {
    ASAN(__sanitizer_start_switch_fiber(&fake, stacks + t * kStack, kStack);)
    if (f.started) _longjmp(f.point, 1);
    f.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks + t * kStack, 0, kStack};
    makecontext(&context, fibre_main, 0);
    setcontext(&context);
  }
  ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  current = -1;
}

// Hooks must not throw through kernel frames: the fibre stops for good and the scheduler throws.
void fail(std::string&& message) {
  error = std::move(message);
  leave();
}

void order(std::vector<unsigned>& turn) {
  std::sort(turn.begin(), turn.end());
  if (schedule_seed == 1) std::reverse(turn.begin(), turn.end());
  if (schedule_seed > 1) std::shuffle(turn.begin(), turn.end(), random_bits);
}

bool same_barrier(const Fibre& a, const Fibre& b) { return a.line == b.line && a.file == b.file; }

// The lanes in the mask of `first`, a thread at a warp barrier, if all of them have come.
std::vector<unsigned> complete_warp(unsigned first) {
  const Fibre& f = fibres[first];
  std::vector<unsigned> lanes;
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned t = first / kWarp * kWarp + i;
    if (!(f.mask >> i & 1) || t >= threads) continue;
    const Fibre& other = fibres[t];
    if (other.state != Fibre::kWarpLanes || other.mask != f.mask || !same_barrier(other, f)) return {};
    lanes.push_back(t);
  }
  return lanes;
}

void pass_warp(const std::vector<unsigned>& lanes) {
  uint64_t values[kWarp] = {};
  uint16_t joint[kWarp] = {};
  for (unsigned t : lanes) {
    values[t % kWarp] = fibres[t].value;
    for (unsigned i = 0; i < kWarp; ++i) joint[i] = std::max(joint[i], fibres[t].clock[i]);
  }
  for (unsigned t : lanes) {
    Fibre& f = fibres[t];
    const unsigned source = f.source % kWarp;
    if (!(f.mask >> source & 1) || t / kWarp * kWarp + source >= threads)
      throw std::runtime_error("shuffle: thread " + text(index_of(t)) + " reads lane " + std::to_string(source) +
                               ", which takes no part");
    f.value = values[source];
    f.state = Fibre::kReady;
    if (!f.ordered) continue;
    std::copy(joint, joint + kWarp, f.clock);
    ++f.clock[t % kWarp];
  }
}

void start_epoch() {
  ++epoch;
  for (unsigned t = 0; t < threads; ++t) {
    fibres[t].state = Fibre::kReady;
    std::fill(fibres[t].clock, fibres[t].clock + kWarp, uint16_t(0));
    fibres[t].clock[t % kWarp] = 1;
  }
}

// The threads that may go on, once all have stopped; none where the block has finished.
std::vector<unsigned> release() {
  std::vector<unsigned> ready;
  std::map<std::string, std::vector<unsigned>> places;
  for (unsigned t = 0; t < threads; ++t) {
    const Fibre& f = fibres[t];
    if (f.state == Fibre::kWarpLanes) {
      const auto lanes = complete_warp(t);
      if (!lanes.empty()) pass_warp(lanes);
      ready.insert(ready.end(), lanes.begin(), lanes.end());
    }
  }
  if (!ready.empty()) return ready;
  for (unsigned t = 0; t < threads; ++t) {
    const Fibre& f = fibres[t];
    const std::string place = f.state == Fibre::kDone ? "the end of the kernel"
                              : f.state == Fibre::kBlock
                                  ? std::string(f.file) + ":" + std::to_string(f.line)
                                  : std::string(f.file) + ":" + std::to_string(f.line) + " (warp)";
    places[place].push_back(t);
  }
  const auto& [place, all] = *places.begin();
  if (places.size() == 1 && fibres[0].state == Fibre::kDone) return {};
  if (places.size() == 1 && fibres[0].state == Fibre::kBlock) {
    ready = all;
    start_epoch();
    return ready;
  }
  std::string message = "barrier not met by all:";
  for (const auto& [where, who] : places)
    message += " " + std::to_string(who.size()) + " threads, " + text(index_of(who[0])) + " first, at " + where + ";";
  throw std::runtime_error(message);
}

void clear_shared() {
  arrays.erase(std::remove_if(arrays.begin(), arrays.end(), [](const Array& a) { return a.key; }), arrays.end());
  ASAN(__asan_unpoison_memory_region(arena, kArena);)
  std::memset(arena, 0xff, kArena);  // NaN in every floating-point type
  ASAN(__asan_poison_memory_region(arena, kArena);)
  arena_used = shared_used = 0;
}

void run_block(dim3 at) {
  block_at = at;
  ++block_serial;
  epoch = 0;
  clear_shared();
  start_epoch();
  std::vector<unsigned> turn(threads);
  std::iota(turn.begin(), turn.end(), 0u);
  while (!turn.empty()) {
    order(turn);
    for (unsigned t : turn) {
      resume(t);
      if (!error.empty()) throw std::runtime_error(error);
    }
    turn = release();
  }
}

void make_fibres() {
  if (!stacks) {
    void* p =
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for stacks");
    stacks = static_cast<char*>(p);
  }
  ASAN(__asan_unpoison_memory_region(stacks, kStack * threads);)  // fibres stopped by an error left their frames
  fibres = std::make_unique<Fibre[]>(threads);
}

// The block's own past, and all launches before this one, are ordered before now where a barrier says so.
bool ordered(const Touch& past) {
  const Fibre& f = fibres[current];
  const unsigned me = static_cast<unsigned>(current);
  if (past.block < first_serial || (past.block == block_serial && (past.thread == me || past.epoch < epoch)))
    return true;
  return past.block == block_serial && past.thread / kWarp == me / kWarp && past.clock <= f.clock[past.thread % kWarp];
}

std::string describe(const Array& a, uintptr_t address, size_t bytes) {
  const auto offset = static_cast<intptr_t>(address - a.base), element = static_cast<intptr_t>(a.element);
  return std::to_string(bytes) + " bytes at " + a.name + "[" + std::to_string(offset / element) + "] of " +
         std::to_string(a.bytes / a.element);
}

std::string who(unsigned thread) { return "thread " + text(index_of(thread)) + " of block " + text(block_at); }

void race(const Array& a, uintptr_t address, size_t bytes, bool write, const Touch& past, bool past_write) {
  fail("race: " + who(current) + (write ? " writes " : " reads ") + describe(a, address, bytes) + ", which " +
       (past.block == block_serial ? "thread " + text(index_of(past.thread)) : std::string("another block")) +
       (past_write ? " wrote" : " read") + " with no barrier between");
}

void touch_cell(const Array& a, Cell& cell, uintptr_t address, size_t bytes, bool write, bool atomic) {
  const Touch now{block_serial, epoch, static_cast<uint16_t>(current), fibres[current].clock[current % kWarp], atomic};
  if ((!write || atomic) && !cell.defined)
    return fail("undefined: " + who(current) + " reads " + describe(a, address, bytes) + " before it is written");
  if (!ordered(cell.write) && !(atomic && cell.write.atomic)) return race(a, address, bytes, write, cell.write, true);
  if (write) {
    for (const Touch& past : cell.read)
      if (!ordered(past) && !(atomic && past.atomic)) return race(a, address, bytes, write, past, false);
    cell.write = now;
    cell.defined = true;
  } else {
    if (cell.read[0].block != now.block || cell.read[0].thread != now.thread) cell.read[1] = cell.read[0];
    cell.read[0] = now;
  }
}

void touch(uintptr_t address, size_t bytes, bool write, bool atomic = false) {
  if (current < 0) return;  // the host's own code
  if (address - reinterpret_cast<uintptr_t>(stacks + current * kStack) < kStack) return;
  if (address - reinterpret_cast<uintptr_t>(kernel_arguments) < kernel_argument_bytes) return;
  for (Array& a : arrays) {
    if (address < a.base || address + bytes > a.base + a.bytes) continue;
    if (write && a.access == kInput)
      return fail("read-only: " + who(current) + " writes " + describe(a, address, bytes));
    const size_t first = (address - a.base) / a.element, last = (address + bytes - 1 - a.base) / a.element;
    for (size_t i = first; i <= last; ++i) touch_cell(a, a.cells[i], address, bytes, write, atomic);
    return;
  }
  const auto far = [&](const Array& a) {
    const uintptr_t end = a.base + a.bytes;
    return address < a.base ? a.base - address : address < end ? 0 : address - end;
  };
  const auto nearest =
      std::min_element(arrays.begin(), arrays.end(), [&](const Array& a, const Array& b) { return far(a) < far(b); });
  fail("out of bounds: " + who(current) + (write ? " writes " : " reads ") +
       (nearest == arrays.end() ? "memory of no array" : describe(*nearest, address, bytes)));
}

}  // namespace

void array(const char* name, const void* data, size_t bytes, unsigned element, Access access) {
  if (!kShadow || bytes == 0) return;
  arrays.push_back({name, reinterpret_cast<uintptr_t>(data), bytes, element, access, nullptr, {}});
  arrays.back().cells.resize(bytes / element);
  for (Cell& cell : arrays.back().cells) cell.defined = access != kOutput;
}

void reset(uint64_t seed) {
  arrays.clear();
  error.clear();
  schedule_seed = seed;
  random_bits.seed(seed);
}

void check_written() {
  for (const Array& a : arrays)
    for (size_t i = 0; i < a.cells.size() && !a.key; ++i)
      if (!a.cells[i].defined) throw std::runtime_error(a.name + "[" + std::to_string(i) + "] was never written");
}

dim3 thread_index() { return index_of(static_cast<unsigned>(current)); }
dim3 block_index() { return block_at; }
dim3 block_size() { return block_dim; }
dim3 grid_size() { return grid_dim; }
unsigned lane() { return static_cast<unsigned>(current) % kWarp; }

void* shared_memory(const void* key, const char* name, size_t bytes, unsigned element) {
  for (const Array& a : arrays)
    if (a.key == key) return reinterpret_cast<void*>(a.base);
  if ((shared_used += bytes) > kSharedLimit)
    fail("shared memory: " + std::string(name) + " exceeds the block's 48 KiB");
  char* base = arena + arena_used + kRedZone;
  arena_used += (bytes + 2 * kRedZone - 1) / kRedZone * kRedZone;
  ASAN(__asan_unpoison_memory_region(base, bytes);)
  arrays.push_back({name, reinterpret_cast<uintptr_t>(base), bytes, element, kOutput, key, {}});
  arrays.back().cells.resize(bytes / element);
  return base;
}

void* dynamic_shared_memory(const char* name, unsigned element) {
  static const char key = 0;
  return shared_memory(&key, name, dynamic_size, element);
}

void block_barrier(const char* file, int line) {
  Fibre& f = fibres[current];
  f.state = Fibre::kBlock, f.file = file, f.line = line;
  leave();
}

uint64_t warp_barrier(unsigned mask, bool ordered, uint64_t value, unsigned source, const char* file, int line) {
  Fibre& f = fibres[current];
  if (!(mask >> lane() & 1)) fail("warp barrier: " + who(current) + " is not in its own mask");
  f.state = Fibre::kWarpLanes, f.file = file, f.line = line;
  f.mask = mask, f.ordered = ordered, f.value = value, f.source = source;
  leave();
  return f.value;
}

void atomic_access(void* address, size_t bytes) {
  if (kShadow) touch(reinterpret_cast<uintptr_t>(address), bytes, true, true);
}

void run(dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(void*), void* arguments, size_t bytes) {
  grid_dim = grid, block_dim = block, dynamic_size = dynamic_bytes;
  threads = block.x * block.y * block.z;
  kernel_call = call, kernel_arguments = arguments, kernel_argument_bytes = bytes;
  first_serial = block_serial + 1;
  try {
    if (threads == 0 || threads > kMaxThreads) throw std::runtime_error("launch: a block has 1 to 1024 threads");
    make_fibres();
    std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    order(blocks);
    for (unsigned i : blocks) run_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
    clear_shared();
  } catch (const std::exception& e) {
    throw std::runtime_error(e.what() + std::string(" [seed ") + std::to_string(schedule_seed) + "]");
  }
}

}  // namespace emu

extern "C" void emu_reset(uint64_t seed) { emu::reset(seed); }

extern "C" void emu_array(const char* name, const void* data, size_t bytes, unsigned element, int access) {
  emu::array(name, data, bytes, element, static_cast<emu::Access>(access));
}

#if !defined(__SANITIZE_ADDRESS__)

#define HOOKS(bytes)                                                                                       \
  void __tsan_read##bytes(void* p) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, false); }           \
  void __tsan_write##bytes(void* p) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, true); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emu::touch(reinterpret_cast<uintptr_t>(p), bytes, true); }
void __tsan_init() {}
}

#endif
