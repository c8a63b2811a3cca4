// jacobian_determinant: det(I + du/dp) of a displacement, and its gradient.
#include "common/displacement.h"
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice with no z axis.
struct JacobianArgs {
  const void* u;     // (n, nd, *size)
  const void* grad;  // (n, 1, *size), arithmetic type; backward only
  void* result;      // forward: (n, 1, *size), arithmetic type; backward: (n, nd, *size)
  int64_t size[3];
};

// Work units are rows (n, z, y).
FASTREG_KERNEL(void, jacobian_fwd, Stored, int nd, const JacobianArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, jacobian_bwd, Stored, int nd, const JacobianArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <vector>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

struct Step {
  int64_t low, high;  // offsets from the voxel
  double scale;
};

Step step_at(int64_t q, int64_t n, int64_t stride) {
  Step s;
  difference(q, n, s.low, s.high, s.scale);
  s.low = (s.low - q) * stride, s.high = (s.high - q) * stride;
  return s;
}

// A row of a displacement and how to differentiate along the axes other than x; x depends on the voxel.
template <class T, int ND>
struct FieldRow {
  using A = arithmetic_t<T>;
  const T* u;        // component 0 at x = 0
  int64_t n_voxels;  // stride of components
  Step step[ND];     // the last is set per voxel

  FieldRow(const JacobianArgs& a, int64_t n, int64_t z, int64_t y) {
    const int64_t line = a.size[2], plane = a.size[1] * line;
    n_voxels = a.size[0] * plane;
    u = static_cast<const T*>(a.u) + n * ND * n_voxels + z * plane + y * line;
    if (ND == 3) step[0] = step_at(z, a.size[0], plane);
    step[ND - 2] = step_at(y, a.size[1], line);
  }

  // Column k of I + du: the derivatives of all components along axis k.
  template <int k, class V>
  FASTREG_HD void column(int64_t x, const Step& step_x, V out[ND]) const {
    const Step& s = k == ND - 1 ? step_x : step[k];
    // Along an axis of one voxel nothing is read: what is not finite minus itself is not 0.
    const bool flat = s.low == s.high;
    for (int c = 0; c < ND; ++c) {
      const T* p = u + c * n_voxels + x;
      if (flat)
        out[c] = V{};
      else
        out[c] = A(s.scale) * (load_as<V>(p + s.high) - load_as<V>(p + s.low));
    }
    out[k] += A(1);
  }

  template <int k, class V>
  FASTREG_HD void cofactors(int64_t x, const Step& step_x, V out[ND]) const {
    if constexpr (ND == 3) {
      V a[3], b[3];
      column<(k + 1) % 3>(x, step_x, a);
      column<(k + 2) % 3>(x, step_x, b);
      cross(a, b, out);
    } else {
      V a[2];
      column<1 - k>(x, step_x, a);
      out[k] = a[1 - k];
      out[1 - k] = -a[k];
    }
  }
};

// body(V(), x, step along x) for the voxels of a row: central differences inside, one-sided at its ends.
template <class A, class Body>
FASTREG_HD void each_step(int64_t n, Body body) {
  const Step inside{-1, 1, 0.5};
  body(A(), 0, step_at(0, n, 1));
  cover_x<A>(1, n - 1, [&](auto v, int64_t x) { body(v, x, inside); });
  if (n > 1) body(A(), n - 1, step_at(n - 1, n, 1));
}

// Bytes: reads nd volumes (rows again for their neighbours, from cache), writes 1. Arithmetic: nd^2
// differences and a determinant a voxel.
template <class T, int ND>
void fwd(const JacobianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t y = index % a.size[1], plane = index / a.size[1];
    const FieldRow<T, ND> row(a, plane / a.size[0], plane % a.size[0], y);
    A* out = static_cast<A*>(a.result) + index * a.size[2];
    each_step<A>(a.size[2], [&](auto v, int64_t x, const Step& step) {
      using V = decltype(v);
      V column[ND], cofactor[ND], sum = {};
      row.template column<0>(x, step, column);
      row.template cofactors<0>(x, step, cofactor);
      for (int c = 0; c < ND; ++c) sum += column[c] * cofactor[c];
      store_as<V>(out + x, sum);
    });
  }
}

template <class T, int ND>
struct Term {
  FieldRow<T, ND> row;
  const arithmetic_t<T>* grad;
  arithmetic_t<T> weight;

  // weight * grad * cofactors of column k
  template <int k, class V>
  FASTREG_HD void add(int64_t x, const Step& step, V sum[ND]) const {
    V cofactor[ND];
    row.template cofactors<k>(x, step, cofactor);
    const V g = weight * load_as<V>(grad + x);
    for (int c = 0; c < ND; ++c) sum[c] += g * cofactor[c];
  }
};

// du_c = sum over axes k of the transposed difference along k of grad * cofactor_ck. A gather: the cofactors
// of column k do not differentiate along k, so those of the neighbour rows are recomputed rather than stored.
// Bytes: reads nd + 1 volumes (rows again for two rings of neighbours, from cache), writes nd. Arithmetic:
// the cofactors of five columns (2D: three) a voxel, which is what it waits for.
template <class T, int ND>
void bwd(const JacobianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2];
  std::vector<A> sums(ND * line), products(ND * line);
  std::vector<Term<T, ND>> along_z, along_y;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t y = index % a.size[1], plane = index / a.size[1], z = plane % a.size[0],
                  n = plane / a.size[0];
    const auto term = [&](int64_t qz, int64_t qy, double weight) {
      const A* grad = static_cast<const A*>(a.grad) + ((n * a.size[0] + qz) * a.size[1] + qy) * line;
      return Term<T, ND>{FieldRow<T, ND>(a, n, qz, qy), grad, A(weight)};
    };
    along_z.clear(), along_y.clear();
    for (int64_t q = z - 1; q <= z + 1; ++q)
      if (const double w = difference_weight(z, q, a.size[0])) along_z.push_back(term(q, y, w));
    for (int64_t q = y - 1; q <= y + 1; ++q)
      if (const double w = difference_weight(y, q, a.size[1])) along_y.push_back(term(z, q, w));
    const Term<T, ND> here = term(z, y, 1.0);
    each_step<A>(line, [&](auto v, int64_t x, const Step& step) {
      using V = decltype(v);
      V sum[ND] = {}, product[ND] = {};
      if constexpr (ND == 3)
        for (const auto& t : along_z) t.template add<0>(x, step, sum);
      for (const auto& t : along_y) t.template add<ND - 2>(x, step, sum);
      here.template add<ND - 1>(x, step, product);
      for (int c = 0; c < ND; ++c) {
        store_as<V>(sums.data() + c * line + x, sum[c]);
        store_as<V>(products.data() + c * line + x, product[c]);
      }
    });
    for (int c = 0; c < ND; ++c) {
      T* out = static_cast<T*>(a.result) + (((n * ND + c) * a.size[0] + z) * a.size[1] + y) * line;
      const A *sum = sums.data() + c * line, *product = products.data() + c * line;
      const auto end_voxel = [&](int64_t x) {
        A total = sum[x];
        for (int64_t q = x - 1; q <= x + 1; ++q)
          if (const double w = difference_weight(x, q, line)) total += A(w) * product[q];
        store(out[x], total);
      };
      // The difference at the end of a row is one-sided: its weight reaches two voxels in.
      for (int64_t x = 0; x < std::min<int64_t>(2, line); ++x) end_voxel(x);
      cover_x<A>(2, line - 2, [&](auto v, int64_t x) {
        using V = decltype(v);
        const V along = load_as<V>(product + x - 1) - load_as<V>(product + x + 1);
        store_as<V>(out + x, load_as<V>(sum + x) + A(0.5) * along);
      });
      for (int64_t x = std::max<int64_t>(2, line - 2); x < line; ++x) end_voxel(x);
    }
  }
}

}  // namespace

void jacobian_fwd(Stored type, int nd, const JacobianArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? fwd<T, 3>(a, b, e) : fwd<T, 2>(a, b, e); });
}
void jacobian_bwd(Stored type, int nd, const JacobianArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? bwd<T, 3>(a, b, e) : bwd<T, 2>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

JacobianArgs arguments(const char* op, const Tensor& u) {
  const int64_t nd = u.dim() - 2;
  FASTREG_CHECK((nd == 2 || nd == 3) && u.size(1) == nd, op, "u must have shape (N, nd, *spatial)");
  JacobianArgs a{u.const_data_ptr(), nullptr, nullptr, {1, 1, 1}};
  for (int64_t k = 0; k < nd; ++k) a.size[k + 3 - nd] = u.size(k + 2);
  return a;
}

Tensor jacobian_determinant_cpu(const Tensor& u) {
  Tensor in = u.contiguous();
  JacobianArgs a = arguments("jacobian_determinant", in);
  auto shape = in.sizes().vec();
  shape[1] = 1;
  Tensor out = at::empty(shape, in.options().dtype(arithmetic_of(in)));
  if (out.numel() == 0) return out;
  a.result = out.mutable_data_ptr();
  auto kernel = FASTREG_PICK(jacobian_fwd);
  at::parallel_for(0, in.size(0) * a.size[0] * a.size[1], 1,
                   [&](int64_t b, int64_t e) { kernel(stored(in), int(in.size(1)), a, b, e); });
  return out;
}

Tensor jacobian_determinant_bwd_cpu(const Tensor& grad, const Tensor& u) {
  Tensor in = u.contiguous();
  JacobianArgs a = arguments("jacobian_determinant_bwd", in);
  FASTREG_CHECK(grad.dim() == in.dim() && grad.size(0) == in.size(0) && grad.size(1) == 1 &&
                    grad.sizes().slice(2) == in.sizes().slice(2),
                "jacobian_determinant_bwd", "grad must have the shape of the output");
  Tensor g = grad.to(arithmetic_of(in)).contiguous(), out = at::empty_like(in);
  if (out.numel() == 0) return out;
  a.grad = g.const_data_ptr(), a.result = out.mutable_data_ptr();
  auto kernel = FASTREG_PICK(jacobian_bwd);
  at::parallel_for(0, in.size(0) * a.size[0] * a.size[1], 1,
                   [&](int64_t b, int64_t e) { kernel(stored(in), int(in.size(1)), a, b, e); });
  return out;
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("jacobian_determinant", jacobian_determinant_cpu);
  m.impl("jacobian_determinant_bwd", jacobian_determinant_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
