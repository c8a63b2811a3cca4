#pragma once
// A Gaussian-shaped motion on the rows of a grid that spans [-1, 1].
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

constexpr int64_t kGaussianParams = 7;  // x, y, sx, sy, alpha, vx, vy

FASTREG_HD double grid_coordinate(double i, int64_t n) {
  return n > 1 ? (2 * i - double(n - 1)) / double(n - 1) : 0.0;
}

// At an offset (dx, dy) from (x, y), e_i = ux[i] dx + uy[i] dy along the rotated axes in standard deviations.
struct Gaussian {
  double x, y, vx, vy, sigma[2], ux[2], uy[2];
};

// Extents that are not positive, which the kernels cannot report, become NaN.
FASTREG_HD Gaussian gaussian(const double* params, bool variance) {
  Gaussian g{params[0], params[1], params[5], params[6], {}, {}, {}};
  for (int i = 0; i < 2; ++i) {
    const double s = params[2 + i];
    g.sigma[i] = !(s > 0) ? double(NAN) : variance ? std::sqrt(s) : s;
  }
  const double cosine = std::cos(params[4]), sine = std::sin(params[4]);
  g.ux[0] = cosine / g.sigma[0], g.uy[0] = sine / g.sigma[0];
  g.ux[1] = -sine / g.sigma[1], g.uy[1] = cosine / g.sigma[1];
  return g;
}

// The Gaussian on one row is 2^-((quadratic k + linear) k + constant) and e_i is step[i] k + offset[i], k
// columns from `column`, the one nearest its maximum on the row: from there nothing large cancels in fp32.
struct GaussianRow {
  double column, quadratic, linear, constant, step[2], offset[2];
};

FASTREG_HD double limited(double x) {
  constexpr double kLimit = 1e30;  // infinity times k = 0 would be NaN
  return x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
}

FASTREG_HD GaussianRow gaussian_row(const Gaussian& g, double y, int64_t n_columns) {
  constexpr double kHalfLog2E = 0.72134752044448170;
  const double last = double(n_columns - 1), dy = y - g.y;
  const double curvature = g.ux[0] * g.ux[0] + g.ux[1] * g.ux[1];
  const double ridge = g.x - dy * (g.ux[0] * g.uy[0] + g.ux[1] * g.uy[1]) / curvature;
  const double nearest = std::nearbyint((ridge + 1) * last / 2);
  GaussianRow row{nearest > 0 ? (nearest < last ? nearest : last) : 0.0, 0, 0, 0, {}, {}};  // NaN: 0
  const double dx = grid_coordinate(row.column, n_columns) - g.x;
  double linear = 0, constant = 0;
  for (int i = 0; i < 2; ++i) {
    row.step[i] = n_columns > 1 ? g.ux[i] * 2 / last : 0.0;
    row.offset[i] = g.ux[i] * dx + g.uy[i] * dy;
    row.quadratic += row.step[i] * row.step[i];
    linear += 2 * row.step[i] * row.offset[i];
    constant += row.offset[i] * row.offset[i];
  }
  row.quadratic = limited(kHalfLog2E * row.quadratic);
  row.linear = limited(kHalfLog2E * linear);
  row.constant = limited(kHalfLog2E * constant);
  return row;
}

// Sums over a grid with the loss's slope P to the logarithm of the Gaussian, and to its values along x and y.
struct GaussianSums {
  double e[2], ee[2], e0e1;  // of P e_i, P e_i^2, P e_0 e_1
  double weight_x, weight_y;

  FASTREG_HD void add(const GaussianSums& o) {
    for (int i = 0; i < 2; ++i) e[i] += o.e[i], ee[i] += o.ee[i];
    e0e1 += o.e0e1, weight_x += o.weight_x, weight_y += o.weight_y;
  }
};

// From the sums over a row of P, P k and P k^2.
FASTREG_HD GaussianSums gaussian_row_sums(const GaussianRow& row, double p, double pk, double pkk) {
  const double *s = row.step, *o = row.offset;
  GaussianSums sums{};
  for (int i = 0; i < 2; ++i) {
    sums.e[i] = s[i] * pk + o[i] * p;
    sums.ee[i] = s[i] * s[i] * pkk + 2 * s[i] * o[i] * pk + o[i] * o[i] * p;
  }
  sums.e0e1 = s[0] * s[1] * pkk + (s[0] * o[1] + s[1] * o[0]) * pk + o[0] * o[1] * p;
  return sums;
}

FASTREG_HD void gaussian_gradient(const Gaussian& g, bool variance, const GaussianSums& sums, double* grad) {
  grad[0] = g.ux[0] * sums.e[0] + g.ux[1] * sums.e[1];
  grad[1] = g.uy[0] * sums.e[0] + g.uy[1] * sums.e[1];
  for (int i = 0; i < 2; ++i)
    grad[2 + i] = sums.ee[i] / (variance ? 2 * g.sigma[i] * g.sigma[i] : g.sigma[i]);
  grad[4] = sums.e0e1 * (g.sigma[0] / g.sigma[1] - g.sigma[1] / g.sigma[0]);
  grad[5] = sums.weight_x;
  grad[6] = sums.weight_y;
}

}  // namespace fastreg
