#pragma once
// The inverse of a displacement at a position x: v with r(v) = u(x + v) + v = 0. Newton's method on the
// linear interpolant of u, v <- v - (I + J)^-1 r with J at x + v, halved where the residual does not fall.
// Where no voxel overtakes another, r falls along every such step, for the interpolant is linear but for
// small terms.
#include <cmath>
#include <cstdint>

#include "common/warp.h"

namespace fastreg {

// u at a position, and its slopes: slope[k][i] = du_i / dx_k.
template <class A, int ND>
struct Linearised {
  A value[ND], slope[ND][ND];
};

// From the corners of a cell: corner c is the upper one along axis k where bit ND - 1 - k of c is set. What
// has no weight passes nothing on, so that what is not finite reaches only what touches it.
template <class A, int ND>
FASTREG_HD void linearise(const A (&corner)[1 << ND][ND], const A (&fraction)[ND], Linearised<A, ND>& at) {
  for (int i = 0; i < ND; ++i) {
    at.value[i] = A(0);
    for (int k = 0; k < ND; ++k) at.slope[k][i] = A(0);
  }
  for (int c = 0; c < 1 << ND; ++c) {
    A weight = A(1), others[ND];  // others: but for the axis itself
    for (int k = 0; k < ND; ++k) others[k] = A(1);
    for (int k = 0; k < ND; ++k) {
      const A along = c >> (ND - 1 - k) & 1 ? fraction[k] : A(1) - fraction[k];
      weight *= along;
      for (int j = 0; j < ND; ++j)
        if (j != k) others[j] *= along;
    }
    for (int i = 0; i < ND && weight != A(0); ++i) at.value[i] += weight * corner[c][i];
    for (int k = 0; k < ND; ++k) {
      const int bit = 1 << (ND - 1 - k);
      if (c & bit || others[k] == A(0)) continue;
      for (int i = 0; i < ND; ++i) at.slope[k][i] += others[k] * (corner[c | bit][i] - corner[c][i]);
    }
  }
}

// |det(I + J)| below which a step says nothing: neither its length nor its direction.
constexpr double kDegenerate = 1e-3;

// (I + J)^-1 = row / determinant. A: a number, or a vector of them.
template <class A, int ND>
struct InverseJacobian {
  A row[ND][ND], determinant;

  FASTREG_HD explicit InverseJacobian(const A (&slope)[ND][ND]) {
    A m[ND][ND];  // columns of I + J
    for (int k = 0; k < ND; ++k)
      for (int i = 0; i < ND; ++i) m[k][i] = k == i ? slope[k][i] + 1 : slope[k][i];
    if constexpr (ND == 3) {
      for (int k = 0; k < 3; ++k) {
        const int a = (k + 1) % 3, b = (k + 2) % 3;
        for (int i = 0; i < 3; ++i) {
          const int j = (i + 1) % 3, l = (i + 2) % 3;
          row[k][i] = m[a][j] * m[b][l] - m[a][l] * m[b][j];
        }
      }
    } else {
      row[0][0] = m[1][1], row[0][1] = -m[1][0];
      row[1][0] = -m[0][1], row[1][1] = m[0][0];
    }
    determinant = m[0][0] * row[0][0];
    for (int i = 1; i < ND; ++i) determinant += m[0][i] * row[0][i];
  }

  FASTREG_HD bool regular() const { return std::abs(determinant) >= A(kDegenerate); }

  FASTREG_HD void solve(const A (&r)[ND], A (&step)[ND]) const {
    const A scale = 1 / determinant;
    for (int k = 0; k < ND; ++k) {
      step[k] = row[k][0] * r[0];
      for (int i = 1; i < ND; ++i) step[k] += row[k][i] * r[i];
      step[k] *= scale;
    }
  }

  // -(I + J)^-T g, what the gradient is before it is scattered. A determinant near 0 counts as kDegenerate,
  // so that the gradient is finite where u folds; a NaN stays one.
  FASTREG_HD void adjoint(const A (&g)[ND], A (&q)[ND]) const {
    constexpr A kLeast = A(kDegenerate);
    const A d = std::abs(determinant) < kLeast ? (determinant < A(0) ? -kLeast : kLeast) : determinant;
    const A scale = A(-1) / d;
    for (int i = 0; i < ND; ++i) {
      q[i] = A(0);
      for (int k = 0; k < ND; ++k) q[i] += g[k] * row[k][i];
      q[i] *= scale;
    }
  }
};

// A residual, in voxels and per component, at which v is good: one more step, for which all is known,
// follows.
template <class A>
constexpr A kInverted = A(sizeof(A) == 8 ? 1e-6 : 1e-3);

// v after at most `iterations` steps from 0; linearise(v, at) gives u and its slopes at x + v. Of all that
// was tried v has the least residual: finite where u is, also where u folds. NaN where u at x is.
template <int ND, class A, class Linearise>
FASTREG_HD void invert(int64_t iterations, Linearise linearise, A (&v)[ND]) {
  // Steps go from `base`, whose residual is `fall`, by `share` of `step`, to `next`.
  A next[ND] = {}, base[ND] = {}, step[ND] = {}, r[ND], share = A(1), fall = A(INFINITY), least = A(INFINITY);
  for (int k = 0; k < ND; ++k) v[k] = A(NAN);
  for (int64_t i = 0;; ++i) {
    Linearised<A, ND> at;
    linearise(next, at);
    A largest = A(0);
    for (int k = 0; k < ND; ++k) {
      r[k] = at.value[k] + next[k];
      largest = std::abs(r[k]) > largest || r[k] != r[k] ? std::abs(r[k]) : largest;
    }
    if (largest < fall) {
      const InverseJacobian<A, ND> inverse(at.slope);
      const bool regular = inverse.regular(), done = largest <= kInverted<A>;
      if (regular)
        inverse.solve(r, step);
      else
        for (int k = 0; k < ND; ++k) step[k] = r[k];
      for (int k = 0; k < ND; ++k) base[k] = next[k];
      if (largest < least) {
        least = largest;
        for (int k = 0; k < ND; ++k) v[k] = done && regular ? next[k] - step[k] : next[k];
      }
      if (done) return;
      fall = largest, share = A(1);
    } else if (share > A(1.0 / 8)) {
      if (!(least < A(INFINITY))) return;
      share *= A(0.5);
    } else if (!(largest < A(INFINITY))) {
      return;
    } else {
      // No fall along it: past a fold or a kink. From where it led, half of the fixed point's step.
      for (int k = 0; k < ND; ++k) step[k] = A(0.5) * r[k], base[k] = next[k];
      fall = A(INFINITY), share = A(1);
    }
    if (i == iterations) return;
    for (int k = 0; k < ND; ++k) next[k] = base[k] - share * step[k];
  }
}

}  // namespace fastreg
