// Bindings of mse_loss; its kernels are in mse_loss.cuh.
#include "common/mse_loss_op.h"
#include "cuda/binding.h"
#include "cuda/mse_loss.cuh"

namespace fastreg {
namespace {

struct MseLossCall : MseInputs {
  cudaStream_t stream;

  template <class... Inputs>
  MseLossCall(const Device& device, const char* op, const Inputs&... inputs)
      : MseInputs(op, inputs...), stream(device.stream()) {
    FASTREG_CHECK(args.n <= kMaxGridY, op, "there may be at most 65535 samples, got ", args.n);
  }

  at::Tensor sums() {
    at::Tensor partial = at::empty({args.n, mse_blocks(args)}, fixed.options().dtype(at::kDouble));
    args.result = partial.mutable_data_ptr();
    forward();
    return partial.sum(1);
  }
  void forward() { mse_fwd(stored(fixed), args, stream); }
  void backward() { mse_bwd(stored(fixed), args, stream); }
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("mse_loss", mse_loss<Device, MseLossCall>);
  m.impl("mse_map", mse_map<Device, MseLossCall>);
  m.impl("mse_loss_bwd", mse_loss_bwd<Device, MseLossCall>);
}

}  // namespace
}  // namespace fastreg
