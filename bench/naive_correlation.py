"""A one-thread-per-output local correlation in CUDA, compiled when it is first asked for: what to beat on a GPU.

3D, fp32, zeros outside, mean over channels. Each output and each gradient is a loop of its own over memory.
"""

import functools

import torch

SOURCE = r"""
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <ATen/Functions.h>

namespace {

struct Sizes {
  int64_t n, c, d, h, w;
  int r;
};

// out (n, offsets, d, h, w) from f and m (n, c, d, h, w)
__global__ void forward(const float* f, const float* m, float* out, Sizes s, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int k = 2 * s.r + 1;
  const int64_t volume = s.d * s.h * s.w, v = i % volume, o = i / volume % (k * k * k), n = i / volume / (k * k * k);
  const int64_t x = v % s.w + o % k - s.r, y = v / s.w % s.h + o / k % k - s.r, z = v / s.w / s.h + o / k / k - s.r;
  float sum = 0;
  if (x >= 0 && x < s.w && y >= 0 && y < s.h && z >= 0 && z < s.d)
    for (int64_t c = 0; c < s.c; ++c)
      sum += f[(n * s.c + c) * volume + v] * m[(n * s.c + c) * volume + (z * s.h + y) * s.w + x];
  out[i] = sum / s.c;
}

// sign +1: gradient to f from m; -1: gradient to m from f
__global__ void backward(const float* g, const float* other, float* out, Sizes s, int64_t count, int sign) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int k = 2 * s.r + 1;
  const int64_t volume = s.d * s.h * s.w, v = i % volume, c = i / volume % s.c, n = i / volume / s.c;
  float sum = 0;
  for (int o = 0; o < k * k * k; ++o) {
    const int64_t x = v % s.w + sign * (o % k - s.r), y = v / s.w % s.h + sign * (o / k % k - s.r);
    const int64_t z = v / s.w / s.h + sign * (o / k / k - s.r);
    if (x < 0 || x >= s.w || y < 0 || y >= s.h || z < 0 || z >= s.d) continue;
    const int64_t there = (z * s.h + y) * s.w + x;
    sum += g[(n * k * k * k + o) * volume + (sign > 0 ? v : there)] * other[(n * s.c + c) * volume + there];
  }
  out[i] = sum / s.c;
}

Sizes sizes(const at::Tensor& t, int64_t r) { return {t.size(0), t.size(1), t.size(2), t.size(3), t.size(4), int(r)}; }
unsigned blocks(int64_t count) { return unsigned((count + 255) / 256); }

at::Tensor naive_forward(const at::Tensor& f, const at::Tensor& m, int64_t r) {
  const int64_t k = 2 * r + 1;
  at::Tensor out = at::empty({f.size(0), k * k * k, f.size(2), f.size(3), f.size(4)}, f.options());
  forward<<<blocks(out.numel()), 256, 0, c10::cuda::getCurrentCUDAStream()>>>(
      f.const_data_ptr<float>(), m.const_data_ptr<float>(), out.mutable_data_ptr<float>(), sizes(f, r), out.numel());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor naive_backward(const at::Tensor& g, const at::Tensor& other, int64_t r, int64_t sign) {
  at::Tensor out = at::empty_like(other);
  backward<<<blocks(out.numel()), 256, 0, c10::cuda::getCurrentCUDAStream()>>>(
      g.const_data_ptr<float>(), other.const_data_ptr<float>(), out.mutable_data_ptr<float>(), sizes(other, r),
      out.numel(), int(sign));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

TORCH_LIBRARY(fastreg_naive, m) {
  m.def("forward(Tensor f, Tensor m, int r) -> Tensor");
  m.def("backward(Tensor g, Tensor other, int r, int sign) -> Tensor");
  m.impl("forward", c10::DispatchKey::CUDA, TORCH_FN(naive_forward));
  m.impl("backward", c10::DispatchKey::CUDA, TORCH_FN(naive_backward));
}
"""


@functools.cache
def _ops():
    from torch.utils import cpp_extension

    cpp_extension.load_inline(
        "fastreg_naive",
        "",
        cuda_sources=SOURCE,
        extra_cuda_cflags=["-O3", "-std=c++20"],
        is_python_module=False,
    )
    return torch.ops.fastreg_naive


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fixed, moving, radius):
        ctx.save_for_backward(fixed, moving)
        ctx.radius = radius
        return _ops().forward(fixed, moving, radius)

    @staticmethod
    def backward(ctx, grad):
        fixed, moving = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            _ops().backward(grad, moving, ctx.radius, 1),
            _ops().backward(grad, fixed, ctx.radius, -1),
            None,
        )


def correlate(fixed, moving, radius):
    if not fixed.is_cuda:
        raise RuntimeError("there is no one-thread-per-output kernel for a CPU")
    return _Correlate.apply(fixed.contiguous(), moving.contiguous(), radius)
