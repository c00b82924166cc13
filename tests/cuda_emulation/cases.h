// What the emulated ops share: a function for ctypes that returns the error, and under AddressSanitizer a program that
// reads its cases from a file, so that both builds run the same cases against the same oracle (see cases.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "emulator.h"

// LZ_DISPATCH_DTYPE; with LZ_FLOAT_ONLY, which altered kernels are compiled with to save time, of float alone.
#ifdef LZ_FLOAT_ONLY
#define EMU_DISPATCH(dtype, T, ...) \
  {                                 \
    using T = float;                \
    __VA_ARGS__;                    \
  }
#else
#define EMU_DISPATCH LZ_DISPATCH_DTYPE
#endif

namespace emu {

static std::string message;

// Runs launches; returns the error, or "".
template <class F>
const char* run_checked(const F& launches) {
  message.clear();
  try {
    launches();
    check_written();
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

using Function = const char* (*)(const void* arguments, int64_t max_blocks);

// In the file, for each case: function, seed, bytes of the arguments, arrays; for each array its address in the
// arguments (or of an element of it), bytes and access; the arguments; the arrays. Written back to the second file: the
// arrays that are no input.
inline int run_cases(char** argv, std::initializer_list<Function> functions) {
  std::FILE* in = std::fopen(argv[1], "rb");
  std::FILE* out = std::fopen(argv[2], "wb");
  const auto read = [in](void* p, size_t bytes) { return bytes == 0 || std::fread(p, bytes, 1, in) == 1; };
  int64_t head[4];
  while (read(head, sizeof head)) {
    std::vector<int64_t> arrays(3 * head[3]), arguments(head[2] / 8);
    std::vector<char*> data;
    bool whole = read(arrays.data(), arrays.size() * 8) && read(arguments.data(), head[2]);
    for (int64_t i = 0; i < head[3]; ++i) {
      data.push_back(new char[arrays[3 * i + 1]]);  // of exactly this size, so that ASan sees its end
      whole = whole && read(data.back(), arrays[3 * i + 1]);
    }
    for (int64_t& word : arguments)
      for (int64_t i = 0; i < head[3]; ++i)
        if (word != 0 && word >= arrays[3 * i] && word - arrays[3 * i] < std::max<int64_t>(arrays[3 * i + 1], 1)) {
          word += reinterpret_cast<int64_t>(data[i]) - arrays[3 * i];
          break;
        }
    emu::reset(head[1]);
    const char* error = whole ? functions.begin()[head[0]](arguments.data(), 3) : "the file is cut short";
    if (*error) return std::fprintf(stderr, "%s\n", error), 1;
    for (int64_t i = 0; i < head[3]; ++i)
      if (arrays[3 * i + 2] != kInput) std::fwrite(data[i], 1, arrays[3 * i + 1], out);
    for (char* p : data) delete[] p;
  }
  return std::fclose(in) | std::fclose(out);
}

}  // namespace emu
