// LCC over box windows; the bindings are those of lcc_loss.cpp.
#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/lcc_rows.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kReseed = 64;  // rows between two seeds of the row sums; of the column sums: kChunk planes

void add(double* __restrict out, const double* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += in[i];
}
void subtract(double* __restrict out, const double* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] -= in[i];
}

// out[i] = in[i] + ... + in[i + window - 1], never subtractive: partial sums of 4, 16, 64 ... samples, then
// the base-4 digits of the window. in holds n + window - 1 values; spare is a row of partial sums. All rows
// stay in L1.
void box_row(const double* __restrict in, double* __restrict out, double* __restrict spare, int64_t n,
             int64_t window) {
  const int64_t total = n + window - 1;
  int64_t span = 1, offset = 0;
  bool first = true;
  for (const double* partial = in;;) {
    const int64_t digit = window / span % 4;
    const double* p = partial + offset;
    if (digit == 1 && first)
      std::copy_n(p, n, out);
    else if (digit == 1)
      for (int64_t i = 0; i < n; ++i) out[i] += p[i];
    else if (digit == 2 && first)
      for (int64_t i = 0; i < n; ++i) out[i] = p[i] + p[i + span];
    else if (digit == 2)
      for (int64_t i = 0; i < n; ++i) out[i] += p[i] + p[i + span];
    else if (digit == 3 && first)
      for (int64_t i = 0; i < n; ++i) out[i] = p[i] + p[i + span] + p[i + 2 * span];
    else if (digit == 3)
      for (int64_t i = 0; i < n; ++i) out[i] += p[i] + p[i + span] + p[i + 2 * span];
    first = first && digit == 0;
    offset += digit * span;
    if (4 * span > window) return;
    const int64_t left = total - 4 * span + 1;
#pragma GCC ivdep
    for (int64_t i = 0; i < left; ++i)
      spare[i] = (partial[i] + partial[i + span]) + (partial[i + 2 * span] + partial[i + 3 * span]);
    partial = spare;
    span *= 4;
  }
}

// One slab of one channel: a march along z. Per plane: column sums over z (the entering plane less the
// leaving one, fp64), from them running row sums over y, from them box sums along x; LCC and its adjoint maps
// of a line, and the same three sums over the adjoints, whose z sums lag rz planes. No map is written to
// memory: the state is rows, a ring of 2 ry + 1 rows and a ring of 2 rz + 1 planes. Bytes: fixed and moved
// are read entering, leaving and for the gradient (the last two from cache), each gradient is written once.
// Floor by bytes: 2 reads, and 1 write per gradient. Floor by arithmetic: about 110 fp64 operations a voxel
// for one gradient, independent of the window but for some 2 log4(window) additions in each of the box sums
// along x. Shift: one per chunk of 32 planes (the mean of its central 32 x 32 patch). fp64 sums resolve
// deviations of 5e-7 of the distance to the shift, about what an fp32 image can hold, so a shift per tile in
// y and x would buy nothing.
template <class T, bool kMask, bool kNonFinite>
class Slab {
  using A = arithmetic_t<T>;

 public:
  Slab(const LccArgs& args, int64_t unit_)
      : a(args),
        unit(unit_),
        nc(unit / args.n_slabs),
        n(nc / args.c),
        D(a.size[0]),
        H(a.size[1]),
        W(a.size[2]) {
    const int64_t slab = unit % a.n_slabs;
    for (int k = 0; k < 3; ++k) r[k] = std::min(a.radius[k], a.size[k] - 1);
    begin = a.n_chunks * slab / a.n_slabs, end = a.n_chunks * (slab + 1) / a.n_slabs;
    fixed = static_cast<const T*>(a.fixed) + nc * D * H * W;
    moved = static_cast<const T*>(a.moved) + nc * D * H * W;
    mask = kMask ? static_cast<const A*>(a.mask) + n * D * H * W : nullptr;
    upstream = a.upstream ? static_cast<const A*>(a.upstream) + n * D * H * W : mask;
    want_fixed = a.grad_fixed, want_moved = a.grad_moved;
    n_adjoints = want_fixed && want_moved ? 5 : want_fixed || want_moved ? 3 : 0;
    // A gradient needs the windows of rz planes on both sides: with the first of them a chunk begins.
    first = start(begin), last = n_adjoints ? std::min(D * end / a.n_chunks + r[0], D) : start(end);
    z0 = n_adjoints ? D * begin / a.n_chunks : first, z1 = n_adjoints ? D * end / a.n_chunks : last;
    if (n_adjoints && kNonFinite) bad_adjoint = n_adjoints++;
    stride = (W + 2 * r[2] + 15) / 8 * 8;
    column = zeros(H * kMoments), running = zeros(kMoments), box = zeros(kMoments), spare = zeros(1);
    nothing = zeros(kMoments);
    count_x = zeros(2), count = zeros(3), largest = zeros(2), value = zeros(1), line_up = zeros(1);
    adjoint = zeros(n_adjoints), adjoint_y = zeros(n_adjoints), fresh = zeros(n_adjoints);
    ring_y = zeros((2 * r[1] + 1) * n_adjoints), adjoint_z = zeros(H * n_adjoints);
    ring_z = arena.rows((2 * r[0] + 1) * H * n_adjoints, stride);
    for (int padded = 0; padded < 2; ++padded)
      line_statistics[padded] = statistics_for(a.denominator, a.squared, want_fixed, want_moved, padded);
    prepare_line();
  }

  // False where a non-finite sample entered: the slab must be done again with kNonFinite.
  bool run() {
    for (int64_t x = 0; x < W; ++x) {
      count_x[x] = double(std::min(x + r[2], W - 1) - std::max<int64_t>(x - r[2], 0) + 1);
      count_x[stride + x] = 1.0 / count_x[x];
    }
    choose_shift(0, true);
    // Shift and seeds belong to chunks, which do not move with the number of threads; slabs are made of them.
    for (int64_t k = begin; k < a.n_chunks && start(k) < last; ++k) {
      const int64_t chunk = start(k), stop = std::min(start(k + 1), last);
      if (stop <= chunk) continue;
      choose_shift(chunk, false);
      std::fill_n(largest, 2 * stride, 0.0);
      for (int64_t z = chunk; z < stop; ++z) {
        const double sum = plane(z, z == chunk);
        if (z >= z0 && z < z1) a.sums[nc * D + z] = -sum;
      }
      if (!kNonFinite && !finite_columns()) return false;
    }
    if (n_adjoints)
      for (int64_t z = last; z < z1 + r[0]; ++z)
        for (int64_t y = 0; y < H; ++y) accumulate_z(z, y, nullptr);
    return true;
  }

 private:
  static constexpr int kMoments = 5 + kMask + kNonFinite;  // f, m, ff, mm, fm, weight, bad
  static constexpr int kWeight = 5, kBad = 5 + kMask;

  double* zeros(int64_t count_) {
    double* p = arena.rows(count_, stride);
    std::fill_n(p, count_ * stride, 0.0);
    return p;
  }

  // First plane of a chunk: of those whose windows the planes D k / n_chunks and on need.
  int64_t start(int64_t k) const {
    return k == 0 ? 0 : k == a.n_chunks ? D : std::max<int64_t>(D * k / a.n_chunks - r[0], 0);
  }
  // Whether the windows of the planes from a chunk's first one on are complete with plane z: there the sums
  // over them are added up anew.
  bool completes_chunk(int64_t z) const {
    const int64_t plane = z - 2 * r[0];
    if (plane <= first) return false;
    const int64_t k = ((plane + r[0]) * a.n_chunks + D - 1) / D;
    return k < a.n_chunks && start(k) == plane;
  }

  int64_t at(int64_t z, int64_t y) const { return (z * H + y) * W; }
  double* column_of(int64_t y) const { return column + y * kMoments * stride; }

  void prepare_line() {
    line = {};
    line.f = box, line.m = box + stride, line.ff = box + 2 * stride, line.mm = box + 3 * stride,
    line.fm = box + 4 * stride;
    line.count = count, line.inverse = count + stride, line.outside = count + 2 * stride;
    line.peak_f = largest, line.peak_m = largest + stride, line.upstream = line_up, line.value = value;
    // Adjoint rows carry a margin of rx zeros on both sides for their box sums.
    auto map = [&](int k) { return adjoint + k * stride + r[2]; };
    if (n_adjoints) line.e = map(0);
    if (want_fixed) line.a = map(1), line.mean_f = map(2);
    if (want_moved) line.b = map(want_fixed ? 3 : 1), line.mean_m = map(want_fixed ? 4 : 2);
    line.rule = a.rule, line.least = a.least;
    std::fill_n(line_up, W, -1.0);
  }

  void choose_shift(int64_t chunk, bool is_first) {
    const T* image[2] = {fixed, moved};
    for (int k = 0; k < 2; ++k) {
      line.shift[k] = chunk_shift(image[k], mask, a.size, chunk);
      if (is_first) reference[k] = line.shift[k];
      line.to_reference[k] = line.shift[k] - reference[k];
    }
  }

  bool finite_columns() const {
    double probe = 0.0;
    for (int64_t y = 0; y < H; ++y)
      for (int k = 2; k < 4; ++k) {
        const double* row = column_of(y) + k * stride;
        for (int64_t x = 0; x < W; ++x) probe += row[x] * 0.0;
      }
    return probe == 0.0;
  }

  // column[y] += (or -=) the moments of row y of plane z.
  template <int kSign>
  void enter(int64_t z, int64_t y) {
    const T* __restrict fixed_row = fixed + at(z, y), * __restrict moved_row = moved + at(z, y);
    const A* __restrict mask_row = kMask ? mask + at(z, y) : nullptr;
    const double cf = line.shift[0], cm = line.shift[1];
    double* __restrict c = column_of(y);
    const int64_t k = stride, width = W;
#pragma GCC ivdep
    for (int64_t x = 0; x < width; ++x) {
      double weight = kMask ? double(mask_row[x]) : 1.0;
      double f = double(load(fixed_row[x])) - cf, m = double(load(moved_row[x])) - cm;
      if (kNonFinite || kMask) {
        const double probe = f * f + m * m;
        // Outside the mask nothing is looked at, not even a NaN; a weight that is one counts as such a
        // sample.
        const double all = kMask ? probe + weight : probe;
        const bool bad = kNonFinite && weight != 0.0 && !(all - all == 0.0);
        const bool drop = bad || weight == 0.0;
        weight = drop ? 0.0 : weight, f = drop ? 0.0 : f, m = drop ? 0.0 : m;
        if (kNonFinite) c[kBad * k + x] += bad ? double(kSign) : 0.0;
        if (kMask) c[kWeight * k + x] += kSign * weight;
      }
      const double kf = kSign * weight * f, km = kSign * weight * m;
      const double c0 = c[x] + kf, c1 = c[k + x] + km, c2 = c[2 * k + x] + kf * f;
      const double c3 = c[3 * k + x] + km * m, c4 = c[4 * k + x] + kf * m;
      c[x] = c0, c[k + x] = c1, c[2 * k + x] = c2, c[3 * k + x] = c3, c[4 * k + x] = c4;
    }
  }

  // The common case in one pass over row y: plane `in` enters the column sums, plane `out` leaves them, and
  // the running row sums gain this row and lose the row `leaving`.
  void slide(int64_t in, int64_t out, int64_t y, const double* leaving) {
    const double cf = line.shift[0], cm = line.shift[1];
    const T* __restrict fi = fixed + at(in, y), * __restrict mi = moved + at(in, y);
    const T* __restrict fo = fixed + at(out, y), * __restrict mo = moved + at(out, y);
    double* __restrict c = column_of(y), * __restrict s = running + r[2];
    const int64_t k = stride, width = W;
    for (const T* row : {fi, mi, fo, mo}) ask<false>(row + width, width);
#pragma GCC ivdep
    for (int64_t x = 0; x < width; ++x) {
      const double f = double(load(fi[x])) - cf, m = double(load(mi[x])) - cm;
      const double g = double(load(fo[x])) - cf, h = double(load(mo[x])) - cm;
      const double c0 = c[x] + (f - g), c1 = c[k + x] + (m - h), c2 = c[2 * k + x] + (f * f - g * g);
      const double c3 = c[3 * k + x] + (m * m - h * h), c4 = c[4 * k + x] + (f * m - g * h);
      c[x] = c0, c[k + x] = c1, c[2 * k + x] = c2, c[3 * k + x] = c3, c[4 * k + x] = c4;
      s[x] += c0 - leaving[x], s[k + x] += c1 - leaving[k + x], s[2 * k + x] += c2 - leaving[2 * k + x];
      s[3 * k + x] += c3 - leaving[3 * k + x], s[4 * k + x] += c4 - leaving[4 * k + x];
    }
  }

  void update_column(int64_t z, int64_t y, bool seed) {
    if (seed) {
      std::fill_n(column_of(y), kMoments * stride, 0.0);
      for (int64_t k = std::max<int64_t>(z - r[0], 0); k <= std::min(z + r[0], D - 1); ++k) enter<1>(k, y);
      return;
    }
    if (z + r[0] < D) enter<1>(z + r[0], y);
    if (z - r[0] - 1 >= 0) enter<-1>(z - r[0] - 1, y);
  }

  // Running sums of the rows y - ry .. y + ry.
  void update_running(int64_t z, int64_t y, bool seed) {
    const int64_t ry = r[1], in = z + r[0], out = z - r[0] - 1;
    const double* leaving = y - ry - 1 >= 0 ? column_of(y - ry - 1) : nothing;
    const bool reseed = y % kReseed == 0;
    if (!kMask && !kNonFinite && !seed && !reseed && in < D && out >= 0 && y + ry < H)
      return slide(in, out, y + ry, leaving);
    if (y + ry < H) update_column(z, y + ry, seed);
    for (int k = 0; k < kMoments; ++k) {
      double* s = running + k * stride + r[2];
      if (reseed) {
        std::fill_n(s, W, 0.0);
        for (int64_t i = std::max<int64_t>(y - ry, 0); i <= std::min(y + ry, H - 1); ++i)
          add(s, column_of(i) + k * stride, W);
      } else {
        if (y + ry < H) add(s, column_of(y + ry) + k * stride, W);
        subtract(s, leaving + k * stride, W);
      }
    }
  }

  // Returns the plane's sum of mask * LCC, 0 for planes of the halo.
  double plane(int64_t z, bool seed) {
    const int64_t ry = r[1];
    double sum = 0.0;
    for (int64_t y = 0; y < ry; ++y) update_column(z, y, seed);
    if (n_adjoints) std::fill_n(adjoint_y, n_adjoints * stride, 0.0);
    for (int64_t y = 0; y < H; ++y) {
      update_running(z, y, seed);
      for (int k = 0; k < kMoments; ++k)
        box_row(running + k * stride, box + k * stride, spare, W, 2 * r[2] + 1);
      const bool all_inside = window_counts(z, y);
      if (upstream) {
        const A* up = upstream + at(z, y);
        const double scale = a.upstream ? -1.0 / double(a.c) : -1.0;
        for (int64_t x = 0; x < W; ++x) line_up[x] = scale * double(up[x]);
      }
      // Away from the faces only the ends of a line have padded samples.
      const int64_t left = all_inside ? std::min(a.valid ? 0 : a.radius[2], W) : W,
                    right = std::max(left, a.valid ? W : W - a.radius[2]);
      line_statistics[1](line, 0, left);
      line_statistics[0](line, left, right);
      line_statistics[1](line, right, W);
      if (kNonFinite) poison();
      if (z >= z0 && z < z1)
        sum += collect(value, kMask ? mask + at(z, y) : nullptr,
                       a.map ? static_cast<A*>(a.map) + nc * D * H * W + at(z, y) : nullptr, double(a.c), W);
      if (n_adjoints) accumulate_y(z, y, true);
    }
    if (n_adjoints)
      for (int64_t y = H; y < H + ry; ++y) accumulate_y(z, y, false);
    return sum;
  }

  // count: n, 1 / n and the weight of the padded samples of each window. True where only the ends of the line
  // have any.
  bool window_counts(int64_t z, int64_t y) {
    const double zy = double(std::min(z + r[0], D - 1) - std::max<int64_t>(z - r[0], 0) + 1) *
                      double(std::min(y + r[1], H - 1) - std::max<int64_t>(y - r[1], 0) + 1);
    const bool inside = a.valid || zy == double(2 * a.radius[0] + 1) * double(2 * a.radius[1] + 1);
    if (!kMask && zy == counted_zy) return inside;
    counted_zy = zy;
    double* __restrict total = count, * __restrict inverse = count + stride, * __restrict outside = count + 2 * stride;
    for (int64_t x = 0; x < W; ++x) outside[x] = a.valid ? 0.0 : a.volume - zy * count_x[x];
    if constexpr (kMask) {
      const double* weight = box + kWeight * stride;
      for (int64_t x = 0; x < W; ++x) {
        total[x] = weight[x] + outside[x];
        inverse[x] = total[x] > 0.0 ? 1.0 / total[x] : 0.0;
      }
    } else {
      for (int64_t x = 0; x < W; ++x) {
        total[x] = a.valid ? zy * count_x[x] : a.volume;
        inverse[x] = 1.0 / total[x];
      }
    }
    return inside;
  }

  // A window that holds a bad sample is NaN and passes nothing back but that it is bad.
  void poison() {
    const double* bad = box + kBad * stride;
    for (int64_t x = 0; x < W; ++x) {
      const bool is_bad = bad[x] > 0.5;
      if (is_bad) value[x] = kNaN;
      for (int k = 0; is_bad && k < n_adjoints; ++k) adjoint[k * stride + r[2] + x] = 0.0;
      if (n_adjoints) adjoint[bad_adjoint * stride + r[2] + x] = is_bad && line_up[x] != 0.0 ? 1.0 : 0.0;
    }
  }

  // Adjoint rows: box along x, running sum along y. Row y completes row y - ry of plane z.
  void accumulate_y(int64_t z, int64_t y, bool entering) {
    const int64_t ry = r[1];
    double* slot = ring_y + (y % (2 * ry + 1)) * n_adjoints * stride;
    const bool leaving = y >= 2 * ry + 1;
    for (int k = 0; k < n_adjoints; ++k) {
      double* __restrict total = adjoint_y + k * stride, * __restrict old = slot + k * stride, * __restrict now = fresh;
      if (entering) box_row(adjoint + k * stride, now, spare, W, 2 * r[2] + 1);
      if (entering && leaving)
        for (int64_t x = 0; x < W; ++x) total[x] += now[x] - old[x];
      else if (entering)
        add(total, now, W);
      else if (leaving)
        subtract(total, old, W);
      if (entering) std::copy_n(now, W, old);
    }
    if (y >= ry) accumulate_z(z, y - ry, adjoint_y);
  }

  // Running sum along z of plane z (none past the image: row is null), which completes plane z - rz of the
  // gradient.
  void accumulate_z(int64_t z, int64_t y, const double* __restrict row) {
    const int64_t rz = r[0], width = n_adjoints * stride;
    double* __restrict total = adjoint_z + y * width;
    double* __restrict slot = ring_z + ((z % (2 * rz + 1)) * H + y) * width;
    const bool leaving = z - first >= 2 * rz + 1;
    ask<true>(slot + width, width), ask<true>(total + width, width);
    if (leaving && completes_chunk(z)) {
      if (row) std::copy_n(row, width, slot);
      std::fill_n(total, width, 0.0);
      for (int64_t i = z - 2 * rz; i <= std::min(z, D - 1); ++i)
        add(total, ring_z + ((i % (2 * rz + 1)) * H + y) * width, width);
    } else if (row && leaving) {
      for (int64_t i = 0; i < width; ++i) {
        total[i] += row[i] - slot[i];
        slot[i] = row[i];
      }
    } else if (row) {
      add(total, row, width);
      std::copy_n(row, width, slot);
    } else if (leaving) {
      subtract(total, slot, width);
    }
    const int64_t zo = z - rz;
    if (zo >= z0 && zo < z1) write_gradient(zo, y, total);
  }

  void write_gradient(int64_t z, int64_t y, const double* total) {
    const int64_t here = at(z, y), offset = nc * D * H * W + here, width = W;
    for (int image = 0; image < 2; ++image) {
      if (!(image ? want_moved : want_fixed)) continue;
      const double* __restrict e = total;
      const double* __restrict own = total + (image && want_fixed ? 3 : 1) * stride;
      const double* __restrict mean = own + stride;
      A* __restrict out = static_cast<A*>(image ? a.grad_moved : a.grad_fixed) + offset;
      const T* __restrict self = (image ? moved : fixed) + here, * __restrict other =
                                                                     (image ? fixed : moved) + here;
      ask<false>(self + width, width), ask<false>(other + width, width), ask<true>(out + width, width);
      const double c_self = reference[image], c_other = reference[1 - image];
      // A sample that is not finite must not meet a window that passes 0 to it; the others carry the NaN.
      const auto finite = [](double v) { return !kNonFinite || v - v == 0 ? v : 0.0; };
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x)
        out[x] = A(finite(double(load(self[x])) - c_self) * own[x] +
                   finite(double(load(other[x])) - c_other) * e[x] - mean[x]);
      if (kMask)
        for (int64_t x = 0; x < width; ++x)
          out[x] = mask[here + x] == A(0) ? A(0) : A(out[x] * mask[here + x]);
      if (kNonFinite)
        for (int64_t x = 0; x < width; ++x) {
          const bool ignored = kMask && mask[here + x] == A(0);
          if (total[bad_adjoint * stride + x] > 0.5 && !ignored) out[x] = A(kNaN);
        }
    }
  }

  const LccArgs& a;
  const int64_t unit, nc, n, D, H, W;
  int64_t begin, end, z0, z1, first, last, r[3], stride;  // chunks, planes
  const T *fixed, *moved;
  const A *mask, *upstream;
  bool want_fixed, want_moved;
  int n_adjoints, bad_adjoint = 0;
  double reference[2], counted_zy = -1.0;
  Arena arena;
  Line line;
  Statistics line_statistics[2];
  double *column, *running, *box, *spare, *nothing, *count_x, *count, *largest, *value, *line_up, *adjoint,
      *adjoint_y, *fresh, *ring_y, *ring_z, *adjoint_z;
};

template <class T>
void slabs(const LccArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (a.mask) {
      if (!Slab<T, true, false>(a, unit).run()) Slab<T, true, true>(a, unit).run();
    } else {
      if (!Slab<T, false, false>(a, unit).run()) Slab<T, false, true>(a, unit).run();
    }
  }
}

}  // namespace

void lcc_slabs(Stored type, const LccArgs& a, int64_t begin, int64_t end) {
  with_type(type, [&]<class T>() { slabs<T>(a, begin, end); });
}

}  // namespace fastreg::FASTREG_ISA

#endif
