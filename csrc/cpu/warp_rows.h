#pragma once
// Rows of a warp: what a block of voxels of one row reads, shared by the ops that sample at p + u(p).
#include "common/scalar.h"
#include "common/warp.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice whose displacement has no z component.
struct WarpArgs {
  const void* image;         // (n, c, *in)
  const void* displacement;  // (n, nd, *out), arithmetic type; null with an affine: zero
  const double* affine;      // (n, nd, nd + 1) less the identity, NaN throughout where not finite; or null
  const void* grad;          // (n, c, *out), backward only
  void* result;              // forward: (n, c, *out); backward: (n, nd, *out), arithmetic type, or null
  void* image_grad;          // backward: (n, c, *in), arithmetic type, zeros at first; or null
  double* affine_sums;       // per row and axis: of the position gradient, and of it times x; or null
  int64_t n, c;
  int64_t in[3], out[3];  // D, H, W of the image and of the displacement
  Padding padding;
  bool nearest;
  bool compose;  // the image is a displacement too, and the displacement is added to what it reads
};

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Voxels of a row whose positions are computed together (vectorised) before they are read.
constexpr int kBlock = 64;

template <class A, int ND>
struct Positions {
  alignas(64) int32_t whole[ND][kBlock];  // index of the lower corner per axis
  alignas(64) A fraction[ND][kBlock];
  alignas(64) int64_t offset[kBlock];  // of the lower corner in its volume, where inside
  alignas(64) int32_t inside[kBlock];  // all 2^ND corners are voxels of the image and of planes [lo, hi)
};

struct Row {
  int64_t n, z, y;
};

[[maybe_unused]] Row row_at(const WarpArgs& a, int64_t index) {
  int64_t plane = index / a.out[1];
  return {plane / a.out[0], plane % a.out[0], index % a.out[1]};
}

// Displacement of axis k at `count` voxels of a row from x0 on, affine part included: in fp64, so that what a
// matrix near the identity adds keeps its digits across a volume.
template <class A, int ND>
void add_affine(const WarpArgs& a, const Row& row, int k, int64_t x0, int count, double* __restrict d) {
  const double* m = a.affine + (row.n * ND + k) * (ND + 1);
  double start = m[ND] + m[ND - 2] * double(row.y);
  if (ND == 3) start += m[0] * double(row.z);
  const double slope = m[ND - 1];
  const int32_t from = int32_t(x0);
  for (int i = 0; i < count; ++i) d[i] = start + slope * double(from + i);
  if (!a.displacement) return;
  const A* __restrict u = static_cast<const A*>(a.displacement) +
                          ((row.n * ND + k) * a.out[0] + row.z) * a.out[1] * a.out[2] + row.y * a.out[2] + x0;
  for (int i = 0; i < count; ++i) d[i] += double(u[i]);
}

// Index and fraction along one axis from displacements in S; the voxels lie at from, from + step, ...
template <class S, class A>
void split_line(const S* __restrict u, bool nearest, int count, int32_t from, int32_t step, int32_t first,
                uint32_t span, int32_t* __restrict whole, A* __restrict fraction,
                int32_t* __restrict inside) {
  alignas(64) S rounded[kBlock];
  if (nearest)
    for (int i = 0; i < count; ++i) rounded[i] = std::nearbyint(u[i]);
  const S* __restrict source = nearest ? rounded : u;
  for (int i = 0; i < count; ++i) split(source[i], whole[i], fraction[i]);
  for (int i = 0; i < count; ++i) {
    whole[i] += from + step * i;
    inside[i] &= -int32_t((uint32_t(whole[i] - first) < span) & (fraction[i] == fraction[i]));
  }
}

// The `count` voxels of `row` from x0 on, whose displacements along axis k visit(k, use) hands to
// use(values). [lo, hi) bounds the slowest axis.
template <class A, int ND, class Visit>
void locate_at(const WarpArgs& a, const Row& row, int64_t x0, int count, int64_t lo, int64_t hi,
               Positions<A, ND>& p, Visit visit) {
  const int32_t start[3] = {int32_t(row.z), int32_t(row.y), int32_t(x0)};
  int32_t* __restrict inside = p.inside;
  for (int i = 0; i < count; ++i) inside[i] = -1;
  for (int k = 0; k < ND; ++k) {
    const int axis = k + 3 - ND;
    const int32_t step = axis == 2 ? 1 : 0, first = k == 0 ? int32_t(lo) : 0;
    const uint32_t span = uint32_t(std::max<int64_t>((k == 0 ? hi - lo : a.in[axis]) - 1, 0));
    visit(k, [&](const auto* u) {
      split_line(u, a.nearest, count, start[axis], step, first, span, p.whole[k], p.fraction[k], inside);
    });
  }
  const uint32_t plane = uint32_t(a.in[1] * a.in[2]), line = uint32_t(a.in[2]);
  for (int i = 0; i < count; ++i) {
    int64_t offset = uint32_t(p.whole[ND - 1][i]) + int64_t(uint64_t(uint32_t(p.whole[ND - 2][i])) * line);
    if (ND == 3) offset += int64_t(uint64_t(uint32_t(p.whole[0][i])) * plane);
    // Where outside, the first voxel is fetched in its stead and not used.
    p.offset[i] = offset & int64_t(inside[i]);
  }
}

template <class A, int ND>
void locate(const WarpArgs& a, const Row& row, int64_t x0, int count, int64_t lo, int64_t hi,
            Positions<A, ND>& p) {
  locate_at(a, row, x0, count, lo, hi, p, [&](int k, auto use) {
    if (a.affine) {
      alignas(64) double d[kBlock];
      add_affine<A, ND>(a, row, k, x0, count, d);
      use(d);
    } else {
      const A* u = static_cast<const A*>(a.displacement) +
                   (((row.n * ND + k) * a.out[0] + row.z) * a.out[1] + row.y) * a.out[2] + x0;
      ask(u + a.out[2], count);
      use(u);
    }
  });
}

// Asks for the corners of the cells one row on that no row before this one has read; `width` numbers a voxel.
template <bool write = false, int width = 1, class A, int ND, class T>
void ask_ahead(const WarpArgs& a, const Positions<A, ND>& p, int count, const T* volume) {
  const int64_t line = 2 * a.in[2] * width, plane = a.in[1] * a.in[2] * width;
  for (int i = 0; i < count; i += 2) {
    const T* cell = volume + p.offset[i] * width;
    __builtin_prefetch(cell + line, write);
    if (ND == 3) __builtin_prefetch(cell + line + plane, write);
  }
}

// Lowest and highest plane of the image's slowest axis that voxels of plane `start` touch, displaced along it
// by [low, high].
inline void plane_range(const WarpArgs& a, int nd, int64_t start, double low, double high, int32_t* range) {
  const int64_t last = a.in[3 - nd] - 1;
  const double cap = kFarthest;
  // One plane of slack on both sides for rounding to nearest.
  int64_t lo = start + int64_t(std::floor(std::max(low, -cap))) - 1;
  int64_t hi = start + int64_t(std::floor(std::min(high, cap))) + 2;
  if (a.padding == Padding::border)
    lo = std::clamp<int64_t>(lo, 0, last), hi = std::clamp<int64_t>(hi, 0, last);
  if (a.padding == Padding::reflection && (lo < 0 || hi > last)) lo = 0, hi = last;
  range[0] = int32_t(std::clamp<int64_t>(lo, -1, last + 1));
  range[1] = int32_t(std::clamp<int64_t>(hi, -1, last + 1));
}

template <class A, int ND>
bool is_nan(const Positions<A, ND>& p, int i) {
  bool nan = false;
  for (int k = 0; k < ND; ++k) nan |= p.fraction[k][i] != p.fraction[k][i];
  return nan;
}

// The two corners of a voxel's cell along each axis.
template <class A, int ND>
struct Sides {
  A weight[ND][2];
  int64_t offset[ND][2];  // in the volume; negative where there is no voxel

  Sides(const WarpArgs& a, const Positions<A, ND>& p, int i) {
    int64_t stride = 1;
    for (int k = ND - 1; k >= 0; --k) {
      const int64_t n = a.in[k + 3 - ND];
      for (int upper = 0; upper < 2; ++upper)
        offset[k][upper] = stride * corner_index(int64_t(p.whole[k][i]) + upper, n, a.padding);
      weight[k][0] = A(1) - p.fraction[k][i], weight[k][1] = p.fraction[k][i];
      stride *= n;
    }
  }
};

// The corners of a block, as pairs along x: fetched one by one, interpolated as vectors.
template <class T, int ND>
struct Corners {
  alignas(64) T pair[1 << (ND - 1)][kBlock][2];

  // False where the image is too thin for a cell, so that nothing is inside.
  template <class A>
  bool fetch(const WarpArgs& a, const T* image, const Positions<A, ND>& p, int count) {
    for (int k = 3 - ND; k < 3; ++k)
      if (a.in[k] < 2) return false;
    const int64_t line = a.in[2], plane = a.in[1] * a.in[2];
    ask_ahead(a, p, count, image);
    for (int i = 0; i < count; ++i) {
      const T* v = image + p.offset[i];
      std::memcpy(pair[0][i], v, sizeof pair[0][i]);
      std::memcpy(pair[1][i], v + line, sizeof pair[0][i]);
      if constexpr (ND == 3) {
        std::memcpy(pair[2][i], v + plane, sizeof pair[0][i]);
        std::memcpy(pair[3][i], v + plane + line, sizeof pair[0][i]);
      }
    }
    return true;
  }
};

template <class A>
A lerp(A a, A b, A f) {
  return a + f * (b - a);
}

// Calls visit(corner, weight, offset) for the corners that exist and carry weight. An absent corner is
// skipped rather than multiplied by 0, so a NaN or infinity never reaches a voxel that does not touch it.
template <int ND, class A, class Visit>
void each_corner(const WarpArgs& a, const Positions<A, ND>& p, int i, int64_t lo, int64_t hi, Visit visit) {
  const Sides<A, ND> s(a, p, i);
  const int64_t slice = a.in[2] * (ND == 3 ? a.in[1] : 1), first = lo * slice, end = hi * slice;
  // Weights that are not 0 can have a product that is.
  const auto along_x = [&](int corner, A weight, int64_t offset) {
    for (int x = 0; x < 2; ++x)
      if (s.offset[ND - 1][x] >= 0 && weight * s.weight[ND - 1][x] != A(0))
        visit(corner + x, weight * s.weight[ND - 1][x], offset + s.offset[ND - 1][x]);
  };
  for (int slow = 0; slow < 2; ++slow) {
    const A weight = s.weight[0][slow];
    const int64_t offset = s.offset[0][slow];
    if (offset < first || offset >= end || weight == A(0)) continue;
    if constexpr (ND == 2) {
      along_x(2 * slow, weight, offset);
    } else {
      for (int y = 0; y < 2; ++y)
        if (s.offset[1][y] >= 0) along_x(4 * slow + 2 * y, weight * s.weight[1][y], offset + s.offset[1][y]);
    }
  }
}

// Calls visit(k, weight, lower, upper) for the edges of a cell along axis k: their derivative is weight times
// the difference of the two values, at an offset or, negative, 0. Differences, so that an offset of the image
// costs no digits; none along an axis on which nothing changes: beyond the border, and where u is capped.
template <int ND, class A, class Visit>
void each_edge(const WarpArgs& a, const Positions<A, ND>& p, int i, const int64_t (&at)[3], Visit visit) {
  const Sides<A, ND> s(a, p, i);
  int64_t offset[1 << ND];
  for (int corner = 0; corner < 1 << ND; ++corner) {
    int64_t sum = 0, least = 0;
    for (int k = 0; k < ND; ++k) {
      const int64_t along = s.offset[k][corner >> (ND - 1 - k) & 1];
      sum += along, least = std::min(least, along);
    }
    offset[corner] = least < 0 ? -1 : sum;
  }
  for (int k = 0; k < ND; ++k) {
    if (s.offset[k][0] == s.offset[k][1] || std::abs(p.whole[k][i] - at[k + 3 - ND]) >= kFarthest) continue;
    const int bit = 1 << (ND - 1 - k);
    for (int corner = 0; corner < 1 << ND; ++corner) {
      if (corner & bit) continue;
      A weight = A(1);
      for (int j = 0; j < ND; ++j)
        if (j != k) weight *= s.weight[j][corner >> (ND - 1 - j) & 1];
      if (weight != A(0)) visit(k, weight, offset[corner], offset[corner | bit]);
    }
  }
}

template <int ND, class A, class T>
A interpolate_anywhere(const WarpArgs& a, const T* image, const Positions<A, ND>& p, int i) {
  if (is_nan(p, i)) return A(NAN);
  A sum = A(0);
  each_corner<ND>(a, p, i, 0, a.in[3 - ND],
                  [&](int, A weight, int64_t offset) { sum += weight * load(image[offset]); });
  return sum;
}

// The image at the positions of a block. Inlined: the loop is vectorised for the caller's types.
template <class T, int ND, class A>
inline __attribute__((always_inline)) void interpolate_block(const WarpArgs& a, const T* image,
                                                             const Positions<A, ND>& p, int count,
                                                             Corners<T, ND>& corners, A* value) {
  int32_t all = corners.fetch(a, image, p, count) ? -1 : 0;
  if (all)
    for (int i = 0; i < count; ++i) {
      const A fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
      auto& c = corners.pair;
      const A near = lerp(lerp(load(c[0][i][0]), load(c[0][i][1]), fx),
                          lerp(load(c[1][i][0]), load(c[1][i][1]), fx), fy);
      value[i] = near;
      if constexpr (ND == 3) {
        const A far = lerp(lerp(load(c[2][i][0]), load(c[2][i][1]), fx),
                           lerp(load(c[3][i][0]), load(c[3][i][1]), fx), fy);
        value[i] = lerp(near, far, p.fraction[0][i]);
      }
      // Again where a corner, perhaps one of weight 0, was not finite.
      all &= p.inside[i] & -int32_t(value[i] - value[i] == A(0));
    }
  if (!all)
    for (int i = 0; i < count; ++i)
      if (!p.inside[i] || !(value[i] - value[i] == A(0))) value[i] = interpolate_anywhere<ND>(a, image, p, i);
}

// Adds what a block of voxels sends back to its displacement from one channel: grad * (interpolant
// differentiated along k).
template <class T, int ND, class A>
void gather(const WarpArgs& a, const Row& row, int64_t x0, int count, const Positions<A, ND>& p,
            const T* image, const T* grad, Corners<T, ND>& corners, A* const (&sum)[ND]) {
  int32_t all = corners.fetch(a, image, p, count) ? -1 : 0;
  A* __restrict sz = sum[0], * __restrict sy = sum[ND - 2], * __restrict sx = sum[ND - 1];
  if (all)
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
      // An outside voxel adds 0 here, whatever was fetched for it.
      const bool in = p.inside[i];
      const A g = load(grad[i]), fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
      auto& c = corners.pair;
      A d0 = load(c[0][i][1]) - load(c[0][i][0]), d1 = load(c[1][i][1]) - load(c[1][i][0]);
      A e0 = load(c[0][i][0]) + fx * d0, e1 = load(c[1][i][0]) + fx * d1;
      A dx = lerp(d0, d1, fy), dy = e1 - e0;
      if constexpr (ND == 3) {
        const A fz = p.fraction[0][i], near = lerp(e0, e1, fy);
        d0 = load(c[2][i][1]) - load(c[2][i][0]), d1 = load(c[3][i][1]) - load(c[3][i][0]);
        e0 = load(c[2][i][0]) + fx * d0, e1 = load(c[3][i][0]) + fx * d1;
        const A dz = g * (lerp(e0, e1, fy) - near);
        dx = lerp(dx, lerp(d0, d1, fy), fz), dy = lerp(dy, e1 - e0, fz);
        sz[i] += in ? dz : A(0);
      }
      const A gy = g * dy, gx = g * dx;
      sy[i] += in ? gy : A(0);
      sx[i] += in ? gx : A(0);
      all &= p.inside[i];
    }
  for (int i = 0; i < count && !all; ++i) {
    if (p.inside[i] || is_nan(p, i)) continue;
    const A g = load(grad[i]);
    each_edge<ND>(a, p, i, {row.z, row.y, x0 + i}, [&](int k, A weight, int64_t lower, int64_t upper) {
      const A low = lower < 0 ? A(0) : load(image[lower]);
      const A high = upper < 0 ? A(0) : load(image[upper]);
      sum[k][i] += g * weight * (high - low);
    });
  }
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA

#endif
