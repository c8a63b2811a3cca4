#pragma once
#include "cuda/lcc_separable.cuh"

namespace fastreg {

inline LccPlan lcc_plan(const LccArgs& a, Window, const LccTapList& taps) {
  return lcc_separable_plan(a, taps);
}

inline void lcc(const LccArgs& a, const LccPlan& plan, Window, const LccTapList& taps, void* scratch,
                cudaStream_t stream) {
  lcc_separable(a, plan, taps, scratch, stream);
}

}  // namespace fastreg
