#pragma once
// The inverse of a displacement: a thread iterates at its point until it is done. u is packed first, as
// between the steps of integrate_velocity, so that a corner of a cell is one load of 16 bytes (fp32).
#include "common/invert_displacement.h"
#include "cuda/integrate_velocity.cuh"

namespace fastreg {

struct InvertArgs {
  SamplingGrid grid;
  const void* packed;  // u, (n, *in, width), arithmetic type, as is all that follows
  const void* points;  // (n, nd, *out) or null: the voxels
  const void* grad;    // (n, nd, *out), adjoint only, as v
  const void* v;
  void* result;  // (n, nd, *out)
  int64_t iterations;
};

// u near a point of its thread.
template <class A, int ND>
struct InvertField {
  static constexpr int w = kWidth<ND>;
  const InvertArgs& a;
  const A* u;
  Place at;  // the voxel that a position is counted from
  A fraction[ND];

  __device__ __forceinline__ InvertField(const InvertArgs& args, const Place& p)
      : a(args), u(static_cast<const A*>(args.packed) + p.n * args.grid.n_in * w), at(p) {
#pragma unroll
    for (int k = 0; k < ND; ++k) {
      fraction[k] = A(0);
      if (a.points)
        split(static_cast<const A*>(a.points)[(p.n * ND + k) * a.grid.n_out + p.voxel], at.at[k + 3 - ND],
              fraction[k]);
    }
  }

  __device__ __forceinline__ void linearised(const A (&v)[ND], Linearised<A, ND>& result) const {
    const Cell<A, ND> cell(a.grid, at, [&](int k) { return fraction[k] + v[k]; });
    A corner[1 << ND][ND];
#pragma unroll
    for (int c = 0; c < 1 << ND; ++c) {
      const auto read = cell.has(c) ? load_pack<w>(u + cell.index(c) * w) : Pack<A, w>{};
#pragma unroll
      for (int k = 0; k < ND; ++k) corner[c][k] = read.value[k];
    }
    linearise<A, ND>(corner, cell.fraction, result);
    if (cell.nan())
#pragma unroll
      for (int k = 0; k < ND; ++k) result.value[k] = A(NAN);
  }
};

// Work: a thread a point (see SamplingGrid). A warp takes as many steps as the slowest of its lanes: 3 of a
// smooth field. Bytes: packed u read, 3 numbers written, 7 a voxel: at 256^3 fp32 470 MB, 160 us at 3 TB/s;
// steps after the first meet in L1 and L2, 8 loads of 16 bytes a lane and step: 40 lines a warp, 95 us a
// step. Arithmetic: some 250 instructions a step and voxel, 150 us of issue slots: 450 us. Memory: none.
template <class A, int ND>
__global__ void __launch_bounds__(kSamplingThreads) invert_kernel(const __grid_constant__ InvertArgs a) {
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const InvertField<A, ND> field(a, p);
  A v[ND];
  invert<ND>(a.iterations, [&](const A(&at_v)[ND], auto& at) { field.linearised(at_v, at); }, v);
  A* result = static_cast<A*>(a.result) + p.n * ND * a.grid.n_out + p.voxel;
#pragma unroll
  for (int k = 0; k < ND; ++k) result[k * a.grid.n_out] = v[k];
}

// Of one step, at x + v. Bytes: packed u, grad and v read, one field written, 13 numbers a voxel: at 256^3
// fp32 870 MB, 290 us at 3 TB/s. Arithmetic: 270 instructions a voxel, 160 us. Memory: none.
template <class A, int ND>
__global__ void __launch_bounds__(kSamplingThreads)
    invert_adjoint_kernel(const __grid_constant__ InvertArgs a) {
  const Place p = place_of<ND>(a.grid);
  if (!p.there) return;
  const InvertField<A, ND> field(a, p);
  const int64_t first = p.n * ND * a.grid.n_out + p.voxel;
  A g[ND], v[ND], q[ND];
#pragma unroll
  for (int k = 0; k < ND; ++k) {
    g[k] = static_cast<const A*>(a.grad)[first + k * a.grid.n_out];
    v[k] = static_cast<const A*>(a.v)[first + k * a.grid.n_out];
  }
  Linearised<A, ND> at;
  field.linearised(v, at);
  InverseJacobian<A, ND>(at.slope).adjoint(g, q);
#pragma unroll
  for (int k = 0; k < ND; ++k)
    static_cast<A*>(a.result)[first + k * a.grid.n_out] = at.value[0] == at.value[0] ? q[k] : A(NAN);
}

// type: the arithmetic one.
inline void invert(Stored type, int nd, bool adjoint, const InvertArgs& a, cudaStream_t stream) {
  const auto run = [&]<class A>(A) {
    const auto start = [&](auto kernel) {
      launch(kernel, unsigned(a.grid.blocks), kSamplingThreads, 0, stream, a);
    };
    if (adjoint)
      start(nd == 3 ? invert_adjoint_kernel<A, 3> : invert_adjoint_kernel<A, 2>);
    else
      start(nd == 3 ? invert_kernel<A, 3> : invert_kernel<A, 2>);
  };
  type == Stored::f64 ? run(double()) : run(float());
}

}  // namespace fastreg
