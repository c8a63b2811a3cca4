#pragma once
// What the bindings of lcc_loss hand to its kernels: lcc_windows.cuh and lcc_gradient.cuh (windows that fit
// shared memory, fp32 arithmetic), lcc_separable.cuh (every other).
#include "common/lcc_loss.h"
#include "common/lcc_taps.h"
#include "common/scalar.h"
#include "cuda/reduce.h"

namespace fastreg {

// 2D images are volumes of one plane whose windows hold one plane.
struct LccArgs : LccCall {
  double* partial;  // (nc, parts): sums of mask * -LCC
  int64_t nc, D, H, W;
  Stored type;
  bool flat;  // 2D
};

constexpr int kLccMoments = 5;  // f, m, ff, mm, fm; and with a mask the weight

inline int lcc_moments(const LccArgs& a) { return kLccMoments + (a.mask != nullptr); }

// How a channel is cut: `group` channels at a time, `planes` planes of windows at a time, whose adjoint maps
// lie in a ring of `ring` planes.
struct LccPlan {
  int64_t group, planes, ring;
  int64_t parts;    // of the loss, per channel
  int64_t scratch;  // bytes
};

// What a window passes on: the weight of its LCC in the loss, times -1.
template <class A>
__device__ __forceinline__ A lcc_upstream(const LccArgs& a, int64_t at) {
  if (a.upstream) return static_cast<const A*>(a.upstream)[at] / A(-a.c);
  return a.mask ? -static_cast<const A*>(a.mask)[at] : A(-1);
}

// Adjoint maps of a window: e; a, a mean_f + e mean_m; b, b mean_m + e mean_f. A window that is not finite
// passes NaN to all its samples, unless it passes on nothing.
template <class A>
struct LccAdjoints {
  A e, own[2], mean[2];
};
template <class A>
__device__ __forceinline__ LccAdjoints<A> lcc_adjoints_of(const LccWindow<A>& w, A upstream) {
  if (!w.finite) {
    const A bad = upstream != A(0) ? A(NAN) : A(0);
    return {bad, {bad, bad}, {bad, bad}};
  }
  if (upstream == A(0)) return {};
  const A e = upstream * w.e, a = upstream * w.a, b = upstream * w.b;
  return {e, {a, b}, {a * w.mean_f + e * w.mean_m, b * w.mean_m + e * w.mean_f}};
}

// Gradient by a sample from the sums of the adjoint maps; a sample that is not finite must not meet a window
// that passes 0 to it, the others carry the NaN.
template <class A>
__device__ __forceinline__ A lcc_gradient(A self, A partner, A own, A e, A mean) {
  const A f = self - self == A(0) ? self : A(0), m = partner - partner == A(0) ? partner : A(0);
  return f * own + m * e - mean;
}

}  // namespace fastreg
