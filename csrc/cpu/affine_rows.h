#pragma once
// The gradient to a matrix, sum over voxels of g(p) [p, 1]^T: along a row only x changes, so a row needs two
// sums per component.
#ifdef FASTREG_ISA

#include <cstdint>

namespace fastreg::FASTREG_ISA {
namespace {

// Of g, and of g x, in fp64. Lane by lane, so that it vectorises; the same bits on every instruction set.
class RowSums {
 public:
  // count is a multiple of the lanes: pad with zeros.
  template <class A>
  void add(const A* __restrict g, int count, int64_t x0) {
    for (int i = 0; i < count; i += kSumLanes)
      for (int j = 0; j < kSumLanes; ++j) {
        const double value = double(g[i + j]);
        plain_[j] += value;
        times_x_[j] += value * double(int32_t(x0) + i + j);
      }
  }

  void store(double* out) const {
    out[0] = out[1] = 0;
    for (int j = 0; j < kSumLanes; ++j) out[0] += plain_[j], out[1] += times_x_[j];
  }

 private:
  static constexpr int kSumLanes = 8;
  alignas(64) double plain_[kSumLanes] = {};
  alignas(64) double times_x_[kSumLanes] = {};
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {

// (N, nd, nd + 1) from the sums of rows (n, z, y, component), added in order: the same bits whatever the
// thread count.
inline at::Tensor affine_gradient(const std::vector<double>& sums, int64_t n_samples, int nd,
                                  const int64_t (&size)[3]) {
  at::Tensor out = at::zeros({n_samples, nd, nd + 1}, at::kDouble);
  double* g = out.mutable_data_ptr<double>();
  const double* s = sums.data();
  for (int64_t n = 0; n < n_samples; ++n, g += nd * (nd + 1))
    for (int64_t z = 0; z < size[0]; ++z)
      for (int64_t y = 0; y < size[1]; ++y)
        for (int k = 0; k < nd; ++k, s += 2) {
          double* row = g + k * (nd + 1);
          if (nd == 3) row[0] += double(z) * s[0];
          row[nd - 2] += double(y) * s[0];
          row[nd - 1] += s[1];
          row[nd] += s[0];
        }
  return out;
}

}  // namespace fastreg

#endif
