#pragma once
// MIND at one voxel: from the distances of its channels to the descriptor, and back.
#include <cfloat>
#include <cstdint>

#include "common/macros.h"

namespace fastreg {

enum class MindTask { variance, describe, describe_bwd, compare };

// What every kernel of a call is told.
struct MindCall {
  const void* image[2];   // (n, c, *spatial): fixed and moved, or one image
  const double* mean[2];  // (n): mean of V
  const void* weight;     // (n, *spatial), arithmetic type, or null: of the voxels' errors
  bool is_mask;           // of the weight: what is not above 0 counts as 0
  const void* upstream;   // (n, n_channels, *spatial), as the image: gradient of the descriptors
  void* out;              // descriptors, as the image; or a map (n, *spatial), arithmetic type; or null
  void* grad[2];          // (n, c, *spatial); or null
  double* sums;           // partial sums of the loss or of V
  int64_t n, c;
  bool six, absolute;
};

// Offsets of the two patches of a channel, in units of the dilation along (z, y, x).
struct MindPair {
  int a[3], b[3];
};

inline constexpr MindPair kSsc3[12] = {
    {{1, 0, 0}, {0, -1, 0}},  {{0, 1, 0}, {-1, 0, 0}}, {{0, -1, 0}, {-1, 0, 0}}, {{0, 1, 0}, {1, 0, 0}},
    {{0, -1, 0}, {0, 0, -1}}, {{0, 1, 0}, {0, 0, 1}},  {{0, 0, -1}, {-1, 0, 0}}, {{1, 0, 0}, {0, 0, 1}},
    {{0, 1, 0}, {0, 0, -1}},  {{0, 0, 1}, {0, -1, 0}}, {{1, 0, 0}, {0, 0, -1}},  {{0, 0, 1}, {-1, 0, 0}},
};
inline constexpr MindPair kSsc2[4] = {
    {{0, -1, 0}, {0, 0, -1}},
    {{0, 0, 1}, {0, -1, 0}},
    {{0, 1, 0}, {0, 0, -1}},
    {{0, 0, 1}, {0, 1, 0}},
};
// The first two are left out in 2D.
inline constexpr MindPair kSix[6] = {
    {{0, 0, 0}, {-1, 0, 0}}, {{0, 0, 0}, {1, 0, 0}},  {{0, 0, 0}, {0, -1, 0}},
    {{0, 0, 0}, {0, 1, 0}},  {{0, 0, 0}, {0, 0, -1}}, {{0, 0, 0}, {0, 0, 1}},
};

constexpr int mind_channels(bool six, int64_t nd) { return six ? int(2 * nd) : nd == 3 ? 12 : 4; }
constexpr const MindPair* mind_pairs(bool six, int64_t nd) {
  return six ? kSix + (nd == 2 ? 2 : 0) : nd == 3 ? kSsc3 : kSsc2;
}

// Direction of an offset: 0 where there is none, else 1 + 2 axis + (it is positive).
FASTREG_HD constexpr int mind_direction(const int (&offset)[3]) {
  for (int axis = 0; axis < 3; ++axis)
    if (offset[axis]) return 1 + 2 * axis + (offset[axis] > 0);
  return 0;
}

// The same pairs as directions: kernels cannot index the tables above.
struct MindDirections {
  int a[12] = {}, b[12] = {};
};
FASTREG_HD constexpr MindDirections mind_directions(const MindPair* pairs, int n_channels) {
  MindDirections d;
  for (int k = 0; k < n_channels; ++k)
    d.a[k] = mind_direction(pairs[k].a), d.b[k] = mind_direction(pairs[k].b);
  return d;
}

// Weight of sample b in the window around t, 0 beyond its radius. A sample at the border of the n stands for
// all that lie outside. `window` holds the 2 radius + 1 weights, `cumulative` their running sums.
template <class A>
FASTREG_HD A mind_patch_weight(const A* window, const A* cumulative, int64_t radius, int64_t b, int64_t t,
                               int64_t n) {
  const int64_t distance = b < t ? t - b : b - t;
  if (distance > radius) return A(0);
  if (n == 1) return cumulative[2 * radius];
  return b == 0 || b == n - 1 ? cumulative[radius - distance] : window[radius - distance];
}

// Bounds of V in a sample. All NaN where the sample's mean of V is not finite.
template <class A>
struct MindBounds {
  A lower, upper;
  A tiny;  // the smallest normal number: no bound lies below
};

template <class A>
FASTREG_HD MindBounds<A> mind_bounds(double mean) {
  constexpr A tiny = A(sizeof(A) == 8 ? DBL_MIN : double(FLT_MIN));
  // A NaN stays: it is not below tiny.
  const double lower = 1e-3 * mean, upper = 1e3 * mean;
  return {lower < tiny ? tiny : A(lower), upper < tiny ? tiny : A(upper), tiny};
}

// V is a number or a vector of them, A its scalar.
template <class V>
struct MindScale {
  V least, inverse;  // min D, 1 / V
  V inverse_back;    // 1 / V on the way back: nothing returns from where V is at its floor
  V inside;          // 1 where V is within its bounds, else 0
};

template <int kChannels, class V>
FASTREG_HD V mind_least(const V (&d)[kChannels]) {
  V least = d[0];
  for (int k = 1; k < kChannels; ++k) least = d[k] < least ? d[k] : least;
  return least;
}

// V before its bounds: the mean of D ("six") or of D - min D.
template <class A, int kChannels, class V>
FASTREG_HD V mind_variance(const V (&d)[kChannels], V least, bool six) {
  V sum = {};
  const V origin = six ? V{} : least;
  for (int k = 0; k < kChannels; ++k) sum += d[k] - origin;
  return sum * (A(1) / kChannels);
}

// exponential(x, scale) is e^(x scale), for products <= 0.
template <class A, int kChannels, class V, class Exp>
FASTREG_HD MindScale<V> mind_describe(const V (&d)[kChannels], bool six, const MindBounds<A>& bounds,
                                      Exp exponential, V (&descriptor)[kChannels]) {
  const V zero = {}, one = zero + A(1), lower = zero + bounds.lower, upper = zero + bounds.upper;
  MindScale<V> m;
  m.least = mind_least(d);
  const V raw = mind_variance<A>(d, m.least, six);
  // The order of the comparisons passes NaN bounds on.
  V v = raw > lower ? raw : lower;
  v = v > upper ? upper : v;
  m.inverse = one / v;
  m.inverse_back = v <= bounds.tiny ? zero : m.inverse;
  m.inside = raw >= lower ? one : zero;
  m.inside = raw <= upper ? m.inside : zero;
  for (int k = 0; k < kChannels; ++k) descriptor[k] = exponential(m.least - d[k], m.inverse);
  return m;
}

// In: d loss / d descriptor. Out: d loss / d D. Channels that tie for the minimum share what returns through
// it.
template <class A, int kChannels, class V>
FASTREG_HD void mind_adjoint(const V (&d)[kChannels], const V (&descriptor)[kChannels], bool six,
                             const MindScale<V>& m, V (&adjoint)[kChannels]) {
  const V zero = {}, one = zero + A(1);
  V sum = {}, to_variance = {}, ties = {};
  for (int k = 0; k < kChannels; ++k) {
    const V h = -adjoint[k] * descriptor[k] * m.inverse_back, x = d[k] - m.least;
    adjoint[k] = h;
    sum += h;
    to_variance -= h * x;
    ties += d[k] == m.least ? one : zero;
  }
  to_variance *= m.inverse * m.inside;
  const V through_mean = to_variance * (A(1) / kChannels);
  const V share = one / ties;  // a quotient, compilers would move to each of the channels
  const V to_least = -(six ? sum : sum + to_variance) * share;
  for (int k = 0; k < kChannels; ++k) adjoint[k] += through_mean + (d[k] == m.least ? to_least : zero);
}

// In `g`: the differences of the descriptors, moved - fixed. Out: their errors' sum and, in `g`, d loss / d
// moved of weight w.
template <int kChannels, class V>
FASTREG_HD void mind_error(bool absolute, V w, V (&g)[kChannels], V& error) {
  const V zero = {}, one = zero + 1;
  error = zero;
  for (int k = 0; k < kChannels; ++k) {
    const V by = g[k];
    if (absolute) {
      const V sign = by > zero ? one : by < zero ? -one : by;
      error += by * sign, g[k] = w * sign;
    } else {
      error += by * by, g[k] = (w + w) * by;
    }
    g[k] = w == zero ? zero : g[k];
  }
}

}  // namespace fastreg
