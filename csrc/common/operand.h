// A tensor argument as kernels see it: (batch, channel, time) by pointer, element type and strides in elements.
#pragma once

#include "dtype.h"

namespace layerzoo {

struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, channel = 0, time = 0;  // a stride may be 0 (expanded) or negative (time reversed)

  int64_t at(int64_t b, int64_t c, int64_t t) const { return b * batch + c * channel + t * time; }
  explicit operator bool() const { return data != nullptr; }
};

// A tensor of ids, (batch, time) or (batch); `wide`: int64, else int32.
struct Ids {
  const void* data = nullptr;
  int64_t batch = 0, time = 0;
  bool wide = false;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace layerzoo
