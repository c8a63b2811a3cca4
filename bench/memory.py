#!/usr/bin/env python3
"""Peak and saved-for-backward memory of one call of an op, or of a function or module of yours, and where it comes from.

    python bench/memory.py lcc_loss --shape 160 160 160 --window 9
    python bench/memory.py warp --case both --provider voxelmorph --json
    python bench/memory.py --import my_module:MyLoss --shape 160 160 160
    python bench/memory.py --import my_module:warp --inputs image displacement

A *volume* is one channel of the case: N x D x H x W numbers of the inputs' dtype.

--import takes a function, a module, or what makes one without arguments (a class, say); `my_module` is looked for in the
current folder first. It is given an input for each argument without a default. Their names say what they are:
%s
else an image; --inputs says otherwise. Images and displacements require gradients. Parameters count as inputs, buffers as
kept between calls.

peak    What the call holds at its worst beyond its inputs, its outputs and the gradients of its inputs,
        all of which the caller must hold anyway; buffers that a provider keeps between calls (an identity
        grid) count. On CPU: a fresh process, one call at a tiny size to load and start everything, inputs
        touched, free memory given back, then the resident set's high-water mark over one call, less the
        resident set before it, less outputs and gradients, plus kept buffers. glibc is told to return
        freed blocks at once (MALLOC_MMAP_THRESHOLD_). On CUDA: the same from the allocator's counters.
saved   What autograd keeps from forward to backward: storages given to the saved-tensor hooks, each once,
        without those of the inputs, and the line that led to each.

Mode fwd is the forward under no_grad, fwd+bwd forward and backward, iteration (register) a whole step.
"""

import argparse
import ctypes
import gc
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common

# What --inputs takes -> names of arguments that are one unless it says otherwise.
KINDS = {
    "image": (),
    "fixed": ("fixed", "target", "y_true", "reference"),
    "mask": ("mask",),
    "displacement": ("displacement", "flow", "ddf", "dvf", "field", "velocity", "u", "v"),
}
# In what PyTorch raises where torch.func meets the hooks that see what is saved.
HIDDEN = "saved tensor hooks"
__doc__ %= "\n".join(f"    {kind:14}{', '.join(names)}" for kind, names in KINDS.items() if names)


def choose_case(module, args):
    case = next((c for c in module.CASES if c.name == args.case), None) if args.case else module.CASES[0]
    if case is None:
        raise SystemExit(
            f"memory: no case {args.case!r}, there are: {', '.join(c.name for c in module.CASES)}"
        )
    channels, spatial = case.shape[1], case.shape[2:]
    if args.shape:
        # A displacement has as many channels as axes.
        channels = len(args.shape) if channels == len(spatial) else channels
        spatial = tuple(args.shape)
    params = {**case.params, **({"window": args.window} if args.window else {})}
    return replace(case, shape=(case.shape[0], args.channels or channels, *spatial), params=params, only=None)


class HighWater:
    """Peak resident set over a block: the kernel's own mark, reset; else sampled from a thread."""

    def __enter__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        except OSError:
            self.exact, self.peak, self.done = False, resident("VmRSS"), False
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def _sample(self):
        while not self.done:
            self.peak = max(self.peak, resident("VmRSS"))
            time.sleep(5e-4)

    def __exit__(self, *error):
        if self.exact:
            self.peak = resident("VmHWM")
        else:
            self.done = True
            self.thread.join()


def resident(entry):
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {entry}")


def give_back():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def storage_bytes(tensors):
    """Of what tensors hold, each storage once, but no more than their elements: F.mse_loss returns a scalar whose storage
    is as large as its input."""
    held = {}
    for t in tensors:
        storage = t.untyped_storage()
        before = held.get(storage.data_ptr(), 0)
        held[storage.data_ptr()] = min(storage.nbytes(), before + t.numel() * t.element_size())
    return sum(held.values())


def tensors_in(result):
    if isinstance(result, (tuple, list)):
        return [t for r in result for t in tensors_in(r)]
    return [result] if hasattr(result, "untyped_storage") else []


class Own:
    """A function or module that is not of bench/: as common.Runner, it runs one call and returns its results."""

    def __init__(self, args):
        self.args = args
        self.name = vars(args)["import"]
        self.function = imported(self.name)
        self.kinds = args.inputs or kinds_of(self.function, self.name)
        shape = (1, args.channels or 1, *(args.shape or (64, 64, 64)))
        self.case = common.Case(", ".join(self.kinds), shape, (), dtype=dtype_of(args.dtype))
        self.weights = None

    def prepare(self):
        import torch

        module = self.function if isinstance(self.function, torch.nn.Module) else torch.nn.Module()
        module.to(self.args.device)
        self.state = list(module.buffers())
        self.sets = [[*map(self.input, range(len(self.kinds)), self.kinds), *module.parameters()]]
        # The gradients of outputs are noise, made beforehand. A call loads and starts everything: at full size, as a
        # module may be made for one.
        self.weights = [torch.randn_like(o) for o in self.outputs()]
        self()

    def input(self, seed, kind):
        if kind == "displacement":
            return common.displacement(
                self.case.shape, seed, self.args.device, self.case.dtype
            ).requires_grad_()
        image = common.image(self.case.shape, seed, self.args.device, self.case.dtype)
        return (image[:, :1] > 0.3).to(image) if kind == "mask" else image.requires_grad_(kind == "image")

    def outputs(self):
        import torch
        from torch.utils._pytree import tree_leaves

        try:
            result = self.function(*self.sets[0][: len(self.kinds)])
        except Exception as error:
            if HIDDEN in str(error):
                raise
            reason, where = common.failure(error).text, _where(error.__traceback__)
            raise SystemExit(
                f"memory: {self.name} of {self.case} {reason}" + f", at {where}" * bool(where)
            ) from error
        outputs = [o for o in tree_leaves(result) if isinstance(o, torch.Tensor)]
        if not outputs:
            raise SystemExit(f"memory: {self.name} returns no tensor")
        if self.args.mode != "fwd" and not any(o.requires_grad for o in outputs):
            raise SystemExit(
                f"memory: what {self.name} returns requires no gradient: --mode fwd measures the forward alone"
            )
        return outputs

    def __call__(self):
        import torch

        if self.args.mode == "fwd":
            with torch.no_grad():
                return self.outputs(), ()
        outputs = self.outputs()
        wanted = [t for t in self.sets[0] if t.requires_grad]
        pairs = [(o, w) for o, w in zip(outputs, self.weights, strict=True) if o.requires_grad]
        roots, weights = zip(*pairs, strict=True)
        return outputs, torch.autograd.grad(roots, wanted, weights, allow_unused=True)


def dtype_of(name):
    import torch

    return getattr(torch, name or "float32")


def imported(name):
    """What `--import MODULE:NAME` means; a class, or a function without arguments, makes it."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise SystemExit(f"memory: --import takes MODULE:NAME, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(path)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise SystemExit(
                f"memory: there is no module {error.name}, in {os.getcwd()} or installed"
            ) from error
        raise SystemExit(f"memory: importing {path} {common.failure(error).text}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
            raise SystemExit(f"memory: {path} has no {attribute}, it has: {', '.join(there)}")
        found = getattr(found, part)
    if inspect.isclass(found) or (inspect.isfunction(found) and not inspect.signature(found).parameters):
        try:
            found = found()
        except Exception as error:
            raise SystemExit(
                f"memory: {attribute}() {common.failure(error).text}; a function without arguments can make it"
            ) from error
    if not callable(found):
        raise SystemExit(f"memory: {name} cannot be called, it is a {type(found).__name__}")
    return found


def kinds_of(function, name):
    """What its arguments without a default are, by their names."""
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not needed:
        raise SystemExit(f"memory: {name} does not say how many inputs it takes; --inputs image image does")
    return [next((k for k, names in KINDS.items() if p.name in names), "image") for p in needed]


def peak_bytes(runner, device):
    """Of one call, once everything it loads, compiles and starts is there."""
    import torch

    kept = storage_bytes(getattr(runner, "state", getattr(runner.function, "state", ())))
    give_back()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = runner()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident("VmRSS")
        with HighWater() as mark:
            result = runner()
        peak = mark.peak
    held = storage_bytes(tensors_in(result))
    return peak - before - held + kept


def _where(trace=None):
    """The innermost line outside PyTorch that led to a tensor being saved, or to an error; without machine paths."""
    for frame in reversed(traceback.extract_tb(trace) if trace else traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name != "memory.py" and path.exists():
            start = path.parts.index("site-packages") + 1 if "site-packages" in path.parts else -2
            return f"{'/'.join(path.parts[start:])}:{frame.lineno} {frame.name}"
    return ""


def saved_tensors(runner):
    import torch

    inputs = {t.untyped_storage().data_ptr() for t in runner.sets[0]}
    saved = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        # Keeping the tensor keeps its address from being given to another one.
        if pointer not in inputs and tensor.untyped_storage().nbytes() and pointer not in saved:
            saved[pointer] = (tensor.detach(), _where())
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            runner()
    except RuntimeError as error:
        if HIDDEN not in str(error):
            raise
        raise SystemExit(
            f"memory: torch.func hides what is saved; {compiled() or 'fastreg does not use it'}"
        ) from error
    return [
        {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.untyped_storage().nbytes(),
            "where": where,
        }
        for tensor, where in saved.values()
    ]


def compiled():
    """Why fastreg's kernels cannot be measured here, and what mends it; empty where they can."""
    from fastreg import _ext

    state = _ext._state["extension"]
    return (
        ""
        if state == "loaded"
        else f"fastreg's compiled extension is {state}, and its reference uses it. {_ext._MEND}"
    )


def report(args):
    """What the child process does; returns the result as a dict."""
    import torch

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    common.quiet()
    if args.shape and (len(args.shape) not in (2, 3) or min(args.shape) < 1):
        raise SystemExit(f"memory: --shape takes 2 or 3 sizes, got {' '.join(map(str, args.shape))}")
    if vars(args)["import"]:
        own = Own(args)
        own.prepare()
        args.mode = args.mode or "fwd+bwd"
        about = {
            "op": own.name,
            "case": f"of {own.case}",
            "provider": "own",
            "version": common.version("torch"),
        }
        return measured(own, own.case, args.mode, args.device, about)
    module = common.load(args.op)
    case = choose_case(module, args)
    if args.provider not in module.PROVIDERS:
        raise SystemExit(f"memory: no provider {args.provider!r}, there are: {', '.join(module.PROVIDERS)}")
    provider = module.PROVIDERS[args.provider]
    if why := common.missing(provider.package):
        raise SystemExit(f"memory: {why}")
    mode = args.mode or provider.modes[-1]
    if args.provider == "fastreg" and args.device == "cpu" and mode != "fwd" and compiled():
        raise SystemExit(f"memory: torch.func hides what is saved; {compiled()}")
    common.Runner(module, common.shrunk(case), args.provider, mode, args.device)()
    runner = common.Runner(module, case, args.provider, mode, args.device)
    if args.provider == "compile":
        # Compilation needs far more than the call; it happens here.
        runner()
    about = {
        "op": args.op,
        "case": case.name,
        "provider": args.provider,
        "version": common.version(provider.package),
    }
    return measured(runner, case, mode, args.device, about)


def measured(runner, case, mode, device, about):
    volume = case.shape[0] * math.prod(case.shape[2:]) * case.dtype.itemsize
    peak = peak_bytes(runner, device)
    saved = [] if mode == "fwd" else saved_tensors(runner)
    for tensor in saved:
        tensor["volumes"] = round(tensor["bytes"] / volume, 4)
    saved.sort(key=lambda t: -t["bytes"])
    return {
        **about,
        "mode": mode,
        "device": device,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "params": case.params,
        "volume_bytes": volume,
        "peak_bytes": peak,
        "peak_volumes": round(peak / volume, 3),
        "saved_bytes": sum(t["bytes"] for t in saved),
        "saved_volumes": round(sum(t["bytes"] for t in saved) / volume, 3),
        "saved": saved,
    }


def fresh(arguments, script=__file__):
    """Runs a script in a process of its own, as --child, and returns its report."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(script).resolve()), *map(str, arguments), "--child"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(process.stdout.strip().splitlines()[-1])


def text(result):
    volume = result["volume_bytes"]
    lines = [
        f"{result['op']} {result['case']}, {result['version']} ({result['provider']}), {result['mode']}, "
        f"{'x'.join(map(str, result['shape']))} {result['dtype']}, {result['device']}; "
        f"one volume is {volume / 2**20:.4g} MiB",
        f"peak beyond inputs, outputs and gradients: {result['peak_volumes']:.2f} volumes "
        f"({result['peak_bytes'] / 2**20:.4g} MiB)",
    ]
    if result["mode"] != "fwd":
        lines.append(
            f"saved for backward, without inputs:        {result['saved_volumes']:.2f} volumes "
            f"({result['saved_bytes'] / 2**20:.4g} MiB)"
        )
        small = [t for t in result["saved"] if t["bytes"] < 0.001 * volume]
        for t in result["saved"]:
            if t not in small:
                shape = "x".join(map(str, t["shape"])) or "scalar"
                lines.append(f"  {t['volumes']:8.2f}  {shape:28} {t['dtype']:9} {t['where']}")
        if small:
            lines.append(f"  {sum(t['volumes'] for t in small):8.2f}  {len(small)} small ones")
    return "\n".join(lines)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("op", nargs="?", choices=common.ops(), metavar="OP", help=", ".join(common.ops()))
    p.add_argument("--import", metavar="MODULE:NAME", help="a function or module of yours instead of an op")
    p.add_argument("--inputs", nargs="+", choices=KINDS, help="what --import is given, in this order")
    p.add_argument(
        "--dtype", choices=["float64", "float32", "float16", "bfloat16"], help="of --import's inputs"
    )
    p.add_argument("--case", help="case of bench_<op>.py (default: its first)")
    p.add_argument("--shape", type=int, nargs="+", help="spatial size instead of the case's")
    p.add_argument("--channels", type=int, help="channels instead of the case's")
    p.add_argument("--window", type=int, help="window instead of the case's (lcc_loss)")
    p.add_argument("--provider", default="fastreg", help="as named in bench_<op>.py (default: fastreg)")
    p.add_argument("--mode", choices=["fwd", "fwd+bwd", common.ITERATION])
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = parser()
    args = p.parse_args(argv)
    if bool(args.op) == bool(vars(args)["import"]):
        p.error("takes an op, or --import MODULE:NAME")
    if args.child:
        print(json.dumps(report(args)))
        return 0
    try:
        result = fresh([a for a in argv if a != "--json"])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1) if args.json else text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
