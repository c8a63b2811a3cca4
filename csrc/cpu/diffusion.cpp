// diffusion; total_variation takes its kernels too, where it is anisotropic: differences of neighbours.
#include "cpu/regularizers.h"

#ifdef FASTREG_ISA

namespace fastreg::FASTREG_ISA {
namespace {

// Sum of penalties over x in [0, n) of a row against `next`.
template <Norm norm, class T>
double penalties(const T* row, const T* next, int64_t n) {
  return row_sum<arithmetic_t<T>>(0, n, [&](auto v, int64_t x) {
    using V = decltype(v);
    return penalty<norm>(load_as<V>(next + x) - load_as<V>(row + x));
  });
}

// One partial sum per row, added up in order by the caller: the same bits whatever the thread count.
// Bytes: reads 1 displacement (a row again for its two neighbours, from cache). Arithmetic: nd subtractions,
// products and additions a voxel and component.
template <Norm norm, class T>
void fwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  const int64_t line = a.size[2], plane = a.size[1] * line;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const T* row = static_cast<const T*>(a.u) + index * line;
    const double* weight = a.weight[r.component];
    double sum = weight[2] * penalties<norm>(row, row + 1, line - 1);
    if (r.y + 1 < a.size[1]) sum += weight[1] * penalties<norm>(row, row + line, line);
    if (r.z + 1 < a.size[0]) sum += weight[0] * penalties<norm>(row, row + plane, line);
    static_cast<double*>(a.result)[index] = sum;
  }
}

// A gather: each voxel collects the two differences it is part of along each axis.
// Bytes: reads 1 displacement, writes 1. Arithmetic: 2 nd subtractions and multiply-adds a voxel and
// component.
template <Norm norm, class T>
void bwd(const RegularizerArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], plane = a.size[1] * line, last = line - 1;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const T* row = static_cast<const T*>(a.u) + index * line;
    T* out = static_cast<T*>(a.result) + index * line;
    const A grad = grad_at<A>(a, index);
    const double* weight = a.weight[r.component];
    const A wz = grad * A(weight[0]), wy = grad * A(weight[1]), wx = grad * A(weight[2]);
    const bool above = r.y > 0, below = r.y + 1 < a.size[1], before = r.z > 0, behind = r.z + 1 < a.size[0];
    const auto voxel = [&](auto v, int64_t x, bool left, bool right) {
      using V = decltype(v);
      const V u = load_as<V>(row + x);
      const auto slope = [&](int64_t offset) {
        return penalty_slope<norm>(u - load_as<V>(row + x + offset));
      };
      V sum = {};
      if (left) sum += wx * slope(-1);
      if (right) sum += wx * slope(1);
      if (above) sum += wy * slope(-line);
      if (below) sum += wy * slope(line);
      if (before) sum += wz * slope(-plane);
      if (behind) sum += wz * slope(plane);
      store_as<V>(out + x, sum);
    };
    if (last > 0) voxel(A(), 0, false, true);
    cover_x<A>(1, last, [&](auto v, int64_t x) { voxel(v, x, true, true); });
    voxel(A(), last, last > 0, false);
  }
}

}  // namespace

void diffusion_fwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type,
            [&]<class T>() { a.norm == Norm::l2 ? fwd<Norm::l2, T>(a, b, e) : fwd<Norm::l1, T>(a, b, e); });
}
void diffusion_bwd(Stored type, const RegularizerArgs& a, int64_t b, int64_t e) {
  with_type(type,
            [&]<class T>() { a.norm == Norm::l2 ? bwd<Norm::l2, T>(a, b, e) : bwd<Norm::l1, T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

namespace fastreg {
namespace {

using at::Tensor;

RegularizerArgs arguments(const char* op, const Tensor& u, c10::string_view norm,
                          at::ArrayRef<double> spacing) {
  RegularizerArgs a = regularizer_arguments(op, u, spacing);
  a.norm = norm == "l2" ? Norm::l2 : Norm::l1;
  const double voxels = double(a.size[0] * a.size[1] * a.size[2]);
  for (int64_t c = 0; c < a.nd; ++c)
    for (int64_t k = 0; k < a.nd; ++k) {
      const int64_t n = u.size(k + 2);
      const double ratio = spacing[c] / spacing[k];
      // Mean over components and differences of the axis, averaged over axes.
      if (n > 1)
        a.weight[c][k + 3 - a.nd] =
            (a.norm == Norm::l2 ? ratio * ratio : ratio) / (double(a.nd * a.nd) * voxels / n * (n - 1));
    }
  return a;
}

Tensor diffusion_cpu(const Tensor& u, c10::string_view norm, at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  return regularizer_fwd(FASTREG_PICK(diffusion_fwd), arguments("diffusion", in, norm, spacing), in, 1.0);
}

Tensor diffusion_bwd_cpu(const Tensor& grad, const Tensor& u, c10::string_view norm,
                         at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  const char* op = "diffusion_bwd";
  return regularizer_bwd(op, FASTREG_PICK(diffusion_bwd), arguments(op, in, norm, spacing), grad, in, 1.0);
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("diffusion", diffusion_cpu);
  m.impl("diffusion_bwd", diffusion_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
