#pragma once
// Division of block numbers by what the host knows: a multiplication and a shift.
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

// Of numbers below 2^31, by 1 <= d < 2^31. With 2^s >= d and factor = ceil(2^(31 + s) / d) the quotient is
// exact: n factor / 2^(31 + s) exceeds n / d by less than 1 / d.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t d) : d_(uint32_t(d)) {
    while ((int64_t(1) << (shift_ - 31)) < d) ++shift_;
    factor_ = uint32_t(((uint64_t(1) << shift_) + uint64_t(d) - 1) / uint64_t(d));
  }

  // The quotient; `n` becomes the remainder.
  FASTREG_HD uint32_t divide(uint32_t& n) const {
    const uint32_t quotient = uint32_t((uint64_t(n) * factor_) >> shift_);
    n -= quotient * d_;
    return quotient;
  }

 private:
  uint32_t d_ = 1, factor_ = uint32_t(1) << 31;
  int shift_ = 31;
};

}  // namespace fastreg
