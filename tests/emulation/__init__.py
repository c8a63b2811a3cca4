"""Builds csrc/cuda/ with g++ against emulation.h and loads it: its kernels then answer for CPU tensors.

FASTREG_EMULATION_SEED (0) chooses the orders in which blocks and threads run. One launch runs at a time.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def load():
    """Incremental: ninja compiles what a change reaches. Under FASTREG_REFERENCE=1, or kernels are registered twice."""
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [HERE / "emulation.cpp", HERE / "planted.cpp"]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        # Under another suffix, or the builder would look for nvcc.
        wrapper = folder / f"{source.stem}.cpp"
        text = f'#include "cuda/{source.name}"\n'
        if not wrapper.exists() or wrapper.read_text(encoding="utf-8") != text:
            wrapper.write_text(text, encoding="utf-8")
        sources.append(wrapper)
    flags = ["-std=c++20", "-O1", "-g1", "-DFASTREG_EMULATION", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    cpp_extension.load(
        "fastreg_emulation",
        [str(s) for s in sources],
        extra_cflags=flags,
        extra_include_paths=[str(HERE), str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
