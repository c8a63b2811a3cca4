#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

struct MseArgs {
  const void *fixed, *moved;      // (n, c, voxels)
  const void* mask;               // (n, 1, voxels), arithmetic type; or null
  const void* grad;               // backward: arithmetic type, (n), or (n, 1, voxels) where per_voxel
  void* result;                   // sum: double, one per block; map: (n, 1, voxels), arithmetic type
  void *grad_fixed, *grad_moved;  // backward: (n, c, voxels), or null
  int64_t c, voxels, n_blocks;    // blocks of kMseBlock voxels per sample
  bool per_voxel;
};

constexpr int64_t kMseBlock = 1024;

// Work units are blocks (n, block).
FASTREG_KERNEL(void, mse_fwd, Stored, const MseArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, mse_bwd, Stored, const MseArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

#include "common/mse_loss.h"
#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

struct Block {
  int64_t n, begin, count;
};

Block block_at(const MseArgs& a, int64_t index) {
  const int64_t begin = index % a.n_blocks * kMseBlock;
  return {index / a.n_blocks, begin, std::min(kMseBlock, a.voxels - begin)};
}

// Squared differences summed over channels, weighted, then written (map: mean over channels) or summed: one
// partial sum per block, added up in order by the caller, so the same bits whatever the thread count. Bytes:
// reads 2 volumes and the mask. Arithmetic: a subtraction and a multiply-add a value.
template <class T>
void fwd(const MseArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  alignas(64) A square[kMseBlock];
  for (int64_t index = begin; index < end; ++index) {
    const Block b = block_at(a, index);
    for (int64_t c = 0; c < a.c; ++c) {
      const int64_t at = (b.n * a.c + c) * a.voxels + b.begin;
      const T *fixed = static_cast<const T*>(a.fixed) + at, *moved = static_cast<const T*>(a.moved) + at;
      each_x<A>(0, b.count, [&](auto v, int64_t x) {
        using V = decltype(v);
        const V d = load_as<V>(fixed + x) - load_as<V>(moved + x);
        store_as<V>(square + x, c == 0 ? d * d : load_as<V>(square + x) + d * d);
      });
    }
    const int64_t voxel = b.n * a.voxels + b.begin;
    if (a.mask) {
      const A* mask = static_cast<const A*>(a.mask) + voxel;
      each_x<A>(0, b.count, [&](auto v, int64_t x) {
        using V = decltype(v);
        store_as<V>(square + x, masked(load_as<V>(mask + x), load_as<V>(square + x)));
      });
    }
    if (a.per_voxel) {
      A* out = static_cast<A*>(a.result) + voxel;
      for (int64_t x = 0; x < b.count; ++x) out[x] = square[x] / A(a.c);
    } else {
      Vector<A> lanes = {};
      A rest = 0;
      each_x<A>(0, b.count, [&](auto v, int64_t x) {
        using V = decltype(v);
        if constexpr (std::is_same_v<V, A>)
          rest += square[x];
        else
          lanes += load_as<V>(square + x);
      });
      static_cast<double*>(a.result)[index] = lane_sum<A>(lanes) + rest;
    }
  }
}

// Bytes: reads 2 volumes, the mask and the map's gradient, writes 1 or 2. Arithmetic: a subtraction and a
// product a value.
template <class T>
void bwd(const MseArgs& a, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  alignas(64) A factor[kMseBlock];
  for (int64_t index = begin; index < end; ++index) {
    const Block b = block_at(a, index);
    const int64_t voxel = b.n * a.voxels + b.begin;
    const A* grad = static_cast<const A*>(a.grad) + (a.per_voxel ? voxel : b.n);
    const A scale = A(2) / A(a.per_voxel ? a.c : 1);
    for (int64_t x = 0; x < b.count; ++x) factor[x] = scale * grad[a.per_voxel ? x : 0];
    const A* mask = static_cast<const A*>(a.mask) + (a.mask ? voxel : 0);
    for (int64_t c = 0; c < a.c; ++c) {
      const int64_t at = (b.n * a.c + c) * a.voxels + b.begin;
      const T *fixed = static_cast<const T*>(a.fixed) + at, *moved = static_cast<const T*>(a.moved) + at;
      T* grad_fixed = a.grad_fixed ? static_cast<T*>(a.grad_fixed) + at : nullptr;
      T* grad_moved = a.grad_moved ? static_cast<T*>(a.grad_moved) + at : nullptr;
      cover_x<A>(0, b.count, [&](auto v, int64_t x) {
        using V = decltype(v);
        V g = load_as<V>(factor + x) * (load_as<V>(fixed + x) - load_as<V>(moved + x));
        if (a.mask) g = masked(load_as<V>(mask + x), g);
        if (grad_fixed) store_as<V>(grad_fixed + x, g);
        if (grad_moved) store_as<V>(grad_moved + x, -g);
      });
    }
  }
}

}  // namespace

void mse_fwd(Stored type, const MseArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { fwd<T>(a, b, e); });
}

void mse_bwd(Stored type, const MseArgs& a, int64_t b, int64_t e) {
  with_type(type, [&]<class T>() { bwd<T>(a, b, e); });
}

}  // namespace fastreg::FASTREG_ISA

#else

#include <vector>

#include "cpu/binding.h"

namespace fastreg {
namespace {

using at::Tensor;

// Contiguous inputs, alive as long as their pointers are used.
struct Inputs {
  Tensor fixed, moved, mask;
  MseArgs args{};

  Inputs(const char* op, const Tensor& fixed_, const Tensor& moved_, const std::optional<Tensor>& mask_)
      : fixed(fixed_.contiguous()), moved(moved_.contiguous()) {
    FASTREG_CHECK(
        fixed.dim() >= 3 && fixed.sizes() == moved.sizes() && fixed.scalar_type() == moved.scalar_type(), op,
        "fixed and moved must have one shape and dtype");
    args.c = fixed.size(1);
    args.voxels = c10::multiply_integers(fixed.sizes().slice(2));
    args.n_blocks = (args.voxels + kMseBlock - 1) / kMseBlock;
    args.fixed = fixed.const_data_ptr(), args.moved = moved.const_data_ptr();
    if (mask_) {
      mask = mask_->to(arithmetic_of(fixed)).contiguous();
      FASTREG_CHECK(mask.dim() == fixed.dim() && mask.size(1) == 1 && mask.size(0) == fixed.size(0) &&
                        mask.sizes().slice(2) == fixed.sizes().slice(2),
                    op, "mask must have shape (N, 1, *spatial)");
      args.mask = mask.const_data_ptr();
    }
  }
};

Tensor mse_loss_cpu(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask) {
  Inputs in("mse_loss", fixed, moved, mask);
  const int64_t n = in.fixed.size(0), n_blocks = in.args.n_blocks;
  if (in.fixed.numel() == 0) return at::zeros({n}, in.fixed.options().dtype(arithmetic_of(in.fixed)));
  std::vector<double> partial(n * n_blocks);
  in.args.result = partial.data();
  auto kernel = FASTREG_PICK(mse_fwd);
  at::parallel_for(0, n * n_blocks, 1,
                   [&](int64_t b, int64_t e) { kernel(stored(in.fixed), in.args, b, e); });
  return sample_sums(partial, n, arithmetic_of(in.fixed));
}

Tensor mse_map_cpu(const Tensor& fixed, const Tensor& moved, const std::optional<Tensor>& mask) {
  Inputs in("mse_map", fixed, moved, mask);
  auto shape = in.fixed.sizes().vec();
  shape[1] = 1;
  Tensor out = at::empty(shape, in.fixed.options().dtype(arithmetic_of(in.fixed)));
  if (in.fixed.numel() == 0) return out.fill_(NAN);  // no channel to average over, or no voxel at all
  in.args.result = out.mutable_data_ptr();
  in.args.per_voxel = true;
  auto kernel = FASTREG_PICK(mse_fwd);
  at::parallel_for(0, in.fixed.size(0) * in.args.n_blocks, 1,
                   [&](int64_t b, int64_t e) { kernel(stored(in.fixed), in.args, b, e); });
  return out;
}

std::tuple<Tensor, Tensor> mse_loss_bwd_cpu(const Tensor& grad, const Tensor& fixed, const Tensor& moved,
                                            const std::optional<Tensor>& mask, bool need_fixed,
                                            bool need_moved) {
  Inputs in("mse_loss_bwd", fixed, moved, mask);
  in.args.per_voxel = grad.dim() > 1;
  FASTREG_CHECK(grad.size(0) == in.fixed.size(0) &&
                    grad.numel() == grad.size(0) * (in.args.per_voxel ? in.args.voxels : 1),
                "mse_loss_bwd", "grad must have shape (N,) or (N, 1, *spatial)");
  Tensor g = grad.to(arithmetic_of(in.fixed)).contiguous();
  const auto result = [&](bool need) {
    return at::empty(need ? in.fixed.sizes() : at::IntArrayRef{0}, in.fixed.options());
  };
  Tensor grad_fixed = result(need_fixed), grad_moved = result(need_moved);
  if (in.fixed.numel() == 0) return {grad_fixed, grad_moved};
  in.args.grad = g.const_data_ptr();
  if (need_fixed) in.args.grad_fixed = grad_fixed.mutable_data_ptr();
  if (need_moved) in.args.grad_moved = grad_moved.mutable_data_ptr();
  auto kernel = FASTREG_PICK(mse_bwd);
  at::parallel_for(0, in.fixed.size(0) * in.args.n_blocks, 1,
                   [&](int64_t b, int64_t e) { kernel(stored(in.fixed), in.args, b, e); });
  return {grad_fixed, grad_moved};
}

TORCH_LIBRARY_IMPL(fastreg, CPU, m) {
  m.impl("mse_loss", mse_loss_cpu);
  m.impl("mse_map", mse_map_cpu);
  m.impl("mse_loss_bwd", mse_loss_bwd_cpu);
}

}  // namespace
}  // namespace fastreg

#endif
