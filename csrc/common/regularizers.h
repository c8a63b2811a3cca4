#pragma once
// Regularisers: what a difference contributes to the loss and to the gradient. V is a number or a vector of
// numbers.
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

enum class Norm : int { l1, l2 };

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

// Whether a voxel has a forward difference; an axis of one voxel has no last voxel to leave out.
FASTREG_HD bool has_next(int64_t p, int64_t n) { return n == 1 || p + 1 < n; }

// Whether a voxel has a second derivative; an axis of one or two voxels has no faces to leave out.
FASTREG_HD bool has_both(int64_t p, int64_t n) { return n < 3 || (p > 0 && p + 1 < n); }

// Second difference, as differences of neighbours, which are nearly exact where u is large and smooth.
template <class V>
FASTREG_HD V second_difference(V before, V at, V after) {
  return (after - at) - (at - before);
}

// Twice the central difference along one axis of twice that along another: pp = u(+, +).
template <class V>
FASTREG_HD V mixed_difference(V pp, V pm, V mp, V mm) {
  return (pp - pm) - (mp - mm);
}

// The derivatives along an axis that a voxel is part of: those at p - 1, p and p + 1 where there are any, and
// the offsets of the voxels they read, 0 where none does.
template <class A>
struct Reach {
  A before, at, after;  // 1 or 0
  int64_t offset[5];    // of p - 2 ... p + 2
};

template <class A>
FASTREG_HD Reach<A> reach_of(int64_t p, int64_t n, int64_t stride) {
  const bool before = p > 1, at = p > 0 && p + 1 < n, after = p + 2 < n;
  return {A(before),
          A(at),
          A(after),
          {before ? -2 * stride : 0, before || at ? -stride : 0, 0, after || at ? stride : 0,
           after ? 2 * stride : 0}};
}

// Transpose of second_difference: what u(p) collects from the differences at p - 1, p and p + 1.
template <class A, class V>
FASTREG_HD V second_transposed(V a, V b, V c, V d, V e, const Reach<A>& r) {
  const V at = second_difference(b, c, d);
  return r.before * second_difference(a, b, c) - r.at * (at + at) + r.after * second_difference(c, d, e);
}

// The same for the central difference doubled, u(p + 1) - u(p - 1).
template <class A, class V>
FASTREG_HD V central_transposed(V a, V c, V e, const Reach<A>& r) {
  return r.before * (c - a) - r.after * (e - c);
}

}  // namespace fastreg
