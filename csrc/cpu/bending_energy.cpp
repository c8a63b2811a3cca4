// bending_energy: squared second differences of a displacement, and their gradient.
#include "cpu/regularizers.h"

namespace fastreg {

// Work units are rows (n, component, z, y).
FASTREG_KERNEL(void, bending_fwd, Stored, const RegularizerArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, bending_bwd, Stored, const RegularizerArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <vector>

namespace fastreg::FASTREG_ISA {
namespace {

// The derivatives in the order of RegularizerArgs::weight. 2D has yy, xx and yx only.
enum Pair { zz, yy, xx, zy, zx, yx };

// One partial sum per row, added up in order by the caller: the same bits whatever the thread count.
// Bytes: reads 1 displacement (nine rows around each voxel, from cache). Arithmetic: 35 operations and 19
// loads a voxel and component (2D: 16 and 9), most across two cache lines: these it waits for.
template <class T, int ND>
void fwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], inset = line > 2;
  // Axes too short for a derivative have weight 0 and are not stepped along.
  const int64_t sz = a.size[0] > 2 ? a.size[1] * line : 0, sy = a.size[1] > 2 ? line : 0, sx = inset;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    double sum = 0;
    if (has_both(r.z, a.size[0]) && has_both(r.y, a.size[1])) {
      const T* row = static_cast<const T*>(a.u) + index * line;
      const double* w = a.weight[r.component];
      sum = row_sum<A>(inset, line - inset, [&](auto v, int64_t x) {
        using V = decltype(v);
        const auto u = [&](int64_t offset) { return load_as<V>(row + x + offset); };
        V energy = {};
        const auto pure = [&](Pair pair, int64_t s) {
          if (!w[pair]) return;
          const V d = second_difference(u(-s), u(0), u(s));
          energy += A(w[pair]) * d * d;
        };
        const auto mixed = [&](Pair pair, int64_t s, int64_t t) {
          if (!w[pair]) return;
          const V d = mixed_difference(u(s + t), u(s - t), u(t - s), u(-s - t));
          energy += A(w[pair]) * d * d;
        };
        if constexpr (ND == 3) pure(zz, sz), mixed(zy, sz, sy), mixed(zx, sz, sx);
        pure(yy, sy), pure(xx, sx), mixed(yx, sy, sx);
        return energy;
      });
    }
    static_cast<double*>(a.result)[index] = sum;
  }
}

template <class V, class T, class A>
FASTREG_HD V second_at(const T* p, const Reach<A>& reach) {
  return second_transposed(load_as<V>(p + reach.offset[0]), load_as<V>(p + reach.offset[1]), load_as<V>(p),
                           load_as<V>(p + reach.offset[3]), load_as<V>(p + reach.offset[4]), reach);
}

template <class V, class T, class A>
FASTREG_HD V central_at(const T* p, const Reach<A>& reach) {
  return central_transposed(load_as<V>(p + reach.offset[0]), load_as<V>(p), load_as<V>(p + reach.offset[4]),
                            reach);
}

// A gather without storing a derivative. The set of voxels with a derivative is a box, so the transposed
// difference of each pair is a product of what the two axes give (Reach), on the rows or voxels that are not
// on a face of the third. Mixed derivatives with x: a row of the z and y parts first, then along x.
// Bytes: reads 1 displacement (five slices of a component from cache), writes 1. Arithmetic: 75 operations
// and 25 loads a voxel and component (2D: 40 and 13), most across two cache lines: these it waits for.
template <class T, int ND>
void bwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], plane = a.size[1] * line;
  std::vector<A> across(line);
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const bool in_z = has_both(r.z, a.size[0]), in_y = has_both(r.y, a.size[1]);
    const Reach<A> z = reach_of<A>(r.z, a.size[0], plane), y = reach_of<A>(r.y, a.size[1], line);
    const T* row = static_cast<const T*>(a.u) + index * line;
    T* out = static_cast<T*>(a.result) + index * line;
    A w[6];
    for (int k = 0; k < 6; ++k) w[k] = 2 * grad_at<A>(a, index) * A(a.weight[r.component][k]);

    cover_x<A>(0, line, [&](auto v, int64_t x) {
      using V = decltype(v);
      V sum = {};
      if constexpr (ND == 3)
        if (in_y) sum += w[zx] * central_at<V>(row + x, z);
      if (in_z) sum += w[yx] * central_at<V>(row + x, y);
      store_as<V>(across.data() + x, sum);
    });
    const auto voxel = [&](auto v, int64_t x, const Reach<A>& reach,
                           bool in_x) __attribute__((always_inline)) {
      using V = decltype(v);
      V sum = central_at<V>(across.data() + x, reach);
      if (in_z && in_y) sum += w[xx] * second_at<V>(row + x, reach);
      if (in_x) {
        if (in_z) sum += w[yy] * second_at<V>(row + x, y);
        if constexpr (ND == 3) {
          if (in_y) sum += w[zz] * second_at<V>(row + x, z);
          const T* p = row + x;
          sum += w[zy] * central_transposed(central_at<V>(p + y.offset[0], z), central_at<V>(p, z),
                                            central_at<V>(p + y.offset[4], z), y);
        }
      }
      store_as<V>(out + x, sum);
    };
    const auto end_voxel = [&](int64_t x) { voxel(A(), x, reach_of<A>(x, line, 1), has_both(x, line)); };
    for (int64_t x = 0; x < std::min<int64_t>(2, line); ++x) end_voxel(x);
    cover_x<A>(2, line - 2, [&](auto v, int64_t x) { voxel(v, x, {1, 1, 1, {-2, -1, 0, 1, 2}}, true); });
    for (int64_t x = std::max<int64_t>(2, line - 2); x < line; ++x) end_voxel(x);
  }
}

}  // namespace

void bending_fwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { a.nd == 3 ? fwd<T, 3>(a, b, e) : fwd<T, 2>(a, b, e); });
}
void bending_bwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { a.nd == 3 ? bwd<T, 3>(a, b, e) : bwd<T, 2>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

namespace fastreg {
namespace {

using at::Tensor;

struct BendingEnergyCall {
  RegularizerArgs args;
  double scale = 1;
  bool bends = false;

  BendingEnergyCall(const char* op, const Tensor& u, at::ArrayRef<double> spacing)
      : args(regularizer_arguments(op, u, spacing)) {
    const int64_t missing = 3 - args.nd;
    const int pairs[6][2] = {{0, 0}, {1, 1}, {2, 2}, {0, 1}, {0, 2}, {1, 2}};
    double count = double(args.nd);
    for (int64_t n : args.size) {
      bends |= n > 2;
      count *= double(n > 2 ? n - 2 : n);
    }
    scale = 1 / count;
    for (int p = 0; p < 6; ++p) {
      const auto [j, k] = pairs[p];
      if (args.size[j] < 3 || args.size[k] < 3) continue;
      for (int64_t c = 0; c < args.nd; ++c) {
        const double ratio = spacing[c] / (spacing[j - missing] * spacing[k - missing]);
        // A mixed derivative counts twice, and mixed_difference is four times it.
        args.weight[c][p] = ratio * ratio * (j == k ? 1.0 : 2.0 / 16.0);
      }
    }
  }
};

Tensor bending_energy_cpu(const Tensor& u, at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  const BendingEnergyCall call("bending_energy", in, spacing);
  return regularizer_fwd(FASTREG_PICK(bending_fwd), call.args, in, call.scale);
}

Tensor bending_energy_bwd_cpu(const Tensor& grad, const Tensor& u, at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  const char* op = "bending_energy_bwd";
  const BendingEnergyCall call(op, in, spacing);
  if (!call.bends) return at::zeros_like(in);
  return regularizer_bwd(op, FASTREG_PICK(bending_bwd), call.args, grad, in, call.scale);
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("bending_energy", bending_energy_cpu);
  m.impl("bending_energy_bwd", bending_energy_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
