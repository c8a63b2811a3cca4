#pragma once
// What kernels use of CUDA beyond its own names, and how they are launched. Under FASTREG_EMULATION the same
// names and CUDA's come from tests/emulation/, where g++ compiles the kernels and every thread is a fiber.
//
// Shared memory is declared with FASTREG_SHARED or FASTREG_DYNAMIC_SHARED and passed on as Shared<T>, never
// as a plain pointer or reference: under emulation it knows who wrote each word since which barrier.
#ifdef FASTREG_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastreg {

template <class T>
using Shared = T*;

// `count` elements of a block's static shared memory (48 KB in all).
#define FASTREG_SHARED(T, name, count)           \
  __shared__ alignas(16) T name##_memory[count]; \
  ::fastreg::Shared<T> name = name##_memory

// The block's dynamic shared memory, 16-byte aligned.
#define FASTREG_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  ::fastreg::Shared<T> name = reinterpret_cast<T*>(dynamic_shared)

// `count` elements from `begin` on, with bounds of their own.
template <class T>
__device__ __forceinline__ Shared<T> part(Shared<T> memory, int64_t begin, int64_t) {
  return memory + begin;
}
// The same memory as elements of another type (of 4 bytes or a multiple).
template <class U, class T>
__device__ __forceinline__ Shared<U> shared_as(Shared<T> memory) {
  return reinterpret_cast<U*>(memory);
}

// Copies a T (4, 8 or 16 bytes, aligned) into shared memory past the registers; a zero where !valid, and then
// `from` is not read. It is there after copy_wait by this thread, and for the others after a barrier on top.
template <class T>
__device__ __forceinline__ void copy_async(Shared<T> to, const T* from, bool valid = true) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(sizeof(T)),
               "r"(valid ? int(sizeof(T)) : 0)
               : "memory");
}
// Ends a group of copies; copy_wait<n> waits for all groups but the last n.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Aligned to its own size: one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <int kCount, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // Or the next launch of whoever catches this is blamed.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("fastreg: ") + what + ": " + cudaGetErrorString(status));
}

// Launches unless the grid is empty. `shared` may be up to 99 KB.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // Beyond 48 KB, less what may be static.
  if (shared > 47 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), "kernel launch");
}

}  // namespace fastreg
#endif
