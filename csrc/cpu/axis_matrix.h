#pragma once
// The sparse matrices of an axis that displacements are interpolated, smoothed and spread by: rows are runs
// of consecutive columns. Kernels are told of them, bindings make them.
#include <cstdint>

namespace fastreg {

// Row i: weight[offset[i] .. offset[i + 1]) times the voxels from first[i] on. first, and first + count,
// never decrease.
struct AxisMatrix {
  int64_t n_in, n_out;
  const int64_t* first;
  const int64_t* offset;
  const double* weight;
  int64_t widest;                  // most weights in a row
  int64_t plain_begin, plain_end;  // rows that are shifts of one another
};

}  // namespace fastreg

#ifndef FASTREG_ISA

#include <algorithm>
#include <vector>

#include "common/displacement.h"
#include "common/warp.h"

namespace fastreg {

struct Matrix {
  int64_t n_in, n_out, plain_begin = 0, plain_end = 0;
  std::vector<int64_t> first, offset{0};
  std::vector<double> weight;

  AxisMatrix view() const {
    int64_t widest = 0;
    for (int64_t i = 0; i < n_out; ++i) widest = std::max(widest, offset[i + 1] - offset[i]);
    return {n_in, n_out, first.data(), offset.data(), weight.data(), widest, plain_begin, plain_end};
  }
};

// Rows are voxels of the resized axis; transposed: voxels of the original axis, with the outputs that read
// them.
inline Matrix linear_matrix(int64_t n_in, int64_t n_out, bool align_corners, bool transposed) {
  Matrix m{transposed ? n_out : n_in, transposed ? n_in : n_out};
  std::vector<int64_t> lower(n_out);
  std::vector<double> fraction(n_out);
  for (int64_t o = 0; o < n_out; ++o) fraction[o] = linear_source(o, n_in, n_out, align_corners, lower[o]);
  if (!transposed) {
    for (int64_t o = 0; o < n_out; ++o) {
      m.first.push_back(lower[o]);
      m.weight.push_back(1.0 - fraction[o]);
      // A weight of 0 is left out: it must not read a NaN.
      if (fraction[o] > 0.0) m.weight.push_back(fraction[o]);
      m.offset.push_back(int64_t(m.weight.size()));
    }
    return m;
  }
  int64_t o = 0;
  for (int64_t i = 0; i < n_in; ++i) {
    while (o < n_out && (lower[o] < i - 1 || (lower[o] == i - 1 && fraction[o] == 0.0))) ++o;
    m.first.push_back(o);
    for (int64_t k = o; k < n_out && lower[k] <= i; ++k)
      m.weight.push_back(lower[k] == i ? 1.0 - fraction[k] : fraction[k]);
    m.offset.push_back(int64_t(m.weight.size()));
  }
  return m;
}

// Row i covers [i - radius, i + radius] cut at the borders, transposed or not: a boundary rule only moves a
// sample nearer.
inline Matrix gaussian_matrix(int64_t n, double sigma, double truncate, Padding padding, bool transposed) {
  const int64_t radius = sigma > 0 ? gaussian_radius(sigma, truncate) : 0;
  std::vector<double> sample(2 * radius + 1, 1.0);
  double total = 0;
  for (int64_t k = -radius; k <= radius; ++k)
    total += sample[k + radius] = radius ? gaussian_sample(k, sigma) : 1.0;
  Matrix m{n, n};
  const auto begin = [&](int64_t i) { return std::max<int64_t>(0, i - radius); };
  for (int64_t i = 0; i < n; ++i) {
    m.first.push_back(begin(i));
    m.offset.push_back(m.offset.back() + std::min(n - 1, i + radius) - begin(i) + 1);
  }
  m.weight.assign(m.offset.back(), 0.0);
  for (int64_t o = 0; o < n; ++o)
    for (int64_t k = -radius; k <= radius; ++k) {
      const int64_t i = corner_index(o + k, n, padding);
      const int64_t row = transposed ? i : o, column = transposed ? o : i;
      if (i >= 0) m.weight[m.offset[row] + column - begin(row)] += sample[k + radius] / total;
    }
  // Reflection brings voxel `radius` a second contribution in the transpose.
  const int64_t margin = radius + (transposed && radius > 0 && padding == Padding::reflection);
  m.plain_begin = margin, m.plain_end = n - margin;
  return m;
}

inline Matrix identity_matrix(int64_t n) {
  Matrix m{n, n, 0, n};
  for (int64_t i = 0; i < n; ++i) {
    m.first.push_back(i);
    m.offset.push_back(i + 1);
  }
  m.weight.assign(n, 1.0);
  return m;
}

// Rows are voxels with the control points that reach them; transposed: control points with their voxels. A
// weight of 0, where a piece begins, is left out: it must not read a NaN.
inline Matrix bspline_matrix(int64_t n, int64_t spacing, int64_t order, bool transposed) {
  const int64_t control = bspline_control_points(n, spacing, order);
  Matrix m{transposed ? n : control, transposed ? control : n};
  double weight[4];
  for (int64_t row = 0; row < m.n_out; ++row) {
    const int64_t first = transposed ? std::max<int64_t>(0, (row - order) * spacing + 1) : row / spacing;
    const int64_t end = transposed ? std::min(n, (row + 1) * spacing)  //
                                   : first + order + (row % spacing != 0);
    m.first.push_back(std::min(first, m.n_in));
    for (int64_t column = first; column < end; ++column) {
      const int64_t voxel = transposed ? column : row, point = transposed ? row : column;
      bspline_weights(double(voxel % spacing) / double(spacing), order, weight);
      m.weight.push_back(weight[point - voxel / spacing]);
    }
    m.offset.push_back(int64_t(m.weight.size()));
  }
  return m;
}

}  // namespace fastreg

#endif
