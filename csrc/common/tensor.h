#pragma once
// What bindings ask of tensors, on any device: checks of what protects memory (Python says the rest), types,
// options.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <vector>

#include "common/scalar.h"
#include "common/warp.h"

#define FASTREG_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, "fastreg::", op, ": ", __VA_ARGS__)

namespace fastreg {

using OptionalTensor = std::optional<at::Tensor>;

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

// Null where `t` is undefined.
inline const void* data_or_null(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Of no elements where it is not wanted.
inline at::Tensor empty_if(bool wanted, at::IntArrayRef size, const at::TensorOptions& options) {
  return at::empty(wanted ? size : at::IntArrayRef{0}, options);
}

inline std::vector<int64_t> with_channels(const at::Tensor& image, int64_t channels) {
  auto size = image.sizes().vec();
  size[1] = channels;
  return size;
}

// What weighs the voxels of `image`, (N, 1, *spatial), in its arithmetic type; undefined where there is none.
inline at::Tensor per_voxel(const char* op, const char* name, const OptionalTensor& t,
                            const at::Tensor& image) {
  if (!t) return {};
  FASTREG_CHECK(t->sizes() == with_channels(image, 1), op, name, " must have shape (N, 1, *spatial)");
  return t->to(arithmetic_of(image)).contiguous();
}

// D, H, W of what is sampled; 2D: D = 1. Positions hold 29 bits.
inline void volume_size(const char* op, at::IntArrayRef sizes, int64_t (&size)[3]) {
  const int64_t nd = int64_t(sizes.size()) - 2;
  for (int k = 0; k < 3; ++k) {
    size[k] = k < 3 - nd ? 1 : sizes[k + nd - 1];
    FASTREG_CHECK(size[k] < kFarthest, op, "an axis must be shorter than 2^29");
  }
}

}  // namespace fastreg
