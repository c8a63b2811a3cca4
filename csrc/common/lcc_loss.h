#pragma once
// LCC of one window from its sums, and the derivatives of LCC by the window's variances and covariance
// (FORMULAS: LCC).
#include <cmath>

#include "common/macros.h"

namespace fastreg {

enum class Denominator : int { product, clamp, each };

struct LccRule {
  double smooth_nr, smooth_dr;
  double tau;  // a variance below tau times the largest second moment seen is rounding: the window counts as
               // flat
};

template <class A>
struct LccTerms {
  A value;             // LCC, at most 1
  A by_v, by_w, by_c;  // its derivatives by the two variance sums and the covariance sum
};

// v, w, c: variance sums of fixed and moved and their covariance sum, all 0 where the window is flat.
// Written without branches: the CPU loop around it vectorises.
template <Denominator kDenominator, bool kSquared, class A>
FASTREG_HD LccTerms<A> lcc_terms(A v, A w, A c, A smooth_nr, A smooth_dr) {
  A denominator, denominator_by_v, denominator_by_w;
  if constexpr (kDenominator == Denominator::product) {
    denominator = v * w + smooth_dr, denominator_by_v = w, denominator_by_w = v;
  } else if constexpr (kDenominator == Denominator::each) {
    denominator_by_v = w + smooth_dr, denominator_by_w = v + smooth_dr;
    denominator = denominator_by_v * denominator_by_w;
  } else {
    const A floored_v = v > smooth_dr ? v : smooth_dr, floored_w = w > smooth_dr ? w : smooth_dr;
    denominator = floored_v * floored_w;
    denominator_by_v = v > smooth_dr ? floored_w : A(0), denominator_by_w = w > smooth_dr ? floored_v : A(0);
  }
  const bool positive = denominator > A(0);
  const A inverse = positive ? A(1) / (positive ? denominator : A(1)) : A(0);
  A value, by_c, common;
  if constexpr (kSquared) {
    value = (c * c + smooth_nr) * inverse;
    by_c = A(2) * c * inverse;
    common = -value * inverse;
  } else {
    by_c = std::sqrt(inverse);
    value = c * by_c;
    common = A(-0.5) * value * inverse;
  }
  const bool below = value <= A(1);
  const A pass = below ? A(1) : A(0);
  return {below ? value : A(1), pass * common * denominator_by_v, pass * common * denominator_by_w,
          pass * by_c};
}

}  // namespace fastreg
