// mind, mind_loss: MIND descriptors, their distance in one pass, and the gradients of both.
#include "common/mind.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice whose z axis has neither patch nor offsets.
struct MindArgs : MindCall {  // one sum per unit; gradients in the arithmetic type, zeros
  int64_t size[3], n_channels, radius[3], dilation[3];
  const MindPair* pairs;
  const double* weights;  // of the patch along an axis; null: a box
  int64_t tile[3], n_tiles[2];
};

// The tiles (z, y) of a wave are those with z mod waves[0] == at[0], y mod waves[1] == at[1].
struct MindWave {
  int64_t waves[2], at[2], count[2];
};

// Work units are (n, tile z, tile y) of a wave.
FASTREG_KERNEL(void, mind_tiles, Stored, MindTask, const MindArgs&, const MindWave&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <limits>

#include "common/exp.h"
#include "cpu/mind_tile.h"

// Distances are made tile by tile: all channels of some 12 x 12 x 160 voxels and the image around them stay
// in cache, whatever the size of the volume, and nothing of them is kept. Along z and y a tile repeats the
// squared differences of `radius` rows on both sides; windows are sums over their samples, never subtractive.
// Where no patch leaves the image along z and y, channels of one difference share its squares and their sums
// along z and y, 0.6 of the work for "ssc"; the same additions in the same order as elsewhere. Columns are
// each channel's own, for patches repeat the border where the channel lies.
// The loss reads each image twice: once for the mean of V, which bounds V, and once for the descriptors;
// errors, adjoints and the gradient follow while the tile is there. Bytes: reads each image twice, writes a
// gradient: 3 volumes or more, some 5 ms at 160^3. Arithmetic a voxel (ssc, radius 2, gradient to moved):
// distances 12 channels x some 12 operations x 4 (two images, two passes), 0.6 of it where shared; 24
// exponentials of 20; minima, means, error and adjoints 350; way back 12 channels x some 15: 1,400 in all,
// 160^3 in 55 ms of a core of two 16-lane units at 3.3 GHz, 110 ms where they have 8. Measured with 16: 245
// ms, a quarter of it descriptors, errors and adjoints, an eighth copies of the image, which surround a tile
// with 1.8 times its voxels; distances of two images (2.4 MB a tile) are more than L2 holds. Longer rows
// cost less of both and more cache: 80 voxels a row 10 ms more. The pass for the mean is a quarter of the
// time. To do without it, tiles none of whose voxels meets a bound need the mean only afterwards; but air
// meets the lower one, in 3 of 4 tiles of a brain and in all of lung CT, and those would be made twice all
// the same.
// Gradients of tiles overlap by radius + dilation voxels. Tiles run in waves whose tiles do not overlap, so
// that each voxel gets its terms in one order, whatever the threads.
namespace fastreg::FASTREG_ISA {
namespace {

template <class A>
class Tiles {
  using V = Vector<A>;

 public:
  Tiles(Stored type_, const MindArgs& args)
      : type(type_), a(args), tile{MindTile<A>(args), MindTile<A>(args)} {}

  template <int kChannels>
  void run(MindTask task, int64_t n, int64_t tz, int64_t ty) {
    const int64_t index = (n * a.n_tiles[0] + tz) * a.n_tiles[1] + ty;
    double sum = 0;
    for (int64_t x = 0; x < a.size[2]; x += a.tile[2]) {
      Extent t{{tz * a.tile[0], ty * a.tile[1], x}, {}};
      for (int i = 0; i < 3; ++i) t.size[i] = std::min(a.tile[i], a.size[i] - t.begin[i]);
      const int images = task == MindTask::compare ? 2 : 1;
      for (int i = 0; i < images; ++i) {
        tile[i].load(type, a.image[i], n, t);
        if (task != MindTask::variance) bounds[i] = mind_bounds<A>(a.mean[i][n]);
      }
      const int64_t width = (t.size[2] + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
      weight.resize(width), map.resize(width);
      for (int64_t z = 0; z < t.size[0]; ++z)
        for (int64_t y = 0; y < t.size[1]; ++y) {
          const Row at{n, t.begin[0] + z, t.begin[1] + y, x, t.size[2], width};
          if (task == MindTask::variance) sum += variance<kChannels>(z, y, at);
          if (task == MindTask::describe) describe<kChannels>(z, y, at);
          if (task == MindTask::describe_bwd) describe_bwd<kChannels>(z, y, at);
          if (task == MindTask::compare) sum += compare<kChannels>(z, y, at);
        }
      for (int i = 0; i < images; ++i)
        if (a.grad[i]) tile[i].add_gradient(static_cast<A*>(a.grad[i]), n);
    }
    if (a.sums) a.sums[index] = sum;
  }

 private:
  struct Row {
    int64_t n, z, y, x, size, width;
  };

  int64_t voxel(const Row& r, int64_t k, int64_t channels) const {
    return (((r.n * channels + k) * a.size[0] + r.z) * a.size[1] + r.y) * a.size[2] + r.x;
  }

  template <int kChannels>
  void load_row(int image, int64_t z, int64_t y, int64_t x, V (&d)[kChannels]) {
    for (int k = 0; k < kChannels; ++k) d[k] = load_as<V>(tile[image].row(k, z, y) + x);
  }
  template <int kChannels>
  void store_row(int image, int64_t z, int64_t y, int64_t x, const V (&d)[kChannels]) {
    for (int k = 0; k < kChannels; ++k) store_as<V>(tile[image].row(k, z, y) + x, d[k]);
  }

  template <int kChannels>
  double variance(int64_t z, int64_t y, const Row& at) {
    V sum = {};
    int64_t x = 0;
    const auto next = [&] {
      V d[kChannels];
      load_row(0, z, y, x, d);
      return mind_variance<A>(d, mind_least(d), a.six);
    };
    for (; x + kLanes<A> <= at.size; x += kLanes<A>) sum += next();
    double total = lane_sum<A>(sum);
    if (x < at.size) {
      store_as<V>(map.data(), next());
      for (int64_t i = 0; x + i < at.size; ++i) total += map[i];
    }
    return total;
  }

  // All channels have one scale, which turns to base 2 once for them all.
  static V exponential(V x, V scale) {
    if constexpr (sizeof(A) == 8)
      return lane_by_lane<std::exp>(x * scale);
    else
      return fast_exp2(x * (scale * A(1.442695041)));
  }

  template <int kChannels>
  void describe(int64_t z, int64_t y, const Row& at) {
    for (int64_t x = 0; x < at.width; x += kLanes<A>) {
      V d[kChannels], e[kChannels];
      load_row(0, z, y, x, d);
      mind_describe<A>(d, a.six, bounds[0], exponential, e);
      store_row(0, z, y, x, e);
    }
    with_type(type, [&]<class T>() {
      if constexpr (std::is_same_v<arithmetic_t<T>, A>)
        for (int k = 0; k < kChannels; ++k) {
          T* out = static_cast<T*>(a.out) + voxel(at, k, kChannels);
          const A* in = tile[0].row(k, z, y);
          cover_x<A>(0, at.size, [&](auto v, int64_t x) {
            store_as<decltype(v)>(out + x, load_as<decltype(v)>(in + x));
          });
        }
    });
  }

  template <int kChannels>
  void describe_bwd(int64_t z, int64_t y, const Row& at) {
    up.assign(kChannels * at.width, A(0));
    with_type(type, [&]<class T>() {
      if constexpr (std::is_same_v<arithmetic_t<T>, A>)
        for (int k = 0; k < kChannels; ++k) {
          const T* in = static_cast<const T*>(a.upstream) + voxel(at, k, kChannels);
          for (int64_t x = 0; x < at.size; ++x) up[k * at.width + x] = fastreg::load(in[x]);
        }
    });
    for (int64_t x = 0; x < at.width; x += kLanes<A>) {
      V d[kChannels], e[kChannels], g[kChannels];
      load_row(0, z, y, x, d);
      const auto m = mind_describe<A>(d, a.six, bounds[0], exponential, e);
      for (int k = 0; k < kChannels; ++k) g[k] = load_as<V>(up.data() + k * at.width + x);
      mind_adjoint<A>(d, e, a.six, m, g);
      store_row(0, z, y, x, g);
    }
  }

  void load_weight(const Row& at) {
    std::fill(weight.begin(), weight.end(), A(0));
    if (!a.weight) {
      std::fill_n(weight.begin(), at.size, A(1));
      return;
    }
    const A* __restrict in = static_cast<const A*>(a.weight) + voxel(at, 0, 1);
    const A least = a.is_mask ? A(0) : -std::numeric_limits<A>::infinity();
    A* __restrict out = weight.data();
    for (int64_t x = 0; x < at.size; ++x) out[x] = in[x] < least ? least : in[x];
  }

  template <int kChannels>
  double compare(int64_t z, int64_t y, const Row& at) {
    load_weight(at);
    const V zero = {};
    V total = {};
    for (int64_t x = 0; x < at.width; x += kLanes<A>) {
      V d[kChannels], f[kChannels], m[kChannels], g[kChannels], error;
      load_row(0, z, y, x, d);
      const auto scale_f = mind_describe<A>(d, a.six, bounds[0], exponential, f);
      load_row(1, z, y, x, d);
      const auto scale_m = mind_describe<A>(d, a.six, bounds[1], exponential, m);
      const V w = load_as<V>(weight.data() + x);
      for (int k = 0; k < kChannels; ++k) g[k] = m[k] - f[k];
      mind_error(a.absolute, w, g, error);
      total += w == zero ? zero : w * error;
      store_as<V>(map.data() + x, error * (A(1) / kChannels));
      if (a.grad[1]) {
        V adjoint[kChannels];
        for (int k = 0; k < kChannels; ++k) adjoint[k] = g[k];
        mind_adjoint<A>(d, m, a.six, scale_m, adjoint);
        store_row(1, z, y, x, adjoint);
      }
      if (a.grad[0]) {
        load_row(0, z, y, x, d);
        for (int k = 0; k < kChannels; ++k) g[k] = -g[k];
        mind_adjoint<A>(d, f, a.six, scale_f, g);
        store_row(0, z, y, x, g);
      }
    }
    if (a.out) std::copy_n(map.data(), at.size, static_cast<A*>(a.out) + voxel(at, 0, 1));
    return lane_sum<A>(total);
  }

  const Stored type;
  const MindArgs& a;
  MindTile<A> tile[2];
  MindBounds<A> bounds[2];
  std::vector<A> weight, map, up;
};

template <class A>
void tiles(Stored type, MindTask task, const MindArgs& a, const MindWave& w, int64_t begin, int64_t end) {
  Tiles<A> t(type, a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t ty = unit % w.count[1], tz = unit / w.count[1] % w.count[0],
                  n = unit / w.count[1] / w.count[0];
    const int64_t z = tz * w.waves[0] + w.at[0], y = ty * w.waves[1] + w.at[1];
    if (a.n_channels == 12)
      t.template run<12>(task, n, z, y);
    else if (a.n_channels == 6)
      t.template run<6>(task, n, z, y);
    else
      t.template run<4>(task, n, z, y);
  }
}

}  // namespace

void mind_tiles(Stored type, MindTask task, const MindArgs& a, const MindWave& w, int64_t b, int64_t e) {
  type == Stored::f64 ? tiles<double>(type, task, a, w, b, e) : tiles<float>(type, task, a, w, b, e);
}

}  // namespace fastreg::FASTREG_ISA

#else

#include "common/mind_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

// The arguments that options and an image make, and how tiles are shared among threads.
class Mind {
 public:
  Mind(const Device&, const char* op, const Tensor& image, const MindOptions& o) : type_(stored(image)) {
    check_mind(op, image, o);
    const int64_t nd = image.dim() - 2;
    a.n = image.size(0), a.c = image.size(1);
    a.size[0] = nd == 3 ? image.size(2) : 1, a.size[1] = image.size(nd), a.size[2] = image.size(nd + 1);
    a.six = o.six();
    a.n_channels = mind_channels(a.six, nd);
    a.pairs = mind_pairs(a.six, nd);
    for (int i = nd == 3 ? 0 : 1; i < 3; ++i) {
      a.radius[i] = o.radius;
      // Longer offsets end at the border all the same.
      a.dilation[i] = std::min(o.dilation, std::max<int64_t>(a.size[i] - 1, 0));
    }
    if (o.patch == "gaussian") {
      double total = 0;
      for (int64_t k = -o.radius; k <= o.radius; ++k)
        weights_.push_back(std::exp(-0.5 * (k / o.sigma) * (k / o.sigma))), total += weights_.back();
      for (double& w : weights_) w /= total;
    }
    // Large enough for what tiles repeat at their faces, small enough for the cache; rows in equal parts.
    const int64_t edge = o.radius <= 2 ? 12 : 16, parts = (a.size[2] + 159) / 160;
    a.tile[0] = nd == 3 ? edge : 1, a.tile[1] = nd == 3 ? edge : 64;
    a.tile[2] = ((a.size[2] + parts - 1) / std::max<int64_t>(parts, 1) + 7) / 8 * 8;
    for (int i = 0; i < 2; ++i) a.n_tiles[i] = (a.size[i] + a.tile[i] - 1) / a.tile[i];
    partial_.resize(a.n * a.n_tiles[0] * a.n_tiles[1]);
  }

  // Partial sums come with any task.
  void run(MindTask task, bool) {
    a.sums = partial_.data();
    a.weights = weights_.empty() ? nullptr : weights_.data();
    MindWave w{{1, 1}, {}, {}};
    if (a.grad[0] || a.grad[1])
      for (int i = 0; i < 2; ++i) {
        const int64_t halo = a.radius[i] + a.dilation[i];
        w.waves[i] =
            std::min((a.tile[i] + 2 * halo + a.tile[i] - 1) / a.tile[i], std::max<int64_t>(a.n_tiles[i], 1));
      }
    auto kernel = FASTREG_PICK(mind_tiles);
    for (w.at[0] = 0; w.at[0] < w.waves[0]; ++w.at[0])
      for (w.at[1] = 0; w.at[1] < w.waves[1]; ++w.at[1]) {
        for (int i = 0; i < 2; ++i) w.count[i] = (a.n_tiles[i] - w.at[i] + w.waves[i] - 1) / w.waves[i];
        at::parallel_for(0, a.n * w.count[0] * w.count[1], 1,
                         [&](int64_t b, int64_t e) { kernel(type_, task, a, w, b, e); });
      }
  }

  Tensor total() const { return sample_sums(partial_, a.n, at::kDouble); }

  Tensor mean_variance(const Tensor& image) const {
    if (image.numel() == 0) return at::zeros({image.size(0)}, at::kDouble);
    Mind call = *this;
    call.a.grad[0] = call.a.grad[1] = nullptr;
    call.a.image[0] = image.const_data_ptr();
    call.run(MindTask::variance, true);
    Tensor mean = call.total().div_(double(a.size[0] * a.size[1] * a.size[2]));
    return mean.masked_fill_(mean.isfinite().logical_not_(), std::numeric_limits<double>::quiet_NaN());
  }

  // Tiles add to it in the arithmetic type.
  Tensor new_gradient(const Tensor& image, at::ScalarType) const {
    return at::zeros(image.sizes(), image.options().dtype(arithmetic_of(image)));
  }

  MindArgs a{};

 private:
  Stored type_;
  std::vector<double> weights_, partial_;
};

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("mind", mind<Device, Mind>);
  m.impl("mind_bwd", mind_bwd<Device, Mind>);
  m.impl("mind_mean_variance", mind_mean_variance<Device, Mind>);
  m.impl("mind_loss", mind_loss<Device, Mind>);
  m.impl("mind_map", mind_map<Device, Mind>);
  m.impl("mind_map_bwd", mind_map_bwd<Device, Mind>);
}

}  // namespace
}  // namespace fastreg

#endif
