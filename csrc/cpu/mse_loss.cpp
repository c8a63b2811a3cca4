// mse_loss: masked squared differences, their sum or map, and the gradients.
#include "common/mse_loss.h"

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastreg {

// Work units are blocks (n, block).
FASTREG_KERNEL(void, mse_fwd, Stored, const MseArgs&, int64_t, int64_t)
FASTREG_KERNEL(void, mse_bwd, Stored, const MseArgs&, int64_t, int64_t)

}  // namespace fastreg

#ifdef FASTREG_ISA

#include <algorithm>

#include "cpu/vector.h"

namespace fastreg::FASTREG_ISA {
namespace {

struct Block {
  int64_t n, begin, count;
};

Block block_at(const MseArgs& a, int64_t index) {
  const int64_t n_blocks = mse_blocks(a), begin = index % n_blocks * kMseBlock;
  return {index / n_blocks, begin, std::min(kMseBlock, a.voxels - begin)};
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

#include "common/mse_loss_op.h"
#include "cpu/binding.h"

namespace fastreg {
namespace {

struct MseLossCall : MseInputs {
  template <class... Inputs>
  MseLossCall(const Device&, const char* op, const Inputs&... inputs) : MseInputs(op, inputs...) {}

  at::Tensor sums() {
    std::vector<double> partial(args.n * mse_blocks(args));
    args.result = partial.data();
    forward();
    return sample_sums(partial, args.n, at::kDouble);
  }
  void forward() { run(FASTREG_PICK(mse_fwd)); }
  void backward() { run(FASTREG_PICK(mse_bwd)); }

 private:
  template <class Kernel>
  void run(Kernel kernel) {
    at::parallel_for(0, args.n * mse_blocks(args), 1,
                     [&](int64_t b, int64_t e) { kernel(stored(fixed), args, b, e); });
  }
};

FASTREG_LIBRARY_IMPL(fastreg, m) {
  m.impl("mse_loss", mse_loss<Device, MseLossCall>);
  m.impl("mse_map", mse_map<Device, MseLossCall>);
  m.impl("mse_loss_bwd", mse_loss_bwd<Device, MseLossCall>);
}

}  // namespace
}  // namespace fastreg

#endif
