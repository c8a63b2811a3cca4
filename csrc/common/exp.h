#pragma once
// 2^x for vectors and single numbers alike, so that loops over voxels stay in registers. V is float,
// double or a GCC vector of either. For weights exp(-d): what overflows is not looked after.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"

namespace fastreg {

template <class V>
struct Lane {
  using type = std::remove_reference_t<decltype(V{}[0])>;
  using bits = decltype(V{} < V{});  // signed integers as wide as V's
};
template <>
struct Lane<float> {
  using type = float;
  using bits = int32_t;
};
template <>
struct Lane<double> {
  using type = double;
};

// fp64 goes through the library, lane by lane.
template <double (*function)(double), class V>
FASTREG_HD V lane_by_lane(V x) {
  double lanes[sizeof(V) / sizeof(double)];
  std::memcpy(lanes, &x, sizeof(V));
  for (double& lane : lanes) lane = function(lane);
  std::memcpy(&x, lanes, sizeof(V));
  return x;
}

// Adding it leaves the nearest integer in the low bits of the sum.
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23

// 2^(n + f), n = rounded - kRoundToInteger in [-127, 127], |f| <= 1/2: a polynomial of least relative error
// (2e-9) times the power that n is in an exponent's bits, where -127 means 0.
template <class V>
FASTREG_HD V exp2_parts(V rounded, V f) {
  // By pairs of terms: the chain of dependent operations, not their number, is what takes the time.
  const V ff = f * f, c12 = 6.931472029e-1f + 2.402264791e-1f * f,
          c34 = 5.550332471e-2f + 9.618437353e-3f * f, c56 = 1.339887443e-3f + 1.535336289e-4f * f;
  const V p = 1.0f + f * (c12 + ff * (c34 + ff * c56));
  typename Lane<V>::bits bits;
  std::memcpy(&bits, &rounded, sizeof(V));
  bits = (bits + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof(V));
  return p * power;
}

// 2^x for x < 127.5. fp32: within 1.5 ulp of a normal result, 0 below -126.5; a NaN stays one.
template <class V>
FASTREG_HD V fast_exp2(V x) {
  if constexpr (std::is_same_v<typename Lane<V>::type, double>) {
    return lane_by_lane<std::exp2>(x);
  } else {
    const V least = V{} - 127.0f;
    x = x < least ? least : x;
    const V rounded = x + kRoundToInteger;
    return exp2_parts(rounded, x - (rounded - kRoundToInteger));
  }
}

}  // namespace fastreg
