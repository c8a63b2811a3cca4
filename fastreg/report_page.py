"""The report as one page of HTML that needs nothing else: numbers, slices to leaf through, the picture."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from fastreg._files import Name, write_bytes
from fastreg.io import Geometry
from fastreg.outcome_inverse import off_by
from fastreg.report import LETTERS, anatomical, cuts_of, planes_of, turned, window_of

PAGE = "report.html"
SIZE = 5_000_000  # bytes, of a page: what mail still takes
SLICES = 32  # of a plane, at most
SIDES = (256, 192, 144, 96, 64, 32)  # pixels, the largest that fits
QUALITY = 82


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _jpeg(pixels: np.ndarray, side: int) -> str:
    """uint8 (height, width), made smaller where it is larger than side."""
    from PIL import Image  # matplotlib needs it too

    if max(pixels.shape) > side:
        size = [max(1, round(n * side / max(pixels.shape))) for n in pixels.shape]
        area = torch.nn.functional.interpolate(
            torch.from_numpy(pixels)[None, None].float(), size, mode="area"
        )
        pixels = area[0, 0].round().byte().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return _uri(stream.getvalue(), "jpeg")


def _grey(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """uint8, black where it is NaN."""
    low, high = window
    return (255 * np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1)).astype(np.uint8)


def slices(
    fixed: np.ndarray, before: np.ndarray, after: np.ndarray, geometry: Geometry, size: int
) -> list[dict[str, Any]]:
    """What the page shows of each plane, as it wants it, in about `size` characters at most. The arrays: as for report.draw."""
    order, flip = anatomical(geometry)
    nd = geometry.nd
    windows = {"fixed": window_of(fixed), "before": window_of(before)}
    windows["after"] = windows["before"]  # one scale for both, or they would not compare
    images = {"fixed": fixed, "before": before, "after": after}
    grey = {name: turned(_grey(image, windows[name]), order, flip) for name, image in images.items()}
    spacing = [geometry.spacing_zyx[axis] for axis in order]
    middle = cuts_of(grey["before"].astype(np.float32) - grey["fixed"]) if nd == 3 else []  # as the picture
    planes = []
    for name, axis, cut, vertical, horizontal, up in planes_of(nd, middle):
        of = 1 if axis is None else fixed.shape[order[axis]]
        chosen = np.unique(np.linspace(0, of - 1, min(of, SLICES)).round().astype(int)).tolist()
        letters = ["", "", "", ""]
        if nd == 3:
            letters = [*LETTERS[horizontal], *LETTERS[vertical][:: -1 if up else 1]]
        planes.append(
            {
                "name": name,
                "of": of,
                "slices": chosen,
                "start": int(np.abs(np.array(chosen) - (cut or 0)).argmin()),
                "letters": letters,
                "width": round(grey["fixed"].shape[horizontal] * spacing[horizontal], 3),
                "height": round(grey["fixed"].shape[vertical] * spacing[vertical], 3),
            }
        )
    cuts = {
        (p["name"], name): [np.flipud(s) if up else s for s in ([array] if axis is None else np.moveaxis(array, axis, 0)[p["slices"]])]
        for p, (_, axis, _, _, _, up) in zip(planes, planes_of(nd, middle), strict=True)
        for name, array in grey.items()
    }  # fmt: skip
    for side in SIDES:
        uris = {key: [_jpeg(np.ascontiguousarray(s), side) for s in some] for key, some in cuts.items()}
        if sum(len(uri) for some in uris.values() for uri in some) <= size:
            break
    return [{**p, "images": {name: uris[p["name"], name] for name in grey}} for p in planes]


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)


def used(score: Mapping[str, Any]) -> str:
    """What to add to a score of landmarks or labels that the displacement was found with."""
    return ", used: no measure of accuracy" if score.get("used") else ""


def _numbers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    rows = []
    for which in ("fixed", "moving"):
        grid = summary[which]
        size = "x".join(map(str, grid["shape"][::-1]))
        step = " x ".join(f"{s:.4g}" for s in grid["spacing_mm"][::-1])
        rows.append((which, f"{grid.get('file', '')} ({size} voxels of {step} mm)".lstrip()))
    if "tre" in summary:
        tre = summary["tre"]
        means = " → ".join(f"{tre[k]['mean']:.2f} ± {tre[k]['sd']:.2f}" for k in ("before", "after"))
        rows.append(("landmarks", f"{means} mm (mean ± sd, n = {tre['landmarks']}){used(tre)}"))
    if "dice" in summary:
        before, after = (summary["dice"][k] for k in ("before", "after"))
        n = len(after) - 1
        means = f"{before['mean']:.3f} → {after['mean']:.3f}"
        rows.append(("Dice", f"{means} (mean of {n} label{'s' * (n != 1)}){used(summary['dice'])}"))
    folded = f"{100 * summary['folding']:.3g} % of voxels ({summary['folded_voxels']})"
    rows.append(("folding", folded))
    rows.append(("sd of J, of log J", f"{summary['sdj']:.3f}, {summary['sdlogj']:.3f}"))
    if "start" in summary and summary["start"]["taken"] != "none":
        start = summary["start"]
        turned = f"turned by {start['degrees']:.1f} degrees, " if start.get("degrees") else ""
        rows.append(("start", f"{start['taken']}, {turned}{start['mm']:.1f} mm"))
    if "similarity" in summary:
        rows.append(("similarity", "{taken}, {why}".format(**summary["similarity"])))
    if "inverse" in summary:
        rows.append(("inverse", off_by(summary["inverse"])))
    if "overlap" in summary:
        shares = " → ".join(f"{100 * summary[key]:.3g}" for key in ("overlap", "overlap_after"))
        rows.append(("overlap", f"{shares} % of the fixed image"))
    rows.append(("method", str(summary.get("method", "fastreg.register"))))
    rows.append(("time", f"{summary['seconds']:.1f} s of {summary['seconds_total']:.1f} s"))
    versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
    return [*rows, ("with", f"{versions}, {summary['device']}")]


def _by_label(summary: Mapping[str, Any]) -> str:
    if "dice" not in summary or len(summary["dice"]["after"]) < 3:
        return ""
    before, after = (summary["dice"][k] for k in ("before", "after"))
    rows = [(f"label {k}", f"{before[k]:.3f} → {after[k]:.3f}") for k in after if k != "mean"]
    return f"<details><summary>Dice of each label</summary><table>{_rows(rows)}</table></details>"


def write(
    path: Name,
    fixed: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    geometry: Geometry,
    title: str,
    summary: Mapping[str, Any],
    picture: Name,
    report: Name,
) -> None:
    """Writes the page of a registration: a file that opens without a network.

    fixed, before, after: as moving and moved of report.draw. summary: what report.json holds. picture, report: the
    files, picture.png and report.json.
    """
    drawn = Path(picture).read_bytes()
    planes = slices(fixed, before, after, geometry, max(SIZE - 4 * len(drawn) // 3 - 100_000, SIZE // 4))
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(title),
        rows=_rows(_numbers(summary)),
        labels=_by_label(summary),
        picture=_uri(drawn, "png"),
        report=html.escape(Path(report).read_text(encoding="utf-8")),
        data=json.dumps(planes).replace("<", "\\u003c"),
    )
    write_bytes(path, page.encode())
