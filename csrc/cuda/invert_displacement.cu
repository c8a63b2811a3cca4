// Bindings of invert_displacement; its kernels are in invert_displacement.cuh.
#include "common/invert_displacement_op.h"
#include "cuda/binding.h"
#include "cuda/invert_displacement.cuh"

namespace fastreg {
namespace {

struct InvertCall : InvertInputs {
  InvertArgs args{};
  cudaStream_t stream;
  at::Tensor packed;

  InvertCall(const Device& device, InvertInputs inputs)
      : InvertInputs(std::move(inputs)), stream(device.stream()) {
    args.grid = SamplingGrid(nd, n, in, out);
    args.grid.padding = padding;
    FASTREG_CHECK(args.grid.blocks < (int64_t(1) << 31), "invert_displacement", "there are too many points");
    args.points = data_or_null(points);
    if (!empty()) pack();
  }

  void invert(int64_t iterations, const at::Tensor& v) {
    args.iterations = iterations, args.result = v.mutable_data_ptr();
    run(false);
  }
  void adjoint(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& q) {
    args.grad = grad.const_data_ptr(), args.v = v.const_data_ptr(), args.result = q.mutable_data_ptr();
    run(true);
  }

 private:
  void pack() {
    const int64_t width = nd == 3 ? 4 : 2;
    packed = at::empty({n, in[0], in[1], in[2], width}, options);
    IntegrateArgs copy{};
    copy.grid = SamplingGrid(nd, n, in, in);
    FASTREG_CHECK(copy.grid.blocks < (int64_t(1) << 31), "invert_displacement", "u has too many voxels");
    copy.from = u.const_data_ptr(), copy.to = packed.mutable_data_ptr();
    copy.from_stride = u.stride(0), copy.to_stride = packed.stride(0), copy.scale = 1;
    integrate_pack(type, nd, copy, stream);
    args.packed = packed.const_data_ptr();
  }
  void run(bool adjoint) {
    fastreg::invert(type == Stored::f64 ? Stored::f64 : Stored::f32, nd, adjoint, args, stream);
  }
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("invert_displacement", invert_displacement<Device, InvertCall>);
  m.impl("invert_displacement_adjoint", invert_displacement_adjoint<Device, InvertCall>);
}

}  // namespace
}  // namespace fastreg
