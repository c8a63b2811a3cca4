#include "cuda/binding.h"
#include "cuda/local_correlation.cuh"
#include "cuda/local_correlation_bwd.cuh"

namespace fastreg {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of a call as the kernels read them, alive as long as their pointers are used.
struct Call {
  Tensor fixed, moving, displacement, statistics;
  CorrelationArgs args{};
  Stored type;

  Call(const char* op, const Tensor& given_fixed, const Tensor& given_moving, at::IntArrayRef radius,
       const OptionalTensor& given_displacement, c10::string_view scale, c10::string_view padding) {
    const int64_t nd = given_fixed.dim() - 2, missing = 3 - nd;
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
    args.n = fixed.size(0), args.c = fixed.size(1), args.nd = int(nd);
    for (int k = 0; k < 3; ++k) {
      const int64_t size = k < missing ? 1 : fixed.size(k + nd - 1),
                    r = k < missing ? 0 : radius[k - missing];
      FASTREG_CHECK(r >= 0 && r < (1 << 15), op, "radius must be in [0, 2^15)");
      FASTREG_CHECK(size < (1 << 29), op, "an axis must be shorter than 2^29");
      args.size[k] = int(size), args.radius[k] = int(r), args.along[k] = int(2 * r + 1);
    }
    args.plane = int64_t(args.size[1]) * args.size[2], args.voxels = args.size[0] * args.plane;
    args.offsets = int64_t(args.along[0]) * args.along[1] * args.along[2];
    FASTREG_CHECK(args.c < (int64_t(1) << 31), op, "there may be fewer than 2^31 channels");
    FASTREG_CHECK(args.plane < (int64_t(1) << 31), op, "a plane must be smaller than 2^31 voxels");
    if (given_displacement) {
      displacement = given_displacement->to(arithmetic_of(fixed)).contiguous();
      FASTREG_CHECK(displacement.dim() == nd + 2 && displacement.size(0) == args.n &&
                        displacement.size(1) == nd && displacement.sizes().slice(2) == fixed.sizes().slice(2),
                    op, "displacement must have shape (N, nd, *spatial)");
      args.displacement = displacement.const_data_ptr();
    }
    args.fixed = fixed.const_data_ptr(), args.moving = moving.const_data_ptr();
    const double channels = double(std::max<int64_t>(args.c, 1));
    args.factor = scale == "mean" ? 1 / channels : scale == "sqrt" ? 1 / std::sqrt(channels) : 1.0;
    args.border = padding == "border";
  }

  bool empty() const { return fixed.numel() == 0; }

  std::vector<int64_t> output_size() const {
    auto size = fixed.sizes().vec();
    size[1] = args.offsets;
    return size;
  }

  Tensor doubles(at::IntArrayRef size) const { return at::empty(size, fixed.options().dtype(at::kDouble)); }
};

std::tuple<Tensor, Tensor> local_correlation_cuda(const Tensor& fixed, const Tensor& moving,
                                                  at::IntArrayRef radius, const OptionalTensor& displacement,
                                                  bool normalize, c10::string_view scale,
                                                  c10::string_view padding) {
  const char* op = "local_correlation";
  const Device device(op, fixed, moving, displacement);
  Call call(op, fixed, moving, radius, displacement, scale, padding);
  Tensor statistics = call.doubles({0});
  if (normalize) statistics = call.doubles({call.args.n, 4});
  if (call.empty()) return {at::zeros(call.output_size(), fixed.options()), statistics.zero_()};
  if (normalize) {
    Tensor partial = call.doubles({call.args.n, 2, correlation_moments_blocks(call.args), 3});
    double* result = statistics.mutable_data_ptr<double>();
    correlation_statistics(call.type, call.args, partial.mutable_data_ptr<double>(), result, device.stream());
    call.args.statistics = result;
  }
  Tensor out = at::empty(call.output_size(), call.fixed.options());
  correlation_fwd(call.type, call.args, out.mutable_data_ptr(), device.stream());
  return {out.to(fixed.scalar_type()), statistics};
}

// A gradient on its way: gathered into `raw`, finished into `result` where there is more to do.
struct Gradient {
  Tensor result, raw, sums;
  GatherArgs args{};
  bool gather, finish;

  // `dtype` is that of the result.
  Gradient(const Call& call, const Tensor& grad, bool to_moving, bool need, at::ScalarType dtype) {
    const CorrelationArgs& map = call.args;
    const at::ScalarType arithmetic = arithmetic_of(call.fixed);
    args.map = map, args.grad = grad.const_data_ptr(), args.to_moving = to_moving;
    args.groups =
        map.c > (arithmetic == at::kDouble ? kGatherChannels<double> : kGatherChannels<float>) ? 2 : 1;
    bool extends = false;
    for (int k = 0; k < 3; ++k) {
      args.extend[k] = to_moving && map.border ? map.radius[k] : 0;
      extends |= args.extend[k] > 0;
    }
    args.set_sizes();
    // Where normalised, both sums are needed whichever gradient is.
    gather = need || map.statistics;
    finish = need && (extends || map.statistics);
    result = at::empty(need ? call.fixed.sizes() : at::IntArrayRef{0}, call.fixed.options().dtype(dtype));
    if (finish && (extends || dtype != arithmetic))
      raw = at::empty({map.n, map.c, args.voxels}, call.fixed.options().dtype(arithmetic));
    else
      raw = result;
    args.arithmetic = raw.scalar_type() == arithmetic;
    if (need) args.result = raw.mutable_data_ptr();
    if (map.statistics) {
      sums = call.doubles({map.n, args.blocks(call.type), 2});
      args.sums = sums.mutable_data_ptr<double>();
    }
  }
};

std::tuple<Tensor, Tensor> local_correlation_bwd_cuda(const Tensor& grad, const Tensor& fixed,
                                                      const Tensor& moving, const Tensor& statistics,
                                                      at::IntArrayRef radius,
                                                      const OptionalTensor& displacement, bool normalize,
                                                      c10::string_view scale, c10::string_view padding,
                                                      bool need_fixed, bool need_moved) {
  const char* op = "local_correlation_bwd";
  const Device device(op, fixed, grad, moving, statistics, displacement);
  Call call(op, fixed, moving, radius, displacement, scale, padding);
  const at::ScalarType dtype = call.fixed.scalar_type();
  const at::ScalarType moved_dtype = displacement ? arithmetic_of(call.fixed) : dtype;
  if (call.empty() || !(need_fixed || need_moved)) {
    const auto zeros = [&](bool need, at::ScalarType type) {
      return at::zeros(need ? fixed.sizes() : at::IntArrayRef{0}, fixed.options().dtype(type));
    };
    return {zeros(need_fixed, fixed.scalar_type()), zeros(need_moved, moved_dtype)};
  }
  Tensor g = grad.to(dtype).contiguous();
  FASTREG_CHECK(g.sizes() == call.output_size(), op, "grad must have the shape of the output");
  if (normalize) {
    FASTREG_CHECK(statistics.dim() == 2 && statistics.size(0) == call.args.n && statistics.size(1) == 4, op,
                  "statistics must have shape (N, 4)");
    call.statistics = statistics.to(at::kDouble).contiguous();
    call.args.statistics = call.statistics.const_data_ptr<double>();
  }
  Gradient to_fixed(call, g, false, need_fixed, dtype), to_moving(call, g, true, need_moved, moved_dtype);
  Tensor totals[2];
  for (Gradient* gradient : {&to_fixed, &to_moving}) {
    if (gradient->gather) correlation_gather(call.type, gradient->args, device.stream());
    if (normalize) totals[gradient == &to_moving] = gradient->sums.sum(1);
  }
  for (Gradient* gradient : {&to_fixed, &to_moving}) {
    if (!gradient->finish) continue;
    FinishArgs finish{};
    finish.map = call.args, finish.raw = gradient->raw.const_data_ptr();
    std::copy_n(gradient->args.extend, 3, finish.extend);
    if (normalize) {
      finish.fixed_sums = totals[0].const_data_ptr<double>();
      finish.moving_sums = totals[1].const_data_ptr<double>();
    }
    finish.result = gradient->result.mutable_data_ptr();
    finish.to_moving = gradient->args.to_moving;
    finish.arithmetic = gradient->result.scalar_type() == arithmetic_of(call.fixed);
    correlation_finish(call.type, finish, device.stream());
  }
  return {to_fixed.result.to(fixed.scalar_type()), to_moving.result};
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("local_correlation", local_correlation_cuda);
  m.impl("local_correlation_bwd", local_correlation_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
