#include "common/lcc_loss.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D images are volumes whose y axis has one voxel, so that the march along z still has rows to share among threads.
struct LccArgs {
  const void *fixed, *moved;  // (n c, D, H, W)
  const void* mask;           // (n, D, H, W), arithmetic type, or null
  const void* upstream;       // (n, D, H, W), arithmetic type: what the loss map is multiplied by, or null (the mask, or 1)
  double* sums;               // per work unit: sum of mask * LCC
  void* map;                  // (n c, D, H, W), arithmetic type: -LCC / c, or null
  void *grad_fixed, *grad_moved;  // (n c, D, H, W), arithmetic type: of the sum of upstream * -LCC, or null
  int64_t n, c, size[3], radius[3];
  double volume;  // samples of a whole window
  bool valid, squared;
  Denominator denominator;
  LccRule rule;
  int64_t n_slabs;
};

// Work units are (n c, slab of z planes).
FASTREG_KERNEL(void, lcc_slabs, Stored, const LccArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kChunk = 32;    // planes between two seeds of the column sums, and the extent the shift comes from
constexpr int64_t kReseed = 64;   // rows between two seeds of the row sums
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Rows of doubles, 64-byte aligned, freed together.
class Arena {
 public:
  double* rows(int64_t count, int64_t width) {
    auto* p = static_cast<double*>(::operator new(size_t(std::max<int64_t>(count * width, 1)) * 8, std::align_val_t(64)));
    blocks_.emplace_back(p);
    return p;
  }

 private:
  struct Free {
    void operator()(double* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<double, Free>> blocks_;
};

void add(double* __restrict out, const double* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += in[i];
}
void subtract(double* __restrict out, const double* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] -= in[i];
}

// out[i] = in[i] + ... + in[i + 2 radius] by doubling: never subtractive, log2(window) passes over a row in L1.
// in holds n + 2 radius values and is overwritten.
void box_row(double* __restrict in, double* __restrict out, int64_t n, int64_t radius) {
  const int64_t window = 2 * radius + 1, total = n + 2 * radius;
  std::copy_n(in, n, out);
  int64_t offset = 1;
  for (int64_t span = 1; 2 * span <= window; span *= 2) {
    for (int64_t i = 0; i + span < total; ++i) in[i] += in[i + span];
    if (window & (2 * span)) {
      add(out, in + offset, n);
      offset += 2 * span;
    }
  }
}

// One slab of one channel: a march along z. Per plane: column sums over z (add the entering plane, subtract the leaving
// one, fp64), from them running row sums over y, from them box sums along x; LCC and its adjoint maps of a row, and the
// same three box sums over the adjoints, whose z sums lag 2 rz planes. No map is written to memory: the state is rows,
// rings of rows and a ring of 2 rz + 1 planes.
// Bytes: fixed and moved are read 2 (entering) + 2 (leaving, from cache) + 2 (gradient) times, each gradient written once.
// Floor by bytes: 2 reads and 1 write a voxel and gradient. Floor by arithmetic: about 110 fp64 operations a voxel for one
// gradient, independent of the window but for log2(window) additions.
// Shift: one per chunk of 32 planes (the mean of its central 32 x 32 patch). fp64 sums resolve deviations of 5e-7 of the
// distance to the shift, below what an fp32 image can hold, so a shift per tile in y and x would change no digit.
template <class T, bool kMask, bool kNonFinite>
class Slab {
  using A = arithmetic_t<T>;

 public:
  Slab(const LccArgs& args, int64_t unit_)
      : a(args), unit(unit_), nc(unit / args.n_slabs), n(nc / args.c), D(a.size[0]), H(a.size[1]), W(a.size[2]) {
    const int64_t slab = unit % a.n_slabs;
    z0 = D * slab / a.n_slabs, z1 = D * (slab + 1) / a.n_slabs;
    for (int k = 0; k < 3; ++k) r[k] = std::min(a.radius[k], a.size[k] - 1);
    fixed = static_cast<const T*>(a.fixed) + nc * D * H * W;
    moved = static_cast<const T*>(a.moved) + nc * D * H * W;
    mask = kMask ? static_cast<const A*>(a.mask) + n * D * H * W : nullptr;
    upstream = a.upstream ? static_cast<const A*>(a.upstream) + n * D * H * W : mask;
    want_fixed = a.grad_fixed, want_moved = a.grad_moved;
    n_adjoints = want_fixed && want_moved ? 5 : want_fixed || want_moved ? 3 : 0;
    if (n_adjoints && kNonFinite) bad_adjoint = n_adjoints++;
    stride = (W + 2 * r[2] + 15) / 8 * 8;
    column = arena.rows(H * kMoments, stride);
    running = arena.rows(kMoments, stride), padded = arena.rows(1, stride), box = arena.rows(kMoments, stride);
    samples = arena.rows(6, stride);
    count_x = arena.rows(2, stride), count = arena.rows(3, stride);
    largest = arena.rows(2, stride);
    adjoint = arena.rows(n_adjoints, stride), adjoint_y = arena.rows(n_adjoints, stride);
    ring_y = arena.rows((2 * r[1] + 1) * n_adjoints, stride);
    ring_z = arena.rows((2 * r[0] + 1) * H * n_adjoints, stride);
    adjoint_z = arena.rows(H * n_adjoints, stride);
    value = arena.rows(1, stride);
  }

  // False where a non-finite sample entered: the slab must be done again with kNonFinite.
  bool run() {
    std::fill_n(padded, stride, 0.0);
    std::fill_n(adjoint_z, H * n_adjoints * stride, 0.0);
    std::fill_n(ring_y, (2 * r[1] + 1) * n_adjoints * stride, 0.0);
    for (int64_t x = 0; x < W; ++x) {
      count_x[x] = double(std::min(x + r[2], W - 1) - std::max<int64_t>(x - r[2], 0) + 1);
      count_x[stride + x] = 1.0 / count_x[x];
    }
    sum = 0.0;
    const int64_t halo = n_adjoints ? r[0] : 0;
    first = std::max<int64_t>(z0 - halo, 0), last = std::min(z1 + halo, D);
    for (int64_t chunk = first; chunk < last; chunk += kChunk) {
      const int64_t end = std::min(chunk + kChunk, last);
      choose_shift((chunk + end) / 2);
      if (chunk == first) reference[0] = shift[0], reference[1] = shift[1];
      std::fill_n(largest, 2 * stride, 0.0);
      for (int64_t z = chunk; z < end; ++z) plane(z, z == chunk);
      if (!kNonFinite && !finite_columns()) return false;
    }
    if (n_adjoints)
      for (int64_t z = last; z < z1 + r[0]; ++z)
        for (int64_t y = 0; y < H; ++y) accumulate_z(z, y, nullptr);
    a.sums[unit] = -sum;
    return true;
  }

 private:
  static constexpr int kMoments = 5 + kMask + kNonFinite;  // f, m, ff, mm, fm, weight, bad
  static constexpr int kWeight = 5, kBad = 5 + kMask;

  int64_t at(int64_t z, int64_t y) const { return (z * H + y) * W; }

  void choose_shift(int64_t z) {
    const T* image[2] = {fixed, moved};
    for (int k = 0; k < 2; ++k) {
      double total = 0.0;
      int64_t samples_ = 0;
      for (int64_t y = std::max<int64_t>(H / 2 - 16, 0); y < std::min(H / 2 + 16, H); ++y)
        for (int64_t x = std::max<int64_t>(W / 2 - 16, 0); x < std::min(W / 2 + 16, W); ++x) {
          const double s = load(image[k][at(z, y) + x]);
          if (s - s == 0.0) total += s, ++samples_;
        }
      shift[k] = samples_ ? total / double(samples_) : 0.0;
    }
  }

  bool finite_columns() const {
    double probe = 0.0;
    for (int64_t y = 0; y < H; ++y)
      for (int k = 2; k < 4; ++k) {
        const double* row = column + (y * kMoments + k) * stride;
        for (int64_t x = 0; x < W; ++x) probe += row[x] * 0.0;
      }
    return probe == 0.0;
  }

  // Shifted samples of a row: f, m and, where needed, their weight and whether they are not finite.
  void load_row(int64_t z, int64_t y, double* __restrict f, double* __restrict m, double* __restrict q) {
    const T* fixed_row = fixed + at(z, y);
    const T* moved_row = moved + at(z, y);
    const double cf = shift[0], cm = shift[1];
    if constexpr (kNonFinite || kMask) {
      for (int64_t x = 0; x < W; ++x) {
        const double weight = kMask ? double(mask[at(z, y) + x]) : 1.0;
        const double fx = double(load(fixed_row[x])) - cf, mx = double(load(moved_row[x])) - cm;
        const double probe = fx * fx + mx * mx;
        const bool bad = kNonFinite && !(probe - probe == 0.0), out = weight == 0.0 || bad;
        f[x] = out ? 0.0 : fx, m[x] = out ? 0.0 : mx;
        q[x] = kNonFinite && bad && weight != 0.0 ? -1.0 : weight;  // -1 marks a bad sample
      }
    } else {
      for (int64_t x = 0; x < W; ++x) f[x] = double(load(fixed_row[x])) - cf;
      for (int64_t x = 0; x < W; ++x) m[x] = double(load(moved_row[x])) - cm;
    }
  }

  // column[y] += (or -=) the moments of row y of plane z.
  template <int kSign>
  void enter(int64_t z, int64_t y) {
    double *f = samples, *m = samples + stride, *q = samples + 2 * stride;
    load_row(z, y, f, m, q);
    double* c = column + y * kMoments * stride;
    double *__restrict c0 = c, *__restrict c1 = c + stride, *__restrict c2 = c + 2 * stride, *__restrict c3 = c + 3 * stride,
           *__restrict c4 = c + 4 * stride;
    double* __restrict cw = c + kWeight * stride;
    double* __restrict cb = c + kBad * stride;
    for (int64_t x = 0; x < W; ++x) {
      const double bad = kNonFinite && q[x] < 0.0 ? 1.0 : 0.0;
      const double k = kMask ? kSign * (kNonFinite && bad > 0.0 ? 0.0 : q[x]) : double(kSign);
      const double kf = k * f[x], km = k * m[x];
      c0[x] += kf, c1[x] += km, c2[x] += kf * f[x], c3[x] += km * m[x], c4[x] += kf * m[x];
      if (kMask) cw[x] += k;
      if (kNonFinite) cb[x] += kSign * bad;
    }
  }

  // The common case in one pass: plane `in` enters and plane `out` leaves.
  void slide(int64_t in, int64_t out, int64_t y) {
    const double cf = shift[0], cm = shift[1];
    const T *__restrict fi = fixed + at(in, y), *__restrict mi = moved + at(in, y);
    const T *__restrict fo = fixed + at(out, y), *__restrict mo = moved + at(out, y);
    double* c = column + y * kMoments * stride;
    double *__restrict c0 = c, *__restrict c1 = c + stride, *__restrict c2 = c + 2 * stride, *__restrict c3 = c + 3 * stride,
           *__restrict c4 = c + 4 * stride;
    for (int64_t x = 0; x < W; ++x) {
      const double f = double(load(fi[x])) - cf, m = double(load(mi[x])) - cm;
      const double g = double(load(fo[x])) - cf, k = double(load(mo[x])) - cm;
      c0[x] += f - g, c1[x] += m - k, c2[x] += f * f - g * g, c3[x] += m * m - k * k, c4[x] += f * m - g * k;
    }
  }

  void update_column(int64_t z, int64_t y, bool seed) {
    if (seed) {
      std::fill_n(column + y * kMoments * stride, kMoments * stride, 0.0);
      for (int64_t k = std::max<int64_t>(z - r[0], 0); k <= std::min(z + r[0], D - 1); ++k) enter<1>(k, y);
      return;
    }
    const int64_t in = z + r[0], out = z - r[0] - 1;
    if (!kMask && !kNonFinite && in < D && out >= 0) return slide(in, out, y);
    if (in < D) enter<1>(in, y);
    if (out >= 0) enter<-1>(out, y);
  }

  void plane(int64_t z, bool seed) {
    const int64_t ry = r[1];
    for (int64_t y = 0; y < std::min(ry, H); ++y) update_column(z, y, seed);
    if (n_adjoints) std::fill_n(adjoint_y, n_adjoints * stride, 0.0);
    for (int64_t y = 0; y < H; ++y) {
      if (y + ry < H) update_column(z, y + ry, seed);
      if (y % kReseed == 0) {
        std::fill_n(running, kMoments * stride, 0.0);
        for (int64_t k = std::max<int64_t>(y - ry, 0); k <= std::min(y + ry, H - 1); ++k)
          add(running, column + k * kMoments * stride, kMoments * stride);
      } else {
        if (y + ry < H) add(running, column + (y + ry) * kMoments * stride, kMoments * stride);
        if (y - ry - 1 >= 0) subtract(running, column + (y - ry - 1) * kMoments * stride, kMoments * stride);
      }
      for (int k = 0; k < kMoments; ++k) {
        std::copy_n(running + k * stride, W, padded + r[2]);
        std::fill_n(padded, r[2], 0.0);
        std::fill_n(padded + r[2] + W, r[2], 0.0);
        box_row(padded, box + k * stride, W, r[2]);
      }
      window_counts(z, y);
      switch (a.denominator) {
        case Denominator::product: row<Denominator::product>(z, y); break;
        case Denominator::clamp: row<Denominator::clamp>(z, y); break;
        case Denominator::each: row<Denominator::each>(z, y); break;
      }
      if (n_adjoints) accumulate_y(z, y, true);
    }
    if (n_adjoints)
      for (int64_t y = H; y < H + ry; ++y) accumulate_y(z, y, false);
  }

  // count[0] = n, count[1] = 1 / n, count[2] = weight of the padded samples.
  void window_counts(int64_t z, int64_t y) {
    const double zy = double(std::min(z + r[0], D - 1) - std::max<int64_t>(z - r[0], 0) + 1) *
                      double(std::min(y + r[1], H - 1) - std::max<int64_t>(y - r[1], 0) + 1);
    double *__restrict total = count, *__restrict inverse = count + stride, *__restrict outside = count + 2 * stride;
    for (int64_t x = 0; x < W; ++x) outside[x] = a.valid ? 0.0 : a.volume - zy * count_x[x];
    if constexpr (kMask) {
      const double* weight = box + kWeight * stride;
      for (int64_t x = 0; x < W; ++x) {
        total[x] = weight[x] + outside[x];
        inverse[x] = total[x] > 0.0 ? 1.0 / total[x] : 0.0;
      }
    } else if (a.valid) {
      const double inverse_zy = 1.0 / zy;
      for (int64_t x = 0; x < W; ++x) total[x] = zy * count_x[x], inverse[x] = inverse_zy * count_x[stride + x];
    } else {
      std::fill_n(total, W, a.volume);
      std::fill_n(inverse, W, 1.0 / a.volume);
    }
  }

  template <Denominator kDenominator>
  void row(int64_t z, int64_t y) {
    a.squared ? statistics<kDenominator, true>(z, y) : statistics<kDenominator, false>(z, y);
    const bool mine = z >= z0 && z < z1;
    if (!mine) return;
    const int64_t here = at(z, y);
    double total = 0.0;
    for (int64_t x = 0; x < W; ++x) {
      const double weight = kMask ? double(mask[here + x]) : 1.0;
      total += weight == 0.0 ? 0.0 : weight * value[x];
    }
    sum += total;
    if (a.map) {
      A* map = static_cast<A*>(a.map) + nc * D * H * W + here;
      for (int64_t x = 0; x < W; ++x) map[x] = A(-value[x] / double(a.c));
    }
  }

  // LCC of a row, and what its windows pass back to their samples:
  //   d LCC / d f_q = 2 a (f_q - f_mean) + e (m_q - m_mean), a = dLCC/dv, e = dLCC/dc, summed over the windows that hold q,
  // so the maps a, e and 2 a f_mean + e m_mean (and b, 2 b m_mean + e f_mean for the moved image) are box-summed in turn.
  template <Denominator kDenominator, bool kSquared>
  void statistics(int64_t z, int64_t y) {
    const double *__restrict s1 = box, *__restrict t1 = box + stride, *__restrict s2 = box + 2 * stride,
                 *__restrict t2 = box + 3 * stride, *__restrict st = box + 4 * stride, *__restrict bad = box + kBad * stride;
    const double *__restrict total = count, *__restrict inverse = count + stride, *__restrict outside = count + 2 * stride;
    double *__restrict peak_f = largest, *__restrict peak_m = largest + stride, *__restrict lcc = value;
    const double cf = shift[0], cm = shift[1], tau = a.rule.tau, nr = a.rule.smooth_nr, dr = a.rule.smooth_dr;
    const double df = cf - reference[0], dm = cm - reference[1];
    double* out[6];
    for (int k = 0; k < 6; ++k) out[k] = k < n_adjoints ? adjoint + k * stride : nullptr;
    // Adjoint maps in order: e, then (a, fixed's mean map), then (b, moved's mean map).
    double* __restrict e_map = out[0];
    double *__restrict a_map = want_fixed ? out[1] : nullptr, *__restrict f_map = want_fixed ? out[2] : nullptr;
    double *__restrict b_map = want_moved ? out[want_fixed ? 3 : 1] : nullptr,
           *__restrict m_map = want_moved ? out[want_fixed ? 4 : 2] : nullptr;
    const A* up = upstream ? upstream + at(z, y) : nullptr;
    const double scale = a.upstream ? -1.0 / double(a.c) : -1.0;
    double *__restrict va = samples, *__restrict vb = samples + stride, *__restrict vc = samples + 2 * stride,
           *__restrict mean_f = samples + 3 * stride, *__restrict mean_m = samples + 4 * stride, *__restrict g = samples + 5 * stride;
    for (int64_t x = 0; x < W; ++x) {
      const double P = outside[x], inv = inverse[x];
      const double f1 = s1[x] - P * cf, m1 = t1[x] - P * cm, f2 = s2[x] + P * cf * cf, m2 = t2[x] + P * cm * cm;
      const double fm = st[x] + P * cf * cm;
      const double fbar = f1 * inv, mbar = m1 * inv;
      peak_f[x] = f2 > peak_f[x] ? f2 : peak_f[x];
      peak_m[x] = m2 > peak_m[x] ? m2 : peak_m[x];
      double v = f2 - f1 * fbar, w = m2 - m1 * mbar, c = fm - f1 * mbar;
      const bool resolved = (v > tau * peak_f[x]) & (w > tau * peak_m[x]) & (total[x] >= 2.0);
      v = resolved ? v : 0.0, w = resolved ? w : 0.0, c = resolved ? c : 0.0;
      const auto t = lcc_terms<kDenominator, kSquared>(v, w, c, nr, dr);
      lcc[x] = total[x] >= 2.0 ? t.value : 0.0;
      va[x] = resolved ? t.by_v : 0.0, vb[x] = resolved ? t.by_w : 0.0, vc[x] = resolved ? t.by_c : 0.0;
      mean_f[x] = fbar + df, mean_m[x] = mbar + dm;
    }
    if constexpr (kNonFinite)
      for (int64_t x = 0; x < W; ++x)
        if (bad[x] > 0.5) lcc[x] = kNaN, va[x] = vb[x] = vc[x] = 0.0;
    if (!n_adjoints) return;
    if (up)
      for (int64_t x = 0; x < W; ++x) g[x] = scale * double(up[x]);
    else
      std::fill_n(g, W, scale);
    for (int64_t x = 0; x < W; ++x) e_map[x] = g[x] * vc[x];
    if (want_fixed)
      for (int64_t x = 0; x < W; ++x) a_map[x] = 2.0 * g[x] * va[x], f_map[x] = a_map[x] * mean_f[x] + e_map[x] * mean_m[x];
    if (want_moved)
      for (int64_t x = 0; x < W; ++x) b_map[x] = 2.0 * g[x] * vb[x], m_map[x] = b_map[x] * mean_m[x] + e_map[x] * mean_f[x];
    if constexpr (kNonFinite)
      for (int64_t x = 0; x < W; ++x) adjoint[bad_adjoint * stride + x] = bad[x] > 0.5 && g[x] != 0.0 ? 1.0 : 0.0;
  }

  // Adjoint rows: box along x, running sum along y. Row y completes row y - ry of plane z.
  void accumulate_y(int64_t z, int64_t y, bool entering) {
    const int64_t ry = r[1], width = n_adjoints * stride;
    double* slot = ring_y + (y % (2 * ry + 1)) * width;
    if (y >= 2 * ry + 1) subtract(adjoint_y, slot, width);
    if (entering) {
      for (int k = 0; k < n_adjoints; ++k) {
        std::copy_n(adjoint + k * stride, W, padded + r[2]);
        std::fill_n(padded, r[2], 0.0);
        std::fill_n(padded + r[2] + W, r[2], 0.0);
        box_row(padded, slot + k * stride, W, r[2]);
      }
      add(adjoint_y, slot, width);
    }
    if (y >= ry) accumulate_z(z, y - ry, adjoint_y);
  }

  // Running sum along z of plane z (none past the image: row is null), which completes plane z - rz of the gradient.
  void accumulate_z(int64_t z, int64_t y, const double* row_) {
    const int64_t rz = r[0], width = n_adjoints * stride;
    double* total = adjoint_z + y * width;
    double* slot = ring_z + ((z % (2 * rz + 1)) * H + y) * width;
    const bool leaving = z - first >= 2 * rz + 1;
    if (row_ && leaving) {
      for (int64_t i = 0; i < width; ++i) {
        total[i] += row_[i] - slot[i];
        slot[i] = row_[i];
      }
    } else if (row_) {
      add(total, row_, width);
      std::copy_n(row_, width, slot);
    } else if (leaving) {
      subtract(total, slot, width);
    }
    const int64_t zo = z - rz;
    if (zo >= z0 && zo < z1) write_gradient(zo, y, total);
  }

  void write_gradient(int64_t z, int64_t y, const double* total) {
    const int64_t here = at(z, y), offset = nc * D * H * W + here;
    const T *__restrict f = fixed + here, *__restrict m = moved + here;
    const double *__restrict e = total, *bad = total + bad_adjoint * stride;
    const double cf = reference[0], cm = reference[1];
    for (int image = 0; image < 2; ++image) {
      if (!(image ? want_moved : want_fixed)) continue;
      const int first_map = image && want_fixed ? 3 : 1;
      const double *__restrict own = total + first_map * stride, *__restrict mean = own + stride;
      A* __restrict out = static_cast<A*>(image ? a.grad_moved : a.grad_fixed) + offset;
      const T *__restrict self = image ? m : f, *__restrict other = image ? f : m;
      const double c_self = image ? cm : cf, c_other = image ? cf : cm;
      for (int64_t x = 0; x < W; ++x)
        out[x] = A((double(load(self[x])) - c_self) * own[x] + (double(load(other[x])) - c_other) * e[x] - mean[x]);
      if (kMask)
        for (int64_t x = 0; x < W; ++x) out[x] = mask[here + x] == A(0) ? A(0) : A(out[x] * mask[here + x]);
      if (kNonFinite)
        for (int64_t x = 0; x < W; ++x) {
          const bool ignored = kMask && mask[here + x] == A(0);
          if (bad[x] > 0.5 && !ignored) out[x] = A(kNaN);
        }
    }
  }

  const LccArgs& a;
  const int64_t unit, nc, n, D, H, W;
  int64_t z0, z1, first, last, r[3], stride;
  const T *fixed, *moved;
  const A *mask, *upstream;
  bool want_fixed, want_moved;
  int n_adjoints, bad_adjoint = 0;
  double shift[2], reference[2], sum;
  Arena arena;
  double *column, *running, *padded, *box, *samples, *count_x, *count, *largest, *adjoint, *adjoint_y, *ring_y, *ring_z,
      *adjoint_z, *value;
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
  switch (type) {
    case Stored::f64: return slabs<double>(a, begin, end);
    case Stored::f32: return slabs<float>(a, begin, end);
    case Stored::f16: return slabs<half_t>(a, begin, end);
    case Stored::bf16: return slabs<bfloat16_t>(a, begin, end);
  }
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

struct Result {
  Tensor sums, map, grad_fixed, grad_moved;
};

Result run(const Tensor& fixed_, const Tensor& moved_, const std::optional<Tensor>& mask_,
           const std::optional<Tensor>& upstream_, int64_t window, bool squared, c10::string_view padding, double smooth_nr,
           double smooth_dr, c10::string_view denominator, bool want_map, bool need_fixed, bool need_moved) {
  const int64_t nd = fixed_.dim() - 2;
  FASTREG_CHECK(nd == 2 || nd == 3, "lcc_loss", "images must have 2 or 3 spatial axes");
  FASTREG_CHECK(fixed_.sizes() == moved_.sizes(), "lcc_loss", "fixed and moved must have one shape");
  FASTREG_CHECK(fixed_.scalar_type() == moved_.scalar_type(), "lcc_loss", "fixed and moved must have one dtype");
  FASTREG_CHECK(window > 0 && window % 2 == 1, "lcc_loss", "window must be odd and positive");
  Tensor fixed = fixed_.contiguous(), moved = moved_.contiguous();
  const auto arithmetic = fixed.options().dtype(arithmetic_of(fixed));
  auto per_voxel = [&](const std::optional<Tensor>& t) {
    if (!t) return Tensor();
    FASTREG_CHECK(t->dim() == nd + 2 && t->size(0) == fixed.size(0) && t->size(1) == 1 && t->sizes().slice(2) == fixed.sizes().slice(2), "lcc_loss", "mask and upstream gradient must have shape (N, 1, *spatial)");
    return t->to(arithmetic.dtype()).contiguous();
  };
  Tensor mask = per_voxel(mask_), upstream = per_voxel(upstream_);
  LccArgs a{};
  a.n = fixed.size(0), a.c = fixed.size(1);
  a.volume = 1;
  for (int k = 0; k < 3; ++k) {
    // Axes (z, y, x) of the march; in 2D (y, -, x).
    const int64_t axis = nd == 3 ? k + 2 : k == 0 ? 2 : k == 2 ? 3 : -1;
    a.size[k] = axis < 0 ? 1 : fixed.size(axis);
    a.radius[k] = axis < 0 ? 0 : window / 2;
    a.volume *= double(axis < 0 ? 1 : window);
  }
  a.valid = padding == "valid", a.squared = squared;
  a.denominator = denominator == "product" ? Denominator::product : denominator == "clamp" ? Denominator::clamp : Denominator::each;
  a.rule = {smooth_nr, smooth_dr, 0x1p-42};
  // Enough slabs for every thread; each repeats the statistics of 2 radius planes, so none thinner than that.
  const int64_t units = std::max<int64_t>(a.n * a.c, 1);
  a.n_slabs = std::clamp<int64_t>((at::get_num_threads() + units - 1) / units, 1, std::max<int64_t>(a.size[0] / std::max<int64_t>(2 * a.radius[0], 8), 1));
  Result out{at::zeros({a.n, a.c * a.n_slabs}, fixed.options().dtype(at::kDouble)), Tensor(), Tensor(), Tensor()};
  out.map = at::empty(want_map ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  out.grad_fixed = at::empty(need_fixed ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  out.grad_moved = at::empty(need_moved ? fixed.sizes() : at::IntArrayRef{0}, arithmetic);
  if (fixed.numel() == 0) return out;
  a.fixed = fixed.const_data_ptr(), a.moved = moved.const_data_ptr();
  a.mask = mask.defined() ? mask.const_data_ptr() : nullptr;
  a.upstream = upstream.defined() ? upstream.const_data_ptr() : nullptr;
  a.sums = out.sums.mutable_data_ptr<double>();
  a.map = want_map ? out.map.mutable_data_ptr() : nullptr;
  a.grad_fixed = need_fixed ? out.grad_fixed.mutable_data_ptr() : nullptr;
  a.grad_moved = need_moved ? out.grad_moved.mutable_data_ptr() : nullptr;
  auto kernel = FASTREG_PICK(lcc_slabs);
  at::parallel_for(0, a.n * a.c * a.n_slabs, 1, [&](int64_t b, int64_t e) { kernel(stored(fixed), a, b, e); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> lcc_loss_cpu(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask,
                                                int64_t window, bool squared, c10::string_view padding, double smooth_nr,
                                                double smooth_dr, c10::string_view denominator, bool need_fixed, bool need_moved) {
  Result r = run(fixed, moved, mask, std::nullopt, window, squared, padding, smooth_nr, smooth_dr, denominator, false, need_fixed, need_moved);
  return {r.sums.sum(1).to(arithmetic_of(fixed)), r.grad_fixed, r.grad_moved};
}

Tensor lcc_map_cpu(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask, int64_t window, bool squared,
                   c10::string_view padding, double smooth_nr, double smooth_dr, c10::string_view denominator) {
  Result r = run(fixed, moved, mask, std::nullopt, window, squared, padding, smooth_nr, smooth_dr, denominator, true, false, false);
  return fixed.size(1) == 1 ? r.map : r.map.sum(1, true);
}

std::tuple<Tensor, Tensor> lcc_map_bwd_cpu(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                           const std::optional<Tensor>& mask, int64_t window, bool squared,
                                           c10::string_view padding, double smooth_nr, double smooth_dr,
                                           c10::string_view denominator, bool need_fixed, bool need_moved) {
  Result r = run(fixed, moved, mask, grad, window, squared, padding, smooth_nr, smooth_dr, denominator, false, need_fixed, need_moved);
  return {r.grad_fixed.to(fixed.scalar_type()), r.grad_moved.to(moved.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("lcc_loss", lcc_loss_cpu);
  m.impl("lcc_map", lcc_map_cpu);
  m.impl("lcc_map_bwd", lcc_map_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
