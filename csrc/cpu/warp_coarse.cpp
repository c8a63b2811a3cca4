// warp_coarse: reading an image at p + u(p), where u is given on a coarser grid and interpolated row by row.
#include <cstdint>

#include "cpu/axis_matrix.h"
#include "cpu/warp_rows.h"

namespace fastreg {

// Where the voxels of an axis of the image lie on the grid of the displacement.
struct CoarseAxis {
  int64_t n;               // of the grid
  const int32_t* lower;    // voxel of the grid at or before each voxel of the image
  const double* fraction;  // 0: the next one is not read
};

struct WarpCoarseArgs : WarpArgs {
  const void* coarse;    // (n, nd, *grid), arithmetic type; `displacement` is null
  CoarseAxis axis[3];    // 2D: z has one voxel
  AxisMatrix to_grid;    // along x, from the voxels of the image that read each of the grid
  double factor[3];      // of each component, from voxels of the grid to those of the image; 2D: the last two
  const int32_t* group;  // (grid + 1) along the slowest axis: planes [group[i], group[i + 1]) have lower i
  int64_t n_slabs;       // that each sample is cut into, backward
  void* edges;           // (n, n_slabs, a plane of the grid): what a slab adds to the first plane of the next
};

// Work units are rows (n, z, y) of the image.
FASTREG_KERNEL(void, warp_coarse_fwd, Stored, int nd, const WarpCoarseArgs&, int64_t, int64_t)
// (n, slab of the grid's planes); then (n), which adds the edges.
FASTREG_KERNEL(void, warp_coarse_bwd, Stored, int nd, const WarpCoarseArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, warp_coarse_join, Stored, int nd, const WarpCoarseArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <vector>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Lane i: number index[i] of the two vectors from p on.
template <class A>
using LaneIndex = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
Vector<A> picked(const A* p, const LaneIndex<A>* index) {
#if defined(__clang__)
  A lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = p[index[i]];
  return load_as<Vector<A>>(lanes);
#else
  typedef LaneIndex<A> Index __attribute__((vector_size(kVectorBytes)));
  Index lanes;
  std::memcpy(&lanes, index, sizeof lanes);
  return __builtin_shuffle(load_as<Vector<A>>(p), load_as<Vector<A>>(p + kLanes<A>), lanes);
#endif
}

// Rows of a matrix along x: row i is the sum over t < taps of weight[t][i] line[first[i] + t]. Where the rows
// of a vector begin within two vectors of each other they are fetched together, by shuffles.
template <class A>
class AlongX {
 public:
  AlongX(int64_t rows, int64_t columns, int64_t taps_)
      : taps(taps_), n(rows), first(rows), index(padded(rows)), weight(taps * padded(rows)), end(columns) {}

  void set(int64_t t, int64_t i, double w) { weight[t * padded(n) + i] = A(w); }
  void begins(int64_t i, int64_t at) { first[i] = int32_t(at); }
  void done() {
    near = true;
    for (int64_t i = 0; i < n; ++i) {
      index[i] = LaneIndex<A>(first[i] - first[i / kLanes<A> * kLanes<A>]);
      near &= index[i] >= 0 && index[i] < 2 * kLanes<A>;
    }
  }

  // How many numbers of a line are read, those past its end times 0.
  int64_t reach() const { return end + taps + 2 * kLanes<A>; }

  // What has no weight may not be finite. out has room for whole vectors.
  void apply(const A* line, A* out) const {
    using V = Vector<A>;
    const int64_t stride = padded(n);
    for (int64_t i = 0; near && i < n; i += kLanes<A>) {
      V sum = {};
      for (int64_t t = 0; t < taps; ++t) {
        const V w = load_as<V>(weight.data() + t * stride + i);
        const V value = picked(line + first[i] + t, index.data() + i);
        sum += w != 0 ? w * value : V{};
      }
      store_as<V>(out + i, sum);
    }
    for (int64_t i = 0; !near && i < n; ++i) {
      A sum = A(0);
      for (int64_t t = 0; t < taps; ++t) {
        const A w = weight[t * stride + i];
        if (w != A(0)) sum += w * line[first[i] + t];
      }
      out[i] = sum;
    }
  }

 private:
  int64_t taps, n;
  std::vector<int32_t> first;
  std::vector<LaneIndex<A>> index;  // less that of the first row of its vector
  std::vector<A> weight;
  int64_t end;
  bool near = false;
};

// The rows of the displacement that an image row needs, and their adjoint. Everything lies in L1.
template <class A, int ND>
class CoarseRows {
 public:
  explicit CoarseRows(const WarpCoarseArgs& args)
      : a(args),
        n(args.axis[2].n),
        to_image(args.out[2], n, 2),
        to_grid(n, args.out[2], args.to_grid.widest),
        line(to_image.reach()),
        stride(padded(to_grid.reach())),
        row(ND * stride) {
    const CoarseAxis& x = a.axis[2];
    for (int64_t o = 0; o < a.out[2]; ++o) {
      to_image.begins(o, x.lower[o]);
      to_image.set(0, o, 1.0 - x.fraction[o]), to_image.set(1, o, x.fraction[o]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t begin = a.to_grid.offset[i], count = a.to_grid.offset[i + 1] - begin;
      to_grid.begins(i, a.to_grid.first[i]);
      for (int64_t t = 0; t < count; ++t) to_grid.set(t, i, a.to_grid.weight[begin + t]);
    }
    to_image.done(), to_grid.done();
  }

  const A* component(int k) const { return row.data() + k * stride; }
  A* gradient(int k) { return row.data() + k * stride; }

  // Interpolates all components along row (z, y) of sample r.n.
  void interpolate(const Row& r) {
    const CoarseAxis &z = a.axis[0], &y = a.axis[1];
    const int64_t plane = y.n * n;
    const A* u =
        static_cast<const A*>(a.coarse) + r.n * ND * z.n * plane + z.lower[r.z] * plane + y.lower[r.y] * n;
    const double fz = z.fraction[r.z], fy = y.fraction[r.y];
    for (int k = 0; k < ND; ++k, u += z.n * plane) {
      const double factor = a.factor[k + 3 - ND];
      combine<true>(u, A((1.0 - fz) * (1.0 - fy) * factor));
      // What has no weight is not read: it may not be finite, or lie beyond the grid.
      if (fy > 0) combine<false>(u + n, A((1.0 - fz) * fy * factor));
      if (fz > 0) combine<false>(u + plane, A(fz * (1.0 - fy) * factor));
      if (fz > 0 && fy > 0) combine<false>(u + plane + n, A(fz * fy * factor));
      to_image.apply(line.data(), row.data() + k * stride);
    }
  }

  // Adds what a row of gradient() gives to a row of the grid, times each weight, to out[i].
  template <int kRows>
  void spread(int k, A* const (&out)[kRows], const A (&weight)[kRows]) {
    to_grid.apply(gradient(k), line.data());
    const A* __restrict sum = line.data();
    const int64_t count = n;
    for (int i = 0; i < kRows; ++i)
      if (weight[i] != A(0)) {
        A* __restrict o = out[i];
        const A w = weight[i];
        for (int64_t j = 0; j < count; ++j) o[j] += w * sum[j];
      }
  }

 private:
  template <bool kFirst>
  void combine(const A* __restrict u, A weight) {
    A* __restrict l = line.data();
    const int64_t count = n;
    for (int64_t i = 0; i < count; ++i) l[i] = kFirst ? weight * u[i] : l[i] + weight * u[i];
  }

  const WarpCoarseArgs& a;
  const int64_t n;
  AlongX<A> to_image, to_grid;
  std::vector<A> line;
  const int64_t stride;
  std::vector<A> row;
};

template <class A, int ND>
void locate_row(const WarpCoarseArgs& a, const CoarseRows<A, ND>& rows, const Row& row, int64_t x0, int count,
                Positions<A, ND>& p) {
  locate_at(a, row, x0, count, 0, a.in[3 - ND], p, [&](int k, auto use) {
    const A* u = rows.component(k) + x0;
    if (a.affine) {
      alignas(64) double d[kBlock];
      add_affine<A, ND>(a, row, k, x0, count, d);
      for (int i = 0; i < count; ++i) d[i] += double(u[i]);
      use(d);
    } else {
      use(u);
    }
  });
}

// Bytes: reads C volumes and the coarse displacement, nd / 2^nd of a volume for a grid twice as coarse,
// writes C: the displacement of a row never leaves L1. Floor by arithmetic: that of warp, and for each
// component 2 products and 2 loads a voxel for the interpolation along x, and at most 2^(nd - 1) a voxel of
// the grid's row for those along y and z.
template <class T, int ND>
void fwd(const WarpCoarseArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  Corners<T, ND> corners;
  CoarseRows<A, ND> rows(a);
  const int64_t volume = a.in[0] * a.in[1] * a.in[2];
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    rows.interpolate(row);
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      locate_row(a, rows, row, x0, count, p);
      for (int64_t c = 0; c < a.c; ++c) {
        const T* image = static_cast<const T*>(a.image) + (row.n * a.c + c) * volume;
        T* out = static_cast<T*>(a.result) + (row.n * a.c + c) * volume +
                 (row.z * a.out[1] + row.y) * a.out[2] + x0;
        alignas(64) A value[kBlock];
        interpolate_block<T, ND, A>(a, image, p, count, corners, value);
        for (int i = 0; i < count; ++i) store(out[i], value[i]);
      }
    }
  }
}

// g[k][i] = sum over channels of grad * (interpolant differentiated along k), as warp's.
template <class T, int ND, class A>
void slopes(const WarpCoarseArgs& a, const Row& row, int64_t x0, int count, const Positions<A, ND>& p,
            Corners<T, ND>& corners, A* const (&g)[ND]) {
  const int64_t volume = a.in[0] * a.in[1] * a.in[2];
  for (int k = 0; k < ND; ++k) std::fill_n(g[k], count, A(0));
  for (int64_t c = 0; c < a.c; ++c) {
    const T* image = static_cast<const T*>(a.image) + (row.n * a.c + c) * volume;
    const T* grad = static_cast<const T*>(a.grad) + (row.n * a.c + c) * volume +
                    (row.z * a.out[1] + row.y) * a.out[2] + x0;
    gather<T, ND, A>(a, row, x0, count, p, image, grad, corners, g);
  }
}

// The gradient to the coarse displacement: that to the displacement of an image row stays in L1, is brought
// to a row of the grid, and row by row to a plane of it, which plane by plane goes to the two planes of the
// grid that enclose it. A plane of the grid is the sum of what comes from before and what comes from behind
// it, each added up in one order, so bits depend on neither slabs nor threads. Bytes: reads 2 C volumes, and
// the coarse displacement, whose gradient is as large. Arithmetic: that of warp's gradient, the interpolation
// of forward and as much for its adjoint.
template <class T, int ND>
void bwd(const WarpCoarseArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Positions<A, ND> p;
  Corners<T, ND> corners;
  CoarseRows<A, ND> rows(a);
  // 2D: a plane of the grid is a row of it.
  const CoarseAxis &slow = a.axis[3 - ND], &middle = a.axis[1], &fast = a.axis[2];
  const int64_t n_rows = ND == 3 ? a.out[1] : 1, plane = (ND == 3 ? middle.n : 1) * fast.n, size = ND * plane;
  std::vector<A> sums(size), before(size), behind(size), next(size);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a.n_slabs, slab = unit % a.n_slabs;
    const int64_t lo = slow.n * slab / a.n_slabs, hi = slow.n * (slab + 1) / a.n_slabs;
    A* result = static_cast<A*>(a.result) + n * ND * slow.n * plane;
    std::fill(before.begin(), before.end(), A(0));
    for (int64_t i = lo; i < hi; ++i) {
      std::fill(behind.begin(), behind.end(), A(0));
      std::fill(next.begin(), next.end(), A(0));
      for (int64_t s = a.group[i]; s < a.group[i + 1]; ++s) {
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t m = 0; m < n_rows; ++m) {
          const Row row = ND == 3 ? Row{n, s, m} : Row{n, 0, s};
          rows.interpolate(row);
          for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
            const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
            locate_row(a, rows, row, x0, count, p);
            // In place: a block of the displacement is not needed any more.
            A* g[ND];
            for (int k = 0; k < ND; ++k) g[k] = rows.gradient(k) + x0;
            slopes<T, ND>(a, row, x0, count, p, corners, g);
          }
          const double f = ND == 3 ? middle.fraction[m] : 0.0;
          const int64_t at = ND == 3 ? middle.lower[m] : 0;
          for (int k = 0; k < ND; ++k) {
            A* out = sums.data() + k * plane + at * fast.n;
            rows.template spread<2>(k, {out, f > 0 ? out + fast.n : out}, {A(1.0 - f), A(f)});
          }
        }
        for (int k = 0; k < ND; ++k) {
          const double f = slow.fraction[s], factor = a.factor[k + 3 - ND];
          const A near = A((1.0 - f) * factor), far = A(f * factor);
          const A* __restrict from = sums.data() + k * plane;
          A* __restrict low = behind.data() + k * plane, * __restrict high = next.data() + k * plane;
          for (int64_t j = 0; j < plane; ++j) low[j] += near * from[j];
          if (f > 0)
            for (int64_t j = 0; j < plane; ++j) high[j] += far * from[j];
        }
      }
      for (int k = 0; k < ND; ++k) {
        const A* __restrict low = behind.data() + k * plane, * __restrict high = before.data() + k * plane;
        A* __restrict out = result + (k * slow.n + i) * plane;
        for (int64_t j = 0; j < plane; ++j) out[j] = low[j] + high[j];
      }
      before.swap(next);
    }
    std::copy(before.begin(), before.end(), static_cast<A*>(a.edges) + unit * size);
  }
}

template <class A, int ND>
void join(const WarpCoarseArgs& a, int64_t begin, int64_t end) {
  const int64_t planes = a.axis[3 - ND].n, plane = (ND == 3 ? a.axis[1].n : 1) * a.axis[2].n;
  for (int64_t n = begin; n < end; ++n)
    for (int64_t slab = 1; slab < a.n_slabs; ++slab)
      for (int k = 0; k < ND; ++k) {
        const A* edge = static_cast<const A*>(a.edges) + ((n * a.n_slabs + slab - 1) * ND + k) * plane;
        A* out = static_cast<A*>(a.result) + ((n * ND + k) * planes + planes * slab / a.n_slabs) * plane;
        for (int64_t j = 0; j < plane; ++j) out[j] += edge[j];
      }
}

}  // namespace

void warp_coarse_fwd(Stored type, int nd, const WarpCoarseArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? fwd<T, 3>(a, b, e) : fwd<T, 2>(a, b, e); });
}
void warp_coarse_bwd(Stored type, int nd, const WarpCoarseArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? bwd<T, 3>(a, b, e) : bwd<T, 2>(a, b, e); });
}
void warp_coarse_join(Stored type, int nd, const WarpCoarseArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() {
    using A = arithmetic_t<T>;
    nd == 3 ? join<A, 3>(a, b, e) : join<A, 2>(a, b, e);
  });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <algorithm>
#include <vector>

#include "common/warp_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

// Arrays behind a CoarseAxis.
struct AxisMap {
  int64_t n;
  std::vector<int32_t> lower;
  std::vector<double> fraction;

  AxisMap(int64_t n_grid, int64_t n_image) : n(n_grid), lower(n_image), fraction(n_image) {
    for (int64_t o = 0; o < n_image; ++o) {
      int64_t at;
      fraction[o] = linear_source(o, n, n_image, true, at);
      lower[o] = int32_t(at);
    }
  }

  CoarseAxis view() const { return {n, lower.data(), fraction.data()}; }
};

struct WarpCoarseCall : WarpInputs {
  WarpCoarseArgs args{};
  std::vector<AxisMap> maps;
  Matrix to_grid;
  std::vector<int32_t> group;
  int64_t rows;

  WarpCoarseCall(const char* name, const at::Tensor& image_, const at::Tensor& displacement_,
                 const OptionalTensor& affine_, c10::string_view padding_)
      : WarpInputs(name, image_, displacement_, affine_, "linear", padding_) {
    const int64_t grid[3] = {out[0], out[1], out[2]};
    std::copy_n(in, 3, out), out_sizes = image.sizes().vec();
    FASTREG_CHECK(grid[0] > 0 && grid[1] > 0 && grid[2] > 0, op, "displacement must not have an empty axis");
    rows = n * out[0] * out[1];
    args.image = image.const_data_ptr(), args.coarse = displacement.const_data_ptr();
    args.affine = static_cast<const double*>(data_or_null(affine));
    args.n = n, args.c = c, args.padding = padding;
    std::copy_n(in, 3, args.in), std::copy_n(out, 3, args.out);
    if (empty()) return;
    for (int k = 0; k < 3; ++k) {
      maps.emplace_back(grid[k], out[k]);
      args.factor[k] = exact_scale(grid[k], out[k], true);
    }
    for (int k = 0; k < 3; ++k) args.axis[k] = maps[k].view();
    to_grid = linear_matrix(grid[2], out[2], true, true), args.to_grid = to_grid.view();
    const std::vector<int32_t>& lower = maps[3 - nd].lower;
    for (int64_t i = 0; i <= grid[3 - nd]; ++i)
      group.push_back(int32_t(std::lower_bound(lower.begin(), lower.end(), int32_t(i)) - lower.begin()));
    args.group = group.data();
  }

  at::Tensor forward() {
    at::Tensor result = empty_large(out_sizes, image.options());
    if (empty()) return result;
    args.result = result.mutable_data_ptr();
    auto kernel = FASTREG_PICK(warp_coarse_fwd);
    at::parallel_for(0, rows, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
    return result;
  }

  at::Tensor backward(const at::Tensor& grad) {
    const at::Tensor upstream = grad.to(image.scalar_type()).contiguous();
    FASTREG_CHECK(upstream.sizes() == out_sizes, op, "grad must have the shape of the output");
    if (empty()) return at::zeros_like(displacement);
    at::Tensor result = at::empty_like(displacement);
    args.grad = upstream.const_data_ptr(), args.result = result.mutable_data_ptr();
    const int64_t planes = args.axis[3 - nd].n;
    args.n_slabs = std::clamp<int64_t>((at::get_num_threads() + n - 1) / n, 1, planes);
    at::Tensor edges =
        at::empty({n * args.n_slabs, displacement[0].numel() / planes}, displacement.options());
    args.edges = edges.mutable_data_ptr();
    auto kernel = FASTREG_PICK(warp_coarse_bwd);
    at::parallel_for(0, n * args.n_slabs, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
    FASTREG_PICK(warp_coarse_join)(type, nd, args, 0, n);
    return result;
  }
};

at::Tensor warp_coarse(const at::Tensor& image, const at::Tensor& displacement, const OptionalTensor& affine,
                       c10::string_view padding) {
  return WarpCoarseCall("warp_coarse", image, displacement, affine, padding)
      .forward()
      .to(image.scalar_type());
}

at::Tensor warp_coarse_bwd(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& displacement,
                           const OptionalTensor& affine, c10::string_view padding) {
  return WarpCoarseCall("warp_coarse_bwd", image, displacement, affine, padding)
      .backward(grad)
      .to(displacement.scalar_type());
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("warp_coarse", warp_coarse);
  m.impl("warp_coarse_bwd", warp_coarse_bwd);
}

}  // namespace
}  // namespace fastreg

#endif
