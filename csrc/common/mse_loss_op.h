#pragma once
// The ops of mse_loss around its kernels, on any device.
#include <cmath>
#include <tuple>

#include "common/mse_loss.h"
#include "common/tensor.h"

namespace fastreg {

// Contiguous inputs, alive as long as their pointers are used.
struct MseInputs {
  at::Tensor fixed, moved, mask;
  MseArgs args{};

  MseInputs(const char* op, const at::Tensor& fixed_, const at::Tensor& moved_, const OptionalTensor& mask_)
      : fixed(fixed_.contiguous()), moved(moved_.contiguous()) {
    FASTREG_CHECK(
        fixed.dim() >= 3 && fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
        "fixed and moved must have one shape and dtype");
    mask = per_voxel(op, "mask", mask_, fixed);
    args.n = fixed.size(0), args.c = fixed.size(1);
    args.voxels = c10::multiply_integers(fixed.sizes().slice(2));
    args.fixed = fixed.const_data_ptr(), args.moved = moved.const_data_ptr(), args.mask = data_or_null(mask);
  }

  bool empty() const { return fixed.numel() == 0; }
  at::TensorOptions arithmetic() const { return fixed.options().dtype(arithmetic_of(fixed)); }
};

// A device's Call is MseInputs and runs its kernels where there is a value: sums() returns (N,), forward()
// and backward() write where the arguments say.
template <class Device, class Call>
at::Tensor mse_loss(const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& mask) {
  const Device device("mse_loss", fixed, moved, mask);
  Call call(device, "mse_loss", fixed, moved, mask);
  if (call.empty()) return at::zeros({call.args.n}, call.arithmetic());
  return call.sums().to(arithmetic_of(fixed));
}

template <class Device, class Call>
at::Tensor mse_map(const at::Tensor& fixed, const at::Tensor& moved, const OptionalTensor& mask) {
  const Device device("mse_map", fixed, moved, mask);
  Call call(device, "mse_map", fixed, moved, mask);
  at::Tensor out = at::empty(with_channels(fixed, 1), call.arithmetic());
  if (call.empty()) return out.fill_(NAN);  // no channel to average over, or no voxel at all
  call.args.result = out.mutable_data_ptr();
  call.args.per_voxel = true;
  call.forward();
  return out;
}

template <class Device, class Call>
std::tuple<at::Tensor, at::Tensor> mse_loss_bwd(const at::Tensor& grad, const at::Tensor& fixed,
                                                const at::Tensor& moved, const OptionalTensor& mask,
                                                bool need_fixed, bool need_moved) {
  const Device device("mse_loss_bwd", fixed, moved, mask, grad);
  Call call(device, "mse_loss_bwd", fixed, moved, mask);
  MseArgs& args = call.args;
  args.per_voxel = grad.dim() > 1;
  FASTREG_CHECK(grad.size(0) == args.n && grad.numel() == args.n * (args.per_voxel ? args.voxels : 1),
                "mse_loss_bwd", "grad must have shape (N,) or (N, 1, *spatial)");
  const at::Tensor g = grad.to(arithmetic_of(fixed)).contiguous();
  at::Tensor grad_fixed = empty_if(need_fixed, fixed.sizes(), call.fixed.options()),
             grad_moved = empty_if(need_moved, fixed.sizes(), call.fixed.options());
  if (call.empty()) return {grad_fixed, grad_moved};
  args.grad = g.const_data_ptr();
  if (need_fixed) args.grad_fixed = grad_fixed.mutable_data_ptr();
  if (need_moved) args.grad_moved = grad_moved.mutable_data_ptr();
  call.backward();
  return {grad_fixed, grad_moved};
}

}  // namespace fastreg
