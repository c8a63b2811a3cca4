#pragma once
// The ops of warp and compose around their kernels, on any device.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/tensor.h"

namespace fastreg {

// What a call reads, alive as long as pointers to it are used.
struct WarpInputs {
  const char* op;
  at::Tensor image, displacement, affine;  // those that are not there stay undefined
  int nd;
  bool nearest, compose = false;
  Padding padding;
  Stored type;
  std::vector<int64_t> out_sizes;
  int64_t n, c, in[3], out[3];  // D, H, W of the image and of the result; 2D: D = 1

  WarpInputs(const char* name, const at::Tensor& given_image, const OptionalTensor& given_displacement,
             const OptionalTensor& given_affine, c10::string_view mode, c10::string_view padding_)
      : op(name), nd(int(given_image.dim()) - 2), nearest(mode == "nearest"), padding(padding_of(padding_)) {
    FASTREG_CHECK(nd == 2 || nd == 3, op, "image must have 2 or 3 spatial axes");
    FASTREG_CHECK(given_displacement || given_affine, op, "displacement must be given without an affine");
    // A displacement never loses precision: fp64 displacements lift the image to fp64.
    const bool lift = given_displacement && given_displacement->scalar_type() == at::kDouble;
    image = (lift ? given_image.to(at::kDouble) : given_image).contiguous();
    type = stored(image);
    n = image.size(0), c = image.size(1);
    out_sizes = image.sizes().vec();
    if (given_displacement) {
      displacement = given_displacement->to(arithmetic_of(image)).contiguous();
      FASTREG_CHECK(displacement.dim() == nd + 2 && displacement.size(1) == nd, op,
                    "displacement must have shape (N, nd, *spatial)");
      FASTREG_CHECK(displacement.size(0) == n, op, "image and displacement must have one batch size");
      std::copy(displacement.sizes().begin() + 2, displacement.sizes().end(), out_sizes.begin() + 2);
    }
    if (given_affine) {
      FASTREG_CHECK(given_affine->sizes() == at::IntArrayRef({n, nd, nd + 1}), op,
                    "affine must have shape (N, nd, nd + 1)");
      const at::Tensor finite = given_affine->isfinite().flatten(1).all(1).view({-1, 1, 1});
      affine = given_affine->to(at::kDouble)
                   .sub(at::eye(nd, nd + 1, image.options().dtype(at::kDouble)))
                   .masked_fill(finite.logical_not(), NAN)
                   .contiguous();
    }
    volume_size(op, image.sizes(), in), volume_size(op, out_sizes, out);
    FASTREG_CHECK((in[0] > 0 && in[1] > 0 && in[2] > 0) || n * out[0] * out[1] * out[2] == 0, op,
                  "image must not have an empty spatial axis");
    FASTREG_CHECK(in[1] * in[2] < (int64_t(1) << 32), op,
                  "a plane of image must be smaller than 2^32 voxels");
  }

  // v(x) + u(x + v(x)): u is the image. Stored in their wider type, displaced in its arithmetic type.
  static WarpInputs composition(const char* op, const at::Tensor& u, const at::Tensor& v,
                                c10::string_view padding) {
    FASTREG_CHECK(u.sizes() == v.sizes(), op, "v must have the shape of u");
    WarpInputs inputs(op, u.to(c10::promoteTypes(u.scalar_type(), v.scalar_type())), v, {}, "linear",
                      padding);
    inputs.compose = true;
    return inputs;
  }

  bool empty() const { return n * c * out[0] * out[1] * out[2] == 0; }
};

// Gradients in the arithmetic type, that to an affine in fp64. They must not share memory, those that were
// not asked for included: these are empty.
struct WarpGradients {
  at::Tensor upstream, image, displacement, affine;
  bool need_image, need_displacement, need_affine;
  bool positions;  // those to displacement and affine, if asked for, are to be computed; else they are zeros

  WarpGradients(const WarpInputs& in, const at::Tensor& grad, bool to_image, bool to_displacement,
                bool to_affine)
      : upstream(grad.to(in.image.scalar_type()).contiguous()),
        need_image(to_image),
        need_displacement(to_displacement),
        need_affine(to_affine),
        positions((to_displacement || to_affine) && !in.nearest && !in.empty()) {
    FASTREG_CHECK(upstream.sizes() == in.out_sizes, in.op, "grad must have the shape of the output");
    FASTREG_CHECK((in.displacement.defined() || !to_displacement) && (in.affine.defined() || !to_affine),
                  in.op, "a gradient must be to a tensor that is given");
    const auto options = in.image.options().dtype(arithmetic_of(in.image));
    image = at::zeros(to_image ? in.image.sizes() : at::IntArrayRef{0}, options);
    displacement = at::zeros({0}, options), affine = at::zeros({0}, options);
    if (to_displacement)
      displacement = positions ? at::empty_like(in.displacement) : at::zeros_like(in.displacement);
    if (to_affine) affine = at::zeros_like(in.affine);
  }
};

// A device's Call is made of WarpInputs: forward() returns the result in the type stored, backward(gradients)
// computes those asked for.
template <class Device, class Call>
at::Tensor warp(const at::Tensor& image, const OptionalTensor& displacement, const OptionalTensor& affine,
                c10::string_view mode, c10::string_view padding) {
  const Device device("warp", image, displacement, affine);
  return Call(device, {"warp", image, displacement, affine, mode, padding}).forward().to(image.scalar_type());
}

template <class Device, class Call>
std::tuple<at::Tensor, at::Tensor, at::Tensor> warp_bwd(const at::Tensor& grad, const at::Tensor& image,
                                                        const OptionalTensor& displacement,
                                                        const OptionalTensor& affine, c10::string_view mode,
                                                        c10::string_view padding, bool need_image,
                                                        bool need_displacement, bool need_affine) {
  const Device device("warp_bwd", image, grad, displacement, affine);
  Call call(device, {"warp_bwd", image, displacement, affine, mode, padding});
  WarpGradients g(call, grad, need_image, need_displacement, need_affine);
  call.backward(g);
  // What was not asked for is of grad's type.
  const auto typed = [&](const at::Tensor& result, bool needed, const OptionalTensor& t) {
    return result.to((needed ? *t : grad).scalar_type());
  };
  return {typed(g.image, need_image, image), typed(g.displacement, need_displacement, displacement),
          typed(g.affine, need_affine, affine)};
}

template <class Device, class Call>
at::Tensor compose(const at::Tensor& u, const at::Tensor& v, c10::string_view padding) {
  const Device device("compose", u, v);
  return Call(device, WarpInputs::composition("compose", u, v, padding)).forward();
}

template <class Device, class Call>
std::tuple<at::Tensor, at::Tensor> compose_bwd(const at::Tensor& grad, const at::Tensor& u,
                                               const at::Tensor& v, c10::string_view padding, bool need_u,
                                               bool need_v) {
  const Device device("compose_bwd", u, v, grad);
  Call call(device, WarpInputs::composition("compose_bwd", u, v, padding));
  WarpGradients g(call, grad, need_u, need_v, false);
  call.backward(g);
  return {g.image.to(u.scalar_type()), g.displacement.to(v.scalar_type())};
}

}  // namespace fastreg
