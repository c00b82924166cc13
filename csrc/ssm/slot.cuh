// Rows of a pool of states, as the ops that work in place on it find them.
#pragma once

#include "../common/launch.h"

namespace layerzoo {

// Which row of a pool of states row b of the batch has, for kernels that cannot raise an error: below 0 there is none
// and the output is 0; a row that is no row of the pool gives NaN, so that the mistake is seen, and touches nothing.
template <class S>
struct Slot {
  int64_t row;
  bool exists;
  S instead;  // the output where there is no such row

  LZ_DEVICE Slot(const Ids& slots, int64_t b, int64_t rows)
      : row(slots.data ? load_id(slots, b, 0) : b), exists(row >= 0 && row < rows), instead(row < 0 ? S(0) : S(NAN)) {}
};

}  // namespace layerzoo
