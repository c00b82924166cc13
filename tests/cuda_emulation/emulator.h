// What kernels see of the emulator: the macros of csrc/common/launch.h and CUDA's thread functions, for g++.
//
// Each thread of a block is a fibre; blocks run one after another. A fibre runs until it meets a barrier, so that an
// order of fibres between barriers is a schedule: ascending (seed 0), descending (seed 1) or random (any other seed).
// What is checked, and in which build, is told in emulator.cpp.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define LZ_KERNEL(threads) __attribute__((noinline)) void
#define LZ_DEVICE inline
#define LZ_UNROLL
#define LZ_UNROLL_4
#define LZ_SHARED(name, ...)                 \
  using name##_shared = __VA_ARGS__;         \
  static const char name##_key = 0;          \
  auto& name = *static_cast<name##_shared*>( \
      emu::shared_memory(&name##_key, #name, sizeof(name##_shared), sizeof(std::remove_all_extents_t<name##_shared>)))
#define LZ_DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(emu::dynamic_shared_memory(#name, sizeof(__VA_ARGS__)))
#define LZ_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), emu::launch(kernel, grid, block, bytes, __VA_ARGS__))
#define LZ_STREAM void*

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// Inputs are read-only; outputs start undefined and must be written throughout.
enum Access { kInput, kOutput, kInPlace };

// Global memory that kernels may touch; `element` is the grain of the checks in bytes.
void array(const char* name, const void* data, size_t bytes, unsigned element, Access access);
// Forgets the arrays and starts the schedule of `seed`.
void reset(uint64_t seed);
// Throws where an output has an element that no kernel wrote.
void check_written();

dim3 thread_index() __attribute__((const));
dim3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));
unsigned lane() __attribute__((const));

void* shared_memory(const void* key, const char* name, size_t bytes, unsigned element);
void* dynamic_shared_memory(const char* name, unsigned element);
void block_barrier(const char* file, int line);
// The barrier of the lanes in `mask`; each gives a value and gets that of lane `source`. `ordered`: memory too.
uint64_t warp_barrier(unsigned mask, bool ordered, uint64_t value, unsigned source, const char* file, int line);
void atomic_access(void* address, size_t bytes);
void run(dim3 grid, dim3 block, size_t dynamic_bytes, void (*call)(void*), void* arguments, size_t bytes);

// Errors are thrown as std::runtime_error naming the seed. Arguments are converted and copied as a launch does it.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, A&&... arguments) {
  struct Launch {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } launch{kernel, std::tuple<P...>(arguments...)};
  const auto call = [](void* p) { std::apply(static_cast<Launch*>(p)->kernel, static_cast<Launch*>(p)->arguments); };
  run(grid, block, dynamic_bytes, call, &launch, sizeof launch);
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = warp_barrier(mask, false, bits, source, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())

#define LZ_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LZ_HERE) { emu::block_barrier(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffff, LZ_HERE) {
  emu::warp_barrier(mask, true, 0, emu::lane(), file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, unsigned width = 32, LZ_HERE) {
  const unsigned lane = emu::lane();
  return emu::shuffle(mask, value, lane / width * width + source % width, file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, unsigned width = 32, LZ_HERE) {
  const unsigned lane = emu::lane();
  return emu::shuffle(mask, value, lane % width >= delta ? lane - delta : lane, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, unsigned width = 32, LZ_HERE) {
  const unsigned lane = emu::lane();
  return emu::shuffle(mask, value, lane % width + delta < width ? lane + delta : lane, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned flip, unsigned width = 32, LZ_HERE) {
  const unsigned lane = emu::lane(), source = lane ^ flip;
  return emu::shuffle(mask, value, source / width <= lane / width ? source : lane, file, line);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, LZ_HERE) {
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) same |= unsigned(emu::shuffle(mask, value, i, file, line) == value) << i;
  return same;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  emu::atomic_access(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}
