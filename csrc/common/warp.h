#pragma once
// Warp: sample positions, boundary rules and interpolation of out(p) = image(p + u(p)).
// Positions are kept as integer + fraction of u alone: accuracy does not depend on the size of the volume,
// and u = 0 is exactly the identity.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/macros.h"

namespace fastreg {

enum class Padding : int { zeros, border, reflection };

// The index a corner reads, or -1 for "outside, counts as 0". n >= 1; 32 bits hold what `split` lets through.
template <class I>
FASTREG_HD I corner_index(I i, std::type_identity_t<I> n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::zeros) return -1;
  if (padding == Padding::border || n == 1) return i < 0 ? 0 : n - 1;
  const I period = 2 * (n - 1);
  i = (i < 0 ? -i : i) % period;
  return i < n ? i : period - i;
}

// |u| is capped here, where an int32 still holds p + u.
constexpr int32_t kFarthest = 1 << 29;

// Splits a displacement into whole voxels and a fraction in [0, 1). A NaN keeps its fraction NaN.
template <class S, class A>
FASTREG_HD void split(S u, int32_t& whole, A& fraction) {
  constexpr S kCap = S(kFarthest);
  u = u > kCap ? kCap : u;
  u = u < -kCap ? -kCap : u;
  const S down = std::floor(u);
  const A rest = A(u - down);
  // A tiny negative u has a fraction that rounds to 1.
  const bool carry = rest >= A(1);
  fraction = carry ? A(0) : rest;
  whole = int32_t(rest == rest ? down : S(0)) + int32_t(carry);
}

}  // namespace fastreg
