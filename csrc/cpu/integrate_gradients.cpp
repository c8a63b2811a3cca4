// integrate_gradients: running sums of each component along its own axis, and the same sums backwards.
#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// Sums along one axis, of the one component that goes with it.
struct SumsArgs {
  const void* in;  // of the first sample's component
  void* out;
  int64_t outer, n, inner;  // the component's shape: before the axis, along it, after it
  int64_t sample_stride;
  bool minus_one, reverse;
};

constexpr int64_t kSumsBlock = 1024;  // lines that run side by side
constexpr int64_t kSumsGroup = 8;     // the same where the axis is x

// Work units are blocks of lines (sample, outer, block of inner), and groups of rows (sample, group) along x.
FASTREG_KERNEL(void, sums_across, Stored, const SumsArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, sums_along, Stored, const SumsArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// Lines along z or y, side by side in x: a block of fp64 sums stays in cache while its rows stream past.
// Bytes: reads and writes the component once, which is what it waits for. Arithmetic: an addition and two
// conversions a voxel.
template <class T>
void across(const SumsArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  alignas(64) double sums[kSumsBlock];
  alignas(64) A values[kSumsBlock];
  const int64_t blocks = (a.inner + kSumsBlock - 1) / kSumsBlock;
  const double one = a.minus_one ? 1.0 : 0.0;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t x0 = index % blocks * kSumsBlock, line = index / blocks;
    const int64_t count = std::min(kSumsBlock, a.inner - x0);
    const int64_t start = line / a.outer * a.sample_stride + line % a.outer * a.n * a.inner + x0;
    std::fill(sums, sums + count, 0.0);
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t at = start + (a.reverse ? a.n - 1 - i : i) * a.inner;
      const T* in = static_cast<const T*>(a.in) + at;
      T* out = static_cast<T*>(a.out) + at;
      cover_x<A>(0, count, [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(values + x, load_as<V>(in + x));
      });
      for (int64_t x = 0; x < count; ++x) {
        sums[x] += double(values[x]) - one;
        values[x] = A(sums[x]);
      }
      cover_x<A>(0, count, [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(out + x, load_as<V>(values + x));
      });
    }
  }
}

// Lines along x: a sum waits for the one before it, so several rows go at once.
// Bytes: as above. Arithmetic: an addition of 4 cycles a voxel and row, kSumsGroup rows in flight.
template <class T>
void along(const SumsArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t groups = (a.outer + kSumsGroup - 1) / kSumsGroup;
  const double one = a.minus_one ? 1.0 : 0.0;
  const int64_t first = a.reverse ? a.n - 1 : 0, step = a.reverse ? -1 : 1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % groups * kSumsGroup;
    const int64_t start = index / groups * a.sample_stride + row * a.n + first;
    const T* in = static_cast<const T*>(a.in) + start;
    T* out = static_cast<T*>(a.out) + start;
    const auto rows = [&](auto count) {
      double sums[kSumsGroup] = {};
      for (int64_t i = 0; i < a.n; ++i)
        for (int64_t k = 0; k < count; ++k) {
          sums[k] += double(load(in[k * a.n + i * step])) - one;
          store(out[k * a.n + i * step], A(sums[k]));
        }
    };
    if (a.outer - row >= kSumsGroup)
      rows(std::integral_constant<int64_t, kSumsGroup>());
    else
      rows(a.outer - row);
  }
}

}  // namespace

void sums_across(Stored type, const SumsArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { across<T>(a, b, e); });
}
void sums_along(Stored type, const SumsArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { along<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

// Component k along axis k.
Tensor sums(const char* op, const Tensor& values, bool minus_one, bool reverse) {
  Tensor in = values.contiguous();
  const int64_t nd = in.dim() - 2;
  FASTREG_CHECK((nd == 2 || nd == 3) && in.size(1) == nd, op, "phi must have shape (N, nd, *spatial)");
  Tensor out = at::empty_like(in);
  if (in.numel() == 0) return out;
  const int64_t samples = in.size(0), voxels = in.numel() / (samples * nd), bytes = in.element_size();
  for (int64_t k = 0; k < nd; ++k) {
    const int64_t n = in.size(k + 2), inner = c10::multiply_integers(in.sizes().slice(k + 3));
    const SumsArgs a{static_cast<const char*>(in.const_data_ptr()) + k * voxels * bytes,
                     static_cast<char*>(out.mutable_data_ptr()) + k * voxels * bytes,
                     voxels / (n * inner),
                     n,
                     inner,
                     nd * voxels,
                     minus_one,
                     reverse};
    const bool x = k == nd - 1;
    const int64_t size = x ? a.outer : inner, block = x ? kSumsGroup : kSumsBlock;
    const int64_t units = samples * ((size + block - 1) / block) * (x ? 1 : a.outer);
    auto kernel = x ? FASTREG_PICK(sums_along) : FASTREG_PICK(sums_across);
    at::parallel_for(0, units, 1, [&](int64_t b, int64_t e) { kernel(stored(in), a, b, e); });
  }
  return out;
}

Tensor integrate_gradients_cpu(const Tensor& phi) { return sums("integrate_gradients", phi, true, false); }

Tensor integrate_gradients_bwd_cpu(const Tensor& grad, bool reverse) {
  return sums("integrate_gradients_bwd", grad, false, reverse);
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("integrate_gradients", integrate_gradients_cpu);
  m.impl("integrate_gradients_bwd", integrate_gradients_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
