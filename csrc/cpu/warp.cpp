#include "common/warp.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice whose displacement has no z component.
struct WarpArgs {
  const void* image;         // (n, c, *in)
  const void* displacement;  // (n, nd, *out), arithmetic type
  const void* grad;          // (n, c, *out), backward only
  void* result;              // forward: (n, c, *out); backward: the gradient, arithmetic type
  int64_t n, c;
  int64_t in[3], out[3];  // D, H, W of the image and of the displacement
  Padding padding;
  bool nearest;
};

// Work units are rows (n, z, y) of the output grid, except for warp_bwd_image: (n, slab of the image).
#define FASTREG_WARP_KERNEL(name) \
  FASTREG_KERNEL(void, name, Stored, int nd, const WarpArgs&, int64_t, int64_t)
FASTREG_WARP_KERNEL(warp_fwd)
FASTREG_WARP_KERNEL(warp_bwd_displacement)
FASTREG_KERNEL(void, warp_row_range, Stored, int nd, const WarpArgs&, int32_t* range, int64_t, int64_t)
FASTREG_KERNEL(void, warp_bwd_image, Stored, int nd, const WarpArgs&, const int32_t* range, int64_t n_slabs,
               int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <cstring>

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int kBlock =
    64;  // voxels of a row whose positions are computed together (vectorised) before they are read

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

Row row_at(const WarpArgs& a, int64_t index) {
  int64_t plane = index / a.out[1];
  return {plane / a.out[0], plane % a.out[0], index % a.out[1]};
}

// The `count` voxels of `row` from x0 on. [lo, hi) bounds the slowest axis.
template <class A, int ND>
void locate(const WarpArgs& a, const Row& row, int64_t x0, int count, int64_t lo, int64_t hi,
            Positions<A, ND>& p) {
  const int64_t n_voxels = a.out[0] * a.out[1] * a.out[2];
  const A* u = static_cast<const A*>(a.displacement) + row.n * ND * n_voxels +
               (row.z * a.out[1] + row.y) * a.out[2] + x0;
  const int32_t start[3] = {int32_t(row.z), int32_t(row.y), int32_t(x0)};
  int32_t* __restrict inside = p.inside;
  for (int i = 0; i < count; ++i) inside[i] = -1;
  for (int k = 0; k < ND; ++k) {
    const int axis = k + 3 - ND;
    const A* __restrict uk = u + k * n_voxels;
    int32_t* __restrict whole = p.whole[k];
    A* __restrict fraction = p.fraction[k];
    const int32_t from = start[axis], step = axis == 2 ? 1 : 0, first = k == 0 ? int32_t(lo) : 0;
    const uint32_t span = uint32_t(std::max<int64_t>((k == 0 ? hi - lo : a.in[axis]) - 1, 0));
    alignas(64) A rounded[kBlock];
    if (a.nearest)
      for (int i = 0; i < count; ++i) rounded[i] = std::nearbyint(uk[i]);
    const A* __restrict source = a.nearest ? rounded : uk;
    for (int i = 0; i < count; ++i) split(source[i], whole[i], fraction[i]);
    for (int i = 0; i < count; ++i) {
      whole[i] += from + step * i;
      inside[i] &= -int32_t((uint32_t(whole[i] - first) < span) & (fraction[i] == fraction[i]));
    }
  }
  const uint32_t plane = uint32_t(a.in[1] * a.in[2]), line = uint32_t(a.in[2]);
  for (int i = 0; i < count; ++i) {
    int64_t offset = uint32_t(p.whole[ND - 1][i]) + int64_t(uint64_t(uint32_t(p.whole[ND - 2][i])) * line);
    if (ND == 3) offset += int64_t(uint64_t(uint32_t(p.whole[0][i])) * plane);
    // Where outside, the first voxel is fetched in its stead and not used.
    p.offset[i] = offset & int64_t(inside[i]);
  }
}

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
void each_corner(const WarpArgs& a, const Positions<A, ND>& p, int i, int64_t lo, int64_t hi, bool weightless,
                 Visit visit) {
  for (int corner = 0; corner < 1 << ND; ++corner) {
    A weight = A(1);
    int64_t offset = 0;
    bool present = true;
    for (int k = 0; k < ND; ++k) {
      const int upper = corner >> (ND - 1 - k) & 1, axis = k + 3 - ND;
      const A f = p.fraction[k][i];
      const int64_t index = corner_index(int64_t(p.whole[k][i]) + upper, a.in[axis], a.padding);
      present = present && index >= 0 && (k > 0 || (index >= lo && index < hi));
      weight *= upper ? f : A(1) - f;
      offset = offset * a.in[axis] + index;
    }
    if (present && (weightless || weight != A(0))) visit(corner, weight, offset);
  }
}

template <class A, int ND>
bool is_nan(const Positions<A, ND>& p, int i) {
  bool nan = false;
  for (int k = 0; k < ND; ++k) nan |= p.fraction[k][i] != p.fraction[k][i];
  return nan;
}

template <int ND, class A, class T>
A interpolate_anywhere(const WarpArgs& a, const T* image, const Positions<A, ND>& p, int i) {
  if (is_nan(p, i)) return A(NAN);
  A sum = A(0);
  each_corner<ND>(a, p, i, 0, a.in[3 - ND], false,
                  [&](int, A weight, int64_t offset) { sum += weight * load(image[offset]); });
  return sum;
}

// Bytes: reads nd + C volumes, writes C. Floor by arithmetic: 2^nd - 1 lerps and 2^nd loads a voxel and
// channel.
template <class T, int ND>
void fwd(const WarpArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  Corners<T, ND> corners;
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], n_out = a.out[0] * a.out[1] * a.out[2];
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      locate<A, ND>(a, row, x0, count, 0, a.in[3 - ND], p);
      for (int64_t c = 0; c < a.c; ++c) {
        const T* image = static_cast<const T*>(a.image) + (row.n * a.c + c) * n_in;
        T* out = static_cast<T*>(a.result) + (row.n * a.c + c) * n_out +
                 (row.z * a.out[1] + row.y) * a.out[2] + x0;
        alignas(64) A value[kBlock];
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
            if (!p.inside[i] || !(value[i] - value[i] == A(0)))
              value[i] = interpolate_anywhere<ND>(a, image, p, i);
        for (int i = 0; i < count; ++i) store(out[i], value[i]);
      }
    }
  }
}

// du_k = sum over channels of grad * (interpolant differentiated along k). A gather: deterministic.
// Bytes: reads nd + 2C volumes, writes nd. Arithmetic: 2^nd loads and about 4 (3D: 11) lerps a voxel and
// channel.
template <class T, int ND>
void bwd_displacement(const WarpArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  Corners<T, ND> corners;
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], n_out = a.out[0] * a.out[1] * a.out[2];
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      const int64_t at = (row.z * a.out[1] + row.y) * a.out[2] + x0;
      locate<A, ND>(a, row, x0, count, 0, a.in[3 - ND], p);
      alignas(64) A sum[ND][kBlock] = {};
      for (int64_t c = 0; c < a.c; ++c) {
        const T* image = static_cast<const T*>(a.image) + (row.n * a.c + c) * n_in;
        const T* grad = static_cast<const T*>(a.grad) + (row.n * a.c + c) * n_out + at;
        int32_t all = corners.fetch(a, image, p, count) ? -1 : 0;
        if (all)
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
              sum[0][i] += in ? dz : A(0);
            }
            const A gy = g * dy, gx = g * dx;
            sum[ND - 2][i] += in ? gy : A(0);
            sum[ND - 1][i] += in ? gx : A(0);
            all &= p.inside[i];
          }
        for (int i = 0; i < count && !all; ++i) {
          const A g = load(grad[i]);
          if (!p.inside[i] && !is_nan(p, i)) {
            each_corner<ND>(a, p, i, 0, a.in[3 - ND], true, [&](int corner, A, int64_t offset) {
              const int64_t at[3] = {row.z, row.y, x0 + i};
              for (int k = 0; k < ND; ++k) {
                if (std::abs(p.whole[k][i] - at[k + 3 - ND]) >= kFarthest) continue;  // capped: constant
                A weight = corner >> (ND - 1 - k) & 1 ? A(1) : A(-1);
                for (int j = 0; j < ND; ++j)
                  if (j != k)
                    weight *= corner >> (ND - 1 - j) & 1 ? p.fraction[j][i] : A(1) - p.fraction[j][i];
                if (weight != A(0)) sum[k][i] += g * weight * load(image[offset]);
              }
            });
          }
        }
      }
      A* out = static_cast<A*>(a.result) + row.n * ND * n_out + at;
      for (int k = 0; k < ND; ++k) std::copy_n(sum[k], count, out + k * n_out);
    }
  }
}

// Lowest and highest plane of the image's slowest axis that each row touches.
template <class A, int ND>
void row_range(const WarpArgs& a, int32_t* range, int64_t begin, int64_t end) {
  const int64_t n_voxels = a.out[0] * a.out[1] * a.out[2];
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    const A* u =
        static_cast<const A*>(a.displacement) + row.n * ND * n_voxels + (row.z * a.out[1] + row.y) * a.out[2];
    // NaN voxels scatter nothing; comparisons written so that they leave the range alone.
    A low = A(1 << 29), high = -low;
    for (int64_t x = 0; x < a.out[2]; ++x) {
      low = u[x] < low ? u[x] : low;
      high = u[x] > high ? u[x] : high;
    }
    const int64_t start = ND == 3 ? row.z : row.y, last = a.in[3 - ND] - 1;
    const double cap = 1 << 29;
    // One plane of slack on both sides for rounding to nearest.
    int64_t lo = start + int64_t(std::floor(std::max<double>(low, -cap))) - 1;
    int64_t hi = start + int64_t(std::floor(std::min<double>(high, cap))) + 2;
    if (a.padding == Padding::border)
      lo = std::clamp<int64_t>(lo, 0, last), hi = std::clamp<int64_t>(hi, 0, last);
    if (a.padding == Padding::reflection && (lo < 0 || hi > last)) lo = 0, hi = last;
    range[2 * index] = int32_t(std::clamp<int64_t>(lo, -1, last + 1));
    range[2 * index + 1] = int32_t(std::clamp<int64_t>(hi, -1, last + 1));
  }
}

// Scatter of grad into the image, without atomics: a work unit owns a slab of image planes and visits, in one
// fixed order, the rows whose range meets it. Every image voxel therefore sums its contributions in the same
// order whatever the number of threads or slabs: bit-equal runs, no deterministic mode needed. Bytes: reads
// nd + C volumes, reads and writes C. Arithmetic: 2^nd multiply-adds to memory a voxel and channel.
template <class T, int ND>
void bwd_image(const WarpArgs& a, const int32_t* range, int64_t n_slabs, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], n_out = a.out[0] * a.out[1] * a.out[2];
  const int64_t line = a.in[2], plane = a.in[1] * a.in[2], n_slow = a.in[3 - ND];
  const int64_t rows = a.out[0] * a.out[1];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / n_slabs, slab = unit % n_slabs;
    const int64_t lo = n_slow * slab / n_slabs, hi = n_slow * (slab + 1) / n_slabs;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = n * rows + r;
      if (range[2 * index + 1] < lo || range[2 * index] >= hi) continue;
      const Row row = row_at(a, index);
      for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
        locate<A, ND>(a, row, x0, count, lo, hi, p);
        for (int64_t c = 0; c < a.c; ++c) {
          A* out = static_cast<A*>(a.result) + (n * a.c + c) * n_in;
          const T* grad = static_cast<const T*>(a.grad) + (n * a.c + c) * n_out + r * a.out[2] + x0;
          for (int i = 0; i < count; ++i) {
            const A g = load(grad[i]);
            // A weight of 0 must not turn an infinite gradient into NaN: such voxels go corner by corner.
            if (FASTREG_LIKELY(p.inside[i] && g - g == A(0))) {
              A* v = out + p.offset[i];
              const A fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
              A near = g;
              if (ND == 3) {
                const A far = g * p.fraction[0][i];
                near = g - far;
                A* w = v + plane;
                const A hi_y = far * fy, lo_y = far - hi_y;
                w[0] += lo_y - lo_y * fx, w[1] += lo_y * fx;
                w[line] += hi_y - hi_y * fx, w[line + 1] += hi_y * fx;
              }
              const A hi_y = near * fy, lo_y = near - hi_y;
              v[0] += lo_y - lo_y * fx, v[1] += lo_y * fx;
              v[line] += hi_y - hi_y * fx, v[line + 1] += hi_y * fx;
            } else if (!is_nan(p, i)) {
              // The share of a corner, rounded step by step as above: which path a voxel takes depends on the
              // slabs.
              each_corner<ND>(a, p, i, lo, hi, false, [&](int corner, A, int64_t offset) {
                A share = g;
                for (int k = 0; k < ND; ++k) {
                  const A up = share * p.fraction[k][i];
                  share = corner >> (ND - 1 - k) & 1 ? up : share - up;
                }
                out[offset] += share;
              });
            }
          }
        }
      }
    }
  }
}

template <template <class, int> class Op, class... Args>
void dispatch(Stored type, int nd, Args&&... args) {
  with_type(type, [&]<class T>() { nd == 3 ? Op<T, 3>::run(args...) : Op<T, 2>::run(args...); });
}

template <class T, int ND>
struct Fwd {
  static void run(const WarpArgs& a, int64_t b, int64_t e) { fwd<T, ND>(a, b, e); }
};
template <class T, int ND>
struct BwdDisplacement {
  static void run(const WarpArgs& a, int64_t b, int64_t e) { bwd_displacement<T, ND>(a, b, e); }
};
template <class T, int ND>
struct RowRange {
  static void run(const WarpArgs& a, int32_t* r, int64_t b, int64_t e) {
    row_range<arithmetic_t<T>, ND>(a, r, b, e);
  }
};
template <class T, int ND>
struct BwdImage {
  static void run(const WarpArgs& a, const int32_t* r, int64_t s, int64_t b, int64_t e) {
    bwd_image<T, ND>(a, r, s, b, e);
  }
};

}  // namespace

void warp_fwd(Stored type, int nd, const WarpArgs& a, int64_t b, int64_t e) {
  dispatch<Fwd>(type, nd, a, b, e);
}
void warp_bwd_displacement(Stored type, int nd, const WarpArgs& a, int64_t b, int64_t e) {
  dispatch<BwdDisplacement>(type, nd, a, b, e);
}
void warp_row_range(Stored type, int nd, const WarpArgs& a, int32_t* range, int64_t b, int64_t e) {
  dispatch<RowRange>(type, nd, a, range, b, e);
}
void warp_bwd_image(Stored type, int nd, const WarpArgs& a, const int32_t* range, int64_t n_slabs, int64_t b,
                    int64_t e) {
  dispatch<BwdImage>(type, nd, a, range, n_slabs, b, e);
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

WarpArgs arguments(const Tensor& image, const Tensor& displacement, c10::string_view mode,
                   c10::string_view padding) {
  const int64_t nd = displacement.size(1);
  FASTREG_CHECK(displacement.dim() == nd + 2 && image.dim() == nd + 2 && (nd == 2 || nd == 3), "warp",
                "image and displacement must have 2 or 3 spatial axes");
  FASTREG_CHECK(image.size(0) == displacement.size(0), "warp",
                "image and displacement must have one batch size");
  FASTREG_CHECK(displacement.scalar_type() == arithmetic_of(image), "warp",
                "displacement must have the arithmetic type of image");
  WarpArgs a{};
  a.image = image.const_data_ptr();
  a.displacement = displacement.const_data_ptr();
  a.n = image.size(0), a.c = image.size(1);
  for (int k = 0; k < 3; ++k) {
    a.in[k] = k < 3 - nd ? 1 : image.size(k + nd - 1);
    a.out[k] = k < 3 - nd ? 1 : displacement.size(k + nd - 1);
    FASTREG_CHECK(a.in[k] < (1 << 29) && a.out[k] < (1 << 29), "warp", "an axis must be shorter than 2^29");
    FASTREG_CHECK(a.in[k] > 0 || displacement.numel() == 0, "warp",
                  "image must not have an empty spatial axis");
  }
  FASTREG_CHECK(a.in[1] * a.in[2] < (int64_t(1) << 32), "warp",
                "a plane of image must be smaller than 2^32 voxels");
  a.padding = padding == "zeros"    ? Padding::zeros
              : padding == "border" ? Padding::border
                                    : Padding::reflection;
  a.nearest = mode == "nearest";
  return a;
}

// A displacement never loses precision: fp64 displacements lift the image to fp64.
std::pair<Tensor, Tensor> common_type(const Tensor& image, const Tensor& displacement) {
  Tensor i = displacement.scalar_type() == at::kDouble ? image.to(at::kDouble) : image;
  return {i.contiguous(), displacement.to(arithmetic_of(i)).contiguous()};
}

Tensor warp_cpu(const Tensor& image, const Tensor& displacement, c10::string_view mode,
                c10::string_view padding) {
  auto [i, u] = common_type(image, displacement);
  WarpArgs a = arguments(i, u, mode, padding);
  auto size = i.sizes().vec();
  std::copy(u.sizes().begin() + 2, u.sizes().end(), size.begin() + 2);
  Tensor out = at::empty(size, i.options());
  if (out.numel() == 0) return out.to(image.scalar_type());
  a.result = out.mutable_data_ptr();
  auto kernel = FASTREG_PICK(warp_fwd);
  at::parallel_for(0, a.n * a.out[0] * a.out[1], 1,
                   [&](int64_t b, int64_t e) { kernel(stored(i), int(u.size(1)), a, b, e); });
  return out.to(image.scalar_type());
}

std::tuple<Tensor, Tensor> warp_bwd_cpu(const Tensor& grad, const Tensor& image, const Tensor& displacement,
                                        c10::string_view mode, c10::string_view padding, bool need_image,
                                        bool need_displacement) {
  auto [i, u] = common_type(image, displacement);
  WarpArgs a = arguments(i, u, mode, padding);
  Tensor g = grad.to(i.scalar_type()).contiguous();
  FASTREG_CHECK(g.size(0) == a.n && g.size(1) == a.c && g.sizes().slice(2) == u.sizes().slice(2), "warp_bwd",
                "grad must have the shape of the output");
  a.grad = g.const_data_ptr();
  const int nd = int(u.size(1));
  const int64_t rows = a.n * a.out[0] * a.out[1];
  Tensor grad_image = at::zeros(need_image ? i.sizes() : at::IntArrayRef{0}, u.options());
  Tensor grad_u = need_displacement && !a.nearest
                      ? at::empty_like(u)
                      : at::zeros(need_displacement ? u.sizes() : at::IntArrayRef{0}, u.options());
  if (g.numel() == 0) grad_u.zero_();
  if (need_displacement && !a.nearest && g.numel() > 0) {
    a.result = grad_u.mutable_data_ptr();
    auto kernel = FASTREG_PICK(warp_bwd_displacement);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { kernel(stored(i), nd, a, b, e); });
  }
  if (need_image && g.numel() > 0) {
    a.result = grad_image.mutable_data_ptr();
    Tensor range = at::empty({rows, 2}, u.options().dtype(at::kInt));
    int32_t* r = range.mutable_data_ptr<int32_t>();
    auto ranges = FASTREG_PICK(warp_row_range);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { ranges(stored(i), nd, a, r, b, e); });
    // Twice as many slabs as threads: a row near a border of two slabs is visited by both, so not many more.
    const int64_t n_slabs = std::clamp<int64_t>((2 * at::get_num_threads() + a.n - 1) / a.n, 1, a.in[3 - nd]);
    auto kernel = FASTREG_PICK(warp_bwd_image);
    at::parallel_for(0, a.n * n_slabs, 1,
                     [&](int64_t b, int64_t e) { kernel(stored(i), nd, a, r, n_slabs, b, e); });
  }
  return {grad_image.to(image.scalar_type()), grad_u.to(displacement.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("warp", warp_cpu);
  m.impl("warp_bwd", warp_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
