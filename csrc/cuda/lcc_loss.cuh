#pragma once
// Which kernels a window takes, and the march of windows and gradients along a channel.
#include "cuda/lcc_gradient.cuh"
#include "cuda/lcc_separable.cuh"
#include "cuda/lcc_windows.cuh"

namespace fastreg {

// fp64 images, windows beyond kLccReach and planes or channels beyond 32-bit indices take the separable path.
inline bool lcc_fits_tile(const LccArgs& a, const LccTapList& taps) {
  return a.type != Stored::f64 && int64_t(taps.tap.size()) <= kLccReach + 1 && a.H * a.W < INT32_MAX / 2 &&
         a.D < INT32_MAX / 2;
}

inline int64_t lcc_tiles(const LccArgs& a) {
  return ((a.H + kLccTile - 1) / kLccTile) * ((a.W + kLccTile - 1) / kLccTile);
}

// Planes of a segment: even, for planes enter in pairs.
inline int64_t lcc_segment(const LccArgs& a) {
  const int64_t segments = (a.D + kLccSegment - 1) / kLccSegment;
  return ((a.D + segments - 1) / segments + 1) / 2 * 2;
}

// Blocks of a launch: three at a time on each of an H100's 132 multiprocessors, twice.
#ifdef FASTREG_EMULATION
constexpr int64_t kLccBlocks = 4;  // small images then march too
#else
constexpr int64_t kLccBlocks = 768;
#endif

// With gradients no more planes at a time than make kLccBlocks blocks: their adjoint maps need little memory,
// and meet the gradient while L2 still holds some of them.
inline LccPlan lcc_plan(const LccArgs& a, const LccTapList& taps) {
  if (!lcc_fits_tile(a, taps)) return lcc_separable_plan(a, taps);
  const int64_t tiles = lcc_tiles(a), segment = lcc_segment(a), segments = (a.D + segment - 1) / segment;
  const int64_t maps = lcc_adjoints(a), radius = a.flat ? 0 : int64_t(taps.tap.size()) - 1;
  LccPlan p{};
  const int64_t at_once = maps ? std::clamp<int64_t>((kLccBlocks + tiles - 1) / tiles, 1, segments)
                               : std::min<int64_t>(segments, 65535);
  p.planes = at_once * segment;
  p.group = at_once < segments ? 1
                               : std::clamp<int64_t>((kLccBlocks + tiles * segments - 1) / (tiles * segments),
                                                     1, std::min<int64_t>(a.nc, 65535));
  if (!maps) p.group = std::min<int64_t>(a.nc, 65535);
  p.ring = maps ? std::min(p.planes + 2 * radius, a.D) : 0;
  p.parts = segments * tiles;
  p.scratch =
      int64_t(sizeof(float)) * p.group * p.ring * maps * a.H * a.W + int64_t(sizeof(float2)) * a.nc * p.parts;
  return p;
}

template <class Shape>
void lcc_launch_windows(const LccTiled& s, dim3 grid, cudaStream_t stream) {
  if (s.a.mask)
    launch(lcc_windows_kernel<Shape, true>, grid, kLccTileThreads, sizeof(float) * Shape::shared_floats(3, 6),
           stream, s);
  else
    launch(lcc_windows_kernel<Shape, false>, grid, kLccTileThreads,
           sizeof(float) * Shape::shared_floats(2, 5), stream, s);
}

template <class Shape>
void lcc_launch_gradient(const LccTiled& s, dim3 grid, cudaStream_t stream) {
  if (s.n_adjoints == 5)
    launch(lcc_gradient_kernel<Shape, 5>, grid, kLccTileThreads, sizeof(float) * Shape::shared_floats(5, 5),
           stream, s);
  else
    launch(lcc_gradient_kernel<Shape, 3>, grid, kLccTileThreads, sizeof(float) * Shape::shared_floats(3, 3),
           stream, s);
}

// Calls f.template operator()<Shape>().
template <class F>
void lcc_with_shape(const LccTiled& s, F f) {
  switch (s.box ? s.radius : 0) {
    case 1:
      return f.template operator()<LccShape<1, false>>();
    case 2:
      return f.template operator()<LccShape<2, false>>();
    case 3:
      return f.template operator()<LccShape<3, false>>();
    case 4:
      return f.template operator()<LccShape<4, false>>();
    case kLccUnrolled:
      return f.template operator()<LccShape<kLccUnrolled, false>>();
    default:
      return f.template operator()<LccShape<kLccReach, true>>();
  }
}

inline void lcc_tiled(const LccArgs& a, const LccPlan& p, bool box, const LccTapList& taps, void* scratch,
                      cudaStream_t stream) {
  LccTiled s{};
  s.a = a, s.a.rule.tau = 0x1p-18;
  std::copy(taps.tap.begin(), taps.tap.end(), s.tap);
  std::copy(taps.tail.begin(), taps.tail.end(), s.tail);
  s.total = float(taps.total), s.radius = int(taps.tap.size()) - 1, s.radius_z = a.flat ? 0 : s.radius,
  s.box = box;
  s.tiles_x = int((a.W + kLccTile - 1) / kLccTile), s.tiles = int(lcc_tiles(a));
  s.segment = int(lcc_segment(a)), s.segments = int((a.D + s.segment - 1) / s.segment);
  s.ring = int(p.ring), s.n_adjoints = lcc_adjoints(a);
  s.reference = static_cast<float2*>(scratch);
  s.adjoints = reinterpret_cast<float*>(s.reference + a.nc * p.parts);
  for (s.channel = 0; s.channel < a.nc; s.channel += p.group) {
    const unsigned channels = unsigned(std::min(p.group, a.nc - s.channel));
    for (int64_t z = 0, done = 0; z < a.D; z += p.planes) {
      const int64_t end = std::min(z + p.planes, a.D);
      s.first = int(z / s.segment), s.last = int((end + s.segment - 1) / s.segment);
      const dim3 windows(unsigned(s.tiles), unsigned(s.last - s.first), channels);
      lcc_with_shape(s, [&]<class Shape>() { lcc_launch_windows<Shape>(s, windows, stream); });
      if (!s.n_adjoints) continue;
      s.first = int(done), s.last = int(end == a.D ? a.D : std::max<int64_t>(end - s.radius_z, done));
      done = s.last;
      const dim3 planes(unsigned(s.tiles), unsigned((s.last - s.first + kLccSegment - 1) / kLccSegment),
                        channels);
      lcc_with_shape(s, [&]<class Shape>() { lcc_launch_gradient<Shape>(s, planes, stream); });
    }
  }
}

inline void lcc(const LccArgs& a, const LccPlan& p, Window kind, const LccTapList& taps, void* scratch,
                cudaStream_t stream) {
  if (lcc_fits_tile(a, taps))
    lcc_tiled(a, p, kind == Window::box, taps, scratch, stream);
  else
    lcc_separable(a, p, taps, scratch, stream);
}

}  // namespace fastreg
