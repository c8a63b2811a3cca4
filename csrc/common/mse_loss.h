#pragma once
// Masked squared differences (FORMULAS: mse_loss).
#include "common/macros.h"

namespace fastreg {

// What is masked out counts as 0 even where it is not finite; a NaN weight is NaN. V: a number or a vector.
template <class V>
FASTREG_HD V masked(V mask, V value) {
  return mask <= 0 ? V{} : mask * value;
}

}  // namespace fastreg
