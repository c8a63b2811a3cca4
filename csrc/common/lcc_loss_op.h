#pragma once
// The ops of lcc_loss around their kernels, on any device.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/lcc_loss.h"
#include "common/lcc_taps.h"
#include "common/tensor.h"

namespace fastreg {

struct LccOptions {
  int64_t window;
  c10::string_view kernel;
  std::optional<double> sigma;
  bool squared;
  c10::string_view padding;
  double smooth_nr, smooth_dr;
  c10::string_view denominator;

  Window kind() const {
    return kernel == "box" ? Window::box : kernel == "gaussian" ? Window::gaussian : Window::triangular;
  }
};

struct LccWanted {
  bool map, grad_fixed, grad_moved;
};

struct LccResult {
  at::Tensor sums, map, grad_fixed, grad_moved;  // arithmetic type
};

// Contiguous inputs, alive as long as their pointers are used.
struct LccInputs {
  at::Tensor fixed, moved, mask, upstream;
  int64_t nd;
  at::TensorOptions arithmetic;

  LccInputs(const char* op, const at::Tensor& fixed_, const at::Tensor& moved_, const OptionalTensor& mask_,
            const OptionalTensor& upstream_, const LccOptions& o)
      : fixed(fixed_.contiguous()),
        moved(moved_.contiguous()),
        nd(fixed.dim() - 2),
        arithmetic(fixed.options().dtype(arithmetic_of(fixed))) {
    FASTREG_CHECK(nd == 2 || nd == 3, op, "images must have 2 or 3 spatial axes");
    FASTREG_CHECK(fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
                  "fixed and moved must have one shape and dtype");
    FASTREG_CHECK(o.window > 0 && o.window % 2 == 1, op, "window must be odd and positive");
    FASTREG_CHECK(o.kernel != "gaussian" || (o.sigma && *o.sigma > 0), op, "sigma must be positive");
    mask = per_voxel(op, "mask", mask_, fixed);
    upstream = per_voxel(op, "upstream gradient", upstream_, fixed);
  }

  // Window weights of an axis; none lie beyond an image.
  LccTapList taps(const LccOptions& o) const {
    const at::IntArrayRef spatial = fixed.sizes().slice(2);
    const int64_t longest = *std::max_element(spatial.begin(), spatial.end());
    return lcc_taps(o.kind(), o.window, o.sigma.value_or(1.0), longest + 1);
  }

  // Results, not set but for the sums of empty images, and where a call reads and writes; `least` and
  // `rule.tau` are left.
  LccResult begin(LccCall& a, const LccOptions& o, const LccWanted& want) const {
    LccResult out{fixed.numel() == 0 ? at::zeros({fixed.size(0)}, arithmetic) : at::Tensor(),
                  empty_if(want.map, fixed.sizes(), arithmetic),
                  empty_if(want.grad_fixed, fixed.sizes(), arithmetic),
                  empty_if(want.grad_moved, fixed.sizes(), arithmetic)};
    a.fixed = fixed.const_data_ptr(), a.moved = moved.const_data_ptr();
    a.mask = data_or_null(mask), a.upstream = data_or_null(upstream);
    a.map = want.map ? out.map.mutable_data_ptr() : nullptr;
    a.grad_fixed = want.grad_fixed ? out.grad_fixed.mutable_data_ptr() : nullptr;
    a.grad_moved = want.grad_moved ? out.grad_moved.mutable_data_ptr() : nullptr;
    a.n = fixed.size(0), a.c = fixed.size(1);
    a.valid = o.padding == "valid", a.squared = o.squared;
    a.denominator = o.denominator == "product" ? Denominator::product
                    : o.denominator == "clamp" ? Denominator::clamp
                                               : Denominator::each;
    a.rule.smooth_nr = o.smooth_nr, a.rule.smooth_dr = o.smooth_dr;
    return out;
  }
};

// run(op, fixed, moved, mask, upstream, options, wanted) is what a device does for any of the ops.
template <auto run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> lcc_loss(
    const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& mask, int64_t window,
    c10::string_view kernel, std::optional<double> sigma, bool squared, c10::string_view padding,
    double smooth_nr, double smooth_dr, c10::string_view denominator, bool need_fixed, bool need_moved) {
  const LccOptions o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  LccResult r = run("lcc_loss", fixed, moved, mask, std::nullopt, o, {false, need_fixed, need_moved});
  return {r.sums, r.grad_fixed, r.grad_moved};
}

template <auto run>
at::Tensor lcc_map(const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& mask,
                   int64_t window, c10::string_view kernel, std::optional<double> sigma, bool squared,
                   c10::string_view padding, double smooth_nr, double smooth_dr,
                   c10::string_view denominator) {
  const LccOptions o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  LccResult r = run("lcc_map", fixed, moved, mask, std::nullopt, o, {true, false, false});
  if (fixed.size(1) == 1) return r.map;
  // The average over no channels is NaN.
  return fixed.size(1) == 0 ? r.map.sum(1, true).fill_(NAN) : r.map.sum(1, true);
}

template <auto run>
std::tuple<at::Tensor, at::Tensor> lcc_map_bwd(const at::Tensor& grad, const at::Tensor& fixed,
                                               const at::Tensor& moved, const OptionalTensor& mask,
                                               int64_t window, c10::string_view kernel,
                                               std::optional<double> sigma, bool squared,
                                               c10::string_view padding, double smooth_nr, double smooth_dr,
                                               c10::string_view denominator, bool need_fixed,
                                               bool need_moved) {
  const LccOptions o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  LccResult r = run("lcc_map_bwd", fixed, moved, mask, grad, o, {false, need_fixed, need_moved});
  return {r.grad_fixed.to(fixed.scalar_type()), r.grad_moved.to(moved.scalar_type())};
}

}  // namespace fastreg
