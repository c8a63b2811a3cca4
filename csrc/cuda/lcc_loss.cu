#include <algorithm>

#include "cuda/binding.h"
#include "cuda/lcc_loss.cuh"

namespace fastreg {
namespace {

using at::Tensor;

struct Options {
  int64_t window;
  c10::string_view kernel;
  std::optional<double> sigma;
  bool squared;
  c10::string_view padding;
  double smooth_nr, smooth_dr;
  c10::string_view denominator;
};

struct Result {
  Tensor sums, map, grad_fixed, grad_moved;  // gradients in arithmetic type
};

Result run(const char* op, const Tensor& fixed_, const Tensor& moved_, const std::optional<Tensor>& mask_,
           const std::optional<Tensor>& upstream_, const Options& o, bool want_map, bool need_fixed,
           bool need_moved) {
  const Device device(op, fixed_, moved_, mask_, upstream_);
  const int64_t nd = fixed_.dim() - 2;
  FASTREG_CHECK(nd == 2 || nd == 3, op, "images must have 2 or 3 spatial axes");
  FASTREG_CHECK(fixed_.sizes() == moved_.sizes() && fixed_.scalar_type() == moved_.scalar_type(), op,
                "fixed and moved must have one shape and dtype");
  FASTREG_CHECK(o.window > 0 && o.window % 2 == 1, op, "window must be odd and positive");
  FASTREG_CHECK(o.kernel != "gaussian" || (o.sigma && *o.sigma > 0), op, "sigma must be positive");
  const Tensor fixed = fixed_.contiguous(), moved = moved_.contiguous();
  const auto arithmetic = fixed.options().dtype(arithmetic_of(fixed));
  const auto per_voxel = [&](const std::optional<Tensor>& t) {
    if (!t) return Tensor();
    FASTREG_CHECK(t->dim() == nd + 2 && t->size(0) == fixed.size(0) && t->size(1) == 1 &&
                      t->sizes().slice(2) == fixed.sizes().slice(2),
                  op, "mask and upstream gradient must have shape (N, 1, *spatial)");
    return t->to(arithmetic.dtype()).contiguous();
  };
  const Tensor mask = per_voxel(mask_), upstream = per_voxel(upstream_);
  LccArgs a{};
  a.c = fixed.size(1), a.nc = fixed.size(0) * a.c;
  a.D = nd == 3 ? fixed.size(2) : 1, a.H = fixed.size(-2), a.W = fixed.size(-1);
  a.type = stored(fixed);
  a.flat = nd == 2;
  a.valid = o.padding == "valid", a.squared = o.squared;
  a.denominator = o.denominator == "product" ? Denominator::product
                  : o.denominator == "clamp" ? Denominator::clamp
                                             : Denominator::each;
  a.rule = {o.smooth_nr, o.smooth_dr, 0.0};
  const auto result = [&](bool want) {
    return at::empty(want ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  };
  Result out{Tensor(), result(want_map), result(need_fixed), result(need_moved)};
  if (fixed.numel() == 0) {
    out.sums = at::zeros({fixed.size(0)}, arithmetic);
    return out;
  }
  const Window kind = o.kernel == "box"        ? Window::box
                      : o.kernel == "gaussian" ? Window::gaussian
                                               : Window::triangular;
  const LccTapList taps = lcc_taps(kind, o.window, o.sigma.value_or(1.0), std::max({a.D, a.H, a.W}) + 1);
  a.least = 2.0;
  for (int k = 0; k < nd; ++k) a.least *= taps.tap[0];
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  a.fixed = pointer(fixed), a.moved = pointer(moved), a.mask = pointer(mask), a.upstream = pointer(upstream);
  if (want_map) a.map = out.map.mutable_data_ptr();
  if (need_fixed) a.grad_fixed = out.grad_fixed.mutable_data_ptr();
  if (need_moved) a.grad_moved = out.grad_moved.mutable_data_ptr();
  const LccPlan plan = lcc_plan(a, taps);
  const Tensor partial = at::empty({fixed.size(0), a.c * plan.parts}, fixed.options().dtype(at::kDouble));
  const Tensor scratch = at::empty({plan.scratch}, fixed.options().dtype(at::kByte));
  a.partial = partial.mutable_data_ptr<double>();
  lcc(a, plan, kind, taps, scratch.mutable_data_ptr(), device.stream());
  out.sums = partial.sum(1).to(arithmetic.dtype());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> lcc_loss_cuda(const Tensor& fixed, const Tensor& moved,
                                                 const std::optional<Tensor>& mask, int64_t window,
                                                 c10::string_view kernel, std::optional<double> sigma,
                                                 bool squared, c10::string_view padding, double smooth_nr,
                                                 double smooth_dr, c10::string_view denominator,
                                                 bool need_fixed, bool need_moved) {
  const Options o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  Result r = run("lcc_loss", fixed, moved, mask, std::nullopt, o, false, need_fixed, need_moved);
  return {r.sums, r.grad_fixed, r.grad_moved};
}

Tensor lcc_map_cuda(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask,
                    int64_t window, c10::string_view kernel, std::optional<double> sigma, bool squared,
                    c10::string_view padding, double smooth_nr, double smooth_dr,
                    c10::string_view denominator) {
  const Options o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  Result r = run("lcc_map", fixed, moved, mask, std::nullopt, o, true, false, false);
  if (fixed.size(1) == 1) return r.map;
  // The average over no channels is NaN.
  return fixed.size(1) == 0 ? r.map.sum(1, true).fill_(NAN) : r.map.sum(1, true);
}

std::tuple<Tensor, Tensor> lcc_map_bwd_cuda(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                            const std::optional<Tensor>& mask, int64_t window,
                                            c10::string_view kernel, std::optional<double> sigma,
                                            bool squared, c10::string_view padding, double smooth_nr,
                                            double smooth_dr, c10::string_view denominator, bool need_fixed,
                                            bool need_moved) {
  const Options o{window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator};
  Result r = run("lcc_map_bwd", fixed, moved, mask, grad, o, false, need_fixed, need_moved);
  return {r.grad_fixed.to(fixed.scalar_type()), r.grad_moved.to(moved.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("lcc_loss", lcc_loss_cuda);
  m.impl("lcc_map", lcc_map_cuda);
  m.impl("lcc_map_bwd", lcc_map_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
