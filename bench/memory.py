#!/usr/bin/env python3
"""Peak and saved-for-backward memory of one call of an op, and where it comes from.

    python bench/memory.py lcc_loss --shape 160 160 160 --window 9
    python bench/memory.py warp --case both --provider voxelmorph --json

A *volume* is one channel of the case: N x D x H x W numbers of the inputs' dtype.

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


def choose_case(module, args):
    case = next((c for c in module.CASES if c.name == args.case), None) if args.case else module.CASES[0]
    if case is None:
        raise SystemExit(
            f"memory: no case {args.case!r}, there are: {', '.join(c.name for c in module.CASES)}"
        )
    channels, spatial = case.shape[1], case.shape[2:]
    if args.shape:
        if len(args.shape) not in (2, 3):
            raise SystemExit(f"memory: --shape takes 2 or 3 sizes, got {len(args.shape)}")
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
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_in(result):
    if isinstance(result, (tuple, list)):
        return [t for r in result for t in tensors_in(r)]
    return [result] if hasattr(result, "untyped_storage") else []


def peak_bytes(module, case, name, mode, device):
    import torch

    common.Runner(module, common.shrunk(case), name, mode, device)()
    runner = common.Runner(module, case, name, mode, device)
    if name == "compile":
        # Compilation needs far more than the call; it happens here.
        runner()
    kept = storage_bytes(getattr(runner.function, "state", ()))
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


def _where():
    """The innermost line outside PyTorch that led to a tensor being saved, without machine paths."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name != "memory.py" and path.exists():
            start = path.parts.index("site-packages") + 1 if "site-packages" in path.parts else -2
            return f"{'/'.join(path.parts[start:])}:{frame.lineno} {frame.name}"
    return ""


def saved_tensors(module, case, name, mode, device):
    import torch

    runner = common.Runner(module, case, name, mode, device)
    inputs = {t.untyped_storage().data_ptr() for t in runner.sets[0]}
    saved = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        # Keeping the tensor keeps its address from being given to another one.
        if pointer not in inputs and tensor.untyped_storage().nbytes() and pointer not in saved:
            saved[pointer] = (tensor.detach(), _where())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner()
    return [
        {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.untyped_storage().nbytes(),
            "where": where,
        }
        for tensor, where in saved.values()
    ]


def report(args):
    """What the child process does; returns the result as a dict."""
    import torch

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    common.quiet()
    module = common.load(args.op)
    case = choose_case(module, args)
    if args.provider not in module.PROVIDERS:
        raise SystemExit(f"memory: no provider {args.provider!r}, there are: {', '.join(module.PROVIDERS)}")
    provider = module.PROVIDERS[args.provider]
    if why := common.missing(provider.package):
        raise SystemExit(f"memory: {why}")
    mode = args.mode or provider.modes[-1]
    volume = case.shape[0] * math.prod(case.shape[2:]) * case.dtype.itemsize
    peak = peak_bytes(module, case, args.provider, mode, args.device)
    saved = [] if mode == "fwd" else saved_tensors(module, case, args.provider, mode, args.device)
    for tensor in saved:
        tensor["volumes"] = round(tensor["bytes"] / volume, 4)
    saved.sort(key=lambda t: -t["bytes"])
    return {
        "op": args.op,
        "case": case.name,
        "provider": args.provider,
        "version": common.version(provider.package),
        "mode": mode,
        "device": args.device,
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
    p.add_argument("op", choices=common.ops(), metavar="OP", help=", ".join(common.ops()))
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
    args = parser().parse_args(argv)
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
