// fastreg._C: importing it registers the CPU kernels with the dispatcher; build_info() says how it was built.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <list>
#include <stdexcept>
#include <string>

#include "cpu/binding.h"
#include "cpu/isa.h"

namespace fastreg {
namespace {

// Read from the file, before it is loaded.
[[gnu::used]] const char kTorch[] = "FASTREG_TORCH=" FASTREG_TORCH_VERSION;

const char* const kNames[] = {"baseline", "avx2", "avx512"};

// FASTREG_ISAS: the names of the sets that were built.
bool built(Isa isa) { return std::string(FASTREG_ISAS).find(kNames[int(isa)]) != std::string::npos; }

bool of_machine(Isa isa) {
#if FASTREG_X86
  __builtin_cpu_init();
  bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::baseline || (isa == Isa::avx2 ? avx2 : avx512);
#else
  return isa == Isa::baseline;
#endif
}

bool available(Isa isa) { return built(isa) && of_machine(isa); }

const char* const kForced = std::getenv("FASTREG_ISA");

bool forced(Isa isa) { return kForced && std::string(kForced) == kNames[int(isa)] && available(isa); }

Isa choose() {
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline})
    if (forced(isa)) return isa;
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (available(isa)) return isa;
  return Isa::baseline;
}

// All kernels or none: those registered go again with their torch::Library.
void register_kernels() {
  static std::list<torch::Library> libraries;
  try {
    for (const Registration& r : Registration::all()) {
      libraries.emplace_back(torch::Library::IMPL, r.library, c10::DispatchKey::CPU, r.file, r.line);
      r.implement(libraries.back());
    }
  } catch (const c10::Error& error) {
    libraries.clear();
    throw std::runtime_error(std::string("built from another fastreg: ") + error.what_without_backtrace());
  }
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace fastreg

PYBIND11_MODULE(_C, m) {
  using namespace fastreg;
  register_kernels();
  m.def("build_info", [] {
    pybind11::list built_names, machine_names, available_names;
    for (Isa i : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (built(i)) built_names.append(kNames[int(i)]);
      if (of_machine(i)) machine_names.append(kNames[int(i)]);
      if (available(i)) available_names.append(kNames[int(i)]);
    }
    pybind11::dict info;
    info["version"] = FASTREG_VERSION;
    info["torch"] = FASTREG_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["isa"] = kNames[int(isa())];
    info["isa_refused"] = kForced && *kForced && !forced(isa()) ? kForced : "";
    info["isa_built"] = built_names;
    info["isa_of_machine"] = machine_names;
    info["isa_available"] = available_names;
    return info;
  });
}
