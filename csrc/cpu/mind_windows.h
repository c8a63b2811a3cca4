#pragma once
// Sums over windows of rows of vectors, and along a row, for mind_tile.h. Kernel pass only (FASTREG_ISA).
#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Two vectors side by side: the scalar work of a loop serves both.
template <class A>
struct Two {
  Vector<A> v[2];
  FASTREG_HD Two operator+(const Two& o) const { return {v[0] + o.v[0], v[1] + o.v[1]}; }
  FASTREG_HD Two operator-(const Two& o) const { return {v[0] - o.v[0], v[1] - o.v[1]}; }
  FASTREG_HD Two operator*(const Two& o) const { return {v[0] * o.v[0], v[1] * o.v[1]}; }
  FASTREG_HD friend Two operator*(A a, const Two& o) { return {a * o.v[0], a * o.v[1]}; }
};

template <class V, class A>
FASTREG_HD V get(const A* p) {
  if constexpr (std::is_same_v<V, Two<A>>)
    return {load_as<Vector<A>>(p), load_as<Vector<A>>(p + kLanes<A>)};
  else
    return load_as<V>(p);
}
template <class V, class A>
FASTREG_HD void put(A* p, const V& v) {
  if constexpr (std::is_same_v<V, Two<A>>)
    store_as<Vector<A>>(p, v.v[0]), store_as<Vector<A>>(p + kLanes<A>, v.v[1]);
  else
    store_as<V>(p, v);
}

// body(Two<A>() or Vector<A>(), j) for the columns j of a row of n, a multiple of the lanes.
template <class A, class Body>
FASTREG_HD void each_column(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) body(Two<A>(), j);
  if (j < n) body(Vector<A>(), j);
}

// Sums of `taps` consecutive samples, weighted where there are weights: put(i, sample(i) + ... + sample(i +
// taps - 1)) for i of [0, count). Short boxes keep what neighbouring sums share in registers.
template <class V, class A, class Sample, class Put>
FASTREG_HD void windows(int64_t count, int64_t taps, const A* weights, Sample sample, Put put) {
  if (taps == 1) {
    for (int64_t i = 0; i < count; ++i) put(i, sample(i));
  } else if (!weights && taps == 3) {
    V v1 = sample(1), pair = sample(0) + v1;
    for (int64_t i = 0; i < count; ++i) {
      const V v2 = sample(i + 2);
      put(i, pair + v2);
      pair = v1 + v2, v1 = v2;
    }
  } else if (!weights && taps == 5) {
    V v3 = sample(3), v2 = sample(2), v1 = sample(1);
    V pair0 = sample(0) + v1, pair1 = v1 + v2, pair2 = v2 + v3;
    for (int64_t i = 0; i < count; ++i) {
      const V v4 = sample(i + 4);
      put(i, (pair0 + pair2) + v4);
      pair0 = pair1, pair1 = pair2, pair2 = v3 + v4, v3 = v4;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      V sum = {};
      for (int64_t t = 0; t < taps; ++t) sum = sum + (weights ? weights[t] * sample(i + t) : sample(i + t));
      put(i, sum);
    }
  }
}

// What row_windows() may read after the last number that counts.
template <class A>
constexpr int kBeyond = 2 * kLanes<A>;

// The same along a row: out[j] = scale * sum of in[j] ... in[j + taps - 1], or that added to it. n is a
// multiple of the lanes.
template <class A, int kTaps, bool kAdd>
void row_windows(A* __restrict out, const A* __restrict in, int64_t taps, const A* weights, A scale,
                 int64_t n) {
  using V = Vector<A>;
#if defined(__AVX512F__)
  if constexpr (kTaps == 5 && sizeof(A) == 4) {
    // A load that lies across two cache lines counts as two: neighbours come from registers.
    const auto shift = [](V v, V next, auto by) {
      return V(_mm512_maskz_alignr_epi32(0xffff, __m512i(next), __m512i(v), decltype(by)::value));
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, 4> four;
    V v = load_as<V>(in), next = load_as<V>(in + kLanes<A>), pair = v + shift(v, next, one);
    for (int64_t j = 0; j < n; j += kLanes<A>) {
      const V after = load_as<V>(in + j + 2 * kLanes<A>), next_pair = next + shift(next, after, one);
      const V sum = scale * ((pair + shift(pair, next_pair, two)) + shift(v, next, four));
      store_as<V>(out + j, kAdd ? load_as<V>(out + j) + sum : sum);
      v = next, next = after, pair = next_pair;
    }
    return;
  }
#endif
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const auto v = [&](int64_t t) { return load_as<V>(in + j + t); };
    V sum = {};
    if constexpr (kTaps == 3)
      sum = (v(0) + v(1)) + v(2);
    else if constexpr (kTaps == 5)
      sum = ((v(0) + v(1)) + (v(2) + v(3))) + v(4);
    else
      for (int64_t t = 0; t < taps; ++t) sum += weights ? weights[t] * v(t) : v(t);
    sum *= scale;
    store_as<V>(out + j, kAdd ? load_as<V>(out + j) + sum : sum);
  }
}

template <class A, bool kAdd = false>
void row_windows(A* out, const A* in, int64_t taps, const A* weights, A scale, int64_t n) {
  const auto kernel = weights || taps > 5 || taps == 1 ? row_windows<A, 0, kAdd>
                      : taps == 3                      ? row_windows<A, 3, kAdd>
                                                       : row_windows<A, 5, kAdd>;
  kernel(out, in, taps, weights, scale, n);
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
