#pragma once
// Sums of lcc_weighted.cpp under the taps of its windows, along each axis. Kernel pass only (FASTREG_ISA).
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/lcc_args.h"
#include "cpu/row_sums.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

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
#if defined(__AVX512F__)
      return V(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
#endif
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

// Rows that are summed at once, as registers allow: eight, their mirrored samples on either side, and the
// sums.
constexpr int kGroup = kLanes<double>;
// Sums of rows, which lie in a ring.
class Taps {
 public:
  Taps(const LccTaps& t, int64_t radius) : r(radius), tap(t.tap), row(2 * r + kGroup) {}

  // out[i] = sum over the rows around the one at i, first <= i < first + kGroup. Row i lies at base + i %
  // ring
  // * step; `nothing` stands for those outside [0, size).
  void sum(int64_t first, int64_t size, const double* base, int64_t ring, int64_t step, const double* nothing,
           double* const* out, int64_t n) {
    if (size == 1) {
      for (int64_t x = 0; x < n; ++x) out[0][x] = tap[0] * base[x];
      return;
    }
    int64_t i = first - r, slot = std::max<int64_t>(i, 0) % ring;
    for (auto& pointer : row) {
      const bool inside = i >= 0 && i < size;
      pointer = inside ? base + slot * step : nothing;
      if (inside && ++slot == ring) slot = 0;
      ++i;
    }
    const double* const* centre = row.data() + r;
    cover_blocks<double, 1>(n, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
      constexpr int kStep = sizeof(V) / sizeof(double);
      V sum[kGroup][kCount];
      mirrored(
          tap, r,
          [&](int64_t j, V(&to)[kCount]) __attribute__((always_inline)) {
            FASTREG_REPEAT(kCount, u, to[u] = load_as<V>(centre[j] + x + u * kStep));
          },
          sum);
      FASTREG_REPEAT(kGroup, k, FASTREG_REPEAT(kCount, u, store_as(out[k] + x + u * kStep, sum[k][u])));
    });
  }

  const int64_t r;

 private:
  const double* tap;
  std::vector<const double*> row;
};

// Sums along x, where the n voxels of kLanes<double> rows alternate: row i's voxel x at x * lanes + i. Voxels
// beyond the row's ends are zeros.
void sum_across(const LccTaps& t, int64_t r, const double* in, double* out, int64_t n) {
  using V = Vector<double>;
  constexpr int L = kLanes<double>;
  auto voxels = [&]<int kRows, int kCount>(std::integer_sequence<int, kRows, kCount>, int64_t x) {
    V sum[kRows][kCount];
    const double* centre = in + x * L;
    mirrored(
        t.tap, r,
        [&](int64_t j, V(&to)[kCount]) __attribute__((always_inline)) {
          FASTREG_REPEAT(kCount, u, to[u] = load_as<V>(centre + (j + u * kRows) * L));
        },
        sum);
    FASTREG_REPEAT(kRows, i,
                   FASTREG_REPEAT(kCount, u, store_as<V>(out + (x + i + u * kRows) * L, sum[i][u])));
  };
  int64_t x = 0;
  for (; x + kGroup <= n; x += kGroup) voxels(std::integer_sequence<int, kGroup, 1>(), x);
  for (; x < n; ++x) voxels(std::integer_sequence<int, 1, 1>(), x);
}

// Along a single row.
void sum_along(const LccTaps& t, int64_t r, const double* in, double* out, int64_t n) {
  cover_blocks<double, 4>(n, [&]<class V, int kCount>(V, Count<kCount>, int64_t x) {
    constexpr int kStep = sizeof(V) / sizeof(double);
    V sum[1][kCount];
    mirrored(
        t.tap, r,
        [&](int64_t j, V(&to)[kCount]) __attribute__((always_inline)) {
          FASTREG_REPEAT(kCount, u, to[u] = load_as<V>(in + j + x + u * kStep));
        },
        sum);
    FASTREG_REPEAT(kCount, u, store_as(out + x + u * kStep, sum[0][u]));
  });
}

double weight_outside(const LccTaps& t, int64_t i, int64_t size) {
  return t.tail[std::min(i + 1, t.length)] + t.tail[std::min(size - i, t.length)];
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
