#pragma once
// What the regularisers of a displacement share: arguments, rows, sums and the bindings' frame.
#include "common/regularizers.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice with no z axis.
struct RegularizerArgs {
  const void* u;     // (n, nd, *size)
  const void* grad;  // (n), arithmetic type; backward only
  void* result;      // forward: double, one partial sum per row; backward: the gradient (n, nd, *size)
  int64_t nd, size[3];
  double weight[3][6];  // [component][axis z, y, x]; bending energy: [component][zz, yy, xx, zy, zx, yx]
  Norm norm;            // diffusion only
};

// Work units are rows (n, component, z, y). Anisotropic total variation is diffusion with other weights.
FASTREG_KERNEL(void, diffusion_fwd, Stored, const RegularizerArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, diffusion_bwd, Stored, const RegularizerArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

struct Row {
  int64_t component, z, y;
};

inline Row row_at(const RegularizerArgs& a, int64_t index) {
  const int64_t plane = index / a.size[1];
  return {plane / a.size[0] % a.nd, plane % a.size[0], index % a.size[1]};
}

// Gradient of the loss of the sample that row `index` is part of.
template <class A>
A grad_at(const RegularizerArgs& a, int64_t index) {
  return static_cast<const A*>(a.grad)[index / (a.nd * a.size[0] * a.size[1])];
}

// Sum of term(V(), x) over [begin, end), V a vector of voxels or one: blocks in arithmetic type, then fp64.
template <class A, class Term>
FASTREG_HD double row_sum(int64_t begin, int64_t end, Term term) {
  constexpr int64_t kBlock = 512;
  double sum = 0;
  for (int64_t x0 = begin; x0 < end; x0 += kBlock) {
    Vector<A> lanes = {};
    A rest = 0;
    each_x<A>(x0, std::min(end, x0 + kBlock), [&](auto v, int64_t x) {
      if constexpr (std::is_same_v<decltype(v), A>)
        rest += term(v, x);
      else
        lanes += term(v, x);
    });
    sum += lane_sum<A>(lanes) + rest;
  }
  return sum;
}

}  // namespace
}  // namespace fastreg::FASTREG_ISA

#else

#include <cmath>

#include "cpu/binding.h"

namespace fastreg {

using RegularizerKernel = void (*)(Stored, const RegularizerArgs&, int64_t, int64_t);

// u is contiguous and outlives the arguments; their weights are still to be set.
inline RegularizerArgs regularizer_arguments(const char* op, const at::Tensor& u,
                                             at::ArrayRef<double> spacing) {
  const int64_t nd = u.dim() - 2;
  FASTREG_CHECK((nd == 2 || nd == 3) && u.size(1) == nd && int64_t(spacing.size()) == nd, op,
                "u must have shape (N, nd, *spatial) and spacing a number per axis");
  RegularizerArgs a{u.const_data_ptr(), nullptr, nullptr, nd, {1, 1, 1}, {}, Norm::l1};
  for (int64_t k = 0; k < nd; ++k) a.size[k + 3 - nd] = u.size(k + 2);
  return a;
}

// (N,): sums over each sample's rows, times scale.
inline at::Tensor regularizer_fwd(RegularizerKernel kernel, RegularizerArgs a, const at::Tensor& u,
                                  double scale) {
  const auto type = arithmetic_of(u);
  if (u.numel() == 0) return at::full({u.size(0)}, NAN, u.options().dtype(type));  // the mean of nothing
  std::vector<double> partial(u.numel() / a.size[2]);
  a.result = partial.data();
  at::parallel_for(0, partial.size(), 1, [&](int64_t b, int64_t e) { kernel(stored(u), a, b, e); });
  for (double& p : partial) p *= scale;
  return sample_sums(partial, u.size(0), type);
}

inline at::Tensor regularizer_bwd(const char* op, RegularizerKernel kernel, RegularizerArgs a,
                                  const at::Tensor& grad, const at::Tensor& u, double scale) {
  FASTREG_CHECK(grad.dim() == 1 && grad.size(0) == u.size(0), op, "grad must have shape (N,)");
  at::Tensor g = grad.to(at::kDouble).mul(scale).to(arithmetic_of(u)), out = at::empty_like(u);
  if (u.numel() == 0) return out;
  a.grad = g.const_data_ptr(), a.result = out.mutable_data_ptr();
  at::parallel_for(0, u.numel() / a.size[2], 1, [&](int64_t b, int64_t e) { kernel(stored(u), a, b, e); });
  return out;
}

}  // namespace fastreg

#endif
