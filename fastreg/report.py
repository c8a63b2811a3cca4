"""The picture of a registration: images before and after, differences, the deformed grid, the Jacobian."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastreg._files import Name, write_bytes
from fastreg._refusals import Missing
from fastreg.io import Geometry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "write_picture"]

INK, PAPER, EDGE, FOLD, NOTHING = "#22262b", "#ffffff", "#b8bdc4", "#ff1e6e", "#c9d6e6"
DIFFERENCE = ("#1b6fd0", "#9cc4ee", PAPER, "#f2b48f", "#c8401c")
VOLUME = ("#5b2a86", "#b79ad6", PAPER, "#8fc9a4", "#12713f")
# Letters at the (left, right) and (top, bottom) edges of a panel, for the axes S, P, L as shown.
LETTERS = (("I", "S"), ("A", "P"), ("R", "L"))


def can_draw() -> bool:
    """Whether there is a matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def require_matplotlib() -> None:
    """ImportError, with the command that mends it, where matplotlib is missing."""
    if not can_draw():
        raise Missing("matplotlib", "the picture")


def anatomical(geometry: Geometry) -> tuple[list[int], list[bool]]:
    """For superior, posterior, left (2D: no S): the nearest axis of the array, whether it runs backwards."""
    nd = geometry.nd
    direction = np.asarray(geometry.direction).reshape(nd, nd)[::-1, ::-1]  # (z, y, x) both ways
    closeness = np.abs(direction)
    order, flip = [0] * nd, [False] * nd
    for _ in range(nd):
        anatomy, axis = np.unravel_index(closeness.argmax(), closeness.shape)
        order[anatomy], flip[anatomy] = int(axis), bool(direction[anatomy, axis] < 0)
        closeness[anatomy], closeness[:, axis] = -1, -1
    return order, flip


def turned(array: np.ndarray, order: Sequence[int], flip: Sequence[bool]) -> np.ndarray:
    return np.flip(array.transpose(order), tuple(axis for axis, f in enumerate(flip) if f))


def _percentile(values: np.ndarray, shares: Any) -> Any:
    flat = values.ravel()
    return np.nanpercentile(flat[:: max(1, flat.size // 1_000_000)], shares)


def window_of(image: np.ndarray) -> tuple[float, float]:
    low, high = _percentile(image, [0.5, 99.5])
    return (low, high) if high > low else (low, low + 1)


def cuts_of(before: np.ndarray) -> list[int]:
    """The slice of each axis to show: in the middle half, the most central where images differed most."""
    cuts = []
    for axis, n in enumerate(before.shape):
        along = np.abs(np.nan_to_num(before)).mean(tuple(a for a in range(before.ndim) if a != axis))
        width = 1 + n // 20
        along = np.convolve(along, np.ones(width) / width, mode="same")
        middle = along[n // 4 : n - n // 4]
        best = np.flatnonzero(middle >= 0.98 * middle.max())
        cuts.append(n // 4 + int(best[np.abs(best - (len(middle) - 1) / 2).argmin()]))
    return cuts


def planes_of(nd: int, cuts: Sequence[int]) -> list[tuple[str, int | None, int | None, int, int, bool]]:
    """(name, axis cut, slice, vertical axis, horizontal axis, whether the vertical one points up)."""
    if nd == 2:
        return [("", None, None, 0, 1, False)]
    return [
        ("axial", 0, cuts[0], 1, 2, False),
        ("coronal", 1, cuts[1], 0, 2, True),
        ("sagittal", 2, cuts[2], 0, 1, True),
    ]


def draw(
    fixed: np.ndarray,
    moving: np.ndarray,
    moved: np.ndarray,
    u: np.ndarray,
    determinant: np.ndarray,
    geometry: Geometry,
    title: str = "",
    inconsistency: np.ndarray | None = None,
) -> "Figure":
    """Figure with a row per plane: fixed, moving, moved, both differences, the grid x + u(x), its Jacobian, and where it is
    given how far there and back leads from where it began.

    Planes are shown as radiologists do, along the axes nearest to the patient's: left of the patient on the
    right, front on top (axial) or left (sagittal), head on top. Differences are of images scaled to their own
    0.5 and 99.5 percentiles, so that they mean something across scanners.

    Args:
        fixed, moving, moved, determinant (ndarray): *geometry.shape; moving: on the fixed grid, unregistered.
            NaN in moving and moved, shown pale blue: the moving image does not reach there.
        u (ndarray): (nd, *geometry.shape), in voxels. geometry (Geometry): the fixed grid.
        inconsistency (ndarray, optional): *geometry.shape, mm; NaN where the images show nothing.
    Raises:
        ImportError: no matplotlib.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.figure import Figure

    nd = geometry.nd
    order, flip = anatomical(geometry)
    fixed, moving, moved, determinant = (
        turned(np.asarray(a, dtype=np.float32), order, flip) for a in (fixed, moving, moved, determinant)
    )
    moves = [
        turned(u[axis], order, flip) * (-1 if back else 1) for axis, back in zip(order, flip, strict=True)
    ]
    spacing = [geometry.spacing_zyx[axis] for axis in order]

    fixed_window, moving_window = window_of(fixed), window_of(moving)

    def scaled(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
        return np.clip((image - window[0]) / (window[1] - window[0]), 0, 1)

    before = scaled(moving, moving_window) - scaled(fixed, fixed_window)
    after = scaled(moved, moving_window) - scaled(fixed, fixed_window)
    limit = max(0.05, float(_percentile(np.abs(before), 99.5)))
    difference_map = LinearSegmentedColormap.from_list("difference", DIFFERENCE).with_extremes(bad=NOTHING)
    spread = float(np.clip(_percentile(np.abs(determinant - 1), 99.5), 0.2, 1))
    volume_map = LinearSegmentedColormap.from_list("volume", VOLUME)

    planes = planes_of(nd, cuts_of(before))
    gray = {"cmap": colormaps["gray"].with_extremes(bad=NOTHING)}
    columns = [
        ("fixed", fixed, {**gray, "vmin": fixed_window[0], "vmax": fixed_window[1]}),
        ("moving", moving, {**gray, "vmin": moving_window[0], "vmax": moving_window[1]}),
        ("moved", moved, {**gray, "vmin": moving_window[0], "vmax": moving_window[1]}),
        ("moving − fixed", before, {"cmap": difference_map, "vmin": -limit, "vmax": limit}),
        ("moved − fixed", after, {"cmap": difference_map, "vmin": -limit, "vmax": limit}),
        ("grid x + u(x)", None, {}),
        ("Jacobian determinant", determinant, {"cmap": volume_map, "vmin": 1 - spread, "vmax": 1 + spread}),
    ]
    if inconsistency is not None:
        inconsistency = turned(np.asarray(inconsistency, dtype=np.float32), order, flip)
        top_mm = max(float(_percentile(inconsistency, 99.5)), 2 * min(spacing))
        doubt_map = colormaps["YlOrRd"].with_extremes(bad=NOTHING)
        columns.append(("there and back", inconsistency, {"cmap": doubt_map, "vmin": 0, "vmax": top_mm}))

    # Panels keep the proportions of the body, so the page follows from them: one scale, inches per mm.
    size = [n * s for n, s in zip(fixed.shape, spacing, strict=True)]
    width = max(size[p[4]] for p in planes)
    heights = [size[p[3]] for p in planes]
    scale = min(2.3 / width, 3.2 / max(heights))
    left, right, top, bottom, gap = 0.42 if nd == 3 else 0.15, 0.15, 0.62 if title else 0.36, 0.55, 0.07
    # No narrower than the column's name.
    cell_w, cell_h = max(width * scale, 1.35), [h * scale for h in heights]
    page_w = left + right + len(columns) * cell_w + (len(columns) - 1) * gap
    page_h = top + bottom + sum(cell_h) + (len(planes) - 1) * gap

    figure = Figure(figsize=(page_w, page_h), facecolor=PAPER)
    text: dict[str, Any] = {"color": INK, "family": "DejaVu Sans"}
    centred: dict[str, Any] = {**text, "size": 9, "ha": "center", "va": "center"}
    if title:
        figure.text(left / page_w, 1 - 0.2 / page_h, title, size=10, va="center", parse_math=False, **text)

    def axes_at(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / page_w, 1 - (y + h) / page_h, w / page_w, h / page_h))

    shown = {}
    y0 = top
    for row, (plane, cut, at, vertical, horizontal, up) in enumerate(planes):

        def plane_of(volume: np.ndarray, cut: Any = cut, at: Any = at) -> np.ndarray:
            return volume if cut is None else volume.take(at, cut)

        w, h = size[horizontal] * scale, size[vertical] * scale
        extent = (
            -0.5 * spacing[horizontal], size[horizontal] - 0.5 * spacing[horizontal],
            size[vertical] - 0.5 * spacing[vertical], -0.5 * spacing[vertical],
        )  # fmt: skip
        if plane:
            figure.text(0.2 / page_w, 1 - (y0 + h / 2) / page_h, plane, rotation=90, **centred)
        for column, (name, volume, style) in enumerate(columns):
            x0 = left + column * (cell_w + gap)
            if row == 0:
                middle = (x0 + cell_w / 2) / page_w
                figure.text(middle, 1 - (top - 0.14) / page_h, name, **centred)
            ax = axes_at(x0 + (cell_w - w) / 2, y0, w, h)
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color=EDGE, linewidth=0.6)
            if volume is None:
                background = 1 - 0.22 * scaled(plane_of(fixed), fixed_window)
                ax.imshow(background, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bilinear")
                steps = spacing[vertical], spacing[horizontal]
                lines = _grid_lines(
                    plane_of(moves[vertical]), plane_of(moves[horizontal]), *steps, max(size) / 36
                )
                ax.add_collection(LineCollection(lines, colors="#1b4f8f", linewidths=0.55, alpha=0.9))
            else:
                shown[name] = ax.imshow(plane_of(volume), extent=extent, interpolation="nearest", **style)
                if volume is determinant:
                    folded = np.where(plane_of(determinant) > 0, np.nan, 1)
                    marked = {"cmap": ListedColormap([FOLD]), "vmin": 0, "vmax": 2}
                    ax.imshow(folded, extent=extent, interpolation="nearest", **marked)
            ax.set_xlim(extent[0], extent[1])
            ax.set_ylim(*(extent[3], extent[2]) if up else (extent[2], extent[3]))
            # A plain 2D picture has no patient's left.
            if column == 0 and nd == 3:
                _letters(ax, LETTERS[vertical][:: -1 if up else 1], LETTERS[horizontal])
        y0 += h + gap

    y0 += 0.08
    span = 2 * cell_w + gap
    bar = axes_at(left + 3 * (cell_w + gap) + 0.15 * span, y0, 0.7 * span, 0.09)
    figure.colorbar(shown["moved − fixed"], cax=bar, orientation="horizontal")
    bar.set_xlabel("difference, share of the intensity range", size=7, labelpad=1, **text)
    bars = [bar]
    # bars end before their columns, or their last and first numbers would meet
    bar = axes_at(left + 6 * (cell_w + gap), y0, 0.88 * cell_w, 0.09)
    figure.colorbar(shown["Jacobian determinant"], cax=bar, orientation="horizontal")
    bars.append(bar)
    share = float((~(determinant > 0)).mean())
    folds = "no folding" if share == 0 else f"folding (≤ 0): {100 * share:.2g} % of voxels"
    bar.set_xlabel(folds, size=7, labelpad=1, family="DejaVu Sans", color=FOLD if share else INK)
    if inconsistency is not None:
        bar = axes_at(left + 7 * (cell_w + gap), y0, 0.88 * cell_w, 0.09)
        figure.colorbar(shown["there and back"], cax=bar, orientation="horizontal")
        bar.set_xlabel("off from where it began, mm", size=7, labelpad=1, **text)
        bars.append(bar)
    for bar in bars:
        bar.tick_params(labelsize=6.5, length=2, pad=1.5, color=INK, labelcolor=INK, width=0.6)
        for spine in bar.spines.values():
            spine.set(color=EDGE, linewidth=0.6)
    return figure


def _grid_lines(
    u_vertical: np.ndarray,
    u_horizontal: np.ndarray,
    step_vertical: float,
    step_horizontal: float,
    mesh: float,
) -> list[np.ndarray]:
    """Lines some `mesh` mm apart, (x, y) in mm, each point p drawn at p + u(p)."""
    rows, columns = u_vertical.shape
    y = (np.arange(rows)[:, None] + u_vertical) * step_vertical
    x = (np.arange(columns)[None] + u_horizontal) * step_horizontal
    every_row, every_column = max(1, round(mesh / step_vertical)), max(1, round(mesh / step_horizontal))
    points = np.stack([x, y], -1)
    first_row, first_column = (rows - 1) % every_row // 2, (columns - 1) % every_column // 2
    return [*points[first_row::every_row], *points[:, first_column::every_column].swapaxes(0, 1)]


def _letters(ax: Any, vertical: Sequence[str], horizontal: Sequence[str]) -> None:
    from matplotlib.patheffects import withStroke

    style = {"color": "#ffd166", "size": 6.5, "weight": "bold", "family": "DejaVu Sans"}
    style |= {"transform": ax.transAxes, "path_effects": [withStroke(linewidth=1.4, foreground="#000000")]}
    ax.text(0.015, 0.5, horizontal[0], ha="left", va="center", **style)
    ax.text(0.985, 0.5, horizontal[1], ha="right", va="center", **style)
    ax.text(0.5, 0.985, vertical[0], ha="center", va="top", **style)
    ax.text(0.5, 0.015, vertical[1], ha="center", va="bottom", **style)


def write_picture(path: Name, *args: Any, **keywords: Any) -> None:
    """Writes what `draw` draws as PNG."""
    figure = draw(*args, **keywords)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # File names may hold letters that the font lacks.
        warnings.simplefilter("ignore")
        figure.savefig(picture, dpi=160, format="png")
    write_bytes(path, picture.getbuffer())
