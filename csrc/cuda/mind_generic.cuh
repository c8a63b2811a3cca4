#pragma once
// MIND for any radius and dilation, and in 2D: one kernel per axis of the windows, over maps of a slab of
// planes. Each reads 2 radius + 1 samples a value, through L1 and L2. A few times slower than tiles and with
// more scratch memory, for what is small (2D) or rare (radius 0 or above 3).
#include "cuda/mind.cuh"

namespace fastreg {

constexpr int kPassThreads = 256;

// Weights of a patch along an axis and their running sums; one thread.
template <class A>
__global__ void mind_weights_kernel(int radius, bool box, double sigma, A* out) {
  if (threadIdx.x) return;
  const auto weight = [&](int k) { return box ? 1.0 : std::exp(-0.5 * (k / sigma) * (k / sigma)); };
  double total = 0, running = 0;
  for (int k = -radius; k <= radius; ++k) total += weight(k);
  if (box) total = 1;
  for (int k = -radius; k <= radius; ++k) {
    running += weight(k) / total;
    out[k + radius] = A(weight(k) / total), out[3 * radius + 1 + k] = A(running);
  }
}

// A thread a value of (n, channel, z, y, x), z in [begin, end).
struct MindPass {
  int64_t at, map;  // in the plane; (n, channel)
  int z;
  bool inside;
};
__device__ __forceinline__ MindPass mind_pass(const MindArgs& a) {
  const int64_t plane = a.plane(), i = int64_t(blockIdx.x) * kPassThreads + threadIdx.x, rest = i / plane;
  const int planes = a.end - a.begin;
  return {i % plane, rest / planes, a.begin + int(rest % planes), i < a.n * a.n_channels * planes * plane};
}

// Squares and their windows along z, to `out`.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    mind_squares_kernel(const __grid_constant__ MindArgs a, int image, MindRing out) {
  using A = arithmetic_t<T>;
  const MindPass v = mind_pass(a);
  if (!v.inside) return;
  const int k = int(v.map % a.n_channels), depth = a.size[0], radius = a.radius[0];
  const int64_t n = v.map / a.n_channels, plane = a.plane();
  const int place[2] = {int(v.at / a.size[2]), int(v.at % a.size[2])};
  int step[2];
  int64_t at[2];
  for (int i = 0; i < 2; ++i) {
    const int direction = i ? a.pairs.b[k] : a.pairs.a[k], axis = (direction - 1) / 2;
    const int by = direction == 0 ? 0 : direction % 2 ? -a.dilation[axis] : a.dilation[axis];
    const auto along = [&](int j) { return direction && axis == j ? by : 0; };
    step[i] = along(0);
    at[i] = int64_t(clamp_index(place[0] + along(1), a.size[1])) * a.size[2] +
            clamp_index(place[1] + along(2), a.size[2]);
  }
  const A* window = static_cast<const A*>(a.weights);
  A sum = 0;
  for (int p = max(v.z - radius, 0); p <= min(v.z + radius, depth - 1); ++p) {
    A square = 0;
    for (int64_t c = 0; c < a.c; ++c) {
      const T* in = static_cast<const T*>(a.image[image]) + (n * a.c + c) * depth * plane;
      const A d = load(in[clamp_index(p + step[0], depth) * plane + at[0]]) -
                  load(in[clamp_index(p + step[1], depth) * plane + at[1]]);
      square += d * d;
    }
    sum +=
        (radius ? mind_patch_weight(window, window + 2 * radius + 1, radius, p, v.z, depth) : A(1)) * square;
  }
  ring_plane<A>(out, v.map, v.z, plane)[v.at] = sum;
}

// Windows along an axis, from `in` to `out`; `transposed`: a value gathers from the windows it is in.
template <class A>
__global__ void __launch_bounds__(kPassThreads)
    mind_window_kernel(const __grid_constant__ MindArgs a, int axis, bool transposed, MindRing in,
                       MindRing out) {
  const MindPass v = mind_pass(a);
  if (!v.inside) return;
  const int64_t plane = a.plane();
  const int radius = a.radius[axis], n = a.size[axis];
  const int i = axis == 0 ? v.z : axis == 1 ? int(v.at / a.size[2]) : int(v.at % a.size[2]);
  const A *window = static_cast<const A*>(a.weights), *cumulative = window + 2 * radius + 1;
  A sum = 0;
  for (int j = max(i - radius, 0); j <= min(i + radius, n - 1); ++j) {
    const A weight = transposed ? mind_patch_weight(window, cumulative, radius, i, j, n)
                                : mind_patch_weight(window, cumulative, radius, j, i, n);
    const A* from = ring_plane<A>(in, v.map, axis == 0 ? j : v.z, plane) + v.at;
    sum += weight * from[axis == 2 ? j - i : axis == 1 ? int64_t(j - i) * a.size[2] : 0];
  }
  ring_plane<A>(out, v.map, v.z, plane)[v.at] = sum;
}

// What follows from distances. Half a block an image, as in a tile.
template <class T, int kChannels>
__global__ void __launch_bounds__(2 * kMindVoxels)
    mind_voxel_kernel(const __grid_constant__ MindArgs a, unsigned blocks, arithmetic_t<T> scale) {
  using A = arithmetic_t<T>;
  const int image = threadIdx.x / kMindVoxels, thread = threadIdx.x % kMindVoxels;
  FASTREG_DYNAMIC_SHARED(A, exchange);  // (images, channels, voxels)
  const int64_t plane = a.plane(), n = blockIdx.x / blocks;
  const int64_t i = int64_t(blockIdx.x % blocks) * kMindVoxels + thread;
  const MindVoxel<T> voxel{n, a.begin + int(i / plane), i % plane, i < (a.end - a.begin) * plane, image};
  const auto other = [&](const A(&e)[kChannels], A(&o)[kChannels]) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) exchange[(image * kChannels + k) * kMindVoxels + thread] = e[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChannels; ++k) o[k] = exchange[((1 - image) * kChannels + k) * kMindVoxels + thread];
  };
  A d[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k)
    d[k] = voxel.inside ? scale * ring_plane<A>(a.window[image], n * kChannels + k, voxel.z, plane)[voxel.at]
                        : A(0);
  MindBounds<A> bounds{};
  if (a.task != MindTask::variance) bounds = mind_bounds<A>(a.mean[image][n]);
  double sum = 0;
  mind_at_voxel<T>(a, voxel, d, bounds, other, sum);
  if (!a.sums) return;
  FASTREG_SHARED(double, scratch, 2 * kMindVoxels / 32);
  sum = a.images() == 2 ? block_sum<2 * kMindVoxels>(sum, scratch) : block_sum<kMindVoxels>(sum, scratch);
  if (threadIdx.x == 0) a.sums[n * a.sums_stride + a.sums_first + blockIdx.x % blocks] = sum;
}

// What each voxel passes to its neighbours: a thread a value of (n, direction, z, y, x), for all image
// channels.
template <class T>
__global__ void __launch_bounds__(kPassThreads)
    mind_spread_kernel(const __grid_constant__ MindArgs a, int image, MindRing in, arithmetic_t<T> scale) {
  using A = arithmetic_t<T>;
  const int64_t plane = a.plane(), i = int64_t(blockIdx.x) * kPassThreads + threadIdx.x, rest = i / plane;
  const int64_t at = i % plane, planes = a.end - a.begin, maps = rest / planes, n = maps / a.n_directions;
  const int place[3] = {a.begin + int(rest % planes), int(at / a.size[2]), int(at % a.size[2])};
  const int direction = int(maps % a.n_directions), wanted = 1 + 2 * a.axis(direction) + direction % 2;
  if (n >= a.n) return;
  const auto sample = [&](const T* from, int towards) {
    int p[3] = {place[0], place[1], place[2]};
    for (int axis = 0; axis < 3; ++axis)
      if (towards && (towards - 1) / 2 == axis)
        p[axis] = clamp_index(p[axis] + (towards % 2 ? -a.dilation[axis] : a.dilation[axis]), a.size[axis]);
    return load(from[p[0] * plane + int64_t(p[1]) * a.size[2] + p[2]]);
  };
  for (int64_t c = 0; c < a.c; ++c) {
    const T* from = static_cast<const T*>(a.image[image]) + (n * a.c + c) * a.size[0] * plane;
    A sum = 0;
    for (int k = 0; k < a.n_channels; ++k) {
      const bool first = a.pairs.a[k] == wanted;
      if (!first && a.pairs.b[k] != wanted) continue;
      const A b = 2 * scale * ring_plane<A>(in, n * a.n_channels + k, place[0], plane)[at];
      const A v = b * (sample(from, a.pairs.a[k]) - sample(from, a.pairs.b[k]));
      sum += first ? v : -v;
    }
    ring_plane<A>(a.spread[image], (n * a.c + c) * a.n_directions + direction, place[0], plane)[at] = sum;
  }
}

inline dim3 mind_pass_grid(const MindArgs& a, int64_t maps) {
  return dim3(unsigned((a.n * maps * (a.end - a.begin) * a.plane() + kPassThreads - 1) / kPassThreads));
}

inline double mind_patch_scale(const MindArgs& a) {
  double scale = 1;
  for (int radius : a.radius) scale /= a.box ? 2.0 * radius + 1 : 1;
  return scale;
}

inline void mind_weights_table(Stored type, const MindArgs& a, void* table, cudaStream_t stream) {
  with_type(type, [&]<class T>() {
    using A = arithmetic_t<T>;
    launch(mind_weights_kernel<A>, 1, 32, 0, stream, a.radius[2], a.box, a.sigma, static_cast<A*>(table));
  });
}

// Windows along the axes from `first` on, between `in` and `spare`; where they end up.
template <class A>
MindRing mind_windows(const MindArgs& a, int first, bool transposed, MindRing in, MindRing spare,
                      cudaStream_t stream) {
  for (int axis = first; axis < 3; ++axis)
    if (a.radius[axis]) {
      launch(mind_window_kernel<A>, mind_pass_grid(a, a.n_channels), kPassThreads, 0, stream, a, axis,
             transposed, in, spare);
      std::swap(in, spare);
    }
  return in;
}

inline int64_t mind_generic_sums(const MindArgs& a) {
  return ((a.end - a.begin) * a.plane() + kMindVoxels - 1) / kMindVoxels;
}

inline void mind_generic(Stored type, const MindArgs& args, cudaStream_t stream) {
  with_type(type, [&]<class T>() {
    using A = arithmetic_t<T>;
    MindArgs a = args;
    MindRing spare = a.window[2];
    for (int image = 0; image < a.images(); ++image) {
      const MindRing out = a.window[image];
      launch(mind_squares_kernel<T>, mind_pass_grid(a, a.n_channels), kPassThreads, 0, stream, a, image, out);
      a.window[image] = mind_windows<A>(a, 1, false, out, spare, stream);
      if (a.window[image].data == spare.data) spare = out;
    }
    const unsigned blocks = unsigned(mind_generic_sums(a));
    const auto voxels = [&]<int kChannels>() {
      const size_t shared = a.images() == 2 ? 2 * kChannels * kMindVoxels * sizeof(A) : 0;
      launch(mind_voxel_kernel<T, kChannels>, dim3(unsigned(blocks * a.n)), a.images() * kMindVoxels, shared,
             stream, a, blocks, A(mind_patch_scale(a)));
    };
    if (a.n_channels == 12) voxels.template operator()<12>();
    if (a.n_channels == 6) voxels.template operator()<6>();
    if (a.n_channels == 4) voxels.template operator()<4>();
  });
}

// From the ring a.adjoint to a.spread.
inline void mind_generic_adjoint(Stored type, const MindArgs& a, int image, cudaStream_t stream) {
  with_type(type, [&]<class T>() {
    using A = arithmetic_t<T>;
    MindRing in = a.adjoint[image];
    if (a.radius[0]) {
      launch(mind_window_kernel<A>, mind_pass_grid(a, a.n_channels), kPassThreads, 0, stream, a, 0, true, in,
             a.window[0]);
      in = mind_windows<A>(a, 1, true, a.window[0], a.window[2], stream);
    }
    launch(mind_spread_kernel<T>, mind_pass_grid(a, a.n_directions), kPassThreads, 0, stream, a, image, in,
           A(mind_patch_scale(a)));
  });
}

}  // namespace fastreg
