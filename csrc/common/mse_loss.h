#pragma once
// Masked squared differences (docs/formulas.md: MSE).
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

struct MseArgs {
  const void *fixed, *moved;      // (n, c, voxels)
  const void* mask;               // (n, 1, voxels), arithmetic type; or null
  const void* grad;               // backward: arithmetic type, (n), or (n, 1, voxels) where per_voxel
  void* result;                   // map: (n, 1, voxels), arithmetic type; sum: double, one per block
  void *grad_fixed, *grad_moved;  // backward: (n, c, voxels), or null
  int64_t n, c, voxels;
  bool per_voxel;
};

constexpr int64_t kMseBlock = 1024;  // voxels of a block

FASTREG_HD int64_t mse_blocks(const MseArgs& a) { return (a.voxels + kMseBlock - 1) / kMseBlock; }

// What is masked out counts as 0 even where it is not finite; a NaN weight is NaN. V: a number or a vector.
template <class V>
FASTREG_HD V masked(V mask, V value) {
  return mask <= 0 ? V{} : mask * value;
}

}  // namespace fastreg
