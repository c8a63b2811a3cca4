// Bindings of cost_volume; its kernel is in cost_volume.cuh.
#include "common/cost_volume_op.h"
#include "cuda/binding.h"
#include "cuda/cost_volume.cuh"

namespace fastreg {
namespace {

struct CostVolumeCall : CostInputs {
  cudaStream_t stream;

  template <class... Inputs>
  CostVolumeCall(const Device& device, const char* op, const Inputs&... inputs)
      : CostInputs(op, inputs...), stream(device.stream()) {
    constexpr int64_t kMost = int64_t(1) << 31;
    FASTREG_CHECK(args.size[0] * args.size[1] * args.size[2] < kMost, op,
                  "images must be smaller than 2^31 voxels");
    FASTREG_CHECK(args.n * args.cells[0] * args.cells[1] * args.cells[2] < kMost, op,
                  "there are too many cells");
    FASTREG_CHECK(offsets(args) <= kMaxGridY * kCostThreads * kCostMaxOffsets, op, "radius is too large");
  }

  void forward() { cost_fwd(stored(fixed), args, stream); }
};

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("cost_volume", cost_volume<Device, CostVolumeCall>);
}

}  // namespace
}  // namespace fastreg
