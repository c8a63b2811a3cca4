#pragma once
// Sums over a block, the same bits in every run: lanes by halves, then warps in order.
#include "cuda/launch.h"

namespace fastreg {

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

// Of `x` over the threads of a one-dimensional block of kThreads (a multiple of 32); thread 0 gets it. All
// threads call it. `scratch` holds kThreads / 32; use it again only after a barrier.
template <int kThreads, class A>
__device__ __forceinline__ A block_sum(A x, Shared<A> scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += A(scratch[warp]);
  return sum;
}

}  // namespace fastreg
