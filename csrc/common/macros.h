#pragma once
// Functions under common/ hold the arithmetic of an op once, for the CPU loops and for CUDA kernels alike.
#ifdef __CUDACC__
#define FASTREG_HD __host__ __device__ __forceinline__
#else
#define FASTREG_HD inline __attribute__((always_inline))
#endif

#define FASTREG_LIKELY(x) __builtin_expect(!!(x), 1)
