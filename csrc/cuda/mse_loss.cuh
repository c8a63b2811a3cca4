#pragma once
// mse_loss: masked squared differences and their gradients.
#include "common/mse_loss.h"
#include "common/scalar.h"
#include "cuda/reduce.h"

namespace fastreg {

constexpr int kMseThreads = 256, kMsePerThread = int(kMseBlock) / kMseThreads;
static_assert(kMsePerThread * kMseThreads == kMseBlock);

// Squared differences summed over channels. Work: a block per 1024 voxels of a sample, 4 a thread, 256 apart,
// so that a warp reads 128 bytes at a time and has 8 loads in flight. Bytes: 2 volumes and the mask read, the
// map written. Sums are fp32 over a thread's values and fp64 from there on, a partial sum a block. At 256^3
// fp32: 134 MB, 45 us at 3 TB/s; 50 MFLOP, 1 us. Memory: 8 bytes a block.
template <class T>
__global__ void __launch_bounds__(kMseThreads) mse_fwd_kernel(MseArgs a) {
  using A = arithmetic_t<T>;
  const int64_t n = blockIdx.y, first = int64_t(blockIdx.x) * kMseBlock + threadIdx.x;
  A square[kMsePerThread] = {};
  for (int64_t c = 0; c < a.c; ++c) {
    const T* fixed = static_cast<const T*>(a.fixed) + (n * a.c + c) * a.voxels;
    const T* moved = static_cast<const T*>(a.moved) + (n * a.c + c) * a.voxels;
#pragma unroll
    for (int k = 0; k < kMsePerThread; ++k) {
      const int64_t x = first + k * kMseThreads;
      const A d = x < a.voxels ? load(fixed[x]) - load(moved[x]) : A(0);
      square[k] += d * d;
    }
  }
  double sum = 0;
#pragma unroll
  for (int k = 0; k < kMsePerThread; ++k) {
    const int64_t x = first + k * kMseThreads;
    if (x >= a.voxels) continue;
    if (a.mask) square[k] = masked(static_cast<const A*>(a.mask)[n * a.voxels + x], square[k]);
    if (a.per_voxel) static_cast<A*>(a.result)[n * a.voxels + x] = square[k] / A(a.c);
    sum += double(square[k]);
  }
  if (a.per_voxel) return;
  FASTREG_SHARED(double, scratch, kMseThreads / 32);
  sum = block_sum<kMseThreads>(sum, scratch);
  if (threadIdx.x == 0) static_cast<double*>(a.result)[n * gridDim.x + blockIdx.x] = sum;
}

// Work and layout as forward. Bytes: 2 volumes, the mask and the map's gradient read, 1 or 2 volumes written.
// At 256^3 fp32, both gradients: 268 MB, 90 us at 3 TB/s.
template <class T>
__global__ void __launch_bounds__(kMseThreads) mse_bwd_kernel(MseArgs a) {
  using A = arithmetic_t<T>;
  const int64_t n = blockIdx.y, first = int64_t(blockIdx.x) * kMseBlock + threadIdx.x;
  const A* grad = static_cast<const A*>(a.grad) + (a.per_voxel ? n * a.voxels : n);
  const A scale = A(2) / A(a.per_voxel ? a.c : 1);
#pragma unroll
  for (int k = 0; k < kMsePerThread; ++k) {
    const int64_t x = first + k * kMseThreads;
    if (x >= a.voxels) break;
    const A factor = scale * grad[a.per_voxel ? x : 0];
    const A weight = a.mask ? static_cast<const A*>(a.mask)[n * a.voxels + x] : A(1);
    for (int64_t c = 0; c < a.c; ++c) {
      const int64_t at = (n * a.c + c) * a.voxels + x;
      const A d = load(static_cast<const T*>(a.fixed)[at]) - load(static_cast<const T*>(a.moved)[at]);
      const A g = masked(weight, factor * d);
      if (a.grad_fixed) store(static_cast<T*>(a.grad_fixed)[at], g);
      if (a.grad_moved) store(static_cast<T*>(a.grad_moved)[at], -g);
    }
  }
}

inline void mse_fwd(Stored type, const MseArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned(mse_blocks(a)), unsigned(a.n));
  with_type(type, [&]<class T>() { launch(mse_fwd_kernel<T>, grid, kMseThreads, 0, stream, a); });
}

inline void mse_bwd(Stored type, const MseArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned(mse_blocks(a)), unsigned(a.n));
  with_type(type, [&]<class T>() { launch(mse_bwd_kernel<T>, grid, kMseThreads, 0, stream, a); });
}

}  // namespace fastreg
