// Bindings of warp and compose; their kernels are in warp.cuh and warp_bwd.cuh.
#include "common/warp_op.h"
#include "cuda/fixed_point_sums.h"
#include "cuda/warp_bwd.cuh"

namespace fastreg {
namespace {

struct WarpCall : WarpInputs {
  WarpArgs args{};
  cudaStream_t stream;

  WarpCall(const Device& device, WarpInputs inputs) : WarpInputs(std::move(inputs)), stream(device.stream()) {
    args.image = image.const_data_ptr(), args.displacement = data_or_null(displacement);
    args.affine = static_cast<const double*>(data_or_null(affine));
    args.n = n, args.c = c, args.compose = compose;
    args.grid = SamplingGrid(nd, n, in, out);
    args.grid.padding = padding, args.grid.nearest = nearest;
    FASTREG_CHECK(args.grid.blocks < (int64_t(1) << 31), op, "the displacement has too many voxels");
  }

  at::Tensor forward() {
    at::Tensor result = at::empty(out_sizes, image.options());
    if (empty()) return result;
    args.result = result.mutable_data_ptr();
    warp_fwd(type, nd, args, stream);
    return result;
  }

  void backward(WarpGradients& g) {
    if (empty() || !(g.positions || g.need_image)) return;
    args.grad = g.upstream.const_data_ptr();
    if (g.positions && g.need_displacement) args.grad_displacement = g.displacement.mutable_data_ptr();
    at::Tensor affine_sums;
    if (g.positions && g.need_affine) {
      affine_sums = at::empty({n, nd, nd + 1, args.grid.blocks / n}, affine.options());
      args.grad_affine = affine_sums.mutable_data_ptr<double>();
    }
    std::optional<FixedPointSums> sums;
    if (g.need_image) {
      args.grad_image = g.image.mutable_data_ptr();
      if (FixedPointSums::wanted()) sums.emplace(args.fixed, g.upstream, g.image, args.grid.n_out, stream);
    }
    warp_bwd(type, nd, args, stream);
    if (sums) sums->settle();
    if (affine_sums.defined()) g.affine = affine_sums.sum(-1);
  }
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("warp", warp<Device, WarpCall>);
  m.impl("warp_bwd", warp_bwd<Device, WarpCall>);
  m.impl("compose", compose<Device, WarpCall>);
  m.impl("compose_bwd", compose_bwd<Device, WarpCall>);
}

}  // namespace
}  // namespace fastreg
