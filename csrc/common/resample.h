#pragma once
// Resample: where out(p) reads an image on another grid, and how a number of one type becomes one of another.
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/scalar.h"

namespace fastreg {

// What files hold; bool is u8.
enum class Number { u8, i8, u16, i16, u32, i32, u64, i64, f16, f32, f64 };

template <class F>
void with_number(Number type, F f) {
  switch (type) {
    case Number::u8:
      return f.template operator()<uint8_t>();
    case Number::i8:
      return f.template operator()<int8_t>();
    case Number::u16:
      return f.template operator()<uint16_t>();
    case Number::i16:
      return f.template operator()<int16_t>();
    case Number::u32:
      return f.template operator()<uint32_t>();
    case Number::i32:
      return f.template operator()<int32_t>();
    case Number::u64:
      return f.template operator()<uint64_t>();
    case Number::i64:
      return f.template operator()<int64_t>();
    case Number::f16:
      return f.template operator()<half_t>();
    case Number::f32:
      return f.template operator()<float>();
    case Number::f64:
      return f.template operator()<double>();
  }
}

// fp32 holds all numbers of these: they are interpolated in it, the others in fp64.
FASTREG_HD bool is_narrow(Number type) {
  return type == Number::u8 || type == Number::i8 || type == Number::u16 || type == Number::i16 ||
         type == Number::f16 || type == Number::f32;
}

// A is float only for types that are narrow.
template <class A, class T>
FASTREG_HD A number(T x) {
  if constexpr (std::is_same_v<T, half_t>)
    return A(load(x));
  else
    return A(x);
}

// Whole numbers: to the nearest, ties to even, and no further than the type reaches; NaN: its least.
template <class T, class A>
FASTREG_HD T rounded(A x) {
  if constexpr (std::is_same_v<T, half_t>) {
    half_t out;
    store(out, float(x));
    return out;
  } else if constexpr (std::is_floating_point_v<T>) {
    return T(x);
  } else {
    // The largest number of A that T holds: 2^63 is one too many.
    constexpr int kSpare = std::numeric_limits<T>::digits - std::numeric_limits<A>::digits;
    constexpr T kMost = std::numeric_limits<T>::max();
    constexpr A most =
        A(kSpare > 0 ? (kMost >> (kSpare > 0 ? kSpare : 0)) << (kSpare > 0 ? kSpare : 0) : kMost);
    constexpr A least = A(std::numeric_limits<T>::min());
    A whole = std::nearbyint(x);
    whole = whole > least ? whole : least;
    whole = whole < most ? whole : most;
    using Step = std::conditional_t<sizeof(T) < 4, int32_t, T>;  // what instruction sets convert to
    return T(Step(whole));
  }
}

// The cell of an axis of n voxels that a position lies in, which is clamped: beyond the image its border goes
// on. The upper corner exists but for n = 1, where the fraction is 0. A NaN keeps its fraction NaN.
template <class A>
FASTREG_HD void cell(double position, double last, double last_cell, int32_t& whole, A& fraction) {
  double at = position < 0 ? 0 : position;
  at = at > last ? last : at;
  double down = std::floor(at);
  down = down < last_cell ? down : last_cell;
  whole = int32_t(at == at ? down : 0);
  fraction = A(at - down);
}

// The voxel of nearest neighbour, ties upwards as in ITK.
FASTREG_HD int32_t nearest_voxel(double position, double last) {
  double at = position > 0 ? position : 0;  // NaN: 0
  at = at < last ? at : last;
  return int32_t(std::floor(at + 0.5));
}

}  // namespace fastreg
