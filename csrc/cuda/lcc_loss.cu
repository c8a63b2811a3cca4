// Bindings of lcc_loss; lcc_loss.cuh chooses its kernels.
#include "common/lcc_loss_op.h"
#include "cuda/binding.h"
#include "cuda/lcc_loss.cuh"

namespace fastreg {
namespace {

using at::Tensor;

LccResult run(const char* op, const Tensor& fixed, const Tensor& moved, const OptionalTensor& mask,
              const OptionalTensor& upstream, const LccOptions& o, const LccWanted& want) {
  const Device device(op, fixed, moved, mask, upstream);
  const LccInputs in(op, fixed, moved, mask, upstream, o);
  LccArgs a{};
  LccResult out = in.begin(a, o, want);
  if (fixed.numel() == 0) return out;
  a.nc = a.n * a.c;
  a.flat = in.nd == 2;
  a.D = a.flat ? 1 : fixed.size(2), a.H = fixed.size(-2), a.W = fixed.size(-1);
  a.type = stored(fixed);
  const LccTapList taps = in.taps(o);
  a.least = 2.0;
  for (int k = 0; k < in.nd; ++k) a.least *= taps.tap[0];
  const LccPlan plan = lcc_plan(a, taps);
  const Tensor partial = at::empty({a.n, a.c * plan.parts}, fixed.options().dtype(at::kDouble));
  const Tensor scratch = at::empty({plan.scratch}, fixed.options().dtype(at::kByte));
  a.partial = partial.mutable_data_ptr<double>();
  lcc(a, plan, o.kind(), taps, scratch.mutable_data_ptr(), device.stream());
  out.sums = partial.sum(1).to(in.arithmetic.dtype());
  return out;
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("lcc_loss", lcc_loss<run>);
  m.impl("lcc_map", lcc_map<run>);
  m.impl("lcc_map_bwd", lcc_map_bwd<run>);
}

}  // namespace
}  // namespace fastreg
