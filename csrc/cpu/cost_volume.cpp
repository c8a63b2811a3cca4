// cost_volume: mean squared differences of cells of fixed and of moving, shifted by all offsets of a cube,
// and their gradients.
#include "common/cost_volume.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// Layers of cells (z) that are `apart` from one another, or a multiple of it, read no voxel in common.
struct CostGradArgs : CostArgs {
  const void* grad;   // as result
  void* grad_fixed;   // as fixed, zeros; or null
  void* grad_moving;  // as fixed, arithmetic type, zeros; or null
  int64_t apart, groups;
  int64_t first, layers;  // of this pass: first, first + apart, ...
};

// Work units are cells (n, z, y, x); (n, group of channels, layer of the pass).
FASTREG_KERNEL(void, cost_fwd, Stored, const CostArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, cost_bwd, Stored, const CostGradArgs&, int64_t, int64_t)

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

// Calls body(V(), x) for the pieces of [0, n): the widest vectors take most, a narrower one the rest, which
// may reach beyond n.
template <class A, class Body>
FASTREG_HD void each_piece(int64_t n, Body body) {
  int64_t x = 0;
  for (; x + kLanes<A> <= n; x += kLanes<A>) body(Vector<A>(), x);
  if (x == n) return;
  const int64_t bytes = (n - x) * int64_t(sizeof(A));
  if (bytes > 32)
    body(Vector<A>(), x);
  else if (bytes > 16)
    body(Vector<A, std::min(32, kVectorBytes)>(), x);
  else
    body(Vector<A, 16>(), x);
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
FASTREG_HD void copy_patch(const CostArgs& a, const Block<A>& b, const T* moving, const T* end, A* patch) {
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

// The samples of a block with weight, and the sum of their weights. In the patch a row of offsets takes `row`
// values.
template <class A>
FASTREG_HD double list_samples(const CostArgs& a, const A* mask, const CostSpan (&span)[3], int64_t row,
                               Block<A>& b) {
  double total = 0;
  b.count = 0;
  for (int k = 0; k < 3; ++k) {
    b.begin[k] = span[k].begin - a.radius[k];
    b.reach[k] = (span[k].count - 1) * a.stride[k] + window(a, k);
  }
  b.pitch = b.reach[2] - window(a, 2) + row;
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

// Where in the patch the rows of offsets begin.
template <class A>
void list_rows(const CostArgs& a, const Block<A>& b, std::vector<int64_t>& rows) {
  for (int64_t r = 0; r < int64_t(rows.size()); ++r)
    rows[r] = (r / window(a, 1) * b.reach[1] + r % window(a, 1)) * b.pitch;
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
          weight += list_samples(a, mask, span, window(a, 2), b);
          if (b.count == 0) continue;
          list_rows(a, b, rows);
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
    // Not times the inverse, which is infinite where the weights are subnormal.
    const A total = weight == 0 ? A(1) : A(weight * double(a.c));
    A* out = static_cast<A*>(a.result) + index * n_offsets;
    for (const A* row = sums.data(); row < sums.data() + sums.size(); row += width, out += window(a, 2))
      each_x<A>(0, window(a, 2), [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(out + x, load_as<V>(row + x) / total);
      });
  }
}

// Of a piece of V of each row of offsets, the first `valid` lanes: t = grad (fixed - moving). Adds to
// fixed_sums the sum of t over the offsets, subtracts w t from moved, a patch, where moving was read. Lanes
// beyond are cleared, of t and of w: they read what another offset does, which may be NaN. A sample goes
// through all rows before the next, which reads what this one has written: by then it lies in the cache.
template <class V, bool kMoving, class A>
void gradients(const Block<A>& b, const A* patch, const A* grad, const std::vector<int64_t>& rows,
               int64_t width, int64_t valid, double* fixed_sums, A* moved) {
  using Bits = decltype(V() == V());
  constexpr int kChains = 4;  // of sums: one alone would wait for itself
  Bits keep;
  for (int64_t i = 0; i < int64_t(sizeof(V) / sizeof(A)); ++i) keep[i] = i < valid ? -1 : 0;
  const int64_t n = rows.size();
  for (int64_t s = 0; s < b.count; ++s) {
    const V value = fill<V>(b.value[s]), weight = V(Bits(fill<V>(b.weight[s])) & keep);
    V sums[kChains] = {};
    const auto row = [&](int64_t r, V& sum) {
      const int64_t at = b.at[s] + rows[r];
      V g, m;
      std::memcpy(&g, grad + r * width, sizeof(V));
      std::memcpy(&m, patch + at, sizeof(V));
      const V t = V(Bits(g * (value - m)) & keep);
      sum += t;
      if constexpr (kMoving) {
        V before;
        std::memcpy(&before, moved + at, sizeof(V));
        before -= weight * t;
        std::memcpy(moved + at, &before, sizeof(V));
      }
    };
    int64_t r = 0;
    for (; r + kChains <= n; r += kChains)
      for (int j = 0; j < kChains; ++j) row(r + j, sums[j]);
    for (; r < n; ++r) row(r, sums[0]);
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (size_t i = 0; i < sizeof(V) / sizeof(A); ++i) fixed_sums[s] += double(sum[i]);
  }
}

// The reverse of copy_patch: what was read beyond the border goes to the nearest voxel.
template <class A>
void add_patch(const CostArgs& a, const Block<A>& b, const A* patch, A* image) {
  const int64_t line = a.size[2];
  const int64_t left = std::max<int64_t>(-b.begin[2], 0), right = std::min(b.reach[2], line - b.begin[2]);
  for (int64_t z = 0; z < b.reach[0]; ++z)
    for (int64_t y = 0; y < b.reach[1]; ++y, patch += b.pitch) {
      A* row = image + (std::clamp<int64_t>(b.begin[0] + z, 0, a.size[0] - 1) * a.size[1] +
                        std::clamp<int64_t>(b.begin[1] + y, 0, a.size[1] - 1)) *
                           line;
      A* to = row + b.begin[2];
      each_x<A>(left, right, [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(to + x, load_as<V>(to + x) + load_as<V>(patch + x));
      });
      double before = 0, behind = 0;
      for (int64_t x = 0; x < left; ++x) before += patch[x];
      for (int64_t x = right; x < b.reach[2]; ++x) behind += patch[x];
      row[0] += A(before), row[line - 1] += A(behind);
    }
}

template <class A>
double cell_weight(const CostArgs& a, const A* mask, const int64_t (&cell)[3]) {
  double total = 0;
  int64_t first[3], last[3];
  for (int k = 0; k < 3; ++k) {
    first[k] = cell[k] * a.cell[k];
    last[k] = std::min(first[k] + a.cell[k], a.size[k]);
  }
  for (int64_t z = first[0]; z < last[0]; z += a.stride[0])
    for (int64_t y = first[1]; y < last[1]; y += a.stride[1])
      for (int64_t x = first[2]; x < last[2]; x += a.stride[2]) {
        const A weight = mask ? mask[(z * a.size[1] + y) * a.size[2] + x] : A(1);
        if (!(weight <= 0)) total += weight;
      }
  return total;
}

// A voxel of fixed belongs to one cell, one of moving to all that reach it: threads share out layers of cells
// that reach no voxel in common, in `apart` passes, and groups of channels, which are independent. So a sum
// has one order whatever the thread count, and no two threads write a voxel. Both gradients of a cell come
// from the differences that the forward squares, at once: as there a patch of moving, and another of its
// gradient, which is then added to the image.
//
// Arithmetic a cell: C samples offsets times a difference, two products and two sums, in vectors as in the
// forward; four loads and a store, in the nearest cache, two cycles a vector. Bytes: the patch read, cleared
// and added, (cell + 2 radius)^nd values a channel; the offsets once a group of channels. Cells of 4, radius
// 3, C = 12, 75 x 75 x 48, an AVX-512 core: 160 M vectors of 7 offsets, .1 s at the least; it takes .19.
template <class T>
void bwd(const CostGradArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t volume = a.size[0] * a.size[1] * a.size[2], area = a.cells[1] * a.cells[2];
  const int64_t n_offsets = offsets(a), along_x = window(a, 2);
  const int64_t width = (along_x + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  std::vector<int64_t> rows(window(a, 0) * window(a, 1));
  std::vector<A> grad(rows.size() * width), patch, moved;
  std::vector<double> fixed_sums(Block<A>::kSamples);
  const auto block = std::make_unique_for_overwrite<Block<A>>();
  Block<A>& b = *block;
  const T* moving_end = static_cast<const T*>(a.moving) + a.n * a.c * volume;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t layer = a.first + unit % a.layers * a.apart, group = unit / a.layers % a.groups;
    const int64_t n = unit / (a.layers * a.groups);
    const A* mask = a.mask ? static_cast<const A*>(a.mask) + n * volume : nullptr;
    for (int64_t i = 0; i < area; ++i) {
      const int64_t cell[3] = {layer, i / a.cells[2], i % a.cells[2]};
      const double weight = cell_weight(a, mask, cell);
      if (weight == 0) continue;
      const double scale = 2 / (weight * double(a.c));
      const A* from = static_cast<const A*>(a.grad) + ((n * a.cells[0] + layer) * area + i) * n_offsets;
      for (size_t r = 0; r < rows.size(); ++r, from += along_x)
        for (int64_t x = 0; x < along_x; ++x) grad[r * width + x] = from[x];
      CostSpan span[3];
      for (int64_t z = 0; (span[0] = cost_span(a, 0, cell[0], z)).count > 0; ++z)
        for (int64_t y = 0; (span[1] = cost_span(a, 1, cell[1], y)).count > 0; ++y)
          for (int64_t x = 0; (span[2] = cost_span(a, 2, cell[2], x)).count > 0; ++x) {
            // Rows of whole vectors: a load that overlaps the store before it would wait for it.
            list_samples(a, mask, span, width, b);
            if (b.count == 0) continue;
            for (int64_t s = 0; s < b.count; ++s) b.weight[s] = A(b.weight[s] * scale);
            list_rows(a, b, rows);
            const size_t reached = b.reach[0] * b.reach[1] * b.pitch + 2 * kLanes<A>;
            patch.resize(std::max(patch.size(), reached)), moved.resize(patch.size());
            for (int64_t c = group * a.c / a.groups; c < (group + 1) * a.c / a.groups; ++c) {
              const int64_t image = (n * a.c + c) * volume;
              const T* fixed = static_cast<const T*>(a.fixed) + image;
              for (int64_t s = 0; s < b.count; ++s) b.value[s] = load(fixed[b.voxel[s]]);
              copy_patch(a, b, static_cast<const T*>(a.moving) + image, moving_end, patch.data());
              std::fill_n(fixed_sums.data(), b.count, 0.0);
              if (a.grad_moving) std::fill_n(moved.data(), reached, A(0));
              each_piece<A>(along_x, [&](auto v, int64_t x) {
                using V = decltype(v);
                auto* piece = a.grad_moving ? gradients<V, true, A> : gradients<V, false, A>;
                piece(b, patch.data() + x, grad.data() + x, rows, width, along_x - x, fixed_sums.data(),
                      moved.data() + x);
              });
              if (a.grad_fixed)
                for (int64_t s = 0; s < b.count; ++s)
                  store(static_cast<T*>(a.grad_fixed)[image + b.voxel[s]], A(b.weight[s] * fixed_sums[s]));
              if (a.grad_moving) add_patch(a, b, moved.data(), static_cast<A*>(a.grad_moving) + image);
            }
          }
    }
  }
}

}  // namespace

void cost_fwd(Stored type, const CostArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}
void cost_bwd(Stored type, const CostGradArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd<T>(a, b, e); });
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

std::tuple<at::Tensor, at::Tensor> cost_volume_bwd(const at::Tensor& grad_, const at::Tensor& fixed,
                                                   const at::Tensor& moving, const OptionalTensor& mask,
                                                   at::IntArrayRef cell, at::IntArrayRef radius,
                                                   at::IntArrayRef stride, bool need_fixed,
                                                   bool need_moving) {
  const char* op = "cost_volume_bwd";
  const CostInputs in(op, fixed, moving, mask, cell, radius, stride);
  const at::Tensor grad = grad_.contiguous();
  FASTREG_CHECK(grad.sizes() == in.result_size() && grad.scalar_type() == arithmetic_of(fixed), op,
                "grad must have the shape and dtype of the costs");
  const auto zeros = [&](bool needed, at::TensorOptions options) {
    return needed ? at::zeros(fixed.sizes(), options) : at::empty({0}, options);
  };
  at::Tensor grad_fixed = zeros(need_fixed, in.fixed.options());
  at::Tensor grad_moving = zeros(need_moving, in.arithmetic());
  if (fixed.numel() > 0 && (need_fixed || need_moving)) {
    CostGradArgs a{in.args, grad.const_data_ptr()};
    a.grad_fixed = need_fixed ? grad_fixed.mutable_data_ptr() : nullptr;
    a.grad_moving = need_moving ? grad_moving.mutable_data_ptr() : nullptr;
    if (fixed.dim() == 4)  // layers are rows: (y, 1, x) lies in memory as (1, y, x) does
      for (int64_t* axes : {a.size, a.cell, a.radius, a.stride, a.cells}) std::swap(axes[0], axes[1]);
    a.apart = std::min(need_moving ? 1 + (2 * a.radius[0] + a.cell[0] - 1) / a.cell[0] : 1, a.cells[0]);
    const int64_t units = a.n * ((a.cells[0] + a.apart - 1) / a.apart);
    a.groups = std::clamp<int64_t>((4 * at::get_num_threads() + units - 1) / units, 1, a.c);
    auto kernel = FASTREG_PICK(cost_bwd);
    for (a.first = 0; a.first < a.apart; ++a.first) {
      a.layers = (a.cells[0] - a.first + a.apart - 1) / a.apart;
      at::parallel_for(0, a.n * a.groups * a.layers, 1,
                       [&](int64_t b, int64_t e) { kernel(stored(in.fixed), a, b, e); });
    }
  }
  return {grad_fixed, grad_moving.to(fixed.scalar_type())};
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("cost_volume", cost_volume<Device, CostVolumeCall>);
  m.impl("cost_volume_bwd", cost_volume_bwd);
}

}  // namespace
}  // namespace fastreg

#endif
