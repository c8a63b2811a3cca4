#pragma once
// Rows of LCC: their memory, the shift of a chunk of planes, and the statistics of a line of windows.
// Included once per instruction set by lcc_box.cpp and lcc_weighted.cpp; the march over rows and planes, and
// why the sums are ordered as they are, stands there.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/lcc_args.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kChunk = 32;  // planes that share a shift, and the extent it comes from
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Rows of doubles, 64-byte aligned, freed together.
class Arena {
 public:
  double* rows(int64_t count, int64_t width) {
    auto* p = static_cast<double*>(
        ::operator new(size_t(std::max<int64_t>(count * width, 1)) * 8, std::align_val_t(64)));
    blocks_.emplace_back(p);
    return p;
  }

 private:
  struct Free {
    void operator()(double* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<double, Free>> blocks_;
};

// What the samples of a chunk of planes are shifted by: the mean of the central patch of its middle plane or,
// where the mask leaves nothing there, of the whole chunk. Non-finite samples do not count.
template <class T, class A>
double chunk_shift(const T* image, const A* mask, const int64_t* size, int64_t chunk) {
  const int64_t D = size[0], H = size[1], W = size[2];
  const int64_t end = std::min(chunk + kChunk, D), middle = (chunk + end) / 2;
  double total = 0.0;
  int64_t finite = 0;
  auto gather = [&](int64_t z_begin, int64_t z_end, int64_t reach) {
    for (int64_t z = z_begin; z < z_end; ++z)
      for (int64_t y = std::max<int64_t>(H / 2 - reach, 0); y < std::min(H / 2 + reach, H); ++y)
        for (int64_t x = std::max<int64_t>(W / 2 - reach, 0); x < std::min(W / 2 + reach, W); ++x) {
          const int64_t here = (z * H + y) * W + x;
          const double s = load(image[here]);
          if (s - s == 0.0 && (!mask || mask[here] != A(0))) total += s, ++finite;
        }
  };
  gather(middle, middle + 1, kChunk / 2);
  if (!finite) gather(chunk, end, std::max(H, W));
  return finite ? total / double(finite) : 0.0;
}

// Writes a line of the map, if there is one, and returns the line's sum of mask * LCC.
template <class A>
double collect(const double* value, const A* mask, A* map, double channels, int64_t n) {
  constexpr int kLanesOfSum = 8;
  double lanes[kLanesOfSum] = {};
  const auto term = [&](int64_t x) {
    const double weight = mask ? double(mask[x]) : 1.0;
    return weight == 0.0 ? 0.0 : weight * value[x];
  };
  int64_t begin = 0;
  for (; begin + kLanesOfSum <= n; begin += kLanesOfSum)
    for (int i = 0; i < kLanesOfSum; ++i) lanes[i] += term(begin + i);
  for (int64_t x = begin; x < n; ++x) lanes[x - begin] += term(x);
  if (map)
    for (int64_t x = 0; x < n; ++x) map[x] = A(-value[x] / channels);
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// Rows of a line of windows: their sums, what they weigh, the LCC and what they pass back.
struct Line {
  const double *f, *m, *ff, *mm, *fm;           // sums of shifted samples
  const double *count, *inverse, *outside;      // n, 1 / n, weight of the padded samples
  double *peak_f, *peak_m;                      // running sums: largest second moments since they were seeded
  const double* upstream;                       // what d loss / d LCC is
  double *value, *e, *a, *mean_f, *b, *mean_m;  // LCC; adjoint maps (see statistics)
  double shift[2], to_reference[2];  // the sums' shift, and the shift less the gradient's reference
  double least;                      // n below which a window counts as empty
  LccRule rule;
};

// LCC of a line and what its windows pass back to their samples:
//   d LCC / d f_q = 2 a (f_q - f_mean) + e (m_q - m_mean), a = dLCC/dv, e = dLCC/dc, summed over the windows
//   that hold q,
// so the maps e, 2 a and 2 a f_mean + e m_mean (2 b and 2 b m_mean + e f_mean for the moved image) are
// box-summed in turn.
template <bool kRunning, Denominator kDenominator, bool kSquared, bool kFixed, bool kMoved, bool kPadded>
void statistics(const Line& l, int64_t begin, int64_t end) {
  const double* __restrict f = l.f, * __restrict m = l.m, * __restrict ff = l.ff, * __restrict mm = l.mm, * __restrict fm = l.fm;
  const double* __restrict count = l.count, * __restrict inverse = l.inverse, * __restrict outside = l.outside;
  const double* __restrict up = l.upstream;
  double* __restrict peak_f = l.peak_f, * __restrict peak_m = l.peak_m, * __restrict value = l.value, * __restrict e_map = l.e;
  double* __restrict a_map = l.a, * __restrict f_map = l.mean_f, * __restrict b_map = l.b, * __restrict m_map = l.mean_m;
  const double cf = l.shift[0], cm = l.shift[1], df = l.to_reference[0], dm = l.to_reference[1];
  const double tau = l.rule.tau, least = l.least, nr = l.rule.smooth_nr, dr = l.rule.smooth_dr;
#pragma GCC ivdep
  for (int64_t x = begin; x < end; ++x) {
    double s1 = f[x], t1 = m[x], s2 = ff[x], t2 = mm[x], st = fm[x];
    if (kPadded) {
      const double p = outside[x], pf = p * cf, pm = p * cm;
      s1 -= pf, t1 -= pm, s2 += pf * cf, t2 += pm * cm, st += pf * cm;
    }
    const double f_mean = s1 * inverse[x], m_mean = t1 * inverse[x];
    double largest_f = s2, largest_m = t2;
    if (kRunning) {
      largest_f = s2 > peak_f[x] ? s2 : peak_f[x], largest_m = t2 > peak_m[x] ? t2 : peak_m[x];
      peak_f[x] = largest_f, peak_m[x] = largest_m;
    }
    double v = s2 - s1 * f_mean, w = t2 - t1 * m_mean, c = st - s1 * m_mean;
    const bool counted = count[x] >= least;
    const bool resolved = (v > tau * largest_f) & (w > tau * largest_m) & counted;
    v = resolved ? v : 0.0, w = resolved ? w : 0.0, c = resolved ? c : 0.0;
    const auto t = lcc_terms<kDenominator, kSquared>(v, w, c, nr, dr);
    value[x] = counted ? t.value : 0.0;
    if (kFixed || kMoved) {
      const double g = resolved ? up[x] : 0.0, e = g * t.by_c, f_at = f_mean + df, m_at = m_mean + dm;
      e_map[x] = e;
      if (kFixed) {
        const double a = 2.0 * g * t.by_v;
        a_map[x] = a, f_map[x] = a * f_at + e * m_at;
      }
      if (kMoved) {
        const double b = 2.0 * g * t.by_w;
        b_map[x] = b, m_map[x] = b * m_at + e * f_at;
      }
    }
  }
}

using Statistics = void (*)(const Line&, int64_t, int64_t);

template <bool kRunning, Denominator kDenominator, bool kSquared>
Statistics statistics_for(bool fixed, bool moved, bool padded) {
  constexpr Denominator d = kDenominator;
  constexpr bool r = kRunning, s = kSquared;
  if (padded)
    return fixed ? (moved ? statistics<r, d, s, true, true, true> : statistics<r, d, s, true, false, true>)
                 : (moved ? statistics<r, d, s, false, true, true> : statistics<r, d, s, false, false, true>);
  return fixed ? (moved ? statistics<r, d, s, true, true, false> : statistics<r, d, s, true, false, false>)
               : (moved ? statistics<r, d, s, false, true, false> : statistics<r, d, s, false, false, false>);
}

// Of sums that are running ones (lcc_box.cpp) or not.
template <bool kRunning = true>
Statistics statistics_for(Denominator denominator, bool squared, bool f, bool m, bool padded) {
  switch (denominator) {
    case Denominator::product:
      return squared ? statistics_for<kRunning, Denominator::product, true>(f, m, padded)
                     : statistics_for<kRunning, Denominator::product, false>(f, m, padded);
    case Denominator::clamp:
      return squared ? statistics_for<kRunning, Denominator::clamp, true>(f, m, padded)
                     : statistics_for<kRunning, Denominator::clamp, false>(f, m, padded);
    default:
      return squared ? statistics_for<kRunning, Denominator::each, true>(f, m, padded)
                     : statistics_for<kRunning, Denominator::each, false>(f, m, padded);
  }
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
