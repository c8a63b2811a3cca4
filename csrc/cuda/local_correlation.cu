// Bindings of local_correlation; its kernels are in local_correlation.cuh and local_correlation_bwd.cuh.
#include "common/local_correlation_op.h"
#include "cuda/binding.h"
#include "cuda/local_correlation.cuh"
#include "cuda/local_correlation_bwd.cuh"

namespace fastreg {
namespace {

using at::Tensor;

struct LocalCorrelationCall : CorrelationInputs {
  CorrelationArgs args{};

  template <class... Inputs>
  explicit LocalCorrelationCall(const char* op, const Inputs&... inputs) : CorrelationInputs(op, inputs...) {
    args.n = n, args.c = c, args.nd = int(nd);
    for (int k = 0; k < 3; ++k) {
      args.size[k] = int(size[k]), args.radius[k] = int(reach[k]);
      args.along[k] = int(2 * reach[k] + 1);
    }
    args.plane = size[1] * size[2], args.voxels = size[0] * args.plane, args.offsets = offsets;
    FASTREG_CHECK(c < (int64_t(1) << 31), op, "there may be fewer than 2^31 channels");
    FASTREG_CHECK(args.plane < (int64_t(1) << 31), op, "a plane must be smaller than 2^31 voxels");
    args.fixed = fixed.const_data_ptr(), args.moving = moving.const_data_ptr();
    args.displacement = data_or_null(displacement);
    args.factor = factor, args.border = border;
  }

  Tensor doubles(at::IntArrayRef size) const { return at::empty(size, fixed.options().dtype(at::kDouble)); }
};

std::tuple<Tensor, Tensor> local_correlation_cuda(const Tensor& fixed, const Tensor& moving,
                                                  at::IntArrayRef radius, const OptionalTensor& displacement,
                                                  bool normalize, c10::string_view scale,
                                                  c10::string_view padding) {
  const char* op = "local_correlation";
  const Device device(op, fixed, moving, displacement);
  LocalCorrelationCall call(op, fixed, moving, radius, displacement, scale, padding);
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
  Gradient(const LocalCorrelationCall& call, const Tensor& grad, bool to_moving, bool need,
           at::ScalarType dtype) {
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
    result = empty_if(need, call.fixed.sizes(), call.fixed.options().dtype(dtype));
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
  LocalCorrelationCall call(op, fixed, moving, radius, displacement, scale, padding);
  const at::ScalarType dtype = call.fixed.scalar_type();
  const at::ScalarType moved_dtype = displacement ? arithmetic_of(call.fixed) : dtype;
  if (call.empty() || !(need_fixed || need_moved)) {
    const auto zeros = [&](bool need, at::ScalarType type) {
      return empty_if(need, fixed.sizes(), fixed.options().dtype(type)).zero_();
    };
    return {zeros(need_fixed, fixed.scalar_type()), zeros(need_moved, moved_dtype)};
  }
  const Tensor g = call.upstream(op, grad);
  if (normalize) call.args.statistics = call.keep_statistics(op, statistics);
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
