// The inverse of a displacement, voxel by voxel: each iterates alone, so threads share u and nothing else. u
// is packed first, one sample at a time: a step then reads its cell with 2^(nd-1) vectors.
//
// Bytes: u read and packed (7 numbers a voxel in 3D), the packed field read once from memory, for steps of
// neighbours meet in cache, v written: 14 numbers, 230 MB at 160^3 in fp32, 9 ms at 25 GB/s. Arithmetic: a
// step has some 130 instructions (40 for position and cell, 40 to interpolate, 50 to solve), a smooth field
// takes 2.5 of them: 330 a voxel, 1.4 G at 160^3, 0.2 s on one core at 2 a cycle and 3 GHz. Bound by
// arithmetic twenty times over. The adjoint has one step and reads v and grad too.
#include "common/invert_displacement.h"

#include "common/scalar.h"
#include "cpu/isa.h"
#include "cpu/packed.h"

namespace fastreg {

// One sample.
struct InvertArgs {
  const void* u;       // planar, of the type stored
  void* packed;        // u packed, arithmetic type, as is all that follows
  const void* points;  // (nd, *out) or null: the voxels
  const void* grad;    // (nd, *out), adjoint only, as v
  const void* v;
  void* result;  // (nd, *out)
  int64_t in[3], out[3];
  Padding padding;
  int64_t iterations;
};

// Work units are rows (z, y): of u to pack, else of the points.
#define FASTREG_INVERT_KERNEL(name) \
  FASTREG_KERNEL(void, name, Stored, int nd, const InvertArgs&, int64_t, int64_t)
FASTREG_INVERT_KERNEL(invert_pack)
FASTREG_INVERT_KERNEL(invert_rows)
FASTREG_INVERT_KERNEL(invert_adjoint_rows)

}  // namespace fastreg

#ifdef FASTREG_ISA

namespace fastreg::FASTREG_ISA {
namespace {

template <class A, int ND>
struct Field {
  const A* u;  // packed
  int64_t size[3], line, plane;
  Padding padding;
  bool cells;

  explicit Field(const InvertArgs& a)
      : u(static_cast<const A*>(a.packed)),
        size{a.in[0], a.in[1], a.in[2]},
        line(a.in[2] * kWidth<A, ND>),
        plane(a.in[1] * line),
        padding(a.padding),
        cells(true) {
    for (int k = 3 - ND; k < 3; ++k) cells = cells && size[k] > 1;
  }

  // At the position whole + fraction + v.
  FASTREG_HD void linearised(const int32_t (&whole)[ND], const A (&fraction)[ND], const A (&v)[ND],
                             Linearised<A, ND>& at) const {
    int32_t lower[ND];
    A f[ND];
    bool inside = cells, nan = false;
    int64_t offset = 0;
    for (int k = 0; k < ND; ++k) {
      split(fraction[k] + v[k], lower[k], f[k]);
      nan |= f[k] != f[k];
      lower[k] += whole[k];
      inside = inside && uint32_t(lower[k]) < uint32_t(size[k + 3 - ND] - 1);
      offset = offset * size[k + 3 - ND] + lower[k];
    }
    if (FASTREG_LIKELY(inside && !nan) && in_cell(u + offset * kWidth<A, ND>, f, at)) return;
    anywhere(lower, f, nan, at);
  }

 private:
  // False where a corner, perhaps one of weight 0, is not finite.
  FASTREG_HD bool in_cell(const A* corner, const A (&f)[ND], Linearised<A, ND>& at) const {
    const Cell<A, ND> c(corner, line, plane);
    const A fx = f[ND - 1], fy = f[ND - 2];
    Pair<A, ND> dy = c.pair[1] - c.pair[0], v = c.pair[0] + fy * dy;
    if constexpr (ND == 3) {
      const Pair<A, ND> dy_far = c.pair[3] - c.pair[2], dz = c.pair[2] + fy * dy_far - v;
      v += f[0] * dz;
      dy += f[0] * (dy_far - dy);
      copy(near_x<A, ND>(dz) + fx * (far_x<A, ND>(dz) - near_x<A, ND>(dz)), at.slope[0]);
    }
    const Voxel<A, ND> dx = far_x<A, ND>(v) - near_x<A, ND>(v);
    copy(near_x<A, ND>(dy) + fx * (far_x<A, ND>(dy) - near_x<A, ND>(dy)), at.slope[ND - 2]);
    copy(dx, at.slope[ND - 1]);
    copy(near_x<A, ND>(v) + fx * dx, at.value);
    A all = A(0);
    for (int i = 0; i < ND; ++i) all += at.value[i];
    return all - all == A(0);
  }

  FASTREG_HD static void copy(Voxel<A, ND> from, A (&to)[ND]) {
    for (int i = 0; i < ND; ++i) to[i] = from[i];
  }

  __attribute__((noinline)) void anywhere(const int32_t (&lower)[ND], const A (&f)[ND], bool nan,
                                          Linearised<A, ND>& at) const {
    A corner[1 << ND][ND] = {};
    for (int c = 0; c < 1 << ND && !nan; ++c) {
      int64_t offset = 0;
      for (int k = 0; k < ND && offset >= 0; ++k) {
        const int64_t n = size[k + 3 - ND];
        const int64_t i = corner_index<int64_t>(int64_t(lower[k]) + (c >> (ND - 1 - k) & 1), n, padding);
        offset = i < 0 ? -1 : offset * n + i;
      }
      for (int i = 0; i < ND && offset >= 0; ++i) corner[c][i] = u[offset * kWidth<A, ND> + i];
    }
    linearise<A, ND>(corner, f, at);
    for (int i = 0; i < ND && nan; ++i) at.value[i] = A(NAN);
  }
};

// Calls visit(whole, fraction, point): where each point of rows [begin, end) lies, and its index.
template <class A, int ND, class Visit>
void each_point(const InvertArgs& a, int64_t begin, int64_t end, Visit visit) {
  const int64_t count = a.out[0] * a.out[1] * a.out[2];
  const A* points = static_cast<const A*>(a.points);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x = 0; x < a.out[2]; ++x) {
      const int64_t point = row * a.out[2] + x;
      int32_t whole[ND];
      A fraction[ND] = {};
      whole[ND - 1] = int32_t(x), whole[ND - 2] = int32_t(row % a.out[1]);
      if constexpr (ND == 3) whole[0] = int32_t(row / a.out[1]);
      for (int k = 0; k < ND && points; ++k) split(points[k * count + point], whole[k], fraction[k]);
      visit(whole, fraction, point);
    }
}

template <class A, int ND>
void rows(const InvertArgs& a, int64_t begin, int64_t end) {
  const Field<A, ND> field(a);
  const int64_t count = a.out[0] * a.out[1] * a.out[2];
  A* result = static_cast<A*>(a.result);
  each_point<A, ND>(a, begin, end, [&](const auto& whole, const auto& fraction, int64_t point) {
    A v[ND];
    invert<ND>(
        a.iterations, [&](const A(&at_v)[ND], auto& at) { field.linearised(whole, fraction, at_v, at); }, v);
    for (int k = 0; k < ND; ++k) result[k * count + point] = v[k];
  });
}

template <class A, int ND>
void adjoint_rows(const InvertArgs& a, int64_t begin, int64_t end) {
  const Field<A, ND> field(a);
  const int64_t count = a.out[0] * a.out[1] * a.out[2];
  const A *grad = static_cast<const A*>(a.grad), *v = static_cast<const A*>(a.v);
  A* result = static_cast<A*>(a.result);
  each_point<A, ND>(a, begin, end, [&](const auto& whole, const auto& fraction, int64_t point) {
    A g[ND], at_v[ND], q[ND];
    for (int k = 0; k < ND; ++k) g[k] = grad[k * count + point], at_v[k] = v[k * count + point];
    Linearised<A, ND> at;
    field.linearised(whole, fraction, at_v, at);
    InverseJacobian<A, ND>(at.slope).adjoint(g, q);
    for (int k = 0; k < ND; ++k) result[k * count + point] = at.value[0] == at.value[0] ? q[k] : A(NAN);
  });
}

template <class T, int ND>
void pack(const InvertArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  pack_voxels<A, ND>(static_cast<const T*>(a.u), a.in[0] * a.in[1] * a.in[2], A(1), begin * a.in[2],
                     end * a.in[2], static_cast<A*>(a.packed));
}

}  // namespace

void invert_pack(Stored type, int nd, const InvertArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? pack<T, 3>(a, b, e) : pack<T, 2>(a, b, e); });
}
void invert_rows(Stored type, int nd, const InvertArgs& a, int64_t b, int64_t e) {
  const auto run = [&]<class A>(A) { nd == 3 ? rows<A, 3>(a, b, e) : rows<A, 2>(a, b, e); };
  type == Stored::f64 ? run(double()) : run(float());
}
void invert_adjoint_rows(Stored type, int nd, const InvertArgs& a, int64_t b, int64_t e) {
  const auto run = [&]<class A>(A) { nd == 3 ? adjoint_rows<A, 3>(a, b, e) : adjoint_rows<A, 2>(a, b, e); };
  type == Stored::f64 ? run(double()) : run(float());
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "common/invert_displacement_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

struct InvertCall : InvertInputs {
  InvertArgs args{};

  InvertCall(const Device&, InvertInputs inputs) : InvertInputs(std::move(inputs)) {
    std::copy_n(in, 3, args.in), std::copy_n(out, 3, args.out);
    args.padding = padding;
  }

  void invert(int64_t iterations, const at::Tensor& v) {
    args.iterations = iterations;
    each_sample([&](int64_t k) {
      args.result = v[k].mutable_data_ptr();
      run(FASTREG_PICK(invert_rows), out);
    });
  }

  void adjoint(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& q) {
    each_sample([&](int64_t k) {
      args.grad = grad[k].const_data_ptr(), args.v = v[k].const_data_ptr();
      args.result = q[k].mutable_data_ptr();
      run(FASTREG_PICK(invert_adjoint_rows), out);
    });
  }

 private:
  template <class Body>
  void each_sample(Body body) {
    const at::Tensor packed = empty_large({in[0], in[1], in[2], nd == 3 ? 4 : 2}, options);
    args.packed = packed.mutable_data_ptr();
    for (int64_t k = 0; k < n; ++k) {
      args.u = u[k].const_data_ptr();
      args.points = points.defined() ? points[k].const_data_ptr() : nullptr;
      run(FASTREG_PICK(invert_pack), in);
      body(k);
    }
  }
  template <class Kernel>
  void run(Kernel kernel, const int64_t (&size)[3]) {
    at::parallel_for(0, size[0] * size[1], 1, [&](int64_t b, int64_t e) { kernel(type, nd, args, b, e); });
  }
};

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("invert_displacement", invert_displacement<Device, InvertCall>);
  m.impl("invert_displacement_adjoint", invert_displacement_adjoint<Device, InvertCall>);
}

}  // namespace
}  // namespace fastreg

#endif
