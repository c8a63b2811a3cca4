#pragma once
// Local correlation, backward: both gradients are gathers over offsets, then come the statistics.
#include "cuda/local_correlation_map.cuh"
#include "cuda/reduce.h"

namespace fastreg {

constexpr int kGatherThreads = 256;

// Channels a thread holds, and groups of them (of warps) in a block.
template <class A>
constexpr int kGatherChannels = sizeof(A) == 8 ? 8 : 16;

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
  // Of grad along the offsets (z, y, x): to moving, the voxel moves along and the offset's index falls.
  int64_t step[3];
  int64_t extent[3], voxels;  // of the result

  void set_sizes() {
    int64_t index = map.voxels, move = 1;
    voxels = 1;
    for (int k = 2; k >= 0; --k) {
      step[k] = to_moving ? move - index : index;
      index *= map.along[k], move *= map.size[k];
      extent[k] = map.size[k] + 2 * extend[k], voxels *= extent[k];
    }
  }

  CorrelationTiling tiling() const { return CorrelationTiling::of(extent, kGatherThreads / 32 / groups); }
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
// volumes of the other map read 5.6 to 6.8 times from L2, C written. Per gradient, radius 2, fp32:
//   C = 32, 64^3:  198 MB, 66 us at 3 TB/s; 31 us of products, their loads 58 us
//   C = 16, 128^3: 1317 MB, 439 us; 125 us of products, their loads 232 us
// Memory: none; padding "border": the gradient on the extended grid; 16 bytes a block where normalised.
template <class T, int K, bool kWarps, bool kToMoving>
__global__ void __launch_bounds__(kGatherThreads, 2)
    correlation_gather_kernel(GatherArgs a, CorrelationTiling tiling) {
  using A = arithmetic_t<T>;
  constexpr int kRows = kCorrelationRows, kPitch = kCorrelationLanes + K - 1;
  constexpr int kChannels = kGatherChannels<A>;
  FASTREG_DYNAMIC_SHARED(A, tile);
  const CorrelationArgs& m = a.map;
  const int block_channels = kChannels * a.groups;
  // Sample, first channel and first voxel: in shared memory, for registers are scarce.
  FASTREG_SHARED(int, block, 5);
  if (threadIdx.x == 0) {
    unsigned id = blockIdx.x;
    const unsigned chunks = unsigned((m.c + block_channels - 1) / block_channels);
    block[1] = int(id % chunks) * block_channels;
    id /= chunks;
    int first[3];
    tiling.take(id, first);
    block[0] = int(id);
#pragma unroll
    for (int k = 0; k < 3; ++k) block[2 + k] = first[k] - a.extend[k];
  }
  __syncthreads();

  const int lane = int(threadIdx.x) % 32, warps = kGatherThreads / 32 / a.groups;
  const int group = int(threadIdx.x) / 32 / warps, warp = int(threadIdx.x) / 32 % warps;
  const int warps_y = tiling.height / kRows, row = warp % warps_y * kRows;
  const int loaded = min(block_channels, int(m.c) - block[1]);
  const int channels = min(kChannels, loaded - group * kChannels);
  const auto voxel = [&](int* at) {
    at[0] = block[2] + warp / warps_y, at[1] = block[3] + row, at[2] = block[4] + lane;
    bool here = channels > 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) here = here && at[k] < m.size[k] + a.extend[k];
    return here;
  };
  const int rows = tiling.height + K - 1, positions = rows * kPitch, line = m.size[2];
  const Shared<int> places = shared_as<int>(tile + loaded * positions);

  const CorrelationMap<T, kWarps> other(m, block[0], !kToMoving, normalization_of<A>(m, block[0]));
  A sum[kChannels][kRows] = {};
  for (int dy = -m.radius[1]; dy <= m.radius[1]; dy += K) {
    for (int dx = -m.radius[2]; dx <= m.radius[2]; dx += K) {
      // Beyond the image grad has no voxel.
      if (kToMoving && (block[3] + dy >= m.size[1] || block[3] + dy + rows <= 0 || block[4] + dx >= line ||
                        block[4] + dx + kPitch <= 0))
        continue;
      locate_tile<kPitch>(m, m.border && !kToMoving, block[3] + dy, block[4] + dx, rows, places);
      const int count_y = min(K, m.radius[1] - dy + 1), count_x = min(K, m.radius[2] - dx + 1);
      for (int step = 0; step < tiling.depth + 2 * m.radius[0]; ++step) {
        const int plane = block[2] + step - m.radius[0];
        if (kToMoving && unsigned(plane) >= unsigned(m.size[0])) continue;
        __syncthreads();
        load_tile(m, other, m.border && !kToMoving, block[1], loaded, plane, positions, places, tile);
        __syncthreads();
        int q[3];
        const bool here = voxel(q);
        const int dz = plane - q[0];
        if (!here || dz < -m.radius[0] || dz > m.radius[0]) continue;
        // Bit v + j: grad has the row of voxel v and offset j; else bit v: that of voxel v.
        unsigned has_row = 0;
#pragma unroll
        for (int j = 0; j < kRows + K - 1; ++j)
          has_row |= unsigned(unsigned(q[1] + (kToMoving ? dy + j : j)) < unsigned(m.size[1])) << j;
        const T* from = static_cast<const T*>(a.grad) + (block[0] * m.offsets + m.offsets / 2) * m.voxels +
                        q[0] * m.plane + int64_t(q[1]) * line + q[2] + dz * a.step[0] + dy * a.step[1] +
                        dx * a.step[2];
        Shared<A> corner = tile + ((group * kChannels * rows + row) * kPitch + lane);
#pragma unroll 1
        for (int i = 0; i < count_x; ++i) {
          const unsigned has = !kToMoving || unsigned(q[2] + dx + i) < unsigned(line) ? has_row : 0;
          A g[K][kRows];
          const T* at = from;
#pragma unroll
          for (int j = 0; j < K; ++j, at += a.step[1])
#pragma unroll
            for (int v = 0; v < kRows; ++v) {
              const bool exists = j < count_y && (has >> (kToMoving ? v + j : v) & 1);
              g[j][v] = exists ? load(at[int64_t(v) * line]) : A(0);
            }
          Shared<A> channel = corner;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            if (c >= channels) break;
            A w[kRows + K - 1];
#pragma unroll
            for (int j = 0; j < kRows + K - 1; ++j) w[j] = channel[j * kPitch];
#pragma unroll
            for (int j = 0; j < K; ++j) {
              // What lies beyond the radius may be NaN.
              if (j >= count_y) continue;
#pragma unroll
              for (int v = 0; v < kRows; ++v) sum[c][v] += g[j][v] * w[v + j];
            }
            channel += positions;
          }
          corner += 1, from += a.step[2];
        }
      }
    }
  }

  double total = 0, products = 0;
  int q[3];
  if (voxel(q)) {
    const int n = block[0], c0 = block[1] + group * kChannels;
    const A factor = A(m.factor);
    const CorrelationMap<T, false> fixed(m, n, false, normalization_of<A>(m, n));
    int64_t to = (((n * m.c + c0) * a.extent[0] + q[0] + a.extend[0]) * a.extent[1] + q[1] + a.extend[1]) *
                     a.extent[2] +
                 q[2] + a.extend[2];
#pragma unroll
    for (int c = 0; c < kChannels; ++c, to += a.voxels) {
      if (c >= channels) break;
#pragma unroll
      for (int v = 0; v < kRows; ++v) {
        if (q[1] + v >= m.size[1] + a.extend[1]) continue;
        const A value = sum[c][v] * factor;
        const int64_t at = to + v * a.extent[2];
        if (a.result && a.arithmetic)
          static_cast<A*>(a.result)[at] = value;
        else if (a.result)
          store(static_cast<T*>(a.result)[at], value);
        if (!a.sums) continue;
        total += double(value);
        if constexpr (!kToMoving)
          products += double(value) * double(fixed.read(fixed.place(q[0], (q[1] + v) * line + q[2]), c0 + c));
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
    const size_t shared = tile_bytes<A, K>(tiling, channels);
    if (a.to_moving)
      launch(correlation_gather_kernel<T, K, false, true>, grid, kGatherThreads, shared, stream, a, tiling);
    else
      launch(correlation_gather_kernel<T, K, kWarps, false>, grid, kGatherThreads, shared, stream, a, tiling);
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
  const int64_t n = blockIdx.x / blocks, voxels = m.voxels;
  const int64_t voxel = int64_t(blockIdx.x % blocks) * kFinishThreads + threadIdx.x;
  if (voxel >= voxels) return;
  const int in_plane = int(voxel % m.plane);
  const int at[3] = {int(voxel / m.plane), in_plane / m.size[2], in_plane % m.size[2]};
  int64_t extent[3], low[3], high[3];
  for (int k = 0; k < 3; ++k) {
    extent[k] = int64_t(m.size[k]) + 2 * a.extend[k];
    low[k] = at[k] == 0 ? 0 : at[k] + a.extend[k];
    high[k] = at[k] == m.size[k] - 1 ? extent[k] - 1 : at[k] + a.extend[k];
  }
  const CorrelationMap<T> map(m, n, a.to_moving, normalization_of<A>(m, n, a.to_moving));
  Place<A> place{};
  ThroughStatistics through{};
  if (m.statistics) {
    place = map.place(at[0], in_plane);
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
      sum = sum * A(through.gradient) + A(through.constant) + map.read(place, c) * value_of<A>(through);
    const int64_t to = (n * m.c + c) * voxels + voxel;
    if (a.arithmetic)
      static_cast<A*>(a.result)[to] = sum;
    else
      store(static_cast<T*>(a.result)[to], sum);
  }
}

inline void correlation_finish(Stored type, const FinishArgs& a, cudaStream_t stream) {
  const unsigned blocks = unsigned((a.map.voxels + kFinishThreads - 1) / kFinishThreads);
  const unsigned grid = correlation_blocks(a.map.n * int64_t(blocks));
  with_type(type, [&]<class T>() {
    launch(correlation_finish_kernel<T>, grid, kFinishThreads, 0, stream, a, blocks);
  });
}

}  // namespace fastreg
