#pragma once
// warp and compose, backward: to the displacement and a matrix (a gather), to the image (a scatter).
#include "cuda/reduce.h"
#include "cuda/warp.cuh"

namespace fastreg {

enum class Scatter { none, floating, fixed };  // to the image: atomics on floating or fixed point

// Adds a term to an element of the image's gradient.
template <Scatter kScatter, class A>
struct Adder {
  A* sums;
  __device__ __forceinline__ Adder(const WarpArgs& a, int64_t) : sums(static_cast<A*>(a.grad_image)) {}
  __device__ __forceinline__ void operator()(int64_t i, A term) const { atomicAdd(sums + i, term); }
};
template <class A>
struct Adder<Scatter::fixed, A> {
  A* sums;
  FixedPointArgs args;
  FixedPoint<A> point;
  __device__ __forceinline__ Adder(const WarpArgs& a, int64_t n)
      : sums(static_cast<A*>(a.grad_image)), args(a.fixed), point(a.fixed, n) {}
  __device__ __forceinline__ void operator()(int64_t i, A term) const { point.add(args, i, term, sums + i); }
};

// Sums over a block of du [z y x 1]^T, one per entry of the matrix: along a warp only x varies.
template <class A, int ND>
__device__ __forceinline__ void sum_affine(const WarpArgs& a, const Place& p, const A (&du)[ND]) {
  constexpr int kEntries = ND * (ND + 1), kWarps = kSamplingThreads / 32;
  FASTREG_SHARED(double, sums, kWarps* kEntries);
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < ND; ++k) {
    const double plain = warp_sum(double(du[k])), times_x = warp_sum(double(du[k]) * double(p.at[2]));
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int j = 0; j <= ND; ++j)
        sums[warp * kEntries + k * (ND + 1) + j] = j == ND       ? plain
                                                   : j == ND - 1 ? times_x
                                                                 : plain * double(p.at[j + 3 - ND]);
  }
  __syncthreads();
  if (threadIdx.x >= kEntries) return;
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += double(sums[w * kEntries + threadIdx.x]);
  const int64_t blocks = a.grid.blocks / a.n;
  a.grad_affine[(p.n * kEntries + threadIdx.x) * blocks + (blockIdx.x - p.n * blocks)] = sum;
}

// Blocks an SM must hold: as many as go without spills.
constexpr int bwd_blocks(size_t bytes, Scatter scatter, int channels) {
  if (bytes == 8 || scatter == Scatter::fixed) return 3;
  return channels > 1 ? 5 : 9;
}

// Both gradients in one pass over u, image and grad; each compiled only where it is asked for.
//
// Work: a thread per voxel, as forward. Gather: per corner the sum over channels of grad times its value less
// that of corner 0 (exact where values are close, so an offset of the image costs no digits), then once the
// slopes. Scatter: neighbours along x mostly share two of their corners (always where the displacement is
// smooth), so a lane hands the shares of its upper corners to the next lane by shuffle and a line of the cell
// takes one atomic a voxel instead of two; the rest goes alone. Terms of weight 0 are not added: a gradient
// that is not finite reaches only what it touches.
//
// Bytes: nd + 2C volumes read, nd written, C cleared and added to (in L2; 2C of DRAM). Atomics: 4 (2D: 2) a
// voxel and channel, 32 lanes on consecutive addresses: 4 volumes to L2 a channel. Arithmetic: some 170
// instructions a voxel, 90 a channel. At 256^3 fp32, C = 1, both: 670 MB, 225 us at 3 TB/s; 150 us of issue
// slots; 268 MB of atomics, 140 us at 2 TB/s in L2. C = 32 at 128^3: 1.1 GB, 370 us; 1.1 GB of atomics, 540
// us. Memory: none in fp32 and fp64 (halves accumulate in fp32); with an affine 96 bytes a block of 128
// voxels. Gradients to displacement and affine are bit-reproducible, to the image with Scatter::fixed.
template <class T, int ND, Scatter kScatter, bool kGather, int kChannels>
__global__ void __launch_bounds__(kSamplingThreads, bwd_blocks(sizeof(T), kScatter, kChannels))
    warp_bwd_kernel(const __grid_constant__ WarpArgs a) {
  using A = arithmetic_t<T>;
  constexpr int kCorners = 1 << ND;
  constexpr bool kScatters = kScatter != Scatter::none;
  const Place p = place_of<ND>(a.grid);
  Cell<A, ND> cell = cell_at<A, ND>(a, p);
  const int64_t n_in = a.grid.n_in, n_out = a.grid.n_out;
  const T* image = static_cast<const T*>(a.image) + p.n * a.c * n_in;
  const T* grad = static_cast<const T*>(a.grad) + p.n * a.c * n_out + p.voxel;
  A weight[kCorners], sums[kCorners] = {};
  const Adder<kScatter, A> add(a, p.n);
  if constexpr (kScatters) cell.weights(weight), cell.meet_neighbours();

  const auto channels = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
    A g[kCount];
    [[maybe_unused]] A value[kCount][kCorners];
#pragma unroll
    for (int j = 0; j < kCount; ++j) g[j] = p.there ? load(grad[(c + j) * n_out]) : A(0);
    if constexpr (kGather)
      read_corners<kCount, A, ND>(cell, image + c * n_in, n_in, [&](int k) { return cell.has(k); }, value);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kGather)
#pragma unroll
        for (int k = 1; k < kCorners; ++k) sums[k] += g[j] * (value[j][k] - value[j][0]);
      if constexpr (kScatters) {
        const int64_t channel = (p.n * a.c + c + j) * n_in;
#pragma unroll
        for (int k = 0; k < kCorners; k += 2) {
          A low = weight[k] != A(0) ? g[j] * weight[k] : A(0);
          const A high = weight[k + 1] != A(0) ? g[j] * weight[k + 1] : A(0);
          const A before = __shfl_up_sync(0xffffffffu, high, 1);
          if (cell.taken()) low += before;
          if (low != A(0)) add(channel + cell.index(k), low);
          if (!cell.given() && high != A(0)) add(channel + cell.index(k + 1), high);
        }
      }
    }
  };
  each_channel<kChannels>(0, a.c, channels);

  if constexpr (kGather) {
    A du[ND];
#pragma unroll
    for (int k = 0; k < ND; ++k) du[k] = cell.slope(k, sums);
    if (p.there && a.grad_displacement) {
      A* out = static_cast<A*>(a.grad_displacement) + p.n * ND * n_out + p.voxel;
#pragma unroll
      for (int k = 0; k < ND; ++k) out[k * n_out] = a.compose ? du[k] + load(grad[k * n_out]) : du[k];
    }
    if (a.grad_affine) sum_affine<A, ND>(a, p, du);
  }
}

template <class T, int ND>
void warp_bwd_of(const WarpArgs& a, cudaStream_t stream) {
  const bool gather = a.grad_displacement || a.grad_affine, one = a.c == 1;
  const auto run = [&](auto kernel) {
    launch(kernel, unsigned(a.grid.blocks), kSamplingThreads, 0, stream, a);
  };
  using enum Scatter;
  if (a.grad_image && a.fixed.sums) run(warp_bwd_kernel<T, ND, fixed, false, 2>);
  if (gather && (!a.grad_image || a.fixed.sums))
    run(one ? warp_bwd_kernel<T, ND, none, true, 1> : warp_bwd_kernel<T, ND, none, true, 2>);
  else if (gather)
    run(one ? warp_bwd_kernel<T, ND, floating, true, 1> : warp_bwd_kernel<T, ND, floating, true, 2>);
  else if (a.grad_image && !a.fixed.sums)
    run(one ? warp_bwd_kernel<T, ND, floating, false, 1> : warp_bwd_kernel<T, ND, floating, false, 2>);
}

// Terms of the image's gradient on fixed point where a.fixed says so; then `settle` is left to do.
inline void warp_bwd(Stored type, int nd, const WarpArgs& a, cudaStream_t stream) {
  with_type(type, [&]<class T>() { nd == 3 ? warp_bwd_of<T, 3>(a, stream) : warp_bwd_of<T, 2>(a, stream); });
}

}  // namespace fastreg
