#pragma once
// Weighted sums of rows under taps that are the same for every row: several outputs at a time, so that a row
// is loaded once for all that it enters. Kernel pass only (FASTREG_ISA).
#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/vector.h"
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace fastreg::FASTREG_ISA {
namespace {

// a b + c, V is A or Vector<A>; rounded once where the instruction set has it, on vectors and voxels alike.
template <class A, class V>
FASTREG_HD V fused(V a, A b, V c) {
#if defined(__FMA__)
  if constexpr (std::is_same_v<V, float>) return __builtin_fmaf(a, b, c);
  if constexpr (std::is_same_v<V, double>) return __builtin_fma(a, b, c);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vector<float>>)
    return V(_mm512_fmadd_ps(__m512(a), _mm512_set1_ps(b), __m512(c)));
  if constexpr (std::is_same_v<V, Vector<double>>)
    return V(_mm512_fmadd_pd(__m512d(a), _mm512_set1_pd(b), __m512d(c)));
#else
  if constexpr (std::is_same_v<V, Vector<float>>)
    return V(_mm256_fmadd_ps(__m256(a), _mm256_set1_ps(b), __m256(c)));
  if constexpr (std::is_same_v<V, Vector<double>>)
    return V(_mm256_fmadd_pd(__m256d(a), _mm256_set1_pd(b), __m256d(c)));
#endif
#else
  return a * b + c;
#endif
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

// out[i] = tap[0] row[i] + ... + tap[count - 1] row[i + count - 1] for i < kRows. A row enters no other sum:
// it may hold a NaN. kRows = 4 needs 4 taps.
template <int kRows, class T, class O, class A>
void sum_rows(const T* const* row, const A* tap, int64_t count, int64_t n, O* const* out) {
  cover_blocks<A, kRows == 1 ? 4 : 2>(n, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
    constexpr int kStep = sizeof(V) / sizeof(A);
    V sum[kRows][kCount] = {};
    auto take = [&]<int kFirst, int kLast>(std::integer_sequence<int, kFirst, kLast>, int64_t t) {
      for (int u = 0; u < kCount; ++u) {
        const V sample = load_as<V>(row[t] + x + u * kStep);
        for (int i = kFirst; i <= kLast; ++i) sum[i][u] = fused(sample, tap[t - i], sum[i][u]);
      }
    };
    if constexpr (kRows == 4) {
      take(std::integer_sequence<int, 0, 0>(), 0);
      take(std::integer_sequence<int, 0, 1>(), 1);
      take(std::integer_sequence<int, 0, 2>(), 2);
    }
    for (int64_t t = kRows - 1; t < count; ++t) take(std::integer_sequence<int, 0, kRows - 1>(), t);
    if constexpr (kRows == 4) {
      take(std::integer_sequence<int, 1, 3>(), count);
      take(std::integer_sequence<int, 2, 3>(), count + 1);
      take(std::integer_sequence<int, 3, 3>(), count + 2);
    }
    for (int i = 0; i < kRows; ++i)
      for (int u = 0; u < kCount; ++u) store_as(out[i] + x + u * kStep, sum[i][u]);
  });
}

// body(std::integral_constant<int, i>()) for i < n: unrolled before anything else, so that arrays of vectors
// which it indexes are registers.
template <int n, class Body>
FASTREG_HD void repeat(Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, n>());
}
#define FASTREG_REPEAT(n, i, ...) repeat<n>([&](auto i) __attribute__((always_inline)) { __VA_ARGS__; })

// sum[i] = tap[0] s(i) + tap[1] (s(i - 1) + s(i + 1)) + ... + tap[r] (s(i - r) + s(i + r)) for i < kRows, of
// kCount numbers or vectors each; sample(j, to) sets `to` to s(j), once for every j on either side. Half the
// products: the mirrored samples are added first, which must not overflow.
template <int kRows, int kCount, class V, class A, class Sample>
FASTREG_HD void mirrored(const A* tap, int64_t r, Sample sample, V (&sum)[kRows][kCount]) {
  // s(j) lies in slot j mod kRows.
  V low[kRows][kCount], high[kRows][kCount];
  FASTREG_REPEAT(kRows, i, {
    sample(i, low[i]);
    FASTREG_REPEAT(kCount, u, (high[i][u] = low[i][u], sum[i][u] = low[i][u] * tap[0]));
  });
  const auto step = [&]<int kSlot>(std::integral_constant<int, kSlot>,
                                   int64_t k) __attribute__((always_inline)) {
    constexpr int kPhase = kSlot % kRows;
    sample(-k, low[(kRows - kPhase) % kRows]);
    sample(kRows - 1 + k, high[(kRows - 1 + kPhase) % kRows]);
    FASTREG_REPEAT(kRows, i, FASTREG_REPEAT(kCount, u, {
                     sum[i][u] = fused(low[(i - kPhase + kRows) % kRows][u] + high[(i + kPhase) % kRows][u],
                                       tap[k], sum[i][u]);
                   }));
  };
  constexpr int kSteps = std::max(kRows, 4);
  int64_t k = 1;
  for (; k + kSteps - 1 <= r; k += kSteps)
    FASTREG_REPEAT(kSteps, i, step(std::integral_constant<int, i + 1>(), k + i));
  FASTREG_REPEAT(kSteps - 1, i, {
    if (k + i <= r) step(std::integral_constant<int, i + 1>(), k + i);
  });
}

// A square of vectors, transposed.
template <class V, int kStep, int... kLane>
FASTREG_HD void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = sizeof...(kLane);
  const V low = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane - kStep : kLane)...);
  const V high = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane : kLane + kStep)...);
  a = low, b = high;
}
template <class A, int kStep = 1>
FASTREG_HD void transpose(Vector<A> (&v)[kLanes<A>]) {
  for (int i = 0; i < kLanes<A>; ++i)
    if (!(i & kStep))
      exchange<Vector<A>, kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes<A>>());
  if constexpr (2 * kStep < kLanes<A>) transpose<A, 2 * kStep>(v);
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
