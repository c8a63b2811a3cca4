"""The command line: `fastreg register`, `fastreg demo`, `fastreg info`.

Exit status: 0; 1 where the demo misses its goals; 2 for bad input, with one line on stderr; 130 for Ctrl-C.
Outputs are complete or absent.
"""

import argparse
import contextlib
import inspect
import json
import logging
import math
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastreg import _ext, io, metrics, report
from fastreg._version import __version__
from fastreg.io import InputError
from fastreg.ops import jacobian_determinant
from fastreg.registration import register

OUTPUTS = ("moved.nii.gz", "moved_labels.nii.gz", "displacement.nii.gz", "picture.png", "report.json")
INPUTS = ("fixed.nii.gz", "moving.nii.gz", "fixed_labels.nii.gz", "moving_labels.nii.gz")
DEMO_OUTPUTS = (*OUTPUTS, *INPUTS, "fixed_landmarks.csv", "moving_landmarks.csv")
SMALL_OVERLAP = 0.1

HELP = {
    "similarity": "lcc; mind for images of different kinds; mse for intensities that mean the same",
    "transform": "dense; velocity: integrated, invertible up to discretisation; bspline: cubic",
    "affine": "find an affine part first",
    "window": "side of the LCC window in voxels, odd",
    "regularization": "weight of the smoothness of the displacement",
    "smoothing": "standard deviation in mm of the Gaussian that smooths updates; bspline: control point spacing",
    "levels": "number of resolutions, coarse to fine",
    "iterations": "iterations, of every level or comma-separated from coarse to fine",
    "learning_rate": "step of the optimiser",
}


@dataclass
class Case:
    """What is to be registered. Arrays lie on the grid of their image; landmarks (P, nd): mm, (x, y, z)."""

    title: str
    fixed: np.ndarray
    fixed_grid: io.Geometry
    moving: np.ndarray
    moving_grid: io.Geometry
    fixed_labels: np.ndarray | None = None
    moving_labels: np.ndarray | None = None
    fixed_landmarks: np.ndarray | None = None
    moving_landmarks: np.ndarray | None = None
    mask: np.ndarray | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _warn(message):
    print(f"fastreg: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _telling():
    """For prints: a reader that has gone away must not fail a run."""
    try:
        yield
        sys.stdout.flush()
    except (OSError, UnicodeError):
        # or the interpreter would fail to flush what is left when it exits
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def _volume(array, dtype=np.float32):
    """ndarray -> (1, 1, *spatial)."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))[None, None]


def _intensities(array):
    """As _volume, in fp64 where fp32 would round a small range on a large offset, or tiny values, away."""
    low, high = float(array.min()), float(array.max())
    lost = high - low < max(2.0**-10 * max(abs(low), abs(high)), 1e-30)
    return _volume(array, np.float64 if lost and array.dtype != np.float32 else np.float32)


# What `register` takes


def _tunable():
    """The parameters of `register` that a number on the command line can set."""
    given = ("fixed", "moving", "spacing", "mask", "progress")
    return [p for p in inspect.signature(register).parameters.values() if p.name not in given]


def _numbers(text):
    def one(part):
        try:
            return int(part)
        except ValueError:
            return float(part)

    parts = tuple(one(part) for part in text.split(","))
    return parts if len(parts) > 1 else parts[0]


_numbers.__name__ = "number"  # argparse names it in its message


def _add_parameters(parser):
    group = parser.add_argument_group("parameters of fastreg.register")
    for p in _tunable():
        flag, default = "--" + p.name.replace("_", "-"), p.default
        shown = "automatic" if default is None else default
        text = f"{HELP.get(p.name, 'see fastreg.register')} (default: {shown})"
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            kind = str if isinstance(default, str) else _numbers
            group.add_argument(flag, type=kind, default=default, metavar="VALUE", help=text)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    parser.add_argument("--progress", action="store_true", help="show progress though stderr is no terminal")
    parser.add_argument("--force", action="store_true", help="replace outputs that OUT already holds")


def _device(args):
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    name = args.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("must be cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def _progress(args):
    """Yields the `progress` argument of register: a bar a level, or None."""
    if not args.progress and (args.quiet or not sys.stderr.isatty()):
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    bar, level_shown = None, None

    def progress(level, n_levels, iteration, n_iterations, loss):
        nonlocal bar, level_shown
        if level != level_shown:
            if bar is not None:
                bar.close()
            bar = tqdm(total=n_iterations, desc=f"level {level + 1}/{n_levels}", file=sys.stderr)
            level_shown = level
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update(iteration + 1 - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


# What users pass


def _pair(args, kind):
    paths = getattr(args, f"fixed_{kind}"), getattr(args, f"moving_{kind}")
    if (paths[0] is None) != (paths[1] is None):
        missing = "fixed" if paths[0] is None else "moving"
        raise InputError(f"--fixed-{kind} and --moving-{kind} go together: --{missing}-{kind} is missing")
    return paths if paths[0] is not None else None


def _read_intensities(path):
    array, grid = io.read_image(path)
    if array.min() == array.max():
        raise InputError(f"{path}: must not be constant, got {array.min():g} everywhere")
    largest = max(abs(float(array.min())), abs(float(array.max())))
    if largest > torch.finfo(torch.float32).max:
        raise InputError(f"{path}: must fit single precision, got values as large as {largest:g}")
    return array, grid


def _read_beside(path, grid, image):
    """An image that must lie on the grid of another one."""
    array, own = io.read_image(path)
    if not own.matches(grid):
        detail = f"{own} against {grid}" if str(own) != str(grid) else "origin or direction differ"
        raise InputError(f"{path}: must lie on the grid of {image}: {detail}")
    return array


def _read_labels(path, grid, image):
    array = _read_beside(path, grid, image)
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise InputError(f"{path}: labels must be whole numbers")
    if max(abs(float(array.min())), abs(float(array.max()))) >= 2**53:
        raise InputError(f"{path}: labels must be below 2^53")
    return array


def _read_points(paths, fixed_grid, moving_grid):
    points = [io.read_landmarks(path, fixed_grid.nd) for path in paths]
    if len(points[0]) != len(points[1]):
        raise InputError(f"{paths[0]} holds {len(points[0])} landmarks, {paths[1]} holds {len(points[1])}")
    grids = (fixed_grid, moving_grid)
    for path, p, grid, which in zip(paths, points, grids, ("fixed", "moving"), strict=True):
        outside = int((~grid.contains(grid.to_index(p))).sum())
        if outside == len(p):
            raise InputError(f"{path}: no landmark lies in the {which} image (they must be mm, LPS)")
        if outside:
            _warn(f"{path}: {outside} of {len(p)} landmarks lie outside the {which} image, and count")
    return points


def _read_case(args):
    landmarks, labels = _pair(args, "landmarks"), _pair(args, "labels")
    fixed, fixed_grid = _read_intensities(args.fixed)
    moving, moving_grid = _read_intensities(args.moving)
    if fixed_grid.nd != moving_grid.nd:
        raise InputError(f"{args.fixed} is {fixed_grid.nd}D and {args.moving} is {moving_grid.nd}D")
    case = Case(f"{Path(args.moving).name} → {Path(args.fixed).name}", fixed, fixed_grid, moving, moving_grid)
    if landmarks:
        case.fixed_landmarks, case.moving_landmarks = _read_points(landmarks, fixed_grid, moving_grid)
    if labels:
        case.fixed_labels = _read_labels(labels[0], fixed_grid, args.fixed)
        case.moving_labels = _read_labels(labels[1], moving_grid, args.moving)
        if not (case.fixed_labels.any() or case.moving_labels.any()):
            raise InputError(f"{labels[0]} and {labels[1]} hold background only")
    if args.mask:
        case.mask = _read_beside(args.mask, fixed_grid, args.fixed)
        if case.mask.min() < 0 or not case.mask.any():
            raise InputError(f"{args.mask}: a mask must be 0 or more everywhere, and more somewhere")
    return case


# Registration


def _peak_memory(device):
    """MB: of the process, and of the device where that is a GPU; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        peak = {"process": None}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        peak["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak


def _weights(case, inside):
    """Where the loss counts: where the moving image reaches, times the user's mask; None: everywhere."""
    share = inside.double().mean().item()
    if share == 0:
        raise InputError("the fixed and the moving image do not overlap in physical space")
    if share < SMALL_OVERLAP:
        _warn(f"the moving image covers only {100 * share:.2g} % of the fixed one")
    if case.mask is None:
        return share, None if share == 1 else inside.float()
    # only ratios count, and fp32 does not hold all that a file may
    weights = _volume(case.mask / float(case.mask.max())) * inside
    if not weights.any():
        raise InputError("the mask is 0 wherever the moving image reaches")
    return share, weights


def _solve(case, args):
    """Registers. Returns u (1, nd, *spatial) on CPU, (moving on the fixed grid, where), summary, device."""
    device = _device(args)
    parameters = {p.name: getattr(args, p.name) for p in _tunable()}
    # Beyond the moving image its border goes on, and does not count: anything else would be an edge.
    moving = _intensities(case.moving)
    start, inside = io.resample(moving, case.moving_grid, case.fixed_grid, outside=None)
    overlap, weights = _weights(case, inside)
    with _progress(args) as progress:
        result = register(
            _intensities(case.fixed).to(device),
            start.to(device),
            spacing=case.fixed_grid.spacing_zyx,
            mask=None if weights is None else weights.to(device),
            progress=progress,
            **parameters,
        )
    u = result.displacement.detach().cpu()
    summary = {
        "fixed": {"shape": case.fixed_grid.shape, "spacing_mm": case.fixed_grid.spacing_zyx},
        "moving": {"shape": case.moving_grid.shape, "spacing_mm": case.moving_grid.spacing_zyx},
        "overlap": overlap,
        "parameters": parameters,
        "affine_voxels_zyx": None if result.affine is None else result.affine[0].tolist(),
        "levels": result.levels,
        "seconds": result.seconds,
        "folding": metrics.folding(u),
        "sdlogj": metrics.sdlogj(u),
    }
    return u, (start, inside), summary, device


def _judge(case, u, summary):
    """Adds "tre" and "dice" to the summary; returns the moved labels."""
    grid = case.fixed_grid
    if case.fixed_landmarks is not None:
        fixed = torch.from_numpy(grid.to_index(case.fixed_landmarks))
        moving = torch.from_numpy(grid.to_index(case.moving_landmarks))
        summary["tre"] = {
            "unit": "mm",
            "landmarks": len(fixed),
            "before": metrics.tre(fixed, moving, grid.spacing_zyx)._asdict(),
            "after": metrics.tre(metrics.move_points(fixed, u), moving, grid.spacing_zyx)._asdict(),
        }
    if case.fixed_labels is None:
        return None
    fixed, moving = _volume(case.fixed_labels, np.int64), _volume(case.moving_labels, np.float64)
    before, after = (
        io.resample(moving, case.moving_grid, grid, field, mode="nearest")[0].long() for field in (None, u)
    )
    # The same labels before and after, so that the means compare: one that is moved out of sight scores 0.
    present = torch.cat([fixed.unique(), before.unique(), after.unique()]).unique().tolist()
    labels = [label for label in present if label != 0]
    summary["dice"] = {}
    for when, moved in (("before", before), ("after", after)):
        scores = metrics.dice(fixed, moved, labels).per_label
        scores = {label: scores.get(label, 0.0) for label in labels}
        summary["dice"][when] = {"mean": sum(scores.values()) / len(scores) if scores else math.nan, **scores}
    return after[0, 0].numpy()


def _finish(case, u, before, moved_labels, summary, folder, device, began):
    """Writes the outputs into the folder."""
    grid = case.fixed_grid
    start, covered = before
    outside = float(case.moving.min())
    moved, inside = io.resample(_intensities(case.moving), case.moving_grid, grid, u, outside=outside)
    io.write_image(folder / "moved.nii.gz", moved[0, 0].numpy(), grid)
    io.write_displacement(folder / "displacement.nii.gz", u, grid)
    if moved_labels is not None:
        labels = moved_labels.astype(case.moving_labels.dtype)
        io.write_image(folder / "moved_labels.nii.gz", labels, grid)
    title = [case.title]
    if "tre" in summary:
        means = [summary["tre"][when]["mean"] for when in ("before", "after")]
        title.append("landmarks {:.2f} → {:.2f} mm".format(*means))
    if "dice" in summary:
        means = [summary["dice"][when]["mean"] for when in ("before", "after")]
        title.append("Dice {:.3f} → {:.3f}".format(*means))
    determinant = jacobian_determinant(u)[0, 0].numpy()
    seen = [v.masked_fill(~reach, math.nan)[0, 0].numpy() for v, reach in ((start, covered), (moved, inside))]
    arrays = [case.fixed, *seen, u[0].numpy(), determinant]
    report.write_picture(folder / "picture.png", *arrays, grid, title="      ".join(title))
    summary |= {
        "outside_value": outside,
        "seconds_total": round(time.perf_counter() - began, 3),
        "peak_memory_mb": _peak_memory(device),
        "versions": {"fastreg": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(device),
        "isa": _ext.build_info().get("isa"),
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(_plain(summary), indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _plain(value):
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_summary(summary):
    if "tre" in summary:
        before, after, n = (summary["tre"][key] for key in ("before", "after", "landmarks"))
        more = f"sd {before['sd']:.2f} -> {after['sd']:.2f}, n = {n}"
        print(f"landmarks   {before['mean']:.2f} -> {after['mean']:.2f} mm ({more})")
    if "dice" in summary:
        before, after = summary["dice"]["before"], summary["dice"]["after"]
        print(
            f"Dice        {before['mean']:.3f} -> {after['mean']:.3f} ({len(after) - 1} label{'s' * (len(after) != 2)})"
        )
    print(f"folding     {100 * summary['folding']:.3g} % of voxels, sd of log J {summary['sdlogj']:.3f}")
    print(f"time        {summary['seconds']:.1f} s")


# The commands


def _refuse_own_inputs(args):
    kinds = ("", "_landmarks", "_labels")
    paths = [getattr(args, f"{which}{kind}") for kind in kinds for which in ("fixed", "moving")]
    for path in (*paths, args.mask):
        for name in OUTPUTS:
            with contextlib.suppress(OSError, TypeError):  # not there, not given
                if os.path.samefile(path, Path(args.out, name)):
                    raise InputError(f"{path}: is an input, and an output would replace it")


def _register(args):
    began = time.perf_counter()
    report.require_matplotlib()
    _refuse_own_inputs(args)
    with io.output_folder(args.out, OUTPUTS, replace=args.force) as folder:
        case = _read_case(args)
        u, before, summary, device = _solve(case, args)
        moved_labels = _judge(case, u, summary)
        for which in ("fixed", "moving"):
            summary[which] = {"file": str(getattr(args, which)), **summary[which]}
        _finish(case, u, before, moved_labels, summary, folder, device, began)
    if not args.quiet:
        with _telling():
            _print_summary(summary)
            print(f"written to  {args.out}")
    return 0


def _demo(args):
    from fastreg.data import phantom

    began = time.perf_counter()
    if args.out is not None:
        report.require_matplotlib()
        output = io.output_folder(args.out, DEMO_OUTPUTS, replace=args.force)
    else:
        output = contextlib.nullcontext()
    with output as folder:
        if not args.quiet:
            with _telling():
                print("making a breathing thorax whose motion is known ...")
        p = phantom.thorax()
        grid = io.Geometry.of(p.fixed.shape[2:], p.spacing)
        fixed, moving, fixed_labels, moving_labels = (
            t[0, 0].numpy() for t in (p.fixed, p.moving, p.fixed_labels, p.moving_labels)
        )
        landmarks = [grid.to_physical(t.numpy()) for t in (p.fixed_landmarks, p.moving_landmarks)]
        case = Case("thorax phantom", fixed, grid, moving, grid, fixed_labels, moving_labels, *landmarks)
        u, before, summary, device = _solve(case, args)
        moved_labels = _judge(case, u, summary)
        score = summary["score"] = phantom.score(p, u, summary["seconds"])
        missed = summary["missed"] = phantom.failures(score)
        if folder is not None:
            for name, array in zip(INPUTS, (fixed, moving, fixed_labels, moving_labels), strict=True):
                io.write_image(folder / name, array, grid)
            for which, points in zip(("fixed", "moving"), landmarks, strict=True):
                io.write_landmarks(folder / f"{which}_landmarks.csv", points)
            _finish(case, u, before, moved_labels, summary, folder, device, began)
    if not args.quiet:
        near = p.near_wall
        wall = metrics.tre(p.fixed_landmarks[near], p.moving_landmarks[near], p.spacing).mean
        goals, dice = phantom.GOALS, summary["dice"]
        rows = [
            ("landmarks, mm", score["tre_before"], score["tre_after"], goals["tre_after"]),
            ("near the wall, mm", wall, score["tre_wall"], goals["tre_wall"]),
            ("folding, %", None, 100 * score["folding"], 100 * goals["folding"]),
            ("seconds", None, score["seconds"], goals["seconds"]),
            ("Dice of the lungs", dice["before"]["mean"], dice["after"]["mean"], None),
        ]
        with _telling():
            print(f"\n{'':20}{'before':>10}{'after':>10}{'goal':>10}")
            for name, *values in rows:
                print(f"{name:20}" + "".join(f"{'' if v is None else f'{v:.2f}':>10}" for v in values))
            print("all goals are met" if not missed else "missed: " + "; ".join(missed))
            if args.out is not None:
                print(f"written to {args.out}")
    return 1 if missed else 0


def _info(args):
    build = _ext.build_info()
    print(f"fastreg     {__version__}")
    print(f"torch       {torch.__version__}")
    print(f"python      {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"cpu         {os.cpu_count()} logical cores, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpu         {', '.join(gpus) if gpus else 'none'}")
    print(f"extension   {_ext._state['extension']}")
    if build:
        available = build.get("isa_available")
        available = ", ".join(available) if isinstance(available, (list, tuple)) else available
        print(f"isa         {build.get('isa')} in use; available: {available}")
    table = _ext.backends()
    devices = sorted({device for row in table.values() for device in row})
    width = max((len(op) for op in table), default=2) + 2
    columns = {d: max(len(d), *(len(row.get(d, "")) for row in table.values())) + 2 for d in devices}
    print("\n" + "op".ljust(width) + "".join(d.ljust(columns[d]) for d in devices).rstrip())
    for op, row in table.items():
        print(op.ljust(width) + "".join(row.get(d, "").ljust(columns[d]) for d in devices).rstrip())
    return 0


def _parser():
    parser = _Parser(prog="fastreg", description="Deformable image registration.")
    parser.add_argument("--version", action="version", version=f"fastreg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "register",
        help="register two images",
        description="Registers MOVING to FIXED: 2D or 3D, scalar, each on its own grid. OUT becomes "
        "a folder with moved.nii.gz, displacement.nii.gz (ITK displacement field), picture.png, report.json.",
    )
    command.add_argument("fixed", metavar="FIXED", help="image, or folder with one DICOM series")
    command.add_argument("moving", metavar="MOVING")
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to make")
    for which in ("fixed", "moving"):
        text = f"points in the {which} image: header x,y,z, mm, LPS; row i of one matches row i of the other"
        command.add_argument(f"--{which}-landmarks", metavar="CSV", help=text)
    for which in ("fixed", "moving"):
        text = f"labels on the grid of the {which} image, 0 is background"
        command.add_argument(f"--{which}-labels", metavar="IMAGE", help=text)
    command.add_argument("--mask", metavar="IMAGE", help="fixed grid; weights of the comparison")
    _add_parameters(command)
    command.set_defaults(run=_register)

    command = commands.add_parser(
        "demo",
        help="register a synthetic breathing thorax and judge the result",
        description="Registers a synthetic thorax whose motion is known. Exit status 1 if a goal is missed.",
    )
    command.add_argument("-o", "--out", metavar="OUT", help="folder to make: outputs and inputs")
    _add_parameters(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser("info", help="versions, devices, which implementation each op has")
    command.set_defaults(run=_info)
    return parser


def _terminate(number, _):
    # As an exception, so that the unfinished output is removed.
    sys.exit(128 + number)


def _line(error):
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'failed').lower()}"
    return " ".join(str(error).split())


def main(argv=None):
    """Runs the command line; returns the exit status."""
    # It announces its font cache on the first run, and complains about unwritable homes.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminate)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, _terminate)
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("fastreg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, OSError, ImportError) as error:
        message = _line(error)
    except (ValueError, TypeError) as error:
        # Ours name the op; others are bugs and keep their traceback.
        if not str(error).startswith("fastreg::"):
            raise
        message = _line(error).replace("fastreg::register: ", "", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        message = "not enough memory for images of this size"
    print(f"fastreg: error: {message}", file=sys.stderr)
    return 2
