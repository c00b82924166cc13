// Finds the kernels of an instruction set: in a library of its own, beside the one that this is compiled into.
#pragma once

#include <dlfcn.h>

#include <string>

#include "../kernels.h"

namespace layerzoo {

inline bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && cpu_has("avx2");
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == "default";
}

// Null where the processor has no such set, or the library does not load; then `error` says why.
inline const Kernels* load_kernels(const std::string& isa, std::string& error) {
  if (!cpu_has(isa)) {
    error = "this processor has no " + isa;
    return nullptr;
  }
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&load_kernels), &info);
  const std::string self = info.dli_fname;
  const std::string path = self.substr(0, self.find_last_of('/') + 1) + "_cpu_" + isa + ".so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* symbol = library ? dlsym(library, "layerzoo_kernels") : nullptr;
  if (!symbol) {
    error = dlerror();
    return nullptr;
  }
  return reinterpret_cast<const Kernels* (*)()>(symbol)();
}

}  // namespace layerzoo
