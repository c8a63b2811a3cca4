// Bindings of mind and mind_loss; mind_slabs.cuh launches their kernels.
#include "common/mind_op.h"
#include "cuda/binding.h"
#include "cuda/mind_slabs.cuh"

namespace fastreg {
namespace {

using at::Tensor;

// The arguments that options and an image make, and the launches of one call.
class Mind {
 public:
  Mind(const Device& device, const char* op, const Tensor& image, const MindOptions& o)
      : type_(stored(image)),
        stream_(device.stream()),
        arithmetic_(image.options().dtype(arithmetic_of(image))) {
    check_mind(op, image, o);
    const int64_t nd = image.dim() - 2;
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
    a.six = o.six(), a.box = o.patch != "gaussian", a.sigma = o.sigma;
    a.n_directions = int(2 * nd), a.n_channels = mind_channels(a.six, nd);
    a.pairs = mind_directions(mind_pairs(a.six, nd), a.n_channels);
    if (nd == 2)
      for (int k = 0; k < a.n_channels; ++k)
        for (int* direction : {&a.pairs.a[k], &a.pairs.b[k]})
          if (*direction == 3 || *direction == 4) *direction -= 2;
    if (!mind_has_tiles(a) && image.numel()) {
      weights_ = at::empty({2 * (2 * o.radius + 1)}, arithmetic_);
      a.weights = weights_.mutable_data_ptr();
      mind_weights_table(type_, a, weights_.mutable_data_ptr(), stream_);
    }
  }

  Tensor mean_variance(const Tensor& image) const {
    Tensor mean = at::empty({image.size(0)}, image.options().dtype(at::kDouble));
    if (image.numel() == 0) return mean.zero_();
    Mind call = *this;
    call.a.grad[0] = call.a.grad[1] = nullptr;
    call.a.image[0] = image.const_data_ptr();
    call.run(MindTask::variance, true);
    mind_mean(call.a, mean.mutable_data_ptr<double>(), stream_);
    return mean;
  }

  void run(MindTask task, bool sums) {
    a.task = task;
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

  Tensor total() const { return sums_.sum(1); }

  Tensor new_gradient(const Tensor& image, at::ScalarType type) {
    Tensor out = at::empty(image.sizes(), image.options().dtype(type));
    a.grad_type = stored(out);
    return out;
  }

  MindArgs a{};

 private:
  Stored type_;
  cudaStream_t stream_;
  at::TensorOptions arithmetic_;
  Tensor weights_, scratch_, sums_;
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("mind", mind<Device, Mind>);
  m.impl("mind_bwd", mind_bwd<Device, Mind>);
  m.impl("mind_mean_variance", mind_mean_variance<Device, Mind>);
  m.impl("mind_loss", mind_loss<Device, Mind>);
  m.impl("mind_map", mind_map<Device, Mind>);
  m.impl("mind_map_bwd", mind_map_bwd<Device, Mind>);
}

}  // namespace
}  // namespace fastreg
