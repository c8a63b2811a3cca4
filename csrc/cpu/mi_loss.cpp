// mi_loss: joint histograms of two images and the gradients through them.
#include "common/mi_loss.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// Work units are slabs (n, slab).
FASTREG_KERNEL(void, mi_fwd, Stored, const MiArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, mi_bwd, Stored, const MiArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <limits>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// The bins of a row that a voxel reaches, 4 or 8 doubles, in vectors of at most this width.
template <int taps>
struct LanesOf {
  static constexpr int value = taps < kLanes<double> ? taps : kLanes<double>;
  typedef double type __attribute__((vector_size(8 * value)));
};

// Calls body(V(), first tap) for each vector of taps.
template <int taps, class Body>
FASTREG_HD void each_tap(Body body) {
  for (int k = 0; k < taps; k += LanesOf<taps>::value) body(typename LanesOf<taps>::type{}, k);
}

// Calls body(index of the value, of the voxel, weight) for what is counted in a slab.
template <class T, class Body>
FASTREG_HD void each_value(const MiArgs& a, int64_t unit, Body body) {
  using A = arithmetic_t<T>;
  const int64_t n = unit / a.slabs, begin = unit % a.slabs * a.slab, end = std::min(begin + a.slab, a.voxels);
  const A* mask = static_cast<const A*>(a.mask) + (a.mask ? n * a.voxels : 0);
  for (int64_t c = 0; c < a.c; ++c)
    for (int64_t v = begin; v < end; ++v) body((n * a.c + c) * a.voxels + v, a.mask ? double(mask[v]) : 1.0);
}

// Each value of a slab adds the outer product of its two windows to the slab's own histogram, which stays in
// the nearest cache; the caller adds up slabs in order, so the same bits whatever the thread count. Bytes:
// reads 2 volumes and the mask. Arithmetic: 2 exponentials and 64 multiply-adds a value in fp64 (B-splines:
// 16 and no exponential): that, not memory, is what takes the time.
template <class T, bool bspline>
void fwd(const MiArgs& a, int64_t begin, int64_t end) {
  constexpr int kTaps = kMiTaps<bspline>;
  alignas(64) double w[kTaps], v[kTaps], slope[kTaps];
  for (int64_t unit = begin; unit < end; ++unit) {
    const double* range = a.ranges + unit / a.slabs * 4;
    const MiAxis fixed = mi_axis<bspline>(range, a.bins), moved = mi_axis<bspline>(range + 2, a.bins);
    double* sums = a.sums + unit * a.width * a.width + kMiMargin * (a.width + 1);
    each_value<T>(a, unit, [&](int64_t at, double weight) {
      if (weight <= 0) return;
      const double p = mi_position(fixed, load(static_cast<const T*>(a.fixed)[at])),
                   q = mi_position(moved, load(static_cast<const T*>(a.moved)[at]));
      if (p != p || q != q || weight != weight) {
        sums[0] = std::numeric_limits<double>::quiet_NaN();
        return;
      }
      const int64_t i = mi_window<bspline>(p, a.bins, w, slope), j = mi_window<bspline>(q, a.bins, v, slope);
      for (double& x : v) x *= weight;
      double* to = sums + i * a.width + j;
      for (int k = 0; k < kTaps; ++k, to += a.width)
        each_tap<kTaps>([&](auto sum, int l) {
          decltype(sum) row;
          std::memcpy(&sum, to + l, sizeof(sum)), std::memcpy(&row, v + l, sizeof(row));
          sum += w[k] * row;
          std::memcpy(to + l, &sum, sizeof(sum));
        });
    });
  }
}

// Bytes: reads 2 volumes and the mask, writes 1 or 2. The gradient of a sample's histogram stays in the
// cache.
template <class T, bool bspline>
void bwd(const MiArgs& a, int64_t begin, int64_t end) {
  constexpr int kTaps = kMiTaps<bspline>;
  alignas(64) double w[kTaps], v[kTaps], slope_w[kTaps], slope_v[kTaps];
  for (int64_t unit = begin; unit < end; ++unit) {
    const double* range = a.ranges + unit / a.slabs * 4;
    const MiAxis fixed = mi_axis<bspline>(range, a.bins), moved = mi_axis<bspline>(range + 2, a.bins);
    const double* grad = a.grad + unit / a.slabs * a.width * a.width + kMiMargin * (a.width + 1);
    each_value<T>(a, unit, [&](int64_t at, double weight) {
      const double x = load(static_cast<const T*>(a.fixed)[at]), y = load(static_cast<const T*>(a.moved)[at]);
      double grad_x = 0, grad_y = 0;
      const double p = mi_position(fixed, x), q = mi_position(moved, y);
      if (weight <= 0) {
      } else if (p != p || q != q || weight != weight) {
        grad_x = grad_y = std::numeric_limits<double>::quiet_NaN();
      } else {
        const int64_t i = mi_window<bspline>(p, a.bins, w, slope_w),
                      j = mi_window<bspline>(q, a.bins, v, slope_v);
        const double* from = grad + i * a.width + j;
        alignas(64) double along_w[kTaps], along_slope[kTaps];
        each_tap<kTaps>([&](auto by_w, int l) {
          auto by_slope = by_w;
          const double* at_row = from + l;
          for (int k = 0; k < kTaps; ++k, at_row += a.width) {
            decltype(by_w) row;
            std::memcpy(&row, at_row, sizeof(row));
            by_w += w[k] * row, by_slope += slope_w[k] * row;
          }
          std::memcpy(along_w + l, &by_w, sizeof(by_w)),
              std::memcpy(along_slope + l, &by_slope, sizeof(by_slope));
        });
        for (int k = 0; k < kTaps; ++k) grad_x += along_slope[k] * v[k], grad_y += along_w[k] * slope_v[k];
        grad_x *= weight * mi_slope(fixed, x), grad_y *= weight * mi_slope(moved, y);
      }
      using A = arithmetic_t<T>;
      if (a.grad_fixed) store(static_cast<T*>(a.grad_fixed)[at], A(grad_x));
      if (a.grad_moved) store(static_cast<T*>(a.grad_moved)[at], A(grad_y));
    });
  }
}

}  // namespace

void mi_fwd(Stored type, const MiArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { a.bspline ? fwd<T, true>(a, b, e) : fwd<T, false>(a, b, e); });
}

void mi_bwd(Stored type, const MiArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { a.bspline ? bwd<T, true>(a, b, e) : bwd<T, false>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>

#include "cpu/binding.h"

namespace fastreg {
namespace {

// Contiguous inputs, alive as long as their pointers are used.
struct MiInputs {
  at::Tensor fixed, moved, mask, ranges;
  MiArgs args{};

  MiInputs(const char* op, const at::Tensor& fixed_, const at::Tensor& moved_, const OptionalTensor& mask_,
           const at::Tensor& ranges_, int64_t bins, c10::string_view kernel)
      : fixed(fixed_.contiguous()), moved(moved_.contiguous()), ranges(ranges_.to(at::kDouble).contiguous()) {
    FASTREG_CHECK(
        fixed.dim() >= 3 && fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
        "fixed and moved must have one shape and dtype");
    FASTREG_CHECK(ranges.sizes() == at::IntArrayRef({fixed.size(0), 2, 2}), op,
                  "ranges must have shape (N, 2, 2)");
    args.bspline = kernel == "bspline";
    FASTREG_CHECK(bins >= (args.bspline ? 6 : 2) && bins <= 1024, op,
                  "bins must be from 2 (bspline: 6) to 1024");
    mask = per_voxel(op, "mask", mask_, fixed);
    args.n = fixed.size(0), args.c = fixed.size(1);
    args.voxels = c10::multiply_integers(fixed.sizes().slice(2));
    args.bins = bins, args.width = bins + 2 * kMiMargin;
    // Slabs of at least 16384 voxels, at most 32 a sample and some MB of histograms: by shape alone.
    const int64_t most = std::clamp<int64_t>((1 << 19) / (args.width * args.width), 1, 32);
    args.slabs = std::clamp<int64_t>(args.voxels / 16384, 1, most);
    args.slab = (args.voxels + args.slabs - 1) / args.slabs;
    args.fixed = fixed.const_data_ptr(), args.moved = moved.const_data_ptr(), args.mask = data_or_null(mask);
    args.ranges = ranges.const_data_ptr<double>();
  }

  template <class Kernel>
  void run(Kernel kernel) const {
    if (fixed.numel())
      at::parallel_for(0, args.n * args.slabs, 1,
                       [&](int64_t b, int64_t e) { kernel(stored(fixed), args, b, e); });
  }
};

at::Tensor mi_loss(const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& mask,
                   const at::Tensor& ranges, int64_t bins, c10::string_view kernel) {
  MiInputs in("mi_loss", fixed, moved, mask, ranges, bins, kernel);
  const MiArgs& a = in.args;
  at::Tensor sums = at::zeros({a.n, a.slabs, a.width, a.width}, in.ranges.options());
  in.args.sums = sums.mutable_data_ptr<double>();
  in.run(FASTREG_PICK(mi_fwd));
  at::Tensor out = sums.select(1, 0);
  for (int64_t s = 1; s < a.slabs; ++s) out.add_(sums.select(1, s));
  return out.slice(1, kMiMargin, kMiMargin + bins).slice(2, kMiMargin, kMiMargin + bins).contiguous();
}

std::tuple<at::Tensor, at::Tensor> mi_loss_bwd(const at::Tensor& grad, const at::Tensor& fixed,
                                               const at::Tensor& moved, const OptionalTensor& mask,
                                               const at::Tensor& ranges, int64_t bins,
                                               c10::string_view kernel, bool need_fixed, bool need_moved) {
  MiInputs in("mi_loss_bwd", fixed, moved, mask, ranges, bins, kernel);
  FASTREG_CHECK(grad.sizes() == at::IntArrayRef({in.args.n, bins, bins}), "mi_loss_bwd",
                "grad must have shape (N, bins, bins)");
  const at::Tensor padded =
      at::constant_pad_nd(grad.to(at::kDouble), {kMiMargin, kMiMargin, kMiMargin, kMiMargin}).contiguous();
  at::Tensor grad_fixed = empty_if(need_fixed, fixed.sizes(), in.fixed.options()),
             grad_moved = empty_if(need_moved, fixed.sizes(), in.fixed.options());
  in.args.grad = padded.const_data_ptr<double>();
  if (need_fixed) in.args.grad_fixed = grad_fixed.mutable_data_ptr();
  if (need_moved) in.args.grad_moved = grad_moved.mutable_data_ptr();
  in.run(FASTREG_PICK(mi_bwd));
  return {grad_fixed, grad_moved};
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("mi_loss", mi_loss);
  m.impl("mi_loss_bwd", mi_loss_bwd);
}

}  // namespace
}  // namespace fastreg

#endif
