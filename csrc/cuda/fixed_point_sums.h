#pragma once
// Memory and launches around a scatter whose sums are to be bit-reproducible.
#include <ATen/Context.h>

#include "cuda/binding.h"
#include "cuda/fixed_point.cuh"

namespace fastreg {

// The fixed-point sums of one scatter, alive until they are settled.
class FixedPointSums {
 public:
  static bool wanted() { return at::globalContext().deterministicAlgorithms(); }

  // `gradient` (samples, ...) is scattered to `result` (samples, ...), of the arithmetic type, from `voxels`
  // voxels a sample. `args` is told where to.
  FixedPointSums(FixedPointArgs& args, const at::Tensor& gradient, const at::Tensor& result, int64_t voxels,
                 cudaStream_t stream)
      : args_(args), result_(result), stream_(stream) {
    const auto words = result.options().dtype(at::kLong);
    const int64_t samples = result.size(0), count = is_double() ? kFixedWords<double> : kFixedWords<float>;
    sums_ = at::zeros({count, result.numel()}, words), largest_ = at::zeros({samples}, words);
    Word* largest = static_cast<Word*>(largest_.mutable_data_ptr());
    args.sums = static_cast<Word*>(sums_.mutable_data_ptr()), args.largest = largest;
    args.next = result.numel();
    args.log2_terms = 0;
    while ((int64_t(1) << args.log2_terms) < voxels) ++args.log2_terms;
    find_largest(stored(gradient), gradient.const_data_ptr(), samples, gradient.numel() / samples, largest,
                 stream);
  }

  // Adds the sums to what the result holds.
  void settle() {
    const int64_t samples = result_.size(0);
    fastreg::settle(is_double(), args_, samples, result_.numel() / samples, result_.mutable_data_ptr(),
                    stream_);
  }

 private:
  bool is_double() const { return result_.scalar_type() == at::kDouble; }

  const FixedPointArgs& args_;
  at::Tensor result_, sums_, largest_;
  cudaStream_t stream_;
};

}  // namespace fastreg
