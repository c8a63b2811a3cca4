#pragma once
// Local correlation, backward: both gradients are gathers over offsets, then come the statistics.
#include "cuda/local_correlation_map.cuh"
#include "cuda/reduce.h"

namespace fastreg {

constexpr int kGatherThreads = 256;

// Channels a thread holds, and groups of them (of warps) in a block.
template <class A>
constexpr int kGatherChannels = sizeof(A) == 8 ? 4 : 8;

// One gradient. Of fixed: sum over o of g(q, o) M(q + o). Of moving: sum over o of g(q + o, -o) F(q + o), on
// a grid that extends beyond the image by the radius where padding is "border".
struct GatherArgs {
  CorrelationArgs map;
  const void* grad;  // (n, offsets, *size)
  void* result;      // (n, c, *size + 2 extend), arithmetic type where `arithmetic`; or null
  // Of the result and, to fixed only, of the result times the normalised fixed: (n, block, 2); or null.
  double* sums;
  bool to_moving, arithmetic;
  int groups, extend[3];

  FASTREG_HD int64_t extent(int axis) const { return int64_t(map.size[axis]) + 2 * extend[axis]; }
  FASTREG_HD int64_t voxels() const { return extent(0) * extent(1) * extent(2); }

  CorrelationTiling tiling() const {
    const int64_t size[3] = {extent(0), extent(1), extent(2)};
    return CorrelationTiling::of(size, kGatherThreads / 32 / groups);
  }
  // Per sample.
  int64_t blocks(Stored type) const {
    const int channels = groups * (type == Stored::f64 ? kGatherChannels<double> : kGatherChannels<float>);
    return tiling().count() * ((map.c + channels - 1) / channels);
  }
};

// A block owns a tile (2 x 16 x 32 voxels, or 2 x 8 x 32 of two groups of channels) and walks through the
// planes of the other map that meet it; a plane passes through shared memory with its halo and all channels
// of the block. A thread keeps 4 voxels along y times 16 channels in registers; for K offsets along y it
// loads 4 K values of grad once, a warp 32 neighbours along x at a time, and K + 3 of the map per channel
// from shared memory, without bank conflicts. Radius 2: 8 shared and 1.25 global loads for 20 products.
// Bytes: the offsets read once (C > 32: again from L2, blocks of the same voxels being neighbours in time), C
// volumes of the other map read 5.6 to 6.8 times from L2, C written. Per gradient, radius 2, fp32, at 3 TB/s:
//   C = 32, 64^3:  198 MB, 66 us;   31 us of products, 57 us by loads from shared memory and L1
//   C = 16, 128^3: 1317 MB, 439 us; 125 us of products, 230 us by loads
// Memory: none; padding "border": the gradient of the extended grid; 16 bytes a block where normalised.
template <class T, int K, bool kWarps>
__global__ void __launch_bounds__(kGatherThreads, 2)
    correlation_gather_kernel(GatherArgs a, CorrelationTiling tiling) {
  using A = arithmetic_t<T>;
  constexpr int kRows = kCorrelationRows, kPitch = kCorrelationLanes + K - 1;
  constexpr int kChannels = kGatherChannels<A>;
  FASTREG_DYNAMIC_SHARED(A, tile);
  const CorrelationArgs& m = a.map;
  const int block_channels = kChannels * a.groups;
  unsigned id = blockIdx.x;
  const unsigned chunks = unsigned((m.c + block_channels - 1) / block_channels);
  const int64_t c_block = int64_t(id % chunks) * block_channels;
  id /= chunks;
  int first[3];
  tiling.take(id, first);
  const int64_t n = id;
#pragma unroll
  for (int k = 0; k < 3; ++k) first[k] -= a.extend[k];

  const int lane = int(threadIdx.x) % 32, warps = kGatherThreads / 32 / a.groups;
  const int group = int(threadIdx.x) / 32 / warps, warp = int(threadIdx.x) / 32 % warps;
  const int warps_y = tiling.height / kRows, row = warp % warps_y * kRows;
  const int z = first[0] + warp / warps_y, y = first[1] + row, x = first[2] + lane;
  const int64_t c0 = c_block + group * kChannels;
  const int loaded = int(min(int64_t(block_channels), m.c - c_block));
  const int channels = int(min(int64_t(kChannels), m.c - c0));
  const bool here = z < m.size[0] + a.extend[0] && y < m.size[1] + a.extend[1] &&
                    x < m.size[2] + a.extend[2] && channels > 0;
  const int rows = tiling.height + K - 1, positions = rows * kPitch;

  // Strides of grad along the offsets: to moving, the voxel moves along and the offset's index falls.
  const int64_t line = m.size[2], voxels = m.voxels();
  const int shift = a.to_moving ? 1 : 0;
  const int64_t step_x = a.to_moving ? 1 - voxels : voxels;
  const int64_t step_y = (a.to_moving ? -voxels : voxels) * m.along(2) + shift * line;
  const int64_t step_z =
      (a.to_moving ? -voxels : voxels) * m.along(1) * m.along(2) + shift * line * m.size[1];

  const CorrelationMap<T, kWarps> other(m, n, !a.to_moving);
  A sum[kChannels][kRows] = {};
  for (int plane = first[0] - m.radius[0]; plane < first[0] + tiling.depth + m.radius[0]; ++plane) {
    // Beyond the image grad has no voxel.
    if (a.to_moving && unsigned(plane) >= unsigned(m.size[0])) continue;
    const int dz = plane - z;
    const bool active = here && dz >= -m.radius[0] && dz <= m.radius[0];
    for (int dy = -m.radius[1]; dy <= m.radius[1]; dy += K) {
      if (a.to_moving && (first[1] + dy >= m.size[1] || first[1] + dy + rows <= 0)) continue;
      for (int dx = -m.radius[2]; dx <= m.radius[2]; dx += K) {
        if (a.to_moving && (first[2] + dx >= m.size[2] || first[2] + dx + kPitch <= 0)) continue;
        __syncthreads();
        load_tile<kPitch>(m, other, m.border && !a.to_moving, c_block, loaded, plane, first[1] + dy,
                          first[2] + dx, rows, tile);
        __syncthreads();
        if (!active) continue;
        const int count_y = min(K, m.radius[1] - dy + 1), count_x = min(K, m.radius[2] - dx + 1);
        const T* from = static_cast<const T*>(a.grad) + (n * m.offsets() + m.offsets() / 2) * voxels +
                        (int64_t(z) * m.size[1] + y) * line + x + dz * step_z + dy * step_y + dx * step_x;
        const Shared<A> corner = tile + ((group * kChannels * rows + row) * kPitch + lane);
#pragma unroll 1
        for (int i = 0; i < count_x; ++i, from += step_x) {
          const bool inside_x = unsigned(x + shift * (dx + i)) < unsigned(m.size[2]);
          A g[K][kRows];
#pragma unroll
          for (int j = 0; j < K; ++j)
#pragma unroll
            for (int v = 0; v < kRows; ++v) {
              const bool inside =
                  inside_x && j < count_y && unsigned(y + v + shift * (dy + j)) < unsigned(m.size[1]);
              g[j][v] = inside ? load(from[j * step_y + v * line]) : A(0);
            }
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            if (c >= channels) break;
            A w[kRows + K - 1];
#pragma unroll
            for (int j = 0; j < kRows + K - 1; ++j) w[j] = corner[c * positions + j * kPitch + i];
#pragma unroll
            for (int j = 0; j < K; ++j) {
              // What lies beyond the radius may be NaN.
              if (j >= count_y) continue;
#pragma unroll
              for (int v = 0; v < kRows; ++v) sum[c][v] += g[j][v] * w[v + j];
            }
          }
        }
      }
    }
  }

  double total = 0, products = 0;
  if (here) {
    const int64_t extent_y = a.extent(1), extent_x = a.extent(2);
    const int64_t to = ((n * m.c + c0) * a.extent(0) + z + a.extend[0]) * extent_y * extent_x +
                       (y + a.extend[1]) * extent_x + x + a.extend[2];
    const CorrelationMap<T, false> fixed(m, n, false);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c >= channels) break;
#pragma unroll
      for (int v = 0; v < kRows; ++v) {
        if (y + v >= m.size[1] + a.extend[1]) continue;
        const A value = sum[c][v] * A(m.factor);
        const int64_t at = to + c * a.voxels() + v * extent_x;
        if (a.result && a.arithmetic)
          static_cast<A*>(a.result)[at] = value;
        else if (a.result)
          store(static_cast<T*>(a.result)[at], value);
        if (!a.sums) continue;
        total += double(value);
        if (!a.to_moving) products += double(value) * double(fixed.read(fixed.place(z, y + v, x), c0 + c));
      }
    }
  }
  if (!a.sums) return;
  FASTREG_SHARED(double, scratch, 2 * kGatherThreads / 32);
  total = block_sum<kGatherThreads>(total, part(scratch, 0, kGatherThreads / 32));
  products = block_sum<kGatherThreads>(products, part(scratch, kGatherThreads / 32, kGatherThreads / 32));
  if (threadIdx.x == 0) {
    a.sums[2 * int64_t(blockIdx.x)] = total;
    a.sums[2 * int64_t(blockIdx.x) + 1] = products;
  }
}

inline void correlation_gather(Stored type, const GatherArgs& a, cudaStream_t stream) {
  const CorrelationTiling tiling = a.tiling();
  const unsigned grid = correlation_blocks(a.map.n * a.blocks(type));
  with_group(type, a.map, a.map.displacement && !a.to_moving, [&]<class T, int K, bool kWarps>() {
    using A = arithmetic_t<T>;
    const int64_t channels = std::min<int64_t>(a.map.c, a.groups * kGatherChannels<A>);
    const size_t shared =
        size_t(channels * (tiling.height + K - 1) * (kCorrelationLanes + K - 1)) * sizeof(A);
    launch(correlation_gather_kernel<T, K, kWarps>, grid, kGatherThreads, shared, stream, a, tiling);
  });
}

// What is left to do to a gradient: fold what lies beyond the image onto its faces, go through the
// statistics.
struct FinishArgs {
  CorrelationArgs map;
  const void* raw;  // (n, c, *size + 2 extend), arithmetic type
  int extend[3];
  const double *fixed_sums, *moving_sums;  // (n, 2), of both gathers; null: not normalised
  void* result;                            // (n, c, *size), arithmetic type where `arithmetic`; may be raw
  bool to_moving, arithmetic;
};

constexpr int kFinishThreads = 256;

// A thread per voxel goes through its channels; a warp reads 32 neighbours along x. Bytes: C volumes read (2C
// where normalised), C written. At C = 32, 64^3 fp32, normalised: 100 MB, 34 us.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) correlation_finish_kernel(FinishArgs a, unsigned blocks) {
  using A = arithmetic_t<T>;
  const CorrelationArgs& m = a.map;
  const int64_t n = blockIdx.x / blocks, voxels = m.voxels();
  const int64_t voxel = int64_t(blockIdx.x % blocks) * kFinishThreads + threadIdx.x;
  if (voxel >= voxels) return;
  const int64_t row = voxel / m.size[2];
  const int at[3] = {int(row / m.size[1]), int(row % m.size[1]), int(voxel % m.size[2])};
  int64_t extent[3], low[3], high[3];
  for (int k = 0; k < 3; ++k) {
    extent[k] = int64_t(m.size[k]) + 2 * a.extend[k];
    low[k] = at[k] == 0 ? 0 : at[k] + a.extend[k];
    high[k] = at[k] == m.size[k] - 1 ? extent[k] - 1 : at[k] + a.extend[k];
  }
  const CorrelationMap<T> map(m, n, a.to_moving, true);
  Place<A> place{};
  ThroughStatistics through{};
  if (m.statistics) {
    place = map.place(at[0], at[1], at[2]);
    // Both maps meet in the same products: their sums of x^ dL/dx^ are equal.
    through = through_statistics(m.statistics + 4 * n, a.fixed_sums[2 * n] + a.moving_sums[2 * n],
                                 2 * a.fixed_sums[2 * n + 1], double(m.c) * double(voxels), a.to_moving);
  }
  for (int64_t c = 0; c < m.c; ++c) {
    const A* raw = static_cast<const A*>(a.raw) + (n * m.c + c) * extent[0] * extent[1] * extent[2];
    A sum = A(0);
    for (int64_t z = low[0]; z <= high[0]; ++z)
      for (int64_t y = low[1]; y <= high[1]; ++y)
        for (int64_t x = low[2]; x <= high[2]; ++x) sum += raw[(z * extent[1] + y) * extent[2] + x];
    if (m.statistics)
      sum = sum * A(through.gradient) + A(through.constant) + map.read(place, c) * A(through.value);
    const int64_t to = (n * m.c + c) * voxels + voxel;
    if (a.arithmetic)
      static_cast<A*>(a.result)[to] = sum;
    else
      store(static_cast<T*>(a.result)[to], sum);
  }
}

inline void correlation_finish(Stored type, const FinishArgs& a, cudaStream_t stream) {
  const unsigned blocks = unsigned((a.map.voxels() + kFinishThreads - 1) / kFinishThreads);
  const unsigned grid = correlation_blocks(a.map.n * int64_t(blocks));
  with_type(type, [&]<class T>() {
    launch(correlation_finish_kernel<T>, grid, kFinishThreads, 0, stream, a, blocks);
  });
}

}  // namespace fastreg
