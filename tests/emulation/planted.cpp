// Kernels with one fault each, which the emulation must name; and the same kernel without any.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "cuda/launch.h"

namespace fastreg {
namespace {

enum Fault : int64_t {
  none,
  missing_barrier,
  divergent_barrier,
  shared_off_by_one,
  read_past_the_end,
  write_past_the_end,
  unwritten_output,
  unwritten_shared,
  write_after_read,
  divergent_shuffle,
  copy_not_waited_for,
  early_return,
  missing_syncwarp,
  write_before_the_start,
};

constexpr int kThreads = 64;

// Each block reverses its 64 numbers through shared memory and adds the sum of its warp's.
__global__ void reverse_kernel(const float* in, float* out, int64_t n, int64_t fault) {
  FASTREG_SHARED(float, tile, kThreads);
  FASTREG_DYNAMIC_SHARED(float, copied);
  const int t = threadIdx.x;
  const int64_t i = int64_t(blockIdx.x) * kThreads + t;
  if (fault == early_return && i + 1 == n) return;
  copy_async(copied + t, in + i, i < n);
  copy_commit();
  if (!(fault == unwritten_shared && t == 5)) tile[t] = i < n ? in[i] : 0.0f;
  if (fault == missing_syncwarp) tile[t ^ 1] = 1.0f;
  if (fault == divergent_barrier) {
    if (t < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault != missing_barrier) {
    __syncthreads();
  }
  float x = tile[kThreads - 1 - t + (fault == shared_off_by_one)];
  if (fault == write_after_read) tile[t] = x;
  float sum = x;
  if (!(fault == divergent_shuffle && t == 40))
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(0xffffffff, sum, by);
  if (fault != copy_not_waited_for) copy_wait<0>();
  sum += copied[t];
  if (fault == read_past_the_end) sum += in[i + 1];
  if (fault == unwritten_output && i == n / 2) return;
  if (i < n) out[i] = sum;
  if (fault == write_past_the_end && i + 1 == n) out[n] = sum;
  if (fault == write_before_the_start && i == 0) out[-1] = sum;
}

at::Tensor reverse(const at::Tensor& in, int64_t fault) {
  at::Tensor out = at::empty_like(in);
  const int64_t n = in.numel();
  launch(reverse_kernel, dim3(unsigned((n + kThreads - 1) / kThreads)), dim3(kThreads),
         kThreads * sizeof(float), nullptr, in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), n,
         fault);
  return out;
}

TORCH_LIBRARY(fastreg_planted, m) {
  m.def("reverse(Tensor x, int fault) -> Tensor");
  m.impl("reverse", c10::DispatchKey::CPU, TORCH_FN(reverse));
}

}  // namespace
}  // namespace fastreg
