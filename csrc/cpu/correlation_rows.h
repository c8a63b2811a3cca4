#pragma once
// Rows of the maps that local_correlation multiplies: warped, normalised and padded as they are read.
#include "common/local_correlation.h"
#include "cpu/warp_rows.h"

namespace fastreg {

// 2D is a volume of one slice with radius 0 along z.
struct CorrelationArgs {
  const void* fixed;         // (n, c, *size)
  WarpArgs moving;           // its image (n, c, *size) and displacement, null where moving is not warped
  const double* statistics;  // (n, 4): mean and deviation of fixed, of moving; null: maps are not normalised
  const void* grad;          // (n, offsets, *size)
  void* result;              // forward: (n, offsets, *size)
  void* grad_fixed;          // (n, c, *size); or null
  void* grad_moved;          // (n, c, *size), arithmetic type where moving is warped; or null
  // Normalised only. Sums: forward statistics: moments of rows, (n, z, y, 4); bwd_fixed: (n, z, y, 3).
  double* sums;
  void* grad_normalized;  // dL/d normalised fixed, arithmetic type; may be grad_fixed; null without
  const ThroughStatistics* through;  // (n, 2), for fixed and for moving
  int64_t n, c, nd, size[3], radius[3];
  int64_t tile;  // rows of y that share a ring of planes
  double factor;
  bool border;
};

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <memory>
#include <vector>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

// How a row of a map lies in a buffer: `n` voxels from `origin` on, what surrounds it on both sides, and as
// many zeros as whole vectors at any offset may read. Vectors therefore need no tails.
struct Line {
  int64_t n, origin, vectors, length;

  // Products are formed at n + 2 extend positions, each reading `radius` to either side.
  template <class A>
  static Line of(int64_t n, int64_t radius, int64_t extend) {
    const int64_t lanes = kLanes<A>, vectors = (n + 2 * extend + lanes - 1) / lanes * lanes;
    return {n, radius + extend, vectors, vectors + 2 * radius};
  }
};

template <class T>
void load_row(const T* in, int64_t n, arithmetic_t<T>* out) {
  using A = arithmetic_t<T>;
  cover_x<A>(0, n, [&](auto v, int64_t x) { store_as(out + x, load_as<decltype(v)>(in + x)); });
}

// Asks for `count` rows, `pitch` apart: those of the offsets that come next, which lie volumes apart.
template <bool write, class T>
void prefetch_rows(const T* rows, int64_t count, int64_t pitch, int64_t n) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t x = 0; x < n; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows + k * pitch + x, write);
}

template <class T>
void store_row(const arithmetic_t<T>* in, int64_t n, T* out) {
  using A = arithmetic_t<T>;
  cover_x<A>(0, n, [&](auto v, int64_t x) { store_as(out + x, load_as<decltype(v)>(in + x)); });
}

// Positions of a block of a warp with padding "zeros", and its voxels with corners on both sides of a face
// (or at NaN). A voxel is 0 where all its corners are outside, which many are: they cost nothing.
template <class A, int ND>
struct Block : Positions<A, ND> {
  int32_t n_faces, faces[kBlock];

  void locate_all(const WarpArgs& a, const Row& row, int64_t x0, int count) {
    locate<A, ND>(a, row, x0, count, 0, a.in[3 - ND], *this);
    n_faces = 0;
    for (int i = 0; i < count; ++i) {
      if (this->inside[i]) continue;
      bool reaches = true;
      for (int k = 0; k < ND; ++k) reaches &= this->whole[k][i] >= -1 && this->whole[k][i] < a.in[k + 3 - ND];
      if (reaches || is_nan(*this, i)) faces[n_faces++] = i;
    }
  }
};

// The voxels of a block.
template <class T, int ND, class A>
void interpolate(const WarpArgs& a, const T* image, const Block<A, ND>& p, int count, Corners<T, ND>& corners,
                 A* __restrict value) {
  if (!corners.fetch(a, image, p, count)) {
    std::fill_n(value, count, A(0));
  } else {
    int32_t finite = -1;
    for (int i = 0; i < count; ++i) {
      const A fx = p.fraction[ND - 1][i], fy = p.fraction[ND - 2][i];
      auto& q = corners.pair;
      A v = lerp(lerp(load(q[0][i][0]), load(q[0][i][1]), fx), lerp(load(q[1][i][0]), load(q[1][i][1]), fx),
                 fy);
      if constexpr (ND == 3) {
        const A far = lerp(lerp(load(q[2][i][0]), load(q[2][i][1]), fx),
                           lerp(load(q[3][i][0]), load(q[3][i][1]), fx), fy);
        v = lerp(v, far, p.fraction[0][i]);
      }
      v = p.inside[i] ? v : A(0);
      value[i] = v;
      finite &= -int32_t(v - v == A(0));
    }
    // Again where a corner, perhaps one of weight 0, was not finite.
    for (int i = 0; i < count && !finite; ++i)
      if (!(value[i] - value[i] == A(0))) value[i] = interpolate_anywhere<ND>(a, image, p, i);
  }
  for (int j = 0; j < p.n_faces; ++j) value[p.faces[j]] = interpolate_anywhere<ND>(a, image, p, p.faces[j]);
}

constexpr int64_t kRowsAtOnce = 8;  // rows of a map read together where no ring holds them
constexpr int kBlocksAtOnce = 32;   // blocks of a warp whose positions are kept

// All channels of rows [y0, y1) of plane z of the warped image; rows `pitch` and channels `length` apart.
// Positions are computed once for all channels; channel by channel the rows of the image that a few rows of
// the result read stay in the nearest cache.
template <class T, int ND>
void warp_rows(const WarpArgs& a, int64_t n, int64_t z, int64_t y0, int64_t y1, arithmetic_t<T>* out,
               int64_t pitch, int64_t length) {
  using A = arithmetic_t<T>;
  const auto positions = std::make_unique_for_overwrite<Block<A, ND>[]>(kBlocksAtOnce);
  Corners<T, ND> corners;
  const int64_t n_in = a.in[0] * a.in[1] * a.in[2], line = a.out[2];
  const int64_t per_row = (line + kBlock - 1) / kBlock, blocks = (y1 - y0) * per_row;
  for (int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
    const int64_t end = std::min(first + kBlocksAtOnce, blocks);
    const auto each_block = [&](auto body) {
      for (int64_t b = first; b < end; ++b) {
        const int64_t x0 = b % per_row * kBlock;
        body(b / per_row, x0, int(std::min<int64_t>(kBlock, line - x0)), positions[b - first]);
      }
    };
    each_block([&](int64_t row, int64_t x0, int count, Block<A, ND>& p) {
      p.locate_all(a, {n, z, y0 + row}, x0, count);
    });
    for (int64_t c = 0; c < a.c; ++c) {
      const T* image = static_cast<const T*>(a.image) + (n * a.c + c) * n_in;
      each_block([&](int64_t row, int64_t x0, int count, const Block<A, ND>& p) {
        interpolate(a, image, p, count, corners, out + row * pitch + c * length + x0);
      });
    }
  }
}

// Rows of a map as they are correlated: in arithmetic type, warped, normalised.
template <class T>
class Map {
  using A = arithmetic_t<T>;

 public:
  // `about_own` normalises about the map's own mean rather than the shared one.
  Map(const CorrelationArgs& a, bool moving, bool about_own = false)
      : args_(a),
        own_(about_own ? int(moving) : -1),
        image_(static_cast<const T*>(moving ? a.moving.image : a.fixed)),
        warped_(moving && a.moving.displacement) {}

  // All channels of rows [y0, y1) of plane z of sample n; rows `pitch` and channels `length` apart.
  void read(int64_t n, int64_t z, int64_t y0, int64_t y1, A* out, int64_t pitch, int64_t length) const {
    const CorrelationArgs& a = args_;
    const int64_t line = a.size[2], volume = a.size[0] * a.size[1] * line;
    if (warped_)
      a.nd == 3 ? warp_rows<T, 3>(a.moving, n, z, y0, y1, out, pitch, length)
                : warp_rows<T, 2>(a.moving, n, z, y0, y1, out, pitch, length);
    const auto s = a.statistics ? normalization<A>(a.statistics + 4 * n, own_) : Normalization<A>{};
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t c = 0; c < a.c; ++c) {
        A* to = out + (y - y0) * pitch + c * length;
        if (!warped_) load_row(image_ + (n * a.c + c) * volume + (z * a.size[1] + y) * line, line, to);
        if (a.statistics)
          each_x<A>(0, line, [&](auto v, int64_t x) {
            store_as(to + x, normalized(s, load_as<decltype(v)>(to + x)));
          });
      }
  }

  void read_row(int64_t n, int64_t z, int64_t y, A* out, int64_t length) const {
    read(n, z, y, y + 1, out, 0, length);
  }

 private:
  const CorrelationArgs& args_;
  const int own_;
  const T* image_;
  bool warped_;
};

// The rows of a map around the plane at hand: 2 radius + 1 planes, moved along z as work proceeds, so that a
// thread reads (warps, normalises) each row of its planes once. Rows lie channel by channel in one piece:
// those of a map are a power of two apart often enough to meet in one set of the cache.
template <class T>
class Ring {
  using A = arithmetic_t<T>;

 public:
  // With `ones`, a channel of ones follows the others.
  Ring(const CorrelationArgs& a, bool moving, int64_t extend, bool ones)
      : map(a, moving),
        line(Line::of<A>(a.size[2], a.radius[2], extend)),
        args_(a),
        ones_(ones),
        row_length_((a.c + ones) * line.length),
        slots_(std::min(2 * a.radius[0] + 1, a.size[0])),
        rows_(std::min(a.tile + 2 * a.radius[1], a.size[1])),
        values_(slots_ * rows_ * row_length_),
        zeros_(line.length) {}

  // Makes the planes around z of the rows around [y0, y1) available.
  void move_to(int64_t n, int64_t z, int64_t y0, int64_t y1) {
    const CorrelationArgs& a = args_;
    const int64_t first = std::max<int64_t>(z - a.radius[0], 0);
    const int64_t end = std::min(z + a.radius[0] + 1, a.size[0]);
    if (n != n_ || y0 != y0_ || first < first_ || first > end_) end_ = first;
    n_ = n, y0_ = y0, first_ = first, low_ = std::max<int64_t>(y0 - a.radius[1], 0);
    for (; end_ < end; ++end_) load(end_, std::min(y1 + a.radius[1], a.size[1]));
  }

  // All channels of a row inside the image.
  const A* row(int64_t z, int64_t y) const {
    return values_.data() + (z % slots_ * rows_ + y - low_) * row_length_;
  }

  // The row that an offset beyond the image reads, and the distance of its channels.
  const A* row_or_padding(int64_t z, int64_t y, int64_t& length) const {
    const int64_t zi = std::clamp<int64_t>(z, 0, args_.size[0] - 1);
    const int64_t yi = std::clamp<int64_t>(y, 0, args_.size[1] - 1);
    const bool inside = (zi == z && yi == y) || args_.border;
    length = inside ? line.length : 0;
    return inside ? row(zi, yi) : zeros_.data();
  }

  const Map<T> map;
  const Line line;

 private:
  // Rows [low, high) of plane z.
  void load(int64_t z, int64_t high) {
    const CorrelationArgs& a = args_;
    A* plane = values_.data() + z % slots_ * rows_ * row_length_;
    map.read(n_, z, low_, high, plane + line.origin, row_length_, line.length);
    for (A* row = plane; row < plane + (high - low_) * row_length_; row += row_length_) {
      if (ones_) std::fill_n(row + a.c * line.length + line.origin, line.n, A(1));
      if (!a.border || line.origin != a.radius[2]) continue;
      for (A* at = row; at < row + row_length_; at += line.length) {
        std::fill_n(at, line.origin, at[line.origin]);
        std::fill_n(at + line.origin + line.n, line.origin, at[line.origin + line.n - 1]);
      }
    }
  }

  const CorrelationArgs& args_;
  int64_t ones_, row_length_, slots_, rows_;
  int64_t n_ = -1, y0_ = -1, low_ = 0, first_ = 0, end_ = 0;
  std::vector<A> values_, zeros_;
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA

#endif
