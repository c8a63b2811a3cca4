#include "cuda/binding.h"
#include "cuda/mind_slabs.cuh"

namespace fastreg {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

struct Options {
  int64_t radius, dilation;
  c10::string_view neighbourhood, patch;
  double sigma;
};

// The arguments that options and an image make, and the launches of one call.
class Mind {
 public:
  Mind(const char* op, const Tensor& image, const Options& o, cudaStream_t stream)
      : type_(stored(image)), stream_(stream), arithmetic_(image.options().dtype(arithmetic_of(image))) {
    const int64_t nd = image.dim() - 2;
    FASTREG_CHECK((nd == 2 || nd == 3) && image.size(1) > 0, op,
                  "images must have 2 or 3 spatial axes and a channel");
    FASTREG_CHECK(o.radius >= 0 && o.dilation >= 0, op, "radius and dilation must not be negative");
    for (int64_t size : image.sizes().slice(2))
      FASTREG_CHECK(size + 4 * o.radius < (int64_t(1) << 30), op, "an axis or the radius is too long");
    a.n = image.size(0), a.c = image.size(1);
    // A 2D image is a volume of its rows.
    a.size[0] = int(image.size(2)), a.size[1] = nd == 3 ? int(image.size(3)) : 1,
    a.size[2] = int(image.size(nd + 1));
    for (int axis = 0; axis < 3; ++axis) {
      const bool used = nd == 3 || axis != 1;
      a.radius[axis] = used ? int(o.radius) : 0;
      // Longer offsets end at the border all the same.
      a.dilation[axis] = used ? int(std::min<int64_t>(o.dilation, std::max(a.size[axis] - 1, 0))) : 0;
    }
    a.six = o.neighbourhood == "six", a.box = o.patch != "gaussian", a.sigma = o.sigma;
    a.n_directions = int(2 * nd), a.n_channels = a.six ? int(2 * nd) : nd == 3 ? 12 : 4;
    a.pairs = mind_directions(a.six ? kSix + (nd == 2 ? 2 : 0) : nd == 3 ? kSsc3 : kSsc2, a.n_channels);
    if (nd == 2)
      for (int k = 0; k < a.n_channels; ++k)
        for (int* direction : {&a.pairs.a[k], &a.pairs.b[k]})
          if (*direction == 3 || *direction == 4) *direction -= 2;
    a.grad_type = type_;
    if (!mind_has_tiles(a) && image.numel()) {
      weights_ = at::empty({2 * (2 * o.radius + 1)}, arithmetic_);
      a.weights = weights_.mutable_data_ptr();
      mind_weights_table(type_, a, weights_.mutable_data_ptr(), stream);
    }
  }

  // Mean of V of each sample; NaN where it is not finite.
  Tensor mean_variance(const Tensor& image) const {
    Tensor mean = at::empty({image.size(0)}, image.options().dtype(at::kDouble));
    if (image.numel() == 0) return mean.zero_();
    Mind call = *this;
    // No gradient returns from it, though its owner may have asked for one by now.
    call.a.grad[0] = call.a.grad[1] = nullptr;
    call.a.task = MindTask::variance;
    call.a.image[0] = image.const_data_ptr();
    call.run(true);
    mind_mean(call.a, mean.mutable_data_ptr<double>(), stream_);
    return mean;
  }

  // What the task of `a` asks for; with `sums`, also the partial sums.
  void run(bool sums) {
    scratch_ = at::empty({mind_plan(a)}, arithmetic_);
    mind_place(a, scratch_.mutable_data_ptr(), scratch_.element_size());
    if (sums) {
      sums_ = at::empty({a.n, a.sums_stride}, arithmetic_.dtype(at::kDouble));
      a.sums = sums_.mutable_data_ptr<double>();
      const int64_t slabs = (a.size[0] + a.slab - 1) / a.slab;
      if (slabs > 1) sums_.zero_();  // the last slab may have fewer
    }
    mind_run(type_, a, stream_);
  }

  Tensor total() const { return sums_.sum(1).to(arithmetic_.dtype()); }

  MindArgs a{};

 private:
  Stored type_;
  cudaStream_t stream_;
  at::TensorOptions arithmetic_;
  Tensor weights_, scratch_, sums_;
};

std::vector<int64_t> with_channels(const Tensor& image, int64_t channels) {
  std::vector<int64_t> shape = image.sizes().vec();
  shape[1] = channels;
  return shape;
}

Tensor mind_mean_variance_cuda(const Tensor& image, int64_t radius, int64_t dilation,
                               c10::string_view neighbourhood, c10::string_view patch, double sigma) {
  const Device device("mind_mean_variance", image);
  const Tensor in = image.contiguous();
  const Options o{radius, dilation, neighbourhood, patch, sigma};
  return Mind("mind_mean_variance", in, o, device.stream()).mean_variance(in);
}

Tensor mind_cuda(const Tensor& image, int64_t radius, int64_t dilation, c10::string_view neighbourhood,
                 c10::string_view patch, double sigma) {
  const Device device("mind", image);
  const Tensor in = image.contiguous();
  Mind mind("mind", in, {radius, dilation, neighbourhood, patch, sigma}, device.stream());
  Tensor out = at::empty(with_channels(in, mind.a.n_channels), in.options());
  if (in.numel() == 0) return out;
  const Tensor mean = mind.mean_variance(in);
  mind.a.task = MindTask::describe, mind.a.out = out.mutable_data_ptr();
  mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
  mind.run(false);
  return out;
}

Tensor mind_bwd_cuda(const Tensor& grad, const Tensor& image, int64_t radius, int64_t dilation,
                     c10::string_view neighbourhood, c10::string_view patch, double sigma) {
  const Device device("mind_bwd", image, grad);
  const Tensor in = image.contiguous(), up = grad.to(in.scalar_type()).contiguous();
  Mind mind("mind_bwd", in, {radius, dilation, neighbourhood, patch, sigma}, device.stream());
  FASTREG_CHECK(up.sizes() == at::IntArrayRef(with_channels(in, mind.a.n_channels)), "mind_bwd",
                "grad must have the shape of the descriptors");
  Tensor out = at::empty(in.sizes(), in.options());
  if (in.numel() == 0) return out;
  const Tensor mean = mind.mean_variance(in);
  mind.a.task = MindTask::describe_bwd, mind.a.upstream = up.const_data_ptr();
  mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
  mind.a.grad[0] = out.mutable_data_ptr();
  mind.run(false);
  return out;
}

struct Result {
  Tensor sums, map, grad[2];
};

struct Comparison {
  c10::string_view norm;
  bool is_mask, want_sums, want_map, need_fixed, need_moved;
  at::ScalarType grad_type;
};

Result compare(const char* op, const Tensor& fixed, const Tensor& moved, const Optional& fixed_variance,
               const Optional& weight_, const Options& o, const Comparison& how) {
  const Device device(op, fixed, moved, fixed_variance, weight_);
  const Tensor image[2] = {fixed.contiguous(), moved.contiguous()};
  const bool need[2] = {how.need_fixed, how.need_moved};
  FASTREG_CHECK(image[0].sizes() == image[1].sizes(), op, "fixed and moved must have one shape");
  FASTREG_CHECK(image[0].scalar_type() == image[1].scalar_type(), op, "fixed and moved must have one dtype");
  Mind mind(op, image[0], o, device.stream());
  const auto arithmetic = image[0].options().dtype(arithmetic_of(image[0]));
  const std::vector<int64_t> shape = with_channels(image[0], 1);
  Tensor weight, mean[2];
  if (weight_) {
    FASTREG_CHECK(weight_->sizes() == at::IntArrayRef(shape), op,
                  "mask and grad must have shape (N, 1, *spatial)");
    weight = weight_->to(arithmetic.dtype()).contiguous();
    mind.a.weight = weight.const_data_ptr();
  }
  Result result;
  result.map = at::empty(how.want_map ? at::IntArrayRef(shape) : at::IntArrayRef{0}, arithmetic);
  for (int i = 0; i < 2; ++i)
    result.grad[i] =
        at::empty(need[i] ? image[i].sizes() : at::IntArrayRef{0}, image[i].options().dtype(how.grad_type));
  if (image[0].numel() == 0) {
    result.sums = at::zeros({shape[0]}, arithmetic);
    return result;
  }
  for (int i = 0; i < 2; ++i) {
    if (i == 0 && fixed_variance) {
      FASTREG_CHECK(fixed_variance->dim() == 1 && fixed_variance->size(0) == shape[0], op,
                    "fixed_variance must have shape (N,)");
      mean[i] = fixed_variance->to(at::kDouble).contiguous();
    } else {
      mean[i] = mind.mean_variance(image[i]);
    }
    mind.a.image[i] = image[i].const_data_ptr(), mind.a.mean[i] = mean[i].const_data_ptr<double>();
    mind.a.grad[i] = need[i] ? result.grad[i].mutable_data_ptr() : nullptr;
  }
  mind.a.task = MindTask::compare, mind.a.grad_type = stored(result.grad[0]);
  mind.a.is_mask = how.is_mask, mind.a.absolute = how.norm == "l1";
  mind.a.out = how.want_map ? result.map.mutable_data_ptr() : nullptr;
  mind.run(how.want_sums);
  if (how.want_sums) result.sums = mind.total();
  return result;
}

std::tuple<Tensor, Tensor, Tensor> mind_loss_cuda(const Tensor& fixed, const Tensor& moved,
                                                  const Optional& fixed_variance, const Optional& mask,
                                                  int64_t radius, int64_t dilation,
                                                  c10::string_view neighbourhood, c10::string_view patch,
                                                  double sigma, c10::string_view norm, bool need_fixed,
                                                  bool need_moved) {
  Result r = compare("mind_loss", fixed, moved, fixed_variance, mask,
                     {radius, dilation, neighbourhood, patch, sigma},
                     {norm, true, true, false, need_fixed, need_moved, arithmetic_of(fixed)});
  return {r.sums, r.grad[0], r.grad[1]};
}

Tensor mind_map_cuda(const Tensor& fixed, const Tensor& moved, const Optional& fixed_variance, int64_t radius,
                     int64_t dilation, c10::string_view neighbourhood, c10::string_view patch, double sigma,
                     c10::string_view norm) {
  return compare("mind_map", fixed, moved, fixed_variance, std::nullopt,
                 {radius, dilation, neighbourhood, patch, sigma},
                 {norm, false, false, true, false, false, arithmetic_of(fixed)})
      .map;
}

std::tuple<Tensor, Tensor> mind_map_bwd_cuda(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                             const Optional& fixed_variance, int64_t radius, int64_t dilation,
                                             c10::string_view neighbourhood, c10::string_view patch,
                                             double sigma, c10::string_view norm, bool need_fixed,
                                             bool need_moved) {
  const int64_t nd = fixed.dim() - 2, channels = neighbourhood == "six" ? 2 * nd : nd == 3 ? 12 : 4;
  Result r = compare("mind_map_bwd", fixed, moved, fixed_variance, grad.div(double(channels)),
                     {radius, dilation, neighbourhood, patch, sigma},
                     {norm, false, false, false, need_fixed, need_moved, fixed.scalar_type()});
  return {r.grad[0], r.grad[1]};
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("mind", mind_cuda);
  m.impl("mind_bwd", mind_bwd_cuda);
  m.impl("mind_mean_variance", mind_mean_variance_cuda);
  m.impl("mind_loss", mind_loss_cuda);
  m.impl("mind_map", mind_map_cuda);
  m.impl("mind_map_bwd", mind_map_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
