#pragma once
// exp of a vector of arguments <= 0. Kernel pass only, as cpu/vector.h.
#include <cmath>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Within 2 ulp; 0 below -87 (where exp nears the smallest normal number); NaN stays NaN.
// exp(x) = 2^n exp(r), n the nearest integer to x / ln 2, |r| <= ln 2 / 2, exp(r) by a polynomial of
// degree 7.
FASTREG_HD Vector<float> exp_nonpositive(Vector<float> x) {
  using V = Vector<float>;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const V zero = {}, least = zero - 87.0f;
  const V bounded = x < least ? least : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then is the low bits of the sum.
  const V shifted = bounded * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const V power = (V)(((Bits)shifted << 23) + (127 << 23));
  return x < least ? zero : p * power;
}

FASTREG_HD Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
