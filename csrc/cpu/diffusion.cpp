#include "common/regularizers.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice with no z axis.
struct DiffusionArgs {
  const void* u;     // (n, nd, *size)
  const void* grad;  // (n), arithmetic type; backward only
  void* result;      // forward: double, one partial sum per row; backward: the gradient (n, nd, *size)
  int64_t nd, size[3];
  double weight[3][3];  // [component][axis]: of one difference in the loss
  Norm norm;
};

// Work units are rows (n, component, z, y).
FASTREG_KERNEL(void, diffusion_fwd, Stored, const DiffusionArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, diffusion_bwd, Stored, const DiffusionArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kBlock = 512;  // differences of a row summed in arithmetic type before they go to fp64

struct Row {
  int64_t component, z, y;
};

Row row_at(const DiffusionArgs& a, int64_t index) {
  const int64_t plane = index / a.size[1];
  return {plane / a.size[0] % a.nd, plane % a.size[0], index % a.size[1]};
}

// Sum of penalties over x in [0, n) of a row against `next`.
template <Norm norm, class T>
double row_sum(const T* row, const T* next, int64_t n) {
  using A = arithmetic_t<T>;
  double sum = 0;
  for (int64_t x0 = 0; x0 < n; x0 += kBlock) {
    Vector<A> lanes = {};
    A rest = 0;
    each_x<A>(x0, std::min(n, x0 + kBlock), [&](auto v, int64_t x) {
      using V = decltype(v);
      const V p = penalty<norm>(load_as<V>(next + x) - load_as<V>(row + x));
      if constexpr (std::is_same_v<V, A>)
        rest += p;
      else
        lanes += p;
    });
    sum += lane_sum<A>(lanes) + rest;
  }
  return sum;
}

// One partial sum per row, added up in order by the caller: the same bits whatever the thread count.
// Bytes: reads 1 displacement (a row again for its two neighbours, from cache). Arithmetic: nd subtractions,
// products and additions a voxel and component.
template <Norm norm, class T>
void fwd(const DiffusionArgs& a, int64_t begin, int64_t end) {
  const int64_t line = a.size[2], plane = a.size[1] * line;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const T* row = static_cast<const T*>(a.u) + index * line;
    const double* weight = a.weight[r.component];
    double sum = weight[2] * row_sum<norm>(row, row + 1, line - 1);
    if (r.y + 1 < a.size[1]) sum += weight[1] * row_sum<norm>(row, row + line, line);
    if (r.z + 1 < a.size[0]) sum += weight[0] * row_sum<norm>(row, row + plane, line);
    static_cast<double*>(a.result)[index] = sum;
  }
}

// A gather: each voxel collects the two differences it is part of along each axis.
// Bytes: reads 1 displacement, writes 1. Arithmetic: 2 nd subtractions and multiply-adds a voxel and
// component.
template <Norm norm, class T>
void bwd(const DiffusionArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], plane = a.size[1] * line, last = line - 1;
  for (int64_t index = begin; index < end; ++index) {
    const Row r = row_at(a, index);
    const T* row = static_cast<const T*>(a.u) + index * line;
    T* out = static_cast<T*>(a.result) + index * line;
    const A grad = static_cast<const A*>(a.grad)[index / (a.nd * a.size[0] * a.size[1])];
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

void diffusion_fwd(Stored type, const DiffusionArgs& a, int64_t b, int64_t e) {
  with_type(type,
            [&]<class T>() { a.norm == Norm::l2 ? fwd<Norm::l2, T>(a, b, e) : fwd<Norm::l1, T>(a, b, e); });
}
void diffusion_bwd(Stored type, const DiffusionArgs& a, int64_t b, int64_t e) {
  with_type(type,
            [&]<class T>() { a.norm == Norm::l2 ? bwd<Norm::l2, T>(a, b, e) : bwd<Norm::l1, T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

DiffusionArgs arguments(const char* op, const Tensor& u, c10::string_view norm,
                        at::ArrayRef<double> spacing) {
  const int64_t nd = u.dim() - 2;
  FASTREG_CHECK((nd == 2 || nd == 3) && u.size(1) == nd && int64_t(spacing.size()) == nd, op,
                "u must have shape (N, nd, *spatial) and spacing a number per axis");
  DiffusionArgs a{
      u.const_data_ptr(), nullptr, nullptr, nd, {1, 1, 1}, {}, norm == "l2" ? Norm::l2 : Norm::l1};
  const int64_t missing = 3 - nd;
  for (int64_t k = 0; k < nd; ++k) a.size[k + missing] = u.size(k + 2);
  const double voxels = double(a.size[0] * a.size[1] * a.size[2]);
  for (int64_t c = 0; c < nd; ++c)
    for (int64_t k = 0; k < nd; ++k) {
      const int64_t n = u.size(k + 2);
      const double ratio = spacing[c] / spacing[k];
      // Mean over components and differences of the axis, averaged over axes.
      if (n > 1)
        a.weight[c][k + missing] =
            (a.norm == Norm::l2 ? ratio * ratio : ratio) / (double(nd * nd) * voxels / n * (n - 1));
    }
  return a;
}

Tensor diffusion_cpu(const Tensor& u, c10::string_view norm, at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  DiffusionArgs a = arguments("diffusion", in, norm, spacing);
  std::vector<double> partial(in.numel() / std::max<int64_t>(a.size[2], 1));  // one per row
  a.result = partial.data();
  auto kernel = FASTREG_PICK(diffusion_fwd);
  at::parallel_for(0, partial.size(), 1, [&](int64_t b, int64_t e) { kernel(stored(in), a, b, e); });
  return sample_sums(partial, in.size(0), arithmetic_of(in));
}

Tensor diffusion_bwd_cpu(const Tensor& grad, const Tensor& u, c10::string_view norm,
                         at::ArrayRef<double> spacing) {
  Tensor in = u.contiguous();
  DiffusionArgs a = arguments("diffusion_bwd", in, norm, spacing);
  FASTREG_CHECK(grad.dim() == 1 && grad.size(0) == in.size(0), "diffusion_bwd", "grad must have shape (N,)");
  Tensor g = grad.to(arithmetic_of(in)).contiguous(), out = at::empty_like(in);
  if (in.numel() == 0) return out;
  a.grad = g.const_data_ptr(), a.result = out.mutable_data_ptr();
  auto kernel = FASTREG_PICK(diffusion_bwd);
  at::parallel_for(0, in.numel() / a.size[2], 1, [&](int64_t b, int64_t e) { kernel(stored(in), a, b, e); });
  return out;
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("diffusion", diffusion_cpu);
  m.impl("diffusion_bwd", diffusion_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
