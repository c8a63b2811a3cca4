#pragma once
// invert_displacement around its kernels, on any device.
#include "common/tensor.h"

namespace fastreg {

// What a call reads, alive as long as pointers to it are used. Without points there is one at every voxel.
struct InvertInputs {
  int nd;
  Stored type;                // of u; with fp64 points u is fp64 too
  at::Tensor u, points;       // points stay undefined where there are none
  at::TensorOptions options;  // arithmetic type: of points, v, grad and what is returned
  Padding padding;
  int64_t n, in[3], out[3];    // D, H, W of u and of the points; 2D: D = 1
  std::vector<int64_t> sizes;  // of what is returned: (n, nd, *out)

  InvertInputs(const char* op, const at::Tensor& given, const OptionalTensor& at, c10::string_view padding_)
      : nd(int(given.dim()) - 2), padding(padding_of(padding_)) {
    FASTREG_CHECK((nd == 2 || nd == 3) && given.size(1) == nd, op, "u must have shape (N, nd, *spatial)");
    const bool lift = at && at->scalar_type() == at::kDouble;
    u = (lift ? given.to(at::kDouble) : given).contiguous();
    type = stored(u), options = u.options().dtype(arithmetic_of(u));
    n = u.size(0), sizes = u.sizes().vec();
    if (at) {
      points = at->to(options).contiguous();
      FASTREG_CHECK(points.dim() == nd + 2 && points.size(0) == n && points.size(1) == nd, op,
                    "points must have shape (N, nd, *spatial)");
      sizes = points.sizes().vec();
    }
    volume_size(op, u.sizes(), in), volume_size(op, sizes, out);
    FASTREG_CHECK((in[0] > 0 && in[1] > 0 && in[2] > 0) || empty(), op,
                  "u must not have an empty spatial axis");
    FASTREG_CHECK(in[1] * in[2] < (int64_t(1) << 32), op, "a plane of u must be smaller than 2^32 voxels");
  }

  bool empty() const { return n * out[0] * out[1] * out[2] == 0; }

  // Of the size and type of what is returned.
  at::Tensor fitting(const char* op, const char* name, const at::Tensor& t) const {
    FASTREG_CHECK(t.sizes() == sizes, op, name, " must have the shape of what is returned");
    return t.to(options).contiguous();
  }
};

// A device's Call is made of InvertInputs: invert(iterations, v) and adjoint(grad, v, q) fill their last.
template <class Device, class Call>
at::Tensor invert_displacement(const at::Tensor& u, const OptionalTensor& points, c10::string_view padding,
                               int64_t iterations) {
  const Device device("invert_displacement", u, points);
  Call call(device, {"invert_displacement", u, points, padding});
  at::Tensor v = at::empty(call.sizes, call.options);
  if (!call.empty()) call.invert(iterations, v);
  return v;
}

template <class Device, class Call>
at::Tensor invert_displacement_adjoint(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& u,
                                       const OptionalTensor& points, c10::string_view padding) {
  const char* op = "invert_displacement_adjoint";
  const Device device(op, grad, v, u, points);
  Call call(device, {op, u, points, padding});
  at::Tensor q = at::empty(call.sizes, call.options);
  const at::Tensor g = call.fitting(op, "grad", grad), at = call.fitting(op, "v", v);
  if (!call.empty()) call.adjoint(g, at, q);
  return q;
}

}  // namespace fastreg
