// Bindings of lcc_loss; its kernels are in lcc_box.cpp and lcc_weighted.cpp.
#ifndef FASTREG_ISA

#include <algorithm>
#include <cmath>

#include "common/lcc_taps.h"
#include "cpu/binding.h"
#include "cpu/lcc_args.h"

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
  Tensor sums, map, grad_fixed, grad_moved;
};

constexpr int64_t kPlanes = 32;  // of a chunk; a multiple of the planes whose gradient is gathered at once

// One pass; units are slabs of planes.
void box(LccArgs& a, Stored type, Result& out) {
  // Enough slabs for every thread; each repeats the statistics of 2 radius planes, so none thinner than that.
  const int64_t units = std::max<int64_t>(a.n * a.c, 1);
  a.n_slabs = std::clamp<int64_t>((at::get_num_threads() + units - 1) / units, 1,
                                  std::max<int64_t>(a.size[0] / std::max<int64_t>(2 * a.radius[0], 8), 1));
  out.sums = at::zeros({a.n, a.c * a.n_slabs}, out.sums.options());
  a.sums = out.sums.mutable_data_ptr<double>();
  auto kernel = FASTREG_PICK(lcc_slabs);
  at::parallel_for(0, a.n * a.c * a.n_slabs, 1, [&](int64_t b, int64_t e) { kernel(type, a, b, e); });
}

// Per channel, chunk by chunk: windows of the chunk's planes, then the gradient of the planes whose windows
// are done.
void weighted(LccArgs& a, Stored type, const Options& o, Result& out) {
  const Window kind = o.kernel == "gaussian" ? Window::gaussian : Window::triangular;
  const LccTapList taps =
      lcc_taps(kind, o.window, o.sigma.value_or(1.0), *std::max_element(a.size, a.size + 3) + 1);
  static const double one[] = {1.0}, nothing_more[] = {1.0, 0.0};
  a.volume = a.least = 1.0;
  for (int k = 0; k < 3; ++k) {
    const bool absent = a.window[k] == 1 && o.window > 1;  // the y axis of a 2D image
    a.taps[k] = absent ? LccTaps{one, nothing_more, 1, 1.0}
                       : LccTaps{taps.tap.data(), taps.tail.data(), int64_t(taps.tap.size()), taps.total};
    a.radius[k] = std::min(a.taps[k].length, a.size[k]) - 1;
    a.volume *= a.taps[k].total, a.least *= a.taps[k].tap[0];
  }
  a.least *= 2.0;
  a.n_slabs = a.size[0];
  out.sums = at::zeros({a.n, a.c * a.n_slabs}, out.sums.options());
  a.sums = out.sums.mutable_data_ptr<double>();
  a.n_adjoints = a.grad_fixed && a.grad_moved ? 5 : a.grad_fixed || a.grad_moved ? 3 : 0;
  const int64_t D = a.size[0], plane = a.size[1] * a.size[2], runs = (plane + kLccRun - 1) / kLccRun;
  const int64_t chunk = a.n_adjoints ? std::max<int64_t>(kPlanes, at::get_num_threads()) : D;
  a.ring = std::min(chunk + 2 * a.radius[0], D);
  Tensor adjoints = at::empty({a.n_adjoints, a.ring * plane}, out.sums.options());
  a.adjoints = adjoints.mutable_data_ptr<double>();
  auto reference = FASTREG_PICK(lcc_weighted_reference);
  auto windows = FASTREG_PICK(lcc_weighted_windows);
  auto gradient = FASTREG_PICK(lcc_weighted_gradient);
  for (int64_t nc = 0; nc < a.n * a.c; ++nc) {
    reference(type, a, nc);
    for (int64_t z = 0, done = 0; z < D; z += chunk) {
      const int64_t end = std::min(z + chunk, D), last = end == D ? D : std::max(end - a.radius[0], done);
      at::parallel_for(z, end, 1, [&](int64_t b, int64_t e) { windows(type, a, nc, b, e); });
      if (a.n_adjoints)
        at::parallel_for(0, runs, 1, [&](int64_t b, int64_t e) { gradient(type, a, nc, done, last, b, e); });
      done = last;
    }
  }
}

Result run(const Tensor& fixed_, const Tensor& moved_, const std::optional<Tensor>& mask_,
           const std::optional<Tensor>& upstream_, const Options& o, bool want_map, bool need_fixed,
           bool need_moved) {
  const int64_t nd = fixed_.dim() - 2;
  FASTREG_CHECK(nd == 2 || nd == 3, "lcc_loss", "images must have 2 or 3 spatial axes");
  FASTREG_CHECK(fixed_.sizes() == moved_.sizes(), "lcc_loss", "fixed and moved must have one shape");
  FASTREG_CHECK(fixed_.scalar_type() == moved_.scalar_type(), "lcc_loss",
                "fixed and moved must have one dtype");
  FASTREG_CHECK(o.window > 0 && o.window % 2 == 1, "lcc_loss", "window must be odd and positive");
  FASTREG_CHECK(o.kernel != "gaussian" || (o.sigma && *o.sigma > 0), "lcc_loss", "sigma must be positive");
  Tensor fixed = fixed_.contiguous(), moved = moved_.contiguous();
  const auto arithmetic = fixed.options().dtype(arithmetic_of(fixed));
  auto per_voxel = [&](const std::optional<Tensor>& t) {
    if (!t) return Tensor();
    FASTREG_CHECK(t->dim() == nd + 2 && t->size(0) == fixed.size(0) && t->size(1) == 1 &&
                      t->sizes().slice(2) == fixed.sizes().slice(2),
                  "lcc_loss", "mask and upstream gradient must have shape (N, 1, *spatial)");
    return t->to(arithmetic.dtype()).contiguous();
  };
  Tensor mask = per_voxel(mask_), upstream = per_voxel(upstream_);
  LccArgs a{};
  a.n = fixed.size(0), a.c = fixed.size(1);
  a.volume = 1, a.least = 2;
  for (int k = 0; k < 3; ++k) {
    // Axes (z, y, x) of the march; in 2D (y, -, x).
    const int64_t axis = nd == 3 ? k + 2 : k == 0 ? 2 : k == 2 ? 3 : -1;
    a.size[k] = axis < 0 ? 1 : fixed.size(axis);
    a.window[k] = axis < 0 ? 1 : o.window;
    a.radius[k] = a.window[k] / 2;
    a.volume *= double(a.window[k]);
  }
  a.valid = o.padding == "valid", a.squared = o.squared;
  a.denominator = o.denominator == "product" ? Denominator::product
                  : o.denominator == "clamp" ? Denominator::clamp
                                             : Denominator::each;
  a.rule = {o.smooth_nr, o.smooth_dr, 0x1p-42};
  Result out{at::zeros({a.n, 1}, fixed.options().dtype(at::kDouble)), Tensor(), Tensor(), Tensor()};
  out.map = at::empty(want_map ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  out.grad_fixed = at::empty(need_fixed ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  out.grad_moved = at::empty(need_moved ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  if (fixed.numel() == 0) return out;
  a.fixed = fixed.const_data_ptr(), a.moved = moved.const_data_ptr();
  a.mask = mask.defined() ? mask.const_data_ptr() : nullptr;
  a.upstream = upstream.defined() ? upstream.const_data_ptr() : nullptr;
  a.map = want_map ? out.map.mutable_data_ptr() : nullptr;
  a.grad_fixed = need_fixed ? out.grad_fixed.mutable_data_ptr() : nullptr;
  a.grad_moved = need_moved ? out.grad_moved.mutable_data_ptr() : nullptr;
  if (o.kernel == "box")
    box(a, stored(fixed), out);
  else
    weighted(a, stored(fixed), o, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> lcc_loss_cpu(const Tensor& fixed, const Tensor& moved,
                                                const std::optional<Tensor>& mask, int64_t window,
                                                c10::string_view kernel, std::optional<double> sigma,
                                                bool squared, c10::string_view padding, double smooth_nr,
                                                double smooth_dr, c10::string_view denominator,
                                                bool need_fixed, bool need_moved) {
  Result r = run(fixed, moved, mask, std::nullopt,
                 {window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator}, false,
                 need_fixed, need_moved);
  return {r.sums.sum(1).to(arithmetic_of(fixed)), r.grad_fixed, r.grad_moved};
}

Tensor lcc_map_cpu(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask,
                   int64_t window, c10::string_view kernel, std::optional<double> sigma, bool squared,
                   c10::string_view padding, double smooth_nr, double smooth_dr,
                   c10::string_view denominator) {
  Result r =
      run(fixed, moved, mask, std::nullopt,
          {window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator}, true, false, false);
  if (fixed.size(1) == 1) return r.map;
  // The average over no channels is NaN.
  return fixed.size(1) == 0 ? r.map.sum(1, true).fill_(NAN) : r.map.sum(1, true);
}

std::tuple<Tensor, Tensor> lcc_map_bwd_cpu(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                           const std::optional<Tensor>& mask, int64_t window,
                                           c10::string_view kernel, std::optional<double> sigma, bool squared,
                                           c10::string_view padding, double smooth_nr, double smooth_dr,
                                           c10::string_view denominator, bool need_fixed, bool need_moved) {
  Result r = run(fixed, moved, mask, grad,
                 {window, kernel, sigma, squared, padding, smooth_nr, smooth_dr, denominator}, false,
                 need_fixed, need_moved);
  return {r.grad_fixed.to(fixed.scalar_type()), r.grad_moved.to(moved.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("lcc_loss", lcc_loss_cpu);
  m.impl("lcc_map", lcc_map_cpu);
  m.impl("lcc_map_bwd", lcc_map_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
