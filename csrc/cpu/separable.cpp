// resize_displacement, smooth and bspline_displacement: they and their transposes apply one sparse matrix per
// axis whose rows are runs of consecutive columns.
#include <cstdint>

#include "common/scalar.h"
#include "cpu/axis_matrix.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice.
struct SeparableArgs {
  const void* input;  // (volumes, *n_in)
  void* output;       // (volumes, *n_out)
  int64_t volumes;
  AxisMatrix axis[3];
  const double* factor;  // factor[volume % n_factors] multiplies a volume
  int64_t n_factors;
  bool widened;      // the output is of the arithmetic type
  int64_t group[2];  // planes and rows of the output that are made together
};

constexpr int64_t kGroup = 4;

// Work units are (volume, group of planes, group of rows) of the output.
FASTREG_KERNEL(void, separable, Stored, const SeparableArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <vector>

#include "cpu/row_sums.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// out[x] = sum over k of weight[k] * rows[k][x].
template <class T, class O, class A>
void weighted_sum(const T* const* rows, const A* weight, int64_t count, int64_t n, O* out) {
  constexpr int kGroup = 4;  // vectors in flight: hides the latency of the additions
  constexpr int64_t kStep = kGroup * kLanes<A>;
  using V = Vector<A>;
  int64_t x = 0;
  for (; x + kStep <= n; x += kStep) {
    V sum[kGroup] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int i = 0; i < kGroup; ++i) sum[i] += weight[k] * load_as<V>(rows[k] + x + i * kLanes<A>);
    for (int i = 0; i < kGroup; ++i) store_as<V>(out + x + i * kLanes<A>, sum[i]);
  }
  cover_x<A>(x, n, [&](auto v, int64_t i) {
    using W = decltype(v);
    W sum = {};
    for (int64_t k = 0; k < count; ++k) sum += weight[k] * load_as<W>(rows[k] + i);
    store_as<W>(out + i, sum);
  });
}

// Whether the rows [i, i + kGroup) of a matrix are shifts of one another, of enough weights for sum_rows.
bool together(const AxisMatrix& m, int64_t i) {
  return i >= m.plain_begin && i + kGroup <= m.plain_end && m.offset[i + 1] - m.offset[i] >= kGroup;
}

// One row, to the bits that sum_rows gives it among others.
template <class T, class O, class A>
void one_row(const AxisMatrix& m, int64_t i, const T* const* rows, const A* weight, int64_t count, int64_t n,
             O* out) {
  i >= m.plain_begin&& i < m.plain_end ? sum_rows<1>(rows, weight, count, n, &out)
                                       : weighted_sum(rows, weight, count, n, out);
}

template <class A>
struct Weights {
  explicit Weights(const AxisMatrix& m) : axis(m), value(m.weight, m.weight + m.offset[m.n_out]) {}
  int64_t first(int64_t i) const { return axis.first[i]; }
  int64_t count(int64_t i) const { return axis.offset[i + 1] - axis.offset[i]; }
  const A* at(int64_t i) const { return value.data() + axis.offset[i]; }
  const AxisMatrix& axis;
  std::vector<A> value;
};

// The last axis: no row of a vector is like the next, so three forms by the shape of the matrix.
template <class A>
class AlongX {
 public:
  explicit AlongX(const AxisMatrix& m) : weights_(m), taps_(m.widest) {
    if (m.widest > 2 || m.plain_end > m.plain_begin) return;
    // At most two weights a row (interpolation): a pair of loads. A weight of 0 must not pass on what is not
    // finite.
    near_.resize(m.n_out), far_.resize(m.n_out);
    for (int64_t i = 0; i < m.n_out; ++i) {
      const int64_t count = weights_.count(i), first = std::min(m.first[i], m.n_in - 1);
      low_.push_back(first);
      high_.push_back(std::min(first + 1, m.n_in - 1));
      low_weight_.push_back(count > 0 ? weights_.at(i)[0] : A(0));
      high_weight_.push_back(count > 1 ? weights_.at(i)[1] : A(0));
    }
  }

  template <class T>
  void apply(const A* line, T* out) {
    const AxisMatrix& m = weights_.axis;
    if (!low_.empty()) {
      for (int64_t x = 0; x < m.n_out; ++x) {
        near_[x] = line[low_[x]];
        far_[x] = line[high_[x]];
      }
      cover_x<A>(0, m.n_out, [&](auto v, int64_t x) {
        using V = decltype(v);
        const V w = load_as<V>(low_weight_.data() + x), u = load_as<V>(high_weight_.data() + x);
        const V near = w != 0 ? w * load_as<V>(near_.data() + x) : V{};
        const V far = u != 0 ? u * load_as<V>(far_.data() + x) : V{};
        store_as<V>(out + x, near + far);
      });
      return;
    }
    const bool plain = m.plain_end > m.plain_begin;
    const int64_t begin = plain ? m.plain_begin : m.n_out, end = plain ? m.plain_end : m.n_out;
    for (int64_t x = 0; x < begin; ++x) store(out[x], dot(line, x));
    for (int64_t x = end; x < m.n_out; ++x) store(out[x], dot(line, x));
    if (!plain) return;
    for (int64_t k = 0; k < weights_.count(begin); ++k) taps_[k] = line + m.first[begin] + k;
    T* rest = out + begin;
    sum_rows<1>(taps_.data(), weights_.at(begin), weights_.count(begin), end - begin, &rest);
  }

 private:
  A dot(const A* line, int64_t x) const {
    const A *w = weights_.at(x), *v = line + weights_.first(x);
    A sum = A(0);
    for (int64_t k = 0; k < weights_.count(x); ++k) sum += w[k] * v[k];
    return sum;
  }

  Weights<A> weights_;
  std::vector<const A*> taps_;
  std::vector<int64_t> low_, high_;
  std::vector<A> low_weight_, high_weight_, near_, far_;
};

// One pass over memory: rows are combined along z into a ring of the rows that the filter along y needs,
// those along y into the output, with the filter along x on whichever side of y has fewer rows. The ring and
// the line stay in cache; nothing in between is written out. Filters whose rows are shifts of one another
// take kGroup planes and kGroup rows at a time: a row is loaded once for the sums of all of them. Bytes:
// reads 1 volume (each plane again for its neighbours in z, from cache), writes 1. Arithmetic: the weights of
// the three axes, one multiply-add each a voxel. smooth of 3 x 160^3, sigma 1.5, and its way back: 2 x 39
// on 12.3 million voxels, at 16 lanes, two a cycle and 4 GHz 7.5 ms of a core; 200 MB, 8 ms at 25 GB/s.
template <class T, class O>
class Rows {
  using A = arithmetic_t<T>;

 public:
  explicit Rows(const SeparableArgs& args)
      : a(args),
        mz(a.axis[0]),
        my(a.axis[1]),
        mx(a.axis[2]),
        wz(mz),
        wy(my),
        along_x(mx),
        x_before_y(my.n_out > my.n_in),
        line_in(mx.n_in),
        line_ring(x_before_y ? mx.n_out : line_in),
        n_ring(my.widest + a.group[1] - 1),
        ring(a.group[0] * n_ring * line_ring),
        line(std::max(a.group[0], a.group[1]) * line_in),
        planes(std::max<int64_t>(mz.widest, 1) + kGroup),
        lines(n_ring + kGroup) {}

  void run(int64_t begin, int64_t end) {
    const int64_t groups_y = ceil_div(my.n_out, a.group[1]), groups_z = ceil_div(mz.n_out, a.group[0]);
    int64_t current = -1, filled = 0;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t y = index % groups_y * a.group[1], slab = index / groups_y;
      const int64_t z = slab % groups_z * a.group[0], volume = slab / groups_z;
      const int64_t n_y = std::min(a.group[1], my.n_out - y), n_z = std::min(a.group[0], mz.n_out - z);
      const T* input = static_cast<const T*>(a.input) + volume * mz.n_in * my.n_in * line_in;
      O* output = static_cast<O*>(a.output) + volume * mz.n_out * my.n_out * mx.n_out;
      if (slab != current) current = slab, filled = 0;
      filled = std::max(filled, wy.first(y));
      for (const int64_t last = y + n_y - 1; filled < wy.first(last) + wy.count(last); ++filled)
        sum_z(input, z, n_z, filled);
      for (int64_t k = 0; k < n_z; ++k)
        sum_y(ring.data() + k * n_ring * line_ring, y, n_y, A(a.factor[volume % a.n_factors]),
              output + ((z + k) * my.n_out + y) * mx.n_out);
    }
  }

 private:
  static int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

  // Row y of the planes [z, z + n_z), into their rings.
  void sum_z(const T* input, int64_t z, int64_t n_z, int64_t y) {
    const int64_t plane_in = my.n_in * line_in;
    A* out[kGroup];
    for (int64_t k = 0; k < n_z; ++k)
      out[k] = x_before_y ? line.data() + k * line_in : ring.data() + (k * n_ring + y % n_ring) * line_ring;
    if (n_z == kGroup && together(mz, z)) {
      for (int64_t k = 0; k < wz.count(z) + kGroup - 1; ++k)
        planes[k] = input + (wz.first(z) + k) * plane_in + y * line_in;
      sum_rows<kGroup>(planes.data(), wz.at(z), wz.count(z), line_in, out);
    } else {
      for (int64_t i = 0; i < n_z; ++i) {
        for (int64_t k = 0; k < wz.count(z + i); ++k)
          planes[k] = input + (wz.first(z + i) + k) * plane_in + y * line_in;
        one_row(mz, z + i, planes.data(), wz.at(z + i), wz.count(z + i), line_in, out[i]);
      }
    }
    if (x_before_y)
      for (int64_t k = 0; k < n_z; ++k)
        along_x.apply(out[k], ring.data() + (k * n_ring + y % n_ring) * line_ring);
  }

  // Rows [y, y + n_y) of a plane of the output.
  void sum_y(const A* from, int64_t y, int64_t n_y, A factor, O* out) {
    const auto row_of = [&](int64_t i) { return from + i % n_ring * line_ring; };
    scaled.assign(wy.at(y), wy.at(y + n_y - 1) + wy.count(y + n_y - 1));
    for (A& weight : scaled) weight *= factor;
    if (n_y == kGroup && !x_before_y && together(my, y)) {
      A* sums[kGroup];
      for (int64_t k = 0; k < kGroup; ++k) sums[k] = line.data() + k * line_in;
      for (int64_t k = 0; k < wy.count(y) + kGroup - 1; ++k) lines[k] = row_of(wy.first(y) + k);
      sum_rows<kGroup>(lines.data(), scaled.data(), wy.count(y), line_in, sums);
      for (int64_t k = 0; k < kGroup; ++k) along_x.apply(sums[k], out + k * mx.n_out);
      return;
    }
    for (int64_t i = 0; i < n_y; ++i, out += mx.n_out) {
      const int64_t count = wy.count(y + i);
      const A* weight = scaled.data() + (wy.at(y + i) - wy.at(y));
      for (int64_t k = 0; k < count; ++k) lines[k] = row_of(wy.first(y + i) + k);
      if (x_before_y) {
        one_row(my, y + i, lines.data(), weight, count, line_ring, out);
      } else {
        one_row(my, y + i, lines.data(), weight, count, line_in, line.data());
        along_x.apply(line.data(), out);
      }
    }
  }

  const SeparableArgs& a;
  const AxisMatrix &mz, &my, &mx;
  const Weights<A> wz, wy;
  AlongX<A> along_x;
  const bool x_before_y;
  const int64_t line_in, line_ring, n_ring;
  std::vector<A> ring, line, scaled;
  std::vector<const T*> planes;
  std::vector<const A*> lines;
};

}  // namespace

void separable(Stored type, const SeparableArgs& a, int64_t b, int64_t e) {
  with_type(type,
            [&]<class T>() { a.widened ? Rows<T, arithmetic_t<T> >(a).run(b, e) : Rows<T, T>(a).run(b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <algorithm>
#include <vector>

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

Tensor apply(const Tensor& input, c10::IntArrayRef size, const std::vector<Matrix>& matrices,
             const std::vector<double>& factor, bool widened = false) {
  Tensor in = input.contiguous(),
         out = empty_large(size, in.options().dtype(widened ? arithmetic_of(in) : in.scalar_type()));
  if (out.numel() == 0) return out;
  const Matrix single{1, 1, 0, 0, {0}, {0, 1}, {1.0}};
  SeparableArgs a{in.const_data_ptr(),
                  out.mutable_data_ptr(),
                  in.size(0) * in.size(1),
                  {},
                  factor.data(),
                  int64_t(factor.size()),
                  widened,
                  {}};
  const int64_t missing = 3 - int64_t(matrices.size());
  for (int64_t k = 0; k < 3; ++k) a.axis[k] = k < missing ? single.view() : matrices[k - missing].view();
  int64_t units = a.volumes;
  for (int k = 0; k < 2; ++k) {
    const AxisMatrix& m = a.axis[k];
    a.group[k] = m.widest >= kGroup && m.plain_end - m.plain_begin >= kGroup ? kGroup : 1;
    units *= (m.n_out + a.group[k] - 1) / a.group[k];
  }
  auto kernel = FASTREG_PICK(separable);
  at::parallel_for(0, units, 1, [&](int64_t b, int64_t e) { kernel(stored(in), a, b, e); });
  return out;
}

Tensor resize(const char* op, const Tensor& input, c10::IntArrayRef size, bool align_corners,
              std::optional<at::ArrayRef<double> > scale, bool transposed) {
  const int64_t nd = int64_t(size.size());
  FASTREG_CHECK((nd == 2 || nd == 3) && input.dim() == nd + 2 && input.size(1) == nd, op,
                "u must have shape (N, nd, *spatial) and size nd numbers");
  FASTREG_CHECK(!scale || int64_t(scale->size()) == nd, op, "scale must have a number per axis");
  auto shape = input.sizes().vec();
  std::vector<Matrix> matrices;
  std::vector<double> factor;
  for (int64_t k = 0; k < nd; ++k) {
    const int64_t n_in = transposed ? size[k] : input.size(k + 2),
                  n_out = transposed ? input.size(k + 2) : size[k];
    FASTREG_CHECK(n_in > 0 && n_out > 0 && n_in < (1 << 29) && n_out < (1 << 29), op,
                  "an axis must have from 1 to 2^29 voxels");
    matrices.push_back(linear_matrix(n_in, n_out, align_corners, transposed));
    factor.push_back(scale ? (*scale)[k] : exact_scale(n_in, n_out, align_corners));
    shape[k + 2] = size[k];
  }
  return apply(input, shape, matrices, factor);
}

Tensor resize_displacement_cpu(const Tensor& u, c10::IntArrayRef size, bool align_corners,
                               std::optional<at::ArrayRef<double> > scale) {
  return resize("resize_displacement", u, size, align_corners, scale, false);
}

Tensor resize_displacement_bwd_cpu(const Tensor& grad, c10::IntArrayRef size, bool align_corners,
                                   std::optional<at::ArrayRef<double> > scale) {
  return resize("resize_displacement_bwd", grad, size, align_corners, scale, true);
}

Tensor filter(const char* op, const Tensor& input, at::ArrayRef<double> sigma, c10::string_view padding,
              double truncate, bool transposed) {
  const int64_t nd = int64_t(sigma.size());
  FASTREG_CHECK((nd == 2 || nd == 3) && input.dim() == nd + 2, op,
                "u must have shape (N, C, *spatial) and sigma a number per axis");
  const Padding rule = padding_of(padding);
  std::vector<Matrix> matrices;
  for (int64_t k = 0; k < nd; ++k)
    matrices.push_back(gaussian_matrix(input.size(k + 2), sigma[k], truncate, rule, transposed));
  return apply(input, input.sizes(), matrices, {1.0});
}

Tensor smooth_cpu(const Tensor& u, at::ArrayRef<double> sigma, c10::string_view padding, double truncate) {
  return filter("smooth", u, sigma, padding, truncate, false);
}

Tensor smooth_bwd_cpu(const Tensor& grad, at::ArrayRef<double> sigma, c10::string_view padding,
                      double truncate) {
  return filter("smooth_bwd", grad, sigma, padding, truncate, true);
}

void check_bspline(const char* op, const Tensor& t, c10::IntArrayRef spacing, c10::IntArrayRef control,
                   c10::IntArrayRef shape, int64_t order) {
  const int64_t nd = int64_t(spacing.size());
  FASTREG_CHECK((nd == 2 || nd == 3) && t.dim() == nd + 2 && int64_t(control.size()) == nd &&
                    int64_t(shape.size()) == nd && order >= 1 && order <= 3,
                op, "spacing and shape must have a number per axis, order must be 1, 2 or 3");
  for (int64_t k = 0; k < nd; ++k) {
    FASTREG_CHECK(shape[k] > 0 && shape[k] < (1 << 29) && spacing[k] > 0 && spacing[k] < (1 << 29), op,
                  "shape and spacing must be from 1 to 2^29");
    FASTREG_CHECK(control[k] == bspline_control_points(shape[k], spacing[k], order), op,
                  "coefficients must have ceil(n / spacing) + order control points per axis");
  }
}

Tensor bspline_displacement_cpu(const Tensor& coefficients, c10::IntArrayRef spacing, c10::IntArrayRef shape,
                                int64_t order) {
  check_bspline("bspline_displacement", coefficients, spacing, coefficients.sizes().slice(2), shape, order);
  std::vector<int64_t> size = coefficients.sizes().slice(0, 2).vec();
  std::vector<Matrix> matrices;
  for (size_t k = 0; k < shape.size(); ++k) {
    size.push_back(shape[k]);
    matrices.push_back(bspline_matrix(shape[k], spacing[k], order, false));
  }
  return apply(coefficients, size, matrices, {1.0});
}

// Each control point sums (order + 1) spacing voxels along each axis, each voxel reaches order + 1 points.
// Planes are reduced along y and x first, where their rows stay in cache, and only what is left of them along
// z.
Tensor bspline_displacement_bwd_cpu(const Tensor& grad, c10::IntArrayRef spacing, c10::IntArrayRef control,
                                    int64_t order) {
  check_bspline("bspline_displacement_bwd", grad, spacing, control, grad.sizes().slice(2), order);
  const size_t nd = control.size();
  std::vector<int64_t> size = grad.sizes().vec();
  std::vector<Matrix> matrices;
  if (nd == 3) matrices.push_back(identity_matrix(grad.size(2)));
  for (size_t k = nd - 2; k < nd; ++k) {
    size[k + 2] = control[k];
    matrices.push_back(bspline_matrix(grad.size(k + 2), spacing[k], order, true));
  }
  Tensor reduced = apply(grad, size, matrices, {1.0}, true);
  if (nd == 3) {
    size[2] = control[0];
    matrices = {bspline_matrix(grad.size(2), spacing[0], order, true), identity_matrix(control[1]),
                identity_matrix(control[2])};
    reduced = apply(reduced, size, matrices, {1.0});
  }
  return reduced.to(grad.scalar_type());
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("resize_displacement", resize_displacement_cpu);
  m.impl("resize_displacement_bwd", resize_displacement_bwd_cpu);
  m.impl("smooth", smooth_cpu);
  m.impl("smooth_bwd", smooth_bwd_cpu);
  m.impl("bspline_displacement", bspline_displacement_cpu);
  m.impl("bspline_displacement_bwd", bspline_displacement_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
