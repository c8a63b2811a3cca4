#pragma once
// Mean squared differences of cells (docs/formulas.md: cost volume): which voxels of a cell are compared.
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

// Axes are (z, y, x); 2D is one slice, in cells of one voxel, radius 0 along z.
struct CostArgs {
  const void *fixed, *moving;  // (n, c, *size)
  const void* mask;            // (n, 1, *size), arithmetic type; or null
  void* result;                // (n, *cells, offsets), arithmetic type
  int64_t n, c, size[3], cell[3], radius[3], stride[3], cells[3];
};

FASTREG_HD int64_t window(const CostArgs& a, int k) { return 2 * a.radius[k] + 1; }
FASTREG_HD int64_t offsets(const CostArgs& a) { return window(a, 0) * window(a, 1) * window(a, 2); }

// A cell is compared in blocks of at most kCostBlock voxels an axis: what the samples of a block reach of
// moving is (kCostBlock + 2 radius)^3 values however large the cell, and a sum over its samples short.
constexpr int64_t kCostBlock = 8;

// Along an axis: samples at begin, begin + stride, ..., `count` of them.
struct CostSpan {
  int64_t begin, count;
};

FASTREG_HD int64_t cost_samples_of_block(const CostArgs& a, int k) {
  return (kCostBlock - 1) / a.stride[k] + 1;
}

// Of block `block` of cell `cell`; count 0 beyond the last one.
FASTREG_HD CostSpan cost_span(const CostArgs& a, int k, int64_t cell, int64_t block) {
  const int64_t first = cell * a.cell[k], left = a.size[k] - first;
  const int64_t samples = ((left < a.cell[k] ? left : a.cell[k]) - 1) / a.stride[k] + 1;
  const int64_t most = cost_samples_of_block(a, k), rest = samples - block * most;
  return {first + block * most * a.stride[k], rest < 0 ? 0 : rest < most ? rest : most};
}

}  // namespace fastreg
