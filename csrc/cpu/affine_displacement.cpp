// affine_displacement: the displacement of a matrix on a grid, and the gradient to the matrix.
#include "cpu/affine_rows.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice.
struct AffineArgs {
  const double* matrix;  // (n, nd, nd + 1), forward only
  const void* grad;      // (n, nd, *size), backward only
  void* result;          // (n, nd, *size), fp32 or fp64
  double* sums;          // backward: two per row and component
  int64_t nd, size[3];
  bool fp64;
};

// Work units are rows (n, z, y), of all components.
FASTREG_KERNEL(void, affine_displacement_fwd, const AffineArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, affine_displacement_bwd, const AffineArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int kBlock = 64;

struct Row {
  int64_t n, z, y;
};

Row row_at(const AffineArgs& a, int64_t index) {
  const int64_t plane = index / a.size[1];
  return {plane / a.size[0], plane % a.size[0], index % a.size[1]};
}

int64_t first_voxel(const AffineArgs& a, const Row& row, int64_t k) {
  return (((row.n * a.nd + k) * a.size[0] + row.z) * a.size[1] + row.y) * a.size[2];
}

// Bytes: writes nd volumes; a product and a sum in fp64 a number, far below that.
template <class A>
void fwd(const AffineArgs& a, int64_t begin, int64_t end) {
  const int64_t nd = a.nd;
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    for (int64_t k = 0; k < nd; ++k) {
      const double* m = a.matrix + (row.n * nd + k) * (nd + 1);
      double start = m[nd] + m[nd - 2] * double(row.y);
      if (nd == 3) start += m[0] * double(row.z);
      const double slope = m[nd - 1];
      A* __restrict out = static_cast<A*>(a.result) + first_voxel(a, row, k);
      const int32_t line = int32_t(a.size[2]);
      for (int32_t x = 0; x < line; ++x) out[x] = A(start + slope * double(x));
    }
  }
}

// Bytes: reads nd volumes. Arithmetic: two sums and a product in fp64 a number.
template <class A>
void bwd(const AffineArgs& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a, index);
    for (int64_t k = 0; k < a.nd; ++k) {
      const A* g = static_cast<const A*>(a.grad) + first_voxel(a, row, k);
      RowSums sums;
      const int64_t whole = a.size[2] / kBlock * kBlock;
      for (int64_t x = 0; x < whole; x += kBlock) sums.add(g + x, kBlock, x);
      if (whole < a.size[2]) {
        A rest[kBlock] = {};
        std::copy(g + whole, g + a.size[2], rest);
        sums.add(rest, kBlock, whole);
      }
      sums.store(a.sums + (index * a.nd + k) * 2);
    }
  }
}

}  // namespace

void affine_displacement_fwd(const AffineArgs& a, int64_t b, int64_t e) {
  a.fp64 ? fwd<double>(a, b, e) : fwd<float>(a, b, e);
}
void affine_displacement_bwd(const AffineArgs& a, int64_t b, int64_t e) {
  a.fp64 ? bwd<double>(a, b, e) : bwd<float>(a, b, e);
}

}  // namespace fastreg::FASTREG_ISA

#else

namespace fastreg {
namespace {

using at::Tensor;

AffineArgs arguments(const char* op, int64_t nd, at::IntArrayRef spatial, at::ScalarType type) {
  FASTREG_CHECK((nd == 2 || nd == 3) && int64_t(spatial.size()) == nd, op,
                "shape must have 2 or 3 axes, as many as the matrix has rows");
  AffineArgs a{};
  a.nd = nd, a.fp64 = type == at::kDouble;
  for (int k = 0; k < 3; ++k) {
    a.size[k] = k < 3 - nd ? 1 : spatial[k + nd - 3];
    FASTREG_CHECK(a.size[k] >= 0 && a.size[k] < (int64_t(1) << 31), op, "an axis must be shorter than 2^31");
  }
  return a;
}

Tensor affine_displacement_cpu(const Tensor& matrix, at::IntArrayRef shape, bool subtract_identity) {
  const int64_t nd = shape.size();
  FASTREG_CHECK(matrix.dim() == 3 && matrix.size(1) == nd && matrix.size(2) == nd + 1, "affine_displacement",
                "matrix must have shape (N, nd, nd + 1)");
  AffineArgs a = arguments("affine_displacement", nd, shape, arithmetic_of(matrix));
  Tensor m = matrix.to(at::kDouble).contiguous();
  if (subtract_identity) m = m.sub(at::eye(nd, nd + 1, m.options()));
  std::vector<int64_t> sizes{m.size(0), nd};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  Tensor out = at::empty(sizes, matrix.options().dtype(arithmetic_of(matrix)));
  if (out.numel() == 0) return out;
  a.matrix = m.const_data_ptr<double>(), a.result = out.mutable_data_ptr();
  auto kernel = FASTREG_PICK(affine_displacement_fwd);
  at::parallel_for(0, m.size(0) * a.size[0] * a.size[1], 1, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return out;
}

Tensor affine_displacement_bwd_cpu(const Tensor& grad) {
  FASTREG_CHECK(grad.dim() >= 4 && grad.size(1) == grad.dim() - 2, "affine_displacement_bwd",
                "grad must have shape (N, nd, *spatial)");
  Tensor g = grad.to(arithmetic_of(grad)).contiguous();
  const int64_t nd = g.size(1), n = g.size(0);
  AffineArgs a = arguments("affine_displacement_bwd", nd, g.sizes().slice(2), g.scalar_type());
  std::vector<double> sums(g.numel() == 0 ? 0 : n * a.size[0] * a.size[1] * nd * 2);
  if (g.numel() == 0) return at::zeros({n, nd, nd + 1}, grad.options());
  a.grad = g.const_data_ptr(), a.sums = sums.data();
  auto kernel = FASTREG_PICK(affine_displacement_bwd);
  at::parallel_for(0, n * a.size[0] * a.size[1], 1, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return affine_gradient(sums, n, int(nd), a.size).to(grad.scalar_type());
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("affine_displacement", affine_displacement_cpu);
  m.impl("affine_displacement_bwd", affine_displacement_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
