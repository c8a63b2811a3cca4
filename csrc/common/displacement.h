#pragma once
// Displacement ops: sample positions of a resampled axis, the Gaussian's samples, B-spline weights,
// differences for the Jacobian.
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

// Where voxel o of n_out samples an axis of n_in: lower voxel and fraction. The position is a ratio of
// integers, so the split is exact however long the axis. The fraction is 0 at the last voxel: no sample
// beyond it is ever read.
FASTREG_HD double linear_source(int64_t o, int64_t n_in, int64_t n_out, bool align_corners, int64_t& lower) {
  int64_t position = align_corners ? o * (n_in - 1) : (2 * o + 1) * n_in - n_out;
  int64_t unit = align_corners ? (n_out > 1 ? n_out - 1 : 1) : 2 * n_out;
  position = position < 0 ? 0 : position;
  lower = position / unit;
  if (lower >= n_in - 1) {
    lower = n_in - 1;
    return 0.0;
  }
  return double(position % unit) / double(unit);
}

// Factor of the component along an axis. A single voxel has no extent to compare with under align_corners:
// factor 1.
FASTREG_HD double exact_scale(int64_t n_in, int64_t n_out, bool align_corners) {
  if (!align_corners) return double(n_out) / double(n_in);
  return n_in > 1 ? double(n_out - 1) / double(n_in - 1) : 1.0;
}

FASTREG_HD int64_t gaussian_radius(double sigma, double truncate) {
  return int64_t(std::ceil(truncate * sigma));
}

// Not normalised; sigma > 0.
FASTREG_HD double gaussian_sample(int64_t x, double sigma) {
  double t = double(x) / sigma;
  return std::exp(-0.5 * t * t);
}

FASTREG_HD int64_t bspline_control_points(int64_t n, int64_t spacing, int64_t order) {
  return (n + spacing - 1) / spacing + order;
}

// Weights of control points i ... i + order at the fraction f in [0, 1) of piece i; the last is 0 at f = 0.
FASTREG_HD void bspline_weights(double f, int64_t order, double weight[4]) {
  const double g = 1 - f;
  if (order == 1) {
    weight[0] = g, weight[1] = f;
  } else if (order == 2) {
    weight[0] = g * g / 2, weight[1] = (1 + 2 * f * g) / 2, weight[2] = f * f / 2;
  } else {
    weight[0] = g * g * g / 6, weight[1] = (4 + f * f * (3 * f - 6)) / 6;
    weight[2] = (1 + 3 * f * (1 + f * g)) / 6, weight[3] = f * f * f / 6;
  }
}

// d/dx f at q = scale * (f(high) - f(low)): central, one-sided at the faces, 0 along an axis of one voxel.
FASTREG_HD void difference(int64_t q, int64_t n, int64_t& low, int64_t& high, double& scale) {
  low = q > 0 ? q - 1 : q;
  high = q < n - 1 ? q + 1 : q;
  scale = n == 1 ? 0.0 : high - low == 2 ? 0.5 : 1.0;
}

// Weight of f(p) in the difference at q, for q in {p - 1, p, p + 1}: the transpose of `difference`.
FASTREG_HD double difference_weight(int64_t p, int64_t q, int64_t n) {
  if (q < 0 || q >= n) return 0.0;
  int64_t low, high;
  double scale;
  difference(q, n, low, high, scale);
  return scale * (double(p == high) - double(p == low));
}

// det[d0 d1 d2] = d0 . (d1 x d2) with d_j the derivative along axis j: the cofactors of column j are the
// product of the two that follow it. 2D: det[d0 d1] = d0 . cofactor(d1).
template <class V>
FASTREG_HD void cross(const V a[3], const V b[3], V out[3]) {
  out[0] = a[1] * b[2] - a[2] * b[1];
  out[1] = a[2] * b[0] - a[0] * b[2];
  out[2] = a[0] * b[1] - a[1] * b[0];
}

}  // namespace fastreg
