// warp, compose: reading an image (compose: a displacement) at p + u(p), and the gradients.
#include "cpu/affine_rows.h"
#include "cpu/warp_rows.h"

namespace fastreg {

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

namespace fastreg::FASTREG_ISA {
namespace {

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
        if (a.compose) {
          const A* __restrict u = static_cast<const A*>(a.displacement) + (out - static_cast<T*>(a.result));
          for (int i = 0; i < count; ++i) value[i] += u[i];
        }
        for (int i = 0; i < count; ++i) store(out[i], value[i]);
      }
    }
  }
}

// du_k = sum over channels of grad * (interpolant differentiated along k). A gather: deterministic. What an
// affine needs of it is summed row by row; du is stored only where it is asked for.
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
    RowSums sums[ND];
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      const int64_t at = (row.z * a.out[1] + row.y) * a.out[2] + x0;
      locate<A, ND>(a, row, x0, count, 0, a.in[3 - ND], p);
      alignas(64) A sum[ND][kBlock] = {};
      if (a.compose)
        for (int k = 0; k < ND; ++k) {
          const T* grad = static_cast<const T*>(a.grad) + (row.n * ND + k) * n_out + at;
          for (int i = 0; i < count; ++i) sum[k][i] = load(grad[i]);
        }
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
            each_edge<ND>(a, p, i, {row.z, row.y, x0 + i},
                          [&](int k, A weight, int64_t lower, int64_t upper) {
                            const A low = lower < 0 ? A(0) : load(image[lower]);
                            const A high = upper < 0 ? A(0) : load(image[upper]);
                            sum[k][i] += g * weight * (high - low);
                          });
          }
        }
      }
      for (int k = 0; k < ND && a.affine_sums; ++k) sums[k].add(sum[k], kBlock, x0);
      if (!a.result) continue;
      A* out = static_cast<A*>(a.result) + row.n * ND * n_out + at;
      for (int k = 0; k < ND; ++k) std::copy_n(sum[k], count, out + k * n_out);
    }
    for (int k = 0; k < ND && a.affine_sums; ++k) sums[k].store(a.affine_sums + (index * ND + k) * 2);
  }
}

// Lowest and highest plane of the image's slowest axis that each row touches.
template <class A, int ND>
void row_range(const WarpArgs& a, int32_t* range, int64_t begin, int64_t end) {
  const int64_t n_voxels = a.out[0] * a.out[1] * a.out[2];
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    double low = kFarthest, high = -low;
    // NaN voxels scatter nothing; comparisons written so that they leave the range alone.
    const auto widen = [&](const auto* u, int64_t count) {
      std::decay_t<decltype(*u)> least = kFarthest, most = -least;
      for (int64_t x = 0; x < count; ++x) {
        least = u[x] < least ? u[x] : least;
        most = u[x] > most ? u[x] : most;
      }
      low = std::min<double>(low, least), high = std::max<double>(high, most);
    };
    if (a.affine) {
      for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
        alignas(64) double d[kBlock];
        add_affine<A, ND>(a, row, 0, x0, count, d);
        widen(d, count);
      }
    } else {
      widen(static_cast<const A*>(a.displacement) + row.n * ND * n_voxels +
                (row.z * a.out[1] + row.y) * a.out[2],
            a.out[2]);
    }
    plane_range(a, ND, ND == 3 ? row.z : row.y, low, high, range + 2 * index);
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
              each_corner<ND>(a, p, i, lo, hi, [&](int corner, A, int64_t offset) {
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

#include "common/warp_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

struct WarpCall : WarpInputs {
  WarpArgs args{};
  int64_t rows;

  WarpCall(const Device&, WarpInputs inputs) : WarpInputs(std::move(inputs)), rows(n * out[0] * out[1]) {
    args.image = image.const_data_ptr(), args.displacement = data_or_null(displacement);
    args.affine = static_cast<const double*>(data_or_null(affine));
    args.n = n, args.c = c;
    std::copy_n(in, 3, args.in), std::copy_n(out, 3, args.out);
    args.padding = padding, args.nearest = nearest, args.compose = compose;
  }

  at::Tensor forward() {
    at::Tensor result = at::empty(out_sizes, image.options());
    if (empty()) return result;
    args.result = result.mutable_data_ptr();
    auto kernel = FASTREG_PICK(warp_fwd);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
    return result;
  }

  void backward(WarpGradients& g) {
    args.grad = g.upstream.const_data_ptr();
    if (g.positions) {
      std::vector<double> sums(g.need_affine ? rows * 2 * nd : 0);
      args.result = g.need_displacement ? g.displacement.mutable_data_ptr() : nullptr;
      args.affine_sums = g.need_affine ? sums.data() : nullptr;
      auto kernel = FASTREG_PICK(warp_bwd_displacement);
      at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
      if (g.need_affine) g.affine = affine_gradient(sums, n, nd, out);
    }
    if (g.need_image && !empty()) scatter(g.image);
  }

 private:
  // Into zeros.
  void scatter(const at::Tensor& grad_image) {
    args.result = grad_image.mutable_data_ptr();
    at::Tensor range = at::empty({rows, 2}, image.options().dtype(at::kInt));
    int32_t* r = range.mutable_data_ptr<int32_t>();
    auto ranges = FASTREG_PICK(warp_row_range);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { ranges(type, nd, args, r, b, e); });
    // Twice as many slabs as threads: a row near a border of two slabs is visited by both, so not many more.
    const int64_t n_slabs = std::clamp<int64_t>((2 * at::get_num_threads() + n - 1) / n, 1, in[3 - nd]);
    auto kernel = FASTREG_PICK(warp_bwd_image);
    at::parallel_for(0, n * n_slabs, 1,
                     [&](int64_t b, int64_t e) { kernel(type, nd, args, r, n_slabs, b, e); });
  }
};

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("warp", warp<Device, WarpCall>);
  m.impl("warp_bwd", warp_bwd<Device, WarpCall>);
  m.impl("compose", compose<Device, WarpCall>);
  m.impl("compose_bwd", compose_bwd<Device, WarpCall>);
}

}  // namespace
}  // namespace fastreg

#endif
