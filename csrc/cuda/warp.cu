#include <ATen/Context.h>

#include "common/warp_inputs.h"
#include "cuda/binding.h"
#include "cuda/warp_bwd.cuh"

namespace fastreg {
namespace {

struct Call : WarpInputs {
  WarpArgs args{};
  cudaStream_t stream;

  Call(const Device& device, WarpInputs inputs) : WarpInputs(std::move(inputs)), stream(device.stream()) {
    args.image = image.const_data_ptr(), args.displacement = data_or_null(displacement);
    args.affine = static_cast<const double*>(data_or_null(affine));
    args.n = n, args.c = c, args.compose = compose;
    args.grid = SamplingGrid(nd, n, in, out);
    args.grid.padding = padding, args.grid.nearest = nearest;
    FASTREG_CHECK(args.grid.blocks < (int64_t(1) << 31), "warp", "the displacement has too many voxels");
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
    at::Tensor sums, largest;
    if (g.need_image) {
      args.grad_image = g.image.mutable_data_ptr();
      if (at::globalContext().deterministicAlgorithms()) {
        const auto words = image.options().dtype(at::kLong);
        sums = at::zeros({type == Stored::f64 ? kFixedWords<double> : kFixedWords<float>, g.image.numel()},
                         words);
        largest = at::zeros({n}, words);
        args.fixed.sums = static_cast<Word*>(sums.mutable_data_ptr());
        args.fixed.largest = static_cast<Word*>(largest.mutable_data_ptr());
        args.fixed.next = g.image.numel();
        while ((int64_t(1) << args.fixed.log2_terms) < args.grid.n_out) ++args.fixed.log2_terms;
        find_largest(type, args.grad, n, c * args.grid.n_out, static_cast<Word*>(largest.mutable_data_ptr()),
                     stream);
      }
    }
    warp_bwd(type, nd, args, stream);
    if (sums.defined())
      settle(type == Stored::f64, args.fixed, n, c * args.grid.n_in, args.grad_image, stream);
    if (affine_sums.defined()) g.affine = affine_sums.sum(-1);
  }
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("warp", warp<Device, Call>);
  m.impl("warp_bwd", warp_bwd<Device, Call>);
  m.impl("compose", compose<Device, Call>);
  m.impl("compose_bwd", compose_bwd<Device, Call>);
}

}  // namespace
}  // namespace fastreg
