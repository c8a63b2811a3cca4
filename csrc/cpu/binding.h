#pragma once
// What the bindings of every CPU op need beyond common/tensor.h: memory and threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "common/tensor.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastreg {

// What FASTREG_LIBRARY_IMPL has put on the list, for module.cpp to register when Python starts the module:
// while the file is being loaded, nothing could catch that an op has another schema by now, and the process
// would end.
struct Registration {
  const char* library;
  void (*implement)(torch::Library&);
  const char* file;
  uint32_t line;
  static std::vector<Registration>& all() {
    static std::vector<Registration> list;
    return list;
  }
};

#define FASTREG_LIBRARY_IMPL(library, m)                                                          \
  void implement_##library(torch::Library&);                                                      \
  [[maybe_unused]] const bool listed_##library =                                                  \
      (Registration::all().push_back({#library, implement_##library, __FILE__, __LINE__}), true); \
  void implement_##library(torch::Library& m)

// What cuda/binding.h makes current: on a CPU, nothing.
struct Device {
  template <class... Tensors>
  explicit Device(const char*, const Tensors&...) {}
};

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
