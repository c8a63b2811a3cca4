#pragma once
// Window sums of a tile, fp32, never subtractive: what lcc_windows.cuh and lcc_gradient.cuh share.
//
// A block owns 16 x 16 columns of a run of planes, a thread one of them, and marches along z two planes at a
// time. Of both planes the tile with its halo lies in shared memory; sums along x, four outputs a thread from
// vector loads; sums along y, eight outputs a thread (neighbours share the samples that are in all their
// windows); then each thread adds its column's plane sums to the windows along z that are open: sums in
// registers, `2 radius` a map, that move down as windows close, so that a plane enters each of its windows
// and nothing is ever taken away. Two planes at a time, a box window costs half an addition a plane along z.
#include <algorithm>

#include "cuda/lcc_args.cuh"

namespace fastreg {

constexpr int kLccTile = 16, kLccTileThreads = kLccTile * kLccTile;
constexpr int kLccReach = 10;    // largest radius of the windows of this path
constexpr int kLccUnrolled = 5;  // largest radius of the box windows that have kernels of their own
constexpr int kLccSegment = 32;  // planes that share a shift

struct LccTiled {
  LccArgs a;
  float tap[kLccReach + 1], tail[kLccReach + 2], total;  // of each axis (2D: not of z); see LccTapList
  int radius, radius_z;
  bool box;
  int tiles_x, tiles, segments, segment;  // tiles of a plane; segments of a channel and their planes
  float2* reference;                      // (nc, segments, tiles): what a tile's samples are shifted by
  float* adjoints;                        // (group, ring, n_adjoints, H, W)
  int ring, n_adjoints;
  int64_t channel;
  int first, last;  // segments (windows) or planes (gradient) of this launch

  // Weight of a window's samples outside an axis (of y or x).
  __device__ float outside(int i, int64_t size) const {
    const int below = i + 1 < radius + 1 ? i + 1 : radius + 1;
    const int above = size - i < radius + 1 ? int(size - i) : radius + 1;
    return tail[below] + tail[above];
  }
};

// Box windows have a radius the compiler knows; kRadius = kLccReach, listed: any, and weights.
template <int kRadius_, bool kListed_>
struct LccShape {
  static constexpr int kRadius = kRadius_, kWindow = 2 * kRadius + 1;
  static constexpr bool kListed = kListed_;
  static constexpr int kRows = kLccTile + 2 * kRadius;
  // Rows lie 8 (mod 16) words apart: in a vector load the eighth of a warp that reads rows y and y + 2 meets
  // every bank once.
  static constexpr int kStride = kRadius <= 4 ? 24 : 40;
  static constexpr int kPlane = kRows * kStride;             // of one map, with halo
  static constexpr int kSums = kRows * kLccTile + kLccTile;  // summed along x; an odd multiple of 16
  static constexpr int kColumns = kLccTile * kLccTile;       // summed along x and y
  // Blocks that a multiprocessor should hold, by the number of maps summed along z.
  static constexpr int min_blocks(bool few) { return kListed ? 1 : few && kRadius <= 4 ? 3 : 2; }
  static constexpr int kPositions = (kRows * kRows + kLccTileThreads - 1) / kLccTileThreads;

  int radius;
  __device__ explicit LccShape(const LccTiled& s) : radius(kListed ? s.radius : kRadius) {}
  __device__ int reach() const { return kListed ? radius : kRadius; }
  __device__ int rows() const { return kLccTile + 2 * reach(); }

  static constexpr int shared_floats(int maps, int sums) {
    return 2 * (maps * kPlane + sums * (kSums + kColumns));
  }
};

// out[i] = x[i] + ... + x[i + kWindow - 1]; the samples that all windows hold are added once.
template <int kOut, int kWindow>
__device__ __forceinline__ void lcc_box_sums(const float* x, float* out) {
  if constexpr (kOut == 1) {
    float sum = x[0];
#pragma unroll
    for (int k = 1; k < kWindow; ++k) sum += x[k];
    out[0] = sum;
  } else if constexpr (kWindow <= kOut) {
    lcc_box_sums<kOut / 2, kWindow>(x, out);
    lcc_box_sums<kOut / 2, kWindow>(x + kOut / 2, out + kOut / 2);
  } else {
    float core = x[kOut - 1];
#pragma unroll
    for (int k = kOut; k < kWindow; ++k) core += x[k];
    out[kOut - 1] = core;
    float lead = 0;
#pragma unroll
    for (int i = kOut - 2; i >= 0; --i) {
      lead = i == kOut - 2 ? x[i] : lead + x[i];
      out[i] = core + lead;
    }
    float trail = 0;
#pragma unroll
    for (int i = 1; i < kOut; ++i) {
      trail = i == 1 ? x[kWindow] : trail + x[kWindow + i - 1];
      out[i] += trail;
    }
  }
}

// Sums along x. `maps` (kSlices, kMaps, rows, kStride) to `sums` (kSlices, kSums, ...). `moments` makes of a
// sample's kMaps values the kSums that are summed.
template <class Shape, int kSlices, int kMaps, int kSums, class Moments>
__device__ __forceinline__ void lcc_sum_x(const LccTiled& s, const Shape& shape, Shared<float> maps,
                                          Shared<float> sums, Moments moments) {
  constexpr int kOut = 4, kGroups = kLccTile / kOut;
  const int rows = shape.rows(), r = shape.reach(), items = (rows + 3) / 4 * 4 * kGroups;
  for (int i = threadIdx.x; i < kSlices * items; i += kLccTileThreads) {
    const int slice = i / items, at = i - slice * items;
    // Of eight neighbouring threads four read row y and four row y + 2.
    const int row = at / 16 * 4 + at / 8 % 2 + at / 4 % 2 * 2, x = at % 4 * kOut;
    if (row >= rows) continue;
    const auto from = maps + slice * kMaps * Shape::kPlane + row * Shape::kStride + x;
    const auto to = sums + slice * kSums * Shape::kSums + row * kLccTile + x;
    float out[kSums][kOut];
    if constexpr (Shape::kListed) {
#pragma unroll
      for (int k = 0; k < kSums; ++k)
#pragma unroll
        for (int j = 0; j < kOut; ++j) out[k][j] = 0;
      for (int t = 0; t < 2 * r + kOut; ++t) {
        float value[kMaps], moment[kSums];
#pragma unroll
        for (int k = 0; k < kMaps; ++k) value[k] = from[k * Shape::kPlane + t];
        moments(value, moment);
#pragma unroll
        for (int j = 0; j < kOut; ++j) {
          const int k = t - j - r;
          if (k < -r || k > r) continue;  // not times 0: the sample may be NaN
          const float tap = s.tap[k < 0 ? -k : k];
#pragma unroll
          for (int map = 0; map < kSums; ++map) out[map][j] += tap * moment[map];
        }
      }
    } else {
      constexpr int kIn = kOut + 2 * Shape::kRadius, kPacks = (kIn + 3) / 4;
      float value[kMaps][kPacks * 4];
#pragma unroll
      for (int k = 0; k < kMaps; ++k)
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const Pack<float, 4> pack = shared_as<Pack<float, 4>>(from + k * Shape::kPlane)[p];
#pragma unroll
          for (int j = 0; j < 4; ++j) value[k][4 * p + j] = pack.value[j];
        }
      float moment[kSums][kIn];
#pragma unroll
      for (int t = 0; t < kIn; ++t) {
        float in[kMaps], m[kSums];
#pragma unroll
        for (int k = 0; k < kMaps; ++k) in[k] = value[k][t];
        moments(in, m);
#pragma unroll
        for (int k = 0; k < kSums; ++k) moment[k][t] = m[k];
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) lcc_box_sums<kOut, Shape::kWindow>(moment[k], out[k]);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      Pack<float, 4> pack;
#pragma unroll
      for (int j = 0; j < kOut; ++j) pack.value[j] = out[k][j];
      shared_as<Pack<float, 4>>(to + k * Shape::kSums)[0] = pack;
    }
  }
}

// Sums along y of both planes: `sums` to `columns` (2, kSums, 16, 16).
template <class Shape, int kSums>
__device__ __forceinline__ void lcc_sum_y(const LccTiled& s, const Shape& shape, Shared<float> sums,
                                          Shared<float> columns) {
  if constexpr (Shape::kListed) {
    // Two outputs and all maps a thread: a tap is fetched once for all maps.
    constexpr int kOut = 2;
    const int r = shape.reach(), plane = threadIdx.x / 128, x = threadIdx.x % 16,
              y = threadIdx.x / 16 % 8 * kOut;
    const auto from = sums + plane * kSums * Shape::kSums + y * kLccTile + x;
    const auto to = columns + plane * kSums * Shape::kColumns + y * kLccTile + x;
    float out[kSums][kOut] = {};
    for (int t = 0; t < 2 * r + kOut; ++t) {
      float value[kSums];
#pragma unroll
      for (int k = 0; k < kSums; ++k) value[k] = from[k * Shape::kSums + t * kLccTile];
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        const int k = t - j - r;
        if (k < -r || k > r) continue;
        const float tap = s.tap[k < 0 ? -k : k];
#pragma unroll
        for (int map = 0; map < kSums; ++map) out[map][j] += tap * value[map];
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k)
#pragma unroll
      for (int j = 0; j < kOut; ++j) to[k * Shape::kColumns + j * kLccTile] = out[k][j];
  } else {
    constexpr int kOut = 8, kIn = kOut + 2 * Shape::kRadius, kItems = 2 * 2 * kSums * kLccTile;
    for (int i = threadIdx.x; i < kItems; i += kLccTileThreads) {
      // The two halves of a warp read different maps, whose sums lie an odd multiple of 16 words apart.
      const int x = i % kLccTile, map = i / kLccTile % kSums, block = i / (kLccTile * kSums);
      const int plane = block / 2, y = block % 2 * kOut;
      const auto from = sums + (plane * kSums + map) * Shape::kSums + y * kLccTile + x;
      const auto to = columns + (plane * kSums + map) * Shape::kColumns + y * kLccTile + x;
      float in[kIn], out[kOut];
#pragma unroll
      for (int t = 0; t < kIn; ++t) in[t] = from[t * kLccTile];
      lcc_box_sums<kOut, Shape::kWindow>(in, out);
#pragma unroll
      for (int j = 0; j < kOut; ++j) to[j * kLccTile] = out[j];
    }
  }
}

// The windows along z that are open: open[i] is the sum so far of the (i + 1)-th to close.
template <class Shape, int kSums>
struct LccColumn {
  static constexpr int kOpen = 2 * Shape::kRadius;
  float open[kSums][kOpen];

  __device__ __forceinline__ LccColumn() {
#pragma unroll
    for (int k = 0; k < kSums; ++k)
#pragma unroll
      for (int i = 0; i < kOpen; ++i) open[k][i] = 0;
  }

  // Two planes enter, the windows that end with them leave in their places.
  __device__ __forceinline__ void enter(const LccTiled& s, const Shape& shape, float (&plane)[2][kSums]) {
    if (s.radius_z == 0) return;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      float (&w)[kOpen] = open[k];
      if constexpr (Shape::kListed) {
        const int last = 2 * shape.reach();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = plane[j][k];
          plane[j][k] = w[0] + s.tap[shape.reach()] * x;
#pragma unroll
          for (int i = 0; i < kOpen; ++i) {
            // The newest window has nothing yet.
            const float before = i + 1 < kOpen && i + 1 < last ? w[i + 1 < kOpen ? i + 1 : i] : 0.f;
            const int offset = i + 1 - shape.reach();
            if (i < last) w[i] = before + s.tap[offset < 0 ? -offset : offset] * x;
          }
        }
      } else {
        const float x0 = plane[0][k], x1 = plane[1][k], both = x0 + x1;
        plane[0][k] = w[0] + x0, plane[1][k] = w[1] + both;
#pragma unroll
        for (int i = 0; i + 2 < kOpen; ++i) w[i] = w[i + 2] + both;
        w[kOpen - 2] = both, w[kOpen - 1] = x1;
      }
    }
  }
};

// Samples of a tile with its halo that a thread loads: where they lie in the image's plane (-1: outside, or
// nothing to load).
template <class Shape>
struct LccPositions {
  int from[Shape::kPositions];
  int rows;

  __device__ __forceinline__ LccPositions(const LccTiled& s, const Shape& shape, int y0, int x0)
      : rows(shape.rows()) {
#pragma unroll
    for (int k = 0; k < Shape::kPositions; ++k) {
      const int i = threadIdx.x + k * kLccTileThreads, row = i / rows, column = i - row * rows;
      const int64_t y = int64_t(y0) + row - shape.reach(), x = int64_t(x0) + column - shape.reach();
      const bool inside = row < rows && y >= 0 && y < s.a.H && x >= 0 && x < s.a.W;
      from[k] = inside ? int(y * s.a.W + x) : -1;
    }
  }
  // Where it goes in shared memory; -1: nothing to load.
  __device__ __forceinline__ int to(int k) const {
    const int side = Shape::kListed ? rows : Shape::kRows;
    const int i = threadIdx.x + k * kLccTileThreads, row = i / side;
    return row < side ? row * Shape::kStride + i - row * side : -1;
  }
};

// Vector loads reach up to 3 words beyond a row's halo: what they find is not used, but must be there.
__device__ __forceinline__ void lcc_clear(Shared<float> memory, int count) {
  for (int i = threadIdx.x; i < count; i += kLccTileThreads) memory[i] = 0.f;
  __syncthreads();
}

// Calls f.template operator()<T>() with the storage type of the images; fp64 images take the other path.
template <class F>
__device__ __forceinline__ void lcc_with_type(Stored type, F f) {
  if (type == Stored::f32)
    f.template operator()<float>();
  else if (type == Stored::f16)
    f.template operator()<half_t>();
  else
    f.template operator()<bfloat16_t>();
}

}  // namespace fastreg
