#pragma once
// What ops that sample at p + u(p) share: which voxel a thread has, the corners it reads there and their
// weights.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/scalar.h"
#include "common/warp.h"
#include "cuda/divisor.h"
#include "cuda/launch.h"

namespace fastreg {

constexpr int kSamplingThreads = 128;

// Blocks are tiles of 32 x 2 x 2 voxels (2D: 32 x 4), a warp a piece of a line: its 32 voxels read
// neighbouring sectors, and neighbours along y and z share lines of the image in L1 (9 lines for 4). All
// tiles are along grid.x, those of a sample after each other. Small blocks: with 56 to 100 registers a thread
// they waste fewer of an SM's.
struct SamplingGrid {
  int32_t in[3] = {}, out[3] = {};  // D, H, W of what is sampled and of the displacement; 2D: D = 1
  int64_t n_in = 0, n_out = 0;      // voxels of a sample
  Divisor tiles[3];                 // along each axis
  int64_t blocks = 0;               // of all samples
  Padding padding = Padding::zeros;
  bool nearest = false;

  SamplingGrid() = default;
  SamplingGrid(int nd, int64_t samples, const int64_t (&in_)[3], const int64_t (&out_)[3]) {
    const int64_t tile[3] = {nd == 3 ? 2 : 1, nd == 3 ? 2 : 4, 32};
    n_in = n_out = 1, blocks = samples;
    for (int k = 0; k < 3; ++k) {
      in[k] = int32_t(in_[k]), out[k] = int32_t(out_[k]);
      n_in *= in_[k], n_out *= out_[k];
      const int64_t count = (out_[k] + tile[k] - 1) / tile[k];
      if (count > 0) tiles[k] = Divisor(count);
      blocks *= count;
    }
  }
};

// The voxel of a thread; lanes past the end of a line and warps past the last one have none.
struct Place {
  int64_t n, voxel;  // sample, index in it
  int32_t at[3];
  bool there;
};

template <int ND>
__device__ __forceinline__ Place place_of(const SamplingGrid& g) {
  uint32_t z = blockIdx.x;
  const uint32_t warp = threadIdx.x / 32;
  uint32_t y = g.tiles[2].divide(z), x = z;  // quotient and remainder
  z = g.tiles[1].divide(y);
  const uint32_t n = g.tiles[0].divide(z);
  Place p;
  p.n = n;
  p.at[0] = ND == 3 ? int32_t(z * 2 + warp / 2) : 0;
  p.at[1] = ND == 3 ? int32_t(y * 2 + warp % 2) : int32_t(y * 4 + warp);
  p.at[2] = int32_t(x * 32 + threadIdx.x % 32);
  p.there = p.at[0] < g.out[0] && p.at[1] < g.out[1] && p.at[2] < g.out[2];
  p.voxel = (int64_t(p.at[0]) * g.out[1] + p.at[1]) * g.out[2] + p.at[2];
  return p;
}

// Corner c of a cell is the upper one along x where bit 0 of c is set, along y bit 1, along z bit 2.
// A corner's index in a volume: planes may have up to 2^32 voxels, volumes more.
template <class A, int ND>
struct Cell {
  static constexpr int kCorners = 1 << ND;

  A fraction[ND];
  int32_t whole[ND];     // index of the lower corner before the boundary rule
  int64_t plane[2];      // first voxel of the lower and upper plane
  uint32_t in_plane[4];  // of corners 0 ... 3
  // Bit c: corner c is a voxel; 8 + k: there is a slope along axis k (none where |u| was cut and beyond the
  // border); 11: the displacement is NaN, and no other bit is set; 12 and 13: see meet_neighbours. One
  // register.
  uint32_t bits;

  // displacement(k) gives component k of a voxel that is there, of type A or double.
  template <class Displacement>
  __device__ __forceinline__ Cell(const SamplingGrid& g, const Place& p, Displacement displacement) {
    uint32_t lower[ND], upper[ND], present = p.there ? (1u << kCorners) - 1 : 0, slopes = 0;
    bool nan = false;
#pragma unroll
    for (int k = 0; k < ND; ++k) {
      const int axis = k + 3 - ND, n = g.in[axis];
      auto u = p.there ? displacement(k) : 0;
      if (g.nearest) u = std::nearbyint(u);
      split(u, whole[k], fraction[k]);
      nan |= fraction[k] != fraction[k];
      const bool capped = whole[k] >= kFarthest || whole[k] <= -kFarthest;
      whole[k] += p.at[axis];
      const int32_t low = corner_index(whole[k], n, g.padding);
      const int32_t high = corner_index(whole[k] + 1, n, g.padding);
      if (!capped && low != high) slopes |= 1u << (8 + k);
      // Bits of the corners that are lower along this axis.
      constexpr uint32_t kLower[3] = {0x0f, 0x33, 0x55};
      present &= (low >= 0 ? kLower[axis] : 0) | (high >= 0 ? ~kLower[axis] : 0);
      lower[k] = uint32_t(low >= 0 ? low : 0), upper[k] = uint32_t(high >= 0 ? high : 0);
    }
    bits = nan ? 1u << 11 : present | slopes;
    // Matches no neighbour.
    if (!p.there) whole[ND - 1] = INT32_MIN;
    const uint32_t line = uint32_t(g.in[2]);
    in_plane[0] = lower[ND - 2] * line + lower[ND - 1], in_plane[1] = lower[ND - 2] * line + upper[ND - 1];
    in_plane[2] = upper[ND - 2] * line + lower[ND - 1], in_plane[3] = upper[ND - 2] * line + upper[ND - 1];
    if constexpr (ND == 3) {
      const uint64_t size = uint64_t(uint32_t(g.in[1])) * line;
      plane[0] = int64_t(lower[0] * size), plane[1] = int64_t(upper[0] * size);
    } else {
      plane[0] = plane[1] = 0;
    }
  }

  __device__ __forceinline__ bool has(int corner) const { return bits >> corner & 1; }
  __device__ __forceinline__ bool nan() const { return bits >> 11 & 1; }
  __device__ __forceinline__ int64_t index(int corner) const {
    return plane[corner >> 2] + in_plane[corner & 3];
  }
  // Along axis k, of the lower or upper corner.
  __device__ __forceinline__ A along(int k, int up) const { return up ? fraction[k] : A(1) - fraction[k]; }

  // 0 for a corner that is absent: what has no weight is neither read nor added to, so that what is not
  // finite reaches only what touches it.
  __device__ __forceinline__ void weights(A (&weight)[kCorners]) const {
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      A w = along(ND - 2, c >> 1 & 1);
      if constexpr (ND == 3) w *= along(0, c >> 2);
      w *= along(ND - 1, c & 1);
      weight[c] = has(c) ? w : A(0);
    }
  }

  // Derivative along axis k of the interpolant of `value`, which is known up to a constant.
  __device__ __forceinline__ A slope(int k, const A (&value)[kCorners]) const {
    A sum = A(0);
    const int bit = 1 << (ND - 1 - k);
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      if (c & bit) continue;
      A w = A(1);
#pragma unroll
      for (int j = 0; j < ND; ++j)
        if (j != k) w *= along(j, c >> (ND - 1 - j) & 1);
      if (w != A(0)) sum += w * (value[c | bit] - value[c]);
    }
    return bits >> (8 + k) & 1 ? sum : A(0);
  }

  // All lanes call it. Afterwards `taken` says whether the upper corners along x of the lane before are the
  // lower ones of this lane, `given` whether the upper ones of this lane are the lower ones of the lane
  // after.
  __device__ __forceinline__ void meet_neighbours() {
    bool match = threadIdx.x % 32 != 0;
#pragma unroll
    for (int k = 0; k < ND; ++k)
      match = (__shfl_up_sync(0xffffffffu, whole[k], 1) + (k == ND - 1) == whole[k]) && match;
    const int next = __shfl_down_sync(0xffffffffu, int(match), 1);
    bits |= uint32_t(match) << 12 | uint32_t(threadIdx.x % 32 != 31 && next) << 13;
  }
  __device__ __forceinline__ bool taken() const { return bits >> 12 & 1; }
  __device__ __forceinline__ bool given() const { return bits >> 13 & 1; }
};

}  // namespace fastreg
