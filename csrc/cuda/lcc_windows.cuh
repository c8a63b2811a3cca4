#pragma once
// lcc_loss, the windows of a tile: their LCC and its adjoint maps.
#include "cuda/lcc_tile.cuh"

namespace fastreg {

// Mean of the finite samples of the block's tile on 4 planes of its segment or, where the mask leaves none,
// of the tile with its halo on all planes.
template <class T>
__device__ __forceinline__ float2 lcc_tile_reference(const LccTiled& s, const T* fixed, const T* moved,
                                                     const float* mask, int radius, int y0, int x0, int z0,
                                                     int z1) {
  FASTREG_SHARED(float, scratch, 4 * kLccTileThreads / 32);
  FASTREG_SHARED(float, shift, 2);
  const int64_t plane = s.a.H * s.a.W;
  for (int pass = 0; pass < 2; ++pass) {
    const int halo = pass * radius, side = kLccTile + 2 * halo;
    const int low = max(z0 - halo * (s.radius_z > 0), 0), high = int(min(int64_t(z1) + halo, s.a.D));
    const int step = pass ? 1 : (high - low + 3) / 4;
    float sum[2] = {}, count[2] = {};
    for (int i = threadIdx.x; i < side * side; i += kLccTileThreads) {
      const int64_t y = int64_t(y0) - halo + i / side, x = int64_t(x0) - halo + i % side;
      if (y < 0 || y >= s.a.H || x < 0 || x >= s.a.W) continue;
      for (int z = low; z < high; z += step) {
        const int64_t at = z * plane + y * s.a.W + x;
        if (mask && mask[at] == 0.f) continue;
        const float f = load(fixed[at]), m = load(moved[at]);
        if (f - f == 0.f) sum[0] += f, count[0] += 1;
        if (m - m == 0.f) sum[1] += m, count[1] += 1;
      }
    }
    const bool found_f = __syncthreads_or(count[0] > 0), found_m = __syncthreads_or(count[1] > 0);
    if (!(found_f && found_m) && pass == 0) continue;
    const float values[4] = {sum[0], sum[1], count[0], count[1]};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float x = warp_sum(values[k]);
      if (threadIdx.x % 32 == 0) scratch[k * kLccTileThreads / 32 + threadIdx.x / 32] = x;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      // Quotients before the sum: it must not overflow where the mean does not.
      float total = 0, number = 0;
      for (int warp = 0; warp < kLccTileThreads / 32; ++warp)
        number += float(scratch[(2 + threadIdx.x) * kLccTileThreads / 32 + warp]);
      for (int warp = 0; warp < kLccTileThreads / 32; ++warp)
        total += number > 0.f ? float(scratch[threadIdx.x * kLccTileThreads / 32 + warp]) / number : 0.f;
      shift[threadIdx.x] = total - total == 0.f ? total : 0.f;
    }
    __syncthreads();
    break;
  }
  return make_float2(shift[0], shift[1]);
}

// LCC of the windows of a tile and segment, and their adjoint maps; see lcc_tile.cuh for the sums. Bytes:
// both images read once from memory (with halos 2.25 x 1.25 times from L2 at w = 9), 3 or 5 adjoint maps
// written; no map of LCC unless asked for. Loss: a partial sum a block. At 256^3 fp32, w = 9, one gradient: 5
// volumes, 336 MB, 0.11 ms at 3 TB/s, less where the adjoints stay in L2. Arithmetic: some 220 instructions a
// voxel (loads 23, x 55, y 40, z 35, the window itself 65): 0.13 ms if every cycle issued. Shared memory: 35
// KB.
template <class Shape, bool kMask>
__global__ void __launch_bounds__(kLccTileThreads, Shape::min_blocks(!kMask))
    lcc_windows_kernel(const __grid_constant__ LccTiled s) {
  constexpr int kMaps = 2 + kMask, kSums = kLccMoments + kMask;
  const Shape shape(s);
  const int tile = blockIdx.x, y0 = tile / s.tiles_x * kLccTile, x0 = tile % s.tiles_x * kLccTile;
  const int segment = s.first + blockIdx.y, rz = s.radius_z;
  const int z0 = segment * s.segment, z1 = int(min(int64_t(z0) + s.segment, s.a.D));
  const int64_t nc = s.channel + blockIdx.z, plane = s.a.H * s.a.W, volume = s.a.D * plane;
  const float* mask = kMask ? static_cast<const float*>(s.a.mask) + nc / s.a.c * volume : nullptr;

  float2 shift = make_float2(0.f, 0.f);
  lcc_with_type(s.a.type, [&]<class T>() {
    shift = lcc_tile_reference(s, static_cast<const T*>(s.a.fixed) + nc * volume,
                               static_cast<const T*>(s.a.moved) + nc * volume, mask, shape.reach(), y0, x0,
                               z0, z1);
  });
  if (threadIdx.x == 0) s.reference[(nc * s.segments + segment) * s.tiles + tile] = shift;

  FASTREG_DYNAMIC_SHARED(float, memory);
  const auto maps = part(memory, 0, 2 * kMaps * Shape::kPlane);
  const auto sums = part(memory, 2 * kMaps * Shape::kPlane, 2 * kSums * Shape::kSums);
  const auto columns =
      part(memory, 2 * (kMaps * Shape::kPlane + kSums * Shape::kSums), 2 * kSums * Shape::kColumns);
  lcc_clear(maps, 2 * kMaps * Shape::kPlane);

  const LccPositions<Shape> positions(s, shape, y0, x0);
  // What the mask hides is not looked at, not even a NaN; outside the image there is nothing, not a zero.
  const auto load_plane = [&](int z, Shared<float> to) {
    lcc_with_type(s.a.type, [&]<class T>() {
      const T *fixed = static_cast<const T*>(s.a.fixed) + nc * volume + z * plane,
              *moved = static_cast<const T*>(s.a.moved) + nc * volume + z * plane;
      const float* weights = kMask ? mask + z * plane : nullptr;
      float f[Shape::kPositions], m[Shape::kPositions], weight[Shape::kPositions];
#pragma unroll
      for (int k = 0; k < Shape::kPositions; ++k) {
        const int at = z < s.a.D ? positions.from[k] : -1;
        weight[k] = at < 0 ? 0.f : kMask ? weights[at] : 1.f;
        f[k] = at < 0 ? 0.f : load(fixed[at]);
        m[k] = at < 0 ? 0.f : load(moved[at]);
      }
#pragma unroll
      for (int k = 0; k < Shape::kPositions; ++k) {
        const int at = positions.to(k);
        if (at < 0) continue;
        const bool hidden = weight[k] == 0.f;
        to[at] = hidden ? 0.f : f[k] - shift.x;
        to[Shape::kPlane + at] = hidden ? 0.f : m[k] - shift.y;
        if constexpr (kMask) to[2 * Shape::kPlane + at] = weight[k];
      }
    });
  };
  const auto moments = [](const float (&in)[kMaps], float (&out)[kSums]) {
    const float f = in[0], m = in[1];
    float wf = f, wm = m;
    if constexpr (kMask) wf *= in[2], wm *= in[2], out[kLccMoments] = in[2];
    out[0] = wf, out[1] = wm, out[2] = wf * f, out[3] = wm * m, out[4] = wf * m;
  };

  // Weights outside the image: sums of positive terms, exactly 0 where there are none.
  const int y = y0 + threadIdx.x / kLccTile, x = x0 + threadIdx.x % kLccTile;
  const int column_at = y < s.a.H && x < s.a.W ? int(y * s.a.W + x) : -1;
  const float outside_y = column_at < 0 ? 0.f : s.outside(y, s.a.H);
  const float outside_x = column_at < 0 ? 0.f : s.outside(x, s.a.W);
  const float inside_y = s.total - outside_y, inside_yx = inside_y * (s.total - outside_x);
  const float outside_yx = outside_y * s.total + inside_y * outside_x;
  const bool seeks = s.n_adjoints > 0;

  float loss = 0;
  LccColumn<Shape, kSums> column;
  // The window that ends with plane z is that of plane z - rz.
  for (int z = max(z0 - rz, 0); z < z1 + rz; z += 2) {
    float plane_sums[2][kSums] = {};
    if (z < s.a.D) {
      load_plane(z, maps);
      load_plane(z + 1, maps + kMaps * Shape::kPlane);
      __syncthreads();
      lcc_sum_x<Shape, 2, kMaps, kSums>(s, shape, maps, sums, moments);
      __syncthreads();
      lcc_sum_y<Shape, kSums>(s, shape, sums, columns);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < kSums; ++k)
          plane_sums[j][k] = columns[(j * kSums + k) * Shape::kColumns + threadIdx.x];
    }
    column.enter(s, shape, plane_sums);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int centre = z + j - rz;
      if (centre < z0 || centre >= z1 || column_at < 0) continue;
      const float outside_z = s.a.flat ? 0.f : s.outside(centre, s.a.D);
      const float total_z = s.a.flat ? 1.f : s.total, inside_z = total_z - outside_z;
      const float beyond = outside_z * s.total * s.total + inside_z * outside_yx;
      const float* p = plane_sums[j];
      const float inside = kMask ? p[kSums - 1] : inside_z * inside_yx;
      const LccSums<float> window{p[0], p[1], p[2], p[3], p[4]};
      const auto w = lcc_window(window, inside, s.a.valid ? 0.f : beyond, shift.x, shift.y, float(s.a.least),
                                s.a.denominator, s.a.squared, s.a.rule);
      const float value = w.finite ? w.value : NAN;
      const int64_t here = centre * plane + column_at;
      const float weight = kMask ? mask[here] : 1.f;
      loss -= weight == 0.f ? 0.f : weight * value;
      if (s.a.map) static_cast<float*>(s.a.map)[nc * volume + here] = -value / float(s.a.c);
      if (!seeks) continue;
      const auto d = lcc_adjoints_of(w, lcc_upstream<float>(s.a, nc / s.a.c * volume + here));
      float* out =
          s.adjoints + (int64_t(blockIdx.z) * s.ring + centre % s.ring) * s.n_adjoints * plane + column_at;
      *out = d.e;
      if (s.a.grad_fixed) out[plane] = d.own[0], out[2 * plane] = d.mean[0], out += 2 * plane;
      if (s.a.grad_moved) out[plane] = d.own[1], out[2 * plane] = d.mean[1];
    }
  }
  FASTREG_SHARED(double, scratch, kLccTileThreads / 32);
  const double sum = block_sum<kLccTileThreads>(double(loss), scratch);
  if (threadIdx.x == 0) s.a.partial[(nc * s.segments + segment) * s.tiles + tile] = sum;
}

}  // namespace fastreg
