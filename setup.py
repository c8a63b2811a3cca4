"""Builds fastreg._C, the CPU kernels, and fastreg._C_cuda, the CUDA kernels, where nvcc and a CUDA torch are.

Every csrc/cpu/<op>.cpp is compiled once for its bindings and once per instruction set. Objects are linked from the
oldest instruction set to the newest: where two of them hold a copy of one inline function the linker keeps the first,
so no function is ever newer than the code that calls it. What ptxas says of a csrc/cuda/<op>.cu lies beside its object.

FASTREG_EXT=0 skips the extensions, DEBUG=1 builds without optimisation, FASTREG_SANITIZE=address,undefined adds sanitizers.
FASTREG_CUDA=0 skips the CUDA extension, 1 insists on it (with a torch without CUDA it is built but cannot be loaded); an
nvcc and a torch of different CUDA major versions do not go together.
FASTREG_CUDA_ARCHS="90 100" chooses its architectures.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "fastreg" / "_version.py").read_text(encoding="utf-8").split('"')[1]
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS = {"baseline": ["-march=x86-64-v2"], "avx2": avx2, "avx512": avx512}
# Older GPUs have no cp.async and less shared memory than some kernels ask for: Triton answers there.
CUDA_ARCHS = "80 86 89 90 100 120"


def said(*command):
    """What a command prints, "" where it fails: a compiler that does not work is as good as none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def architectures(compiler):
    """FASTREG_CUDA_ARCHS, or those of the usual ones that this nvcc knows."""
    chosen = os.environ.get("FASTREG_CUDA_ARCHS")
    if chosen:
        return chosen.split()
    known = said(compiler, "--list-gpu-code").split()
    usual = [a for a in CUDA_ARCHS.split() if f"sm_{a}" in known]
    if not usual:
        raise SystemExit(
            f"{compiler} compiles for none of {CUDA_ARCHS}: set FASTREG_CUDA_ARCHS, or FASTREG_CUDA=0"
        )
    return usual


def cuda_mismatch(nvcc_version, torch_cuda):
    """What is wrong with a compiler of which `nvcc --version` says this, for a torch of that CUDA; None if nothing is."""
    release = re.search(r"release (\d+)\.\d+", nvcc_version)
    if not torch_cuda or not release or release[1] == torch_cuda.split(".")[0]:
        return None
    return f"nvcc is of CUDA {release[0].split()[1]}, torch of CUDA {torch_cuda}: set CUDA_HOME to one of torch's major version"


def nvcc():
    """The compiler, or None where the CUDA extension is not to be built."""
    wanted = os.environ.get("FASTREG_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        if wanted == "1":
            raise SystemExit("FASTREG_CUDA=1, but there is no nvcc: set CUDA_HOME")
        return None
    import torch

    if wanted != "1" and not torch.version.cuda:
        return None
    version = said(found, "--version")
    wrong = cuda_mismatch(version, torch.version.cuda) if version else f"{found} does not run"
    if wrong and wanted == "1":
        raise SystemExit(f"FASTREG_CUDA=1, but {wrong}")
    if wrong:
        print(f"warning: no CUDA kernels are built: {wrong}", file=sys.stderr)
    return None if wrong else found


@functools.cache
def digest(path):
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()


def key_of(done, flags):
    """What an object is made of: flags, and the contents of the files its compilation read; None where that is not known.

    Not times: a copy of a build folder, or a checkout of another commit, has times that say nothing.
    """
    listed = done.with_suffix(".d")
    if not (done.exists() and listed.exists()):
        return None
    files = listed.read_text(encoding="utf-8").split(":", 1)[1].replace("\\\n", " ").split()
    if not all(os.path.exists(f) for f in files):
        return None
    return hashlib.sha1(repr([flags, *map(digest, files)]).encode()).hexdigest()


def is_current(done, flags):
    made_of = done.with_suffix(".key")
    return made_of.exists() and made_of.read_text(encoding="utf-8") == key_of(done, flags)


def note_key(done, flags):
    done.with_suffix(".key").write_text(key_of(done, flags))


class BuildKernels(build_ext):
    def build_extension(self, ext):
        self.build_cuda(ext) if ext.name.endswith("_cuda") else self.build_cpu(ext)

    def build_cuda(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = nvcc()
        archs = architectures(compiler)
        last = archs[-1]
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets += [f"-gencode=arch=compute_{last},code=compute_{last}"]
        targets += [f'-DFASTREG_CUDA_ARCHS="{" ".join(archs)}+ptx"']
        flags = [
            "-std=c++20",
            "-O3",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v",
            *targets,
        ]
        flags += [f"-I{p}" for p in ["csrc", *include_paths()]]
        if not any(Path(p, "c10/cuda/impl/cuda_cmake_macros.h").exists() for p in include_paths()):
            flags += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a torch without CUDA
        name = f"cuda-{'-'.join(archs)}-torch{torch.__version__}"
        out = ROOT / "build" / "objects" / name
        out.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            done = out / f"{source.stem}.o"
            if not is_current(done, flags):
                command = [compiler, *flags, "-MMD", "-MF", str(done.with_suffix(".d")), "-c", str(source)]
                run = subprocess.run([*command, "-o", str(done)], capture_output=True, text=True, check=False)
                if run.returncode:
                    done.unlink(missing_ok=True)
                    raise SystemExit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
                done.with_suffix(".ptxas").write_text(run.stdout + run.stderr)
                note_key(done, flags)
            return str(done)

        sources = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, sources))
        libraries, folders = ["c10", "torch", "torch_cpu"], library_paths()
        if torch.version.cuda:
            libraries += ["c10_cuda", "torch_cuda", "cudart"]
            home = Path(compiler).resolve().parents[1]
            folders += [str(home / "lib64"), str(home / "lib")]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=folders,
            libraries=libraries,
            target_lang="c++",
        )

    def build_cpu(self, ext):
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
            # `pass_` names what this compilation is: the bindings, or the kernels of one instruction set.
            pass_ = [("FASTREG_ISA", isa)] if isa else []
            flags = [*common, "-MMD", *(ISAS[isa] if isa else [])]
            key = [macros, pass_, flags]
            if not is_current(done, key):
                self.compiler.compile(
                    [source],
                    output_dir=str(out),
                    macros=[*macros, *pass_],
                    include_dirs=[*includes, *self.include_dirs],
                    extra_postargs=flags,
                )
                note_key(done, key)
            return str(done)

        # One folder for editable installs and wheels alike; options, torch and Python change what an object holds.
        options = "debug" * debug + "".join(s.strip("-") for s in sanitize) or "release"
        variant = f"{options}-torch{torch.__version__}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / "objects" / variant)
        kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
        jobs = [(s, None) for s in ["csrc/module.cpp", *kernels]] + [
            (s, isa) for isa in ISAS for s in kernels
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, jobs))
        # OpenMP symbols come from the runtime torch has loaded (no -lgomp): one thread pool for both.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu", "torch_python"],
            extra_postargs=sanitize,
            target_lang="c++",
        )


extensions = []
if os.environ.get("FASTREG_EXT") != "0":
    extensions = ["fastreg._C"] + ["fastreg._C_cuda"] * bool(nvcc())
setup(
    version=VERSION,
    packages=find_packages(include=["fastreg*"]),
    package_data={"fastreg": ["py.typed"]},
    ext_modules=[Extension(name, sources=[]) for name in extensions],
    cmdclass={"build_ext": BuildKernels},
)
