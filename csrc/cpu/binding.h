#pragma once
// What the bindings of every CPU op need: tensors, threads, and checks of what protects memory (Python says
// the rest).
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "common/scalar.h"
#include "common/warp.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#define FASTREG_CHECK(condition, op, rule) TORCH_CHECK_VALUE(condition, "fastreg::", op, ": ", rule)

namespace fastreg {

inline at::ScalarType arithmetic_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Stored stored(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Stored::f64;
    case at::kFloat:
      return Stored::f32;
    case at::kHalf:
      return Stored::f16;
    case at::kBFloat16:
      return Stored::bf16;
    default:
      TORCH_CHECK_TYPE(false, "fastreg: tensors must be fp64, fp32, fp16 or bf16, got ", t.scalar_type());
  }
}

inline Padding padding_of(c10::string_view name) {
  return name == "zeros" ? Padding::zeros : name == "border" ? Padding::border : Padding::reflection;
}

// Uninitialised, in pages of 2 MiB where the system grants them: in small ones, a result of several hundred
// MB takes longer to map than to compute.
inline at::Tensor empty_large(at::IntArrayRef size, at::TensorOptions options) {
  at::Tensor t = at::empty(size, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// (N,) from partial sums that lie sample by sample, added in order: the same bits whatever the thread count.
inline at::Tensor sample_sums(const std::vector<double>& partial, int64_t n_samples, at::ScalarType type) {
  at::Tensor sums = at::zeros({n_samples}, at::kDouble);
  double* out = sums.mutable_data_ptr<double>();
  const int64_t each = n_samples ? int64_t(partial.size()) / n_samples : 0;
  for (int64_t n = 0; n < n_samples; ++n)
    for (int64_t i = 0; i < each; ++i) out[n] += partial[n * each + i];
  return sums.to(type);
}

}  // namespace fastreg
