#pragma once
// One source, several instruction sets. A cpu/<op>.cpp is compiled once without FASTREG_ISA (bindings:
// tensors, checks, threads) and once per instruction set with FASTREG_ISA=<name> (kernels: raw pointers, no
// torch). Kernels live in namespace fastreg::<name>; FASTREG_KERNEL declares all of them and the bindings
// pick one. For them a kernel is weak: a set that was not built leaves it null, and isa() never chooses it.
#ifdef FASTREG_ISA
#define FASTREG_WEAK
#else
#define FASTREG_WEAK [[gnu::weak]]
#endif
#if FASTREG_X86
#define FASTREG_KERNEL(ret, name, ...) \
  namespace baseline {                 \
  ret name(__VA_ARGS__);               \
  }                                    \
  namespace avx2 {                     \
  FASTREG_WEAK ret name(__VA_ARGS__);  \
  }                                    \
  namespace avx512 {                   \
  FASTREG_WEAK ret name(__VA_ARGS__);  \
  }
#define FASTREG_PICK(name)                                               \
  (::fastreg::isa() == ::fastreg::Isa::avx512 ? &::fastreg::avx512::name \
   : ::fastreg::isa() == ::fastreg::Isa::avx2 ? &::fastreg::avx2::name   \
                                              : &::fastreg::baseline::name)
#else
#define FASTREG_KERNEL(ret, name, ...) \
  namespace baseline {                 \
  ret name(__VA_ARGS__);               \
  }
#define FASTREG_PICK(name) (&::fastreg::baseline::name)
#endif

namespace fastreg {
enum class Isa { baseline, avx2, avx512 };
// The newest set that was built and that this machine has, or the one of these that FASTREG_ISA names.
// Decided at the first call.
Isa isa();
}  // namespace fastreg
