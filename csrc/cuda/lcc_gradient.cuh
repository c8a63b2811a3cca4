#pragma once
// lcc_loss, the gradient: adjoint maps of a tile summed over the windows that hold a sample.
#include "cuda/lcc_tile.cuh"

namespace fastreg {

// Gradients from the adjoint maps, summed over the windows that hold a sample as lcc_tile.cuh says, for both
// images at once where both are asked for. A map's means are relative to the shift of the tile and segment
// they come from; loaded, they become relative to that of the block's own tile. Bytes: 3 (both: 5) maps and
// both images read, 1 (2) volumes written. At 256^3, w = 9, one gradient: 6 volumes, 403 MB, 0.13 ms at
// 3 TB/s, half of it through L2 where the maps are still there. Arithmetic: some 130 instructions a voxel,
// 0.075 ms if every cycle issued. Shared memory: 30 KB.
template <class Shape, int kMaps>
__global__ void __launch_bounds__(kLccTileThreads, Shape::min_blocks(kMaps == 3))
    lcc_gradient_kernel(const __grid_constant__ LccTiled s) {
  const Shape shape(s);
  const int tile = blockIdx.x, y0 = tile / s.tiles_x * kLccTile, x0 = tile % s.tiles_x * kLccTile;
  const int rz = s.radius_z, z0 = s.first + int(blockIdx.y) * kLccSegment, z1 = min(z0 + kLccSegment, s.last);
  const int64_t nc = s.channel + blockIdx.z, plane = s.a.H * s.a.W, volume = s.a.D * plane;
  const float2* reference = s.reference + nc * s.segments * s.tiles;
  const float2 shift = reference[(z0 + z1) / 2 / s.segment * s.tiles + tile];
  const float* adjoints = s.adjoints + int64_t(blockIdx.z) * s.ring * s.n_adjoints * plane;
  // Of three maps the one image's; which it is decides which shift is its own.
  const bool moved_only = kMaps == 3 && !s.a.grad_fixed;

  FASTREG_DYNAMIC_SHARED(float, memory);
  const auto maps = part(memory, 0, 2 * kMaps * Shape::kPlane);
  const auto sums = part(memory, 2 * kMaps * Shape::kPlane, 2 * kMaps * Shape::kSums);
  const auto columns = part(memory, 2 * kMaps * (Shape::kPlane + Shape::kSums), 2 * kMaps * Shape::kColumns);
  lcc_clear(maps, 2 * kMaps * Shape::kPlane);

  const LccPositions<Shape> positions(s, shape, y0, x0);
  int tile_of[Shape::kPositions];
#pragma unroll
  for (int k = 0; k < Shape::kPositions; ++k) {
    const int at = positions.from[k] < 0 ? 0 : positions.from[k], row = int(at / s.a.W);
    tile_of[k] = row / kLccTile * s.tiles_x + (at - row * int(s.a.W)) / kLccTile;
  }
  // Beyond it lie windows of a segment that is yet to come, or none.
  const int end = min(z1 + rz, int(s.a.D));
  const auto load_plane = [&](int z, Shared<float> to) {
    const float* from = adjoints + int64_t(z % s.ring) * s.n_adjoints * plane;
    const float2* near = reference + int64_t(z / s.segment) * s.tiles;
#pragma unroll
    for (int k = 0; k < Shape::kPositions; ++k) {
      const int at = z < end ? positions.from[k] : -1, store_at = positions.to(k);
      float value[kMaps];
#pragma unroll
      for (int map = 0; map < kMaps; ++map) value[map] = at < 0 ? 0.f : from[map * plane + at];
      const float2 theirs = at < 0 ? shift : near[tile_of[k]];
      const float f = theirs.x - shift.x, m = theirs.y - shift.y, e = value[0];
      value[2] += moved_only ? value[1] * m + e * f : value[1] * f + e * m;
      if constexpr (kMaps == 5) value[4] += value[3] * m + e * f;
      if (store_at < 0) continue;
#pragma unroll
      for (int map = 0; map < kMaps; ++map) to[map * Shape::kPlane + store_at] = value[map];
    }
  };
  // Listed windows fetch a tap for all maps at once.
  constexpr int kTogether = Shape::kListed ? kMaps : 1;
  const auto same = [](const float (&in)[kTogether], float (&out)[kTogether]) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) out[k] = in[k];
  };

  const int y = y0 + threadIdx.x / kLccTile, x = x0 + threadIdx.x % kLccTile;
  const int column_at = y < s.a.H && x < s.a.W ? int(y * s.a.W + x) : -1;
  LccColumn<Shape, kMaps> column;
  for (int z = max(z0 - rz, 0); z < z1 + rz; z += 2) {
    float plane_sums[2][kMaps] = {};
    if (z < s.a.D) {
      load_plane(z, maps);
      load_plane(z + 1, maps + kMaps * Shape::kPlane);
      __syncthreads();
      lcc_sum_x<Shape, 2 * kMaps / kTogether, kTogether, kTogether>(s, shape, maps, sums, same);
      __syncthreads();
      lcc_sum_y<Shape, kMaps>(s, shape, sums, columns);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < kMaps; ++k)
          plane_sums[j][k] = columns[(j * kMaps + k) * Shape::kColumns + threadIdx.x];
    }
    column.enter(s, shape, plane_sums);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = z + j - rz;
      if (at < z0 || at >= z1 || column_at < 0) continue;
      const int64_t in_volume = at * plane + column_at, here = nc * volume + in_volume;
      float f = 0, m = 0;
      lcc_with_type(s.a.type, [&]<class T>() {
        f = load(static_cast<const T*>(s.a.fixed)[here]) - shift.x;
        m = load(static_cast<const T*>(s.a.moved)[here]) - shift.y;
      });
      const float weight =
          s.a.mask ? static_cast<const float*>(s.a.mask)[nc / s.a.c * volume + in_volume] : 1.f;
      const float* p = plane_sums[j];
      const auto write = [&](void* out, float g) {
        static_cast<float*>(out)[here] = weight == 0.f ? 0.f : weight * g;
      };
      if (s.a.grad_fixed) write(s.a.grad_fixed, lcc_gradient(f, m, p[1], p[0], p[2]));
      if (s.a.grad_moved) write(s.a.grad_moved, lcc_gradient(m, f, p[kMaps - 2], p[0], p[kMaps - 1]));
    }
  }
}

}  // namespace fastreg
