// Bindings of lcc_loss; its kernels are in lcc_box.cpp and lcc_weighted.cpp.
#ifndef FASTREG_ISA

#include "common/lcc_loss_op.h"
#include "cpu/binding.h"
#include "cpu/lcc_args.h"

namespace fastreg {
namespace {

using at::Tensor;

constexpr int64_t kPlanes = 32;  // of a chunk; a multiple of the planes whose gradient is gathered at once

// One pass; units are slabs of planes.
void box(LccArgs& a, Stored type) {
  // Chunks of planes: thick, as each costs a seed; of an even number, for threads to share; at least 4 for
  // more than two threads where there are 40 planes.
  const int64_t D = a.size[0];
  a.n_chunks = std::max({(D + 2 * kPlanes - 1) / (2 * kPlanes) * 2, D < 40 ? 1 + (D >= 16) : int64_t(4)});
  // Enough slabs for every thread; each repeats the statistics of 2 radius planes, so none thinner than that.
  const int64_t units = std::max<int64_t>(a.n * a.c, 1);
  a.n_slabs = std::clamp<int64_t>((at::get_num_threads() + units - 1) / units, 1,
                                  std::max<int64_t>(D / std::max<int64_t>(2 * a.radius[0], 8), 1));
  a.n_slabs = std::min(a.n_slabs, a.n_chunks);
  auto kernel = FASTREG_PICK(lcc_slabs);
  at::parallel_for(0, a.n * a.c * a.n_slabs, 1, [&](int64_t b, int64_t e) { kernel(type, a, b, e); });
}

// Per channel, chunk by chunk: windows of the chunk's planes, then the gradient of the planes whose windows
// are done.
void weighted(LccArgs& a, Stored type, const LccTapList& taps) {
  static const double one[] = {1.0}, nothing_more[] = {1.0, 0.0};
  a.volume = a.least = 1.0;
  for (int k = 0; k < 3; ++k) {
    a.taps[k] = a.window[k] == 1
                    ? LccTaps{one, nothing_more, 1, 1.0}
                    : LccTaps{taps.tap.data(), taps.tail.data(), int64_t(taps.tap.size()), taps.total};
    a.radius[k] = std::min(a.taps[k].length, a.size[k]) - 1;
    a.volume *= a.taps[k].total, a.least *= a.taps[k].tap[0];
  }
  a.least *= 2.0;
  a.n_adjoints = lcc_adjoints(a);
  const int64_t D = a.size[0], plane = a.size[1] * a.size[2], runs = (plane + kLccRun - 1) / kLccRun;
  // Planes in pairs, which kernels may sum together.
  const int64_t chunk = a.n_adjoints ? std::max<int64_t>(kPlanes, 2 * at::get_num_threads()) : D;
  a.ring = std::min(chunk + 2 * a.radius[0], D);
  Tensor adjoints = empty_large({a.n_adjoints, a.ring * plane}, at::kDouble);
  a.adjoints = adjoints.mutable_data_ptr<double>();
  auto reference = FASTREG_PICK(lcc_weighted_reference);
  auto windows = FASTREG_PICK(lcc_weighted_windows);
  auto gradient = FASTREG_PICK(lcc_weighted_gradient);
  for (int64_t nc = 0; nc < a.n * a.c; ++nc) {
    reference(type, a, nc);
    for (int64_t z = 0, done = 0; z < D; z += chunk) {
      const int64_t end = std::min(z + chunk, D), last = end == D ? D : std::max(end - a.radius[0], done);
      at::parallel_for(z / 2, (end + 1) / 2, 1,
                       [&](int64_t b, int64_t e) { windows(type, a, nc, 2 * b, std::min(2 * e, end)); });
      if (a.n_adjoints)
        at::parallel_for(0, runs, 1, [&](int64_t b, int64_t e) { gradient(type, a, nc, done, last, b, e); });
      done = last;
    }
  }
}

LccResult run(const char* op, const Tensor& fixed, const Tensor& moved, const OptionalTensor& mask,
              const OptionalTensor& upstream, const LccOptions& o, const LccWanted& want) {
  const LccInputs in(op, fixed, moved, mask, upstream, o);
  LccArgs a{};
  LccResult out = in.begin(a, o, want);
  if (fixed.numel() == 0) return out;
  a.rule.tau = 0x1p-42;
  a.volume = 1, a.least = 2;
  for (int k = 0; k < 3; ++k) {
    // Axes (z, y, x) of the march; in 2D (y, -, x).
    const int64_t axis = in.nd == 3 ? k + 2 : k == 0 ? 2 : k == 2 ? 3 : -1;
    a.size[k] = axis < 0 ? 1 : fixed.size(axis);
    a.window[k] = axis < 0 ? 1 : o.window;
    a.radius[k] = a.window[k] / 2;
    a.volume *= double(a.window[k]);
  }
  const Stored type = stored(fixed);
  std::vector<double> sums(a.n * a.c * a.size[0]);
  a.sums = sums.data();
  o.kind() == Window::box ? box(a, type) : weighted(a, type, in.taps(o));
  // Channel by channel, each added up plane by plane.
  out.sums = sample_sums(sums, a.n * a.c, at::kDouble).view({a.n, a.c}).sum(1).to(in.arithmetic.dtype());
  return out;
}

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("lcc_loss", lcc_loss<run>);
  m.impl("lcc_map", lcc_map<run>);
  m.impl("lcc_map_bwd", lcc_map_bwd<run>);
}

}  // namespace
}  // namespace fastreg

#endif
