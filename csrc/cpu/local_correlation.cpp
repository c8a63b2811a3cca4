// local_correlation: products of two maps at all offsets of a window, and their gradients.
#include "cpu/correlation_rows.h"

namespace fastreg {

// Work units are planes (n, tile of y, z), except for the statistics: rows (n, z, y).
#define FASTREG_CORRELATION_KERNEL(name) \
  FASTREG_KERNEL(void, name, Stored, const CorrelationArgs&, int64_t, int64_t)
FASTREG_CORRELATION_KERNEL(local_correlation_statistics)
FASTREG_CORRELATION_KERNEL(local_correlation_fwd)
FASTREG_CORRELATION_KERNEL(local_correlation_bwd_fixed)
FASTREG_CORRELATION_KERNEL(local_correlation_bwd_moving)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <numeric>

namespace fastreg::FASTREG_ISA {
namespace {

constexpr int kGroup = 5;  // offsets along x whose sums or values fit the registers

// Calls f.template operator()<K>(k) for offsets along x in groups of K from k on.
template <class F>
void each_group(int64_t n_offsets, F f) {
  int64_t k = 0;
  for (; n_offsets - k >= kGroup; k += kGroup) f.template operator()<kGroup>(k);
  switch (n_offsets - k) {
    case 4:
      return f.template operator()<4>(k);
    case 3:
      return f.template operator()<3>(k);
    case 2:
      return f.template operator()<2>(k);
    case 1:
      return f.template operator()<1>(k);
  }
}

// out[k][x] = factor * sum over c of f[c][x] m[c][x + k]
template <int K, class A>
void correlate(const A* f, int64_t f_length, const A* m, int64_t m_length, int64_t channels, int64_t n,
               A factor, A* out) {
  using V = Vector<A>;
  for (int64_t x = 0; x < n; x += kLanes<A>) {
    V sum[K] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const V fx = load_as<V>(f + c * f_length + x);
      const A* mx = m + c * m_length + x;
      for (int k = 0; k < K; ++k) sum[k] += fx * load_as<V>(mx + k);
    }
    for (int k = 0; k < K; ++k) store_as<V>(out + k * n + x, sum[k] * factor);
  }
}

// sum[c][x] += sum over k of g[k][x] m[c][x + step k]
template <int K, int step, class A>
void gather(const A* g, int64_t g_length, const A* m, int64_t m_length, int64_t channels, int64_t n, A* sum) {
  using V = Vector<A>;
  for (int64_t x = 0; x < n; x += kLanes<A>) {
    V gx[K];
    for (int k = 0; k < K; ++k) gx[k] = load_as<V>(g + k * g_length + x);
    for (int64_t c = 0; c < channels; ++c) {
      const A* mx = m + c * m_length + x;
      V s = load_as<V>(sum + c * n + x);
      for (int k = 0; k < K; ++k) s += gx[k] * load_as<V>(mx + step * k);
      store_as<V>(sum + c * n + x, s);
    }
  }
}

struct Plane {
  int64_t n, z, y0, y1;
};

Plane plane_at(const CorrelationArgs& a, int64_t unit) {
  const int64_t tiles = (a.size[1] + a.tile - 1) / a.tile, column = unit / a.size[0];
  const int64_t y0 = column % tiles * a.tile;
  return {column / tiles, unit % a.size[0], y0, std::min(y0 + a.tile, a.size[1])};
}

// Calls body(dz, dy, k) for the offsets of radius along z and y; k is the channel of the first one along x.
template <class Body>
void each_offset(const CorrelationArgs& a, Body body) {
  int64_t k = 0;
  for (int64_t dz = -a.radius[0]; dz <= a.radius[0]; ++dz)
    for (int64_t dy = -a.radius[1]; dy <= a.radius[1]; ++dy, k += 2 * a.radius[2] + 1) body(dz, dy, k);
}

int64_t offsets(const CorrelationArgs& a) {
  return (2 * a.radius[0] + 1) * (2 * a.radius[1] + 1) * (2 * a.radius[2] + 1);
}

// In fp64, about the first of n values.
template <class A>
Moments moments(const A* x, int64_t n) {
  const double shift = x[0];
  double sums[8] = {}, squares[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) {
      const double d = double(x[i + j]) - shift;
      sums[j] += d;
      squares[j] += d * d;
    }
  for (; i < n; ++i) {
    const double d = double(x[i]) - shift;
    sums[0] += d;
    squares[0] += d * d;
  }
  const double sum = std::accumulate(sums, sums + 8, 0.0), mean = sum / double(n);
  const double deviations = std::accumulate(squares, squares + 8, 0.0) - sum * mean;
  return {double(n), shift + mean, deviations < 0 ? 0 : deviations};
}

// Four numbers a row: mean and squared deviations of fixed, of the (warped) moving.
template <class T>
void statistics(const CorrelationArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t pitch = a.c * a.size[2], rows = a.size[0] * a.size[1];
  std::vector<A> values(kRowsAtOnce * pitch);
  for (const bool moving : {false, true}) {
    const Map<T> map(a, moving);
    for (int64_t index = begin; index < end;) {
      const int64_t n = index / rows, z = index % rows / a.size[1], y = index % a.size[1];
      const int64_t count = std::min({kRowsAtOnce, end - index, a.size[1] - y});
      map.read(n, z, y, y + count, values.data(), pitch, a.size[2]);
      for (int64_t r = 0; r < count; ++r, ++index) {
        const Moments m = moments(values.data() + r * pitch, pitch);
        double* out = a.sums + 4 * index + 2 * moving;
        out[0] = m.mean, out[1] = m.squares;
      }
    }
  }
}

// Row by row: for each offset along z and y the sums of all offsets along x, over the channels, in registers.
// Bytes: reads 2C volumes, writes the offsets. Arithmetic: C products and sums an offset and voxel, 1.2 loads
// each. Radius 2, C = 16, 96^3, two AVX2 cores: 0.5 GB, some 40 ms; 3.5 GFLOP, some 30 ms.
template <class T>
void fwd(const CorrelationArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], area = a.size[1] * line, volume = a.size[0] * area;
  const int64_t n_offsets = offsets(a), along_x = 2 * a.radius[2] + 1;
  Ring<T> moving(a, true, 0, false);
  const Map<T> fixed(a, false);
  const int64_t vectors = moving.line.vectors;
  std::vector<A> f(a.c * vectors), sums(along_x * vectors);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Plane p = plane_at(a, unit);
    moving.move_to(p.n, p.z, p.y0, p.y1);
    for (int64_t y = p.y0; y < p.y1; ++y) {
      fixed.read_row(p.n, p.z, y, f.data(), vectors);
      T* out = static_cast<T*>(a.result) + p.n * n_offsets * volume + p.z * area + y * line;
      each_offset(a, [&](int64_t dz, int64_t dy, int64_t k0) {
        prefetch_rows<true>(out + k0 * volume, along_x, volume, line);
        int64_t length;
        const A* m = moving.row_or_padding(p.z + dz, y + dy, length);
        each_group(along_x, [&]<int K>(int64_t k) {
          correlate<K>(f.data(), vectors, m + k, length, a.c, vectors, A(a.factor),
                       sums.data() + k * vectors);
        });
        for (int64_t k = 0; k < along_x; ++k)
          store_row(sums.data() + k * vectors, line, out + (k0 + k) * volume);
      });
    }
  }
}

// d fixed(x, c) = factor * sum over o of g(x, o) M(x + o, c): a gather. Normalised maps: what is stored is
// the gradient to the normalised map, and three sums a row: of it, of it times the normalised fixed, and of
// the gradient to the normalised moving, which is that of a channel of ones times the sum of fixed. Bytes:
// reads the offsets and C volumes, writes C. Arithmetic: C products and sums an offset and voxel.
template <class T>
void bwd_fixed(const CorrelationArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const bool normalize = a.statistics != nullptr;
  const int64_t line = a.size[2], area = a.size[1] * line, volume = a.size[0] * area;
  const int64_t n_offsets = offsets(a), along_x = 2 * a.radius[2] + 1, channels = a.c + normalize;
  Ring<T> moving(a, true, 0, normalize);
  const Map<T> fixed(a, false);
  const int64_t vectors = moving.line.vectors;
  std::vector<A> g(kGroup * vectors), sums(channels * vectors), f(a.c * vectors);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Plane p = plane_at(a, unit);
    moving.move_to(p.n, p.z, p.y0, p.y1);
    for (int64_t y = p.y0; y < p.y1; ++y) {
      const int64_t at = p.z * area + y * line;
      const T* grad = static_cast<const T*>(a.grad) + p.n * n_offsets * volume + at;
      std::fill(sums.begin(), sums.end(), A(0));
      each_offset(a, [&](int64_t dz, int64_t dy, int64_t k0) {
        if (k0 + along_x < n_offsets)
          prefetch_rows<false>(grad + (k0 + along_x) * volume, along_x, volume, line);
        int64_t length;
        const A* m = moving.row_or_padding(p.z + dz, y + dy, length);
        each_group(along_x, [&]<int K>(int64_t k) {
          for (int j = 0; j < K; ++j) load_row(grad + (k0 + k + j) * volume, line, g.data() + j * vectors);
          gather<K, 1>(g.data(), vectors, m + k, length, channels, vectors, sums.data());
        });
      });
      for (A& s : sums) s *= A(a.factor);
      for (int64_t c = 0; c < a.c; ++c) {
        const int64_t to = (p.n * a.c + c) * volume + at;
        if (normalize && a.grad_normalized)
          store_row(sums.data() + c * vectors, line, static_cast<A*>(a.grad_normalized) + to);
        else if (!normalize)
          store_row(sums.data() + c * vectors, line, static_cast<T*>(a.grad_fixed) + to);
      }
      if (!normalize) continue;
      fixed.read_row(p.n, p.z, y, f.data(), vectors);
      double* out = a.sums + 3 * ((p.n * a.size[0] + p.z) * a.size[1] + y);
      std::fill_n(out, 3, 0.0);
      for (int64_t c = 0; c < a.c; ++c)
        for (int64_t x = 0; x < line; ++x) {
          const double s = sums[c * vectors + x], v = f[c * vectors + x];
          out[0] += s;
          out[1] += s * v;
          out[2] += v * double(sums[a.c * vectors + x]);
        }
    }
  }
}

// dx of a row from the gradient to the normalised x^ and from x^ about its own mean. `out` may be `gradient`.
template <class Out, class A>
void store_through(const ThroughStatistics& t, const A* gradient, const A* value, int64_t n, Out* out) {
  each_x<A>(0, n, [&](auto v, int64_t x) {
    using V = decltype(v);
    store_as<V>(out + x, load_as<V>(gradient + x) * A(t.gradient) + A(t.constant) +
                             load_as<V>(value + x) * value_of<A>(t));
  });
}

// d M(q, c) = factor * sum over o of g(q - o, o) fixed(q - o, c): a gather too. With padding "border" a voxel
// at a face also collects what the voxels beyond it would, each from the same rows. Normalised maps: both
// gradients go through the statistics here, that of fixed from grad_normalized.
// Bytes: reads the offsets and C volumes, writes C. Arithmetic: C products and sums an offset and voxel.
template <class T>
void bwd_moving(const CorrelationArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.size[2], area = a.size[1] * line, volume = a.size[0] * area;
  const int64_t n_offsets = offsets(a), along_x = 2 * a.radius[2] + 1;
  const int64_t extend = a.border ? a.radius[2] : 0;
  Ring<T> fixed(a, false, extend, false);
  const Map<T> moving(a, true, true), own_fixed(a, false, true);
  const int64_t vectors = fixed.line.vectors, length = fixed.line.length, origin = fixed.line.origin;
  std::vector<A> g(kGroup * length), sums(a.c * vectors);
  const int64_t pitch = a.c * line;
  std::vector<A> values(kRowsAtOnce * pitch), fixed_values(pitch);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Plane p = plane_at(a, unit);
    fixed.move_to(p.n, p.z, p.y0, p.y1);
    const T* grad = static_cast<const T*>(a.grad) + p.n * n_offsets * volume;
    // What voxels (z, y), perhaps beyond the image, receive.
    const auto collect = [&](int64_t z, int64_t y) {
      each_offset(a, [&](int64_t dz, int64_t dy, int64_t k0) {
        const int64_t pz = z - dz, py = y - dy;
        if (pz < 0 || pz >= a.size[0] || py < 0 || py >= a.size[1]) return;
        if (k0 + along_x < n_offsets && py > 0)
          prefetch_rows<false>(grad + (k0 + along_x) * volume + pz * area + (py - 1) * line, along_x, volume,
                               line);
        const int64_t last = 2 * a.radius[2];
        const A* f = fixed.row(pz, py) + last;
        each_group(along_x, [&]<int K>(int64_t k) {
          const T* rows = grad + (k0 + k) * volume + pz * area + py * line;
          for (int j = 0; j < K; ++j) load_row(rows + j * volume, line, g.data() + j * length + origin);
          gather<K, -1>(g.data() + last - k, length - 1, f - k, length, a.c, vectors, sums.data());
        });
      });
    };
    for (int64_t y = p.y0; y < p.y1; ++y) {
      const int64_t at = p.z * area + y * line, ahead = (y - p.y0) % kRowsAtOnce;
      if (a.grad_moved) {
        std::fill(sums.begin(), sums.end(), A(0));
        const auto beyond = [&](int64_t i, int axis, bool upper) {
          return a.border && i == (upper ? a.size[axis] - 1 : 0) ? a.radius[axis] : 0;
        };
        for (int64_t z = p.z - beyond(p.z, 0, false); z <= p.z + beyond(p.z, 0, true); ++z)
          for (int64_t q = y - beyond(y, 1, false); q <= y + beyond(y, 1, true); ++q) collect(z, q);
        if (a.statistics && ahead == 0)
          moving.read(p.n, p.z, y, std::min(y + kRowsAtOnce, p.y1), values.data(), pitch, line);
      }
      const bool through_fixed = a.statistics && a.grad_fixed;
      if (through_fixed) own_fixed.read_row(p.n, p.z, y, fixed_values.data(), line);
      for (int64_t c = 0; c < a.c; ++c) {
        const int64_t to = (p.n * a.c + c) * volume + at;
        if (a.grad_moved) {
          A* sum = sums.data() + c * vectors;
          for (int64_t x = 0; x < extend; ++x) {
            sum[extend] += sum[x];
            sum[extend + line - 1] += sum[extend + line + x];
          }
          sum += extend;
          for (int64_t x = 0; x < line; ++x) sum[x] *= A(a.factor);
          if (a.statistics)
            store_through(a.through[2 * p.n + 1], sum, values.data() + ahead * pitch + c * line, line, sum);
          if (a.moving.displacement)
            store_row(sum, line, static_cast<A*>(a.grad_moved) + to);
          else
            store_row(sum, line, static_cast<T*>(a.grad_moved) + to);
        }
        if (through_fixed)
          store_through(a.through[2 * p.n], static_cast<const A*>(a.grad_normalized) + to,
                        fixed_values.data() + c * line, line, static_cast<T*>(a.grad_fixed) + to);
      }
    }
  }
}

}  // namespace

void local_correlation_statistics(Stored type, const CorrelationArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { statistics<T>(a, b, e); });
}
void local_correlation_fwd(Stored type, const CorrelationArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}
void local_correlation_bwd_fixed(Stored type, const CorrelationArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd_fixed<T>(a, b, e); });
}
void local_correlation_bwd_moving(Stored type, const CorrelationArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd_moving<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "common/local_correlation_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

constexpr int64_t kRingBytes = 4 << 20;

struct LocalCorrelationCall : CorrelationInputs {
  CorrelationArgs args{};
  int64_t units = 0, rows;

  template <class... Inputs>
  explicit LocalCorrelationCall(const char* op, const Inputs&... inputs)
      : CorrelationInputs(op, inputs...), rows(n * size[0] * size[1]) {
    FASTREG_CHECK(size[1] * size[2] < (int64_t(1) << 32), op, "a plane must be smaller than 2^32 voxels");
    args.nd = nd, args.factor = factor, args.border = border;
    args.n = args.moving.n = n, args.c = args.moving.c = c;
    std::copy_n(size, 3, args.size), std::copy_n(reach, 3, args.radius);
    std::copy_n(size, 3, args.moving.in), std::copy_n(size, 3, args.moving.out);
    args.moving.padding = Padding::zeros;
    args.fixed = fixed.const_data_ptr(), args.moving.image = moving.const_data_ptr();
    args.moving.displacement = data_or_null(displacement);
    if (empty()) return;
    // A ring of planes that the cache holds, in enough pieces for the threads.
    const int64_t planes = std::min(2 * args.radius[0] + 1, args.size[0]);
    const int64_t bytes = (args.c + 1) * (args.size[2] + 4 * args.radius[2]) * 8;
    const int64_t pieces =
        std::max<int64_t>(1, 4 * at::get_num_threads() / std::max<int64_t>(args.n * args.size[0], 1));
    args.tile = std::max<int64_t>(kRingBytes / (planes * bytes) - 2 * args.radius[1], 8 * args.radius[1] + 1);
    args.tile =
        std::clamp<int64_t>(std::min(args.tile, (args.size[1] + pieces - 1) / pieces), 1, args.size[1]);
    units = args.n * args.size[0] * ((args.size[1] + args.tile - 1) / args.tile);
  }

  template <class Kernel>
  void run(Kernel kernel, int64_t n_units) const {
    at::parallel_for(0, n_units, 1, [&](int64_t b, int64_t e) { kernel(type, args, b, e); });
  }

  Tensor new_map(at::ScalarType dtype) const {
    return empty_large(fixed.sizes(), fixed.options().dtype(dtype));
  }
};

// (N, 4): mean and deviation of fixed, of moving.
Tensor statistics_of(LocalCorrelationCall& call) {
  CorrelationArgs& a = call.args;
  Tensor result = at::zeros({a.n, 4}, call.fixed.options().dtype(at::kDouble));
  if (call.empty()) return result;
  std::vector<double> sums(4 * call.rows);
  a.sums = sums.data();
  call.run(FASTREG_PICK(local_correlation_statistics), call.rows);
  const int64_t rows = call.rows / a.n;
  const double each = double(a.c * a.size[2]);
  for (int64_t n = 0; n < a.n; ++n)
    for (int map = 0; map < 2; ++map) {
      Moments m{};
      for (int64_t r = n * rows; r < (n + 1) * rows; ++r)
        m = merged(m, {each, sums[4 * r + 2 * map], sums[4 * r + 2 * map + 1]});
      double* out = result.mutable_data_ptr<double>() + 4 * n + 2 * map;
      out[0] = m.mean, out[1] = deviation(m);
    }
  return result;
}

std::tuple<Tensor, Tensor> local_correlation_cpu(const Tensor& fixed, const Tensor& moving,
                                                 at::IntArrayRef radius, const OptionalTensor& displacement,
                                                 bool normalize, c10::string_view scale,
                                                 c10::string_view padding) {
  LocalCorrelationCall call("local_correlation", fixed, moving, radius, displacement, scale, padding);
  Tensor statistics = normalize ? statistics_of(call) : at::zeros({0}, fixed.options().dtype(at::kDouble));
  if (normalize) call.args.statistics = statistics.const_data_ptr<double>();
  if (call.empty()) return {at::zeros(call.output_size(), fixed.options()), statistics};
  Tensor out = empty_large(call.output_size(), call.fixed.options());
  call.args.result = out.mutable_data_ptr();
  call.run(FASTREG_PICK(local_correlation_fwd), call.units);
  return {out.to(fixed.scalar_type()), statistics};
}

std::tuple<Tensor, Tensor> local_correlation_bwd_cpu(const Tensor& grad, const Tensor& fixed,
                                                     const Tensor& moving, const Tensor& statistics,
                                                     at::IntArrayRef radius,
                                                     const OptionalTensor& displacement, bool normalize,
                                                     c10::string_view scale, c10::string_view padding,
                                                     bool need_fixed, bool need_moved) {
  const char* op = "local_correlation_bwd";
  LocalCorrelationCall call(op, fixed, moving, radius, displacement, scale, padding);
  CorrelationArgs& a = call.args;
  const at::ScalarType dtype = call.fixed.scalar_type(), arithmetic = arithmetic_of(call.fixed);
  const at::ScalarType moved_dtype = displacement ? arithmetic : dtype;
  Tensor grad_fixed = need_fixed ? call.new_map(dtype) : at::empty({0}, fixed.options().dtype(dtype));
  Tensor grad_moved =
      need_moved ? call.new_map(moved_dtype) : at::empty({0}, fixed.options().dtype(moved_dtype));
  if (call.empty() || !(need_fixed || need_moved))
    return {grad_fixed.zero_().to(fixed.scalar_type()), grad_moved.zero_()};
  const Tensor g = call.upstream(op, grad);
  a.grad = g.const_data_ptr();
  a.grad_fixed = need_fixed ? grad_fixed.mutable_data_ptr() : nullptr;
  a.grad_moved = need_moved ? grad_moved.mutable_data_ptr() : nullptr;

  Tensor normalized;
  std::vector<double> sums;
  std::vector<ThroughStatistics> through;
  if (normalize) {
    a.statistics = call.keep_statistics(op, statistics);
    if (need_fixed) normalized = dtype == arithmetic ? grad_fixed : call.new_map(arithmetic);
    a.grad_normalized = need_fixed ? normalized.mutable_data_ptr() : nullptr;
    sums.resize(3 * call.rows);
    a.sums = sums.data();
  }
  if (need_fixed || normalize) call.run(FASTREG_PICK(local_correlation_bwd_fixed), call.units);
  if (normalize) {
    const int64_t rows = call.rows / a.n;
    const double count = double(a.c * a.size[0] * a.size[1] * a.size[2]);
    for (int64_t n = 0; n < a.n; ++n) {
      double total[3] = {};
      for (int64_t r = n * rows; r < (n + 1) * rows; ++r)
        for (int i = 0; i < 3; ++i) total[i] += sums[3 * r + i];
      // Both maps meet in the same products: their sums of x^ dL/dx^ are equal.
      for (int map = 0; map < 2; ++map)
        through.push_back(
            through_statistics(a.statistics + 4 * n, total[0] + total[2], 2 * total[1], count, map));
    }
    a.through = through.data();
  }
  if (need_moved || normalize) call.run(FASTREG_PICK(local_correlation_bwd_moving), call.units);
  return {grad_fixed.to(fixed.scalar_type()), grad_moved};
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("local_correlation", local_correlation_cpu);
  m.impl("local_correlation_bwd", local_correlation_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
