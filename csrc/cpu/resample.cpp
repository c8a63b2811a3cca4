// resample: an image read on another grid, at index = m p + b u(p) + t of its own; no gradient.
//
// Work: rows of the result, shared out whole; a row writes its own voxels alone and sums nothing, so that
// bits do not depend on the number of threads. Within a row, blocks of 64 voxels pass three stages that stay
// in the first-level cache: positions (vectorised), corners (one by one, pairs along x), interpolation
// (vectorised). Types meet in between, in fp32 or fp64, so that there is a loop a type and not one a pair of
// types.
//
// Bytes a voxel: nd fp32 of u, the image once (its slabs stay in cache between rows), the result: 12 + 2 + 2
// for int16 in 3D. Arithmetic a voxel, 3D: positions 12 products and sums and 18 steps of clamp and floor in
// fp64; 4 loads and stores of pairs; 7 lerps. With 8 fp64 lanes some 6 + 5 + 4 cycles: at 2.6 GHz on two
// cores 2.9 ns, against 1.6 ns for the bytes at 10 GB/s: bound by arithmetic.
#include "common/resample.h"

#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice: its z row of m and b is 0.
struct ResampleArgs {
  const void* image;  // (c, *in)
  const void* u;      // (nd, *out), fp32 or fp64; or null
  void* result;       // (c, *out)
  bool* inside;       // (*out), or null
  double m[3][3], b[3][3], t[3];
  double outside;  // where the position is not inside; unless the border goes on
  int64_t c, nd, in[3], out[3];
  Number from, to;
  bool nearest, border, u_fp64;
};

// Work units are rows (z, y) of the result.
FASTREG_KERNEL(void, resample_rows, const ResampleArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <cstring>

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int kBlock = 64;
// Half a voxel beyond the outermost centres is inside, as in ITK; the rest forgives the rounding of grids
// that share a face.
constexpr double kReach = 0.5 + 1e-9;

template <class A>
struct Cells {
  alignas(64) int64_t offset[kBlock];  // of the lower corner in its volume
  alignas(64) A fraction[3][kBlock];   // not of nearest
  alignas(64) int32_t inside[kBlock];
};

// Of steps to the upper corners; 0 along an axis of one voxel.
struct Strides {
  int64_t z, y, x;
  explicit Strides(const ResampleArgs& a)
      : z(a.in[0] > 1 ? a.in[1] * a.in[2] : 0), y(a.in[1] > 1 ? a.in[2] : 0), x(a.in[2] > 1) {}
};

template <class A>
void locate(const ResampleArgs& a, int64_t z, int64_t y, int64_t x0, int count, Cells<A>& cells) {
  const int64_t n_out = a.out[0] * a.out[1] * a.out[2], at = (z * a.out[1] + y) * a.out[2] + x0;
  const int64_t steps[3] = {a.in[1] * a.in[2], a.in[2], 1};
  int64_t* __restrict offset = cells.offset;
  int32_t* __restrict inside = cells.inside;
  for (int i = 0; i < kBlock; ++i) offset[i] = 0, inside[i] = -1;
  for (int k = int(3 - a.nd); k < 3; ++k) {
    alignas(64) double position[kBlock];
    const double start = a.t[k] + a.m[k][0] * double(z) + a.m[k][1] * double(y), slope = a.m[k][2];
    const int32_t from = int32_t(x0);
    for (int i = 0; i < count; ++i) position[i] = start + slope * double(from + i);
    if (a.u)
      for (int j = int(3 - a.nd); j < 3; ++j) {
        const double b = a.b[k][j];
        if (b == 0) continue;
        const auto add = [&](const auto* __restrict u) {
          u += (j - (3 - a.nd)) * n_out + at;
          for (int i = 0; i < count; ++i) position[i] += b * double(u[i]);
        };
        a.u_fp64 ? add(static_cast<const double*>(a.u)) : add(static_cast<const float*>(a.u));
      }
    const double last = double(a.in[k] - 1), last_cell = std::max(last - 1, 0.0);
    for (int i = 0; i < count; ++i)
      inside[i] &= -int32_t((position[i] >= -kReach) & (position[i] <= last + kReach));
    alignas(64) int32_t whole[kBlock];
    if (a.nearest)
      for (int i = 0; i < count; ++i) whole[i] = nearest_voxel(position[i], last);
    else
      for (int i = 0; i < count; ++i) cell(position[i], last, last_cell, whole[i], cells.fraction[k][i]);
    const uint32_t step = uint32_t(steps[k]);  // a plane is smaller than 2^32 voxels
    for (int i = 0; i < count; ++i) offset[i] += int64_t(uint64_t(uint32_t(whole[i])) * step);
  }
}

// At the far border f is 1, where the sum would not be exact.
template <class A>
A lerp(A a, A b, A f) {
  return f == A(1) ? b : a + f * (b - a);
}

// Without the corners that carry no weight: what is not finite reaches those alone that touch it.
template <class T, class A>
A interpolate_apart(const ResampleArgs& a, const T* image, const Cells<A>& cells, int i, bool deep) {
  const Strides strides(a);
  const T* v = image + cells.offset[i];
  A sum = 0;
  for (int corner = 0; corner < 8; ++corner) {
    const int z = corner >> 2, y = corner >> 1 & 1, x = corner & 1;
    const A fz = deep ? cells.fraction[0][i] : A(0), fy = cells.fraction[1][i], fx = cells.fraction[2][i];
    const A weight = (z ? fz : 1 - fz) * (y ? fy : 1 - fy) * (x ? fx : 1 - fx);
    if (weight != 0) sum += weight * number<A>(v[z * strides.z + y * strides.y + x * strides.x]);
  }
  return sum;
}

template <class T, class A>
void interpolate(const ResampleArgs& a, const T* image, const Cells<A>& cells, int count,
                 A* __restrict value) {
  const Strides strides(a);
  const bool deep = a.in[0] > 1;
  alignas(64) T pair[4][kBlock][2];
  if (strides.x) {
    for (int i = 0; i < count; ++i) {
      const T* v = image + cells.offset[i];
      std::memcpy(pair[0][i], v, sizeof pair[0][i]);
      std::memcpy(pair[1][i], v + strides.y, sizeof pair[0][i]);
      if (!deep) continue;
      std::memcpy(pair[2][i], v + strides.z, sizeof pair[0][i]);
      std::memcpy(pair[3][i], v + strides.z + strides.y, sizeof pair[0][i]);
    }
  } else {
    for (int i = 0; i < count; ++i)
      for (int k = 0; k < 4; ++k)
        pair[k][i][0] = pair[k][i][1] = image[cells.offset[i] + (k & 1) * strides.y + (k >> 1) * strides.z];
  }
  const auto plane = [&](int k, int i) {
    const A fx = cells.fraction[2][i];
    return lerp(lerp(number<A>(pair[k][i][0]), number<A>(pair[k][i][1]), fx),
                lerp(number<A>(pair[k + 1][i][0]), number<A>(pair[k + 1][i][1]), fx), cells.fraction[1][i]);
  };
  if (deep)
    for (int i = 0; i < count; ++i) value[i] = lerp(plane(0, i), plane(2, i), cells.fraction[0][i]);
  else
    for (int i = 0; i < count; ++i) value[i] = plane(0, i);
  if constexpr (!std::is_integral_v<T>) {
    int32_t finite = -1;
    for (int i = 0; i < count; ++i) finite &= -int32_t(value[i] - value[i] == A(0));
    for (int i = 0; i < count && !finite; ++i)
      if (!(value[i] - value[i] == A(0))) value[i] = interpolate_apart(a, image, cells, i, deep);
  }
}

// Calls block(cells, inside of the row's start x0, first voxel of the result, count).
template <class A, class Block>
void each_block(const ResampleArgs& a, int64_t begin, int64_t end, Block block) {
  Cells<A> cells;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t x0 = 0; x0 < a.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, a.out[2] - x0));
      locate(a, row / a.out[1], row % a.out[1], x0, count, cells);
      const int64_t at = row * a.out[2] + x0;
      if (a.inside)
        for (int i = 0; i < count; ++i) a.inside[at + i] = cells.inside[i] != 0;
      block(cells, at, count);
    }
}

template <class T, class A>
void write(const ResampleArgs& a, const Cells<A>& cells, const A* __restrict value, int count,
           T* __restrict out) {
  for (int i = 0; i < count; ++i) out[i] = rounded<T>(value[i]);
  if (a.border) return;
  const T outside = rounded<T>(a.outside);
  for (int i = 0; i < count; ++i) out[i] = cells.inside[i] ? out[i] : outside;
}

// Numbers of one type are copied, whatever they are; others meet in A.
template <class A>
void rows(const ResampleArgs& a, int64_t begin, int64_t end) {
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], n_out = a.out[0] * a.out[1] * a.out[2];
  each_block<A>(a, begin, end, [&](const Cells<A>& cells, int64_t at, int count) {
    for (int64_t c = 0; c < a.c; ++c) {
      alignas(64) A value[kBlock];
      bool copied = false;
      with_number(a.from, [&]<class T>() {
        if constexpr (std::is_same_v<A, double> || (sizeof(T) <= 2 || std::is_same_v<T, float>)) {
          const T* image = static_cast<const T*>(a.image) + c * n_in;
          if (!a.nearest) {
            interpolate(a, image, cells, count, value);
          } else if (a.from == a.to) {
            T* out = static_cast<T*>(a.result) + c * n_out + at;
            const T outside = rounded<T>(a.outside);
            for (int i = 0; i < count; ++i)
              out[i] = cells.inside[i] || a.border ? image[cells.offset[i]] : outside;
            copied = true;
          } else {
            for (int i = 0; i < count; ++i) value[i] = number<A>(image[cells.offset[i]]);
          }
        }
      });
      if (copied) continue;
      with_number(a.to, [&]<class T>() {
        if constexpr (std::is_same_v<A, double> || (sizeof(T) <= 2 || std::is_same_v<T, float>))
          write(a, cells, value, count, static_cast<T*>(a.result) + c * n_out + at);
      });
    }
  });
}

}  // namespace

void resample_rows(const ResampleArgs& a, int64_t begin, int64_t end) {
  is_narrow(a.from) && is_narrow(a.to) ? rows<float>(a, begin, end) : rows<double>(a, begin, end);
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <algorithm>
#include <tuple>

#include "cpu/binding.h"

namespace fastreg {
namespace {

Number number_of(at::ScalarType type) {
  switch (type) {
    case at::kBool:
    case at::kByte:
      return Number::u8;
    case at::kChar:
      return Number::i8;
    case at::kUInt16:
      return Number::u16;
    case at::kShort:
      return Number::i16;
    case at::kUInt32:
      return Number::u32;
    case at::kInt:
      return Number::i32;
    case at::kUInt64:
      return Number::u64;
    case at::kLong:
      return Number::i64;
    case at::kHalf:
      return Number::f16;
    case at::kFloat:
      return Number::f32;
    case at::kDouble:
      return Number::f64;
    default:
      TORCH_CHECK_TYPE(false, "fastreg::resample: images must be integers or fp16, fp32, fp64, got ", type);
  }
}

std::tuple<at::Tensor, at::Tensor> resample(const at::Tensor& given, const OptionalTensor& displacement,
                                            const at::Tensor& position, at::IntArrayRef shape,
                                            c10::string_view mode, std::optional<double> outside,
                                            at::ScalarType dtype, bool need_inside) {
  const char* op = "resample";
  const int64_t nd = shape.size();
  FASTREG_CHECK((nd == 2 || nd == 3) && given.dim() == nd + 2 && given.size(0) == 1, op,
                "image must have shape (1, C, *spatial), with as many axes as shape");
  FASTREG_CHECK(position.sizes() == at::IntArrayRef({nd, 2 * nd + 1}), op,
                "position must have shape (nd, 2 nd + 1)");
  const at::Tensor image = given.contiguous(), p = position.to(at::kDouble).contiguous();
  std::vector<int64_t> sizes{1, image.size(1)};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  ResampleArgs a{};
  volume_size(op, image.sizes(), a.in), volume_size(op, sizes, a.out);
  FASTREG_CHECK(a.in[1] * a.in[2] < (int64_t(1) << 32), op,
                "a plane of image must be smaller than 2^32 voxels");
  a.c = image.size(1), a.nd = nd, a.from = number_of(image.scalar_type()), a.to = number_of(dtype);
  a.nearest = mode == "nearest", a.border = !outside, a.outside = outside.value_or(0);
  const double* row = p.const_data_ptr<double>();
  for (int64_t k = 3 - nd; k < 3; ++k, row += 2 * nd + 1) {
    std::copy_n(row, nd, a.m[k] + 3 - nd), std::copy_n(row + nd, nd, a.b[k] + 3 - nd);
    a.t[k] = row[2 * nd];
  }
  at::Tensor u;
  if (displacement) {
    u = displacement->to(arithmetic_of(*displacement)).contiguous();
    sizes[1] = nd;
    FASTREG_CHECK(u.sizes() == sizes, op, "displacement must have shape (1, nd, *shape)");
    a.u = u.const_data_ptr(), a.u_fp64 = u.scalar_type() == at::kDouble;
  }
  sizes[1] = image.size(1);
  at::Tensor out = empty_large(sizes, image.options().dtype(dtype));
  sizes[1] = 1;
  at::Tensor inside = empty_if(need_inside, sizes, image.options().dtype(at::kBool));
  const int64_t n_rows = a.out[0] * a.out[1];
  if (n_rows * a.out[2] == 0) return {out, inside};
  FASTREG_CHECK(a.in[0] * a.in[1] * a.in[2] > 0, op, "image must not have an empty spatial axis");
  a.image = image.const_data_ptr(), a.result = out.mutable_data_ptr();
  a.inside = need_inside ? inside.mutable_data_ptr<bool>() : nullptr;
  auto kernel = FASTREG_PICK(resample_rows);
  at::parallel_for(0, n_rows, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {out, inside};
}

// Not of the ops that have gradients and GPUs: those of `fastreg` promise both (fastreg/io/_resample.py).
FASTREG_LIBRARY_IMPL(fastreg_io, m) { m.impl("resample", resample); }

}  // namespace
}  // namespace fastreg

#endif
