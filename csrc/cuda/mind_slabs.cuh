#pragma once
// MIND slab by slab: sizes of the slabs and of what lies between kernels, and the order of launches.
#include "cuda/mind_generic.cuh"
#include "cuda/mind_tile.cuh"

namespace fastreg {

// Scratch memory of a call: some volumes of its images, or what is small on any GPU.
constexpr double kMindVolumes = 2.8;
#ifdef FASTREG_EMULATION
constexpr int64_t kMindSmall = 0;  // tests are to see slabs
#else
constexpr int64_t kMindSmall = 12 << 20;  // elements
#endif

// Sets slabs, rings and strides of a call; returns the elements of scratch memory it wants.
inline int64_t mind_plan(MindArgs& a) {
  const int64_t depth = a.size[0], radius = a.radius[0], step = a.dilation[0], plane = a.n * a.plane();
  const int gradients = (a.grad[0] != nullptr) + (a.grad[1] != nullptr);
  const int windows = mind_has_tiles(a) ? 0 : a.images() + 1;
  const auto elements = [&](int64_t slab) {
    for (MindRing& r : a.adjoint) r.planes = int(std::min(depth, slab + 2 * radius));
    for (MindRing& r : a.spread) r.planes = int(std::min(depth, slab + radius + 2 * step));
    for (MindRing& r : a.window) r.planes = int(std::min(depth, slab + radius));
    return plane *
           (gradients * (a.n_channels * a.adjoint[0].planes + a.c * a.n_directions * a.spread[0].planes) +
            windows * a.n_channels * a.window[0].planes);
  };
  const int64_t most = std::max(kMindSmall, int64_t(kMindVolumes * double(a.c * depth * plane)));
  int64_t slab = depth;
  while (slab > 8 && elements(slab) > most) slab -= (slab + 15) / 16;
  a.slab = int(slab), a.begin = 0, a.end = a.slab;
  const int64_t sums = mind_has_tiles(a) ? mind_tile_sums(a) : mind_generic_sums(a);
  a.sums_stride = sums * ((depth + slab - 1) / slab);
  return elements(slab);
}

// Lays the rings out in `scratch`, of the elements mind_plan returned, each of `size` bytes.
inline void mind_place(MindArgs& a, void* scratch, int64_t size) {
  char* next = static_cast<char*>(scratch);
  const auto place = [&](MindRing& ring, int64_t maps) {
    ring.data = next;
    next += a.n * maps * ring.planes * a.plane() * size;
  };
  for (int image = 0; image < 2; ++image)
    if (a.grad[image]) {
      place(a.adjoint[image], a.n_channels);
      place(a.spread[image], a.c * a.n_directions);
    }
  if (mind_has_tiles(a)) return;
  place(a.window[0], a.n_channels), place(a.window[2], a.n_channels);
  if (a.images() == 2) place(a.window[1], a.n_channels);
}

// Distances and their task over the volume; gradients follow a slab as soon as the planes they need are
// there: windows reach `radius` planes further, offsets `dilation` planes.
inline void mind_run(Stored type, MindArgs a, cudaStream_t stream) {
  const bool tiles = mind_has_tiles(a);
  const int depth = a.size[0];
  int adjoint_from = 0, gather_from = 0;
  for (int begin = 0; begin < depth; begin += a.slab) {
    a.begin = begin, a.end = std::min(begin + a.slab, depth);
    tiles ? mind_tile(type, a, stream) : mind_generic(type, a, stream);
    a.sums_first += a.sums_stride / ((depth + a.slab - 1) / a.slab);
    const bool last = a.end == depth;
    const int adjoint_to = last ? depth : std::max(adjoint_from, a.end - a.radius[0]);
    const int gather_to = last ? depth : std::max(gather_from, adjoint_to - a.dilation[0]);
    for (int image = 0; image < 2; ++image)
      if (a.grad[image]) {
        MindArgs back = a;
        back.begin = adjoint_from, back.end = adjoint_to;
        tiles ? mind_tile_adjoint(type, back, image, stream)
              : mind_generic_adjoint(type, back, image, stream);
        back.begin = gather_from, back.end = gather_to;
        mind_gather(back, image, stream);
      }
    adjoint_from = adjoint_to, gather_from = gather_to;
  }
}

inline void mind_mean(const MindArgs& a, double* mean, cudaStream_t stream) {
  launch(mind_mean_kernel, dim3(unsigned(a.n)), kMeanThreads, 0, stream, a.sums, a.sums_stride,
         double(a.size[0] * a.plane()), mean);
}

}  // namespace fastreg
