"""Loads the compiled kernels and declares ops: the dispatcher does everything else.

An op is a schema, a plain-PyTorch reference at ``CompositeExplicitAutograd``, a fake kernel and an autograd formula, all in
Python. Two compiled extensions add kernels, ``_C`` at the ``CPU`` key and ``_C_cuda`` at ``CUDA``; Triton answers at ``CUDA``
for ops that are left, and on GPUs that ``_C_cuda`` was not built for. So there is no fallback branch anywhere: where
nothing is registered the dispatcher finds the reference.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

lib = torch.library.Library("fastreg", "DEF")
_state: dict[str, Any] = {
    "extension": "not loaded",
    "info": {},
    "cuda": "not built",
    "gpus_asked": False,
    "on_gpu": {},
}
_references: dict[str, Callable[..., Any]] = {}
_MEND = "Build it with `pip install --no-build-isolation -e .` in a checkout of fastreg."


def has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastreg::{op}", key)


def load() -> None:
    """Loads what implements the ops, once; warns, with the command that mends it, when it is missing or does not load.

    ``FASTREG_REFERENCE=1`` loads nothing, ``FASTREG_CUDA_BACKEND=triton`` leaves out the CUDA extension.
    """
    if os.environ.get("FASTREG_REFERENCE") == "1":
        _state["extension"] = _state["cuda"] = "not loaded: FASTREG_REFERENCE=1"
        return
    for message in (_load_cpu(), _load_cuda()):
        _warn(message, 4)
    _register_triton()


def _warn(message: str, stacklevel: int = 1) -> None:
    if message:
        warnings.warn(message, stacklevel=stacklevel)


def _load_cpu() -> str:
    """What there is to warn of."""
    spec = importlib.util.find_spec("fastreg._C")
    slow = f"using the PyTorch reference (slow). {_MEND}"
    if spec is None:
        _state["extension"] = "not built"
        return f"fastreg: compiled extension not found, {slow}"
    if unfit := _unfit(spec.origin):
        _state["extension"] = f"not loaded: {unfit}"
        return f"fastreg: compiled extension {unfit}, {slow}"
    try:
        _state["info"] = importlib.import_module("fastreg._C").build_info()
    except Exception as error:
        why = " ".join(str(error).split())
        _state["extension"] = f"failed to load: {why}"
        return f"fastreg: compiled extension failed to load under torch {torch.__version__} ({why}), {slow}"
    _state["extension"] = "loaded"
    return _sets_to_warn_of(_state["info"])


def _unfit(extension: str | None) -> str:
    """Why an extension must not be loaded: it is cut short, or was compiled against another torch; else "".

    Loading would tell too late: what a file lacks is a bus error; the C++ interface keeps its layout within a minor version
    alone, and a kernel that takes it for another reads memory that is not what it looks for.
    """
    content = Path(extension or os.devnull).read_bytes()
    if content.startswith(b"\x7fELF\2\1"):  # 64 bits, little-endian: the table of sections, at the end
        where, size, count = (
            int.from_bytes(content[i:j], "little") for i, j in ((40, 48), (58, 60), (60, 62))
        )
        if len(content) < max(64, where + size * count):
            return "is cut short"

    def interface(version: str) -> str:
        release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
        return release[1] if release else version

    built = re.search(rb"FASTREG_TORCH=([^\0]+)\0", content)
    if built is None or interface(built[1].decode()) == interface(torch.__version__):
        return ""
    return f"was built against torch {built[1].decode()}, and this is torch {torch.__version__}"


def _sets_to_warn_of(info: dict[str, Any]) -> str:
    """What there is to warn of instruction sets: FASTREG_ISA has no effect, or only slow ones fit this machine."""
    # An extension from before these two were known had all sets.
    built, machine = (info.setdefault(key, info["isa_available"]) for key in ("isa_built", "isa_of_machine"))
    mend = "`FASTREG_ISAS=all pip install --no-build-isolation -e .` builds all"
    if (refused := info.pop("isa_refused")) in machine:
        return (
            f"fastreg: FASTREG_ISA={refused} was not built ({', '.join(built)}): using {info['isa']}. {mend}"
        )
    if refused:
        return f"fastreg: FASTREG_ISA={refused} is not of this machine ({', '.join(machine)}): using {info['isa']}"
    if len(built) > 1 and info["isa_available"] == built[:1] != machine:
        return (
            f"fastreg: built for {built[-1]}, which is not of this machine ({', '.join(machine)}): using "
            f"{info['isa']}, which is slow. {mend}"
        )
    return ""


def _load_cuda() -> str:
    """What there is to warn of: nothing where torch has no CUDA, or the extension was not built."""
    spec = importlib.util.find_spec("fastreg._C_cuda")
    if os.environ.get("FASTREG_CUDA_BACKEND") == "triton":
        _state["cuda"] = "not loaded: FASTREG_CUDA_BACKEND=triton"
    elif spec is not None and torch.version.cuda:
        if unfit := _unfit(spec.origin):
            _state["cuda"] = f"not loaded: {unfit}"
            return f"fastreg: CUDA extension {unfit}, using Triton or the PyTorch reference on GPUs. {_MEND}"
        try:
            torch.ops.load_library(spec.origin)
            archs = ctypes.CDLL(spec.origin).fastreg_cuda_archs
            archs.restype = ctypes.c_char_p
        except Exception as error:
            why = " ".join(str(error).split())
            _state["cuda"] = f"failed to load: {why}"
            return (
                f"fastreg: CUDA extension failed to load under torch {torch.__version__} ({why}), "
                f"using Triton or the PyTorch reference on GPUs. {_MEND}"
            )
        _state["cuda"] = "loaded"
        compiled = [op for op in _references if has_kernel(op, "CUDA")]
        # Asking a device starts CUDA, after which a process cannot fork workers that use it: this waits for CUDA's start.
        torch.cuda._lazy_call(lambda: _warn(_leave_unfit_devices(compiled, archs().decode())))
    return ""


def fits(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures, "80 90a 120+ptx" say, runs on a GPU of this compute capability."""
    for arch in archs.split():
        major, minor, only, ptx = re.findall(r"^(\d+)(\d)([af]?)(\+ptx)?$", arch)[0]
        built = int(major), int(minor)
        if only == "a":
            fit = capability == built
        elif ptx and not only:
            fit = capability >= built
        else:
            fit = capability[0] == built[0] and capability >= built
        if fit:
            return True
    return False


def _leave_unfit_devices(compiled: list[str], archs: str) -> str:
    """On a GPU that the CUDA extension holds no code for its ops go to Triton, or the reference; what there is to warn of."""
    count = torch.cuda.device_count()
    unfit = [i for i in range(count) if not fits(archs, torch.cuda.get_device_capability(i))]
    _state["gpus_asked"] = True
    if not unfit:
        return ""
    launchers = _launchers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of kernels that are replaced
        for op in compiled:
            kernel = torch.library.get_kernel(f"fastreg::{op}", "CUDA")
            other = launchers.get(op, _references[op])
            lib.impl(op, _by_device(kernel, other, unfit), "CUDA", with_keyset=True)
            answer = "Triton" if op in launchers else f"PyTorch reference (CUDA extension built for {archs})"
            some = f"CUDA C++; on cuda:{', cuda:'.join(map(str, unfit))} {answer}"
            _state["on_gpu"][op] = answer if len(unfit) == count else some
    return (
        f"fastreg: the CUDA extension was built for {archs}, not for {', '.join(map(_described, unfit))}: using "
        f"{'Triton' if launchers else 'the PyTorch reference'} there. FASTREG_CUDA_ARCHS chooses what the build is for, "
        "from 80 on."
    )


def _described(gpu: int) -> str:
    return "{} (sm_{}{})".format(torch.cuda.get_device_name(gpu), *torch.cuda.get_device_capability(gpu))


def _by_device(kernel: Any, other: Callable[..., Any], unfit: list[int]) -> Callable[..., Any]:
    def route(keys: Any, *args: Any) -> Any:
        first = next(a for a in args if isinstance(a, torch.Tensor))
        return other(*args) if first.device.index in unfit else kernel.call_boxed(keys, *args)

    return route


def _launchers() -> dict[str, Callable[..., Any]]:
    """Op -> what Triton launches for it; empty without Triton. A launcher imports triton when it is first called."""
    if importlib.util.find_spec("triton") is None:
        return {}
    kernels = importlib.import_module("fastreg.kernels")
    return {op: kernels.launcher(op) for op in kernels.LAUNCHERS}


def _register_triton() -> None:
    for op, launcher in _launchers().items():
        if not has_kernel(op, "CUDA"):
            lib.impl(op, launcher, "CUDA")
            _state["on_gpu"][op] = "Triton"


def build_info() -> dict[str, Any]:
    """dict: how the loaded extension was built (version, torch, compiler, isa, isa_available); empty without one."""
    return dict(_state["info"])


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declares ``fastreg::<op>`` from its schema (no defaults: they would shorten ``needs_input_grad``)."""
    name = schema.split("(")[0]
    _references[name] = reference
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, _contiguous(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastreg::{name}", fake, lib=lib)


def _contiguous(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Results lie in memory as those of kernels and fakes do, whatever the layout of the inputs."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        out = reference(*args)
        return out.contiguous() if isinstance(out, Tensor) else tuple(t.contiguous() for t in out)

    return run


def arithmetic(*tensors: Tensor | None) -> torch.dtype:
    """What the ops compute in, and the dtype of losses, maps and statistics: the widest of the tensors, at least fp32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)


def only_needed(
    grads: Iterable[Any], needs: Iterable[bool], like: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What a backward op returns: an empty 1D tensor, of the dtype of `like` or the gradient, for what is not needed."""
    return tuple(
        g if need else (g if like is None else like).new_zeros(0)
        for g, need in zip(grads, needs, strict=True)
    )


def empty_where_needed(
    tensors: Iterable[Any], needs: Iterable[bool], like: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The same of a fake kernel: the gradient to each tensor has its shape and dtype."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if need
        else (t if like is None else like).new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def none_unless_needed(grads: Iterable[Any], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """The same of an autograd formula."""
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"fastreg::{name}", backward, setup_context=setup_context, lib=lib)


def once_differentiable(*names: str) -> None:
    """Makes double backward through these backward ops raise: without a formula PyTorch could return None silently."""

    for name in names:

        def backward(ctx: Any, *grads: Tensor | None, name: str = name) -> None:
            raise RuntimeError(f"fastreg::{name.removesuffix('_bwd')}: double backward is not supported")

        autograd(name, lambda ctx, inputs, output: None, backward)


def batched(*names: str) -> None:
    """vmap rule of ops whose tensors all have N first: the mapped axis is folded into N and out again."""
    for name in names:
        op = getattr(torch.ops.fastreg, name).default

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, op: Any = op) -> Any:
            size = info.batch_size

            def fold(arg: Any, dim: int | None) -> Any:
                if not isinstance(arg, torch.Tensor):
                    return arg
                arg = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
                return arg.flatten(0, 1)

            first = next(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor))
            axis = in_dims[first]
            each = args[first].shape[0] if axis is None else args[first].movedim(axis, 0).shape[1]

            def unfold(out: Tensor) -> tuple[Tensor, int | None]:
                # An empty 1D tensor stands for a result that was not asked for.
                return (out, None) if out.shape == (0,) else (out.unflatten(0, (size, each)), 0)

            out = op(*(fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
            if isinstance(out, torch.Tensor):
                return unfold(out)
            return tuple(zip(*(unfold(o) for o in out), strict=True))

        torch.library.register_vmap(f"fastreg::{name}", rule, lib=lib)


def grad_of(
    reference: Callable[..., Tensor], inputs: tuple[Tensor, ...], grads: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of ``reference(*inputs)`` along ``grads``; inputs are tensors. Serves as ``<op>_bwd`` of the reference."""
    # Python dispatch modes (opcheck's, say) mask out functorch's keys, and its wrapped tensors would reach the kernels.
    keys = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(*keys), torch.autocast(inputs[0].device.type, enabled=False):
        output, vjp, *_ = torch.func.vjp(reference, *inputs)
        return tuple(g.clone() for g in vjp(grads.to(output.dtype)))


def second_grad_of(
    reference: Callable[..., Tensor],
    inputs: Iterable[Tensor],
    grad: Tensor,
    directions: Iterable[Tensor | None],
) -> tuple[Tensor, ...]:
    """Double backward by differentiating the reference twice: gradients to (grad, *inputs) along `directions`.

    A direction belongs to the gradient of its input; None counts as 0.
    """

    def first_gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(reference, *inputs)[1](grad)

    outputs, vjp, *_ = torch.func.vjp(first_gradients, grad, *inputs)
    return vjp(
        tuple(
            torch.zeros_like(o) if d is None else d.to(o.dtype)
            for o, d in zip(outputs, directions, strict=True)
        )
    )


def backends() -> dict[str, dict[str, str]]:
    """Which implementation answers for each op on each device.

    Starts CUDA where the CUDA extension is loaded and there is a GPU: what answers depends on which it is.

    Returns:
        dict[str, dict[str, str]]: op -> {"cpu" | "cuda": implementation and, for the reference, why}.
    """
    if _state["cuda"] == "loaded" and not _state["gpus_asked"] and torch.cuda.is_available():
        torch.cuda.init()
    names = {"CPU": "cpu", "CUDA": "cuda"}
    table = {}
    for op in sorted(
        n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastreg::")
    ):
        row = {}
        for key, device in names.items():
            if has_kernel(op, key):
                on_gpu = _state["on_gpu"].get(op, "CUDA C++")
                row[device] = f"C++ ({build_info().get('isa')})" if key == "CPU" else on_gpu
            elif key == "CPU":
                compiled = _state["extension"] == "loaded"
                row[device] = (
                    f"PyTorch reference ({'no kernel' if compiled else 'extension ' + _state['extension']})"
                )
            else:
                missing = "no kernel" if _state["cuda"] == "loaded" else f"CUDA extension {_state['cuda']}"
                row[device] = f"PyTorch reference ({missing})"
        table[op] = row
    return table
