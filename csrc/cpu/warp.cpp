// warp, compose: reading an image (compose: a displacement) at p + u(p), and the gradients.
//
// A row is located and read in blocks of 64 voxels: positions and weights as vectors, cells one by one.
// Numbers for C = 1, 160^3, fp32, on one core of a Zen 5 (4.1 GHz, a plain copy moves 38 GB/s), u smooth over
// 16 voxels and of 3 voxels: cells of neighbours then lie in several rows and planes, and what is read of the
// image last was read a plane before, beyond the first caches. The next row is asked for ahead for that
// reason (`ask`).
//   forward: 5 volumes read and written, 2 ms; measured 17 ms, 27 without asking ahead.
//   both gradients: 9 volumes, 4 ms. Arithmetic: 4 loads of pairs, 8 loads, additions and stores, 16 numbers
//   stored on the way from vectors to voxels: 60 instructions, 15 ms at 4 a cycle; counted 160 with AVX2,
//   cells at the border included; measured 41 ms. One gradient after the other, each locating the voxels, and
//   pairs of neighbours added at once: 76 ms.
#include "cpu/affine_rows.h"
#include "cpu/vector.h"
#include "cpu/warp_rows.h"

namespace fastreg {

// Work units are rows (n, z, y) of the output grid, of warp_bwd (n, slab).
#define FASTREG_WARP_KERNEL(name) \
  FASTREG_KERNEL(void, name, Stored, int nd, const WarpArgs&, int64_t, int64_t)
FASTREG_WARP_KERNEL(warp_fwd)
FASTREG_KERNEL(void, warp_row_range, Stored, int nd, const WarpArgs&, int32_t* range, int64_t, int64_t)
FASTREG_KERNEL(void, warp_bwd, Stored, int nd, const WarpArgs&, const int32_t* range, int64_t n_slabs,
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
        interpolate_block<T, ND, A>(a, image, p, count, corners, value);
        if (a.compose) {
          const A* __restrict u = static_cast<const A*>(a.displacement) + (out - static_cast<T*>(a.result));
          for (int i = 0; i < count; ++i) value[i] += u[i];
        }
        ask<true>(out + a.out[2], count);
        for (int i = 0; i < count; ++i) store(out[i], value[i]);
      }
    }
  }
}

// Adds a block's shares of one channel of grad to the corners in planes [lo, hi) of its gradient to the
// image.
template <class T, int ND, class A>
void scatter(const WarpArgs& a, int count, const Positions<A, ND>& p, int64_t lo, int64_t hi, const T* grad,
             A* out) {
  constexpr int n_corners = 1 << ND;
  alignas(64) A share[n_corners][kBlock];
  alignas(64) int32_t plain[kBlock];
  const int32_t first = int32_t(lo);
  const uint32_t span = uint32_t(std::max<int64_t>(hi - lo - 1, 0));
  int32_t all = -1;
  for (int i = 0; i < count; ++i) {
    const A g = load(grad[i]);
    const A fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
    const auto spread = [&](A part, int corner) {
      const A hi_y = part * fy, lo_y = part - hi_y, hi_hi = hi_y * fx, lo_hi = lo_y * fx;
      share[corner][i] = lo_y - lo_hi, share[corner + 1][i] = lo_hi;
      share[corner + 2][i] = hi_y - hi_hi, share[corner + 3][i] = hi_hi;
    };
    A near = g;
    if constexpr (ND == 3) {
      const A far = g * p.fraction[0][i];
      near -= far, spread(far, 4);
    }
    spread(near, 0);
    // A weight of 0 must not turn an infinite gradient into NaN: such voxels go corner by corner.
    plain[i] = p.inside[i] & -int32_t((uint32_t(p.whole[0][i] - first) < span) & (g - g == A(0)));
    all &= plain[i];
  }
  const int64_t line = a.in[2], plane = a.in[1] * a.in[2];
  const auto add = [&](int i) {
    // Of neighbours along x one stands after the other in memory: not both at once, which would read what the
    // voxel before has just written from two of its stores and wait for both.
    A* v = out + p.offset[i];
    for (int x = 0; x < 2; ++x) {
      v[x] += share[x][i];
      v[line + x] += share[2 + x][i];
      if constexpr (ND == 3) {
        v[plane + x] += share[4 + x][i];
        v[plane + line + x] += share[6 + x][i];
      }
    }
  };
  ask_ahead<true>(a, p, count, out);
  if (all) {
    for (int i = 0; i < count; ++i) add(i);
    return;
  }
  // Which path a voxel takes depends on the slabs: the order and the roundings are those of above.
  for (int i = 0; i < count; ++i)
    if (FASTREG_LIKELY(plain[i]))
      add(i);
    else if (!is_nan(p, i))
      each_corner<ND>(a, p, i, lo, hi, [&](int c, A, int64_t offset) { out[offset] += share[c][i]; });
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
      using S = std::decay_t<decltype(*u)>;
      using V = Vector<S>;
      V least = fill<V>(S(kFarthest)), most = -least;
      int64_t x = 0;
      for (; x + kLanes<S> <= count; x += kLanes<S>) {
        const V v = load_as<V>(u + x);
        least = v < least ? v : least;
        most = v > most ? v : most;
      }
      for (; x < count; ++x) {
        least[0] = u[x] < least[0] ? u[x] : least[0];
        most[0] = u[x] > most[0] ? u[x] : most[0];
      }
      for (int j = 0; j < kLanes<S>; ++j)
        low = std::min<double>(low, least[j]), high = std::max<double>(high, most[j]);
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

// The gradients. A work unit owns a slab of planes of the image and, in the same share, rows of the output.
// It visits, in one fixed order, its rows and those whose range meets its planes; each is located once,
// gathered from where it is owned, and scattered to the planes of the slab, without atomics: every image
// voxel sums its shares in the same order whatever the number of threads or slabs. What an affine needs of
// the gradient to positions is summed row by row; that gradient is stored only where it is asked for. Bytes:
// reads nd + 2C volumes, writes nd + C. Arithmetic a voxel and channel: 2^nd loads and about 4 (3D: 11) lerps
// to gather, 2^nd additions to memory to scatter.
template <class T, int ND>
void bwd(const WarpArgs& a, const int32_t* range, int64_t n_slabs, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  Corners<T, ND> corners;
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], n_out = a.out[0] * a.out[1] * a.out[2];
  const int64_t n_slow = a.in[3 - ND], rows = a.out[0] * a.out[1];
  const bool positions = a.result || a.affine_sums;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / n_slabs, slab = unit % n_slabs;
    const int64_t lo = n_slow * slab / n_slabs, hi = n_slow * (slab + 1) / n_slabs;
    const int64_t first = rows * slab / n_slabs, last = rows * (slab + 1) / n_slabs;
    for (int64_t r = range ? 0 : first; r < (range ? rows : last); ++r) {
      const int64_t index = n * rows + r;
      const bool owned = positions && r >= first && r < last;
      const bool touched = range && range[2 * index + 1] >= lo && range[2 * index] < hi;
      if (!owned && !touched) continue;
      const Row row = row_at(a, index);
      RowSums sums[ND];
      for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
        const int64_t at = r * a.out[2] + x0;
        const T* grad = static_cast<const T*>(a.grad) + n * a.c * n_out + at;
        locate<A, ND>(a, row, x0, count, 0, n_slow, p);
        for (int64_t c = 0; c < a.c; ++c) ask(grad + c * n_out + a.out[2], count);
        if (touched)
          for (int64_t c = 0; c < a.c; ++c)
            scatter<T, ND>(a, count, p, lo, hi, grad + c * n_out,
                           static_cast<A*>(a.image_grad) + (n * a.c + c) * n_in);
        if (!owned) continue;
        alignas(64) A sum[ND][kBlock] = {};
        A* rows[ND];
        for (int k = 0; k < ND; ++k) rows[k] = sum[k];
        if (a.compose)
          for (int k = 0; k < ND; ++k)
            for (int i = 0; i < count; ++i) sum[k][i] = load(grad[k * n_out + i]);
        for (int64_t c = 0; c < a.c; ++c)
          gather<T, ND, A>(a, row, x0, count, p, static_cast<const T*>(a.image) + (n * a.c + c) * n_in,
                           grad + c * n_out, corners, rows);
        for (int k = 0; k < ND && a.affine_sums; ++k) sums[k].add(sum[k], kBlock, x0);
        A* out = static_cast<A*>(a.result) + n * ND * n_out + at;
        for (int k = 0; k < ND && a.result; ++k) {
          ask<true>(out + k * n_out + a.out[2], count);
          std::copy_n(sum[k], count, out + k * n_out);
        }
      }
      for (int k = 0; k < ND && owned && a.affine_sums; ++k)
        sums[k].store(a.affine_sums + (index * ND + k) * 2);
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
struct RowRange {
  static void run(const WarpArgs& a, int32_t* r, int64_t b, int64_t e) {
    row_range<arithmetic_t<T>, ND>(a, r, b, e);
  }
};
template <class T, int ND>
struct Bwd {
  static void run(const WarpArgs& a, const int32_t* r, int64_t s, int64_t b, int64_t e) {
    bwd<T, ND>(a, r, s, b, e);
  }
};

}  // namespace

void warp_fwd(Stored type, int nd, const WarpArgs& a, int64_t b, int64_t e) {
  dispatch<Fwd>(type, nd, a, b, e);
}
void warp_row_range(Stored type, int nd, const WarpArgs& a, int32_t* range, int64_t b, int64_t e) {
  dispatch<RowRange>(type, nd, a, range, b, e);
}
void warp_bwd(Stored type, int nd, const WarpArgs& a, const int32_t* range, int64_t n_slabs, int64_t b,
              int64_t e) {
  dispatch<Bwd>(type, nd, a, range, n_slabs, b, e);
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
    at::Tensor result = empty_large(out_sizes, image.options());
    if (empty()) return result;
    args.result = result.mutable_data_ptr();
    auto kernel = FASTREG_PICK(warp_fwd);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
    return result;
  }

  void backward(WarpGradients& g) {
    const bool to_image = g.need_image && !empty();
    if (!g.positions && !to_image) return;
    args.grad = g.upstream.const_data_ptr();
    std::vector<double> sums(g.positions && g.need_affine ? rows * 2 * nd : 0);
    args.affine_sums = sums.empty() ? nullptr : sums.data();
    args.result = nullptr;
    if (g.positions && g.need_displacement) {
      // Instead of what is not touched yet, in large pages.
      g.displacement = empty_large(displacement.sizes(), displacement.options());
      args.result = g.displacement.mutable_data_ptr();
    }
    args.image_grad = to_image ? g.image.mutable_data_ptr() : nullptr;
    const int64_t threads = at::get_num_threads();
    // One for a thread, which get equal shares; not more, for rows near a border are visited from both sides.
    int64_t n_slabs = n > threads ? (2 * threads + n - 1) / n : threads / n;
    n_slabs = std::clamp<int64_t>(n_slabs, 1, in[3 - nd]);
    std::vector<int32_t> range;
    if (to_image) {
      range.resize(2 * rows);
      auto ranges = FASTREG_PICK(warp_row_range);
      at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { ranges(type, nd, args, range.data(), b, e); });
    } else {
      n_slabs = out[0] * out[1];
    }
    auto kernel = FASTREG_PICK(warp_bwd);
    at::parallel_for(0, n * n_slabs, 1, [&](int64_t b, int64_t e) {
      kernel(type, nd, args, to_image ? range.data() : nullptr, n_slabs, b, e);
    });
    if (g.positions && g.need_affine) g.affine = affine_gradient(sums, n, nd, out);
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
