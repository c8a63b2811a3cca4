#pragma once
// The maps that local correlation multiplies, warped, normalised and padded as tiles of them are loaded.
#include <stdexcept>

#include "common/local_correlation.h"
#include "common/scalar.h"
#include "common/warp.h"
#include "cuda/launch.h"

namespace fastreg {

// 2D is a volume of one slice with radius 0 along z.
struct CorrelationArgs {
  const void *fixed, *moving;  // (n, c, *size)
  const void* displacement;    // (n, nd, *size), arithmetic type; null where moving is not warped
  const double* statistics;    // (n, 4): mean and deviation of fixed, of moving; null: not normalised
  int64_t n, c;
  int nd, size[3], radius[3];
  double factor;
  bool border;

  FASTREG_HD int64_t voxels() const { return int64_t(size[0]) * size[1] * size[2]; }
  FASTREG_HD int along(int axis) const { return 2 * radius[axis] + 1; }
  FASTREG_HD int64_t offsets() const { return int64_t(along(0)) * along(1) * along(2); }
};

constexpr int kCorrelationLanes = 32;  // voxels along x of a tile: those of a warp
constexpr int kCorrelationRows = 4;    // voxels along y of a thread

// How a grid is cut into tiles of depth x height x 32 voxels, a warp per slice and kCorrelationRows rows.
struct CorrelationTiling {
  int depth, height;
  unsigned tiles[3];

  static CorrelationTiling of(const int64_t* size, int warps) {
    const int depth = size[0] > 1 && warps > 1 ? 2 : 1, height = kCorrelationRows * warps / depth;
    const auto parts = [](int64_t n, int64_t by) { return unsigned((n + by - 1) / by); };
    return {
        depth, height, {parts(size[0], depth), parts(size[1], height), parts(size[2], kCorrelationLanes)}};
  }
  int64_t count() const { return int64_t(tiles[0]) * tiles[1] * tiles[2]; }

  // Takes the tile off `id`: x runs fastest. Its first voxel.
  __device__ __forceinline__ void take(unsigned& id, int* first) const {
    first[2] = int(id % tiles[2]) * kCorrelationLanes, id /= tiles[2];
    first[1] = int(id % tiles[1]) * height, id /= tiles[1];
    first[0] = int(id % tiles[0]) * depth, id /= tiles[0];
  }
};

inline unsigned correlation_blocks(int64_t count) {
  if (count > INT32_MAX)
    throw std::invalid_argument("fastreg::local_correlation: too many voxels and offsets for one launch");
  return unsigned(count);
}

// A voxel of a map in its image: itself, or the cell it is interpolated in.
template <class A>
struct Place {
  int64_t offset;  // of the voxel, or of the cell's lower corner, which need not exist
  A fraction[3];
  unsigned corners;  // bit 4 z + 2 y + x: that corner is inside and carries weight
};

// A map of a sample. Without kWarps, one that is not warped: that leaves more registers.
template <class T, bool kWarps = true>
class CorrelationMap {
  using A = arithmetic_t<T>;

 public:
  // `about_own` normalises about the map's own mean rather than the shared one.
  __device__ __forceinline__ CorrelationMap(const CorrelationArgs& a, int64_t n, bool moving,
                                            bool about_own = false)
      : args_(a),
        image_(static_cast<const T*>(moving ? a.moving : a.fixed) + n * a.c * a.voxels()),
        displacement_(kWarps && moving && a.displacement
                          ? static_cast<const A*>(a.displacement) + n * a.nd * a.voxels()
                          : nullptr) {
    if (a.statistics) normalization_ = normalization<A>(a.statistics + 4 * n, about_own ? int(moving) : -1);
  }

  // Of voxel (z, y, x), inside the image.
  __device__ __forceinline__ Place<A> place(int z, int y, int x) const {
    const int* size = args_.size;
    Place<A> p;
    p.offset = (int64_t(z) * size[1] + y) * size[2] + x;
    if (!kWarps || !displacement_) return p;
    const int at[3] = {z, y, x};
    const A* u = displacement_ + p.offset;
    int cell[3];
    p.corners = 0xff;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int component = k - (3 - args_.nd);
      int whole = 0;
      p.fraction[k] = A(0);
      if (component >= 0) split(u[component * args_.voxels()], whole, p.fraction[k]);
      cell[k] = at[k] + whole;
      const unsigned upper = k == 0 ? 0xf0 : k == 1 ? 0xcc : 0xaa;
      if (unsigned(cell[k]) >= unsigned(size[k])) p.corners &= upper;
      // A corner of weight 0 is not read: what it holds must not show. A NaN carries weight.
      if (p.fraction[k] == A(0) || unsigned(cell[k] + 1) >= unsigned(size[k])) p.corners &= ~upper;
    }
    p.offset = (int64_t(cell[0]) * size[1] + cell[1]) * size[2] + cell[2];
    return p;
  }

  // The value of channel c.
  __device__ __forceinline__ A read(const Place<A>& p, int64_t c) const {
    const T* image = image_ + c * args_.voxels();
    const A value = kWarps && displacement_ ? interpolated(image, p) : load(image[p.offset]);
    return args_.statistics ? normalized(normalization_, value) : value;
  }

 private:
  __device__ __forceinline__ A interpolated(const T* image, const Place<A>& p) const {
    const int64_t line = args_.size[2], plane = line * args_.size[1];
    A slice[2];
#pragma unroll
    for (int z = 0; z < 2; ++z) {
      A row[2];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const T* corner = image + (p.offset + z * plane + y * line);
        const unsigned bits = p.corners >> (4 * z + 2 * y);
        const A low = bits & 1 ? load(corner[0]) : A(0), high = bits & 2 ? load(corner[1]) : A(0);
        row[y] = (A(1) - p.fraction[2]) * low + p.fraction[2] * high;
      }
      slice[z] = (A(1) - p.fraction[1]) * row[0] + p.fraction[1] * row[1];
    }
    return (A(1) - p.fraction[0]) * slice[0] + p.fraction[0] * slice[1];
  }

  const CorrelationArgs& args_;
  const T* image_;
  const A* displacement_;
  Normalization<A> normalization_;
};

// Channels [c0, c0 + channels) of `rows` rows of kPitch voxels from (z, y0, x0) on, perhaps outside the
// image: channel by channel into shared memory. Neighbouring threads load neighbouring voxels.
template <int kPitch, class T, bool kWarps>
__device__ __forceinline__ void load_tile(const CorrelationArgs& a, const CorrelationMap<T, kWarps>& map,
                                          bool border, int64_t c0, int channels, int z, int y0, int x0,
                                          int rows, Shared<arithmetic_t<T>> tile) {
  using A = arithmetic_t<T>;
  constexpr int kAtOnce = 8;  // loads in flight
  const int positions = rows * kPitch;
  for (int i = int(threadIdx.x); i < positions; i += int(blockDim.x)) {
    const int at[3] = {z, y0 + i / kPitch, x0 + i % kPitch};
    int inside[3];
    bool exists = true;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      inside[k] = min(max(at[k], 0), a.size[k] - 1);
      exists = exists && (border || inside[k] == at[k]);
    }
    if (!exists) {
      for (int c = 0; c < channels; ++c) tile[c * positions + i] = A(0);
      continue;
    }
    const Place<A> place = map.place(inside[0], inside[1], inside[2]);
    int c = 0;
    for (; c + kAtOnce <= channels; c += kAtOnce) {
      A value[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) value[j] = map.read(place, c0 + c + j);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) tile[(c + j) * positions + i] = value[j];
    }
    for (; c < channels; ++c) tile[c * positions + i] = map.read(place, c0 + c);
  }
}

// Calls f.template operator()<T, kGroup, kWarps>() with the offsets along y and x that are handled together:
// those that read shared memory least. fp64 sums leave room for the smaller group only.
template <class F>
void with_group(Stored type, const CorrelationArgs& a, bool warps, F f) {
  const auto reads = [&](int group) {
    const int64_t y = (a.along(1) + group - 1) / group, x = (a.along(2) + group - 1) / group;
    return y * x * (kCorrelationRows + group * (kCorrelationRows + group - 1));
  };
  with_type(type, [&]<class T>() {
    if constexpr (sizeof(T) == 8) {
      f.template operator()<T, 3, true>();
    } else if (reads(3) < reads(5)) {
      f.template operator()<T, 3, true>();
    } else if (warps) {
      f.template operator()<T, 5, true>();
    } else {
      f.template operator()<T, 5, false>();
    }
  });
}

}  // namespace fastreg
