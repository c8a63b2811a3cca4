"""Builds fastreg._C, the CPU kernels.

Every csrc/cpu/<op>.cpp is compiled once for its bindings and once per instruction set. Objects are linked from the
oldest instruction set to the newest: where two of them hold a copy of one inline function the linker keeps the first,
so no function is ever newer than the code that calls it.

FASTREG_EXT=0 skips the extension, DEBUG=1 builds without optimisation, FASTREG_SANITIZE=address,undefined adds sanitizers.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "fastreg" / "_version.py").read_text().split('"')[1]
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS = {"baseline": ["-march=x86-64-v2"], "avx2": avx2, "avx512": avx512}


def is_newer(done, others):
    """Whether an object is newer than every file its compilation read (g++ -MMD listed them) and than `others`."""
    listed = done.with_suffix(".d")
    if not (done.exists() and listed.exists()):
        return False
    files = listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return all(os.path.exists(f) and os.path.getmtime(f) < done.stat().st_mtime for f in [*files, *others])


class BuildKernels(build_ext):
    def build_extension(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        debug = os.environ.get("DEBUG") == "1"
        sanitize = [f"-fsanitize={s}" for s in [os.environ.get("FASTREG_SANITIZE", "")] if s]
        common = ["-std=c++20", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
        # No contraction to FMA: a voxel is then the same bits on every code path and instruction set (sums may differ).
        common += ["-ffp-contract=off"]
        common += ["-O0", "-g"] if debug else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
        common += [*sanitize, "-g1"] if sanitize else []
        macros = [("TORCH_EXTENSION_NAME", "_C"), ("FASTREG_X86", str(int("avx2" in ISAS)))]
        macros += [("FASTREG_TORCH_VERSION", f'"{torch.__version__}"'), ("FASTREG_VERSION", f'"{VERSION}"')]
        macros += [("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi())))]
        # Relative, so that the lists of what an object read stay right in a copy of the checkout.
        includes = ["csrc", *include_paths()]

        def compile_one(job):
            source, isa = job
            out = Path(self.build_temp) / (isa or "bindings")
            done = out / Path(source).with_suffix(".o")
            if is_newer(done, ["setup.py", "fastreg/_version.py"]):
                return [str(done)]
            # `pass_` names what this compilation is: the bindings, or the kernels of one instruction set.
            pass_ = [("FASTREG_ISA", isa)] if isa else []
            flags = [*common, "-MMD", *(ISAS[isa] if isa else [])]
            return self.compiler.compile(
                [source],
                output_dir=str(out),
                macros=[*macros, *pass_],
                include_dirs=[*includes, *self.include_dirs],
                extra_postargs=flags,
            )

        # One folder for editable installs and wheels alike; options, torch and Python change what an object holds.
        options = "debug" * debug + "".join(s.strip("-") for s in sanitize) or "release"
        variant = f"{options}-torch{torch.__version__}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / "objects" / variant)
        kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
        jobs = [(s, None) for s in ["csrc/module.cpp", *kernels]] + [
            (s, isa) for isa in ISAS for s in kernels
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = [o for group in pool.map(compile_one, jobs) for o in group]
        # OpenMP symbols come from the runtime torch has loaded (no -lgomp): one thread pool for both.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu", "torch_python"],
            extra_postargs=sanitize,
            target_lang="c++",
        )


setup(
    version=VERSION,
    packages=find_packages(include=["fastreg*"]),
    ext_modules=[] if os.environ.get("FASTREG_EXT") == "0" else [Extension("fastreg._C", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
