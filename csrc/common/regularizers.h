#pragma once
// Regularisers: what a forward difference contributes to the loss and to the gradient.
#include "common/macros.h"

namespace fastreg {

enum class Norm : int { l1, l2 };

// V is a number or a vector of numbers.
template <Norm norm, class V>
FASTREG_HD V penalty(V d) {
  if constexpr (norm == Norm::l2)
    return d * d;
  else
    return d < 0 ? -d : d;
}

// d penalty / dd. l1: 0 at 0, and at NaN as in torch.abs (the loss says NaN already).
template <Norm norm, class V>
FASTREG_HD V penalty_slope(V d) {
  const V one = V{} + 1;
  if constexpr (norm == Norm::l2)
    return d + d;
  else
    return d > 0 ? one : d < 0 ? -one : V{};
}

}  // namespace fastreg
