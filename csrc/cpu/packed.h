#pragma once
// Packed fields: the components of a voxel side by side, 4 in 3D (the last one 0), 2 in 2D; a voxel is a
// vector and so are two neighbours along x. Kernel pass only.
#ifdef FASTREG_ISA

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "common/scalar.h"

// Vectors wider than the instruction set's go through functions that are all inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastreg::FASTREG_ISA {
namespace {

template <class A, int ND>
struct Packed {
  static constexpr int kWidth = ND == 3 ? 4 : 2;
  typedef A Voxel __attribute__((vector_size(kWidth * sizeof(A))));
  typedef A Pair __attribute__((vector_size(2 * kWidth * sizeof(A))));  // of neighbours along x
};
template <class A, int ND>
constexpr int kWidth = Packed<A, ND>::kWidth;
template <class A, int ND>
using Voxel = typename Packed<A, ND>::Voxel;
template <class A, int ND>
using Pair = typename Packed<A, ND>::Pair;

template <class V, class A>
FASTREG_HD V get(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class A>
FASTREG_HD void put(A* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class A, int ND>
FASTREG_HD Voxel<A, ND> near_x(Pair<A, ND> p) {
  if constexpr (ND == 3)
    return __builtin_shufflevector(p, p, 0, 1, 2, 3);
  else
    return __builtin_shufflevector(p, p, 0, 1);
}
template <class A, int ND>
FASTREG_HD Voxel<A, ND> far_x(Pair<A, ND> p) {
  if constexpr (ND == 3)
    return __builtin_shufflevector(p, p, 4, 5, 6, 7);
  else
    return __builtin_shufflevector(p, p, 2, 3);
}

// Component k of the result is the sum over the components of terms[k].
template <class A, int ND>
FASTREG_HD Voxel<A, ND> sums(const Voxel<A, ND> (&terms)[ND]) {
  if constexpr (ND == 3) {
    const Voxel<A, ND> zero = {};
    const auto zy = __builtin_shufflevector(terms[0], terms[1], 0, 4, 1, 5);
    const auto zy2 = __builtin_shufflevector(terms[0], terms[1], 2, 6, 3, 7);
    const auto x = __builtin_shufflevector(terms[2], zero, 0, 4, 1, 5);
    const auto x2 = __builtin_shufflevector(terms[2], zero, 2, 6, 3, 7);
    return __builtin_shufflevector(zy, x, 0, 1, 4, 5) + __builtin_shufflevector(zy, x, 2, 3, 6, 7) +
           __builtin_shufflevector(zy2, x2, 0, 1, 4, 5);
  } else {
    return __builtin_shufflevector(terms[0], terms[1], 0, 2) +
           __builtin_shufflevector(terms[0], terms[1], 1, 3);
  }
}

// Voxels [begin, end) of a planar field of n_voxels, times scale.
template <class A, int ND, class T>
void pack_voxels(const T* __restrict planar, int64_t n_voxels, A scale, int64_t begin, int64_t end,
                 A* __restrict packed) {
  for (int64_t at = begin; at < end; ++at) {
    Voxel<A, ND> v = {};
    for (int k = 0; k < ND; ++k) v[k] = scale * load(planar[k * n_voxels + at]);
    put(packed + at * kWidth<A, ND>, v);
  }
}

// The corners of a voxel's cell, pair by pair.
template <class A, int ND>
struct Cell {
  Pair<A, ND> pair[1 << (ND - 1)];

  FASTREG_HD Cell(const A* corner, int64_t line, int64_t plane) {
    pair[0] = get<Pair<A, ND>>(corner);
    pair[1] = get<Pair<A, ND>>(corner + line);
    if constexpr (ND == 3) {
      pair[2] = get<Pair<A, ND>>(corner + plane);
      pair[3] = get<Pair<A, ND>>(corner + plane + line);
    }
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA

#endif
