// Element types as kernels see them, without any torch header: a code, and the two 16-bit formats as plain structs.
#pragma once

#include <cstdint>

namespace layerzoo {

enum class DType : int32_t { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Runs the last argument with `T` an alias of the element type that `dtype` names.
#define LZ_DISPATCH_DTYPE(dtype, T, ...) \
  switch (dtype) {                       \
    case ::layerzoo::DType::f32: {       \
      using T = float;                   \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::layerzoo::DType::f64: {       \
      using T = double;                  \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::layerzoo::DType::bf16: {      \
      using T = ::layerzoo::BFloat16;    \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case ::layerzoo::DType::f16: {       \
      using T = ::layerzoo::Half;        \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
  }

}  // namespace layerzoo
