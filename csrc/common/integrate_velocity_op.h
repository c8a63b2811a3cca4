#pragma once
// Scaling and squaring around its kernels, on any device: sizes of the fields and which of them are kept.
#include <cmath>

#include "common/tensor.h"

namespace fastreg {

// Fields between the steps are packed: (*spatial, width) a sample, the components of a voxel side by side.
struct IntegrateInputs {
  int nd;
  Stored type;
  double scale;  // of the velocity
  Padding padding;
  int64_t samples, size[3];  // D, H, W; 2D: D = 1
  std::vector<int64_t> packed_sizes;
  at::TensorOptions packed_options;

  IntegrateInputs(const char* op, const at::Tensor& v, int64_t steps, c10::string_view padding_)
      : nd(int(v.dim()) - 2),
        type(stored(v)),
        scale(std::ldexp(1.0, -int(steps))),
        padding(padding_of(padding_)),
        packed_options(v.options().dtype(arithmetic_of(v))) {
    FASTREG_CHECK((nd == 2 || nd == 3) && v.size(1) == nd, op, "v must have shape (N, nd, *spatial)");
    FASTREG_CHECK(steps >= 0 && steps <= 64, op, "steps must be from 0 to 64");
    samples = v.size(0);
    volume_size(op, v.sizes(), size);
    FASTREG_CHECK(size[1] * size[2] < (int64_t(1) << 32), op,
                  "a plane of v must be smaller than 2^32 voxels");
    packed_sizes = v.sizes().slice(2).vec();
    packed_sizes.push_back(nd == 3 ? 4 : 2);
  }

  // (N, count, *spatial, width): the fields after the first `count` steps.
  std::vector<int64_t> sizes_of_kept(int64_t count) const {
    std::vector<int64_t> sizes{samples, count};
    sizes.insert(sizes.end(), packed_sizes.begin(), packed_sizes.end());
    return sizes;
  }

  // Whether the forward kept the fields, which a single step need not.
  bool has_kept(const at::Tensor& fields, int64_t steps) const {
    const bool kept = fields.size(1) > 0 || steps == 1;
    FASTREG_CHECK(!kept || (fields.sizes() == sizes_of_kept(steps - 1) && fields.is_contiguous() &&
                            fields.scalar_type() == packed_options.dtype().toScalarType()),
                  "integrate_velocity_bwd", "fields must be those of the forward");
    return kept;
  }
};

// Without kept fields those of every sqrt(steps)-th step are computed first, then, from the last to the
// first, those between.
struct Checkpoints {
  int64_t every, last;

  Checkpoints(int64_t steps, bool kept)
      : every(kept ? 1 : int64_t(std::ceil(std::sqrt(double(steps))))), last((steps - 1) / every * every) {}
};

}  // namespace fastreg
