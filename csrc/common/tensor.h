#pragma once
// What bindings ask of tensors, on any device: checks of what protects memory (Python says the rest), types,
// options.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "common/scalar.h"
#include "common/warp.h"

#define FASTREG_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, "fastreg::", op, ": ", __VA_ARGS__)

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

}  // namespace fastreg
