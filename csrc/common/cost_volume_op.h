#pragma once
// The op of cost_volume around its kernel, on any device.
#include "common/cost_volume.h"
#include "common/tensor.h"

namespace fastreg {

// Contiguous inputs, alive as long as their pointers are used.
struct CostInputs {
  at::Tensor fixed, moving, mask;
  CostArgs args{};

  CostInputs(const char* op, const at::Tensor& fixed_, const at::Tensor& moving_, const OptionalTensor& mask_,
             at::IntArrayRef cell, at::IntArrayRef radius, at::IntArrayRef stride)
      : fixed(fixed_.contiguous()), moving(moving_.contiguous()) {
    const int64_t nd = fixed.dim() - 2;
    FASTREG_CHECK(nd == 2 || nd == 3, op, "fixed must have 2 or 3 spatial axes");
    FASTREG_CHECK(fixed.sizes() == moving.sizes() && fixed.scalar_type() == moving.scalar_type(), op,
                  "fixed and moving must have one shape and dtype");
    FASTREG_CHECK(int64_t(cell.size()) == nd && int64_t(radius.size()) == nd && int64_t(stride.size()) == nd,
                  op, "cell, radius and stride must have a number per axis");
    mask = per_voxel(op, "mask", mask_, fixed);
    args.n = fixed.size(0), args.c = fixed.size(1);
    volume_size(op, fixed.sizes(), args.size);
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t of = k - (3 - nd);
      args.cell[k] = of < 0 ? 1 : cell[of];
      args.radius[k] = of < 0 ? 0 : radius[of];
      args.stride[k] = of < 0 ? 1 : stride[of];
      FASTREG_CHECK(args.cell[k] > 0 && args.stride[k] > 0 && args.cell[k] < (1 << 15) &&
                        args.stride[k] < (1 << 15) && args.radius[k] >= 0 && args.radius[k] < (1 << 15),
                    op, "cell and stride must be in [1, 2^15), radius in [0, 2^15)");
      args.cells[k] = (args.size[k] + args.cell[k] - 1) / args.cell[k];
    }
    args.fixed = fixed.const_data_ptr(), args.moving = moving.const_data_ptr();
    args.mask = data_or_null(mask);
  }

  std::vector<int64_t> result_size() const {
    std::vector<int64_t> size{args.n};
    size.insert(size.end(), args.cells + (5 - fixed.dim()), args.cells + 3);
    size.push_back(offsets(args));
    return size;
  }
  at::TensorOptions arithmetic() const { return fixed.options().dtype(arithmetic_of(fixed)); }
};

// A device's Call is CostInputs; forward() writes where the arguments say.
template <class Device, class Call>
at::Tensor cost_volume(const at::Tensor& fixed, const at::Tensor& moving, const OptionalTensor& mask,
                       at::IntArrayRef cell, at::IntArrayRef radius, at::IntArrayRef stride) {
  const Device device("cost_volume", fixed, moving, mask);
  Call call(device, "cost_volume", fixed, moving, mask, cell, radius, stride);
  at::Tensor out = at::empty(call.result_size(), call.arithmetic());
  if (call.fixed.numel() == 0) return out.zero_();  // no channel, or no voxel at all
  call.args.result = out.mutable_data_ptr();
  call.forward();
  return out;
}

}  // namespace fastreg
