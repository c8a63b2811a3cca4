// LCC over weighted (Gaussian, triangular) windows; the bindings are those of lcc_loss.cpp.
#ifdef FASTREG_ISA

#include <algorithm>
#include <utility>

#include "cpu/lcc_rows.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Forward: one plane of windows at a time, planes in any order. Per row: the five moments summed over z
// straight from the images (products of shifted samples cost less than a ring of planes of five moments),
// kept in a ring of some 2 ry + 4 rows in L2; from it the sums over y, four rows of windows at once so that a
// row of the ring is read once for all four, then over x; LCC and its adjoint maps of the line; those summed
// over x and, through a second ring, over y, and written to `adjoints`, a ring of planes. Gradient: the
// adjoints summed over z, four planes at once, and combined with the images, one run of a plane's voxels at a
// time so that the planes' rows stay in L2. The two take turns chunk by chunk. Nothing is computed twice and
// nothing depends on the thread count. Sums are fp64, never subtractive; shift and rule for flat windows are
// those of the box windows. Bytes (r = radius of the taps): each image 2 r + 1 times, from L3 but for once;
// three (both gradients: five) fp64 adjoints written and read once, through L3 or memory; each gradient
// written once. Arithmetic, w = 2 r + 1 taps an axis, one gradient: 12 w fp64 operations a voxel for the sums
// over z, 2 w for each of two axes of 5 moments and three axes of 3 adjoints. w = 21, AVX2 at two additions
// and two products a cycle: 19 + 26 + 24 cycles a voxel and some 20 for the statistics: 160^3 needs 65 ms of
// two cores at 2.8 GHz.

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 4)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes / 2)));
typedef float Floats __attribute__((vector_size(kVectorBytes / 2)));

// kLanes<double> stored samples as fp64.
template <class V, class T>
FASTREG_HD V widen(const T* p) {
  if constexpr (std::is_same_v<V, double>) {
    return double(load(*p));
  } else if constexpr (std::is_same_v<T, double>) {
    return load_as<V>(p);
  } else {
    Floats f;
    if constexpr (std::is_same_v<T, float>) {
      std::memcpy(&f, p, sizeof(f));
    } else if constexpr (std::is_same_v<T, bfloat16_t>) {
      Bits16 bits;
      std::memcpy(&bits, p, sizeof(bits));
      f = Floats(__builtin_convertvector(bits, Bits32) << 16);
    } else {
#if defined(__AVX512F__)
      f = Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__F16C__)
      f = Floats(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
      for (int i = 0; i < kLanes<double>; ++i) f[i] = load(p[i]);
#endif
    }
    return __builtin_convertvector(f, V);
  }
}

template <int kCount>
struct Count {};

// Calls body(V(), Count<n>(), x) for blocks of n vectors from x on: kBlock of them, then single ones, the
// last of which overlaps the one before; single voxels where there is not one vector.
template <class A, int kBlock, class Body>
FASTREG_HD void cover_blocks(int64_t n, Body body) {
  if (n < kLanes<A>) {
    for (int64_t x = 0; x < n; ++x) body(A(), Count<1>(), x);
    return;
  }
  int64_t x = 0;
  for (; x + kBlock * kLanes<A> <= n; x += kBlock * kLanes<A>) body(Vector<A>(), Count<kBlock>(), x);
  for (; x < n; x += kLanes<A>) body(Vector<A>(), Count<1>(), std::min(x, n - kLanes<A>));
}

// out[i] = tap[0] row[i] + ... + tap[2 r] row[i + 2 r] for i < kRows: a row is loaded once for all that it
// enters, and enters nothing else, for it may hold a NaN. kRows = 4 needs r >= 2.
template <int kRows>
void sum_rows(const double* const* row, const double* tap, int64_t r, double* const* out, int64_t n) {
  cover_blocks<double, kRows == 1 ? 4 : 2>(n, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
    constexpr int kStep = sizeof(V) / sizeof(double);
    V sum[kRows][kCount] = {};
    auto take = [&]<int kFirst, int kLast>(std::integer_sequence<int, kFirst, kLast>, int64_t t) {
      for (int u = 0; u < kCount; ++u) {
        const V sample = load_as<V>(row[t] + x + u * kStep);
        for (int i = kFirst; i <= kLast; ++i) sum[i][u] += sample * tap[t - i];
      }
    };
    if constexpr (kRows == 4) {
      take(std::integer_sequence<int, 0, 0>(), 0);
      take(std::integer_sequence<int, 0, 1>(), 1);
      take(std::integer_sequence<int, 0, 2>(), 2);
    }
    for (int64_t t = kRows - 1; t <= 2 * r; ++t) take(std::integer_sequence<int, 0, kRows - 1>(), t);
    if constexpr (kRows == 4) {
      take(std::integer_sequence<int, 1, 3>(), 2 * r + 1);
      take(std::integer_sequence<int, 2, 3>(), 2 * r + 2);
      take(std::integer_sequence<int, 3, 3>(), 2 * r + 3);
    }
    for (int i = 0; i < kRows; ++i)
      for (int u = 0; u < kCount; ++u) store_as(out[i] + x + u * kStep, sum[i][u]);
  });
}

// Sums along one axis.
class Taps {
 public:
  Taps(const LccTaps& t, int64_t r_) : r(r_), block(r >= 2 ? 4 : 1), tap(2 * r + 1), row(2 * r + block) {
    for (int64_t k = -r; k <= r; ++k) tap[k + r] = t.tap[std::abs(k)];
  }

  // out[i] = sum over the rows around the one at i, first <= i < first + block. Row i lies at base + i % ring
  // * step; `nothing` stands for those outside [0, size).
  void sum(int64_t first, int64_t size, const double* base, int64_t ring, int64_t step, const double* nothing,
           double* const* out, int64_t n) {
    int64_t i = first - r, slot = std::max<int64_t>(i, 0) % ring;
    for (auto& pointer : row) {
      const bool inside = i >= 0 && i < size;
      pointer = inside ? base + slot * step : nothing;
      if (inside && ++slot == ring) slot = 0;
      ++i;
    }
    if (block == 4)
      sum_rows<4>(row.data(), tap.data(), r, out, n);
    else
      sum_rows<1>(row.data(), tap.data(), r, out, n);
  }

  // Along a row that has r zeros on both sides.
  void sum_along(const double* in, double* out, int64_t n) {
    for (int64_t t = 0; t <= 2 * r; ++t) row[t] = in + t - r;
    sum_rows<1>(row.data(), tap.data(), r, &out, n);
  }

  const int64_t r, block;

 private:
  std::vector<double> tap;
  std::vector<const double*> row;
};

double weight_outside(const LccTaps& t, int64_t i, int64_t size) {
  return t.tail[std::min(i + 1, t.length)] + t.tail[std::min(size - i, t.length)];
}

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
        along_y(a.taps[1], a.radius[1]),
        along_x(a.taps[2], a.radius[2]) {
    for (int k = 0; k < 3; ++k) r[k] = a.radius[k];
    fixed = static_cast<const T*>(a.fixed) + nc * D * H * W;
    moved = static_cast<const T*>(a.moved) + nc * D * H * W;
    mask = kMask ? static_cast<const A*>(a.mask) + nc / a.c * D * H * W : nullptr;
    upstream = a.upstream ? static_cast<const A*>(a.upstream) + nc / a.c * D * H * W : mask;
    n_adjoints = a.n_adjoints;
    // Rows that are summed along x carry rx zeros on both sides.
    stride = (W + 2 * r[2] + 15) / 8 * 8;
    ring_rows = 2 * r[1] + along_y.block, adjoint_rows = 2 * (r[1] + along_y.block);
    ring = zeros(ring_rows * kMoments), column = zeros(along_y.block * kMoments), box = zeros(kMoments);
    nothing = zeros(1), beyond = zeros(1), count = zeros(3), outside_x = zeros(1), largest = zeros(2);
    value = zeros(1), line_up = zeros(1), adjoint = zeros(n_adjoints);
    adjoint_ring = zeros(adjoint_rows * n_adjoints);
    for (int64_t x = 0; x < W; ++x) outside_x[x] = weight_outside(a.taps[2], x, W);
    for (int padded = 0; padded < 2; ++padded)
      line_statistics[padded] = statistics_for(a.denominator, a.squared, a.grad_fixed, a.grad_moved, padded);
    prepare_line();
  }

  void plane(int64_t z) {
    choose_shift(z);
    const int64_t block = along_y.block;
    double sum = 0.0;
    int64_t read = 0, written = 0;  // rows summed over z, rows of adjoints written
    for (int64_t y = 0; y < H; y += block) {
      const int64_t end = std::min(y + block, H);
      for (; read < std::min(end + r[1], H); ++read) sum_z(z, read);
      sum_y(y);
      for (int64_t row = y; row < end; ++row) sum += line_of(z, row, column + (row - y) * kMoments * stride);
      if (n_adjoints)
        for (; written < H && (end == H || written + block + r[1] <= end); written += block)
          write_adjoints(z, written);
    }
    a.sums[nc * D + z] = -sum;
  }

 private:
  static constexpr int kMoments = 5 + kMask;  // f, m, ff, mm, fm, weight
  static constexpr int kWeight = 5;

  double* zeros(int64_t rows) {
    double* p = arena.rows(rows, stride);
    std::fill_n(p, rows * stride, 0.0);
    return p;
  }
  int64_t at(int64_t z, int64_t y) const { return (z * H + y) * W; }
  double* ring_row(int64_t y) const { return ring + y % ring_rows * kMoments * stride; }
  double* adjoint_row(int64_t y) const { return adjoint_ring + y % adjoint_rows * n_adjoints * stride; }

  void prepare_line() {
    line = {};
    line.f = box, line.m = box + stride, line.ff = box + 2 * stride, line.mm = box + 3 * stride,
    line.fm = box + 4 * stride;
    line.count = count, line.inverse = count + stride, line.outside = count + 2 * stride;
    line.peak_f = largest, line.peak_m = largest + stride, line.upstream = line_up, line.value = value;
    auto map = [&](int k) { return adjoint + k * stride + r[2]; };
    if (n_adjoints) line.e = map(0);
    if (a.grad_fixed) line.a = map(1), line.mean_f = map(2);
    if (a.grad_moved) line.b = map(n_adjoints - 2), line.mean_m = map(n_adjoints - 1);
    line.rule = a.rule, line.least = a.least;
    std::fill_n(line_up, W, -1.0);
  }

  void choose_shift(int64_t z) {
    if (z / kChunk == chunk) return;
    chunk = z / kChunk;
    line.shift[0] = chunk_shift(fixed, mask, a.size, chunk * kChunk);
    line.shift[1] = chunk_shift(moved, mask, a.size, chunk * kChunk);
    for (int k = 0; k < 2; ++k) line.to_reference[k] = line.shift[k] - a.reference[k];
  }

  // The moments of row y summed over the planes of the windows of plane z. Outside the mask nothing is looked
  // at, not even a NaN.
  void sum_z(int64_t z, int64_t y) {
    double* __restrict out = ring_row(y);
    const int64_t begin = std::max<int64_t>(z - r[0], 0), end = std::min(z + r[0], D - 1), skip = H * W;
    const double cf = line.shift[0], cm = line.shift[1];
    const double* tap = a.taps[0].tap;
    const T *f_row = fixed + at(begin, y), *m_row = moved + at(begin, y);
    const A* k_row = kMask ? mask + at(begin, y) : nullptr;
    cover_blocks<double, 2>(W, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
      constexpr int kStep = sizeof(V) / sizeof(double);
      V sum[kMoments][kCount] = {};
      const T *f_at = f_row + x, *m_at = m_row + x;
      const A* k_at = k_row + (kMask ? x : 0);
      for (int64_t k = begin; k <= end; ++k, f_at += skip, m_at += skip) {
        const double weight = tap[k < z ? z - k : k - z];
        // The next row of a plane: too many planes for the hardware to follow.
        __builtin_prefetch(f_at + W), __builtin_prefetch(m_at + W);
        for (int u = 0; u < kCount; ++u) {
          V f = widen<V>(f_at + u * kStep) - cf, m = widen<V>(m_at + u * kStep) - cm, wf, wm;
          if constexpr (kMask) {
            const V inside = widen<V>(k_at + u * kStep), w = weight * inside;
            f = inside == 0.0 ? V{} : f, m = inside == 0.0 ? V{} : m;
            wf = w * f, wm = w * m;
            sum[5][u] += w;
          } else {
            wf = weight * f, wm = weight * m;
          }
          sum[0][u] += wf, sum[1][u] += wm, sum[2][u] += wf * f, sum[3][u] += wm * m, sum[4][u] += wf * m;
        }
        if constexpr (kMask) k_at += skip;
      }
      for (int k = 0; k < kMoments; ++k)
        for (int u = 0; u < kCount; ++u) store_as(out + k * stride + x + u * kStep, sum[k][u]);
    });
  }

  void sum_y(int64_t y) {
    for (int k = 0; k < kMoments; ++k) {
      double* out[4];
      for (int64_t i = 0; i < along_y.block; ++i) out[i] = column + (i * kMoments + k) * stride + r[2];
      along_y.sum(y, H, ring + k * stride, ring_rows, kMoments * stride, nothing, out, W);
    }
  }

  // Returns the line's sum of mask * LCC; its adjoint maps, summed over x, enter their ring.
  double line_of(int64_t z, int64_t y, const double* sums) {
    for (int k = 0; k < kMoments; ++k) along_x.sum_along(sums + k * stride + r[2], box + k * stride, W);
    const bool all_inside = window_counts(z, y);
    const int64_t here = at(z, y);
    if (upstream) {
      const double scale = a.upstream ? -1.0 / double(a.c) : -1.0;
      for (int64_t x = 0; x < W; ++x) line_up[x] = scale * double(upstream[here + x]);
    }
    std::fill_n(largest, 2 * stride, 0.0);
    // Away from the faces only the ends of a line have padded samples.
    const int64_t reach = a.valid ? 0 : a.taps[2].length - 1, left = all_inside ? std::min(reach, W) : W,
                  right = std::max(left, W - reach);
    line_statistics[1](line, 0, left);
    line_statistics[0](line, left, right);
    line_statistics[1](line, right, W);
    poison();
    for (int k = 0; k < n_adjoints; ++k)
      along_x.sum_along(adjoint + k * stride + r[2], adjoint_row(y) + k * stride, W);
    return collect(value, kMask ? mask + here : nullptr,
                   a.map ? static_cast<A*>(a.map) + nc * D * H * W + here : nullptr, double(a.c), W);
  }

  // n, 1 / n and the weight of the padded samples of each window: sums of positive terms, so exactly 0 where
  // there are none. True where only the ends of the line have any.
  bool window_counts(int64_t z, int64_t y) {
    const double out_z = weight_outside(a.taps[0], z, D), out_y = weight_outside(a.taps[1], y, H);
    const double in_z = a.taps[0].total - out_z, in_zy = in_z * (a.taps[1].total - out_y),
                 total_x = a.taps[2].total;
    const double beyond = (out_z * a.taps[1].total + in_z * out_y) * total_x;
    double* __restrict total = count, * __restrict inverse = count + stride, * __restrict outside = count + 2 * stride;
    const double* __restrict out_x = outside_x;
    const double* __restrict weight = kMask ? box + kWeight * stride : nullptr;
    const int64_t width = W;
    for (int64_t x = 0; x < width; ++x) {
      outside[x] = a.valid ? 0.0 : beyond + in_zy * out_x[x];
      if (kMask)
        total[x] = weight[x] + outside[x];
      else
        total[x] = a.valid ? in_zy * (total_x - out_x[x]) : a.volume;
      inverse[x] = total[x] > 0.0 ? 1.0 / total[x] : 0.0;
    }
    return a.valid || beyond == 0.0;
  }

  // A window that holds a bad sample is NaN, and so is what it passes back.
  void poison() {
    const double* __restrict ff = line.ff, * __restrict mm = line.mm;
    double probe = 0.0;
    for (int64_t x = 0; x < W; ++x) probe += (ff[x] + mm[x]) * 0.0;
    const double* weight = kMask ? box + kWeight * stride : nullptr;
    for (int64_t x = 0; kMask && x < W; ++x) probe += weight[x] * 0.0;
    if (probe == 0.0) return;
    for (int64_t x = 0; x < W; ++x) {
      const double s = ff[x] + mm[x] + (kMask ? weight[x] : 0.0);
      if (s - s == 0.0) continue;
      value[x] = kNaN;
      for (int k = 0; k < n_adjoints; ++k) adjoint[k * stride + r[2] + x] = line_up[x] != 0.0 ? kNaN : 0.0;
    }
  }

  void write_adjoints(int64_t z, int64_t y) {
    for (int k = 0; k < n_adjoints; ++k) {
      double* out[4];
      for (int64_t i = 0; i < along_y.block; ++i)
        out[i] = y + i < H ? a.adjoints + (k * a.ring + z % a.ring) * H * W + (y + i) * W : beyond;
      along_y.sum(y, H, adjoint_ring + k * stride, adjoint_rows, n_adjoints * stride, nothing, out, W);
    }
  }

  const LccArgs& a;
  const int64_t nc, D, H, W;
  Taps along_y, along_x;
  int64_t r[3], stride, ring_rows, adjoint_rows, chunk = -1;
  const T *fixed, *moved;
  const A *mask, *upstream;
  int64_t n_adjoints;
  Arena arena;
  Line line;
  Statistics line_statistics[2];
  double *ring, *column, *box, *nothing, *beyond, *count, *outside_x, *largest, *value, *line_up, *adjoint,
      *adjoint_ring;
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
    sums.resize(a.n_adjoints * along_z.block * kLccRun), nothing.resize(kLccRun);
  }

  void run(int64_t index, int64_t first, int64_t last) {
    const int64_t start = index * kLccRun, n = std::min(kLccRun, plane - start), block = along_z.block;
    for (int64_t z = first; z < last; z += block) {
      for (int64_t k = 0; k < a.n_adjoints; ++k) {
        double* out[4];
        for (int64_t i = 0; i < block; ++i) out[i] = sum_of(k, i);
        along_z.sum(z, a.size[0], a.adjoints + k * a.ring * plane + start, a.ring, plane, nothing.data(), out,
                    n);
      }
      for (int64_t i = 0; i < std::min(block, last - z); ++i) {
        const int64_t here = (z + i) * plane + start;
        if (grad[0]) write(0, here, n, sum_of(1, i), sum_of(0, i), sum_of(2, i));
        if (grad[1])
          write(1, here, n, sum_of(a.n_adjoints - 2, i), sum_of(0, i), sum_of(a.n_adjoints - 1, i));
      }
    }
  }

 private:
  double* sum_of(int64_t k, int64_t i) { return sums.data() + (k * along_z.block + i) * kLccRun; }

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
      for (int64_t z = begin; z < end; ++z) windows.plane(z);
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
