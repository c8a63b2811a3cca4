// total_variation: roots of squared differences (isotropic); the anisotropic one takes diffusion's kernels.
#include "cpu/regularizers.h"

namespace fastreg {

// Isotropic. Work units are rows (n, component, z, y); a.weight holds the factor of a difference.
FASTREG_KERNEL(void, isotropic_fwd, Stored, const RegularizerArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, isotropic_bwd, Stored, const RegularizerArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <cmath>
#include <utility>
#include <vector>

namespace fastreg::FASTREG_ISA {
namespace {

template <class A, class V>
FASTREG_HD V root(V v) {
  if constexpr (std::is_same_v<V, A>) {
    return std::sqrt(v);
  } else {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof(V));
    for (A& lane : lanes) lane = std::sqrt(lane);
    std::memcpy(&v, lanes, sizeof(V));
    return v;
  }
}

// A row of the grid without the last voxel of each axis: its forward differences. Axes of one voxel have
// step 0 and no difference.
template <class T>
struct Differences {
  using A = arithmetic_t<T>;
  const T* row;
  int64_t step[3];
  A factor[3];

  Differences(const RegularizerArgs& a, int64_t index)
      : row(static_cast<const T*>(a.u) + index * a.size[2]),
        step{a.size[0] > 1 ? a.size[1] * a.size[2] : 0, a.size[1] > 1 ? a.size[2] : 0, a.size[2] > 1} {
    for (int k = 0; k < 3; ++k) factor[k] = A(a.weight[row_at(a, index).component][k]);
  }

  template <class V>
  FASTREG_HD V square(int64_t x) const {
    const V u = load_as<V>(row + x);
    V sum = {};
    for (int k = 0; k < 3; ++k)
      if (step[k]) {
        const V d = factor[k] * (load_as<V>(row + x + step[k]) - u);
        sum += d * d;
      }
    return sum;
  }
};

bool in_grid(const RegularizerArgs& a, int64_t z, int64_t y) {
  return has_next(z, a.size[0]) && has_next(y, a.size[1]);
}

// Voxels of a row that are in the grid.
int64_t row_length(const RegularizerArgs& a) { return a.size[2] > 1 ? a.size[2] - 1 : 1; }

// One partial sum per row, added up in order by the caller: the same bits whatever the thread count.
// Bytes: reads 1 displacement (a row again for its two neighbours, from cache). Arithmetic: nd differences
// and a root a voxel and component.
template <class T>
void fwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    double sum = 0;
    if (in_grid(a, r.z, r.y)) {
      const Differences<T> d(a, index);
      sum = row_sum<A>(0, row_length(a), [&](auto v, int64_t x) {
        using V = decltype(v);
        return root<A, V>(d.template square<V>(x));
      });
    }
    static_cast<double*>(a.result)[index] = sum;
  }
}

// A gather: a voxel is part of its own root and of those of the voxels before it along each axis. A row of
// reciprocal roots serves its own voxels and the row below; those of the slice before are computed again.
// Bytes: reads 1 displacement, writes 1. Arithmetic: two reciprocal roots a voxel and component.
template <class T>
void bwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], plane = a.size[1] * line, length = row_length(a);
  std::vector<A> here(length), above(length), before(length);
  const auto reciprocals = [&](std::vector<A>& out, int64_t index) {
    const Differences<T> d(a, index);
    cover_x<A>(0, length, [&](auto v, int64_t x) {
      using V = decltype(v);
      const V square = d.template square<V>(x), one = V{} + A(1);
      store_as<V>(out.data() + x, square == 0 ? V{} : one / root<A, V>(square));
    });
  };
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const bool own = in_grid(a, r.z, r.y);
    const bool has_above = r.y > 0 && in_grid(a, r.z, r.y - 1);
    const bool has_before = r.z > 0 && in_grid(a, r.z - 1, r.y);
    std::swap(here, above);
    if (has_above && index == begin) reciprocals(above, index - 1);
    if (has_before) reciprocals(before, index - a.size[1]);
    if (own) reciprocals(here, index);

    const Differences<T> d(a, index);
    T* out = static_cast<T*>(a.result) + index * line;
    const A grad = grad_at<A>(a, index);
    A weight[3];
    for (int k = 0; k < 3; ++k) weight[k] = grad * d.factor[k] * d.factor[k];
    const auto voxel = [&](auto v, int64_t x, bool left, bool in_length) {
      using V = decltype(v);
      const V u = load_as<V>(d.row + x);
      const auto towards = [&](int64_t offset) { return load_as<V>(d.row + x + offset) - u; };
      V sum = {};
      if (own && in_length) {
        V steps = {};
        for (int k = 0; k < 3; ++k)
          if (d.step[k]) steps += weight[k] * towards(d.step[k]);
        sum -= steps * load_as<V>(here.data() + x);
      }
      if (own && left) sum -= weight[2] * towards(-1) * load_as<V>(here.data() + x - 1);
      if (has_above && in_length) sum -= weight[1] * towards(-line) * load_as<V>(above.data() + x);
      if (has_before && in_length) sum -= weight[0] * towards(-plane) * load_as<V>(before.data() + x);
      store_as<V>(out + x, sum);
    };
    voxel(A(), 0, false, true);
    cover_x<A>(1, length, [&](auto v, int64_t x) { voxel(v, x, true, true); });
    if (line > 1) voxel(A(), line - 1, true, false);
  }
}

}  // namespace

void isotropic_fwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}
void isotropic_bwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

namespace fastreg {
namespace {

using at::Tensor;

struct TotalVariationCall {
  RegularizerArgs args;
  RegularizerKernel fwd, bwd;
  double scale = 1;

  TotalVariationCall(const char* op, const Tensor& u, bool isotropic, at::ArrayRef<double> spacing)
      : args(regularizer_arguments(op, u, spacing)),
        fwd(isotropic ? FASTREG_PICK(isotropic_fwd) : FASTREG_PICK(diffusion_fwd)),
        bwd(isotropic ? FASTREG_PICK(isotropic_bwd) : FASTREG_PICK(diffusion_bwd)) {
    double count = double(args.nd);
    for (int64_t k = 0; k < args.nd; ++k) {
      const int64_t n = u.size(k + 2);
      count *= double(isotropic && n > 1 ? n - 1 : n);
      if (n > 1)
        for (int64_t c = 0; c < args.nd; ++c) args.weight[c][k + 3 - args.nd] = spacing[c] / spacing[k];
    }
    scale = 1 / count;
  }
};

Tensor total_variation_cpu(const Tensor& u, bool isotropic, at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  const TotalVariationCall call("total_variation", in, isotropic, spacing);
  return regularizer_fwd(call.fwd, call.args, in, call.scale);
}

Tensor total_variation_bwd_cpu(const Tensor& grad, const Tensor& u, bool isotropic,
                               at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  const char* op = "total_variation_bwd";
  const TotalVariationCall call(op, in, isotropic, spacing);
  return regularizer_bwd(op, call.bwd, call.args, grad, in, call.scale);
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("total_variation", total_variation_cpu);
  m.impl("total_variation_bwd", total_variation_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
