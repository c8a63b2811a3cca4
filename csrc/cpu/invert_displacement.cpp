// The inverse of a displacement: each voxel iterates by itself, so threads share u and nothing else. u is
// packed first, one sample at a time, so that a step reads its cell with 2^(nd-1) vectors.
//
// The voxels of a block go step by step together: positions and systems of equations are vectors of voxels,
// only cells are read one by one. Who is done leaves, the rest moves up. A smooth field needs no more; a
// voxel whose residual does not fall, whose cell is not whole or whose Jacobian is degenerate starts again
// alone, with all there is (`invert`).
//
// Bytes: u read and packed (7 numbers a voxel in 3D), the packed field read once from memory, for steps of
// neighbours meet in cache, v written: 14 numbers, 230 MB at 160^3 in fp32, 9 ms at 25 GB/s. Arithmetic of a
// step in instructions a voxel, AVX2: 8 for the position, 25 to read and interpolate, 11 to transpose, 12 to
// solve, 10 to move up; 2.5 steps a voxel: 170. At 160^3 0.7 G, 0.12 s on one core at 2 a cycle and 3 GHz:
// bound by arithmetic.
#include "common/invert_displacement.h"

#include "common/scalar.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/vector.h"

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
    if (inside && !nan) {
      Voxel<A, ND> read[1 + ND];
      in_cell(u + offset * kWidth<A, ND>, f, read);
      A all = A(0);
      for (int i = 0; i < ND; ++i) {
        at.value[i] = read[0][i], all += at.value[i];
        for (int k = 0; k < ND; ++k) at.slope[k][i] = read[1 + k][i];
      }
      // Else a corner, perhaps one of weight 0, is not finite.
      if (all - all == A(0)) return;
    }
    anywhere(lower, f, nan, at);
  }

  // Of the cell whose lower corner is given: u and its slopes along each axis, packed.
  FASTREG_HD void in_cell(const A* corner, const A (&f)[ND], Voxel<A, ND> (&at)[1 + ND]) const {
    const Cell<A, ND> c(corner, line, plane);
    const A fx = f[ND - 1], fy = f[ND - 2];
    Pair<A, ND> dy = c.pair[1] - c.pair[0], v = c.pair[0] + fy * dy;
    if constexpr (ND == 3) {
      const Pair<A, ND> dy_far = c.pair[3] - c.pair[2], dz = c.pair[2] + fy * dy_far - v;
      v += f[0] * dz;
      dy += f[0] * (dy_far - dy);
      at[1] = near_x<A, ND>(dz) + fx * (far_x<A, ND>(dz) - near_x<A, ND>(dz));
    }
    at[ND] = far_x<A, ND>(v) - near_x<A, ND>(v);
    at[ND - 1] = near_x<A, ND>(dy) + fx * (far_x<A, ND>(dy) - near_x<A, ND>(dy));
    at[0] = near_x<A, ND>(v) + fx * at[ND];
  }

 private:
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

// Where point x of a row lies.
template <class A, int ND>
FASTREG_HD void place(const InvertArgs& a, int64_t row, int64_t x, int32_t (&whole)[ND], A (&fraction)[ND]) {
  const int64_t at[3] = {row / a.out[1], row % a.out[1], x};
  const A* points = static_cast<const A*>(a.points);
  for (int k = 0; k < ND; ++k) {
    whole[k] = int32_t(at[k + 3 - ND]), fraction[k] = A(0);
    if (points) split(points[(k * a.out[0] * a.out[1] + row) * a.out[2] + x], whole[k], fraction[k]);
  }
}

constexpr int kBlock = 64, kRounds = 6;  // of voxels; of steps before a voxel goes alone

// Voxels that iterate together; the first `count` places are taken.
template <class A, int ND>
struct Block {
  alignas(64) int32_t whole[ND][kBlock] = {};
  alignas(64) A fraction[ND][kBlock] = {};  // of the positions x; with whole
  alignas(64) A v[ND][kBlock] = {};
  alignas(64) A residual[kBlock] = {};  // the largest component, of the step before
  int32_t point[kBlock] = {};
  int count = 0;
  int64_t first = 0;  // point of the block
  // Of one step.
  alignas(64) int32_t lower[ND][kBlock] = {};
  alignas(64) A rest[ND][kBlock] = {};
  alignas(64) int64_t offset[kBlock] = {};
  alignas(64) int32_t inside[kBlock] = {};
  alignas(64) A at[1 + ND][ND][kBlock] = {};  // u and its slopes
  alignas(64) A next[ND][kBlock] = {};
  alignas(64) A outcome[kBlock] = {};  // 0: goes alone, 1: goes on, 2: done

  void locate(const Field<A, ND>& field) {
    for (int j = 0; j < count; ++j) inside[j] = field.cells ? -1 : 0;
    for (int k = 0; k < ND; ++k) {
      const uint32_t span = uint32_t(field.size[k + 3 - ND] - 1);
      for (int j = 0; j < count; ++j) split(fraction[k][j] + v[k][j], lower[k][j], rest[k][j]);
      for (int j = 0; j < count; ++j) {
        lower[k][j] += whole[k][j];
        inside[j] &= -int32_t((uint32_t(lower[k][j]) < span) & (rest[k][j] == rest[k][j]));
      }
    }
    for (int j = 0; j < count; ++j) {
      int64_t o = 0;
      for (int k = 0; k < ND; ++k) o = o * field.size[k + 3 - ND] + lower[k][j];
      offset[j] = o & int64_t(inside[j]);  // where outside the first cell is read in its stead
    }
  }

  void read(const Field<A, ND>& field) {
    if (!field.cells) return;
    constexpr int kTogether = 4;
    for (int j = count; j % kTogether; ++j) offset[j] = 0;
    for (int j = 0; j < count; j += kTogether) {
      Voxel<A, ND> four[1 + ND][kTogether];
      for (int i = 0; i < kTogether; ++i) {
        A f[ND];
        Voxel<A, ND> one[1 + ND];
        for (int k = 0; k < ND; ++k) f[k] = rest[k][j + i];
        field.in_cell(field.u + offset[j + i] * kWidth<A, ND>, f, one);
        for (int k = 0; k <= ND; ++k) four[k][i] = one[k];
      }
      for (int k = 0; k <= ND; ++k) spread(four[k], at[k], j);
    }
  }

  void solve() {
    using V = Vector<A>;
    for (int j = 0; j < count; j += kLanes<A>) {
      V r[ND], slope[ND][ND], step[ND], largest = V{};
      auto usual = V{} == V{};
      for (int i = 0; i < ND; ++i) {
        r[i] = load_as<V>(at[0][i] + j) + load_as<V>(v[i] + j);
        for (int k = 0; k < ND; ++k) slope[k][i] = load_as<V>(at[1 + k][i] + j);
        const V size = r[i] < 0 ? -r[i] : r[i];
        largest = size > largest ? size : largest;
        usual &= r[i] - r[i] == 0;
      }
      const InverseJacobian<V, ND> inverse(slope);
      inverse.solve(r, step);
      for (int i = 0; i < ND; ++i) store_as(next[i] + j, load_as<V>(v[i] + j) - step[i]);
      const V d = inverse.determinant < 0 ? -inverse.determinant : inverse.determinant;
      usual &= d >= A(kDegenerate);
      usual &= largest < load_as<V>(residual + j);
      const V goes_on = fill<V>(A(1)), done = fill<V>(A(2));
      store_as(outcome + j, usual ? (largest <= kInverted<A> ? done : goes_on) : V{});
      store_as(residual + j, largest);
    }
  }

  // Calls leave(place, done) for those that go; the rest moves up with its next v.
  template <class Leave>
  void part(Leave leave) {
    int kept = 0;
    for (int j = 0; j < count; ++j) {
      if (outcome[j] != A(1) || !inside[j]) {
        leave(j, inside[j] && outcome[j] == A(2));
        continue;
      }
      for (int k = 0; k < ND; ++k) {
        whole[k][kept] = whole[k][j], fraction[k][kept] = fraction[k][j];
        v[k][kept] = next[k][j];
      }
      residual[kept] = residual[j], point[kept] = point[j];
      ++kept;
    }
    count = kept;
  }

 private:
  // The components of four voxels, from place j on.
  static void spread(const Voxel<A, ND> (&from)[4], A (&to)[ND][kBlock], int j) {
    if constexpr (ND == 3) {
      const auto zy = __builtin_shufflevector(from[0], from[1], 0, 4, 1, 5);
      const auto zy2 = __builtin_shufflevector(from[2], from[3], 0, 4, 1, 5);
      const auto x = __builtin_shufflevector(from[0], from[1], 2, 6, 3, 7);
      const auto x2 = __builtin_shufflevector(from[2], from[3], 2, 6, 3, 7);
      put(to[0] + j, __builtin_shufflevector(zy, zy2, 0, 1, 4, 5));
      put(to[1] + j, __builtin_shufflevector(zy, zy2, 2, 3, 6, 7));
      put(to[2] + j, __builtin_shufflevector(x, x2, 0, 1, 4, 5));
    } else {
      for (int i = 0; i < 4; ++i) to[0][j + i] = from[i][0], to[1][j + i] = from[i][1];
    }
  }
};

template <class A, int ND>
void rows(const InvertArgs& a, int64_t begin, int64_t end) {
  const Field<A, ND> field(a);
  const int64_t count = a.out[0] * a.out[1] * a.out[2];
  A* result = static_cast<A*>(a.result);
  Block<A, ND> block;
  const auto leave = [&](int j, bool done) {
    A v[ND];
    if (FASTREG_LIKELY(done)) {
      for (int k = 0; k < ND; ++k) v[k] = block.next[k][j];
    } else {
      int32_t whole[ND];
      A fraction[ND];
      for (int k = 0; k < ND; ++k) whole[k] = block.whole[k][j], fraction[k] = block.fraction[k][j];
      invert<ND>(
          a.iterations, [&](const A(&at_v)[ND], auto& at) { field.linearised(whole, fraction, at_v, at); },
          v);
    }
    for (int k = 0; k < ND; ++k) result[k * count + block.first + block.point[j]] = v[k];
  };
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      block.first = row * a.out[2] + x0;
      block.count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      for (int j = 0; j < block.count; ++j) {
        int32_t whole[ND];
        A fraction[ND];
        place<A, ND>(a, row, x0 + j, whole, fraction);
        for (int k = 0; k < ND; ++k)
          block.whole[k][j] = whole[k], block.fraction[k][j] = fraction[k], block.v[k][j] = A(0);
        block.residual[j] = A(INFINITY), block.point[j] = j;
      }
      for (int64_t step = 0; block.count && step < std::min<int64_t>(kRounds, a.iterations); ++step) {
        block.locate(field), block.read(field), block.solve(), block.part(leave);
      }
      for (int j = 0; j < block.count; ++j) leave(j, false);
    }
}

template <class A, int ND>
void adjoint_rows(const InvertArgs& a, int64_t begin, int64_t end) {
  const Field<A, ND> field(a);
  const int64_t count = a.out[0] * a.out[1] * a.out[2];
  const A *grad = static_cast<const A*>(a.grad), *v = static_cast<const A*>(a.v);
  A* result = static_cast<A*>(a.result);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x = 0; x < a.out[2]; ++x) {
      const int64_t point = row * a.out[2] + x;
      int32_t whole[ND];
      A fraction[ND], g[ND], at_v[ND], q[ND];
      place<A, ND>(a, row, x, whole, fraction);
      for (int k = 0; k < ND; ++k) g[k] = grad[k * count + point], at_v[k] = v[k * count + point];
      Linearised<A, ND> at;
      field.linearised(whole, fraction, at_v, at);
      InverseJacobian<A, ND>(at.slope).adjoint(g, q);
      for (int k = 0; k < ND; ++k) result[k * count + point] = at.value[0] == at.value[0] ? q[k] : A(NAN);
    }
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

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("invert_displacement", invert_displacement<Device, InvertCall>);
  m.impl("invert_displacement_adjoint", invert_displacement_adjoint<Device, InvertCall>);
}

}  // namespace
}  // namespace fastreg

#endif
