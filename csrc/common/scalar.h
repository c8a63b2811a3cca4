#pragma once
// Storage types and their arithmetic type: halves are loaded to fp32, computed there, and rounded once on the
// way out.
#include <cstdint>
#include <cstring>

#include "common/macros.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#if defined(__F16C__)
#include <immintrin.h>
#else
#include <c10/util/Half.h>
#endif

namespace fastreg {

enum class Stored { f64, f32, f16, bf16 };

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

// Calls f.template operator()<T>() with the storage type `type` names.
template <class F>
void with_type(Stored type, F f) {
  switch (type) {
    case Stored::f64:
      return f.template operator()<double>();
    case Stored::f32:
      return f.template operator()<float>();
    case Stored::f16:
      return f.template operator()<half_t>();
    case Stored::bf16:
      return f.template operator()<bfloat16_t>();
  }
}

FASTREG_HD double load(double x) { return x; }
FASTREG_HD float load(float x) { return x; }
FASTREG_HD float load(bfloat16_t x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FASTREG_HD float load(half_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return c10::detail::fp16_ieee_to_fp32_value(x.bits);
#endif
}

FASTREG_HD void store(double& out, double x) { out = x; }
FASTREG_HD void store(float& out, float x) { out = x; }
FASTREG_HD void store(bfloat16_t& out, float x) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // A NaN whose payload sits in the low bits would round to infinity.
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
FASTREG_HD void store(half_t& out, float x) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#elif defined(__F16C__)
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  out.bits = c10::detail::fp16_ieee_from_fp32_value(x);
#endif
}

}  // namespace fastreg
