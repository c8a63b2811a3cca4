#pragma once
// What the bindings of every CUDA op need. A .cu registers with TORCH_LIBRARY_IMPL(fastreg,
// FASTREG_DEVICE_KEY, m); each function, here or in common/<op>_op.h, opens with a Device, which makes the
// tensors' device current for its scope.
#include "common/tensor.h"
#include "cuda/launch.h"
#ifdef FASTREG_EMULATION
#define FASTREG_DEVICE_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define FASTREG_DEVICE_KEY CUDA
#endif

namespace fastreg {

constexpr int64_t kMaxGridY = 65535;  // and z

// The device of a call's tensors, current in its scope, and the stream that is current there.
class Device {
 public:
  // `others` (tensors or optional ones) must lie on the device of `first`.
  template <class... Others>
  Device(const char* op, const at::Tensor& first, const Others&... others) {
    (check(op, first, others), ...);
#ifndef FASTREG_EMULATION
    FASTREG_CHECK(first.is_cuda(), op, "all tensors must be on one device, got ", first.device(),
                  " and a GPU");
    guard_.set_device(first.device());
#endif
  }

#ifdef FASTREG_EMULATION
  cudaStream_t stream() const { return nullptr; }
#else
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif

 private:
  static void check(const char* op, const at::Tensor& first, const at::Tensor& other) {
    FASTREG_CHECK(!other.defined() || other.device() == first.device(), op,
                  "all tensors must be on one device, got ", first.device(), " and ", other.device());
  }
  static void check(const char* op, const at::Tensor& first, const std::optional<at::Tensor>& other) {
    if (other) check(op, first, *other);
  }
#ifndef FASTREG_EMULATION
  c10::cuda::OptionalCUDAGuard guard_;
#endif
};

}  // namespace fastreg
