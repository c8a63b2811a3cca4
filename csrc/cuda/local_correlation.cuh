#pragma once
// Local correlation, forward: statistics of the maps, then the products.
#include "cuda/local_correlation_map.cuh"

namespace fastreg {

constexpr int kStatisticsThreads = 256;

// Moments over a block; thread 0 gets them. `scratch` holds 3 doubles a warp.
__device__ __forceinline__ Moments block_moments(Moments m, Shared<double> scratch) {
  for (int by = 16; by > 0; by /= 2) {
    const Moments other = {__shfl_down_sync(0xffffffffu, m.count, by),
                           __shfl_down_sync(0xffffffffu, m.mean, by),
                           __shfl_down_sync(0xffffffffu, m.squares, by)};
    m = merged(m, other);
  }
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0)
    scratch[3 * warp] = m.count, scratch[3 * warp + 1] = m.mean, scratch[3 * warp + 2] = m.squares;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kStatisticsThreads / 32; ++i)
      m = merged(m, {scratch[3 * i], scratch[3 * i + 1], scratch[3 * i + 2]});
  return m;
}

inline int64_t correlation_moments_blocks(const CorrelationArgs& a) {
  return (a.voxels + kStatisticsThreads - 1) / kStatisticsThreads;
}

// Count, mean and squared deviations of the channels of 256 voxels of a map not normalised, (n, map, block,
// 3): fp64, about the thread's first value. Bytes: reads 2C volumes, at C = 32, 64^3 fp32 67 MB, 22 us;
// arithmetic: 4 fp64 operations a value. Memory: 48 bytes per 256 voxels.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    correlation_moments_kernel(CorrelationArgs a, unsigned blocks, double* partial) {
  using A = arithmetic_t<T>;
  FASTREG_SHARED(double, scratch, 3 * kStatisticsThreads / 32);
  const unsigned id = blockIdx.x / blocks;
  const CorrelationMap<T> map(a, id / 2, id % 2, {});
  const int64_t voxel = int64_t(blockIdx.x % blocks) * kStatisticsThreads + threadIdx.x;
  Moments m{};
  if (voxel < a.voxels) {
    const Place<A> place = map.place(int(voxel / a.plane), int(voxel % a.plane));
    const double shift = double(map.read(place, 0));
    double sum = 0, squares = 0;
#pragma unroll 4
    for (int64_t c = 0; c < a.c; ++c) {
      const double d = double(map.read(place, c)) - shift;
      sum += d, squares += d * d;
    }
    const double count = double(a.c), mean = sum / count, rest = squares - sum * mean;
    m = {count, shift + mean, rest < 0 ? 0 : rest};
  }
  m = block_moments(m, scratch);
  if (threadIdx.x == 0) {
    double* out = partial + 3 * int64_t(blockIdx.x);
    out[0] = m.count, out[1] = m.mean, out[2] = m.squares;
  }
}

// A block per sample and map merges what the blocks above found.
static __global__ void __launch_bounds__(kStatisticsThreads)
    correlation_statistics_kernel(const double* partial, unsigned blocks, double* statistics) {
  FASTREG_SHARED(double, scratch, 3 * kStatisticsThreads / 32);
  const double* from = partial + 3 * int64_t(blockIdx.x) * blocks;
  Moments m{};
  for (unsigned i = threadIdx.x; i < blocks; i += kStatisticsThreads)
    m = merged(m, {from[3 * i], from[3 * i + 1], from[3 * i + 2]});
  m = block_moments(m, scratch);
  if (threadIdx.x == 0) statistics[2 * blockIdx.x] = m.mean, statistics[2 * blockIdx.x + 1] = deviation(m);
}

// `partial` holds 6 numbers per sample and block.
inline void correlation_statistics(Stored type, const CorrelationArgs& a, double* partial, double* statistics,
                                   cudaStream_t stream) {
  const unsigned blocks = unsigned(correlation_moments_blocks(a)), maps = unsigned(2 * a.n);
  const unsigned grid = correlation_blocks(2 * a.n * correlation_moments_blocks(a));
  with_type(type, [&]<class T>() {
    launch(correlation_moments_kernel<T>, grid, kStatisticsThreads, 0, stream, a, blocks, partial);
  });
  launch(correlation_statistics_kernel, maps, kStatisticsThreads, 0, stream, partial, blocks, statistics);
}

constexpr int kForwardThreads = 128, kForwardChannels = 8;

// A block owns a tile of fixed (2 x 8 x 32 voxels; 1 x 16 x 32 in 2D) and K x K offsets along y and x, at
// radius 2 all 25. It walks through the planes of moving that meet the tile: a plane with its halo passes
// through shared memory 8 channels at a time, and a thread, 4 voxels along y, keeps the 4 K^2 sums of its z
// offset in registers until all channels are in. At K = 5 a channel costs 40 shared loads, without bank
// conflicts, and 4 global ones for 100 products. A warp stores 32 neighbours along x at a time; three blocks
// an SM (168 registers) load, multiply and store by turns.
// Bytes: C volumes twice, the offsets written. From L2: moving 6.8 times, fixed 5 times.
// Radius 2, fp32, at 3 TB/s, 33 Tproducts/s and 261 G warp loads/s:
//   C = 32, 64^3:  198 MB, 66 us;   1.05 Gproducts, 31 us, their loads 55 us
//   C = 16, 128^3: 1317 MB, 439 us; 4.2 Gproducts, 125 us, their loads 221 us
// Memory: none. A displaced map is interpolated once per voxel of a tile and its halo.
template <class T, int K, bool kWarps>
__global__ void __launch_bounds__(kForwardThreads, sizeof(T) == 8 || K == 5 ? 3 : 4)
    correlation_fwd_kernel(CorrelationArgs a, CorrelationTiling tiling, void* result) {
  using A = arithmetic_t<T>;
  constexpr int kRows = kCorrelationRows, kPitch = kCorrelationLanes + K - 1;
  FASTREG_DYNAMIC_SHARED(A, tile);
  unsigned id = blockIdx.x;
  const unsigned parts_x = (a.along[2] + K - 1) / K, parts_y = (a.along[1] + K - 1) / K;
  const int dx = int(id % parts_x) * K - a.radius[2];
  id /= parts_x;
  const int dy = int(id % parts_y) * K - a.radius[1];
  id /= parts_y;
  int first[3];
  tiling.take(id, first);
  const int64_t n = id;

  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warps_y = tiling.height / kRows, row = warp % warps_y * kRows;
  const int z = first[0] + warp / warps_y, y = first[1] + row, x = first[2] + lane;
  const bool here = z < a.size[0] && y < a.size[1] && x < a.size[2];
  const int64_t line = a.size[2], voxel = n * a.c * a.voxels + z * a.plane + y * line + x;
  const int rows = tiling.height + K - 1, positions = rows * kPitch, count = min(kRows, a.size[1] - y);

  const Shared<int> places = shared_as<int>(tile + min(a.c, int64_t(kForwardChannels)) * positions);
  locate_tile<kPitch>(a, a.border, first[1] + dy, first[2] + dx, rows, places);
  const Normalization<A> normalization = normalization_of<A>(a, n);
  const CorrelationMap<T, kWarps> moving(a, n, true, normalization);
  const A factor = A(a.factor);

  for (int plane = first[0] - a.radius[0]; plane < first[0] + tiling.depth + a.radius[0]; ++plane) {
    const int dz = plane - z;
    const bool active = here && dz >= -a.radius[0] && dz <= a.radius[0];
    const T* fixed = static_cast<const T*>(a.fixed) + voxel;
    const auto next_channel = [&](A* f) {
#pragma unroll
      for (int v = 0; v < kRows; ++v) f[v] = v < count ? load(fixed[v * line]) : A(0);
      if (a.statistics)
#pragma unroll
        for (int v = 0; v < kRows; ++v) f[v] = normalized(normalization, f[v]);
      fixed += a.voxels;
    };
    A sum[K][K][kRows] = {};  // offset along x, along y, voxel
    for (int64_t c0 = 0; c0 < a.c; c0 += kForwardChannels) {
      const int channels = int(min(int64_t(kForwardChannels), a.c - c0));
      __syncthreads();
      load_tile(a, moving, a.border, c0, channels, plane, positions, places, tile);
      __syncthreads();
      if (!active) continue;
      A f[kRows];
      next_channel(f);
      Shared<A> corner = tile + (row * kPitch + lane);
#pragma unroll 1
      for (int c = 0; c < channels; ++c) {
        A ahead[kRows] = {};  // its latency passes under this channel's products
        if (c + 1 < channels) next_channel(ahead);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          A m[kRows + K - 1];
#pragma unroll
          for (int j = 0; j < kRows + K - 1; ++j) m[j] = corner[j * kPitch + i];
#pragma unroll
          for (int j = 0; j < K; ++j)
#pragma unroll
            for (int v = 0; v < kRows; ++v) sum[i][j][v] += f[v] * m[v + j];
        }
#pragma unroll
        for (int v = 0; v < kRows; ++v) f[v] = ahead[v];
        corner += positions;
      }
    }
    if (!active) continue;
    const int64_t offset =
        (int64_t(dz + a.radius[0]) * a.along[1] + dy + a.radius[1]) * a.along[2] + dx + a.radius[2];
    T* to = static_cast<T*>(result) + (n * a.offsets + offset) * a.voxels + z * a.plane + y * line + x;
#pragma unroll
    for (int j = 0; j < K; ++j, to += a.along[2] * a.voxels) {
      T* at = to;
#pragma unroll
      for (int i = 0; i < K; ++i, at += a.voxels) {
        if (dy + j > a.radius[1] || dx + i > a.radius[2]) continue;
#pragma unroll
        for (int v = 0; v < kRows; ++v)
          if (v < count) store(at[v * line], sum[i][j][v] * factor);
      }
    }
  }
}

inline void correlation_fwd(Stored type, const CorrelationArgs& a, void* result, cudaStream_t stream) {
  const int64_t size[3] = {a.size[0], a.size[1], a.size[2]};
  const CorrelationTiling tiling = CorrelationTiling::of(size, kForwardThreads / 32);
  with_group(type, a, a.displacement, [&]<class T, int K, bool kWarps>() {
    const int64_t parts = int64_t((a.along[1] + K - 1) / K) * ((a.along[2] + K - 1) / K);
    const int64_t channels = std::min<int64_t>(a.c, kForwardChannels);
    const size_t shared = tile_bytes<arithmetic_t<T>, K>(tiling, channels);
    launch(correlation_fwd_kernel<T, K, kWarps>, correlation_blocks(a.n * tiling.count() * parts),
           kForwardThreads, shared, stream, a, tiling, result);
  });
}

}  // namespace fastreg
