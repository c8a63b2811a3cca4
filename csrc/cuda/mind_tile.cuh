#pragma once
// MIND in 3D with patches of radius 1 to 3: a block owns a (y, x) tile of 4 x 32 voxels and marches along z.
// Windows are separable, never subtractive: y in registers as the squares are made, x from shared memory, z
// in 2 radius accumulators a channel, which a thread keeps for its voxel. Nothing of a distance is written.
#include <algorithm>

#include "cuda/mind.cuh"

namespace fastreg {

constexpr int kTileX = 32, kTileY = 4;  // kTileY: also the rows whose windows a thread makes at a time
static_assert(kTileX * kTileY == kMindVoxels);

template <class A>
struct MindTileArgs {
  MindArgs a;
  A window[7], cumulative[7];
  A scale;                              // of a box' sum
  int tiles_x, tiles_y, chunks, chunk;  // chunk: planes of a block
};

// Where a block works: blocks are (n, chunk, tile y, tile x).
struct MindBlock {
  int x, y, begin, end;  // begin, end: planes
  int64_t n;
  unsigned in_sample;
};
template <class A>
__device__ __forceinline__ MindBlock mind_block(const MindTileArgs<A>& t) {
  const unsigned b = blockIdx.x, rows = b / t.tiles_x, columns = rows / t.tiles_y;
  MindBlock block;
  block.x = int(b % t.tiles_x) * kTileX, block.y = int(rows % t.tiles_y) * kTileY;
  block.begin = t.a.begin + int(columns % t.chunks) * t.chunk;
  block.end = min(block.begin + t.chunk, t.a.end);
  block.n = columns / t.chunks;
  block.in_sample = b % unsigned(t.tiles_x * t.tiles_y * t.chunks);
  return block;
}

// out[i] = sum of s[i] ... s[i + 2 kRadius], weighted or not: two neighbours share what is inside both.
template <int kRadius, class A>
__device__ __forceinline__ void row_windows(bool box, const A* window, const A (&s)[kTileY + 2 * kRadius],
                                            A (&out)[kTileY]) {
  if (box) {
#pragma unroll
    for (int i = 0; i < kTileY; i += 2) {
      A inside = s[i + 1];
#pragma unroll
      for (int j = 2; j <= 2 * kRadius; ++j) inside += s[i + j];
      out[i] = s[i] + inside, out[i + 1] = inside + s[i + 2 * kRadius + 1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTileY; ++i) {
      out[i] = window[0] * s[i];
#pragma unroll
      for (int j = 1; j <= 2 * kRadius; ++j) out[i] += window[j] * s[i + j];
    }
  }
}

// Windows along z in flight: after plane p, of planes p - kRadius + 1 ... p + kRadius.
template <class A, int kChannels, int kRadius>
struct MindColumns {
  A sum[kChannels][2 * kRadius] = {};

  // Adds plane p, weights[j] its weight for plane p - kRadius + j; gives the window of plane p - kRadius.
  __device__ __forceinline__ A add(int k, A plane, const A (&weights)[2 * kRadius + 1]) {
    const A done = sum[k][0] + weights[0] * plane;
#pragma unroll
    for (int j = 1; j < 2 * kRadius; ++j) sum[k][j - 1] = sum[k][j] + weights[j] * plane;
    sum[k][2 * kRadius - 1] = weights[2 * kRadius] * plane;
    return done;
  }
};

// Weights of plane p in the windows of planes p - kRadius ..., or, `transposed`, of these in its.
template <int kRadius, class A>
__device__ __forceinline__ void plane_weights(const MindTileArgs<A>& t, int p, bool transposed,
                                              A (&weights)[2 * kRadius + 1]) {
  const int n = t.a.size[0], reach = transposed ? kRadius : 0;
  const bool inner = p > reach && p < n - 1 - reach;
#pragma unroll
  for (int j = 0; j <= 2 * kRadius; ++j) {
    const int other = p - kRadius + j;
    weights[j] = t.window[j];
    if (!inner)
      weights[j] = other < 0 || other >= n ? A(0)
                   : transposed            ? mind_patch_weight(t.window, t.cumulative, kRadius, other, p, n)
                                           : mind_patch_weight(t.window, t.cumulative, kRadius, p, other, n);
  }
}

// A channel's place in shared memory. Channels come in three groups of common samples; "ssc": of two axes u,
// v the pairs (+u, -v), (+v, -u), (-u, -v), (+u, +v); "six": of an axis u the pairs with -u, +u.
__host__ __device__ constexpr int mind_slot(bool ssc, int k) {
  return !ssc || k < 4 ? k : k < 6 ? k + 2 : k < 8 ? k + 4 : k < 10 ? k - 4 : k - 2;
}

// What one thread does of a plane before its windows along x: squares of one group in one column of the tile
// and its margin, and their windows along y.
template <class T, bool kSsc, int kRadius>
class MindSquares {
  using A = arithmetic_t<T>;
  static constexpr int kSamples = kSsc ? 4 : 3, kSpan = kTileY + 2 * kRadius;

 public:
  static constexpr int kWidth = kTileX + 2 * kRadius, kJobs = 3 * kWidth, kEach = kSsc ? 4 : 2;
  static_assert(kJobs <= kMindVoxels);

  __device__ __forceinline__ MindSquares(const MindArgs& a, const MindBlock& block, int job)
      : group(job / kWidth), column(job % kWidth), first(block.y - kRadius) {
    const int x = clamp_index(block.x + column - kRadius, a.size[2]);
    // Samples: -u, +u, and -v, +v or none.
    const int u = !kSsc ? group : group == 1 ? 1 : 0, v = group == 0 ? 1 : 2;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const int along = i < 2 ? u : kSsc ? v : -1, sign = i % 2 ? 1 : -1;
      step_z[i] = along == 0 ? sign * a.dilation[0] : 0;
      step_y[i] = along == 1 ? sign * a.dilation[1] : 0;
      at_x[i] = clamp_index(x + (along == 2 ? sign * a.dilation[2] : 0), a.size[2]);
    }
    const int reach = kRadius + a.dilation[1];
    whole = block.y - reach >= 0 && block.y + kTileY - 1 + reach < a.size[1];
  }

  // Windows of plane p to `out`, (channels, kTileY, kWidth): channel after channel, or the samples of all
  // would not fit in registers beside the windows in flight. What channels share comes from L1 again.
  template <class Memory>
  __device__ __forceinline__ void plane(const MindTileArgs<A>& t, const T* image, int p, Memory out) const {
    constexpr int kFirst[4] = {1, 3, 2, 3}, kSecond[4] = {2, 0, 0, 1};
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      A s[kSpan] = {}, sum[kTileY];
      if constexpr (kSsc)
        squares(t.a, image, p, kFirst[k], kSecond[k], s);
      else
        squares(t.a, image, p, 2, k, s);
      row_windows<kRadius>(t.a.box, t.window, s, sum);
#pragma unroll
      for (int i = 0; i < kTileY; ++i) out[((group * kEach + k) * kTileY + i) * kWidth + column] = sum[i];
    }
  }

 private:
  // Of samples u and v, in the rows of the tile and its margin.
  __device__ __forceinline__ void squares(const MindArgs& a, const T* image, int p, int u, int v,
                                          A (&s)[kSpan]) const {
    const int top = first + late_zero(), width = a.size[2];
    const T* from_u = image + clamp_index(p + step_z[u], a.size[0]) * a.plane() + at_x[u];
    const T* from_v = image + clamp_index(p + step_z[v], a.size[0]) * a.plane() + at_x[v];
    const auto row = [&](int j, int step) {
      return clamp_index(clamp_index(top + j, a.size[1]) + step, a.size[1]) * width;
    };
    if (whole) from_u += (top + step_y[u]) * width, from_v += (top + step_y[v]) * width;
#pragma unroll 1
    for (int64_t c = 0; c < a.c; ++c) {
      const auto add = [&](int j, int row_u, int row_v) {
        const A d = load(from_u[row_u]) - load(from_v[row_v]);
        s[j] += d * d;
      };
      if (whole) {
#pragma unroll
        for (int j = 0; j < kSpan; ++j) add(j, j * width, j * width);
      } else {
#pragma unroll
        for (int j = 0; j < kSpan; ++j) add(j, row(j, step_y[u]), row(j, step_y[v]));
      }
      from_u += a.size[0] * a.plane(), from_v += a.size[0] * a.plane();
    }
  }

  int group, column, first, step_z[kSamples], step_y[kSamples], at_x[kSamples];
  bool whole;  // no row lies outside the image
};

// Distances and what task follows. Work: kMindVoxels threads an image, a voxel each; where two images are
// compared the first half of a block makes the distances of the fixed one, the second of the moved one, and
// they exchange descriptors through shared memory. Per plane a thread first makes squares and their windows
// along y (of four channels, in one column of the tile and its margin, from L1), then the windows along x and
// z of its own voxel. Two buffers: one barrier a plane. 128 registers: 16 warps an SM. Bytes: each image
// read, from L2 some 4 times; a gradient writes its channels' maps. A voxel and image, ssc, radius 2, takes
// 140 words of L1 and shared memory (samples 65, stores 14, windows along x 60) and 490 instructions (squares
// and y 250, x and z 190, minimum and mean 50); the descriptors, their comparison and dL/dD 150 more. At
// 256^3 some 0.32 ms an image for the mean of V, 0.85 ms for the loss with a gradient.
template <class T, bool kSsc, int kRadius>
__global__ void __launch_bounds__(2 * kMindVoxels, sizeof(arithmetic_t<T>) == 8 ? 1 : 2)
    mind_tile_kernel(const __grid_constant__ MindTileArgs<arithmetic_t<T>> t) {
  using A = arithmetic_t<T>;
  using Squares = MindSquares<T, kSsc, kRadius>;
  constexpr int kChannels = kSsc ? 12 : 6, kWidth = Squares::kWidth, kBuffer = kChannels * kTileY * kWidth;
  const MindArgs& a = t.a;
  const int images = a.images(), image = threadIdx.x / kMindVoxels, thread = threadIdx.x % kMindVoxels;
  FASTREG_DYNAMIC_SHARED(A, memory);
  const auto exchange = memory + 2 * images * kBuffer;  // (images, channels, voxels)
  const MindBlock block = mind_block(t);
  const T* in = static_cast<const T*>(a.image[image]) + block.n * a.c * a.size[0] * a.plane();
  const Squares squares(a, block, thread);
  const int x = thread % kTileX, y = thread / kTileX;
  MindVoxel<T> voxel{block.n, 0, int64_t(block.y + y) * a.size[2] + block.x + x,
                     block.y + y < a.size[1] && block.x + x < a.size[2], image};
  MindBounds<A> bounds{};
  if (a.task != MindTask::variance) bounds = mind_bounds<A>(a.mean[image][block.n]);
  const auto other = [&](const A(&e)[kChannels], A(&o)[kChannels]) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) exchange[(image * kChannels + k) * kMindVoxels + thread] = e[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChannels; ++k) o[k] = exchange[((1 - image) * kChannels + k) * kMindVoxels + thread];
  };
  MindColumns<A, kChannels, kRadius> columns;
  double sum = 0;
#pragma unroll 1
  for (int p = block.begin - kRadius; p < block.end + kRadius; ++p) {
    const bool there = p >= 0 && p < a.size[0];
    const auto buffer = memory + (2 * image + (p & 1)) * kBuffer;
    if (there && thread < Squares::kJobs) squares.plane(t, in, p, buffer);
    __syncthreads();
    A weights[2 * kRadius + 1], d[kChannels];
    plane_weights<kRadius>(t, p, false, weights);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      A plane = 0;
      if (there) {
        const auto row = buffer + ((mind_slot(kSsc, k) * kTileY + y) * kWidth + x);
#pragma unroll
        for (int j = 0; j <= 2 * kRadius; ++j) plane += t.window[j] * A(row[j]);
      }
      d[k] = columns.add(k, plane, weights) * t.scale;
    }
    voxel.z = p - kRadius;
    if (voxel.z >= block.begin) mind_at_voxel<T>(a, voxel, d, bounds, other, sum);
  }
  if (!a.sums) return;
  FASTREG_SHARED(double, scratch, 2 * kMindVoxels / 32);
  sum = images == 2 ? block_sum<2 * kMindVoxels>(sum, scratch) : block_sum<kMindVoxels>(sum, scratch);
  if (threadIdx.x == 0) a.sums[block.n * a.sums_stride + a.sums_first + block.in_sample] = sum;
}

// The way back from dL/dD of the planes around to what each voxel passes to its neighbours in the six
// directions. Work and layout as above with one image, the windows transposed: a sample gathers from the
// windows it is in, one at the border also for those outside. Bytes: 12 maps read, from L2 some 2.3 times, 6
// written: at 256^3 1.2 GB of DRAM, 0.4 ms at 3 TB/s. A voxel takes 115 words of L1 and shared memory, 0.26
// ms, and 350 instructions, 0.2 ms of issue.
template <class T, bool kSsc, int kRadius>
__global__ void __launch_bounds__(kMindVoxels, sizeof(arithmetic_t<T>) == 8 ? 2 : 4)
    mind_adjoint_kernel(const __grid_constant__ MindTileArgs<arithmetic_t<T>> t, int image) {
  using A = arithmetic_t<T>;
  constexpr int kChannels = kSsc ? 12 : 6, kEach = kChannels / 3, kSpan = kTileY + 2 * kRadius;
  constexpr int kWidth = kTileX + 2 * kRadius, kBuffer = kChannels * kTileY * kWidth;
  constexpr MindDirections kPairs = mind_directions(kSsc ? kSsc3 : kSix, kChannels);
  const MindArgs& a = t.a;
  const int height = a.size[1], width = a.size[2];
  const int64_t plane = a.plane(), volume = a.size[0] * plane;
  FASTREG_DYNAMIC_SHARED(A, memory);
  const MindBlock block = mind_block(t);

  const int group = threadIdx.x / kWidth, column = threadIdx.x % kWidth;
  const int column_x = block.x + column - kRadius;
  const bool column_inside = column_x >= 0 && column_x < width;

  const int x = threadIdx.x % kTileX, y = threadIdx.x / kTileX;
  const int at_x = block.x + x, at_y = block.y + y;
  const bool inside = at_y < height && at_x < width;
  A weights_x[2 * kRadius + 1];
#pragma unroll
  for (int j = 0; j <= 2 * kRadius; ++j) {
    const int from = at_x + j - kRadius;
    weights_x[j] = inside && from >= 0 && from < width
                       ? mind_patch_weight(t.window, t.cumulative, kRadius, at_x, from, width)
                       : A(0);
  }
  MindColumns<A, kChannels, kRadius> columns;
#pragma unroll 1
  for (int p = block.begin - kRadius; p < block.end + kRadius; ++p) {
    const bool there = p >= 0 && p < a.size[0];
    const auto buffer = memory + (p & 1) * kBuffer;
    if (there && group < 3) {
      const int top = block.y - kRadius + late_zero();
      const int64_t map = (block.n + late_zero()) * kChannels;
#pragma unroll 2
      for (int k = 0; k < kEach; ++k) {
        const int channel = group * kEach + k;
        const A* in = ring_plane<A>(a.adjoint[image], map + channel, p, plane) + column_x;
        A s[kSpan], sum[kTileY];
#pragma unroll
        for (int j = 0; j < kSpan; ++j)
          s[j] = column_inside && top + j >= 0 && top + j < height ? in[(top + j) * width] : A(0);
        row_windows<kRadius>(a.box, t.window, s, sum);
        if (top <= 0 || top + kTileY + kRadius >= height) {
#pragma unroll
          for (int i = 0; i < kTileY; ++i) {
            const int row = top + kRadius + i;
            if (row != 0 && row != height - 1) continue;
            sum[i] = 0;
#pragma unroll
            for (int j = 0; j <= 2 * kRadius; ++j) {
              const int from = row + j - kRadius;
              if (from >= 0 && from < height)
                sum[i] += mind_patch_weight(t.window, t.cumulative, kRadius, row, from, height) * s[i + j];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTileY; ++i) buffer[(channel * kTileY + i) * kWidth + column] = sum[i];
      }
    }
    __syncthreads();
    A weights[2 * kRadius + 1], b[kChannels];
    plane_weights<kRadius>(t, p, true, weights);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      A sum = 0;
      if (there) {
        const auto row = buffer + ((k * kTileY + y) * kWidth + x);
#pragma unroll
        for (int j = 0; j <= 2 * kRadius; ++j) sum += weights_x[j] * A(row[j]);
      }
      b[k] = columns.add(k, sum, weights) * (2 * t.scale);
    }
    const int z = p - kRadius;
    if (z < block.begin || !inside) continue;
    const int row = (at_y + late_zero()) * width, here = row + at_x;
    const auto row_of = [&](int step) { return clamp_index(at_y + step, height) * width + at_x; };
    const auto column_of = [&](int step) { return row + clamp_index(at_x + step, width); };
    // Those along z lie in planes of their own.
    const int neighbour[6] = {here,
                              here,
                              row_of(-a.dilation[1] + late_zero()),
                              row_of(a.dilation[1] + late_zero()),
                              column_of(-a.dilation[2] + late_zero()),
                              column_of(a.dilation[2] + late_zero())};
#pragma unroll 1
    for (int64_t c = 0; c < a.c; ++c) {
      const T* in = static_cast<const T*>(a.image[image]) + (block.n * a.c + c) * volume;
      A sample[7], passed[7] = {};
      sample[0] = load(in[z * plane + here]);
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        const int step = i == 0 ? -a.dilation[0] : i == 1 ? a.dilation[0] : 0;
        sample[i + 1] = load(in[clamp_index(z + step, a.size[0]) * plane + neighbour[i]]);
      }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const A v = b[k] * (sample[kPairs.a[k]] - sample[kPairs.b[k]]);
        passed[kPairs.a[k]] += v, passed[kPairs.b[k]] -= v;
      }
#pragma unroll
      for (int i = 0; i < 6; ++i)
        ring_plane<A>(a.spread[image], (block.n * a.c + c) * 6 + i, z, plane)[here] = passed[i + 1];
    }
  }
}

inline bool mind_has_tiles(const MindArgs& a) {
  return a.n_directions == 6 && a.radius[0] >= 1 && a.radius[0] <= 3 && a.plane() < (int64_t(1) << 31);
}

// Weights of a patch along an axis in fp64: 1 where it is a box.
inline void mind_weights(const MindArgs& a, int radius, double* window) {
  double total = 0;
  for (int k = -radius; k <= radius; ++k)
    total += window[k + radius] = a.box ? 1 : std::exp(-0.5 * (k / a.sigma) * (k / a.sigma));
  for (int k = 0; !a.box && k <= 2 * radius; ++k) window[k] /= total;
}

// Planes [a.begin, a.end) in blocks. `room`: blocks the device holds at once; no more chunks than fill it, a
// chunk having 2 radius planes to run in. Shorter slabs have no more blocks than longer ones.
template <class A>
MindTileArgs<A> mind_tile_args(const MindArgs& a, int room) {
  MindTileArgs<A> t{};
  t.a = a;
  const int radius = a.radius[0], planes = a.end - a.begin;
  double window[7], running = 0;
  mind_weights(a, radius, window);
  for (int k = 0; k <= 2 * radius; ++k) t.window[k] = A(window[k]), t.cumulative[k] = A(running += window[k]);
  t.scale = a.box ? A(1.0 / ((2 * radius + 1) * (2 * radius + 1) * (2 * radius + 1))) : A(1);
  t.tiles_x = (a.size[2] + kTileX - 1) / kTileX, t.tiles_y = (a.size[1] + kTileY - 1) / kTileY;
  const int64_t columns = int64_t(t.tiles_x) * t.tiles_y * a.n;
  t.chunks = int(std::clamp<int64_t>(room / columns, 1, std::max(planes / (4 * radius), 1)));
  t.chunk = (planes + t.chunks - 1) / t.chunks;
  return t;
}

// call.template operator()<T, ssc, radius>().
template <class Call>
void with_mind_tile(Stored type, const MindArgs& a, Call call) {
  with_type(type, [&]<class T>() {
    const auto with_radius = [&]<bool kSsc>() {
      if (a.radius[0] == 1) call.template operator()<T, kSsc, 1>();
      if (a.radius[0] == 2) call.template operator()<T, kSsc, 2>();
      if (a.radius[0] == 3) call.template operator()<T, kSsc, 3>();
    };
    a.six ? with_radius.template operator()<false>() : with_radius.template operator()<true>();
  });
}

// Blocks of kMindVoxels threads that an H100 has room for at 128 registers a thread.
constexpr int kMindRoom = 4 * 132;

template <class A>
unsigned mind_tile_blocks(const MindTileArgs<A>& t) {
  return t.a.end > t.a.begin ? unsigned(t.tiles_x * t.tiles_y * t.chunks) : 0;
}

// Partial sums of a sample in a slab.
inline int64_t mind_tile_sums(const MindArgs& a) {
  return mind_tile_blocks(mind_tile_args<float>(a, kMindRoom / a.images()));
}

inline void mind_tile(Stored type, const MindArgs& a, cudaStream_t stream) {
  with_mind_tile(type, a, [&]<class T, bool kSsc, int kRadius>() {
    using A = arithmetic_t<T>;
    const auto t = mind_tile_args<A>(a, kMindRoom / a.images());
    const int channels = kSsc ? 12 : 6;
    const size_t values = a.images() * 2 * channels * kTileY * (kTileX + 2 * kRadius) +
                          (a.images() == 2 ? 2 * channels * kMindVoxels : 0);
    launch(mind_tile_kernel<T, kSsc, kRadius>, dim3(unsigned(mind_tile_blocks(t) * a.n)),
           a.images() * kMindVoxels, values * sizeof(A), stream, t);
  });
}

inline void mind_tile_adjoint(Stored type, const MindArgs& a, int image, cudaStream_t stream) {
  with_mind_tile(type, a, [&]<class T, bool kSsc, int kRadius>() {
    using A = arithmetic_t<T>;
    const auto t = mind_tile_args<A>(a, kMindRoom);
    const size_t values = 2 * (kSsc ? 12 : 6) * kTileY * (kTileX + 2 * kRadius);
    launch(mind_adjoint_kernel<T, kSsc, kRadius>, dim3(unsigned(mind_tile_blocks(t) * a.n)), kMindVoxels,
           values * sizeof(A), stream, t, image);
  });
}

}  // namespace fastreg
