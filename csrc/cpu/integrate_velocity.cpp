// Scaling and squaring. Between its steps a field is packed: the components of a voxel lie side by side (4 in
// 3D, the last one 0; 2 in 2D), so that the two corners of a cell along x are one vector of 8 (4) numbers. A
// voxel then reads its cell, or adds to it, with 2^(nd-1) vectors, whatever the number of components. Samples
// are integrated one after the other: the buffers hold one.
//
// A step forward reads a field and writes one: 8 numbers a voxel in 3D, 130 MB at 160^3 in fp32 (3.5 ms at 38
// GB/s). A step back reads two, writes one and reads u for its range: 260 MB, 7 ms. Both are bound by latency
// and arithmetic: about 60 and 150 vector instructions a voxel, 15 and 37 ms on one core at 4 a cycle and 4.1
// GHz; measured 18 to 28 ms and 45 to 78 ms, the rougher the field the longer (34 to 48 and 60 to 122 without
// asking for the next row and with positions stored in pieces just before they are used).
//
// Seven steps at 160^3 write 750 MB of new memory, which the system clears: 120 ms of 850 in large pages (250
// of 970 on a busy machine), 300 in small ones; where a host takes free pages back, as much in large ones.
// Only memory kept from call to call would save it. A step back that finds the range of its rows itself,
// instead of a pass before it, takes the same time.
#include "cpu/packed.h"
#include "cpu/warp_rows.h"

namespace fastreg {

struct IntegrateArgs {
  WarpArgs grid;     // sizes (in = out) and padding; the tensors are those below
  const void* u;     // packed
  const void* grad;  // packed, backward only
  void* result;      // packed; or planar, of the type stored
  double scale;      // of what is packed and unpacked
  bool planar;
};

// Work units are rows (z, y), of the backward slabs along the slowest axis.
#define FASTREG_INTEGRATE_KERNEL(name) \
  FASTREG_KERNEL(void, name, Stored, int nd, const IntegrateArgs&, int64_t, int64_t)
FASTREG_INTEGRATE_KERNEL(integrate_pack)
FASTREG_INTEGRATE_KERNEL(integrate_unpack)
FASTREG_INTEGRATE_KERNEL(integrate_step)
FASTREG_KERNEL(void, integrate_row_range, Stored, int nd, const IntegrateArgs&, int32_t* range, int64_t,
               int64_t)
FASTREG_KERNEL(void, integrate_step_bwd, Stored, int nd, const IntegrateArgs&, const int32_t* range,
               int64_t n_slabs, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

namespace fastreg::FASTREG_ISA {
namespace {

// A displacement is where its own voxels lie: u is sampled at x + u(x).
template <class A, int ND>
void locate_packed(const IntegrateArgs& a, const Row& row, int64_t x0, int count, Positions<A, ND>& p) {
  const A* __restrict u =
      static_cast<const A*>(a.u) + ((row.z * a.grid.out[1] + row.y) * a.grid.out[2] + x0) * kWidth<A, ND>;
  ask(u + a.grid.out[2] * kWidth<A, ND>, count * kWidth<A, ND>);
  // All axes before the first is used: what has just been stored in pieces cannot be loaded as one vector
  // yet.
  alignas(64) A lines[ND][kBlock];
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < ND; ++k) lines[k][i] = u[i * kWidth<A, ND> + k];
  locate_at(a.grid, row, x0, count, 0, a.grid.in[3 - ND], p, [&](int k, auto use) { use(lines[k]); });
}

template <class T, int ND>
void pack(const IntegrateArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t line = a.grid.out[2], n_voxels = a.grid.out[0] * a.grid.out[1] * line;
  pack_voxels<A, ND>(static_cast<const T*>(a.u), n_voxels, A(a.scale), begin * line, end * line,
                     static_cast<A*>(a.result));
}

template <class T, int ND>
void unpack(const IntegrateArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  constexpr int w = kWidth<A, ND>;
  const int64_t line = a.grid.out[2], n_voxels = a.grid.out[0] * a.grid.out[1] * line;
  const A scale = A(a.scale);
  const A* __restrict u = static_cast<const A*>(a.u);
  for (int64_t row = begin; row < end; ++row)
    for (int k = 0; k < ND; ++k) {
      T* __restrict out = static_cast<T*>(a.result) + k * n_voxels + row * line;
      for (int64_t x = 0; x < line; ++x) store(out[x], scale * u[(row * line + x) * w + k]);
    }
}

// u(x) + u(x + u(x)).
template <class T, int ND>
void step(const IntegrateArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  constexpr int w = kWidth<A, ND>;
  Positions<A, ND> p;
  const WarpArgs& g = a.grid;
  const A* u = static_cast<const A*>(a.u);
  const int64_t line = g.in[2] * w, plane = g.in[1] * line, n_voxels = g.out[0] * g.out[1] * g.out[2];
  bool cells = true;
  for (int k = 3 - ND; k < 3; ++k) cells = cells && g.in[k] > 1;
  for (int64_t index = begin; index < end; ++index)
    for (int64_t x0 = 0; x0 < g.out[2]; x0 += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, g.out[2] - x0));
      const int64_t at = index * g.out[2] + x0;
      locate_packed(a, row_at(a.grid, index), x0, count, p);
      alignas(64) A value[kBlock * w];
      int32_t all = cells ? -1 : 0;
      if (all) {
        ask_ahead<false, w>(g, p, count, u);
        for (int i = 0; i < count; ++i) {
          const Cell<A, ND> c(u + p.offset[i] * w, line, plane);
          Pair<A, ND> v = c.pair[0] + p.fraction[ND - 2][i] * (c.pair[1] - c.pair[0]);
          if constexpr (ND == 3) {
            const Pair<A, ND> far = c.pair[2] + p.fraction[1][i] * (c.pair[3] - c.pair[2]);
            v += p.fraction[0][i] * (far - v);
          }
          const auto low = near_x<A, ND>(v);
          put(value + i * w, low + p.fraction[ND - 1][i] * (far_x<A, ND>(v) - low));
          all &= p.inside[i];
        }
        for (int i = 0; i < count * w; ++i) all &= -int32_t(value[i] - value[i] == A(0));
      }
      // One by one where the cell is not whole or a corner, perhaps one of weight 0, was not finite.
      for (int i = 0; i < count && !all; ++i) {
        auto v = get<Voxel<A, ND>>(value + i * w);
        bool finite = cells && p.inside[i];
        for (int k = 0; k < ND; ++k) finite = finite && v[k] - v[k] == A(0);
        if (finite) continue;
        v = Voxel<A, ND>{};
        if (is_nan(p, i))
          for (int k = 0; k < ND; ++k) v[k] = A(NAN);
        else
          each_corner<ND>(g, p, i, 0, g.in[3 - ND], [&](int, A weight, int64_t offset) {
            v += weight * get<Voxel<A, ND>>(u + offset * w);
          });
        put(value + i * w, v);
      }
      const A* __restrict from = u + at * w;
      if (a.planar) {
        for (int k = 0; k < ND; ++k) {
          T* __restrict out = static_cast<T*>(a.result) + k * n_voxels + at;
          ask<true>(out + g.out[2], count);
          for (int i = 0; i < count; ++i) store(out[i], from[i * w + k] + value[i * w + k]);
        }
      } else {
        A* __restrict out = static_cast<A*>(a.result) + at * w;
        ask<true>(out + g.out[2] * w, count * w);
        for (int i = 0; i < count * w; ++i) out[i] = from[i] + value[i];
      }
    }
}

template <class A, int ND>
void row_range(const IntegrateArgs& a, int32_t* range, int64_t begin, int64_t end) {
  constexpr int w = kWidth<A, ND>;
  for (int64_t index = begin; index < end; ++index) {
    const Row row = row_at(a.grid, index);
    const A* __restrict u = static_cast<const A*>(a.u) + index * a.grid.out[2] * w;
    // As in warp: NaN voxels scatter nothing and leave the range alone.
    A low = kFarthest, high = -low;
    for (int64_t x = 0; x < a.grid.out[2]; ++x) {
      low = u[x * w] < low ? u[x * w] : low;
      high = u[x * w] > high ? u[x * w] : high;
    }
    plane_range(a.grid, ND, ND == 3 ? row.z : row.y, low, high, range + 2 * index);
  }
}

// What a block of voxels gets back at its own place: g + du_k, du_k = g . (u differentiated along k).
template <class A, int ND>
void gather(const IntegrateArgs& a, const Row& row, int64_t x0, int count, const Positions<A, ND>& p,
            const A* grad, A* term) {
  constexpr int w = kWidth<A, ND>;
  using V = Voxel<A, ND>;
  const WarpArgs& g = a.grid;
  const A* u = static_cast<const A*>(a.u);
  const int64_t line = g.in[2] * w, plane = g.in[1] * line;
  for (int i = 0; i < count; ++i) {
    const V own = get<V>(grad + i * w);
    V du = {};
    if (FASTREG_LIKELY(p.inside[i])) {
      const Cell<A, ND> c(u + p.offset[i] * w, line, plane);
      const A fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
      V terms[ND];
      Pair<A, ND> dy = c.pair[1] - c.pair[0], v = c.pair[0] + fy * dy;
      if constexpr (ND == 3) {
        const A fz = p.fraction[0][i];
        const Pair<A, ND> dy_far = c.pair[3] - c.pair[2], dz = c.pair[2] + fy * dy_far - v;
        v += fz * dz;
        dy += fz * (dy_far - dy);
        terms[0] = own * (near_x<A, ND>(dz) + fx * (far_x<A, ND>(dz) - near_x<A, ND>(dz)));
      }
      terms[ND - 2] = own * (near_x<A, ND>(dy) + fx * (far_x<A, ND>(dy) - near_x<A, ND>(dy)));
      terms[ND - 1] = own * (far_x<A, ND>(v) - near_x<A, ND>(v));
      du = sums<A, ND>(terms);
    } else if (!is_nan(p, i)) {
      each_edge<ND>(g, p, i, {row.z, row.y, x0 + i}, [&](int k, A weight, int64_t lower, int64_t upper) {
        const V low = lower < 0 ? V{} : get<V>(u + lower * w);
        const V difference = (upper < 0 ? V{} : get<V>(u + upper * w)) - low;
        for (int c = 0; c < ND; ++c) du[k] += own[c] * weight * difference[c];
      });
    }
    put(term + i * w, own + du);
  }
}

// Adds shares of grad to the cells of a block that lie in planes [lo, hi). Of voxels whose cells follow each
// other along x, as most do, each adds to what the one before has just written: those corners stay in
// registers until the run ends, with the roundings of going through memory.
template <class A, int ND>
void scatter(const IntegrateArgs& a, int count, const Positions<A, ND>& p, int64_t lo, int64_t hi,
             const A* grad) {
  constexpr int w = kWidth<A, ND>, n_pairs = 1 << (ND - 1);
  using V = Voxel<A, ND>;
  const WarpArgs& g = a.grid;
  A* out = static_cast<A*>(a.result);
  const int64_t line = g.in[2] * w, plane = g.in[1] * line;
  const int64_t corner_of[4] = {0, line, plane, plane + line};
  alignas(64) int32_t plain[kBlock];
  const uint32_t span = uint32_t(std::max<int64_t>(hi - lo - 1, 0));
  for (int i = 0; i < count; ++i) {
    A sum = A(0);
    for (int k = 0; k < ND; ++k) sum += grad[i * w + k];
    // A weight of 0 must not turn an infinite gradient into NaN: such voxels go corner by corner.
    plain[i] = p.inside[i] & -int32_t((uint32_t(p.whole[0][i] - int32_t(lo)) < span) & (sum - sum == A(0)));
  }
  V carry[n_pairs] = {};
  int64_t next = -1;  // the cell whose near corners `carry` holds
  const auto flush = [&] {
    if (next >= 0)
      for (int c = 0; c < n_pairs; ++c) put(out + next * w + corner_of[c], carry[c]);
    next = -1;
  };
  for (int i = 0; i < count; ++i) {
    const V own = get<V>(grad + i * w);
    if (FASTREG_LIKELY(plain[i])) {
      A* cell = out + p.offset[i] * w;
      if (p.offset[i] != next) {
        flush();
        for (int c = 0; c < n_pairs; ++c) carry[c] = get<V>(cell + corner_of[c]);
      }
      V share[n_pairs] = {own};
      if constexpr (ND == 3) {
        share[2] = own * p.fraction[0][i];
        share[0] = own - share[2];
        share[3] = share[2] * p.fraction[1][i];
        share[2] -= share[3];
      }
      share[1] = share[0] * p.fraction[ND - 2][i];
      share[0] -= share[1];
      for (int c = 0; c < n_pairs; ++c) {
        const V far = share[c] * p.fraction[ND - 1][i];
        put(cell + corner_of[c], carry[c] + (share[c] - far));
        carry[c] = get<V>(cell + corner_of[c] + w) + far;
      }
      next = p.offset[i] + 1;
    } else if (!is_nan(p, i)) {
      flush();
      // Rounded step by step as above: which path a voxel takes depends on the slabs.
      each_corner<ND>(g, p, i, lo, hi, [&](int corner, A, int64_t offset) {
        V share = own;
        for (int k = 0; k < ND; ++k) {
          const V up = share * p.fraction[k][i];
          share = corner >> (ND - 1 - k) & 1 ? up : share - up;
        }
        put(out + offset * w, get<V>(out + offset * w) + share);
      });
    }
  }
  flush();
}

// The gradient of a step: g + gather + scatter, in one pass. As in warp, a work unit owns a slab of planes
// and visits, in one fixed order, the rows whose range meets it: every voxel sums in the same order whatever
// the number of threads or slabs. A plane is cleared just before it is first added to, while it is in the
// cache.
template <class A, int ND>
void step_bwd(const IntegrateArgs& a, const int32_t* range, int64_t n_slabs, int64_t begin, int64_t end) {
  constexpr int w = kWidth<A, ND>;
  Positions<A, ND> p;
  const WarpArgs& g = a.grid;
  A* out = static_cast<A*>(a.result);
  const int64_t n_slow = g.in[3 - ND], slice = g.in[1] * g.in[2] * g.in[0] / n_slow * w;
  const int64_t rows = g.out[0] * g.out[1];
  for (int64_t slab = begin; slab < end; ++slab) {
    const int64_t lo = n_slow * slab / n_slabs, hi = n_slow * (slab + 1) / n_slabs;
    int64_t cleared = lo;
    const auto clear_to = [&](int64_t stop) {
      stop = std::min(stop, hi);
      if (stop > cleared) std::fill(out + cleared * slice, out + stop * slice, A(0));
      cleared = std::max(cleared, stop);
    };
    for (int64_t index = 0; index < rows; ++index) {
      const Row row = row_at(a.grid, index);
      const int64_t own = ND == 3 ? row.z : row.y;
      const bool owned = own >= lo && own < hi, touched = range[2 * index + 1] >= lo && range[2 * index] < hi;
      if (!owned && !touched) continue;
      clear_to(std::max<int64_t>(touched ? range[2 * index + 1] + 1 : 0, owned ? own + 1 : 0));
      for (int64_t x0 = 0; x0 < g.out[2]; x0 += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, g.out[2] - x0));
        const int64_t at = (index * g.out[2] + x0) * w;
        const A* grad = static_cast<const A*>(a.grad) + at;
        ask(grad + g.out[2] * w, count * w);
        locate_packed(a, row, x0, count, p);
        ask_ahead<false, w>(g, p, count, static_cast<const A*>(a.u));
        ask_ahead<true, w>(g, p, count, out);
        alignas(64) A term[kBlock * w];
        if (owned) gather<A, ND>(a, row, x0, count, p, grad, term);
        if (touched) scatter<A, ND>(a, count, p, lo, hi, grad);
        for (int i = 0; i < count * w && owned; ++i) out[at + i] += term[i];
      }
    }
    clear_to(hi);
  }
}

}  // namespace

void integrate_pack(Stored type, int nd, const IntegrateArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? pack<T, 3>(a, b, e) : pack<T, 2>(a, b, e); });
}
void integrate_unpack(Stored type, int nd, const IntegrateArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? unpack<T, 3>(a, b, e) : unpack<T, 2>(a, b, e); });
}
void integrate_step(Stored type, int nd, const IntegrateArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { nd == 3 ? step<T, 3>(a, b, e) : step<T, 2>(a, b, e); });
}
void integrate_row_range(Stored type, int nd, const IntegrateArgs& a, int32_t* range, int64_t b, int64_t e) {
  const auto run = [&]<class A>(A) {
    nd == 3 ? row_range<A, 3>(a, range, b, e) : row_range<A, 2>(a, range, b, e);
  };
  type == Stored::f64 ? run(double()) : run(float());
}
void integrate_step_bwd(Stored type, int nd, const IntegrateArgs& a, const int32_t* range, int64_t n_slabs,
                        int64_t b, int64_t e) {
  const auto run = [&]<class A>(A) {
    nd == 3 ? step_bwd<A, 3>(a, range, n_slabs, b, e) : step_bwd<A, 2>(a, range, n_slabs, b, e);
  };
  type == Stored::f64 ? run(double()) : run(float());
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "common/integrate_velocity_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

// One sample: its packed fields and the kernels between them.
class Integration : public IntegrateInputs {
 public:
  Integration(const char* op, const Tensor& v, int64_t steps, c10::string_view padding_)
      : IntegrateInputs(op, v, steps, padding_), rows_(size[0] * size[1]) {
    WarpArgs& g = args_.grid;
    std::copy_n(size, 3, g.in), std::copy_n(size, 3, g.out);
    g.n = 1;
    g.padding = padding;
  }

  Tensor take() {
    if (spare_.empty()) return empty_large(packed_sizes, packed_options);
    Tensor t = std::move(spare_.back());
    spare_.pop_back();
    return t;
  }
  void give_back(Tensor& t) {
    spare_.push_back(std::move(t));
    t = Tensor();
  }

  void pack(const Tensor& planar, double by, const Tensor& packed) {
    run(FASTREG_PICK(integrate_pack), planar, packed, by, false);
  }
  void unpack(const Tensor& packed, const Tensor& planar) {
    run(FASTREG_PICK(integrate_unpack), packed, planar, scale, false);
  }
  void scaled(const Tensor& v, const Tensor& packed) { pack(v, scale, packed); }
  void step(const Tensor& u, const Tensor& out, bool planar = false) {
    run(FASTREG_PICK(integrate_step), u, out, 1, planar);
  }

  void step_bwd(const Tensor& u, const Tensor& grad, const Tensor& out) {
    args_.u = u.const_data_ptr(), args_.grad = grad.const_data_ptr(), args_.result = out.mutable_data_ptr();
    std::vector<int32_t> range(2 * rows_);
    auto ranges = FASTREG_PICK(integrate_row_range);
    at::parallel_for(0, rows_, 1, [&](int64_t b, int64_t e) { ranges(type, nd, args_, range.data(), b, e); });
    const int64_t n_slabs = std::clamp<int64_t>(at::get_num_threads(), 1, args_.grid.in[3 - nd]);
    auto kernel = FASTREG_PICK(integrate_step_bwd);
    at::parallel_for(0, n_slabs, 1,
                     [&](int64_t b, int64_t e) { kernel(type, nd, args_, range.data(), n_slabs, b, e); });
  }

 private:
  template <class Kernel>
  void run(Kernel kernel, const Tensor& from, const Tensor& to, double by, bool planar) {
    args_.u = from.const_data_ptr(), args_.result = to.mutable_data_ptr();
    args_.scale = by, args_.planar = planar;
    at::parallel_for(0, rows_, 1, [&](int64_t b, int64_t e) { kernel(type, nd, args_, b, e); });
  }

  IntegrateArgs args_{};
  int64_t rows_;
  std::vector<Tensor> spare_;
};

std::tuple<Tensor, Tensor> integrate_velocity_cpu(const Tensor& velocity, int64_t steps,
                                                  c10::string_view padding, bool keep) {
  Tensor v = velocity.contiguous();
  Integration run("integrate_velocity", v, steps, padding);
  Tensor fields =
      empty_large(run.sizes_of_kept(keep ? std::max<int64_t>(steps - 1, 0) : 0), run.packed_options);
  if (steps == 0 || v.numel() == 0) return {v.clone(at::MemoryFormat::Contiguous), fields};
  Tensor out = empty_large(v.sizes(), v.options());
  for (int64_t n = 0; n < v.size(0); ++n) {
    Tensor u = run.take();
    run.scaled(v[n], u);
    for (int64_t s = 1; s < steps; ++s) {
      Tensor next = keep ? fields[n][s - 1] : run.take();
      run.step(u, next);
      if (!keep || s == 1) run.give_back(u);
      u = next;
    }
    run.step(u, out[n], true);
    if (!keep || steps == 1) run.give_back(u);
  }
  return {out, fields};
}

Tensor integrate_velocity_bwd_cpu(const Tensor& grad, const Tensor& velocity, const Tensor& fields,
                                  int64_t steps, c10::string_view padding) {
  Tensor v = velocity.contiguous(), g = grad.to(v.scalar_type()).contiguous();
  FASTREG_CHECK(g.sizes() == v.sizes(), "integrate_velocity_bwd", "grad must have the shape of v");
  if (steps == 0 || v.numel() == 0) return g.clone(at::MemoryFormat::Contiguous);
  Integration run("integrate_velocity_bwd", v, steps, padding);
  const bool kept = run.has_kept(fields, steps);
  const auto [every, last] = Checkpoints(steps, kept);
  Tensor out = empty_large(v.sizes(), v.options());
  for (int64_t n = 0; n < v.size(0); ++n) {
    std::vector<Tensor> u(steps);
    const auto start = [&] { run.scaled(v[n], u[0] = run.take()); };
    const auto advance = [&](int64_t s) { run.step(u[s - 1], u[s] = run.take()); };
    if (!kept && last > 0) {
      start();
      for (int64_t s = 1; s <= last; ++s) {
        advance(s);
        if (s == 1 || (s - 1) % every != 0) run.give_back(u[s - 1]);
      }
    }
    Tensor flow = run.take(), next = run.take();
    run.pack(g[n], 1, flow);
    for (int64_t first = last; first >= 0; first -= every) {
      const int64_t stop = std::min(first + every, steps);
      if (first == 0) start();
      for (int64_t s = first; s < stop && kept && s > 0; ++s) u[s] = fields[n][s - 1];
      for (int64_t s = first + 1; s < stop && !kept; ++s) advance(s);
      for (int64_t s = stop - 1; s >= first; --s) {
        run.step_bwd(u[s], flow, next);
        std::swap(flow, next);
        if (!kept || s == 0)
          run.give_back(u[s]);
        else
          u[s] = Tensor();
      }
    }
    run.unpack(flow, out[n]);
    run.give_back(flow), run.give_back(next);
  }
  return out;
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("integrate_velocity", integrate_velocity_cpu);
  m.impl("integrate_velocity_bwd", integrate_velocity_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
