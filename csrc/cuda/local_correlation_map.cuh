#pragma once
// The maps that local correlation multiplies, warped, normalised and padded as tiles of them are loaded.
#include <c10/util/Exception.h>

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
  int nd, size[3], radius[3], along[3];  // along: offsets of an axis
  int64_t plane, voxels, offsets;        // of an image, of a voxel
  double factor;
  bool border;
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
  TORCH_CHECK_VALUE(count <= INT32_MAX,
                    "fastreg::local_correlation: too many voxels and offsets for one launch");
  return unsigned(count);
}

// Shared memory: a plane of a tile, K - 1 wider and higher, of so many channels, and where it lies.
template <class A, int K>
size_t tile_bytes(const CorrelationTiling& tiling, int64_t channels) {
  return size_t(tiling.height + K - 1) * (kCorrelationLanes + K - 1) * (size_t(channels) * sizeof(A) + 4);
}

// A voxel of a map in its image: itself, or the cell it is interpolated in.
template <class A>
struct Place {
  int64_t offset;  // of the voxel, or of the cell's lower corner, which need not exist
  A fraction[3];
  unsigned corners;  // bit 4 z + 2 y + x: that corner is inside and carries weight
};

// About the shared mean of sample n, or about that of one map: 0 fixed, 1 moving.
template <class A>
__device__ __forceinline__ Normalization<A> normalization_of(const CorrelationArgs& a, int64_t n,
                                                             int own = -1) {
  return a.statistics ? normalization<A>(a.statistics + 4 * n, own) : Normalization<A>{};
}

// A map of a sample. Without kWarps, one that is not warped: that leaves more registers.
template <class T, bool kWarps = true>
class CorrelationMap {
  using A = arithmetic_t<T>;

 public:
  __device__ __forceinline__ CorrelationMap(const CorrelationArgs& a, int64_t n, bool moving,
                                            const Normalization<A>& normalization)
      : args_(a),
        image_(static_cast<const T*>(moving ? a.moving : a.fixed) + n * a.c * a.voxels),
        displacement_(kWarps && moving && a.displacement
                          ? static_cast<const A*>(a.displacement) + n * a.nd * a.voxels
                          : nullptr),
        normalization_(normalization) {}

  // Of voxel `at` of plane z.
  __device__ __forceinline__ Place<A> place(int z, int at_plane) const {
    const int* size = args_.size;
    Place<A> p;
    p.offset = z * args_.plane + at_plane;
    if (!kWarps || !displacement_) return p;
    const int at[3] = {z, at_plane / size[2], at_plane % size[2]};
    const A* u = displacement_ + p.offset;
    int cell[3];
    p.corners = 0xff;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int component = k - (3 - args_.nd);
      int whole = 0;
      p.fraction[k] = A(0);
      if (component >= 0) split(u[component * args_.voxels], whole, p.fraction[k]);
      cell[k] = at[k] + whole;
      const unsigned upper = k == 0 ? 0xf0 : k == 1 ? 0xcc : 0xaa;
      if (unsigned(cell[k]) >= unsigned(size[k])) p.corners &= upper;
      // A corner of weight 0 is not read: what it holds must not show. A NaN carries weight.
      if (p.fraction[k] == A(0) || unsigned(cell[k] + 1) >= unsigned(size[k])) p.corners &= ~upper;
    }
    p.offset = cell[0] * args_.plane + int64_t(cell[1]) * size[2] + cell[2];
    return p;
  }

  // The value of channel c.
  __device__ __forceinline__ A read(const Place<A>& p, int64_t c) const {
    const T* image = image_ + c * args_.voxels;
    const A value = kWarps && displacement_ ? interpolated(image, p) : load(image[p.offset]);
    return args_.statistics ? normalized(normalization_, value) : value;
  }

 private:
  __device__ __forceinline__ A interpolated(const T* image, const Place<A>& p) const {
    A slice[2];
#pragma unroll
    for (int z = 0; z < 2; ++z) {
      A row[2];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const T* corner = image + (p.offset + z * args_.plane + int64_t(y) * args_.size[2]);
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

// Where in a plane of the image the `rows` rows of kPitch voxels from (y0, x0) on lie; -1: beyond it. Each
// thread writes, and load_tile reads, entries of its own.
template <int kPitch>
__device__ __forceinline__ void locate_tile(const CorrelationArgs& a, bool border, int y0, int x0, int rows,
                                            Shared<int> places) {
  for (int i = int(threadIdx.x); i < rows * kPitch; i += int(blockDim.x)) {
    const int y = y0 + i / kPitch, x = x0 + i % kPitch;
    const int inside_y = min(max(y, 0), a.size[1] - 1), inside_x = min(max(x, 0), a.size[2] - 1);
    const bool exists = border || (inside_y == y && inside_x == x);
    places[i] = exists ? inside_y * a.size[2] + inside_x : -1;
  }
}

// Channels [c0, c0 + channels) of a tile's plane z, perhaps beyond the image: channel by channel into shared
// memory. Neighbouring threads load neighbouring voxels.
template <class T, bool kWarps>
__device__ __forceinline__ void load_tile(const CorrelationArgs& a, const CorrelationMap<T, kWarps>& map,
                                          bool border, int64_t c0, int channels, int z, int positions,
                                          Shared<int> places, Shared<arithmetic_t<T>> tile) {
  using A = arithmetic_t<T>;
  constexpr int kAtOnce = kWarps ? 1 : 8;  // channels; a warped one has 8 loads
  const int inside_z = min(max(z, 0), a.size[0] - 1);
  const bool exists = border || inside_z == z;
  for (int i = int(threadIdx.x); i < positions; i += int(blockDim.x)) {
    const int at = places[i];
    if (at < 0 || !exists) {
      for (int c = 0; c < channels; ++c) tile[c * positions + i] = A(0);
      continue;
    }
    const Place<A> place = map.place(inside_z, at);
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
    const int64_t y = (a.along[1] + group - 1) / group, x = (a.along[2] + group - 1) / group;
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
