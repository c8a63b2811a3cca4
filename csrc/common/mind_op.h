#pragma once
// The ops of MIND around their kernels, on any device.
#include <tuple>

#include "common/mind.h"
#include "common/tensor.h"

namespace fastreg {

struct MindOptions {
  int64_t radius, dilation;
  c10::string_view neighbourhood, patch;
  double sigma;

  bool six() const { return neighbourhood == "six"; }
};

inline void check_mind(const char* op, const at::Tensor& image, const MindOptions& o) {
  const int64_t nd = image.dim() - 2;
  FASTREG_CHECK((nd == 2 || nd == 3) && image.size(1) > 0, op,
                "images must have 2 or 3 spatial axes and a channel");
  FASTREG_CHECK(o.radius >= 0 && o.dilation >= 0, op, "radius and dilation must not be negative");
}

// Whether anything is seen from `begin` to `end` along an axis, of each pair of them.
inline at::Tensor any_within(const at::Tensor& seen, int64_t axis, const at::Tensor& begin,
                             const at::Tensor& end) {
  const int64_t n = seen.size(axis);
  const at::Tensor counts =
      at::cat({at::zeros_like(seen.narrow(axis, 0, 1)), seen}, axis).cumsum(axis, at::kInt);
  return counts.index_select(axis, end.clamp(0, n)).gt(counts.index_select(axis, begin.clamp(0, n)));
}

// The image with 0 for what is not finite and the descriptor of no voxel that the mask counts reads: it would
// spoil the mean of V, and with it the sample. GPUs are not asked whether there is any: they would have to
// wait.
inline at::Tensor seen_or_finite(const at::Tensor& image, const OptionalTensor& mask, const MindOptions& o) {
  if (!mask || image.numel() == 0) return image;
  // A sum is finite where all terms are, unless it overflows.
  if (image.is_cpu() &&
      (std::isfinite(image.sum(at::kDouble).item<double>()) || image.isfinite().all().item<bool>()))
    return image;
  at::Tensor seen = mask->le(0).logical_not();
  const auto index = [&](int64_t axis) {
    return at::arange(image.size(axis), image.options().dtype(at::kLong));
  };
  for (int64_t axis = 2; axis < image.dim(); ++axis)  // where patches lie
    seen = any_within(seen, axis, index(axis).sub(o.radius), index(axis).add(o.radius + 1));
  at::Tensor read = o.six() ? seen : at::zeros_like(seen);
  for (int64_t axis = 2; axis < image.dim(); ++axis) {  // what they are shifted by, to the border at most
    const at::Tensor i = index(axis), up = i.sub(o.dilation), down = i.add(o.dilation);
    const int64_t last = image.size(axis) - 1;
    read = read.logical_or(any_within(seen, axis, up, up.add(1).masked_fill(i.eq(last), last + 1)));
    read = read.logical_or(any_within(seen, axis, down.masked_fill(i.eq(0), 0), down.add(1)));
  }
  return image.masked_fill(image.isfinite().logical_or_(read).logical_not_(), 0);
}

// A device's Mind holds the arguments of a call, `a`, for an image and options, and launches:
//   mean_variance(image)       (N,), fp64: mean of V of each sample, NaN where it is not finite;
//                              whatever gradients `a` asks for by now
//   new_gradient(image, type)  memory for a gradient that will be converted to `type` if it is not
//   run(task, sums)            the task and, if asked for, partial sums; total() is (N,) of them
template <class Device, class Mind>
at::Tensor mind_mean_variance(const at::Tensor& image, const OptionalTensor& mask, int64_t radius,
                              int64_t dilation, c10::string_view neighbourhood, c10::string_view patch,
                              double sigma) {
  const Device device("mind_mean_variance", image, mask);
  const MindOptions o{radius, dilation, neighbourhood, patch, sigma};
  const at::Tensor in = seen_or_finite(image, mask, o).contiguous();
  return Mind(device, "mind_mean_variance", in, o).mean_variance(in);
}

template <class Device, class Mind>
at::Tensor mind(const at::Tensor& image, int64_t radius, int64_t dilation, c10::string_view neighbourhood,
                c10::string_view patch, double sigma) {
  const Device device("mind", image);
  const at::Tensor in = image.contiguous();
  Mind mind(device, "mind", in, {radius, dilation, neighbourhood, patch, sigma});
  at::Tensor out = at::empty(with_channels(in, mind.a.n_channels), in.options());
  if (in.numel() == 0) return out;
  const at::Tensor mean = mind.mean_variance(in);
  mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
  mind.a.out = out.mutable_data_ptr();
  mind.run(MindTask::describe, false);
  return out;
}

template <class Device, class Mind>
at::Tensor mind_bwd(const at::Tensor& grad, const at::Tensor& image, int64_t radius, int64_t dilation,
                    c10::string_view neighbourhood, c10::string_view patch, double sigma) {
  const Device device("mind_bwd", image, grad);
  const at::Tensor in = image.contiguous(), up = grad.to(in.scalar_type()).contiguous();
  Mind mind(device, "mind_bwd", in, {radius, dilation, neighbourhood, patch, sigma});
  FASTREG_CHECK(up.sizes() == with_channels(in, mind.a.n_channels), "mind_bwd",
                "grad must have the shape of the descriptors");
  at::Tensor out = mind.new_gradient(in, in.scalar_type());
  if (in.numel() != 0) {
    const at::Tensor mean = mind.mean_variance(in);
    mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
    mind.a.upstream = up.const_data_ptr(), mind.a.grad[0] = out.mutable_data_ptr();
    mind.run(MindTask::describe_bwd, false);
  }
  return out.to(in.scalar_type());
}

struct MindComparison {
  c10::string_view norm;
  bool is_mask, want_sums, want_map, need[2];  // need: gradients to fixed and moved
  at::ScalarType grad_type;
};

struct MindResult {
  at::Tensor sums, map, grad[2];  // of the arithmetic type, gradients of the type asked for
};

// `weight`: of the voxels' errors, the mask or the gradient of a map.
template <class Device, class Mind>
MindResult mind_compare(const char* op, const at::Tensor& fixed, const at::Tensor& moved,
                        const OptionalTensor& fixed_variance, const OptionalTensor& mask,
                        const OptionalTensor& weight_, const MindOptions& o, const MindComparison& how) {
  const Device device(op, fixed, moved, fixed_variance, mask, weight_);
  const at::Tensor image[2] = {seen_or_finite(fixed, mask, o).contiguous(),
                               seen_or_finite(moved, mask, o).contiguous()};
  FASTREG_CHECK(fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
                "fixed and moved must have one shape and dtype");
  Mind mind(device, op, image[0], o);
  const auto arithmetic = fixed.options().dtype(arithmetic_of(fixed));
  const at::Tensor weight = per_voxel(op, "mask or grad", weight_, fixed);
  at::Tensor mean[2];
  MindResult result;
  result.map = empty_if(how.want_map, with_channels(fixed, 1), arithmetic);
  for (int i = 0; i < 2; ++i)
    result.grad[i] = how.need[i] ? mind.new_gradient(image[i], how.grad_type)
                                 : at::empty({0}, fixed.options().dtype(how.grad_type));
  if (fixed.numel() == 0) {
    result.sums = at::zeros({fixed.size(0)}, arithmetic);
  } else {
    for (int i = 0; i < 2; ++i) {
      if (i == 0 && fixed_variance) {
        FASTREG_CHECK(fixed_variance->dim() == 1 && fixed_variance->size(0) == fixed.size(0), op,
                      "fixed_variance must have shape (N,)");
        mean[i] = fixed_variance->to(at::kDouble).contiguous();
      } else {
        mean[i] = mind.mean_variance(image[i]);
      }
      mind.a.image[i] = image[i].const_data_ptr(), mind.a.mean[i] = mean[i].template const_data_ptr<double>();
      mind.a.grad[i] = how.need[i] ? result.grad[i].mutable_data_ptr() : nullptr;
    }
    mind.a.weight = data_or_null(weight), mind.a.is_mask = how.is_mask;
    mind.a.absolute = how.norm == "l1";
    mind.a.out = how.want_map ? result.map.mutable_data_ptr() : nullptr;
    mind.run(MindTask::compare, how.want_sums);
    if (how.want_sums) result.sums = mind.total().to(arithmetic_of(fixed));
  }
  for (at::Tensor& grad : result.grad) grad = grad.to(how.grad_type);
  return result;
}

template <class Device, class Mind>
std::tuple<at::Tensor, at::Tensor, at::Tensor> mind_loss(
    const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& fixed_variance,
    const OptionalTensor& mask, int64_t radius, int64_t dilation, c10::string_view neighbourhood,
    c10::string_view patch, double sigma, c10::string_view norm, bool need_fixed, bool need_moved) {
  const MindResult r = mind_compare<Device, Mind>(
      "mind_loss", fixed, moved, fixed_variance, mask, mask, {radius, dilation, neighbourhood, patch, sigma},
      {norm, true, true, false, {need_fixed, need_moved}, arithmetic_of(fixed)});
  return {r.sums, r.grad[0], r.grad[1]};
}

template <class Device, class Mind>
at::Tensor mind_map(const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& fixed_variance,
                    const OptionalTensor& mask, int64_t radius, int64_t dilation,
                    c10::string_view neighbourhood, c10::string_view patch, double sigma,
                    c10::string_view norm) {
  return mind_compare<Device, Mind>("mind_map", fixed, moved, fixed_variance, mask, std::nullopt,
                                    {radius, dilation, neighbourhood, patch, sigma},
                                    {norm, false, false, true, {false, false}, arithmetic_of(fixed)})
      .map;
}

template <class Device, class Mind>
std::tuple<at::Tensor, at::Tensor> mind_map_bwd(const at::Tensor& grad, const at::Tensor& fixed,
                                                const at::Tensor& moved, const OptionalTensor& fixed_variance,
                                                const OptionalTensor& mask, int64_t radius, int64_t dilation,
                                                c10::string_view neighbourhood, c10::string_view patch,
                                                double sigma, c10::string_view norm, bool need_fixed,
                                                bool need_moved) {
  const MindOptions o{radius, dilation, neighbourhood, patch, sigma};
  const MindResult r =
      mind_compare<Device, Mind>("mind_map_bwd", fixed, moved, fixed_variance, mask,
                                 grad.div(double(mind_channels(o.six(), fixed.dim() - 2))), o,
                                 {norm, false, false, false, {need_fixed, need_moved}, fixed.scalar_type()});
  return {r.grad[0], r.grad[1]};
}

}  // namespace fastreg
