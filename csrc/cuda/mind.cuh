#pragma once
// MIND on a GPU: what its two routes share. Distances come from mind_tile.cuh (3D, radius 1 to 3: windows in
// registers and shared memory) or mind_generic.cuh (the rest: one window pass after the other).
//
// Planes go through in slabs. What must pass between kernels of a gradient lies in rings of planes that
// follow the slabs: dL/dD of each channel, and its way back per direction. So a gradient takes scratch memory
// of some 3 volumes whatever the image, and a loss without one none where there are tiles. A 2D image is a
// volume of its rows: (H, 1, W).
#include <cmath>
#include <type_traits>

#include "common/mind.h"
#include "common/scalar.h"
#include "cuda/reduce.h"

namespace fastreg {

// Planes of a volume, plane z in slot z % planes: (n, maps, planes, height, width), arithmetic type.
struct MindRing {
  void* data;
  int planes;
};

// Sums: (n, sums_stride), one per block, of a slab's from sums_first on. Gradients are of grad_type.
struct MindArgs : MindCall {
  Stored grad_type;
  int64_t sums_stride, sums_first;
  int size[3], radius[3], dilation[3];
  int n_channels, n_directions;
  bool box;
  double sigma;
  MindDirections pairs;
  MindTask task;
  int begin, end;       // planes of a launch
  int slab;             // planes of a slab
  MindRing adjoint[2];  // n_channels maps: dL/dD
  MindRing spread[2];   // c * n_directions maps: what a voxel's distances pass to its neighbour there
  MindRing window[3];   // generic route: n_channels maps
  const void* weights;  // generic route: 2 (2 radius + 1), arithmetic type: weights of a patch, running sums

  __host__ __device__ int64_t plane() const { return int64_t(size[1]) * size[2]; }
  __host__ __device__ int images() const { return task == MindTask::compare ? 2 : 1; }
  __host__ __device__ int axis(int direction) const {
    return n_directions == 4 ? direction / 2 * 2 : direction / 2;
  }
};

template <class A>
__device__ __forceinline__ A* ring_plane(const MindRing& ring, int64_t map, int z, int64_t plane) {
  return static_cast<A*>(ring.data) + (map * ring.planes + unsigned(z) % unsigned(ring.planes)) * plane;
}

__device__ __forceinline__ int clamp_index(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// 0, which the compiler knows only here: what is added to it is not computed ahead of a march along z, where
// addresses and weights by the dozen would each take a register.
__device__ __forceinline__ int late_zero() {
  int zero = 0;
  asm volatile("" : "+r"(zero));
  return zero;
}

constexpr int kMindVoxels = 128;  // of an image, per block

template <class T>
struct MindVoxel {
  int64_t n;
  int z;
  int64_t at;  // in the plane
  bool inside;
  int image;
};

// All that happens at a voxel once its distances are there. `other(e, o)` gives the descriptors of the other
// image at this voxel for those of this one; all threads call it.
template <class T, int kChannels, class Other>
__device__ __forceinline__ void mind_at_voxel(const MindArgs& a, const MindVoxel<T>& v,
                                              const arithmetic_t<T> (&d)[kChannels],
                                              const MindBounds<arithmetic_t<T>>& bounds, Other other,
                                              double& sum) {
  using A = arithmetic_t<T>;
  if (a.task == MindTask::variance) {
    if (v.inside) sum += double(mind_variance<A>(d, mind_least(d), a.six));
    return;
  }
  const auto exponential = [](A x, A scale) {
    // The unit for 2^x: an error of |x| 2^-23, x being where e^x still counts.
    if constexpr (std::is_same_v<A, float>)
      return __expf(x * scale);
    else
      return std::exp(x * scale);
  };
  A e[kChannels], g[kChannels];
  const MindScale<A> m = mind_describe<A>(d, a.six, bounds, exponential, e);
  const int64_t n = v.n + late_zero(), plane = a.plane(), voxel = (n * a.size[0] + v.z) * plane + v.at;
  const auto channel = [&](int k) { return ((n * kChannels + k) * a.size[0] + v.z) * plane + v.at; };
  if (a.task == MindTask::describe) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      if (v.inside) store(static_cast<T*>(a.out)[channel(k)], e[k]);
    return;
  }
  if (a.task == MindTask::describe_bwd) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      g[k] = v.inside ? load(static_cast<const T*>(a.upstream)[channel(k)]) : A(0);
  } else {
    A o[kChannels];
    other(e, o);
    A w = v.inside ? A(1) : A(0);
    if (a.weight && v.inside) w = static_cast<const A*>(a.weight)[voxel];
    if (a.is_mask && w < A(0)) w = A(0);
    A error = 0;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) g[k] = v.image ? e[k] - o[k] : o[k] - e[k];
    mind_error(a.absolute, w, g, error);
    if (v.image == 1) {
      sum += w == A(0) ? 0.0 : double(w * error);
      if (a.out && v.inside) static_cast<A*>(a.out)[voxel] = error * (A(1) / kChannels);
    }
    if (!a.grad[v.image]) return;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) g[k] = v.image ? g[k] : -g[k];
  }
  mind_adjoint<A>(d, e, a.six, m, g);
#pragma unroll
  for (int k = 0; k < kChannels; ++k)
    if (v.inside) ring_plane<A>(a.adjoint[v.image], n * kChannels + k, v.z, plane)[v.at] = g[k];
}

// Mean of V of each sample from its partial sums, NaN where it is not finite. A block a sample.
constexpr int kMeanThreads = 256;
__global__ void __launch_bounds__(kMeanThreads)
    mind_mean_kernel(const double* sums, int64_t count, double voxels, double* mean) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kMeanThreads) sum += sums[blockIdx.x * count + i];
  FASTREG_SHARED(double, scratch, kMeanThreads / 32);
  sum = block_sum<kMeanThreads>(sum, scratch) / voxels;
  if (threadIdx.x == 0) mean[blockIdx.x] = sum + (sum - sum);
}

// The image's gradient from the maps of its directions: a voxel gathers from the voxels whose offset ends
// there; those outside end at the border. Work: a thread a voxel of the planes [begin, end). Bytes: 6 maps
// read, 1 written; at 256^3 fp32 470 MB, 0.16 ms at 3 TB/s; some 40 operations a voxel. Summed in one order.
constexpr int kGatherThreads = 256;
template <class T>
__global__ void __launch_bounds__(kGatherThreads)
    mind_gather_kernel(const __grid_constant__ MindArgs a, int image, unsigned blocks) {
  using A = arithmetic_t<T>;
  const int64_t plane = a.plane(), at = int64_t(blockIdx.x % blocks) * kGatherThreads + threadIdx.x;
  const int planes = a.end - a.begin, z = a.begin + int(blockIdx.x / blocks % planes);
  const int64_t map = blockIdx.x / blocks / planes;  // of (n, c)
  if (at >= plane) return;
  const int place[3] = {z, int(at / a.size[2]), int(at % a.size[2])};
  A sum = 0;
  for (int direction = 0; direction < a.n_directions; ++direction) {
    const int axis = a.axis(direction), n = a.size[axis], i = place[axis];
    const int step = direction % 2 ? a.dilation[axis] : -a.dilation[axis];
    const auto from = [&](int source) {
      const A* in =
          ring_plane<A>(a.spread[image], map * a.n_directions + direction, axis ? z : source, plane);
      return in[at + (axis == 2 ? source - i : axis == 1 ? int64_t(source - i) * a.size[2] : 0)];
    };
    // Of the voxels from i - step on, those whose offset is cut to end at i as well.
    const int edge = step > 0 ? n - 1 : 0, towards = step > 0 ? 1 : -1;
    if (i == edge)
      for (int source = i - step; source != i + towards; source += towards) sum += from(source);
    else if (i - step >= 0 && i - step < n)
      sum += from(i - step);
    if (a.six) sum -= from(i);
  }
  store(static_cast<T*>(a.grad[image])[(map * a.size[0] + z) * plane + at], sum);
}

inline void mind_gather(const MindArgs& a, int image, cudaStream_t stream) {
  const int64_t blocks = (a.plane() + kGatherThreads - 1) / kGatherThreads;
  const dim3 grid(unsigned(blocks * (a.end - a.begin) * a.n * a.c));
  with_type(a.grad_type, [&]<class T>() {
    launch(mind_gather_kernel<T>, grid, kGatherThreads, 0, stream, a, image, unsigned(blocks));
  });
}

}  // namespace fastreg
