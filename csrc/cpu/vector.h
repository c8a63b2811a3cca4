#pragma once
// SIMD along x for kernels that stream rows: a loop body is written once, for a vector of voxels and for a
// single one. Kernel pass only (FASTREG_ISA): the width of a vector is that of the instruction set.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/scalar.h"

namespace fastreg::FASTREG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A, int kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <class A, int kBytes = kVectorBytes>
using Vector = typename VectorOf<A, kBytes>::type;
// The bits of a Vector<float>, and 16 of each.
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// V is Vector<A> or A, A the arithmetic type of T.
template <class V, class T>
FASTREG_HD V load_as(const T* p) {
  using A = arithmetic_t<T>;
  if constexpr (std::is_same_v<V, A>) {
    return load(*p);
  } else if constexpr (std::is_same_v<T, A>) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, half_t>) {
    return V(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, half_t>) {
    return V(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    Halves half;
    std::memcpy(&half, p, sizeof(half));
    return V(__builtin_convertvector(half, Words) << 16);
  } else {
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = load(p[i]);
    V v;
    std::memcpy(&v, lanes, sizeof(V));
    return v;
  }
}

template <class V, class T>
FASTREG_HD void store_as(T* p, V v) {
  using A = arithmetic_t<T>;
  if constexpr (std::is_same_v<V, A>) {
    store(*p, v);
  } else if constexpr (std::is_same_v<T, A>) {
    std::memcpy(p, &v, sizeof(V));
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, half_t>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, half_t>) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#endif
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    // As store() of one voxel.
    const Words bits = Words(v), quiet = Words{} + 0x7fc0;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves half = __builtin_convertvector(v != v ? quiet : rounded, Halves);
    std::memcpy(p, &half, sizeof(half));
  } else {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof(V));
    for (int i = 0; i < kLanes<A>; ++i) store(p[i], lanes[i]);
  }
}

// Asks for what `count` numbers from p on lie in: of the row after the one at work, which it then waits for
// no longer. The processor's own prefetchers stop at every page, after six rows of 160 voxels in fp32.
template <bool kWrite = false, class T>
void ask(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, kWrite);
}

// The same number in every lane.
template <class V, class A>
FASTREG_HD V fill(A a) {
  return V{} + a;
}

template <class A>
FASTREG_HD double lane_sum(Vector<A> v) {
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
  double sum = 0;
  for (A lane : lanes) sum += lane;
  return sum;
}

// Calls body(V(), x) so that each x of [begin, end) is visited once: vectors first, then single voxels.
template <class A, class Body>
FASTREG_HD void each_x(int64_t begin, int64_t end, Body body) {
  int64_t x = begin;
  for (; x + kLanes<A> <= end; x += kLanes<A>) body(Vector<A>(), x);
  for (; x < end; ++x) body(A(), x);
}

// As each_x for bodies that may run twice at a voxel (no sums): the last vector overlaps the one before.
template <class A, class Body>
FASTREG_HD void cover_x(int64_t begin, int64_t end, Body body) {
  if (end - begin < kLanes<A>) return each_x<A>(begin, end, body);
  int64_t x = begin;
  for (; x + kLanes<A> <= end; x += kLanes<A>) body(Vector<A>(), x);
  if (x < end) body(Vector<A>(), end - kLanes<A>);
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA
