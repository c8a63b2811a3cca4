#pragma once
// LCC of fp64 images, and of windows that outgrow shared memory: any size. fp64 sums, axis by axis through
// global memory, one thread an output.
#include <algorithm>

#include "cuda/lcc_args.cuh"

namespace fastreg {

// Along one axis; see LccTapList. `length` taps are listed, `radius` of them reach beyond the centre inside
// the image.
struct LccAxis {
  const double *tap, *tail;
  int64_t size, length, radius;
  double total;

  __device__ double outside(int64_t i) const {
    return tail[i + 1 < length ? i + 1 : length] + tail[size - i < length ? size - i : length];
  }
};

// The march: per chunk of planes the moments summed along z straight from the images, then along y and x;
// windows and their adjoint maps, summed along x and y into a ring of planes; then the gradient of the planes
// whose windows are done. Bytes per voxel at w taps an axis, one gradient: 10 w images + 160 w moments + 96 w
// adjoints from L1 and L2, 24 w adjoints from L2 or memory. At 256^3, w = 21: 100 GB, 20 ms at L2's 5 TB/s.
// Arithmetic: some 32 w fp64 operations, 11 GFLOP, 0.4 ms. Memory: 2 x 5 planes of a chunk and 3 (both
// gradients: 5) of the ring, fp64.
struct LccSeparable {
  LccArgs a;
  LccAxis axis[3];
  double* reference;   // (nc, 2): what the samples of a channel are shifted by
  double* moments[2];  // (group, planes, moments or adjoints, H, W)
  double* adjoints;    // (group, ring, adjoints, H, W)
  int64_t planes, ring, blocks;
  int n_moments, n_adjoints;
  int64_t channel, begin, end;  // of this launch: its first channel, its planes
};

constexpr int kLccThreads = 256;
constexpr int kLccList = 256;  // taps that fit a launch

struct LccTapChunk {
  double value[kLccList];
};

// The host's taps reach the device as arguments, so that a CUDA graph holds them.
__global__ void lcc_taps_kernel(LccTapChunk chunk, double* out, int count) {
  if (int(threadIdx.x) < count) out[threadIdx.x] = chunk.value[threadIdx.x];
}

// Mean of some 4096 samples spread over the channel or, where the mask leaves none of them, of all. Samples
// that are not finite do not count. A block a channel.
template <class T>
__global__ void __launch_bounds__(kLccThreads) lcc_reference_kernel(LccSeparable s) {
  using A = arithmetic_t<T>;
  const int64_t nc = blockIdx.x, voxels = s.a.D * s.a.H * s.a.W;
  const T* image[2] = {static_cast<const T*>(s.a.fixed) + nc * voxels,
                       static_cast<const T*>(s.a.moved) + nc * voxels};
  const A* mask = s.a.mask ? static_cast<const A*>(s.a.mask) + nc / s.a.c * voxels : nullptr;
  FASTREG_SHARED(double, scratch, kLccThreads / 32);
  for (int k = 0; k < 2; ++k) {
    // An odd step meets every residue of a power of two.
    for (int64_t step = (voxels / 4096) | 1;; step = 1) {
      double sum = 0, count = 0;
      for (int64_t i = threadIdx.x * step; i < voxels; i += kLccThreads * step) {
        const double x = load(image[k][i]);
        if (x - x == 0.0 && (!mask || mask[i] != A(0))) sum += x, count += 1;
      }
      const bool found = __syncthreads_or(count > 0);
      sum = block_sum<kLccThreads>(sum, scratch);
      __syncthreads();
      count = block_sum<kLccThreads>(count, scratch);
      __syncthreads();
      if (threadIdx.x == 0) s.reference[2 * nc + k] = found ? sum / count : 0.0;
      if (found || step == 1) break;
    }
  }
}

// Moments of the samples of a column around plane z. What the mask hides is not looked at, not even a NaN.
template <class T>
__global__ void __launch_bounds__(kLccThreads) lcc_moments_kernel(LccSeparable s) {
  using A = arithmetic_t<T>;
  const int64_t plane = s.a.H * s.a.W, at = int64_t(blockIdx.x) * kLccThreads + threadIdx.x;
  if (at >= plane) return;
  const int64_t nc = s.channel + blockIdx.z, z = s.begin + blockIdx.y, volume = s.a.D * plane;
  const T *fixed = static_cast<const T*>(s.a.fixed) + nc * volume + at,
          *moved = static_cast<const T*>(s.a.moved) + nc * volume + at;
  const A* mask = s.a.mask ? static_cast<const A*>(s.a.mask) + nc / s.a.c * volume + at : nullptr;
  const double shift_f = s.reference[2 * nc], shift_m = s.reference[2 * nc + 1];
  const LccAxis& axis = s.axis[0];
  double sum[kLccMoments + 1] = {};
  for (int64_t k = max(z - axis.radius, int64_t(0)); k <= min(z + axis.radius, s.a.D - 1); ++k) {
    double weight = axis.tap[k < z ? z - k : k - z];
    if (mask) {
      if (mask[k * plane] == A(0)) continue;
      weight *= double(mask[k * plane]);
    }
    const double f = double(load(fixed[k * plane])) - shift_f, m = double(load(moved[k * plane])) - shift_m;
    sum[0] += weight * f, sum[1] += weight * m;
    sum[2] += weight * f * f, sum[3] += weight * m * m, sum[4] += weight * f * m, sum[5] += weight;
  }
  double* out = s.moments[0] + (blockIdx.z * s.planes + blockIdx.y) * s.n_moments * plane + at;
#pragma unroll
  for (int k = 0; k < kLccMoments + 1; ++k)
    if (k < s.n_moments) out[k * plane] = sum[k];
}

// Sums along an axis of planes, `step` elements between neighbours, of `maps` maps. Plane p of a channel is
// the p-th of its `in_planes` and goes to slot (first + p) % out_planes.
__global__ void __launch_bounds__(kLccThreads)
    lcc_sum_kernel(const double* in, double* out, LccAxis axis, int64_t step, int64_t plane, int maps,
                   int64_t in_planes, int64_t out_planes, int64_t first) {
  const int64_t at = int64_t(blockIdx.x) * kLccThreads + threadIdx.x;
  if (at >= plane) return;
  const int64_t i = at / step % axis.size;
  in += (blockIdx.z * in_planes + blockIdx.y) * maps * plane + at;
  out += (blockIdx.z * out_planes + (first + blockIdx.y) % out_planes) * maps * plane + at;
  const int64_t low = max(-axis.radius, -i), high = min(axis.radius, axis.size - 1 - i);
  for (int map = 0; map < maps; ++map, in += plane, out += plane) {
    double sum = 0;
    for (int64_t k = low; k <= high; ++k) sum += axis.tap[k < 0 ? -k : k] * in[k * step];
    *out = sum;
  }
}

// Windows of a plane from their sums: the loss, the map, the adjoint maps.
template <class A>
__global__ void __launch_bounds__(kLccThreads) lcc_plane_kernel(LccSeparable s) {
  const int64_t plane = s.a.H * s.a.W, at = int64_t(blockIdx.x) * kLccThreads + threadIdx.x;
  const int64_t nc = s.channel + blockIdx.z, z = s.begin + blockIdx.y,
                slot = blockIdx.z * s.planes + blockIdx.y;
  const int64_t volume = s.a.D * plane, here = nc * volume + z * plane + at,
                shared = nc / s.a.c * volume + z * plane + at;
  double loss = 0;
  if (at < plane) {
    const double* sum = s.moments[0] + slot * s.n_moments * plane + at;
    const double outside[3] = {s.axis[0].outside(z), s.axis[1].outside(at / s.a.W),
                               s.axis[2].outside(at % s.a.W)};
    const double inside_z = s.axis[0].total - outside[0],
                 inside_zy = inside_z * (s.axis[1].total - outside[1]);
    // Sums of positive terms: exactly 0 where nothing is outside.
    const double beyond =
        (outside[0] * s.axis[1].total + inside_z * outside[1]) * s.axis[2].total + inside_zy * outside[2];
    const double inside = s.a.mask ? sum[kLccMoments * plane] : inside_zy * (s.axis[2].total - outside[2]);
    const LccSums<double> sums{sum[0], sum[plane], sum[2 * plane], sum[3 * plane], sum[4 * plane]};
    const auto w = lcc_window(sums, inside, s.a.valid ? 0.0 : beyond, s.reference[2 * nc],
                              s.reference[2 * nc + 1], s.a.least, s.a.denominator, s.a.squared, s.a.rule);
    const double value = w.finite ? w.value : double(NAN);
    const double weight = s.a.mask ? double(static_cast<const A*>(s.a.mask)[shared]) : 1.0;
    loss = weight == 0.0 ? 0.0 : -weight * value;
    if (s.a.map) static_cast<A*>(s.a.map)[here] = A(-value / double(s.a.c));
    if (s.n_adjoints) {
      const auto d = lcc_adjoints_of(w, double(lcc_upstream<A>(s.a, shared)));
      double* out = s.moments[1] + slot * s.n_adjoints * plane + at;
      *out = d.e;
      for (int k = 0; k < 2; ++k)
        if (k == 0 ? s.a.grad_fixed : s.a.grad_moved) {
          out[plane] = d.own[k], out[2 * plane] = d.mean[k];
          out += 2 * plane;
        }
    }
  }
  FASTREG_SHARED(double, scratch, kLccThreads / 32);
  loss = block_sum<kLccThreads>(loss, scratch);
  if (threadIdx.x == 0) s.a.partial[(nc * s.a.D + z) * s.blocks + blockIdx.x] = loss;
}

// Gradient of planes whose windows are done: adjoint maps summed along z, combined with the images.
template <class T>
__global__ void __launch_bounds__(kLccThreads) lcc_gradient_plane_kernel(LccSeparable s) {
  using A = arithmetic_t<T>;
  const int64_t plane = s.a.H * s.a.W, at = int64_t(blockIdx.x) * kLccThreads + threadIdx.x;
  if (at >= plane) return;
  const int64_t nc = s.channel + blockIdx.z, volume = s.a.D * plane;
  const LccAxis& axis = s.axis[0];
  for (int64_t z = s.begin + blockIdx.y; z < s.end; z += gridDim.y) {
    double sum[5] = {};
    for (int64_t k = max(z - axis.radius, int64_t(0)); k <= min(z + axis.radius, s.a.D - 1); ++k) {
      const double weight = axis.tap[k < z ? z - k : k - z];
      const double* in = s.adjoints + (blockIdx.z * s.ring + k % s.ring) * s.n_adjoints * plane + at;
#pragma unroll
      for (int map = 0; map < 5; ++map)
        if (map < s.n_adjoints) sum[map] += weight * in[map * plane];
    }
    const int64_t here = nc * volume + z * plane + at;
    const A weight = s.a.mask ? static_cast<const A*>(s.a.mask)[nc / s.a.c * volume + z * plane + at] : A(1);
    const double f = double(load(static_cast<const T*>(s.a.fixed)[here])) - s.reference[2 * nc];
    const double m = double(load(static_cast<const T*>(s.a.moved)[here])) - s.reference[2 * nc + 1];
    const auto write = [&](void* out, double g) {
      static_cast<A*>(out)[here] = weight == A(0) ? A(0) : A(g * double(weight));
    };
    if (s.a.grad_fixed) write(s.a.grad_fixed, lcc_gradient(f, m, sum[1], sum[0], sum[2]));
    if (s.a.grad_moved)
      write(s.a.grad_moved, s.a.grad_fixed ? lcc_gradient(m, f, sum[3], sum[0], sum[4])
                                           : lcc_gradient(m, f, sum[1], sum[0], sum[2]));
  }
}

inline int64_t lcc_separable_list(const LccTapList& taps) { return 2 * int64_t(taps.tap.size()) + 4; }

// Voxels that fill the device.
#ifdef FASTREG_EMULATION
constexpr int64_t kLccVoxels = 1 << 10;  // small images then march too
#else
constexpr int64_t kLccVoxels = 1 << 20;
#endif

inline LccPlan lcc_separable_plan(const LccArgs& a, const LccTapList& taps) {
  const int64_t plane = a.H * a.W, blocks = (plane + kLccThreads - 1) / kLccThreads, maps = lcc_adjoints(a);
  LccPlan p{};
  p.planes = std::min<int64_t>(std::clamp<int64_t>(kLccVoxels / plane, 4, 64), a.D);
  p.group =
      p.planes < a.D ? 1 : std::clamp<int64_t>(kLccVoxels / (a.D * plane), 1, std::min<int64_t>(a.nc, 65535));
  const int64_t radius = a.flat ? 0 : std::min<int64_t>(taps.tap.size(), a.D) - 1;
  p.ring = maps ? std::min(p.planes + 2 * radius, a.D) : 0;
  p.parts = a.D * blocks;
  const int64_t widest = std::max<int64_t>(lcc_moments(a), maps);
  p.scratch = int64_t(sizeof(double)) * (p.group * plane * (2 * p.planes * widest + p.ring * maps) +
                                         2 * a.nc + lcc_separable_list(taps));
  return p;
}

inline void lcc_separable(const LccArgs& a, const LccPlan& p, const LccTapList& taps, void* scratch,
                          cudaStream_t stream) {
  const int64_t plane = a.H * a.W, length = int64_t(taps.tap.size());
  LccSeparable s{};
  s.a = a, s.a.rule.tau = 0x1p-42;
  s.n_moments = lcc_moments(a), s.n_adjoints = lcc_adjoints(a);
  s.planes = p.planes, s.ring = p.ring, s.blocks = p.parts / a.D;
  const int64_t buffer = p.group * p.planes * std::max(s.n_moments, s.n_adjoints) * plane;
  auto* memory = static_cast<double*>(scratch);
  s.moments[0] = memory, s.moments[1] = memory + buffer, s.adjoints = memory + 2 * buffer;
  s.reference = s.adjoints + p.group * p.ring * s.n_adjoints * plane;
  double* list = s.reference + 2 * a.nc;

  // The taps, their tails, and those of an axis that is absent.
  std::vector<double> values(taps.tap);
  values.insert(values.end(), taps.tail.begin(), taps.tail.end());
  values.insert(values.end(), {1.0, 1.0, 0.0});
  for (size_t at = 0; at < values.size(); at += kLccList) {
    LccTapChunk chunk{};
    const int count = int(std::min<size_t>(values.size() - at, kLccList));
    std::copy_n(values.begin() + at, count, chunk.value);
    launch(lcc_taps_kernel, 1, kLccList, 0, stream, chunk, list + at, count);
  }
  const int64_t size[3] = {a.D, a.H, a.W};
  for (int k = 0; k < 3; ++k)
    s.axis[k] = {list, list + length, size[k], length, std::min(length, size[k]) - 1, taps.total};
  if (a.flat) s.axis[0] = {list + 2 * length + 1, list + 2 * length + 2, 1, 1, 0, 1.0};

  with_type(a.type, [&]<class T>() {
    using A = arithmetic_t<T>;
    launch(lcc_reference_kernel<T>, dim3(unsigned(a.nc)), kLccThreads, 0, stream, s);
    for (s.channel = 0; s.channel < a.nc; s.channel += p.group) {
      const unsigned channels = unsigned(std::min(p.group, a.nc - s.channel));
      for (int64_t z = 0, done = 0; z < a.D; z += p.planes) {
        const int64_t end = std::min(z + p.planes, a.D),
                      last = end == a.D ? a.D : std::max(end - s.axis[0].radius, done);
        const dim3 grid(unsigned(s.blocks), unsigned(end - z), channels);
        const auto sum = [&](const double* in, double* out, int axis, int maps, int64_t out_planes,
                             int64_t first) {
          launch(lcc_sum_kernel, grid, kLccThreads, 0, stream, in, out, s.axis[axis], axis == 1 ? a.W : 1,
                 plane, maps, s.planes, out_planes, first);
        };
        s.begin = z, s.end = end;
        launch(lcc_moments_kernel<T>, grid, kLccThreads, 0, stream, s);
        sum(s.moments[0], s.moments[1], 1, s.n_moments, s.planes, 0);
        sum(s.moments[1], s.moments[0], 2, s.n_moments, s.planes, 0);
        launch(lcc_plane_kernel<A>, grid, kLccThreads, 0, stream, s);
        if (!s.n_adjoints) continue;
        sum(s.moments[1], s.moments[0], 2, s.n_adjoints, s.planes, 0);
        sum(s.moments[0], s.adjoints, 1, s.n_adjoints, s.ring, z);
        s.begin = done, s.end = last, done = last;
        const dim3 planes(unsigned(s.blocks), unsigned(std::min<int64_t>(s.end - s.begin, 65535)), channels);
        launch(lcc_gradient_plane_kernel<T>, planes, kLccThreads, 0, stream, s);
      }
    }
  });
}

}  // namespace fastreg
