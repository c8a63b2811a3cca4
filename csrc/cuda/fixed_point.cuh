#pragma once
// Sums of scattered terms whose bits do not depend on the order of the terms: integer atomics on 64-bit fixed
// point, under torch.use_deterministic_algorithms(True).
//
// The unit is a power of two set per sample by the largest finite |gradient| M. An element gets at most a
// weight of 1 from each of the 2^l voxels of a sample, so with terms in units of M 2^(l - 62) no sum
// overflows; at 256^3 a term is rounded at 2^-38 M. fp64 hands the remainder of a term to a second word and
// that of a remainder to a third, 60 - l more bits each (2^-110 M at 256^3): what is far below M may be what
// matters where displacements are huge. Terms that are not finite are added in floating point to the result,
// where their sum is inf or NaN in any order.
//
// Memory: 8 bytes an element (fp64: 24), 2 (3) volumes. Bytes beyond the default: the gradient is read once
// more, the sums cleared, added to and read, the result read and written; atomics of twice the size. At 256^3
// fp32 about 0.2 ms more, a second read of u included where both gradients are asked for.
#include <cstdint>
#include <cstring>

#include "common/scalar.h"
#include "cuda/launch.h"

namespace fastreg {

using Word = unsigned long long;  // as atomicAdd takes it; a signed sum in two's complement

struct FixedPointArgs {
  Word* sums = nullptr;           // (words, samples, elements); null: floating-point atomics
  const Word* largest = nullptr;  // per sample: M, as the bits of a double
  int64_t next = 0;               // from a word of an element to its next
  int log2_terms = 0;             // l
};

FASTREG_HD double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

template <class A>
constexpr int kFixedWords = sizeof(A) == 8 ? 3 : 1;

// Units of a sample.
template <class A>
struct FixedPoint {
  double per_unit, units;  // 2^-s and 2^s
  double per_remainder, remainders;

  __device__ __forceinline__ FixedPoint(const FixedPointArgs& a, int64_t n) {
    // M < 2^e. Below 2^-1000 units stay where they are: their inverse must be finite.
    const int e = int(a.largest[n] >> 52) - 1022;
    const int s = 62 - a.log2_terms - e < 1000 ? 62 - a.log2_terms - e : 1000;
    units = power_of_two(s), per_unit = power_of_two(-s);
    remainders = power_of_two(60 - a.log2_terms), per_remainder = power_of_two(a.log2_terms - 60);
  }

  // Adds a term to element i, or to `result` if it is not finite.
  __device__ __forceinline__ void add(const FixedPointArgs& a, int64_t i, A term, A* result) const {
    if (!(term - term == A(0))) {
      atomicAdd(result, term);
      return;
    }
    double rest = double(term) * units;
#pragma unroll
    for (int word = 0; word < kFixedWords<A>; ++word) {
      const long long whole = llrint(rest);
      if (whole != 0) atomicAdd(a.sums + word * a.next + i, Word(whole));
      rest = (rest - double(whole)) * remainders;
    }
  }

  __device__ __forceinline__ A value(const FixedPointArgs& a, int64_t i) const {
    double sum = 0;
#pragma unroll
    for (int word = kFixedWords<A> - 1; word >= 0; --word)
      sum = sum * per_remainder + double((long long)(a.sums[word * a.next + i]));
    return A(sum * per_unit);
  }
};

constexpr int kFixedThreads = 256;

// M of each sample, into zeros. Bytes: the gradient once.
template <class T>
__global__ void __launch_bounds__(kFixedThreads)
    largest_kernel(const void* gradient, int64_t samples, int64_t count, Word* largest) {
  using A = arithmetic_t<T>;
  const int64_t step = int64_t(gridDim.x) * kFixedThreads;
  for (int64_t n = blockIdx.y; n < samples; n += gridDim.y) {
    const T* values = static_cast<const T*>(gradient) + n * count;
    A most = 0;
    for (int64_t i = int64_t(blockIdx.x) * kFixedThreads + threadIdx.x; i < count; i += step) {
      const A value = load(values[i]), size = value < 0 ? -value : value;
      if (size - size == A(0) && size > most) most = size;
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
      const A other = __shfl_xor_sync(0xffffffffu, most, by);
      most = other > most ? other : most;
    }
    const double value = double(most);
    Word bits;
    std::memcpy(&bits, &value, 8);
    if (threadIdx.x % 32 == 0 && bits != 0) atomicMax(largest + n, bits);
  }
}

// Adds the sums to `result`, which holds all else.
template <class A>
__global__ void __launch_bounds__(kFixedThreads)
    settle_kernel(FixedPointArgs a, int64_t samples, int64_t count, void* result) {
  const int64_t step = int64_t(gridDim.x) * kFixedThreads;
  for (int64_t n = blockIdx.y; n < samples; n += gridDim.y) {
    const FixedPoint<A> fixed(a, n);
    for (int64_t i = int64_t(blockIdx.x) * kFixedThreads + threadIdx.x; i < count; i += step) {
      const int64_t at = n * count + i;
      static_cast<A*>(result)[at] += fixed.value(a, at);
    }
  }
}

inline dim3 fixed_grid(int64_t samples, int64_t count) {
  const int64_t blocks = (count + kFixedThreads - 1) / kFixedThreads;
  return dim3(unsigned(blocks < 1056 ? blocks : 1056), unsigned(samples < 65535 ? samples : 65535));
}

inline void find_largest(Stored type, const void* gradient, int64_t samples, int64_t count, Word* largest,
                         cudaStream_t stream) {
  with_type(type, [&]<class T>() {
    launch(largest_kernel<T>, fixed_grid(samples, count), kFixedThreads, 0, stream, gradient, samples, count,
           largest);
  });
}

inline void settle(bool fp64, const FixedPointArgs& a, int64_t samples, int64_t count, void* result,
                   cudaStream_t stream) {
  launch(fp64 ? settle_kernel<double> : settle_kernel<float>, fixed_grid(samples, count), kFixedThreads, 0,
         stream, a, samples, count, result);
}

}  // namespace fastreg
