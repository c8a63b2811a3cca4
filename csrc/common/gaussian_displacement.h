#pragma once
// A Gaussian-shaped motion on the rows of a grid that spans [-1, 1].
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

constexpr int64_t kGaussianParams = 7;  // x, y, sx, sy, alpha, vx, vy

// In voxels, each axis pair ordered (x, y). At an offset (dx, dy) from the centre, e_i = ux[i] dx + uy[i] dy
// along the rotated axes in standard deviations.
struct Gaussian {
  double centre[2], motion[2], sigma[2], ux[2], uy[2];
  double unit[2], half[2];  // an axis's voxel in coordinates, and half its extent in voxels
  double quadratic, ridge;  // of a row: curvature of the exponent, and columns that its maximum moves a row
};

constexpr double kHalfLog2E = 0.72134752044448170;

// Infinity times an offset of 0 would be NaN.
FASTREG_HD double limited(double x) {
  constexpr double kLimit = 1e30;
  return x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
}

// An axis of one voxel lies at coordinate 0. An extent that is not positive becomes NaN: no kernel could
// report it.
FASTREG_HD Gaussian gaussian(const double* params, bool variance, int64_t width, int64_t height) {
  Gaussian g{};
  const int64_t size[2] = {width, height};
  for (int i = 0; i < 2; ++i) {
    const double s = params[2 + i];
    g.sigma[i] = !(s > 0) ? double(NAN) : variance ? std::sqrt(s) : s;
    g.half[i] = double(size[i] - 1) / 2;
    g.unit[i] = size[i] > 1 ? 1 / g.half[i] : 1.0;
    g.centre[i] = size[i] > 1 ? (params[i] + 1) * g.half[i] : params[i];
    g.motion[i] = params[5 + i] * g.half[i];
  }
  const double cosine = std::cos(params[4]), sine = std::sin(params[4]);
  g.ux[0] = cosine / g.sigma[0] * g.unit[0], g.uy[0] = sine / g.sigma[0] * g.unit[1];
  g.ux[1] = -sine / g.sigma[1] * g.unit[0], g.uy[1] = cosine / g.sigma[1] * g.unit[1];
  const double curvature = g.ux[0] * g.ux[0] + g.ux[1] * g.ux[1];
  g.quadratic = limited(kHalfLog2E * curvature);
  g.ridge = -(g.ux[0] * g.uy[0] + g.ux[1] * g.uy[1]) / curvature;
  return g;
}

// On one row the Gaussian is 2^-((g.quadratic k + linear) k + constant) and e_i is ux[i] k + offset[i], k
// columns from `column`, the one nearest its maximum on the row: from there nothing large cancels in fp32.
struct GaussianRow {
  double column, linear, constant, offset[2];
};

FASTREG_HD GaussianRow gaussian_row(const Gaussian& g, int64_t row, int64_t width) {
  const double dy = double(row) - g.centre[1], last = double(width - 1);
  const double nearest = std::nearbyint(g.centre[0] + dy * g.ridge);
  GaussianRow r{nearest > 0 ? (nearest < last ? nearest : last) : 0.0, 0, 0, {}};  // NaN: 0
  const double dx = r.column - g.centre[0];
  for (int i = 0; i < 2; ++i) r.offset[i] = g.ux[i] * dx + g.uy[i] * dy;
  r.linear = limited(2 * kHalfLog2E * (g.ux[0] * r.offset[0] + g.ux[1] * r.offset[1]));
  r.constant = limited(kHalfLog2E * (r.offset[0] * r.offset[0] + r.offset[1] * r.offset[1]));
  return r;
}

// Sums over voxels with P, the loss's slope to the logarithm of the Gaussian.
struct GaussianSums {
  double e[2], ee[2], e0e1;  // P e_i, P e_i^2, P e_0 e_1
  double weight[2];          // the Gaussian times the loss's slope to the displacement along x and y

  FASTREG_HD void add(const GaussianSums& o) {
    for (int i = 0; i < 2; ++i) e[i] += o.e[i], ee[i] += o.ee[i], weight[i] += o.weight[i];
    e0e1 += o.e0e1;
  }
};

// Of a row, from its sums of the weights, of P k and of P k^2.
FASTREG_HD GaussianSums gaussian_row_sums(const Gaussian& g, const GaussianRow& r, double weight_x,
                                          double weight_y, double pk, double pkk) {
  const double p = g.motion[0] * weight_x + g.motion[1] * weight_y;
  const double *u = g.ux, *o = r.offset;
  GaussianSums sums{{}, {}, 0, {weight_x, weight_y}};
  for (int i = 0; i < 2; ++i) {
    sums.e[i] = u[i] * pk + o[i] * p;
    sums.ee[i] = u[i] * u[i] * pkk + 2 * u[i] * o[i] * pk + o[i] * o[i] * p;
  }
  sums.e0e1 = u[0] * u[1] * pkk + (u[0] * o[1] + u[1] * o[0]) * pk + o[0] * o[1] * p;
  return sums;
}

FASTREG_HD void gaussian_gradient(const Gaussian& g, bool variance, const GaussianSums& sums, double* grad) {
  grad[0] = (g.ux[0] * sums.e[0] + g.ux[1] * sums.e[1]) / g.unit[0];
  grad[1] = (g.uy[0] * sums.e[0] + g.uy[1] * sums.e[1]) / g.unit[1];
  for (int i = 0; i < 2; ++i) {
    grad[2 + i] = sums.ee[i] / (variance ? 2 * g.sigma[i] * g.sigma[i] : g.sigma[i]);
    grad[5 + i] = sums.weight[i] * g.half[i];
  }
  grad[4] = sums.e0e1 * (g.sigma[0] / g.sigma[1] - g.sigma[1] / g.sigma[0]);
}

}  // namespace fastreg
