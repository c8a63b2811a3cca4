// cost_volume: mean squared differences of cells of fixed and of moving, shifted by all offsets of a cube.
#include "common/cost_volume.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// Work units are cells (n, z, y, x).
FASTREG_KERNEL(void, cost_fwd, Stored, const CostArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/vector.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace fastreg::FASTREG_ISA {
namespace {

// A vector of kBytes, at most the set's: of a row of offsets the widest take most, a narrower one the rest.
template <class A, int kBytes>
struct PieceOf {
  typedef A type __attribute__((vector_size(kBytes < kVectorBytes ? kBytes : kVectorBytes)));
};

// Calls body(V(), x) for the pieces of [0, n); the last may reach beyond n.
template <class A, class Body>
FASTREG_HD void each_piece(int64_t n, Body body) {
  int64_t x = 0;
  for (; x + kLanes<A> <= n; x += kLanes<A>) body(Vector<A>(), x);
  if (x == n) return;
  const int64_t bytes = (n - x) * int64_t(sizeof(A));
  if (bytes > 32)
    body(typename PieceOf<A, 64>::type(), x);
  else if (bytes > 16)
    body(typename PieceOf<A, 32>::type(), x);
  else
    body(typename PieceOf<A, 16>::type(), x);
}

// a * a + b. Fused where the set can: a sum is not bit-equal across sets in any case.
template <class V>
FASTREG_HD V square_add(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4)
    return V(_mm512_fmadd_ps(__m512(a), __m512(a), __m512(b)));
#endif
#if defined(__FMA__)
  if constexpr (sizeof(a[0]) == 4) {
    if constexpr (sizeof(V) == 32) return V(_mm256_fmadd_ps(__m256(a), __m256(a), __m256(b)));
    if constexpr (sizeof(V) == 16) return V(_mm_fmadd_ps(__m128(a), __m128(a), __m128(b)));
  }
#endif
  return a * a + b;
}

// What is compared at a time: samples of a block of a cell, one channel of them, and what of moving they
// reach.
template <class A>
struct Block {
  static constexpr int64_t kSamples = kCostBlock * kCostBlock * kCostBlock;
  int64_t count;
  int64_t at[kSamples];     // in the patch, of what offset (-radius, -radius, -radius) reads
  int64_t voxel[kSamples];  // in the volume
  alignas(64) A weight[kSamples], value[kSamples];
  int64_t begin[3], reach[3];  // of the patch: its first voxel, which may lie before the image; its size
  int64_t pitch;
};

// Adds to `count` rows of sums, `width` apart, a piece of V each. rows: where in the patch they begin. The
// sums of the rows stay in registers: a vector of moving read for each subtraction, product and addition.
template <class V, int kRows, bool kWeighted, class A>
void compare(const Block<A>& b, const A* patch, const int64_t* rows, A* sums, int64_t width) {
  V sum[kRows] = {};
  for (int64_t s = 0; s < b.count; ++s) {
    const V value = fill<V>(b.value[s]);
    const A* moving = patch + b.at[s];
    for (int r = 0; r < kRows; ++r) {
      V m;
      std::memcpy(&m, moving + rows[r], sizeof(V));
      const V d = value - m;
      if constexpr (kWeighted)
        sum[r] += b.weight[s] * (d * d);
      else
        sum[r] = square_add(d, sum[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    V before;
    std::memcpy(&before, sums + r * width, sizeof(V));
    before += sum[r];
    std::memcpy(sums + r * width, &before, sizeof(V));
  }
}

constexpr int kRowsAtOnce = 8;  // with them 16 registers suffice

template <class V, bool kWeighted, class A, int... kRows>
void compare_rows(std::integer_sequence<int, kRows...>, int64_t count, const Block<A>& b, const A* patch,
                  const int64_t* rows, A* sums, int64_t width) {
  ((count == kRows + 1 && (compare<V, kRows + 1, kWeighted>(b, patch, rows, sums, width), true)) || ...);
}

// All rows of offsets, in groups of about one size: a short one would wait for its own sums.
template <bool kWeighted, class A>
void compare_all(const Block<A>& b, const A* patch, const std::vector<int64_t>& rows, int64_t window, A* sums,
                 int64_t width) {
  const int64_t n = rows.size(), groups = (n + kRowsAtOnce - 1) / kRowsAtOnce;
  each_piece<A>(window, [&](auto v, int64_t x) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * n / groups, count = (g + 1) * n / groups - first;
      compare_rows<decltype(v), kWeighted>(std::make_integer_sequence<int, kRowsAtOnce>(), count, b,
                                           patch + x, rows.data() + first, sums + first * width + x, width);
    }
  });
}

// A row of n voxels, in vectors: it may write up to one beyond, as it may read.
template <class T, class A>
FASTREG_HD void copy_row(const T* from, int64_t n, A* to) {
  for (int64_t x = 0; x < n; x += kLanes<A>) store_as(to + x, load_as<Vector<A>>(from + x));
}

// The patch of a channel, the border going on. A row may write into the next before that is copied; `end` is
// that of the tensor.
template <class T, class A>
void copy_patch(const CostArgs& a, const Block<A>& b, const T* moving, const T* end, A* patch) {
  const int64_t line = a.size[2], plane = a.size[1] * line;
  const T* first = moving + b.begin[0] * plane + b.begin[1] * line + b.begin[2];
  bool inside = first + (b.reach[0] - 1) * plane + (b.reach[1] - 1) * line + b.reach[2] + kLanes<A> <= end;
  for (int k = 0; k < 3; ++k) inside &= b.begin[k] >= 0 && b.begin[k] + b.reach[k] <= a.size[k];
  if (inside) {
    for (int64_t z = 0; z < b.reach[0]; ++z, first += plane) {
      const T* from = first;
      for (int64_t y = 0; y < b.reach[1]; ++y, patch += b.pitch, from += line)
        copy_row(from, b.reach[2], patch);
    }
    return;
  }
  const int64_t left = std::max<int64_t>(-b.begin[2], 0), right = std::min(b.reach[2], line - b.begin[2]);
  for (int64_t z = 0; z < b.reach[0]; ++z)
    for (int64_t y = 0; y < b.reach[1]; ++y, patch += b.pitch) {
      const T* row = moving + std::clamp<int64_t>(b.begin[0] + z, 0, a.size[0] - 1) * plane +
                     std::clamp<int64_t>(b.begin[1] + y, 0, a.size[1] - 1) * line;
      const T* from = row + b.begin[2];
      if (from + right + kLanes<A> <= end)
        copy_row(from + left, right - left, patch + left);
      else
        for (int64_t x = left; x < right; ++x) patch[x] = load(from[x]);
      for (int64_t x = 0; x < left; ++x) patch[x] = load(row[0]);
      for (int64_t x = right; x < b.reach[2]; ++x) patch[x] = load(row[line - 1]);
    }
}

// The samples of a block with weight, and the sum of their weights.
template <class A>
double list_samples(const CostArgs& a, const A* mask, const CostSpan (&span)[3], Block<A>& b) {
  double total = 0;
  b.count = 0;
  for (int k = 0; k < 3; ++k) {
    b.begin[k] = span[k].begin - a.radius[k];
    b.reach[k] = (span[k].count - 1) * a.stride[k] + window(a, k);
  }
  b.pitch = b.reach[2];
  for (int64_t z = 0; z < span[0].count; ++z)
    for (int64_t y = 0; y < span[1].count; ++y)
      for (int64_t x = 0; x < span[2].count; ++x) {
        const int64_t p[3] = {z * a.stride[0], y * a.stride[1], x * a.stride[2]};
        const int64_t voxel =
            ((span[0].begin + p[0]) * a.size[1] + span[1].begin + p[1]) * a.size[2] + span[2].begin + p[2];
        const A weight = mask ? mask[voxel] : A(1);
        if (weight <= 0) continue;
        b.at[b.count] = (p[0] * b.reach[1] + p[1]) * b.pitch + p[2];
        b.voxel[b.count] = voxel;
        b.weight[b.count++] = weight;
        total += weight;
      }
  return total;
}

// Threads share out cells, each of which writes its costs alone. A cell compares its samples, channel by
// channel, with the patch of moving that they reach: converted and with its border, it stays in the nearest
// cache and so do the cell's sums.
//
// Arithmetic a cell: C samples offsets subtractions and multiply-adds, in vectors along the last axis of the
// offsets (13 of radius 6 fill 81 % of two vectors of 8); as many loads from the nearest cache, which are the
// limit: two vectors a cycle. Bytes: the patch, (cell + 2 radius)^nd values a channel, from the caches beyond
// (neighbours share most), and offsets written.
template <class T>
void fwd(const CostArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t volume = a.size[0] * a.size[1] * a.size[2], n_offsets = offsets(a);
  const int64_t width = (window(a, 2) + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  std::vector<int64_t> rows(window(a, 0) * window(a, 1));
  std::vector<A> sums(rows.size() * width), patch;
  const auto block = std::make_unique_for_overwrite<Block<A>>();
  Block<A>& b = *block;
  const T* moving_end = static_cast<const T*>(a.moving) + a.n * a.c * volume;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t cell[3] = {index / (a.cells[1] * a.cells[2]) % a.cells[0], index / a.cells[2] % a.cells[1],
                             index % a.cells[2]};
    const int64_t n = index / (a.cells[0] * a.cells[1] * a.cells[2]);
    const A* mask = a.mask ? static_cast<const A*>(a.mask) + n * volume : nullptr;
    std::fill(sums.begin(), sums.end(), A(0));
    double weight = 0;
    CostSpan span[3];
    for (int64_t z = 0; (span[0] = cost_span(a, 0, cell[0], z)).count > 0; ++z)
      for (int64_t y = 0; (span[1] = cost_span(a, 1, cell[1], y)).count > 0; ++y)
        for (int64_t x = 0; (span[2] = cost_span(a, 2, cell[2], x)).count > 0; ++x) {
          weight += list_samples(a, mask, span, b);
          if (b.count == 0) continue;
          for (int64_t r = 0; r < int64_t(rows.size()); ++r)
            rows[r] = (r / window(a, 1) * b.reach[1] + r % window(a, 1)) * b.pitch;
          patch.resize(std::max<size_t>(patch.size(), b.reach[0] * b.reach[1] * b.pitch + 2 * kLanes<A>));
          for (int64_t c = 0; c < a.c; ++c) {
            const T* fixed = static_cast<const T*>(a.fixed) + (n * a.c + c) * volume;
            const T* moving = static_cast<const T*>(a.moving) + (n * a.c + c) * volume;
            for (int64_t s = 0; s < b.count; ++s) b.value[s] = load(fixed[b.voxel[s]]);
            copy_patch(a, b, moving, moving_end, patch.data());
            if (mask)
              compare_all<true>(b, patch.data(), rows, window(a, 2), sums.data(), width);
            else
              compare_all<false>(b, patch.data(), rows, window(a, 2), sums.data(), width);
          }
        }
    const A scale = weight == 0 ? A(0) : A(1 / (weight * double(a.c)));
    A* out = static_cast<A*>(a.result) + index * n_offsets;
    for (const A* row = sums.data(); row < sums.data() + sums.size(); row += width, out += window(a, 2))
      each_x<A>(0, window(a, 2), [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(out + x, load_as<V>(row + x) * scale);
      });
  }
}

}  // namespace

void cost_fwd(Stored type, const CostArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "common/cost_volume_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

struct CostVolumeCall : CostInputs {
  template <class... Inputs>
  CostVolumeCall(const Device&, const char* op, const Inputs&... inputs) : CostInputs(op, inputs...) {}

  void forward() {
    auto kernel = FASTREG_PICK(cost_fwd);
    at::parallel_for(0, args.n * args.cells[0] * args.cells[1] * args.cells[2], 1,
                     [&](int64_t b, int64_t e) { kernel(stored(fixed), args, b, e); });
  }
};

FASTREG_LIBRARY_IMPL(fastreg, m) { m.impl("cost_volume", cost_volume<Device, CostVolumeCall>); }

}  // namespace
}  // namespace fastreg

#endif
