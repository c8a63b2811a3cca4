#include "common/mind.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// 2D is a volume of one slice whose z axis has neither patch nor offsets.
struct MindArgs {
  const void* image[2];   // (n, c, *size): fixed and moved, or one image
  const double* mean[2];  // (n): mean of V
  const void* weight;     // (n, *size), arithmetic type, or null: of the voxels' errors
  bool is_mask;           // of the weight: what is not above 0 counts as 0
  const void* upstream;   // (n, n_channels, *size), as the image: gradient of the descriptors
  void* out;      // descriptors, (n, n_channels, *size), as the image; or a map (n, *size), arithmetic type
  void* grad[2];  // (n, c, *size), arithmetic type, zeros; or null
  double* sums;   // one partial sum per unit
  int64_t n, c, size[3];
  int64_t n_channels, radius[3], dilation[3];
  const MindPair* pairs;
  const double* weights;  // of the patch along an axis; null: a box
  bool six, absolute;
  int64_t tile[3], n_tiles[2];
};

enum class MindTask { variance, describe, describe_bwd, compare };

// The tiles (z, y) of a wave are those with z mod waves[0] == at[0], y mod waves[1] == at[1].
struct MindWave {
  int64_t waves[2], at[2], count[2];
};

// Work units are (n, tile z, tile y) of a wave.
FASTREG_KERNEL(void, mind_tiles, Stored, MindTask, const MindArgs&, const MindWave&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include "common/exp.h"
#include "cpu/mind_tile.h"

// Distances are made tile by tile: all channels of some 12 x 12 x 96 voxels and the image around them stay in
// cache, whatever the size of the volume, and nothing of them is kept. Along z and y a tile repeats the
// squared differences of `radius` rows on both sides; windows are sums over their samples, never subtractive.
// The loss reads each image twice: once for the mean of V, which bounds V, and once for the descriptors;
// errors, adjoints and the gradient follow while the tile is there. Bytes: reads each image twice, writes a
// gradient: 3 volumes or more, some 5 ms at 160^3. Arithmetic a voxel (ssc, radius 2, gradient to moved):
// distances 12 channels x some 15 operations x 4 (two images, two passes); 24 exponentials of 15; minima,
// means, error and adjoints 400; way back 12 channels x some 20: 1,700 in all, at 160^3 on two cores of two
// 8-lane units at 3 GHz 75 ms. Measured: three times that, loads and stores between the steps of a window
// being as many as its additions. Gradients of tiles overlap by radius + dilation voxels. Tiles run in waves
// whose tiles do not overlap, so that each voxel gets its terms in one order, whatever the threads.
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
        if (task != MindTask::variance) bounds[i] = bounds_of(a.mean[i][n]);
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

  static MindBounds<A> bounds_of(double mean) {
    const A tiny = std::numeric_limits<A>::min();
    // A NaN stays: it is not below tiny.
    const double lower = 1e-3 * mean, upper = 1e3 * mean;
    return {lower < tiny ? tiny : A(lower), upper < tiny ? tiny : A(upper), tiny};
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
    for (int64_t x = 0; x < at.width; x += kLanes<A>) {
      V d[kChannels];
      load_row(0, z, y, x, d);
      store_as<V>(map.data() + x, mind_variance<A>(d, mind_least(d), a.six));
    }
    double sum = 0;
    for (int64_t x = 0; x < at.size; ++x) sum += map[x];
    return sum;
  }

  static V exponential(V x) { return fast_exp(x); }

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
    const A* in = a.weight ? static_cast<const A*>(a.weight) + voxel(at, 0, 1) : nullptr;
    for (int64_t x = 0; x < at.size; ++x) weight[x] = !in ? A(1) : a.is_mask && in[x] < A(0) ? A(0) : in[x];
  }

  template <int kChannels>
  double compare(int64_t z, int64_t y, const Row& at) {
    load_weight(at);
    const V zero = {}, one = zero + A(1);
    V total = {};
    for (int64_t x = 0; x < at.width; x += kLanes<A>) {
      V d[kChannels], f[kChannels], m[kChannels], g[kChannels], error = {};
      load_row(0, z, y, x, d);
      const auto scale_f = mind_describe<A>(d, a.six, bounds[0], exponential, f);
      load_row(1, z, y, x, d);
      const auto scale_m = mind_describe<A>(d, a.six, bounds[1], exponential, m);
      const V w = load_as<V>(weight.data() + x);
      for (int k = 0; k < kChannels; ++k) {
        const V by = m[k] - f[k];
        if (a.absolute) {
          const V sign = by > zero ? one : by < zero ? -one : by;
          error += by * sign, g[k] = w * sign;
        } else {
          error += by * by, g[k] = (w + w) * by;
        }
        g[k] = w == zero ? zero : g[k];
      }
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

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// The options of the ops, and the arguments they make for an image.
struct Descriptor {
  int64_t radius, dilation;
  c10::string_view neighbourhood, patch;
  double sigma;
};

class Mind {
 public:
  Mind(const char* op_, const Tensor& image, const Descriptor& d) : op(op_) {
    const int64_t nd = image.dim() - 2;
    FASTREG_CHECK((nd == 2 || nd == 3) && image.size(1) > 0, op,
                  "images must have 2 or 3 spatial axes and a channel");
    FASTREG_CHECK(d.radius >= 0 && d.dilation >= 0, op, "radius and dilation must not be negative");
    a.n = image.size(0), a.c = image.size(1);
    a.size[0] = nd == 3 ? image.size(2) : 1, a.size[1] = image.size(nd), a.size[2] = image.size(nd + 1);
    a.six = d.neighbourhood == "six";
    a.n_channels = a.six ? 2 * nd : nd == 3 ? 12 : 4;
    a.pairs = a.six ? kSix + (nd == 2 ? 2 : 0) : nd == 3 ? kSsc3 : kSsc2;
    for (int i = nd == 3 ? 0 : 1; i < 3; ++i) {
      a.radius[i] = d.radius;
      // Longer offsets end at the border all the same.
      a.dilation[i] = std::min(d.dilation, std::max<int64_t>(a.size[i] - 1, 0));
    }
    if (d.patch == "gaussian") {
      double total = 0;
      for (int64_t k = -d.radius; k <= d.radius; ++k)
        weights.push_back(std::exp(-0.5 * (k / d.sigma) * (k / d.sigma))), total += weights.back();
      for (double& w : weights) w /= total;
      a.weights = weights.data();
    }
    // Large enough for what tiles repeat at their faces, small enough for the cache; rows in equal parts.
    const int64_t edge = d.radius <= 2 ? 12 : 16, parts = (a.size[2] + 95) / 96;
    a.tile[0] = nd == 3 ? edge : 1, a.tile[1] = nd == 3 ? edge : 64;
    a.tile[2] = ((a.size[2] + parts - 1) / std::max<int64_t>(parts, 1) + 7) / 8 * 8;
    for (int i = 0; i < 2; ++i) a.n_tiles[i] = (a.size[i] + a.tile[i] - 1) / a.tile[i];
    partial.resize(a.n * a.n_tiles[0] * a.n_tiles[1]);
  }

  void run(MindTask task, const Tensor& image) {
    a.sums = partial.data();
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
                         [&](int64_t b, int64_t e) { kernel(stored(image), task, a, w, b, e); });
      }
  }

  // Mean of V of each sample; NaN where it is not finite.
  Tensor mean_variance(const Tensor& image) {
    if (image.numel() == 0) return at::zeros({image.size(0)}, image.options().dtype(at::kDouble));
    a.image[0] = image.const_data_ptr();
    run(MindTask::variance, image);
    Tensor mean = sample_sums(partial, a.n, at::kDouble).div_(double(a.size[0] * a.size[1] * a.size[2]));
    return mean.masked_fill_(mean.isfinite().logical_not_(), std::numeric_limits<double>::quiet_NaN());
  }

  const char* op;
  MindArgs a{};
  std::vector<double> weights, partial;
};

Tensor mind_mean_variance_cpu(const Tensor& image, int64_t radius, int64_t dilation,
                              c10::string_view neighbourhood, c10::string_view patch, double sigma) {
  Tensor in = image.contiguous();
  return Mind("mind_mean_variance", in, {radius, dilation, neighbourhood, patch, sigma}).mean_variance(in);
}

Tensor mind_cpu(const Tensor& image, int64_t radius, int64_t dilation, c10::string_view neighbourhood,
                c10::string_view patch, double sigma) {
  Tensor in = image.contiguous();
  const Descriptor d{radius, dilation, neighbourhood, patch, sigma};
  Mind mind("mind", in, d);
  std::vector<int64_t> shape = in.sizes().vec();
  shape[1] = mind.a.n_channels;
  Tensor out = at::empty(shape, in.options());
  if (in.numel() == 0) return out;
  Tensor mean = Mind("mind", in, d).mean_variance(in);
  mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
  mind.a.out = out.mutable_data_ptr();
  mind.run(MindTask::describe, in);
  return out;
}

Tensor mind_bwd_cpu(const Tensor& grad, const Tensor& image, int64_t radius, int64_t dilation,
                    c10::string_view neighbourhood, c10::string_view patch, double sigma) {
  Tensor in = image.contiguous(), up = grad.to(in.scalar_type()).contiguous();
  const Descriptor d{radius, dilation, neighbourhood, patch, sigma};
  Mind mind("mind_bwd", in, d);
  std::vector<int64_t> shape = in.sizes().vec();
  shape[1] = mind.a.n_channels;
  FASTREG_CHECK(up.sizes() == at::IntArrayRef(shape), "mind_bwd",
                "grad must have the shape of the descriptors");
  Tensor out = at::zeros(in.sizes(), in.options().dtype(arithmetic_of(in)));
  if (in.numel() == 0) return out.to(in.scalar_type());
  Tensor mean = Mind("mind_bwd", in, d).mean_variance(in);
  mind.a.image[0] = in.const_data_ptr(), mind.a.mean[0] = mean.const_data_ptr<double>();
  mind.a.upstream = up.const_data_ptr(), mind.a.grad[0] = out.mutable_data_ptr();
  mind.run(MindTask::describe_bwd, in);
  return out.to(in.scalar_type());
}

struct Result {
  Tensor sums, map, grad[2];
};

Result compare(const char* op, const Tensor& fixed_, const Tensor& moved_, const Optional& fixed_variance,
               const Optional& weight_, bool is_mask, const Descriptor& d, c10::string_view norm,
               bool want_map, bool need_fixed, bool need_moved) {
  Tensor image[2] = {fixed_.contiguous(), moved_.contiguous()}, mean[2], weight;
  const bool need[2] = {need_fixed, need_moved};
  FASTREG_CHECK(image[0].sizes() == image[1].sizes(), op, "fixed and moved must have one shape");
  FASTREG_CHECK(image[0].scalar_type() == image[1].scalar_type(), op, "fixed and moved must have one dtype");
  Mind mind(op, image[0], d);
  const auto arithmetic = image[0].options().dtype(arithmetic_of(image[0]));
  std::vector<int64_t> shape = image[0].sizes().vec();
  shape[1] = 1;
  if (weight_) {
    FASTREG_CHECK(weight_->sizes() == at::IntArrayRef(shape), op,
                  "mask and grad must have shape (N, 1, *spatial)");
    weight = weight_->to(arithmetic.dtype()).contiguous();
  }
  Result result;
  result.sums = at::zeros({shape[0]}, arithmetic);
  result.map = at::empty(want_map ? at::IntArrayRef(shape) : at::IntArrayRef{0}, arithmetic);
  for (int i = 0; i < 2; ++i)
    result.grad[i] = at::zeros(need[i] ? image[i].sizes() : at::IntArrayRef{0}, arithmetic);
  if (image[0].numel() == 0) return result;
  for (int i = 0; i < 2; ++i) {
    if (i == 0 && fixed_variance) {
      FASTREG_CHECK(fixed_variance->dim() == 1 && fixed_variance->size(0) == shape[0], op,
                    "fixed_variance must have shape (N,)");
      mean[i] = fixed_variance->to(at::kDouble).contiguous();
    } else {
      mean[i] = Mind(op, image[i], d).mean_variance(image[i]);
    }
    mind.a.image[i] = image[i].const_data_ptr(), mind.a.mean[i] = mean[i].const_data_ptr<double>();
    mind.a.grad[i] = need[i] ? result.grad[i].mutable_data_ptr() : nullptr;
  }
  mind.a.weight = weight.defined() ? weight.const_data_ptr() : nullptr, mind.a.is_mask = is_mask;
  mind.a.absolute = norm == "l1", mind.a.out = want_map ? result.map.mutable_data_ptr() : nullptr;
  mind.run(MindTask::compare, image[0]);
  result.sums = sample_sums(mind.partial, shape[0], arithmetic_of(image[0]));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> mind_loss_cpu(const Tensor& fixed, const Tensor& moved,
                                                 const Optional& fixed_variance, const Optional& mask,
                                                 int64_t radius, int64_t dilation,
                                                 c10::string_view neighbourhood, c10::string_view patch,
                                                 double sigma, c10::string_view norm, bool need_fixed,
                                                 bool need_moved) {
  Result r = compare("mind_loss", fixed, moved, fixed_variance, mask, true,
                     {radius, dilation, neighbourhood, patch, sigma}, norm, false, need_fixed, need_moved);
  return {r.sums, r.grad[0], r.grad[1]};
}

Tensor mind_map_cpu(const Tensor& fixed, const Tensor& moved, const Optional& fixed_variance, int64_t radius,
                    int64_t dilation, c10::string_view neighbourhood, c10::string_view patch, double sigma,
                    c10::string_view norm) {
  return compare("mind_map", fixed, moved, fixed_variance, std::nullopt, false,
                 {radius, dilation, neighbourhood, patch, sigma}, norm, true, false, false)
      .map;
}

std::tuple<Tensor, Tensor> mind_map_bwd_cpu(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                            const Optional& fixed_variance, int64_t radius, int64_t dilation,
                                            c10::string_view neighbourhood, c10::string_view patch,
                                            double sigma, c10::string_view norm, bool need_fixed,
                                            bool need_moved) {
  const int64_t nd = fixed.dim() - 2, channels = neighbourhood == "six" ? 2 * nd : nd == 3 ? 12 : 4;
  Result r = compare("mind_map_bwd", fixed, moved, fixed_variance, grad.div(double(channels)), false,
                     {radius, dilation, neighbourhood, patch, sigma}, norm, false, need_fixed, need_moved);
  return {r.grad[0].to(fixed.scalar_type()), r.grad[1].to(moved.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("mind", mind_cpu);
  m.impl("mind_bwd", mind_bwd_cpu);
  m.impl("mind_mean_variance", mind_mean_variance_cpu);
  m.impl("mind_loss", mind_loss_cpu);
  m.impl("mind_map", mind_map_cpu);
  m.impl("mind_map_bwd", mind_map_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
