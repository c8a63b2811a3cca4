"""A pair of scans on the command line: what users pass is read, a displacement is judged and written."""

import contextlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fastreg import _ext, evaluation, io, metrics, report
from fastreg._version import __version__
from fastreg.data import pairs
from fastreg.io import InputError
from fastreg.ops import jacobian_determinant

from .options import telling, warn

OUTPUTS = ("moved.nii.gz", "moved_labels.nii.gz", "displacement.nii.gz", "picture.png", "report.json")


def volume(array, dtype=np.float32):
    """ndarray -> (1, 1, *spatial)."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))[None, None]


def intensities(array):
    """As volume, in fp64 where fp32 would round a small range on a large offset, or tiny values, away."""
    low, high = float(array.min()), float(array.max())
    lost = high - low < max(2.0**-10 * max(abs(low), abs(high)), 1e-30)
    return volume(array, np.float64 if lost and array.dtype != np.float32 else np.float32)


def _pair(args, kind):
    paths = getattr(args, f"fixed_{kind}"), getattr(args, f"moving_{kind}")
    if (paths[0] is None) != (paths[1] is None):
        missing = "fixed" if paths[0] is None else "moving"
        raise InputError(f"--fixed-{kind} and --moving-{kind} go together: --{missing}-{kind} is missing")
    return paths if paths[0] is not None else None


def add_arguments(parser):
    """Landmarks, labels and mask of a pair."""
    for which in ("fixed", "moving"):
        text = f"points in the {which} image: header x,y,z, mm, LPS; row i of one matches row i of the other"
        parser.add_argument(f"--{which}-landmarks", metavar="CSV", help=text)
    for which in ("fixed", "moving"):
        text = f"labels on the grid of the {which} image, 0 is background"
        parser.add_argument(f"--{which}-labels", metavar="IMAGE", help=text)
    parser.add_argument("--mask", metavar="IMAGE", help="fixed grid; weights of the comparison")


def read_case(args):
    """The Case that the arguments name."""
    landmarks, labels = _pair(args, "landmarks"), _pair(args, "labels")
    pair = pairs.Pair(
        args.fixed, args.moving, *(labels or (None, None)), *(landmarks or (None, None)), args.mask
    )
    return pairs.read_case(pair, warn)


def paths_of(args):
    """The files of a pair that the arguments name."""
    kinds = ("", "_landmarks", "_labels")
    return (*(getattr(args, f"{which}{kind}") for kind in kinds for which in ("fixed", "moving")), args.mask)


def refuse_own_inputs(args, paths, outputs=OUTPUTS):
    """InputError where an output in args.out would replace one of the paths (None: not given)."""
    for path in paths:
        for name in outputs:
            with contextlib.suppress(OSError, TypeError):  # not there, not given
                if os.path.samefile(path, Path(args.out, name)):
                    raise InputError(f"{path}: is an input, and an output would replace it")


def peak_memory(device):
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


class Run:
    """A registered Case: u (1, nd, *fixed grid), voxels, and what is said of it.

    before: (moving image on the fixed grid, where it reaches), where the caller has it.
    """

    def __init__(self, case, u, device, summary, before=None):
        self.case, self.u, self.device = case, u, device
        self.before = before or io.resample(
            intensities(case.moving), case.moving_grid, case.fixed_grid, outside=None
        )
        self.summary = {
            "fixed": {"shape": case.fixed_grid.shape, "spacing_mm": case.fixed_grid.spacing_zyx},
            "moving": {"shape": case.moving_grid.shape, "spacing_mm": case.moving_grid.spacing_zyx},
            **summary,
            "folding": metrics.folding(u),
            "sdlogj": metrics.sdlogj(u),
        }
        scores = evaluation.scores(case, u)
        self.moved_labels = scores.pop("moved_labels", None)
        self.summary |= scores

    def write(self, folder, began, args=None):
        """Writes OUTPUTS into the folder; began: time.perf_counter() when the command started; args: names the files."""
        case, u, grid, summary = self.case, self.u, self.case.fixed_grid, self.summary
        for which in ("fixed", "moving") if args is not None else ():
            summary[which] = {"file": str(getattr(args, which)), **summary[which]}
        outside = float(case.moving.min())
        moved, inside = io.resample(intensities(case.moving), case.moving_grid, grid, u, outside=outside)
        io.write_image(folder / "moved.nii.gz", moved[0, 0].numpy(), grid)
        io.write_displacement(folder / "displacement.nii.gz", u, grid)
        if self.moved_labels is not None:
            labels = self.moved_labels.astype(case.moving_labels.dtype)
            io.write_image(folder / "moved_labels.nii.gz", labels, grid)
        draw(case, u, summary, folder / "picture.png", reached=(self.before, (moved, inside)))
        summary |= {
            "outside_value": outside,
            "seconds_total": round(time.perf_counter() - began, 3),
            "peak_memory_mb": peak_memory(self.device),
            **about(self.device),
        }
        write_json(folder / "report.json", summary)

    def tell(self, args):
        """Prints the summary, unless --quiet."""
        if args.quiet:
            return
        with telling():
            print_summary(self.summary)
            print(f"written to  {args.out}")


def draw(case, u, scores, path, *, title="", reached=None):
    """A Case before and after u (1, nd, *fixed grid), voxels. scores: of evaluation.scores, for the title; title: what stands first.

    reached: (image on the fixed grid, where it reaches) before and after, where the caller has them.
    """
    if reached is None:
        grids = case.moving_grid, case.fixed_grid
        reached = [io.resample(intensities(case.moving), *grids, field) for field in (None, u)]
    parts = [title] if title else []
    parts.append(case.title)
    if "tre" in scores:
        means = [scores["tre"][when]["mean"] for when in ("before", "after")]
        parts.append("landmarks {:.2f} → {:.2f} mm".format(*means))
    if "dice" in scores:
        means = [scores["dice"][when]["mean"] for when in ("before", "after")]
        parts.append("Dice {:.3f} → {:.3f}".format(*means))
    seen = [image.masked_fill(~inside, math.nan)[0, 0].numpy() for image, inside in reached]
    determinant = jacobian_determinant(u)[0, 0].numpy()
    arrays = [case.fixed, *seen, u[0].numpy(), determinant]
    report.write_picture(path, *arrays, case.fixed_grid, title="      ".join(parts))


def about(device):
    """What ran it."""
    return {
        "versions": {"fastreg": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(device),
        "isa": _ext.build_info().get("isa"),
        "threads": torch.get_num_threads(),
    }


def write_json(path, value):
    """NaN and infinity, which JSON has not, become null."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    with io.replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value):
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(summary):
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
