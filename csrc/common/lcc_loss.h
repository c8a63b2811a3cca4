#pragma once
// LCC of one window from its sums, and the derivatives of LCC by the window's variances and covariance
// (docs/formulas.md: LCC).
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

enum class Denominator : int { product, clamp, each };

struct LccRule {
  double smooth_nr, smooth_dr;
  double tau;  // a variance below tau times the largest second moment seen is rounding: the window counts as
               // flat
};

// What every kernel of a call is told.
struct LccCall {
  const void *fixed, *moved;  // (n c, *spatial)
  const void* mask;           // (n, *spatial), arithmetic type, or null
  const void* upstream;  // (n, *spatial), arithmetic type: what the loss map is multiplied by, or null (the
                         // mask, or 1)
  void* map;             // (n c, *spatial), arithmetic type: -LCC / c, or null
  void *grad_fixed, *grad_moved;  // (n c, *spatial), arithmetic type: of the sum of upstream * -LCC, or null
  int64_t n, c;
  bool valid, squared;
  Denominator denominator;
  LccRule rule;
  double least;  // weight below which a window counts as empty
};

// Maps that the gradients need: e, and for each image what multiplies it and the sum with the means.
FASTREG_HD int lcc_adjoints(const LccCall& a) {
  return a.grad_fixed && a.grad_moved ? 5 : a.grad_fixed || a.grad_moved ? 3 : 0;
}

template <class A>
struct LccTerms {
  A value;             // LCC, at most 1
  A by_v, by_w, by_c;  // its derivatives by the two variance sums and the covariance sum
};

// v, w, c: variance sums of fixed and moved and their covariance sum, all 0 where the window is flat.
// Without branches but on the options: the CPU loop around it vectorises.
template <class A>
FASTREG_HD LccTerms<A> lcc_terms(Denominator kind, bool squared, A v, A w, A c, A smooth_nr, A smooth_dr) {
  A denominator, denominator_by_v, denominator_by_w;
  if (kind == Denominator::product) {
    denominator = v * w + smooth_dr, denominator_by_v = w, denominator_by_w = v;
  } else if (kind == Denominator::each) {
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
  if (squared) {
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

// Known when compiled.
template <Denominator kDenominator, bool kSquared, class A>
FASTREG_HD LccTerms<A> lcc_terms(A v, A w, A c, A smooth_nr, A smooth_dr) {
  return lcc_terms(kDenominator, kSquared, v, w, c, smooth_nr, smooth_dr);
}

// Sums over a window of the samples inside the image less a shift, and of their products.
template <class A>
struct LccSums {
  A f, m, ff, mm, fm;
};

// A window and what it passes back: d LCC / d f_q = a (f_q - mean_f) + e (m_q - mean_m), and b (m_q - mean_m)
// + e (f_q - mean_f) for m_q, times the weight of sample q. Means are relative to the shift.
template <class A>
struct LccWindow {
  A value, e, a, b, mean_f, mean_m;
  bool finite;  // if not, the window holds a sample that is not, or the product of its variances overflows
};

// `inside` and `outside`: weight of the samples inside the image and of the padded zeros, which stand for
// -shift each. Their share of the variance is added as that between two groups: subtracting the means of all
// samples from all sums, equal in exact arithmetic, cancels where the shift is far from 0.
template <class A>
FASTREG_HD LccWindow<A> lcc_window(const LccSums<A>& s, A inside, A outside, A shift_f, A shift_m, A least,
                                   Denominator kind, bool squared, const LccRule& rule) {
  const A per_inside = inside > A(0) ? A(1) / inside : A(0);
  A mean_f = s.f * per_inside, mean_m = s.m * per_inside;
  A v = s.ff - s.f * mean_f, w = s.mm - s.m * mean_m, c = s.fm - s.f * mean_m, ff = s.ff, mm = s.mm;
  if (outside > A(0)) {
    const A share = outside / (inside + outside), between = inside * share;
    const A f = mean_f + shift_f, m = mean_m + shift_m;
    v += between * f * f, w += between * m * m, c += between * f * m;
    ff += outside * shift_f * shift_f, mm += outside * shift_m * shift_m;
    mean_f -= share * f, mean_m -= share * m;
  }
  const bool counted = inside + outside >= least;
  const bool resolved = v > A(rule.tau) * ff && w > A(rule.tau) * mm && counted;
  v = resolved ? v : A(0), w = resolved ? w : A(0), c = resolved ? c : A(0);
  const A probe = (s.ff + s.mm + inside + v * w) * A(0);
  const A nr = A(rule.smooth_nr), dr = A(rule.smooth_dr);
  const LccTerms<A> t = lcc_terms(kind, squared, v, w, c, nr, dr);
  const A pass = resolved ? A(1) : A(0);
  return {counted ? t.value : A(0),
          pass * t.by_c,
          pass * A(2) * t.by_v,
          pass * A(2) * t.by_w,
          mean_f,
          mean_m,
          probe == A(0)};
}

}  // namespace fastreg
