#pragma once
// What the bindings of every CPU op need: tensors, threads, and checks of what protects memory (Python says
// the rest).
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common/scalar.h"

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

}  // namespace fastreg
