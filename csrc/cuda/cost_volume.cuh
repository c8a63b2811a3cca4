#pragma once
// cost_volume: mean squared differences of cells of fixed and of moving, shifted by all offsets of a cube.
#include <algorithm>

#include "common/cost_volume.h"
#include "common/scalar.h"
#include "cuda/launch.h"

namespace fastreg {

constexpr int kCostThreads = 256, kCostMaxOffsets = 9;  // a thread's: radius 6 fits one block
constexpr size_t kCostShared = 96 * 1024;

// What a block of samples needs of shared memory: samples (value, weight, place), and where kPatch the part
// of moving that they reach, once as values and once as places in the volume, which all channels share.
FASTREG_HD int64_t cost_reach(const CostArgs& a, int k) {
  const int64_t most = cost_samples_of_block(a, k), of_cell = (a.cell[k] - 1) / a.stride[k] + 1;
  return ((most < of_cell ? most : of_cell) - 1) * a.stride[k] + window(a, k);
}
FASTREG_HD int64_t cost_samples(const CostArgs& a) {
  int64_t n = 1;
  for (int k = 0; k < 3; ++k) {
    const int64_t most = cost_samples_of_block(a, k), of_cell = (a.cell[k] - 1) / a.stride[k] + 1;
    n *= most < of_cell ? most : of_cell;
  }
  return n;
}
FASTREG_HD int64_t cost_patch(const CostArgs& a) {
  return cost_reach(a, 0) * cost_reach(a, 1) * cost_reach(a, 2);
}

FASTREG_HD int64_t clamped(int64_t x, int64_t size) { return x < 0 ? 0 : x < size ? x : size - 1; }

// Work: a block per cell and 256 kOffsets offsets (y), kOffsets a thread, 256 apart, so that a warp reads
// neighbouring words. Samples are compared in blocks of at most 8 an axis: their places and weights, and
// where the patch begins each row, are found once; then, channel by channel, the patch is read from memory
// into shared memory and each thread subtracts. Sums of a channel and block are added to those before: fp32
// keeps its digits in large cells. Without kPatch (a radius beyond 8 or so) moving is read where it lies.
//
// Bytes: fixed once, moving (cell + 2 radius)^nd / cell^nd times from L2, the costs once. Arithmetic: C
// samples offsets subtractions and multiply-adds, with a word of shared memory each, which is the limit: 32
// words a cycle and SM. Twelve features of 96^3, cells of 4, radius 6, every second voxel: 2.9 G words, 0.4
// ms at 132 SMs of 1.7 GHz; the patches, of 15^3, 0.56 G words from L2, 0.4 ms at 5.5 TB/s, in part beside
// it.
template <class T, int kOffsets, bool kWeighted, bool kPatch>
__global__ void __launch_bounds__(kCostThreads) cost_fwd_kernel(CostArgs a) {
  using A = arithmetic_t<T>;
  FASTREG_DYNAMIC_SHARED(A, memory);
  const int n_samples = int(cost_samples(a)), n_patch = kPatch ? int(cost_patch(a)) : 0;
  const Shared<A> value = memory, weight = memory + n_samples, patch = memory + 2 * n_samples;
  const Shared<int> place = shared_as<int>(patch + n_patch), voxel = place + n_samples;
  const Shared<int> source = voxel + n_samples;
  const int thread = threadIdx.x, threads = blockDim.x;
  int64_t rest = blockIdx.x, cell[3];
#pragma unroll
  for (int k = 2; k >= 0; --k) cell[k] = rest % a.cells[k], rest /= a.cells[k];
  const int64_t n = rest, volume = a.size[0] * a.size[1] * a.size[2], n_offsets = offsets(a);
  const int64_t first = int64_t(blockIdx.y) * threads * kOffsets + thread;
  const A* mask = static_cast<const A*>(a.mask) + (kWeighted ? n * volume : 0);

  // Of the thread's j-th offset, how far along an axis from the least; those beyond the last compare as the
  // first, and are not written.
  const auto offset_of = [&](int j, int (&d)[3]) {
    int64_t o = first + int64_t(j) * threads;
    o = o < n_offsets ? o : 0;
#pragma unroll
    for (int k = 2; k >= 0; --k) d[k] = int(o % window(a, k)), o /= window(a, k);
  };
  A sum[kOffsets] = {};
  double total = 0;
  CostSpan span[3];
  for (int64_t z = 0; (span[0] = cost_span(a, 0, cell[0], z)).count > 0; ++z)
    for (int64_t y = 0; (span[1] = cost_span(a, 1, cell[1], y)).count > 0; ++y)
      for (int64_t x = 0; (span[2] = cost_span(a, 2, cell[2], x)).count > 0; ++x) {
        int reach[3], count = 1;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          reach[k] = int((span[k].count - 1) * a.stride[k] + window(a, k));
          count *= int(span[k].count);
        }
        __syncthreads();  // of the block before, all is read
        for (int s = thread; s < count; s += threads) {
          const int64_t p[3] = {s / int(span[1].count * span[2].count) * a.stride[0],
                                s / int(span[2].count) % int(span[1].count) * a.stride[1],
                                s % int(span[2].count) * a.stride[2]};
          const int64_t at =
              ((span[0].begin + p[0]) * a.size[1] + span[1].begin + p[1]) * a.size[2] + span[2].begin + p[2];
          voxel[s] = int(at);
          place[s] = kPatch ? int((p[0] * reach[1] + p[1]) * reach[2] + p[2]) : 0;
          if (kWeighted) weight[s] = mask[at];
        }
        if (kPatch)
          for (int i = thread; i < reach[0] * reach[1] * reach[2]; i += threads) {
            const int row = i / reach[2];
            const int64_t pz = clamped(span[0].begin - a.radius[0] + row / reach[1], a.size[0]);
            const int64_t py = clamped(span[1].begin - a.radius[1] + row % reach[1], a.size[1]);
            const int64_t px = clamped(span[2].begin - a.radius[2] + i % reach[2], a.size[2]);
            source[i] = int((pz * a.size[1] + py) * a.size[2] + px);
          }
        int offset[kOffsets][kPatch ? 1 : 3];
#pragma unroll
        for (int j = 0; j < kOffsets; ++j) {
          int d[3];
          offset_of(j, d);
          if constexpr (kPatch)
            offset[j][0] = (d[0] * reach[1] + d[1]) * reach[2] + d[2];
          else
            for (int k = 0; k < 3; ++k) offset[j][k] = d[k];
        }
        for (int64_t c = 0; c < a.c; ++c) {
          const T* fixed = static_cast<const T*>(a.fixed) + (n * a.c + c) * volume;
          const T* moving = static_cast<const T*>(a.moving) + (n * a.c + c) * volume;
          __syncthreads();
          for (int s = thread; s < count; s += threads) value[s] = load(fixed[voxel[s]]);
          if (kPatch)
            for (int i = thread; i < reach[0] * reach[1] * reach[2]; i += threads)
              patch[i] = load(moving[source[i]]);
          __syncthreads();
          A of_channel[kOffsets] = {};
          for (int s = 0; s < count; ++s) {
            const A f = value[s], w = kWeighted ? A(weight[s]) : A(1);
            if (kWeighted && w <= 0) continue;
            if (c == 0) total += double(w);
            const int at = place[s], from = voxel[s];
#pragma unroll
            for (int j = 0; j < kOffsets; ++j) {
              A m;
              if constexpr (kPatch) {
                m = patch[at + offset[j][0]];
              } else {
                const int64_t pz = from / (a.size[1] * a.size[2]), py = from / a.size[2] % a.size[1];
                const int64_t qz = clamped(pz + offset[j][0] - a.radius[0], a.size[0]);
                const int64_t qy = clamped(py + offset[j][1] - a.radius[1], a.size[1]);
                const int64_t qx = clamped(from % a.size[2] + offset[j][2] - a.radius[2], a.size[2]);
                m = load(moving[(qz * a.size[1] + qy) * a.size[2] + qx]);
              }
              const A d = f - m;
              of_channel[j] += kWeighted ? w * (d * d) : d * d;
            }
          }
#pragma unroll
          for (int j = 0; j < kOffsets; ++j) sum[j] += of_channel[j];
        }
      }
  // Not times the inverse, which is infinite where the weights are subnormal.
  const A weights = total == 0 ? A(1) : A(total * double(a.c));
  A* out = static_cast<A*>(a.result) + int64_t(blockIdx.x) * n_offsets;
#pragma unroll
  for (int j = 0; j < kOffsets; ++j) {
    const int64_t o = first + int64_t(j) * threads;
    if (o < n_offsets) out[o] = sum[j] / weights;
  }
}

template <class T, int kOffsets>
void cost_fwd_with(const CostArgs& a, int64_t tiles, int threads, cudaStream_t stream) {
  using A = arithmetic_t<T>;
  const int64_t samples = cost_samples(a), patch = cost_patch(a);
  const size_t shared = samples * (2 * sizeof(A) + 2 * sizeof(int));
  const size_t with_patch = shared + patch * (sizeof(A) + sizeof(int));
  const dim3 grid(unsigned(a.n * a.cells[0] * a.cells[1] * a.cells[2]), unsigned(tiles));
  const auto start = [&](auto kernel, size_t bytes) { launch(kernel, grid, threads, bytes, stream, a); };
  if (with_patch <= kCostShared)
    a.mask ? start(cost_fwd_kernel<T, kOffsets, true, true>, with_patch)
           : start(cost_fwd_kernel<T, kOffsets, false, true>, with_patch);
  else
    a.mask ? start(cost_fwd_kernel<T, kOffsets, true, false>, shared)
           : start(cost_fwd_kernel<T, kOffsets, false, false>, shared);
}

// As few offsets a thread as one block allows, and as few threads as hold them.
inline void cost_fwd(Stored type, const CostArgs& a, cudaStream_t stream) {
  const int64_t n = offsets(a), tile = kCostThreads * kCostMaxOffsets;
  const int64_t tiles = (n + tile - 1) / tile, each = (n + tiles - 1) / tiles;
  const int64_t most = (each + kCostThreads - 1) / kCostThreads;
  with_type(type, [&]<class T>() {
    const auto run = [&](auto k) {
      const int64_t threads = (each + k - 1) / k;
      cost_fwd_with<T, k>(a, tiles, int((threads + 31) / 32 * 32), stream);
    };
    most <= 1   ? run(std::integral_constant<int, 1>())
    : most <= 2 ? run(std::integral_constant<int, 2>())
    : most <= 5 ? run(std::integral_constant<int, 5>())
                : run(std::integral_constant<int, kCostMaxOffsets>());
  });
}

}  // namespace fastreg
