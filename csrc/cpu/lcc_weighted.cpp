// LCC over weighted (Gaussian, triangular) windows; the bindings are those of lcc_loss.cpp.
#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/lcc_rows.h"
#include "cpu/lcc_weighted_sums.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Forward: two planes of windows at a time (with AVX-512, as registers allow), pairs in any order. Per row:
// the five moments summed over z straight from the images (products of shifted samples cost less than a ring
// of planes of five moments), kept in a ring of some 2 ry + 8 rows in L2. From it, for as many rows as a
// vector has lanes: the sums over y; then the rows are transposed, so that the sums over x load whole vectors
// and rows are summed by one loop along every axis; LCC and its adjoint maps; those summed over x, transposed
// back and, through a second ring, summed over y, and written to `adjoints`, a ring of planes. Gradient: the
// adjoints summed over z and combined with the images, one run of a plane's voxels at a time so that the
// planes' rows stay in L2. The two take turns chunk by chunk. Nothing is computed twice and nothing depends
// on the thread count. Sums are fp64; mirrored samples are added before they are weighed, which halves the
// products, and nothing is ever subtracted; shift and rule for flat windows are those of the box windows.
// Bytes (r = radius of the taps): each image r + 1 times, from L3 but for once; three (both gradients: five)
// fp64 adjoints written and read once, through L3 or memory; each gradient written once. Arithmetic of r + 1
// products and r additions a sum, 8 lanes: 5 moments and 3 adjoints along three axes, r = 10, are 24 x 21 / 8
// = 63 operations a voxel, and 9 more for the products over z: at the two a cycle that there are of 512 bits,
// at 3.3 GHz, 160^3 needs 45 ms of a core, with some 10 for the statistics. Measured on a busy machine: 99 to
// 107 ms of a core where the sums before, without pairs and mirrored samples, took 178 to 187. 2.5 times that
// speed would be 75 ms, three quarters of what the units can do. Asking for what comes next in the rings
// gained 3 %.

// Planes of windows that are summed over z at once: a sample is then loaded and multiplied once for both.
constexpr int kPlanes = kLanes<double> == 8 ? 2 : 1;

template <class T, bool kMask>
class Windows {
  using A = arithmetic_t<T>;

 public:
  Windows(const LccArgs& args, int64_t nc_)
      : a(args),
        nc(nc_),
        D(a.size[0]),
        H(a.size[1]),
        W(a.size[2]),
        lanes(H > 1 ? kLanes<double> : 1),
        n(W * lanes),
        along_y(a.taps[1], a.radius[1]) {
    for (int k = 0; k < 3; ++k) r[k] = a.radius[k];
    fixed = static_cast<const T*>(a.fixed) + nc * D * H * W;
    moved = static_cast<const T*>(a.moved) + nc * D * H * W;
    mask = kMask ? static_cast<const A*>(a.mask) + nc / a.c * D * H * W : nullptr;
    upstream = a.upstream ? static_cast<const A*>(a.upstream) + nc / a.c * D * H * W : mask;
    n_adjoints = a.n_adjoints;
    // Rows; and groups of rows, whose voxels alternate, with r zeros on both sides.
    stride = (W + 15) / 8 * 8, wide = ((W + 2 * r[2]) * lanes + 127) / 64 * 64;
    ring_rows = 2 * r[1] + lanes, adjoint_rows = 2 * r[1] + lanes + kGroup;
    for (int p = 0; p < kPlanes; ++p) {
      ring[p] = zeros(ring_rows * kMoments, stride);
      adjoint_ring[p] = zeros(adjoint_rows * n_adjoints, stride);
    }
    column = zeros(std::max<int64_t>(lanes, kGroup), stride), nothing = zeros(1, stride);
    beyond = zeros(1, stride), outside_x = zeros(1, stride);
    crossed = zeros(1, wide), box = zeros(kMoments, wide), count = zeros(3, wide);
    value = zeros(1, wide), weights = zeros(1, wide), line_up = zeros(1, wide);
    adjoint = zeros(n_adjoints, wide);
    for (int64_t x = 0; x < W; ++x) outside_x[x] = weight_outside(a.taps[2], x, W);
    for (int padded = 0; padded < 2; ++padded)
      line_statistics[padded] =
          statistics_for<false>(a.denominator, a.squared, a.grad_fixed, a.grad_moved, padded);
    prepare_line();
  }

  // Planes [z, z + n_planes) of windows.
  void planes(int64_t z, int64_t n_planes) {
    choose_shift(z);
    double sum[kPlanes] = {};
    int64_t read = 0, written = 0;  // rows summed over z, rows of adjoints written
    for (int64_t y = 0; y < H; y += lanes) {
      const int64_t end = std::min(y + lanes, H);
      for (; read < std::min(end + r[1], H); ++read)
        n_planes == kPlanes ? sum_z<kPlanes>(z, read) : sum_z<1>(z, read);
      for (int p = 0; p < n_planes; ++p) sum[p] += rows(p, z + p, y, end - y);
      for (; n_adjoints && written < H && (end == H || written + kGroup + r[1] <= end); written += kGroup)
        for (int p = 0; p < n_planes; ++p) write_adjoints(p, z + p, written);
    }
    for (int p = 0; p < n_planes; ++p) a.sums[nc * D + z + p] = -sum[p];
  }

 private:
  static constexpr int kMoments = 5 + kMask;  // f, m, ff, mm, fm, weight
  static constexpr int kWeight = 5;

  double* zeros(int64_t rows, int64_t width) {
    double* p = arena.rows(rows, width);
    std::fill_n(p, rows * width, 0.0);
    return p;
  }
  int64_t at(int64_t z, int64_t y) const { return (z * H + y) * W; }

  void prepare_line() {
    line = {};
    line.f = box, line.m = box + wide, line.ff = box + 2 * wide, line.mm = box + 3 * wide,
    line.fm = box + 4 * wide;
    line.count = count, line.inverse = count + wide, line.outside = count + 2 * wide;
    line.upstream = line_up, line.value = value;
    auto map = [&](int k) { return adjoint + k * wide + r[2] * lanes; };
    if (n_adjoints) line.e = map(0);
    if (a.grad_fixed) line.a = map(1), line.mean_f = map(2);
    if (a.grad_moved) line.b = map(n_adjoints - 2), line.mean_m = map(n_adjoints - 1);
    line.rule = a.rule, line.least = a.least;
    std::fill_n(line_up, n, -1.0);
  }

  void choose_shift(int64_t z) {
    if (z / kChunk == chunk) return;
    chunk = z / kChunk;
    line.shift[0] = chunk_shift(fixed, mask, a.size, chunk * kChunk);
    line.shift[1] = chunk_shift(moved, mask, a.size, chunk * kChunk);
    for (int k = 0; k < 2; ++k) line.to_reference[k] = line.shift[k] - a.reference[k];
  }

  // The moments of row y summed over the planes of the windows of planes [z, z + kRows). Outside the mask
  // nothing is looked at, not even a NaN.
  template <int kRows>
  void sum_z(int64_t z, int64_t y) {
    const int64_t skip = H * W, here = at(z, y), depth = D;
    const double cf = line.shift[0], cm = line.shift[1];
    double* out[kRows];
    for (int p = 0; p < kRows; ++p) out[p] = ring[p] + y % ring_rows * kMoments * stride;
    cover_blocks<double, 1>(W, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
      const T *f_at = fixed + here + x, *m_at = moved + here + x;
      const A* k_at = kMask ? mask + here + x : nullptr;
      V sum[kRows][kMoments];
      mirrored(
          a.taps[0].tap, r[0],
          [&](int64_t j, V(&to)[kMoments]) __attribute__((always_inline)) {
            if (z + j < 0 || z + j >= depth) {
              FASTREG_REPEAT(kMoments, k, to[k] = V{});
              return;
            }
            // The next row of a plane: too many planes for the hardware to follow.
            __builtin_prefetch(f_at + j * skip + W), __builtin_prefetch(m_at + j * skip + W);
            V f = widen<V>(f_at + j * skip) - cf, m = widen<V>(m_at + j * skip) - cm;
            if constexpr (kMask) {
              const V inside = widen<V>(k_at + j * skip);
              f = inside == 0.0 ? V{} : f, m = inside == 0.0 ? V{} : m;
              const V kf = inside * f, km = inside * m;
              to[0] = kf, to[1] = km, to[2] = kf * f, to[3] = km * m, to[4] = kf * m, to[kWeight] = inside;
            } else {
              to[0] = f, to[1] = m, to[2] = f * f, to[3] = m * m, to[4] = f * m;
            }
          },
          sum);
      FASTREG_REPEAT(kRows, p, FASTREG_REPEAT(kMoments, k, store_as<V>(out[p] + k * stride + x, sum[p][k])));
    });
  }

  // Rows to voxels that alternate.
  void cross(const double* in, double* out) const {
    if (lanes == 1) {
      std::copy_n(in, W, out);
      return;
    }
    constexpr int L = kLanes<double>;
    for (int64_t x = 0; x < W; x += L) {
      Vector<double> v[L];
      for (int i = 0; i < L; ++i) v[i] = load_as<Vector<double>>(in + i * stride + x);
      transpose<double>(v);
      for (int i = 0; i < std::min<int64_t>(L, W - x); ++i) store_as<Vector<double>>(out + (x + i) * L, v[i]);
    }
  }

  // The way back; row i goes to out[i].
  void uncross(const double* in, double* const* out) const {
    if (lanes == 1) {
      std::copy_n(in, W, out[0]);
      return;
    }
    constexpr int L = kLanes<double>;
    for (int64_t x = 0; x < W; x += L) {
      Vector<double> v[L];
      for (int i = 0; i < L; ++i) v[i] = load_as<Vector<double>>(in + (x + i) * L);
      transpose<double>(v);
      for (int i = 0; i < L; ++i) store_as<Vector<double>>(out[i] + x, v[i]);
    }
  }

  void sum_x(const double* in, double* out) const {
    lanes == 1 ? sum_along(a.taps[2], r[2], in, out, W) : sum_across(a.taps[2], r[2], in, out, W);
  }

  // `count` rows of windows. Returns their sum of mask * LCC; their adjoint maps, summed over x, enter the
  // ring. Rows beyond the last are computed and forgotten.
  double rows(int p, int64_t z, int64_t y, int64_t n_rows) {
    for (int k = 0; k < kMoments; ++k) {
      for (int64_t i = 0; i < lanes; i += kGroup) {
        double* out[kGroup];
        for (int64_t j = 0; j < kGroup; ++j) out[j] = column + (i + j) * stride;
        along_y.sum(y + i, H, ring[p] + k * stride, ring_rows, kMoments * stride, nothing, out, W);
      }
      cross(column, crossed + r[2] * lanes);
      sum_x(crossed + r[2] * lanes, box + k * wide);
    }
    const bool all_inside = window_counts(z, y);
    if (upstream) gather(upstream, z, y, n_rows, a.upstream ? -1.0 / double(a.c) : -1.0, line_up);
    // Away from the faces only the ends of a line have padded samples.
    const int64_t reach = a.valid ? 0 : a.taps[2].length - 1, left = all_inside ? std::min(reach, W) : W,
                  right = std::max(left, W - reach);
    line_statistics[1](line, 0, left * lanes);
    line_statistics[0](line, left * lanes, right * lanes);
    line_statistics[1](line, right * lanes, n);
    poison();
    for (int k = 0; k < n_adjoints; ++k) {
      double* out[kLanes<double>];
      for (int64_t i = 0; i < lanes; ++i)
        out[i] = adjoint_ring[p] + ((y + i) % adjoint_rows * n_adjoints + k) * stride;
      sum_x(adjoint + k * wide + r[2] * lanes, crossed + r[2] * lanes);
      uncross(crossed + r[2] * lanes, out);
    }
    return collect_rows(z, y, n_rows);
  }

  // `to`: rows of an image, times a factor, voxels alternating.
  void gather(const A* image, int64_t z, int64_t y, int64_t n_rows, double factor, double* to) const {
    for (int64_t i = 0; i < n_rows; ++i) {
      const A* in = image + at(z, y + i);
      for (int64_t x = 0; x < W; ++x) to[x * lanes + i] = factor * double(in[x]);
    }
  }

  double collect_rows(int64_t z, int64_t y, int64_t n_rows) {
    if (kMask) gather(mask, z, y, n_rows, 1.0, weights);
    double sum[kLanes<double>] = {};
    for (int64_t x = 0; x < W; ++x)
      for (int64_t i = 0; i < n_rows; ++i) {
        const double v = value[x * lanes + i], weight = kMask ? weights[x * lanes + i] : 1.0;
        sum[i] += weight == 0.0 ? 0.0 : weight * v;
      }
    double total = 0.0;
    for (int64_t i = 0; i < n_rows; ++i) total += sum[i];
    if (a.map)
      for (int64_t i = 0; i < n_rows; ++i) {
        A* out = static_cast<A*>(a.map) + nc * D * H * W + at(z, y + i);
        for (int64_t x = 0; x < W; ++x) out[x] = A(-value[x * lanes + i] / double(a.c));
      }
    return total;
  }

  // n, 1 / n and the weight of the padded samples of each window: sums of positive terms, so exactly 0 where
  // there are none. True where only the ends of the rows have any.
  bool window_counts(int64_t z, int64_t y) {
    const double out_z = weight_outside(a.taps[0], z, D), in_z = a.taps[0].total - out_z;
    const double total_x = a.taps[2].total;
    double beyond_xy[kLanes<double>], in_zy[kLanes<double>];
    bool inside = true;
    for (int64_t i = 0; i < lanes; ++i) {
      const double out_y = weight_outside(a.taps[1], std::min(y + i, H - 1), H);
      in_zy[i] = in_z * (a.taps[1].total - out_y);
      beyond_xy[i] = (out_z * a.taps[1].total + in_z * out_y) * total_x;
      inside = inside && beyond_xy[i] == 0.0;
    }
    // Those of inner rows are alike.
    if (inside && inner_counts && !kMask) return true;
    inner_counts = inside;
    double* __restrict total = count, * __restrict inverse = count + wide, * __restrict outside = count + 2 * wide;
    const double* __restrict weight = kMask ? box + kWeight * wide : nullptr;
    for (int64_t x = 0; x < W; ++x)
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t at = x * lanes + i;
        outside[at] = a.valid ? 0.0 : beyond_xy[i] + in_zy[i] * outside_x[x];
        if (kMask)
          total[at] = weight[at] + outside[at];
        else
          total[at] = a.valid ? in_zy[i] * (total_x - outside_x[x]) : a.volume;
        inverse[at] = total[at] > 0.0 ? 1.0 / total[at] : 0.0;
      }
    return a.valid || inside;
  }

  // A window that holds a bad sample is NaN, and so is what it passes back.
  void poison() {
    const double *ff = line.ff, *mm = line.mm, *weight = kMask ? box + kWeight * wide : nullptr;
    Vector<double> probes = {};
    double probe = 0.0;
    each_x<double>(0, n, [&](auto v, int64_t x) {
      using V = decltype(v);
      V s = load_as<V>(ff + x) + load_as<V>(mm + x);
      if constexpr (kMask) s += load_as<V>(weight + x);
      if constexpr (std::is_same_v<V, double>)
        probe += s * 0.0;
      else
        probes += s * 0.0;
    });
    if (probe + lane_sum<double>(probes) == 0.0) return;
    for (int64_t x = 0; x < n; ++x) {
      const double s = ff[x] + mm[x] + (kMask ? weight[x] : 0.0);
      if (s - s == 0.0) continue;
      value[x] = kNaN;
      for (int k = 0; k < n_adjoints; ++k)
        adjoint[k * wide + r[2] * lanes + x] = line_up[x] != 0.0 ? kNaN : 0.0;
    }
  }

  void write_adjoints(int p, int64_t z, int64_t y) {
    for (int k = 0; k < n_adjoints; ++k) {
      double* out[kGroup];
      for (int64_t i = 0; i < kGroup; ++i)
        out[i] = y + i < H ? a.adjoints + (k * a.ring + z % a.ring) * H * W + (y + i) * W : beyond;
      along_y.sum(y, H, adjoint_ring[p] + k * stride, adjoint_rows, n_adjoints * stride, nothing, out, W);
    }
  }

  const LccArgs& a;
  const int64_t nc, D, H, W, lanes, n;  // of windows that are done at once: rows, voxels
  Taps along_y;
  int64_t r[3], stride, wide, ring_rows, adjoint_rows, chunk = -1;
  bool inner_counts = false;
  const T *fixed, *moved;
  const A *mask, *upstream;
  int64_t n_adjoints;
  Arena arena;
  Line line;
  Statistics line_statistics[2];
  double *ring[kPlanes], *adjoint_ring[kPlanes];
  double *column, *nothing, *beyond, *outside_x, *crossed, *box, *count, *value, *weights, *line_up, *adjoint;
};

// Gradient of the planes [first, last) of a run of voxels. own, other and mean are the sums of the adjoint
// maps for one image: other is shared by both.
template <class T>
class Gradient {
  using A = arithmetic_t<T>;

 public:
  Gradient(const LccArgs& args, int64_t nc)
      : a(args), plane(a.size[1] * a.size[2]), along_z(a.taps[0], a.radius[0]) {
    const int64_t offset = nc * a.size[0] * plane;
    image[0] = static_cast<const T*>(a.fixed) + offset, image[1] = static_cast<const T*>(a.moved) + offset;
    grad[0] = a.grad_fixed ? static_cast<A*>(a.grad_fixed) + offset : nullptr;
    grad[1] = a.grad_moved ? static_cast<A*>(a.grad_moved) + offset : nullptr;
    mask = a.mask ? static_cast<const A*>(a.mask) + nc / a.c * a.size[0] * plane : nullptr;
    sums.resize(a.n_adjoints * kGroup * kLccRun), nothing.resize(kLccRun);
  }

  void run(int64_t index, int64_t first, int64_t last) {
    const int64_t start = index * kLccRun, n = std::min(kLccRun, plane - start);
    for (int64_t z = first; z < last; z += kGroup) {
      for (int64_t k = 0; k < a.n_adjoints; ++k) {
        double* out[kGroup];
        for (int64_t i = 0; i < kGroup; ++i) out[i] = sum_of(k, i);
        along_z.sum(z, a.size[0], a.adjoints + k * a.ring * plane + start, a.ring, plane, nothing.data(), out,
                    n);
      }
      for (int64_t i = 0; i < std::min<int64_t>(kGroup, last - z); ++i) {
        const int64_t here = (z + i) * plane + start;
        if (grad[0]) write(0, here, n, sum_of(1, i), sum_of(0, i), sum_of(2, i));
        if (grad[1])
          write(1, here, n, sum_of(a.n_adjoints - 2, i), sum_of(0, i), sum_of(a.n_adjoints - 1, i));
      }
    }
  }

 private:
  double* sum_of(int64_t k, int64_t i) { return sums.data() + (k * kGroup + i) * kLccRun; }

  void write(int which, int64_t here, int64_t n, const double* __restrict own, const double* __restrict other,
             const double* __restrict mean) const {
    const T* __restrict self = image[which] + here, * __restrict partner = image[1 - which] + here;
    const A* __restrict weight = mask ? mask + here : nullptr;
    A* __restrict out = grad[which] + here;
    const double c_self = a.reference[which], c_other = a.reference[1 - which];
    // A sample that is not finite must not meet a window that passes 0 to it; the others carry the NaN.
    const auto finite = [](double v) { return v - v == 0 ? v : 0.0; };
#pragma GCC ivdep
    for (int64_t x = 0; x < n; ++x)
      out[x] = A(finite(double(load(self[x])) - c_self) * own[x] +
                 finite(double(load(partner[x])) - c_other) * other[x] - mean[x]);
    if (weight)
      for (int64_t x = 0; x < n; ++x) out[x] = weight[x] == A(0) ? A(0) : A(out[x] * weight[x]);
  }

  const LccArgs& a;
  const int64_t plane;
  Taps along_z;
  const T* image[2];
  A* grad[2];
  const A* mask;
  std::vector<double> sums, nothing;
};

}  // namespace

void lcc_weighted_reference(Stored type, LccArgs& a, int64_t nc) {
  const int64_t volume = a.size[0] * a.size[1] * a.size[2], middle = a.size[0] / 2 / kChunk * kChunk;
  with_type(type, [&]<class T>() {
    const auto* mask = a.mask ? static_cast<const arithmetic_t<T>*>(a.mask) + nc / a.c * volume : nullptr;
    a.reference[0] = chunk_shift(static_cast<const T*>(a.fixed) + nc * volume, mask, a.size, middle);
    a.reference[1] = chunk_shift(static_cast<const T*>(a.moved) + nc * volume, mask, a.size, middle);
  });
}

void lcc_weighted_windows(Stored type, const LccArgs& a, int64_t nc, int64_t begin, int64_t end) {
  with_type(type, [&]<class T>() {
    auto planes = [&](auto windows) {
      for (int64_t z = begin; z < end; z += kPlanes) windows.planes(z, std::min<int64_t>(kPlanes, end - z));
    };
    if (a.mask)
      planes(Windows<T, true>(a, nc));
    else
      planes(Windows<T, false>(a, nc));
  });
}

void lcc_weighted_gradient(Stored type, const LccArgs& a, int64_t nc, int64_t first, int64_t last,
                           int64_t begin, int64_t end) {
  with_type(type, [&]<class T>() {
    Gradient<T> gradient(a, nc);
    for (int64_t run = begin; run < end; ++run) gradient.run(run, first, last);
  });
}

}  // namespace fastreg::FASTREG_ISA

#endif
