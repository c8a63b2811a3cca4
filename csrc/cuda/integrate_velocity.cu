// integrate_velocity: scaling and squaring step by step; its kernels are in integrate_velocity.cuh.
#include "common/integrate_velocity_op.h"
#include "cuda/fixed_point_sums.h"
#include "cuda/integrate_velocity.cuh"

namespace fastreg {
namespace {

using at::Tensor;

// Fields of all samples and the kernels between them. A field is a contiguous tensor (N, *spatial, width), or
// one step of those kept: (N, steps - 1, *spatial, width) at [:, s].
class Integration : public IntegrateInputs {
 public:
  Integration(const char* op, const Device& device, const Tensor& v, int64_t steps, c10::string_view padding_)
      : IntegrateInputs(op, v, steps, padding_), stream_(device.stream()) {
    args_.grid = SamplingGrid(nd, samples, size, size);
    args_.grid.padding = padding;
    FASTREG_CHECK(args_.grid.blocks < (int64_t(1) << 31), op, "v has too many voxels");
  }

  Tensor kept(int64_t count) const { return at::empty(sizes_of_kept(count), packed_options); }
  Tensor packed() const {
    std::vector<int64_t> sizes = packed_sizes;
    sizes.insert(sizes.begin(), samples);
    return at::empty(sizes, packed_options);
  }

  Tensor pack(const Tensor& planar, double by) {
    Tensor out = packed();
    run(integrate_pack, planar, out, by, false);
    return out;
  }
  void unpack(const Tensor& field, const Tensor& planar) {
    run(integrate_unpack, field, planar, scale, false);
  }
  Tensor scaled(const Tensor& v) { return pack(v, scale); }
  void step(const Tensor& u, const Tensor& out, bool planar = false) {
    run(integrate_step, u, out, 1, planar);
  }
  Tensor step(const Tensor& u) {
    Tensor out = packed();
    step(u, out);
    return out;
  }

  Tensor step_bwd(const Tensor& u, const Tensor& grad) {
    const bool fixed = FixedPointSums::wanted();
    Tensor out = fixed ? packed() : packed().zero_();
    args_.grad = grad.const_data_ptr();
    std::optional<FixedPointSums> sums;
    if (fixed) sums.emplace(args_.fixed, grad, out, args_.grid.n_out, stream_);
    run(integrate_step_bwd, u, out, 1, false);
    if (sums) sums->settle();
    return out;
  }

 private:
  template <class Launcher>
  void run(Launcher launcher, const Tensor& from, const Tensor& to, double by, bool planar) {
    args_.from = from.const_data_ptr(), args_.to = to.mutable_data_ptr();
    args_.from_stride = from.stride(0), args_.to_stride = to.stride(0);
    args_.scale = by, args_.planar = planar;
    launcher(type, nd, args_, stream_);
  }

  IntegrateArgs args_{};
  cudaStream_t stream_;
};

std::tuple<Tensor, Tensor> integrate_velocity_cuda(const Tensor& velocity, int64_t steps,
                                                   c10::string_view padding, bool keep) {
  const Device device("integrate_velocity", velocity);
  Tensor v = velocity.contiguous();
  Integration run("integrate_velocity", device, v, steps, padding);
  Tensor fields = run.kept(keep ? std::max<int64_t>(steps - 1, 0) : 0);
  if (steps == 0 || v.numel() == 0) return {v.clone(at::MemoryFormat::Contiguous), fields};
  Tensor out = at::empty_like(v), u = run.scaled(v);
  for (int64_t s = 1; s < steps; ++s) {
    Tensor next = keep ? fields.select(1, s - 1) : run.packed();
    run.step(u, next);
    u = next;
  }
  run.step(u, out, true);
  return {out, fields};
}

Tensor integrate_velocity_bwd_cuda(const Tensor& grad, const Tensor& velocity, const Tensor& fields,
                                   int64_t steps, c10::string_view padding) {
  const Device device("integrate_velocity_bwd", velocity, grad, fields);
  Tensor v = velocity.contiguous(), g = grad.to(v.scalar_type()).contiguous();
  FASTREG_CHECK(g.sizes() == v.sizes(), "integrate_velocity_bwd", "grad must have the shape of v");
  if (steps == 0 || v.numel() == 0) return g.clone(at::MemoryFormat::Contiguous);
  Integration run("integrate_velocity_bwd", device, v, steps, padding);
  const bool kept = run.has_kept(fields, steps);
  const auto [every, last] = Checkpoints(steps, kept);
  std::vector<Tensor> u(steps);
  if (kept) {
    for (int64_t s = 1; s < steps; ++s) u[s] = fields.select(1, s - 1);
  } else if (last > 0) {
    u[0] = run.scaled(v);
    for (int64_t s = 1; s <= last; ++s) {
      u[s] = run.step(u[s - 1]);
      if (s == 1 || (s - 1) % every != 0) u[s - 1] = Tensor();
    }
  }
  Tensor flow = run.pack(g, 1);
  for (int64_t first = last; first >= 0; first -= every) {
    const int64_t stop = std::min(first + every, steps);
    if (first == 0) u[0] = run.scaled(v);
    for (int64_t s = first + 1; s < stop && !kept; ++s) u[s] = run.step(u[s - 1]);
    for (int64_t s = stop - 1; s >= first; --s) {
      flow = run.step_bwd(u[s], flow);
      u[s] = Tensor();
    }
  }
  Tensor out = at::empty_like(v);
  run.unpack(flow, out);
  return out;
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("integrate_velocity", integrate_velocity_cuda);
  m.impl("integrate_velocity_bwd", integrate_velocity_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
