"""A displacement that was found for a pair of scans: judged, drawn, written."""

import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreg import (
    _ext,
    _inconsistency,
    _moved,
    evaluation,
    io,
    metrics,
    outcome_inverse,
    report,
    report_page,
)
from fastreg._console import telling, warn
from fastreg._files import Name, write_json
from fastreg._version import __version__
from fastreg.data.pairs import Case
from fastreg.ops import jacobian_determinant

OUTPUTS = (
    "moved.nii.gz", "moved_labels.nii.gz", "displacement.nii.gz", "affine.tfm", "picture.png", "report.json",
)  # fmt: skip
SCHEMA = "fastreg report 1"  # report.schema.json says what that is

_LEFT = 0.5  # of the overlap, at which a motion has run away


def volume(array: np.ndarray, dtype: type[np.floating] = np.float32) -> torch.Tensor:
    """ndarray -> (1, 1, *spatial)."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))[None, None]


def intensities(array: np.ndarray) -> torch.Tensor:
    """As volume, in fp64 where fp32 would round a small range on a large offset, or tiny values, away."""
    low, high = float(np.nanmin(array)), float(np.nanmax(array))
    lost = high - low < max(2.0**-10 * max(abs(low), abs(high)), 1e-30)
    return volume(array, np.float64 if lost and array.dtype != np.float32 else np.float32)


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """MB: of the process, and of the device where that is a GPU; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        peak: dict[str, float | None] = {"process": None}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        peak["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak


class Outcome:
    """A registered Case: u (1, nd, *fixed grid), voxels, and what is said of it.

    suspect: lines that the caller has warned of already; inconsistency: where it is doubtful.
    before: (moving image on the fixed grid, where it reaches), where the caller has it. affine: of u, (nd, nd + 1), mm, where there is one.
    used: of the scores, those whose landmarks or labels u was found with.
    """

    def __init__(
        self,
        case: Case,
        u: torch.Tensor,
        device: torch.device,
        summary: Mapping[str, Any],
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
        affine: np.ndarray | None = None,
        used: Sequence[str] = (),
        suspect: Sequence[str] = (),
        inconsistency: _inconsistency.Map | None = None,
    ) -> None:
        self.inconsistency = inconsistency
        self.case, self.u, self.device, self.affine = case, u, device, affine
        self.before = before or io.resample(
            intensities(case.moving), case.moving_grid, case.fixed_grid, outside=None
        )
        self.summary: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "suspect" if suspect else "ok",
            "suspect": list(suspect),
            "fixed": {"shape": case.fixed_grid.shape, "spacing_mm": case.fixed_grid.spacing_zyx},
            "moving": {"shape": case.moving_grid.shape, "spacing_mm": case.moving_grid.spacing_zyx},
            **summary,
            **metrics.jacobian(u)._asdict(),
        }
        scores = evaluation.scores(case, u)
        for key in used:
            scores[key]["used"] = True
        doubt = evaluation.doubt(case, u)
        if doubt is not None:
            warn(doubt)
        for line in evaluation.contradictions(case):
            warn(line)
        self.moved_labels = scores.pop("moved_labels", None)
        for line in worse(scores):
            self.suspect(line)
        if inconsistency is not None:
            self.summary["inconsistency"] = found = inconsistency.plain(case.fixed_grid)
            for line in inconsistency.lines(found):
                self.suspect(line)
        self.summary |= scores

    def suspect(self, line: str) -> None:
        """Warns, and says so in the report: the result may be worse than nothing."""
        warn(line)
        self.summary["status"] = "suspect"
        self.summary["suspect"].append(line)

    def write(
        self,
        folder: Path,
        began: float,
        files: Mapping[str, Name] | None = None,
        *,
        inverse: bool = False,
        picture: bool = True,
        page: bool = False,
        interpolation: str | None = None,
        output_type: str = "same",
    ) -> None:
        """Writes OUTPUTS into the folder; began: time.perf_counter() when all began; files: of "fixed" and "moving", for the report;
        inverse: the other direction too; page: report.html too, which needs the picture; interpolation, output_type: of the moved image, as `fastreg apply`
        takes them.
        """
        case, u, grid, summary = self.case, self.u, self.case.fixed_grid, self.summary
        for which, file in (files or {}).items():
            summary[which] = {"file": str(file), **summary[which]}
        name = (files or {}).get("moving", case.title)
        dtype = case.moving.dtype if output_type == "same" else np.dtype(output_type)
        interpolation, is_labels = _moved.interpolation_of(case.moving, name, interpolation, warn)
        outside = _moved.outside_of(case.moving, is_labels)
        how: dict[str, Any] = {"interpolation": interpolation, "dtype": dtype, "outside": outside}
        moving = _moved.numbers(case.moving, dtype, outside, interpolation, name)
        moved = _moved.move(np.ascontiguousarray(moving)[None], case.moving_grid, grid, u, **how)
        _moved.tell_losses(moving, moved.array, moved.beyond, is_labels, name, warn)
        io.write_image(folder / "moved.nii.gz", moved.array[0], grid)
        io.write_displacement(folder / "displacement.nii.gz", u, grid)
        if self.moved_labels is not None:
            labels = self.moved_labels.astype(case.moving_labels.dtype)  # type: ignore[union-attr]
            io.write_image(folder / "moved_labels.nii.gz", labels, grid)
        if inverse:
            summary["inverse"] = outcome_inverse.write(
                folder, case, u, (files or {}).get("fixed", "the fixed image")
            )
        if self.affine is not None:
            matrix, space = (
                (self.affine, grid) if grid.plane is None else (grid.plane.map(self.affine), grid.plane.whole)
            )
            io.write_affine(folder / "affine.tfm", matrix, space.centre)
            kind = "rigid" if io.is_rigid(matrix) else "affine"
            summary["affine"] = {"kind": kind, "matrix_lps_mm": matrix.tolist()}
        summary["overlap_after"] = float(moved.inside.mean())
        before, after = summary.get("overlap", 0.0), summary["overlap_after"]
        if after < _LEFT * before:
            self.suspect(
                f"the moving image covers {100 * after:.3g} % of the fixed one after the motion that was found, and {100 * before:.3g} % "
                "where it started: it has run away; try another --start, or --mask and --moving-mask"
            )
        reached = self.before, (volume(moved.array[0]), torch.from_numpy(moved.inside)[None, None])
        if picture:
            off = None if self.inconsistency is None else self.inconsistency.on(grid.shape)
            draw(case, u, summary, folder / "picture.png", reached=reached, inconsistency=off)
        summary |= {
            "outside_value": outside,
            "seconds_total": round(time.perf_counter() - began, 3),
            "peak_memory_mb": peak_memory(self.device),
            **about(self.device),
        }
        write_json(folder / "report.json", summary)
        if page:
            before, after = (image.masked_fill(~known, math.nan)[0, 0].numpy() for image, known in reached)
            page_of = folder / report_page.PAGE, case.fixed, before, after, grid, case.title, summary
            report_page.write(*page_of, folder / "picture.png", folder / "report.json")

    def tell(self, out: Name) -> None:
        """Prints the summary."""
        with telling():
            print_summary(self.summary)
            print(f"written to  {out}")


def worse(scores: Mapping[str, Any]) -> list[str]:
    """A line for each score by which the scans fit less well than before."""
    lines = []
    if "tre" in scores:
        before, after = (scores["tre"][when]["mean"] for when in ("before", "after"))
        if after > 1.02 * before:
            lines.append(f"landmarks are further apart than before: {before:.2f} -> {after:.2f} mm")
    if "dice" in scores:
        before, after = (scores["dice"][when]["mean"] for when in ("before", "after"))
        if after < before - 0.005:
            lines.append(f"labels overlap less than before: Dice {before:.3f} -> {after:.3f}")
    return lines


def draw(
    case: Case,
    u: torch.Tensor,
    scores: Mapping[str, Any],
    path: Name,
    *,
    title: str = "",
    reached: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    inconsistency: np.ndarray | None = None,
) -> None:
    """A Case before and after u (1, nd, *fixed grid), voxels. scores: of evaluation.scores, for the title; title: what stands first.

    reached: (image on the fixed grid, where it reaches) before and after, where the caller has them. inconsistency: *fixed grid, mm.
    """
    if reached is None:
        grids = case.moving_grid, case.fixed_grid
        reached = [io.resample(intensities(case.moving), *grids, field) for field in (None, u)]
    parts = [title] if title else []
    parts.append(case.title)
    if "tre" in scores:
        means = [scores["tre"][when]["mean"] for when in ("before", "after")]
        parts.append("landmarks {:.2f} → {:.2f} mm".format(*means) + report_page.used(scores["tre"]))
    if "dice" in scores:
        means = [scores["dice"][when]["mean"] for when in ("before", "after")]
        parts.append("Dice {:.3f} → {:.3f}".format(*means) + report_page.used(scores["dice"]))
    seen = [image.masked_fill(~inside, math.nan)[0, 0].numpy() for image, inside in reached]
    determinant = jacobian_determinant(u)[0, 0].numpy()
    arrays = [case.fixed, *seen, u[0].numpy(), determinant]
    report.write_picture(
        path, *arrays, case.fixed_grid, title="      ".join(parts), inconsistency=inconsistency
    )


def about(device: torch.device) -> dict[str, Any]:
    """What ran it."""
    return {
        "versions": {"fastreg": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(device),
        "isa": _ext.build_info().get("isa"),
        "threads": torch.get_num_threads(),
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    if "similarity" in summary:
        print("similarity  {taken}, {why}".format(**summary["similarity"]))
    if "tre" in summary:
        before, after, n = (summary["tre"][key] for key in ("before", "after", "landmarks"))
        more = f"sd {before['sd']:.2f} -> {after['sd']:.2f}, n = {n}"
        print(
            f"landmarks   {before['mean']:.2f} -> {after['mean']:.2f} mm ({more}){report_page.used(summary['tre'])}"
        )
    if "dice" in summary:
        before, after = summary["dice"]["before"], summary["dice"]["after"]
        n = f"{len(after) - 1} label{'s' * (len(after) != 2)}"
        print(
            f"Dice        {before['mean']:.3f} -> {after['mean']:.3f} ({n}){report_page.used(summary['dice'])}"
        )
    folded, share = summary["folded_voxels"], 100 * summary["folding"]
    print(
        f"folding     {share:.3g} % of voxels ({folded}), sd of J {summary['sdj']:.3f}, of log J {summary['sdlogj']:.3f}"
    )
    if "inverse" in summary:
        print(f"inverse     {outcome_inverse.off_by(summary['inverse'])}")
    if "inconsistency" in summary:
        print(_inconsistency.text(summary["inconsistency"]))
    if summary["status"] == "suspect":
        print("status      suspect: see the warnings, or suspect in report.json")
    print(f"time        {summary['seconds']:.1f} s")
