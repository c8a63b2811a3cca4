#pragma once
// Patch distances of an image over one tile, and their way back to the image. Included by mind.cpp once per
// instruction set; what a tile costs stands there.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/mind_windows.h"

namespace fastreg::FASTREG_ISA {
namespace {

struct Extent {
  int64_t begin[3], size[3];  // voxels of a tile
};

template <class A>
class MindTile {
 public:
  explicit MindTile(const MindArgs& args) : a(args) {
    box = !a.weights;
    scale = A(1);
    for (int i = 0; i < 3; ++i) {
      r[i] = a.radius[i], s[i] = a.dilation[i], h[i] = r[i] + s[i];
      if (box) scale /= A(2 * r[i] + 1);
    }
    if (!box) weights.assign(a.weights, a.weights + 2 * r[2] + 1);
    widest = round_up(a.tile[2]), pitch = round_up(widest + 2 * r[2]), margin = round_up(2 * r[2]);
    find_fields();
  }

  // D of channel k, row (z, y) of the tile; after the voxels: d loss / d D. Rows lie among zeros, 2 r[2] or
  // more, which nothing writes.
  A* row(int64_t k, int64_t z, int64_t y) {
    return distance.data() + ((k * t.size[0] + z) * t.size[1] + y) * pitch + margin;
  }

  // Copies the tile of sample n and what surrounds it, replicated outside the image, and computes its
  // distances.
  void load(Stored type, const void* image, int64_t n, const Extent& tile) {
    t = tile;
    nx = round_up(t.size[2]), qx = round_up(nx + 2 * r[2]), fx = odd_lines(qx + s[2]);
    ix = odd_lines(std::max(qx + 2 * s[2], round_up(nx + 2 * r[2] + s[2]) + s[2]));
    shared = true;
    for (int i = 0; i < 2; ++i) {
      q[i] = t.size[i] + 2 * r[i], l[i] = t.size[i] + 2 * h[i];
      shared = shared && t.begin[i] >= r[i] && t.begin[i] + t.size[i] + r[i] <= a.size[i];
    }
    // Far offsets have less in common than they add to the rows.
    shared = shared && (q[0] + s[0]) * (q[1] + s[1]) <= 2 * q[0] * q[1];
    local.resize(a.c * l[0] * l[1] * ix);
    with_type(type, [&]<class T>() {
      if constexpr (std::is_same_v<arithmetic_t<T>, A>) gather(static_cast<const T*>(image), n);
    });
    const size_t needed = margin + a.n_channels * t.size[0] * t.size[1] * pitch + kBeyond<A>;
    if (distance.size() < needed) distance.resize(needed);
    if (nx < widest)
      for (int64_t k = 0; k < a.n_channels; ++k)
        each_row([&](int64_t z, int64_t y) { std::fill_n(row(k, z, y) + nx, widest - nx, A(0)); });
    shared ? field_distances() : distances();
  }

  // Adds what the adjoints in row() pass back to `grad`, (n, c, *size).
  void add_gradient(A* grad, int64_t n) {
    local_grad.assign(local.size(), A(0));
    shared ? field_adjoints() : adjoints();
    for (int64_t c = 0; c < a.c; ++c)
      for (int64_t z = 0; z < l[0]; ++z)
        for (int64_t y = 0; y < l[1]; ++y) {
          const A* in = local_grad.data() + ((c * l[0] + z) * l[1] + y) * ix;
          // Rows are longer than what the tile's patches see.
          const int64_t W = a.size[2], x0 = t.begin[2] - h[2], end = t.size[2] + 2 * h[2];
          A* __restrict out = grad + image_row(n, c, z, y);
          const int64_t first = std::clamp<int64_t>(-x0, 0, end), last = std::clamp<int64_t>(W - x0, 0, end);
          for (int64_t i = 0; i < first; ++i) out[0] += in[i];
          for (int64_t i = first; i < last; ++i) out[x0 + i] += in[i];
          for (int64_t i = last; i < end; ++i) out[W - 1] += in[i];
        }
  }

 private:
  static int64_t round_up(int64_t n) { return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  // Rows of an even number of cache lines would share few sets of the cache.
  static int64_t odd_lines(int64_t n) {
    constexpr int64_t line = 64 / sizeof(A);
    return ((n + line - 1) / line | 1) * line;
  }

  // Squares of one difference, I(q + step) - I(q), which two channels read `at` two places: sums over patches
  // along z and y serve both, where no patch leaves the image.
  struct Field {
    int64_t step[3], at[2][3];  // of at: from the voxel
    int64_t low[3], span[3];    // the least of at; how far the other lies
    int channel[2], n_channels;

    int64_t offset(int c, int axis) const { return at[c][axis] - low[axis]; }
  };

  void find_fields() {
    for (int k = 0; k < a.n_channels; ++k) {
      Field f{};
      const MindPair& pair = a.pairs[k];
      int sign = 0;  // the first step goes up
      for (int i = 0; i < 3; ++i)
        if (sign == 0) sign = pair.a[i] - pair.b[i];
      f.channel[0] = k, f.n_channels = 1;
      for (int i = 0; i < 3; ++i) {
        f.step[i] = s[i] * (sign < 0 ? pair.b[i] - pair.a[i] : pair.a[i] - pair.b[i]);
        f.low[i] = f.at[0][i] = s[i] * (sign < 0 ? pair.a[i] : pair.b[i]);
      }
      const auto same = std::find_if(fields.begin(), fields.end(), [&](const Field& o) {
        return o.n_channels == 1 && std::equal(o.step, o.step + 3, f.step);
      });
      if (same == fields.end()) {
        fields.push_back(f);
        continue;
      }
      same->channel[1] = k, same->n_channels = 2;
      for (int i = 0; i < 3; ++i) {
        const int64_t first = same->at[0][i], second = f.at[0][i];
        same->at[1][i] = second;
        same->low[i] = std::min(first, second), same->span[i] = std::abs(first - second);
      }
    }
  }

  // Where row (z, y) of the local copy lies in the image.
  int64_t image_row(int64_t n, int64_t c, int64_t z, int64_t y) const {
    const int64_t iz = std::clamp<int64_t>(t.begin[0] - h[0] + z, 0, a.size[0] - 1);
    const int64_t iy = std::clamp<int64_t>(t.begin[1] - h[1] + y, 0, a.size[1] - 1);
    return (((n * a.c + c) * a.size[0] + iz) * a.size[1] + iy) * a.size[2];
  }

  // Offsets in the local copy, from one of its channels, of the two samples of a square.
  struct Place {
    int64_t a, b;
  };

  // places[jz]: of the squares (jz, jy, 0).
  void find_places(const MindPair& pair, int64_t jy) {
    const int64_t y = inside(1, jy);
    for (int64_t jz = 0; jz < q[0]; ++jz) {
      const int64_t z = inside(0, jz);
      const auto at = [&](const int* o) {
        return ((z + s[0] * o[0]) * l[1] + y + s[1] * o[1]) * ix + s[2] * (1 + o[2]);
      };
      places[jz] = {at(pair.a), at(pair.b)};
    }
  }

  // Row of the local copy where row j of the squares lies: outside the image they are those of the border.
  int64_t inside(int i, int64_t j) const {
    return std::clamp<int64_t>(t.begin[i] - r[i] + j, 0, a.size[i] - 1) - (t.begin[i] - h[i]);
  }

  template <class T>
  void gather(const T* image, int64_t n) {
    const int64_t W = a.size[2], x0 = t.begin[2] - h[2];
    const int64_t first = std::clamp<int64_t>(-x0, 0, ix), last = std::clamp<int64_t>(W - x0, first, ix);
    for (int64_t c = 0; c < a.c; ++c)
      for (int64_t z = 0; z < l[0]; ++z)
        for (int64_t y = 0; y < l[1]; ++y) {
          const T* in = image + image_row(n, c, z, y);
          A* out = local.data() + ((c * l[0] + z) * l[1] + y) * ix;
          std::fill_n(out, first, A(fastreg::load(in[0])));
          cover_x<A>(first, last, [&](auto v, int64_t i) {
            using V = decltype(v);
            store_as<V>(out + i, load_as<V>(in + x0 + i));
          });
          std::fill_n(out + last, ix - last, A(fastreg::load(in[W - 1])));
        }
  }

  // Columns of a row of squares that lie outside the image: [0, left) and [right, qx).
  int64_t left() const { return std::clamp<int64_t>(r[2] - t.begin[2], 0, qx); }
  int64_t right() const { return std::clamp<int64_t>(a.size[2] - t.begin[2] + r[2], 0, qx); }

  // Squares and their windows along z, for a row of planes; then along y, then along x.
  void distances() {
    column.resize(t.size[0] * q[1] * qx), lines.resize(t.size[1] * qx + kBeyond<A>), places.resize(q[0]);
    // Copies: a store of a vector might change any member.
    const A *w = box ? nullptr : weights.data(), *image = local.data();
    const Place* rows = places.data();
    A *sums = column.data(), *sums_y = lines.data();
    const int64_t width = qx, plane = q[1] * qx, n_images = a.c, image_size = l[0] * l[1] * ix;
    for (int64_t k = 0; k < a.n_channels; ++k) {
      for (int64_t jy = 0; jy < q[1]; ++jy) {
        find_places(a.pairs[k], jy);
        each_column<A>(width, [&](auto v, int64_t j) {
          using V = decltype(v);
          const auto square = [=](int64_t jz) {
            const A *pa = image + rows[jz].a + j, *pb = image + rows[jz].b + j;
            V d = get<V>(pa) - get<V>(pb), sum = d * d;
            for (int64_t c = 1; c < n_images; ++c) {
              d = get<V>(pa + c * image_size) - get<V>(pb + c * image_size);
              sum = sum + d * d;
            }
            return sum;
          };
          A* out = sums + jy * width + j;
          windows<V>(t.size[0], 2 * r[0] + 1, w, square,
                     [=](int64_t z, V sum) { put<V>(out + z * plane, sum); });
        });
      }
      for (int64_t z = 0; z < t.size[0]; ++z) {
        each_column<A>(width, [&](auto v, int64_t j) {
          using V = decltype(v);
          const A* in = sums + z * plane + j;
          A* out = sums_y + j;
          windows<V>(
              t.size[1], 2 * r[1] + 1, w, [=](int64_t jy) { return get<V>(in + jy * width); },
              [=](int64_t y, V sum) { put<V>(out + y * width, sum); });
        });
        for (int64_t y = 0; y < t.size[1]; ++y) {
          A* in = sums_y + y * width;
          // Columns outside the image repeat the border's.
          std::fill_n(in, left(), in[left()]);
          std::fill_n(in + right(), width - right(), in[right() - 1]);
          row_windows(row(k, z, y), in, 2 * r[2] + 1, w, scale, nx);
        }
      }
    }
  }

  // The transpose of distances(), in reverse order. Rows are extended by zeros: a window then gathers what a
  // sample of the squares was part of; samples outside the image stand for the border's.
  void adjoints() {
    const int64_t extended_y = t.size[1] + 4 * r[1], extended_z = t.size[0] + 4 * r[0];
    lines.assign(extended_y * qx, A(0));
    column.assign(extended_z * q[1] * qx, A(0)), places.resize(q[0]);
    const A *w = box ? nullptr : weights.data(), *image = local.data();
    const Place* rows = places.data();
    A *sums = column.data(), *sums_x = lines.data(), *grad = local_grad.data();
    const int64_t width = qx, plane = q[1] * qx, n_images = a.c, image_size = l[0] * l[1] * ix;
    for (int64_t k = 0; k < a.n_channels; ++k) {
      for (int64_t z = 0; z < t.size[0]; ++z) {
        for (int64_t y = 0; y < t.size[1]; ++y) {
          A* out = sums_x + (2 * r[1] + y) * width;
          row_windows(out, row(k, z, y) - 2 * r[2], 2 * r[2] + 1, w, 2 * scale, width);
          for (int64_t j = 0; j < left(); ++j) out[left()] += out[j], out[j] = A(0);
          for (int64_t j = right(); j < width; ++j) out[right() - 1] += out[j], out[j] = A(0);
        }
        each_column<A>(width, [&](auto v, int64_t j) {
          using V = decltype(v);
          const A* in = sums_x + j;
          A* out = sums + (2 * r[0] + z) * plane + j;
          windows<V>(
              q[1], 2 * r[1] + 1, w, [=](int64_t y) { return get<V>(in + y * width); },
              [=](int64_t jy, V sum) { put<V>(out + jy * width, sum); });
        });
      }
      for (int64_t jy = 0; jy < q[1]; ++jy) {
        find_places(a.pairs[k], jy);
        each_column<A>(width, [&](auto v, int64_t j) {
          using V = decltype(v);
          const A* in = sums + jy * width + j;
          const auto add = [=](int64_t jz, V sum) {
            for (int64_t c = 0; c < n_images; ++c) {
              const int64_t ia = rows[jz].a + c * image_size + j, ib = rows[jz].b + c * image_size + j;
              const V d = sum * (get<V>(image + ia) - get<V>(image + ib));
              put<V>(grad + ia, get<V>(grad + ia) + d);
              put<V>(grad + ib, get<V>(grad + ib) - d);
            }
          };
          windows<V>(q[0], 2 * r[0] + 1, w, [=](int64_t z) { return get<V>(in + z * plane); }, add);
        });
      }
    }
  }

  // A field over what its channels read of it: rows (z, y) of sums, and of squares around them.
  struct Rows {
    int64_t z, y, width;  // of sums
    int64_t squares_z, squares_y;
    int64_t origin, step;  // in the local copy: of the first square, to its other sample
  };

  Rows rows_of(const Field& f) const {
    Rows n;
    n.z = t.size[0] + f.span[0], n.y = t.size[1] + f.span[1];
    n.width = round_up(nx + 2 * r[2] + f.span[2]);
    n.squares_z = n.z + 2 * r[0], n.squares_y = n.y + 2 * r[1];
    n.origin = ((s[0] + f.low[0]) * l[1] + s[1] + f.low[1]) * ix + s[2] + f.low[2];
    n.step = (f.step[0] * l[1] + f.step[1]) * ix + f.step[2];
    return n;
  }

  // As distances(), one field after the other. A strip of two vectors goes through z and y before the next,
  // so that what lies between stays in the first cache.
  void field_distances() {
    constexpr int64_t strip = 2 * kLanes<A>;
    const A *w = box ? nullptr : weights.data(), *image = local.data();
    const int64_t row_size = ix, plane_size = l[1] * ix, image_size = l[0] * l[1] * ix, line_size = fx;
    const int64_t n_images = a.c, taps_z = 2 * r[0] + 1, taps_y = 2 * r[1] + 1;
    for (const Field& f : fields) {
      const Rows n = rows_of(f);
      column.resize(n.z * n.squares_y * strip), lines.resize(n.z * n.y * line_size + kBeyond<A>);
      A *sums = column.data(), *sums_y = lines.data();
      each_column<A>(n.width, [&](auto v, int64_t j) {
        using V = decltype(v);
        const int64_t step = n.step, squares_y = n.squares_y;
        for (int64_t jy = 0; jy < squares_y; ++jy) {
          const A* in = image + n.origin + jy * row_size + j;
          const auto square = [=](int64_t jz) {
            const A* p = in + jz * plane_size;
            V d = get<V>(p + step) - get<V>(p), sum = d * d;
            for (int64_t c = 1; c < n_images; ++c) {
              d = get<V>(p + c * image_size + step) - get<V>(p + c * image_size);
              sum = sum + d * d;
            }
            return sum;
          };
          A* out = sums + jy * strip;
          windows<V>(n.z, taps_z, w, square,
                     [=](int64_t z, V sum) { put<V>(out + z * squares_y * strip, sum); });
        }
        for (int64_t z = 0; z < n.z; ++z) {
          const A* in = sums + z * squares_y * strip;
          A* out = sums_y + z * n.y * line_size + j;
          windows<V>(
              n.y, taps_y, w, [=](int64_t jy) { return get<V>(in + jy * strip); },
              [=](int64_t y, V sum) { put<V>(out + y * line_size, sum); });
        }
      });
      for (int c = 0; c < f.n_channels; ++c) {
        const auto in = [&](int64_t z, int64_t y) {
          return sums_y + ((z + f.offset(c, 0)) * n.y + y + f.offset(c, 1)) * line_size + f.offset(c, 2);
        };
        size_t i = 0;
        outside.resize(t.size[0] * t.size[1] * 2 * r[2]);
        each_row([&](int64_t z, int64_t y) {  // columns outside the image repeat the border's
          A* p = in(z, y);
          each_outside([&](int64_t j, int64_t border) { outside[i++] = p[j], p[j] = p[border]; });
        });
        each_row([&](int64_t z, int64_t y) {
          row_windows(row(f.channel[c], z, y), in(z, y), 2 * r[2] + 1, w, scale, nx);
        });
        i = 0;
        each_row([&](int64_t z, int64_t y) {  // for the other channel
          A* p = in(z, y);
          each_outside([&](int64_t j, int64_t) { p[j] = outside[i++]; });
        });
      }
    }
  }

  template <class Body>
  void each_row(Body body) {
    for (int64_t z = 0; z < t.size[0]; ++z)
      for (int64_t y = 0; y < t.size[1]; ++y) body(z, y);
  }

  // body(j, border) for the columns outside the image that patches of the tile see, with the column they
  // repeat.
  template <class Body>
  void each_outside(Body body) {
    for (int64_t j = 0; j < left(); ++j) body(j, left());
    for (int64_t j = right(); j < t.size[2] + 2 * r[2]; ++j) body(j, right() - 1);
  }

  // The transpose of field_distances(), as adjoints() is of distances().
  void field_adjoints() {
    constexpr int64_t strip = 2 * kLanes<A>;
    const A *w = box ? nullptr : weights.data(), *image = local.data();
    A* grad = local_grad.data();
    const int64_t row_size = ix, plane_size = l[1] * ix, image_size = l[0] * l[1] * ix, line_size = fx;
    const int64_t n_images = a.c, taps_z = 2 * r[0] + 1, taps_y = 2 * r[1] + 1;
    for (const Field& f : fields) {
      const Rows n = rows_of(f);
      const int64_t extended_y = n.y + 4 * r[1], squares_y = n.squares_y;
      lines.assign(n.z * extended_y * line_size, A(0));
      column.assign((n.z + 4 * r[0]) * squares_y * strip, A(0));
      for (int c = 0; c < f.n_channels; ++c) {
        const auto out = [&](int64_t z, int64_t y) {
          return lines.data() + f.offset(c, 2) +
                 ((z + f.offset(c, 0)) * extended_y + 2 * r[1] + y + f.offset(c, 1)) * line_size;
        };
        size_t i = 0;
        outside.resize(t.size[0] * t.size[1] * 2 * r[2]);
        each_row([&](int64_t z, int64_t y) {  // what the other channel has there
          A* p = out(z, y);
          each_outside([&](int64_t j, int64_t) { outside[i++] = p[j], p[j] = A(0); });
        });
        each_row([&](int64_t z, int64_t y) {
          const A* in = row(f.channel[c], z, y) - 2 * r[2];
          row_windows<A, true>(out(z, y), in, 2 * r[2] + 1, w, 2 * scale, qx);
        });
        i = 0;
        each_row([&](int64_t z, int64_t y) {
          A* p = out(z, y);
          each_outside([&](int64_t j, int64_t border) { p[border] += p[j], p[j] = outside[i++]; });
        });
      }
      A *sums = column.data(), *sums_y = lines.data();
      each_column<A>(n.width, [&](auto v, int64_t j) {
        using V = decltype(v);
        for (int64_t z = 0; z < n.z; ++z) {
          const A* in = sums_y + z * extended_y * line_size + j;
          A* out = sums + (2 * r[0] + z) * squares_y * strip;
          windows<V>(
              squares_y, taps_y, w, [=](int64_t y) { return get<V>(in + y * line_size); },
              [=](int64_t jy, V sum) { put<V>(out + jy * strip, sum); });
        }
        for (int64_t jy = 0; jy < squares_y; ++jy) {
          const A* in = sums + jy * strip;
          const int64_t first = n.origin + jy * row_size + j, step = n.step;
          const auto add = [=](int64_t jz, V sum) {
            for (int64_t c = 0; c < n_images; ++c) {
              const int64_t ib = first + jz * plane_size + c * image_size, ia = ib + step;
              const V d = sum * (get<V>(image + ia) - get<V>(image + ib));
              put<V>(grad + ia, get<V>(grad + ia) + d);
              put<V>(grad + ib, get<V>(grad + ib) - d);
            }
          };
          windows<V>(
              n.squares_z, taps_z, w, [=](int64_t z) { return get<V>(in + z * squares_y * strip); }, add);
        }
      });
    }
  }

  const MindArgs& a;
  bool box;
  A scale;  // of a sum over the patch
  // Of an axis: reach of the patch, of the offsets, of both; in x also the widths of rows: of the tile, with
  // the patch (q), with both (l), of a field's sums (fx), of the local copy (ix).
  int64_t r[3], s[3], h[3], q[2], l[2], nx, qx, fx, ix;
  int64_t widest, pitch, margin;  // of the rows of D: longest, from one to the next, before the first
  bool shared;                    // the tile: by fields
  Extent t;
  std::vector<Field> fields;
  std::vector<A> weights, local, local_grad, distance, lines, column, outside;
  std::vector<Place> places;
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
