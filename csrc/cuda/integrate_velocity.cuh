#pragma once
// Scaling and squaring. Between its steps a field is packed: the components of a voxel lie side by side (4 in
// 3D, the last one 0; 2 in 2D), so that a corner of a cell is one load, and one atomic, of 16 bytes (fp32).
#include "cuda/fixed_point.cuh"
#include "cuda/sampling.cuh"

namespace fastreg {

// Packed: (n, voxels, width); planar: (n, nd, voxels), of the type stored.
struct IntegrateArgs {
  SamplingGrid grid;
  const void* from;                // step: the field u; pack and unpack: what is copied
  const void* grad;                // packed, backward only
  void* to;                        // backward: zeros, or with fixed point what is not a scatter
  int64_t from_stride, to_stride;  // elements of a sample of `from` and `to`
  double scale;                    // of pack and unpack
  bool planar;                     // the result of a step
  FixedPointArgs fixed;
};

template <int ND>
constexpr int kWidth = ND == 3 ? 4 : 2;

// Adds a voxel to another where any thread may: Hopper has vector atomics.
template <class A, int kCount>
__device__ __forceinline__ void atomic_add(A* to, const Pack<A, kCount>& term) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(A) == 4 && kCount == 4)
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(term.value[0]),
                 "f"(term.value[1]), "f"(term.value[2]), "f"(term.value[3])
                 : "memory");
  else if constexpr (sizeof(A) == 4)
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(term.value[0]), "f"(term.value[1])
                 : "memory");
  else
#endif
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (term.value[k] != A(0)) atomicAdd(to + k, term.value[k]);
}

// Planar to packed and back. Work: a thread per voxel. Bytes: one field read, one written (7 numbers a voxel
// in 3D): at 256^3 fp32 470 MB, 160 us.
template <class T, int ND>
__global__ void __launch_bounds__(kSamplingThreads)
    integrate_pack_kernel(const __grid_constant__ IntegrateArgs a) {
  using A = arithmetic_t<T>;
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const T* from = static_cast<const T*>(a.from) + p.n * a.from_stride + p.voxel;
  Pack<A, kWidth<ND>> out = {};
#pragma unroll
  for (int k = 0; k < ND; ++k) out.value[k] = A(a.scale) * load(from[k * a.grid.n_out]);
  store_pack(static_cast<A*>(a.to) + p.n * a.to_stride + p.voxel * kWidth<ND>, out);
}

template <class T, int ND>
__global__ void __launch_bounds__(kSamplingThreads)
    integrate_unpack_kernel(const __grid_constant__ IntegrateArgs a) {
  using A = arithmetic_t<T>;
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const auto in =
      load_pack<kWidth<ND>>(static_cast<const A*>(a.from) + p.n * a.from_stride + p.voxel * kWidth<ND>);
  T* to = static_cast<T*>(a.to) + p.n * a.to_stride + p.voxel;
#pragma unroll
  for (int k = 0; k < ND; ++k) store(to[k * a.grid.n_out], A(a.scale) * in.value[k]);
}

// u(x) + u(x + u(x)). Work: a thread per voxel (see SamplingGrid). Bytes: a packed field read, one written:
// at 256^3 fp32 537 MB, 180 us at 3 TB/s. Arithmetic: some 180 instructions a voxel, 105 us of issue slots;
// L1: 8 loads of 16 bytes a lane, 40 lines a warp, 95 us. Memory: none.
template <class T, int ND>
__global__ void __launch_bounds__(kSamplingThreads)
    integrate_step_kernel(const __grid_constant__ IntegrateArgs a) {
  using A = arithmetic_t<T>;
  constexpr int kCorners = 1 << ND, w = kWidth<ND>;
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const A* u = static_cast<const A*>(a.from) + p.n * a.from_stride;
  const auto own = load_pack<w>(u + p.voxel * w);
  const Cell<A, ND> cell(a.grid, p, [&](int k) { return own.value[k]; });
  A weight[kCorners];
  cell.weights(weight);
  Pack<A, w> corner[kCorners];
#pragma unroll
  for (int c = 0; c < kCorners; ++c)
    corner[c] = weight[c] != A(0) ? load_pack<w>(u + cell.index(c) * w) : Pack<A, w>{};
  Pack<A, w> out = {};
#pragma unroll
  for (int k = 0; k < ND; ++k) {
    A sum = cell.nan() ? A(NAN) : A(0);
#pragma unroll
    for (int c = 0; c < kCorners; ++c) sum += weight[c] * corner[c].value[k];
    out.value[k] = own.value[k] + sum;
  }
  if (a.planar) {
    T* to = static_cast<T*>(a.to) + p.n * a.to_stride + p.voxel;
#pragma unroll
    for (int k = 0; k < ND; ++k) store(to[k * a.grid.n_out], out.value[k]);
  } else {
    store_pack(static_cast<A*>(a.to) + p.n * a.to_stride + p.voxel * w, out);
  }
}

// The gradient of a step: g + g . (u differentiated), at the voxel itself (kOwn), and the shares of g at the
// corners it reads (kScatter), into zeros by atomics. On fixed point the first is stored and the second goes
// to the sums, in two launches.
//
// Work, and shares handed on along x, as the backward of warp. Bytes: 2 packed fields read, one cleared and
// added to: at 256^3 fp32 1.3 GB, 450 us at 3 TB/s; atomics of 5 x 16 bytes a voxel, 1.3 GB in L2, 670 us at
// 2 TB/s. Arithmetic: some 380 instructions a voxel, 220 us of issue slots. Memory: none.
template <class A, int ND, bool kScatter, bool kOwn, bool kFixed>
__global__ void __launch_bounds__(kSamplingThreads)
    integrate_step_bwd_kernel(const __grid_constant__ IntegrateArgs a) {
  constexpr int kCorners = 1 << ND, w = kWidth<ND>;
  using Voxel = Pack<A, w>;
  const Place p = place_of<ND>(a.grid);
  const A* u = static_cast<const A*>(a.from) + p.n * a.from_stride;
  A* to = static_cast<A*>(a.to) + p.n * a.to_stride;
  const Voxel here = p.there ? load_pack<w>(u + p.voxel * w) : Voxel{};
  const Voxel g =
      p.there ? load_pack<w>(static_cast<const A*>(a.grad) + (p.n * a.grid.n_out + p.voxel) * w) : Voxel{};
  Cell<A, ND> cell(a.grid, p, [&](int k) { return here.value[k]; });
  if constexpr (kOwn) {
    A sums[kCorners] = {};
    const Voxel first = cell.has(0) ? load_pack<w>(u + cell.index(0) * w) : Voxel{};
#pragma unroll
    for (int c = 1; c < kCorners; ++c) {
      const Voxel corner = cell.has(c) ? load_pack<w>(u + cell.index(c) * w) : Voxel{};
#pragma unroll
      for (int k = 0; k < ND; ++k) sums[c] += g.value[k] * (corner.value[k] - first.value[k]);
    }
    Voxel own = {};
#pragma unroll
    for (int k = 0; k < ND; ++k) own.value[k] = g.value[k] + cell.slope(k, sums);
    if constexpr (kScatter) {
      if (p.there) atomic_add(to + p.voxel * w, own);
    } else {
      if (p.there) store_pack(to + p.voxel * w, own);
    }
  }
  if constexpr (kScatter) {
    A weight[kCorners];
    cell.weights(weight), cell.meet_neighbours();
    const auto add = [&](int corner, const Voxel& term) {
      bool any = false;
#pragma unroll
      for (int k = 0; k < ND; ++k) any |= term.value[k] != A(0);
      if (!any) return;
      const int64_t i = cell.index(corner) * w;
      if constexpr (kFixed) {
        const FixedPoint<A> fixed(a.fixed, p.n);
#pragma unroll
        for (int k = 0; k < ND; ++k)
          fixed.add(a.fixed, p.n * a.grid.n_out * w + i + k, term.value[k], to + i + k);
      } else {
        atomic_add(to + i, term);
      }
    };
#pragma unroll
    for (int c = 0; c < kCorners; c += 2) {
      Voxel low = {}, high = {};
#pragma unroll
      for (int k = 0; k < ND; ++k) {
        low.value[k] = weight[c] != A(0) ? g.value[k] * weight[c] : A(0);
        high.value[k] = weight[c + 1] != A(0) ? g.value[k] * weight[c + 1] : A(0);
        const A before = __shfl_up_sync(0xffffffffu, high.value[k], 1);
        if (cell.taken()) low.value[k] += before;
      }
      add(c, low);
      if (!cell.given()) add(c + 1, high);
    }
  }
}

// kernel.operator()<T>() gives the kernel of a storage type.
template <class Kernel>
void integrate_launch(Stored type, const IntegrateArgs& a, cudaStream_t stream, Kernel kernel) {
  with_type(type, [&]<class T>() {
    launch(kernel.template operator()<T>(), unsigned(a.grid.blocks), kSamplingThreads, 0, stream, a);
  });
}

inline void integrate_pack(Stored type, int nd, const IntegrateArgs& a, cudaStream_t stream) {
  integrate_launch(type, a, stream, [&]<class T>() {
    return nd == 3 ? integrate_pack_kernel<T, 3> : integrate_pack_kernel<T, 2>;
  });
}

inline void integrate_unpack(Stored type, int nd, const IntegrateArgs& a, cudaStream_t stream) {
  integrate_launch(type, a, stream, [&]<class T>() {
    return nd == 3 ? integrate_unpack_kernel<T, 3> : integrate_unpack_kernel<T, 2>;
  });
}

inline void integrate_step(Stored type, int nd, const IntegrateArgs& a, cudaStream_t stream) {
  integrate_launch(type, a, stream, [&]<class T>() {
    return nd == 3 ? integrate_step_kernel<T, 3> : integrate_step_kernel<T, 2>;
  });
}

// With a.fixed, `settle` is left to do.
inline void integrate_step_bwd(Stored type, int nd, const IntegrateArgs& a, cudaStream_t stream) {
  const auto run = [&]<class A>(A) {
    const auto start = [&](auto kernel) {
      launch(kernel, unsigned(a.grid.blocks), kSamplingThreads, 0, stream, a);
    };
    if (a.fixed.sums) {
      start(nd == 3 ? integrate_step_bwd_kernel<A, 3, false, true, false>
                    : integrate_step_bwd_kernel<A, 2, false, true, false>);
      start(nd == 3 ? integrate_step_bwd_kernel<A, 3, true, false, true>
                    : integrate_step_bwd_kernel<A, 2, true, false, true>);
    } else {
      start(nd == 3 ? integrate_step_bwd_kernel<A, 3, true, true, false>
                    : integrate_step_bwd_kernel<A, 2, true, true, false>);
    }
  };
  type == Stored::f64 ? run(double()) : run(float());
}

}  // namespace fastreg
