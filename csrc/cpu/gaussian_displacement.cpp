#include "common/gaussian_displacement.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

struct GaussianArgs {
  const Gaussian* gaussians;  // (n, t)
  const void* grad;           // (n, 2, h, w); backward only
  void* result;               // forward: (n, 2, h, w); backward: GaussianSums (n, t, h)
  int64_t t, h, w;
};

// Work units are rows (n, y).
FASTREG_KERNEL(void, gaussian_fwd, Stored, const GaussianArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, gaussian_bwd, Stored, const GaussianArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <vector>

#include "common/exp.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int64_t kBlock = 512;  // columns of a row summed in arithmetic type before they go to fp64

// The numbers of a row of columns, padded with zeros to whole vectors.
template <class A>
struct Line {
  explicit Line(int64_t w) : n((w + kLanes<A> - 1) / kLanes<A> * kLanes<A>), values(n) {}
  A* data() { return values.data(); }
  int64_t n;
  std::vector<A> values;
};

template <class A>
Line<A> columns(int64_t w) {
  Line<A> line(w);
  for (int64_t x = 0; x < line.n; ++x) line.data()[x] = A(x);
  return line;
}

template <class A>
struct Exponent {
  using V = Vector<A>;
  Exponent(const Gaussian& g, const GaussianRow& row)
      : column(fill<V>(A(row.column))),
        quadratic(fill<V>(A(-g.quadratic))),
        linear(fill<V>(A(-row.linear))),
        constant(fill<V>(A(-row.constant))) {}
  V operator()(V k) const { return fast_exp2((quadratic * k + linear) * k + constant); }
  V column, quadratic, linear, constant;
};

// All Gaussians are added to a row of the output in cache, then it is written.
// Bytes: writes the field, 2 volumes. Arithmetic: some 28 operations a voxel and Gaussian, 18 of them 2^x; at
// T = 25, 256^2, AVX2 and two operations a cycle 3 Mcycles: arithmetic is the floor, not bytes (0.5 MB).
template <class T>
void fwd(const GaussianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  using V = Vector<A>;
  Line<A> column = columns<A>(a.w), along_y(a.w), along_x(a.w);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / a.h, row = index % a.h;
    std::fill_n(along_y.data(), along_y.n, A(0));
    std::fill_n(along_x.data(), along_x.n, A(0));
    for (int64_t t = 0; t < a.t; ++t) {
      const Gaussian& g = a.gaussians[n * a.t + t];
      const Exponent<A> weight(g, gaussian_row(g, row, a.w));
      const V vx = fill<V>(A(g.motion[0])), vy = fill<V>(A(g.motion[1]));
      for (int64_t x = 0; x < column.n; x += kLanes<A>) {
        const V value = weight(load_as<V>(column.data() + x) - weight.column);
        A *y_ = along_y.data() + x, *x_ = along_x.data() + x;
        store_as<V>(y_, load_as<V>(y_) + vy * value);
        store_as<V>(x_, load_as<V>(x_) + vx * value);
      }
    }
    T* out = static_cast<T*>(a.result) + (n * 2 * a.h + row) * a.w;
    for (int64_t x = 0; x < a.w; ++x) store(out[x], along_y.data()[x]);
    for (int64_t x = 0; x < a.w; ++x) store(out[a.h * a.w + x], along_x.data()[x]);
  }
}

// The Gaussians are computed again. e_i is linear along a row, so four sums a voxel give the gradients of all
// seven parameters, row by row in fp64; the caller adds rows in order: the same bits whatever the thread
// count. Bytes: reads the gradient, 2 volumes. Arithmetic: some 34 operations a voxel and Gaussian.
template <class T>
void bwd(const GaussianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  using V = Vector<A>;
  Line<A> column = columns<A>(a.w), along_y(a.w), along_x(a.w);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / a.h, row = index % a.h;
    const T* grad = static_cast<const T*>(a.grad) + (n * 2 * a.h + row) * a.w;
    for (int64_t x = 0; x < a.w; ++x) along_y.data()[x] = load(grad[x]);
    for (int64_t x = 0; x < a.w; ++x) along_x.data()[x] = load(grad[a.h * a.w + x]);
    for (int64_t t = 0; t < a.t; ++t) {
      const Gaussian& g = a.gaussians[n * a.t + t];
      const GaussianRow on_row = gaussian_row(g, row, a.w);
      const Exponent<A> weight(g, on_row);
      const V vx = fill<V>(A(g.motion[0])), vy = fill<V>(A(g.motion[1]));
      double weight_y = 0, weight_x = 0, pk = 0, pkk = 0;
      for (int64_t x0 = 0; x0 < column.n; x0 += kBlock) {
        V sum_y = {}, sum_x = {}, sum_pk = {}, sum_pkk = {};
        for (int64_t x = x0; x < std::min(column.n, x0 + kBlock); x += kLanes<A>) {
          const V k = load_as<V>(column.data() + x) - weight.column, value = weight(k);
          const V y_ = value * load_as<V>(along_y.data() + x), x_ = value * load_as<V>(along_x.data() + x);
          const V p = (vy * y_ + vx * x_) * k;
          sum_y += y_, sum_x += x_, sum_pk += p, sum_pkk += p * k;
        }
        weight_y += lane_sum<A>(sum_y), weight_x += lane_sum<A>(sum_x);
        pk += lane_sum<A>(sum_pk), pkk += lane_sum<A>(sum_pkk);
      }
      static_cast<GaussianSums*>(a.result)[(n * a.t + t) * a.h + row] =
          gaussian_row_sums(g, on_row, weight_x, weight_y, pk, pkk);
    }
  }
}

}  // namespace

void gaussian_fwd(Stored type, const GaussianArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}
void gaussian_bwd(Stored type, const GaussianArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <vector>

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

std::vector<Gaussian> gaussians_of(const char* op, const Tensor& params, bool variance, int64_t height,
                                   int64_t width) {
  FASTREG_CHECK(params.dim() == 3 && params.size(2) == kGaussianParams, op,
                "params must have shape (N, T, 7)");
  Tensor values = params.to(at::kDouble).contiguous();
  std::vector<Gaussian> gaussians;
  for (int64_t i = 0; i < params.size(0) * params.size(1); ++i)
    gaussians.push_back(
        gaussian(values.const_data_ptr<double>() + i * kGaussianParams, variance, width, height));
  return gaussians;
}

Tensor gaussian_displacement_cpu(const Tensor& params, c10::IntArrayRef shape, c10::string_view sigma_is) {
  FASTREG_CHECK(shape.size() == 2 && shape[0] > 0 && shape[1] > 0, "gaussian_displacement",
                "shape must be 2 integers >= 1");
  const auto gaussians = gaussians_of("gaussian_displacement", params, sigma_is == "var", shape[0], shape[1]);
  Tensor out = at::empty({params.size(0), 2, shape[0], shape[1]}, params.options());
  if (out.numel() == 0) return out;
  GaussianArgs a{gaussians.data(), nullptr, out.mutable_data_ptr(), params.size(1), shape[0], shape[1]};
  auto kernel = FASTREG_PICK(gaussian_fwd);
  at::parallel_for(0, params.size(0) * a.h, 1, [&](int64_t b, int64_t e) { kernel(stored(out), a, b, e); });
  return out;
}

Tensor gaussian_displacement_bwd_cpu(const Tensor& grad, const Tensor& params, c10::string_view sigma_is) {
  FASTREG_CHECK(grad.dim() == 4 && grad.size(0) == params.size(0) && grad.size(1) == 2,
                "gaussian_displacement_bwd", "grad must have shape (N, 2, H, W)");
  const bool variance = sigma_is == "var";
  const auto gaussians =
      gaussians_of("gaussian_displacement_bwd", params, variance, grad.size(2), grad.size(3));
  Tensor g = grad.contiguous(), result = at::zeros(params.sizes(), params.options().dtype(at::kDouble));
  if (result.numel() == 0 || g.numel() == 0) return result.to(params.scalar_type());
  const int64_t h = g.size(2);
  std::vector<GaussianSums> partial(gaussians.size() * h);  // one per row
  GaussianArgs a{gaussians.data(), g.const_data_ptr(), partial.data(), params.size(1), h, g.size(3)};
  auto kernel = FASTREG_PICK(gaussian_bwd);
  at::parallel_for(0, g.size(0) * h, 1, [&](int64_t b, int64_t e) { kernel(stored(g), a, b, e); });
  for (size_t i = 0; i < gaussians.size(); ++i) {
    GaussianSums sums = partial[i * h];
    for (int64_t row = 1; row < h; ++row) sums.add(partial[i * h + row]);
    gaussian_gradient(gaussians[i], variance, sums, result.mutable_data_ptr<double>() + i * kGaussianParams);
  }
  return result.to(params.scalar_type());
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("gaussian_displacement", gaussian_displacement_cpu);
  m.impl("gaussian_displacement_bwd", gaussian_displacement_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
