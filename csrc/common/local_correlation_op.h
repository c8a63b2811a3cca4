#pragma once
// The inputs of local_correlation as its kernels read them, on any device.
#include <algorithm>
#include <cmath>

#include "common/tensor.h"

namespace fastreg {

// Alive as long as pointers to them are used.
struct CorrelationInputs {
  at::Tensor fixed, moving, displacement;  // displacement stays undefined where there is none
  at::Tensor statistics;                   // as a backward was given them
  int64_t nd;
  Stored type;
  int64_t n, c, size[3], reach[3];  // (z, y, x), reach being the radius; 2D: one slice, radius 0 along z
  int64_t offsets = 1;
  double factor;
  bool border;

  CorrelationInputs(const char* op, const at::Tensor& given_fixed, const at::Tensor& given_moving,
                    at::IntArrayRef radius, const OptionalTensor& given_displacement, c10::string_view scale,
                    c10::string_view padding)
      : nd(given_fixed.dim() - 2), border(padding == "border") {
    FASTREG_CHECK(nd == 2 || nd == 3, op, "fixed must have 2 or 3 spatial axes");
    FASTREG_CHECK(given_fixed.sizes() == given_moving.sizes() &&
                      given_fixed.scalar_type() == given_moving.scalar_type(),
                  op, "fixed and moving must have one shape and dtype");
    FASTREG_CHECK(int64_t(radius.size()) == nd, op, "radius must have a number per axis");
    // A displacement never loses precision: fp64 displacements lift the maps to fp64.
    const bool lift = given_displacement && given_displacement->scalar_type() == at::kDouble;
    fixed = (lift ? given_fixed.to(at::kDouble) : given_fixed).contiguous();
    moving = (lift ? given_moving.to(at::kDouble) : given_moving).contiguous();
    type = stored(fixed);
    n = fixed.size(0), c = fixed.size(1);
    volume_size(op, fixed.sizes(), size);
    for (int64_t k = 0; k < 3; ++k) {
      reach[k] = k < 3 - nd ? 0 : radius[k - (3 - nd)];
      FASTREG_CHECK(reach[k] >= 0 && reach[k] < (1 << 15), op, "radius must be in [0, 2^15)");
      offsets *= 2 * reach[k] + 1;
    }
    if (given_displacement) {
      displacement = given_displacement->to(arithmetic_of(fixed)).contiguous();
      FASTREG_CHECK(displacement.sizes() == with_channels(fixed, nd), op,
                    "displacement must have shape (N, nd, *spatial)");
    }
    const double channels = double(std::max<int64_t>(c, 1));
    factor = scale == "mean" ? 1 / channels : scale == "sqrt" ? 1 / std::sqrt(channels) : 1.0;
  }

  bool empty() const { return fixed.numel() == 0; }
  std::vector<int64_t> output_size() const { return with_channels(fixed, offsets); }

  at::Tensor upstream(const char* op, const at::Tensor& grad) const {
    FASTREG_CHECK(grad.sizes() == output_size(), op, "grad must have the shape of the output");
    return grad.to(fixed.scalar_type()).contiguous();
  }

  const double* keep_statistics(const char* op, const at::Tensor& given) {
    FASTREG_CHECK(given.dim() == 2 && given.size(0) == n && given.size(1) == 4, op,
                  "statistics must have shape (N, 4)");
    statistics = given.to(at::kDouble).contiguous();
    return statistics.const_data_ptr<double>();
  }
};

}  // namespace fastreg
