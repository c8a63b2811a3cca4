#pragma once
// warp and compose, forward: reading an image (compose: a displacement) at p + u(p).
#include "cuda/fixed_point.cuh"
#include "cuda/sampling.cuh"

namespace fastreg {

struct WarpArgs {
  SamplingGrid grid;
  const void* image;         // (n, c, *in)
  const void* displacement;  // (n, nd, *out), arithmetic type; null with an affine: zero
  const double* affine;      // (n, nd, nd + 1) less the identity, NaN throughout where not finite; or null
  const void* grad;          // (n, c, *out), backward only
  void* result;              // forward: (n, c, *out)
  void* grad_image;          // zeros of the arithmetic type, (n, c, *in); or null
  void* grad_displacement;   // arithmetic type; or null
  double* grad_affine;       // per sample, entry and block of the sample, to be summed; or null
  FixedPointArgs fixed;
  int64_t n, c;
  bool compose;  // the image is a displacement too, and the displacement is added to what it reads
};

// The corners that a voxel reads. What a matrix adds is summed in fp64, so that one near the identity keeps
// its digits across a volume.
template <class A, int ND>
__device__ __forceinline__ Cell<A, ND> cell_at(const WarpArgs& a, const Place& p) {
  const A* u = static_cast<const A*>(a.displacement) + p.n * ND * a.grid.n_out + p.voxel;
  if (!a.affine) return Cell<A, ND>(a.grid, p, [&](int k) { return u[k * a.grid.n_out]; });
  return Cell<A, ND>(a.grid, p, [&](int k) {
    const double* m = a.affine + (p.n * ND + k) * (ND + 1);
    double d = m[ND];
#pragma unroll
    for (int j = 0; j < ND; ++j) d += m[j] * double(p.at[j + 3 - ND]);
    return a.displacement ? d + double(u[k * a.grid.n_out]) : d;
  });
}

// What the corners of a cell hold in kChannels channels from `image` on: all loads before the first use.
template <int kChannels, class A, int ND, class T, class Wanted>
__device__ __forceinline__ void read_corners(const Cell<A, ND>& cell, const T* __restrict__ image,
                                             int64_t n_in, Wanted wanted,
                                             A (&value)[kChannels][Cell<A, ND>::kCorners]) {
#pragma unroll
  for (int j = 0; j < kChannels; ++j)
#pragma unroll
    for (int c = 0; c < Cell<A, ND>::kCorners; ++c)
      value[j][c] = wanted(c) ? load((image + j * n_in + cell.plane[c >> 2])[cell.in_plane[c & 3]]) : A(0);
}

// Calls channels(integral_constant<int, count>, c) for all of [first, last): kChannels at a time, then one by
// one. kChannels = 1: there is exactly one, and no loop that costs registers.
template <int kChannels, class Channels>
__device__ __forceinline__ void each_channel(int64_t first, int64_t last, Channels channels) {
  if constexpr (kChannels == 1) {
    channels(std::integral_constant<int, 1>(), 0);
  } else {
    int64_t c = first;
#pragma unroll 1
    for (; c + kChannels <= last; c += kChannels) channels(std::integral_constant<int, kChannels>(), c);
#pragma unroll 1
    for (; c < last; ++c) channels(std::integral_constant<int, 1>(), c);
  }
}

// Blocks an SM must hold: as many as go without spills.
constexpr int fwd_blocks(size_t bytes, int channels) {
  if (channels > 2) return 4;
  return channels == 2 || bytes == 8 ? 6 : 10;
}

// Work: a thread per voxel (see SamplingGrid); position, corners and weights once, then the channels of its
// group of channels, kChannels at a time. Bytes: nd + C volumes read, C written; corners that voxels share
// come from L1, or L2 between tiles. Arithmetic: some 110 instructions a voxel and 30 a channel, of which 8
// loads and 8 multiply-adds. At 256^3 fp32, C = 1: 336 MB, 112 us at 3 TB/s; 70 us of issue slots, 40 us of
// L1. C = 32 at 128^3: 562 MB, 190 us; 70 us of issue. Memory: none.
template <class T, int ND, int kChannels>
__global__ void __launch_bounds__(kSamplingThreads, fwd_blocks(sizeof(T), kChannels))
    warp_fwd_kernel(const __grid_constant__ WarpArgs a) {
  using A = arithmetic_t<T>;
  constexpr int kCorners = 1 << ND;
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const Cell<A, ND> cell = cell_at<A, ND>(a, p);
  A weight[kCorners];
  cell.weights(weight);
  const A start = cell.nan() ? A(NAN) : A(0);
  const int64_t n_in = a.grid.n_in, n_out = a.grid.n_out;
  const int64_t first = a.c * blockIdx.y / gridDim.y, last = a.c * (blockIdx.y + 1) / gridDim.y;
  const T* image = static_cast<const T*>(a.image) + p.n * a.c * n_in;
  T* out = static_cast<T*>(a.result) + p.n * a.c * n_out + p.voxel;
  const auto channels = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
    A value[kCount][kCorners];
    read_corners<kCount, A, ND>(
        cell, image + c * n_in, n_in, [&](int k) { return weight[k] != A(0); }, value);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      A sum = start;
#pragma unroll
      for (int k = 0; k < kCorners; ++k) sum += weight[k] * value[j][k];
      if (a.compose) sum += static_cast<const A*>(a.displacement)[(p.n * ND + c + j) * n_out + p.voxel];
      store(out[(c + j) * n_out], sum);
    }
  };
  each_channel<kChannels>(first, last, channels);
}

inline void warp_fwd(Stored type, int nd, const WarpArgs& a, cudaStream_t stream) {
  // A grid too small to fill a device also splits the channels.
  const int64_t groups = 1024 / a.grid.blocks < a.c / 8 ? 1024 / a.grid.blocks : a.c / 8;
  const dim3 grid(unsigned(a.grid.blocks), unsigned(groups > 1 ? groups : 1));
  with_type(type, [&]<class T>() {
    const auto pick = [&](auto one, auto few, auto many) { return a.c == 1 ? one : a.c < 4 ? few : many; };
    const auto kernel =
        nd == 3 ? pick(warp_fwd_kernel<T, 3, 1>, warp_fwd_kernel<T, 3, 2>, warp_fwd_kernel<T, 3, 4>)
                : pick(warp_fwd_kernel<T, 2, 1>, warp_fwd_kernel<T, 2, 2>, warp_fwd_kernel<T, 2, 4>);
    launch(kernel, grid, kSamplingThreads, 0, stream, a);
  });
}

}  // namespace fastreg
