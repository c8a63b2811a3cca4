#include "cuda/binding.h"
#include "cuda/mse_loss.cuh"

namespace fastreg {
namespace {

using at::Tensor;

// Contiguous inputs, alive as long as their pointers are used.
struct Inputs {
  Tensor fixed, moved, mask;
  MseArgs args{};

  Inputs(const char* op, const Tensor& fixed_, const Tensor& moved_, const std::optional<Tensor>& mask_)
      : fixed(fixed_.contiguous()), moved(moved_.contiguous()) {
    FASTREG_CHECK(
        fixed.dim() >= 3 && fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
        "fixed and moved must have one shape and dtype");
    args.n = fixed.size(0), args.c = fixed.size(1);
    args.voxels = c10::multiply_integers(fixed.sizes().slice(2));
    FASTREG_CHECK(args.n <= kMaxGridY, op, "there may be at most 65535 samples, got ", args.n);
    args.fixed = fixed.const_data_ptr(), args.moved = moved.const_data_ptr();
    if (mask_) {
      mask = mask_->to(arithmetic_of(fixed)).contiguous();
      FASTREG_CHECK(mask.dim() == fixed.dim() && mask.size(1) == 1 && mask.size(0) == fixed.size(0) &&
                        mask.sizes().slice(2) == fixed.sizes().slice(2),
                    op, "mask must have shape (N, 1, *spatial)");
      args.mask = mask.const_data_ptr();
    }
  }
};

Tensor mse_loss_cuda(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask) {
  const Device device("mse_loss", fixed, moved, mask);
  Inputs in("mse_loss", fixed, moved, mask);
  Tensor partial = at::empty({in.args.n, in.fixed.numel() ? mse_blocks(in.args) : 0},
                             in.fixed.options().dtype(at::kDouble));
  in.args.result = partial.mutable_data_ptr();
  if (partial.numel()) mse_fwd(stored(in.fixed), in.args, device.stream());
  return partial.sum(1).to(arithmetic_of(in.fixed));
}

Tensor mse_map_cuda(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask) {
  const Device device("mse_map", fixed, moved, mask);
  Inputs in("mse_map", fixed, moved, mask);
  auto shape = in.fixed.sizes().vec();
  shape[1] = 1;
  Tensor out = at::empty(shape, in.fixed.options().dtype(arithmetic_of(in.fixed)));
  if (in.fixed.numel() == 0) return out.fill_(NAN);  // no channel to average over, or no voxel at all
  in.args.result = out.mutable_data_ptr();
  in.args.per_voxel = true;
  mse_fwd(stored(in.fixed), in.args, device.stream());
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_bwd_cuda(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                             const std::optional<Tensor>& mask, bool need_fixed,
                                             bool need_moved) {
  const Device device("mse_loss_bwd", fixed, moved, mask, grad);
  Inputs in("mse_loss_bwd", fixed, moved, mask);
  in.args.per_voxel = grad.dim() > 1;
  FASTREG_CHECK(
      grad.size(0) == in.args.n && grad.numel() == in.args.n * (in.args.per_voxel ? in.args.voxels : 1),
      "mse_loss_bwd", "grad must have shape (N,) or (N, 1, *spatial)");
  Tensor g = grad.to(arithmetic_of(in.fixed)).contiguous();
  const auto result = [&](bool need) {
    return at::empty(need ? in.fixed.sizes() : at::IntArrayRef{0}, in.fixed.options());
  };
  Tensor grad_fixed = result(need_fixed), grad_moved = result(need_moved);
  if (in.fixed.numel() == 0) return {grad_fixed, grad_moved};
  in.args.grad = g.const_data_ptr();
  if (need_fixed) in.args.grad_fixed = grad_fixed.mutable_data_ptr();
  if (need_moved) in.args.grad_moved = grad_moved.mutable_data_ptr();
  mse_bwd(stored(in.fixed), in.args, device.stream());
  return {grad_fixed, grad_moved};
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("mse_loss", mse_loss_cuda);
  m.impl("mse_map", mse_map_cuda);
  m.impl("mse_loss_bwd", mse_loss_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
