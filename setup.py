"""Builds fastreg._C, the CPU kernels, and fastreg._C_cuda, the CUDA kernels, where nvcc and a CUDA torch are.

Every csrc/cpu/<op>.cpp is compiled once for its bindings and once per instruction set. Objects are linked from the
oldest instruction set to the newest: where two of them hold a copy of one inline function the linker keeps the first,
so no function is ever newer than the code that calls it. What ptxas says of a csrc/cuda/<op>.cu lies beside its object.

An object is compiled again where its sources, headers, flags, compiler or torch differ from those it was made of.
FASTREG_OBJECTS=folder keeps the objects there (build/objects), for several checkouts.

FASTREG_ISAS="avx2 avx512" chooses the instruction sets beside baseline; "native" is the newest of this machine, what
editable installs have; "all" is what wheels have.
FASTREG_EXT=0 skips the extensions, DEBUG=1 builds without optimisation, FASTREG_SANITIZE=address,undefined adds sanitizers.
MAX_JOBS=n compiles n objects at a time.
FASTREG_CUDA=0 skips the CUDA extension, 1 insists on it (with a torch without CUDA it is built but cannot be loaded); an
nvcc and a torch of different CUDA major versions do not go together.
FASTREG_CUDA_ARCHS="90 100" chooses its architectures.
"""

import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
OBJECTS = Path(os.environ.get("FASTREG_OBJECTS") or ROOT / "build" / "objects").resolve()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
JOBS = int(os.environ.get("MAX_JOBS") or CORES)
# What g++ reads once for the bindings of all ops, if that pays: it takes as long as reading it for two of them.
PRECOMPILED, PAYS = "cpu/precompiled.h", 4
# What one takes on a core of 2026, for the estimate alone.
SECONDS = {"torch": 12, "bindings": 3, "kernels": 3, "cuda": 100}


def said(*command):
    """What a command prints, "" where it fails: a compiler that does not work is as good as none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def instruction_sets(compiler, usual):
    """The sets to build, oldest first: FASTREG_ISAS, or else `usual`."""
    chosen = os.environ.get("FASTREG_ISAS") or usual
    if chosen == "native":
        macros = set(said(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull).split())
        wanted = {s: {f"__{f[2:].upper()}__" for f in flags if "=" not in f} for s, flags in ISAS.items()}
        here = [s for s in ISAS if wanted[s] <= macros]
        chosen = here[-1] if macros else "all"
    names = list(ISAS) if chosen == "all" else chosen.replace(",", " ").split()
    if unknown := set(names) - set(ISAS):
        raise SystemExit(
            f"FASTREG_ISAS must be native, all or some of {' '.join(ISAS)}, got {', '.join(sorted(unknown))}"
        )
    return [s for s in ISAS if s == "baseline" or s in names]


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


@functools.cache
def torch_headers():
    from torch.utils.cpp_extension import include_paths

    return include_paths()[0]


def files_of(done):
    """What the compilation of an object read; torch's headers where torch is now: another checkout may have compiled it."""
    files = done.with_suffix(".d").read_text(encoding="utf-8").split(":", 1)[1].replace("\\\n", " ").split()
    return [re.sub(r"^.*/torch/include(?=/)", lambda _: torch_headers(), f) for f in files]


def key_of(done, made_with):
    """What an object is made of: `made_with`, and the contents of the files its compilation read; None where that is not known.

    Not times: a copy of a build folder, or a checkout of another commit, has times that say nothing.
    """
    if not (done.exists() and done.with_suffix(".d").exists()):
        return None
    files = files_of(done)
    if not all(os.path.exists(f) for f in files):
        return None
    return hashlib.sha1(repr([made_with, *map(digest, files)]).encode()).hexdigest()


def is_current(done, made_with):
    made_of = done.with_suffix(".key")
    return made_of.exists() and made_of.read_text(encoding="utf-8") == key_of(done, made_with)


def note_key(done, made_with):
    done.with_suffix(".key").write_text(key_of(done, made_with))


@contextmanager
def alone_in(folder):
    """Others that build in this folder wait; then they find the objects current."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another build in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled(command, done, made_with, read=""):
    """Runs a compiler on one object; what it printed. `read`: files it had read before, as it lists them."""
    done.parent.mkdir(parents=True, exist_ok=True)
    done.with_suffix(".key").unlink(missing_ok=True)
    begin = time.time() - 0.02  # files are stamped by a clock of coarse ticks, which is behind
    run = subprocess.run(
        [*command, "-MMD", "-MF", str(done.with_suffix(".d")), "-o", str(done)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        done.unlink(missing_ok=True)
        raise SystemExit(f"{' '.join(command)}\n{run.stdout}")
    with open(done.with_suffix(".d"), "a", encoding="utf-8") as listed:
        listed.write(read)
    # Of a file that was edited meanwhile nobody knows what was read: without a key the object is compiled again.
    if all(os.path.getmtime(f) < begin for f in files_of(done)):
        note_key(done, made_with)
    return run.stdout


def require_torch():
    """pip builds apart from the environment, with what pyproject.toml requires: a torch there would be another one."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            "fastreg is compiled against the torch it will run with, and here is none: install torch, then "
            "pip install --no-build-isolation -e ."
        ) from None


class Progress:
    """A line an object, an estimate before and the seconds after."""

    def __init__(self, what, seconds):
        """`seconds`: of each object that is to be compiled."""
        self.what, self.count, self.begin = what, len(seconds), time.monotonic()
        self.done = itertools.count(1)
        if seconds:
            minutes = sum(seconds) / min(JOBS, CORES) / 60
            about = f"about {minutes:.0f} minutes" if minutes > 1.5 else "about a minute"
            objects = f"{self.count} object{'s' * (self.count > 1)}"
            print(f"{what}: {objects} to compile, {about} on {min(JOBS, CORES)} free cores", flush=True)

    @contextmanager
    def step(self, name):
        begin = time.monotonic()
        yield
        done, taken = f"{next(self.done)}".rjust(len(f"{self.count}")), time.monotonic() - begin
        print(f"[{done}/{self.count}] {name} {taken:.0f} s", flush=True)

    def end(self):
        taken = f"compiled in {time.monotonic() - self.begin:.0f} s" if self.count else "is up to date"
        print(f"{self.what} {taken}", flush=True)


class BuildKernels(build_ext):
    def run(self):
        # setuptools builds elsewhere and copies: build_extension no longer knows what it was asked for.
        self.usual_sets = "native" if self.inplace or self.editable_mode else "all"
        super().run()

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
        targets += [f'-DFASTREG_TORCH_VERSION="{torch.__version__}"']
        flags = [
            "-std=c++20",
            "-O3",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v",
            *targets,
        ]
        includes = [f"-I{p}" for p in ["csrc", *include_paths()]]
        if not any(Path(p, "c10/cuda/impl/cuda_cmake_macros.h").exists() for p in include_paths()):
            flags += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a torch without CUDA
        libraries, folders = ["c10", "torch", "torch_cpu"], library_paths()
        if torch.version.cuda:
            libraries += ["c10_cuda", "torch_cuda", "cudart"]
            home = Path(compiler).resolve().parents[1]
            folders += [str(home / "lib64"), str(home / "lib")]
        name = f"cuda-{'-'.join(archs)}-torch{torch.__version__}"
        out = OBJECTS / name
        made_with = [flags, said(compiler, "--version"), said("g++", "--version")]
        sources = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
        objects = {s: out / f"{s.stem}.o" for s in sources}

        def compile_one(source):
            done = objects[source]
            with progress.step(f"{source.name} sm_{', '.join(archs)}"):
                printed = compiled([compiler, *flags, *includes, "-c", str(source)], done, made_with)
            done.with_suffix(".ptxas").write_text(printed)

        with alone_in(out):
            stale = [s for s in sources if not is_current(objects[s], made_with)]
            progress = Progress("fastreg._C_cuda", [SECONDS["cuda"] * len(archs) for _ in stale])
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(compile_one, stale))
            progress.end()
            self.link(ext, list(objects.values()), folders, libraries)

    def build_cpu(self, ext):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        debug = os.environ.get("DEBUG") == "1"
        sanitize = [f"-fsanitize={s}" for s in [os.environ.get("FASTREG_SANITIZE", "")] if s]
        common = ["-std=c++20", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
        common += ["-Wno-psabi"]  # notes of g++ 4.6's ABI
        # No contraction to FMA: a voxel is then the same bits on every code path and instruction set (sums may differ).
        common += ["-ffp-contract=off"]
        common += ["-O0", "-g"] if debug else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
        # The C++ interface of torch has no type information for vptr; Python's own flags have -fwrapv.
        checked = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]
        common += [*sanitize, "-fno-sanitize=vptr", "-fno-sanitize-recover=all", *checked] if sanitize else []
        macros = {"TORCH_EXTENSION_NAME": "_C", "FASTREG_X86": int("avx2" in ISAS)}
        macros |= {"FASTREG_TORCH_VERSION": f'"{torch.__version__}"', "FASTREG_VERSION": f'"{VERSION}"'}
        macros |= {"_GLIBCXX_USE_CXX11_ABI": int(torch.compiled_with_cxx11_abi())}
        command = [*getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)]
        command += [*(f"-D{name}={value}" for name, value in macros.items()), *common]
        version = said(command[0], "--version")
        sets = instruction_sets(command[0], self.usual_sets)
        # One folder for editable installs and wheels alike; options, torch and Python change what an object holds.
        options = "debug" * debug + "".join(s.strip("-") for s in sanitize) or "release"
        variant = OBJECTS / f"{options}-torch{torch.__version__}-{sys.implementation.cache_tag}"
        # Headers lie elsewhere in another checkout: their contents count, not the flags that find them.
        headers = [f"-I{p}" for p in ["csrc", *include_paths(), *self.include_dirs]]
        made_with = [command, version, torch.version.git_version]

        def flags_of(source, isa):
            """What this compilation is: the bindings, or the kernels of one instruction set."""
            if isa:
                return [f"-DFASTREG_ISA={isa}", *ISAS[isa]]
            return [f'-DFASTREG_ISAS="{" ".join(sets)}"'] if source == "csrc/module.cpp" else []

        def object_of(source, isa):
            return variant / (isa or "bindings") / Path(source).with_suffix(".o")

        def precompile():
            """Flags that find torch's headers read already, and their list; nothing where the compiler does not do that.

            (g++ 12 then warns of comparisons in them.)
            """
            folder = variant / "precompiled"
            done = folder / f"{PRECOMPILED}.gch"
            with progress.step("torch's headers"):
                done.parent.mkdir(parents=True, exist_ok=True)
                made = [
                    *command,
                    *headers,
                    "-MMD",
                    "-MF",
                    f"{done}.d",
                    "-x",
                    "c++-header",
                    f"csrc/{PRECOMPILED}",
                ]
                if subprocess.run([*made, "-o", str(done)], capture_output=True).returncode:
                    return [], ""
            return [f"-I{folder}", "-include", PRECOMPILED, "-Wno-sign-compare"], Path(
                f"{done}.d"
            ).read_text().split(":", 1)[1]

        def compile_one(job):
            source, isa = job
            done, flags = object_of(*job), flags_of(*job)
            first, read = ready.result() if ready and source in kernels and not isa else ([], "")
            with progress.step(f"{Path(source).name} {isa or 'bindings'}"):
                line = [*command, *flags, *first, *headers, "-c", source]
                print(compiled(line, done, [made_with, flags], read), end="")

        kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
        jobs = [(s, None) for s in ["csrc/module.cpp", *kernels]] + [
            (s, isa) for isa in sets for s in kernels
        ]
        with alone_in(variant):
            stale = [j for j in jobs if not is_current(object_of(*j), [made_with, flags_of(*j)])]
            stale.sort(key=lambda job: not job[1])  # kernels while torch's headers are read
            bindings = sum(not isa and source in kernels for source, isa in stale)
            gnu = "Free Software Foundation" in version
            parts = ["torch"] * (gnu and bindings >= PAYS) + [
                "kernels" if isa else "bindings" for _, isa in stale
            ]
            progress = Progress("fastreg._C", [SECONDS[p] for p in parts])
            try:
                with ThreadPoolExecutor(JOBS) as pool:
                    ready = pool.submit(precompile) if "torch" in parts else None
                    list(pool.map(compile_one, stale))
            finally:
                shutil.rmtree(variant / "precompiled", ignore_errors=True)  # 400 MB
            progress.end()
            # OpenMP symbols come from the runtime torch has loaded (no -lgomp): one thread pool for both.
            libraries = ["c10", "torch", "torch_cpu", "torch_python"]
            self.link(ext, [object_of(*j) for j in jobs], library_paths(), libraries, sanitize)

    def link(self, ext, objects, folders, libraries, flags=()):
        self.compiler.link_shared_object(
            [str(o) for o in objects],
            self.get_ext_fullpath(ext.name),
            library_dirs=folders,
            libraries=libraries,
            extra_postargs=[*flags],
            target_lang="c++",
        )


extensions = []
if os.environ.get("FASTREG_EXT") != "0":
    require_torch()
    extensions = ["fastreg._C"] + ["fastreg._C_cuda"] * bool(nvcc())
setup(
    version=VERSION,
    packages=find_packages(include=["fastreg*"]),
    # An editable install is then this folder on the path. The finder that it is otherwise comes after the path, and to a script
    # beside the clone the clone itself would be the package, an empty one.
    package_dir={"": "."},
    package_data={"fastreg": ["py.typed", "report.html", "report.schema.json"]},
    ext_modules=[Extension(name, sources=[]) for name in extensions],
    cmdclass={"build_ext": BuildKernels},
)
