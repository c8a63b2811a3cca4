#include <ATen/Context.h>

#include "cuda/binding.h"
#include "cuda/warp_bwd.cuh"

namespace fastreg {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of a call as the kernels read them, alive as long as their pointers are used, and what the
// kernels are told.
struct Call {
  Tensor image, displacement, affine;  // those that are not there stay undefined
  std::vector<int64_t> out_sizes;
  WarpArgs args{};
  int nd = 0;
  Stored type{};

  Call(const Tensor& given_image, const OptionalTensor& given_displacement,
       const OptionalTensor& given_affine) {
    nd = int(given_image.dim()) - 2;
    FASTREG_CHECK(nd == 2 || nd == 3, "warp", "image must have 2 or 3 spatial axes");
    FASTREG_CHECK(given_displacement || given_affine, "warp", "displacement must be given without an affine");
    // A displacement never loses precision: fp64 displacements lift the image to fp64.
    const bool lift = given_displacement && given_displacement->scalar_type() == at::kDouble;
    image = (lift ? given_image.to(at::kDouble) : given_image).contiguous();
    type = stored(image);
    out_sizes = image.sizes().vec();
    args.image = image.const_data_ptr();
    args.n = image.size(0), args.c = image.size(1);
    if (given_displacement) {
      displacement = given_displacement->to(arithmetic_of(image)).contiguous();
      FASTREG_CHECK(displacement.dim() == nd + 2 && displacement.size(1) == nd, "warp",
                    "displacement must have shape (N, nd, *spatial)");
      FASTREG_CHECK(displacement.size(0) == args.n, "warp",
                    "image and displacement must have one batch size");
      std::copy(displacement.sizes().begin() + 2, displacement.sizes().end(), out_sizes.begin() + 2);
      args.displacement = displacement.const_data_ptr();
    }
    if (given_affine) {
      FASTREG_CHECK(given_affine->dim() == 3 && given_affine->size(0) == args.n &&
                        given_affine->size(1) == nd && given_affine->size(2) == nd + 1,
                    "warp", "affine must have shape (N, nd, nd + 1)");
      Tensor finite = given_affine->isfinite().flatten(1).all(1).view({-1, 1, 1});
      affine = given_affine->to(at::kDouble)
                   .sub(at::eye(nd, nd + 1, image.options().dtype(at::kDouble)))
                   .masked_fill(finite.logical_not(), NAN)
                   .contiguous();
      args.affine = affine.const_data_ptr<double>();
    }
    int64_t in[3], out[3];
    for (int k = 0; k < 3; ++k) {
      in[k] = k < 3 - nd ? 1 : image.size(k + nd - 1);
      out[k] = k < 3 - nd ? 1 : out_sizes[k + nd - 1];
      FASTREG_CHECK(in[k] < (1 << 29) && out[k] < (1 << 29), "warp", "an axis must be shorter than 2^29");
    }
    args.grid = SamplingGrid(nd, args.n, in, out);
    FASTREG_CHECK((in[0] > 0 && in[1] > 0 && in[2] > 0) || args.n * args.grid.n_out == 0, "warp",
                  "image must not have an empty spatial axis");
    FASTREG_CHECK(in[1] * in[2] < (int64_t(1) << 32), "warp",
                  "a plane of image must be smaller than 2^32 voxels");
    FASTREG_CHECK(args.grid.blocks < (int64_t(1) << 31), "warp", "the displacement has too many voxels");
  }

  bool empty() const { return args.n * args.grid.n_out * args.c == 0; }

  Tensor forward(const Device& device) {
    Tensor out = at::empty(out_sizes, image.options());
    if (empty()) return out;
    args.result = out.mutable_data_ptr();
    warp_fwd(type, nd, args, device.stream());
    return out;
  }

  // The gradients that args has results for, `grad_image` (if defined) to zeros of the arithmetic type.
  void backward(const Device& device, const Tensor& grad, const Tensor& grad_image) {
    args.grad = grad.const_data_ptr();
    Tensor sums, largest;
    if (grad_image.defined()) {
      args.grad_image = grad_image.mutable_data_ptr();
      if (at::globalContext().deterministicAlgorithms()) {
        const auto words = image.options().dtype(at::kLong);
        sums = at::zeros({type == Stored::f64 ? kFixedWords<double> : kFixedWords<float>, grad_image.numel()},
                         words);
        largest = at::zeros({args.n}, words);
        args.fixed.sums = static_cast<Word*>(sums.mutable_data_ptr());
        args.fixed.largest = static_cast<Word*>(largest.mutable_data_ptr());
        args.fixed.next = grad_image.numel();
        while ((int64_t(1) << args.fixed.log2_terms) < args.grid.n_out) ++args.fixed.log2_terms;
        find_largest(type, args.grad, args.n, args.c * args.grid.n_out,
                     static_cast<Word*>(largest.mutable_data_ptr()), device.stream());
      }
    }
    warp_bwd(type, nd, args, device.stream());
    if (sums.defined())
      settle(type == Stored::f64, args.fixed, args.n, args.c * args.grid.n_in, args.grad_image,
             device.stream());
  }
};

Tensor warp_cuda(const Tensor& image, const OptionalTensor& displacement, const OptionalTensor& affine,
                 c10::string_view mode, c10::string_view padding) {
  const Device device("warp", image, displacement, affine);
  Call call(image, displacement, affine);
  call.args.grid.padding = padding_of(padding), call.args.grid.nearest = mode == "nearest";
  return call.forward(device).to(image.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> warp_bwd_cuda(const Tensor& grad, const Tensor& image,
                                                 const OptionalTensor& displacement,
                                                 const OptionalTensor& affine, c10::string_view mode,
                                                 c10::string_view padding, bool need_image,
                                                 bool need_displacement, bool need_affine) {
  const Device device("warp_bwd", image, grad, displacement, affine);
  Call call(image, displacement, affine);
  call.args.grid.padding = padding_of(padding), call.args.grid.nearest = mode == "nearest";
  Tensor g = grad.to(call.image.scalar_type()).contiguous();
  FASTREG_CHECK(g.sizes() == call.out_sizes, "warp_bwd", "grad must have the shape of the output");
  FASTREG_CHECK((displacement || !need_displacement) && (affine || !need_affine), "warp_bwd",
                "a gradient must be to a tensor that is given");
  const auto options = call.image.options().dtype(arithmetic_of(call.image));
  const bool gather = (need_displacement || need_affine) && !call.args.grid.nearest && !call.empty();
  // Results must not share memory, those that were not asked for included.
  Tensor grad_u = at::zeros({0}, options), grad_affine = at::zeros({0}, options), affine_sums;
  if (need_displacement)
    grad_u = gather ? at::empty_like(call.displacement) : at::zeros_like(call.displacement);
  if (need_affine) grad_affine = at::zeros_like(call.affine);
  Tensor grad_image = at::zeros(need_image ? image.sizes() : at::IntArrayRef{0}, options);
  if (gather && need_displacement) call.args.grad_displacement = grad_u.mutable_data_ptr();
  if (gather && need_affine) {
    affine_sums = at::empty({call.args.n, call.nd, call.nd + 1, call.args.grid.blocks / call.args.n},
                            options.dtype(at::kDouble));
    call.args.grad_affine = affine_sums.mutable_data_ptr<double>();
  }
  if (!call.empty() && (gather || need_image)) call.backward(device, g, need_image ? grad_image : Tensor());
  if (affine_sums.defined()) grad_affine = affine_sums.sum(-1);
  // What was not asked for is empty, of grad's type.
  const auto type_of = [&](bool need, const OptionalTensor& t) { return (need ? *t : grad).scalar_type(); };
  return {grad_image.to(type_of(need_image, image)), grad_u.to(type_of(need_displacement, displacement)),
          grad_affine.to(type_of(need_affine, affine))};
}

// v(x) + u(x + v(x)): u is the image. Stored in their wider type, displaced in its arithmetic type.
Call composition(const Tensor& u, const Tensor& v, c10::string_view padding) {
  FASTREG_CHECK(u.sizes() == v.sizes(), "compose", "v must have the shape of u");
  Call call(u.to(c10::promoteTypes(u.scalar_type(), v.scalar_type())), v, {});
  call.args.grid.padding = padding_of(padding), call.args.compose = true;
  return call;
}

Tensor compose_cuda(const Tensor& u, const Tensor& v, c10::string_view padding) {
  const Device device("compose", u, v);
  return composition(u, v, padding).forward(device);
}

std::tuple<Tensor, Tensor> compose_bwd_cuda(const Tensor& grad, const Tensor& u, const Tensor& v,
                                            c10::string_view padding, bool need_u, bool need_v) {
  const Device device("compose_bwd", u, v, grad);
  Call call = composition(u, v, padding);
  Tensor g = grad.to(call.image.scalar_type()).contiguous();
  FASTREG_CHECK(g.sizes() == u.sizes(), "compose_bwd", "grad must have the shape of u");
  const auto options = call.displacement.options();
  Tensor grad_u = at::zeros(need_u ? u.sizes() : at::IntArrayRef{0}, options);
  Tensor grad_v = at::empty(need_v ? v.sizes() : at::IntArrayRef{0}, options);
  if (need_v) call.args.grad_displacement = grad_v.mutable_data_ptr();
  if (!call.empty() && (need_u || need_v)) call.backward(device, g, need_u ? grad_u : Tensor());
  return {grad_u.to(u.scalar_type()), grad_v.to(v.scalar_type())};
}

TORCH_LIBRARY_IMPL(fastreg, FASTREG_DEVICE_KEY, m) {
  m.impl("warp", warp_cuda);
  m.impl("warp_bwd", warp_bwd_cuda);
  m.impl("compose", compose_cuda);
  m.impl("compose_bwd", compose_bwd_cuda);
}

}  // namespace
}  // namespace fastreg
