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

}  // namespace
}  // namespace fastreg::FASTREG_ISA
