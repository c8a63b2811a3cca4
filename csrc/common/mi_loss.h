#pragma once
// Parzen windows of mutual information (docs/ops/mi_loss.md): the weights that an intensity gives to bins.
#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

struct MiArgs {
  const void *fixed, *moved;      // (n, c, voxels)
  const void* mask;               // (n, 1, voxels), arithmetic type; or null
  const double* ranges;           // (n, 2, 2): of fixed and moved the intensities at the ends
  double* sums;                   // forward: (n, slabs, width, width), zeros
  const double* grad;             // backward: (n, width, width)
  void *grad_fixed, *grad_moved;  // backward: (n, c, voxels), or null
  int64_t n, c, voxels, bins;
  int64_t width;  // bins and a margin on both sides, where windows that overlap an end have weights of 0
  int64_t slabs, slab;
  bool bspline;
};

constexpr int kMiMargin = 4;

// Bins that an intensity reaches: of a Gaussian whose deviation is half a bin those beyond hold 2e-14 of it.
template <bool bspline>
constexpr int kMiTaps = bspline ? 4 : 8;

// A smaller range counts as a single value: bins per unit of it could be infinite.
constexpr double kMiSmallest = 1e-300;

// Where an intensity lies among the bins and how far it moves per unit of intensity; 0 outside of the range,
// and where that is a single value.
struct MiAxis {
  double low, high, first, per_unit;
};

template <bool bspline>
FASTREG_HD MiAxis mi_axis(const double* range, int64_t bins) {
  // A cubic B-spline needs two bins beyond each end.
  const double first = bspline ? 2 : 0, span = range[1] - range[0];
  return {range[0], range[1], first,
          span > kMiSmallest ? double(bins - 1 - 2 * int64_t(first)) / span : 0 * span};
}

FASTREG_HD double mi_position(const MiAxis& axis, double x) {
  const double inside = x < axis.low ? axis.low : x > axis.high ? axis.high : x;
  return axis.first + (inside - axis.low) * axis.per_unit;
}

FASTREG_HD double mi_slope(const MiAxis& axis, double x) {
  return x < axis.low || x > axis.high ? 0 : axis.per_unit;
}

// Weights of the bins first, first + 1, ... for a position among them (no NaN), and their derivatives by the
// position. Returns first.
template <bool bspline>
FASTREG_HD int64_t mi_window(double position, int64_t bins, double* weight, double* slope) {
  const double whole = std::floor(position), f = position - whole;
  if constexpr (bspline) {
    const double g = 1 - f;
    weight[0] = g * g * g / 6, weight[3] = f * f * f / 6;
    weight[1] = (4 + f * f * (3 * f - 6)) / 6, weight[2] = (4 + g * g * (3 * g - 6)) / 6;
    slope[0] = -g * g / 2, slope[3] = f * f / 2;
    slope[1] = f * (1.5 * f - 2), slope[2] = -g * (1.5 * g - 2);
    return int64_t(whole) - 1;
  } else {
    // exp(-2 (f - k)^2), k = -3 ... 4, but for exp(-2 f^2), which the division by the sum removes: exp(-2
    // k^2) exp(4 f)^k, one exponential a voxel.
    constexpr double kFixed[4] = {1.3533528323661270e-1, 3.3546262790251185e-4, 1.5229979744712629e-8,
                                  1.2664165549094176e-14};  // exp(-2 k^2), k = 1 ... 4
    const double up = std::exp(4 * f), down = 1 / up, up2 = up * up;
    weight[0] = kFixed[2] * down * down * down, weight[1] = kFixed[1] * down * down;
    weight[2] = kFixed[0] * down, weight[3] = 1, weight[4] = kFixed[0] * up, weight[5] = kFixed[1] * up2;
    weight[6] = kFixed[2] * up2 * up, weight[7] = kFixed[3] * up2 * up2;
    const int64_t first = int64_t(whole) - 3;
    double sum = 0, moment = 0;
    for (int k = 0; k < 8; ++k) {
      if (first + k < 0 || first + k >= bins) weight[k] = 0;
      sum += weight[k], moment += k * weight[k];
    }
    const double per_sum = 1 / sum, mean = moment * per_sum;
    for (int k = 0; k < 8; ++k) weight[k] *= per_sum, slope[k] = 4 * weight[k] * (k - mean);
    return first;
  }
}

}  // namespace fastreg
