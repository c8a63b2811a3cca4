#pragma once
// What the bindings of lcc_loss hand to its kernels: lcc_box.cpp (cost independent of the window) and
// lcc_weighted.cpp.
#include "common/lcc_loss.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// A window along one axis: tap[i] weighs the two samples i voxels from the centre, tail[i] is the weight of
// all samples of one side from the i-th on (i <= length: taps beyond any image are not listed), total that of
// the axis.
struct LccTaps {
  const double *tap, *tail;
  int64_t length;
  double total;
};

// 2D images are volumes whose y axis has one voxel, so that the march along z still has rows to share among
// threads.
struct LccArgs : LccCall {
  double* sums;  // (n c, planes): sums of mask * -LCC
  int64_t size[3], window[3], radius[3];
  double volume;              // weight of a whole window
  int64_t n_slabs, n_chunks;  // box: slabs of chunks of planes that a channel is cut into
  LccTaps taps[3];            // weighted only; radius is then how far taps reach inside the image
  // Weighted, with gradients: sums over y and x of the adjoint maps of a channel's planes, (n_adjoints, ring,
  // H, W).
  double* adjoints;
  int64_t n_adjoints, ring;
  double reference[2];  // of the channel: what gradients take the images relative to
};

// Work units are (n c, slab of z planes).
FASTREG_KERNEL(void, lcc_slabs, Stored, const LccArgs&, int64_t, int64_t)
// Of channel nc (third argument): sets a.reference; windows of planes; the gradient of planes [first, last),
// work units being runs of kLccRun voxels of a plane.
constexpr int64_t kLccRun = 256;
FASTREG_KERNEL(void, lcc_weighted_reference, Stored, LccArgs&, int64_t)
FASTREG_KERNEL(void, lcc_weighted_windows, Stored, const LccArgs&, int64_t, int64_t, int64_t)
FASTREG_KERNEL(void, lcc_weighted_gradient, Stored, const LccArgs&, int64_t, int64_t, int64_t, int64_t,
               int64_t)

}  // namespace fastreg
