// gaussian_displacement: a sum of Gaussian-shaped motions on a grid, and the gradient to their numbers.
#include "common/gaussian_displacement.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

struct GaussianArgs {
  const Gaussian* gaussians;  // (n, t)
  const void* grad;           // (n, 2, h, w); backward only
  void* result;               // forward: (n, 2, h, w); backward: GaussianSums (n, t, blocks)
  int64_t t, h, w;
};

constexpr int64_t kGaussianRows = 4;  // in a block
inline int64_t gaussian_blocks(int64_t h) { return (h + kGaussianRows - 1) / kGaussianRows; }

// Work units are rows (n, y); of the backward: blocks of rows (n, block).
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

// Lines are padded to whole vectors: no loop over columns has a rest.
template <class A>
int64_t whole_vectors(int64_t w) {
  return (w + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
std::vector<A> columns(int64_t w) {
  std::vector<A> column(whole_vectors<A>(w));
  for (size_t x = 0; x < column.size(); ++x) column[x] = A(x);
  return column;
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
// Bytes: writes the field, 2 volumes. Arithmetic: some 26 operations a voxel and Gaussian, 17 of them 2^x. At
// T = 25 and 256^2 those are 5.3 million vectors of 8, 2.7 Mcycles at two a cycle, and 0.5 MB: arithmetic is
// the floor.
template <class T>
void fwd(const GaussianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  using V = Vector<A>;
  const int64_t line = whole_vectors<A>(a.w);
  const std::vector<A> column = columns<A>(a.w);
  std::vector<A> along_y(line), along_x(line);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / a.h, row = index % a.h;
    std::fill(along_y.begin(), along_y.end(), A(0));
    std::fill(along_x.begin(), along_x.end(), A(0));
    for (int64_t t = 0; t < a.t; ++t) {
      const Gaussian& g = a.gaussians[n * a.t + t];
      const Exponent<A> weight(g, gaussian_row(g, row, a.w));
      const V vx = fill<V>(A(g.motion[0])), vy = fill<V>(A(g.motion[1]));
      for (int64_t x = 0; x < line; x += kLanes<A>) {
        const V value = weight(load_as<V>(column.data() + x) - weight.column);
        A *y_ = along_y.data() + x, *x_ = along_x.data() + x;
        store_as<V>(y_, load_as<V>(y_) + vy * value);
        store_as<V>(x_, load_as<V>(x_) + vx * value);
      }
    }
    T* out = static_cast<T*>(a.result) + (n * 2 * a.h + row) * a.w;
    for (int64_t x = 0; x < a.w; ++x) store(out[x], along_y[x]);
    for (int64_t x = 0; x < a.w; ++x) store(out[a.h * a.w + x], along_x[x]);
  }
}

// The Gaussians are computed again. e_i is linear along a row, so four sums a voxel give the gradients of all
// seven parameters, row by row in fp64; the caller adds blocks in order: the same bits whatever the thread
// count. Bytes: reads the gradient, 2 volumes. Arithmetic: some 32 operations a voxel and Gaussian.
template <class T>
void bwd(const GaussianArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  using V = Vector<A>;
  const int64_t line = whole_vectors<A>(a.w), n_blocks = gaussian_blocks(a.h);
  const std::vector<A> column = columns<A>(a.w);
  std::vector<A> grads(2 * kGaussianRows * line);  // (y or x, row, column)
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / n_blocks, first = index % n_blocks * kGaussianRows,
                  n_rows = std::min(kGaussianRows, a.h - first);
    for (int64_t c = 0; c < 2; ++c)
      for (int64_t row = 0; row < n_rows; ++row) {
        const T* in = static_cast<const T*>(a.grad) + ((n * 2 + c) * a.h + first + row) * a.w;
        A* out = grads.data() + (c * kGaussianRows + row) * line;
        for (int64_t x = 0; x < a.w; ++x) out[x] = load(in[x]);
      }
    for (int64_t t = 0; t < a.t; ++t) {
      const Gaussian& g = a.gaussians[n * a.t + t];
      const V vx = fill<V>(A(g.motion[0])), vy = fill<V>(A(g.motion[1]));
      GaussianSums sums{};
      for (int64_t row = 0; row < n_rows; ++row) {
        const A *along_y = grads.data() + row * line, *along_x = along_y + kGaussianRows * line;
        const GaussianRow on_row = gaussian_row(g, first + row, a.w);
        const Exponent<A> weight(g, on_row);
        double weight_y = 0, weight_x = 0, pk = 0, pkk = 0;
        for (int64_t x0 = 0; x0 < line; x0 += kBlock) {
          V sum_y = {}, sum_x = {}, sum_pk = {}, sum_pkk = {};
          for (int64_t x = x0; x < std::min(line, x0 + kBlock); x += kLanes<A>) {
            const V k = load_as<V>(column.data() + x) - weight.column, value = weight(k);
            const V y_ = value * load_as<V>(along_y + x), x_ = value * load_as<V>(along_x + x);
            const V p = (vy * y_ + vx * x_) * k;
            sum_y += y_, sum_x += x_, sum_pk += p, sum_pkk += p * k;
          }
          weight_y += lane_sum<A>(sum_y), weight_x += lane_sum<A>(sum_x);
          pk += lane_sum<A>(sum_pk), pkk += lane_sum<A>(sum_pkk);
        }
        sums.add(gaussian_row_sums(g, on_row, weight_x, weight_y, pk, pkk));
      }
      static_cast<GaussianSums*>(a.result)[(n * a.t + t) * n_blocks + index % n_blocks] = sums;
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
  const int64_t n_blocks = gaussian_blocks(g.size(2));
  std::vector<GaussianSums> partial(gaussians.size() * n_blocks);
  GaussianArgs a{gaussians.data(), g.const_data_ptr(), partial.data(), params.size(1), g.size(2), g.size(3)};
  auto kernel = FASTREG_PICK(gaussian_bwd);
  at::parallel_for(0, g.size(0) * n_blocks, 1, [&](int64_t b, int64_t e) { kernel(stored(g), a, b, e); });
  for (size_t i = 0; i < gaussians.size(); ++i) {
    GaussianSums sums{};
    for (int64_t block = 0; block < n_blocks; ++block) sums.add(partial[i * n_blocks + block]);
    gaussian_gradient(gaussians[i], variance, sums, result.mutable_data_ptr<double>() + i * kGaussianParams);
  }
  return result.to(params.scalar_type());
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("gaussian_displacement", gaussian_displacement_cpu);
  m.impl("gaussian_displacement_bwd", gaussian_displacement_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
