#!/usr/bin/env python3
"""Draws the pictures of the README and of docs/: python docs/images/make.py DEMO, where DEMO is what `fastreg demo -o DEMO` wrote."""

import io
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

HERE = Path(__file__).parent
INK, BLUE, RED, EDGE = "#22262b", "#1b6fd0", "#c8401c", "#c4c9cf"
matplotlib.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "fastreg"})


def thorax(demo):
    """Coronal slices: both images, and their difference before and after."""
    fixed, moving, moved = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(demo / f"{name}.nii.gz")))
        for name in ("fixed", "moving", "moved")
    )
    report = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    before, after = (report["tre"][when]["mean"] for when in ("before", "after"))
    moved[moved == moved.min()] = np.nan  # what lies beyond the moving image
    y = int(0.45 * fixed.shape[1])
    a, b, c = (np.flipud(v[:, y]) for v in (fixed, moving, moved))
    figure = Figure((9.6, 2.05), dpi=150)
    panels = figure.subplots(1, 4)
    shown = [("fixed", a), ("moving", b), ("moving - fixed", b - a), ("moved - fixed", c - a)]
    low, high = np.percentile(fixed, [0.5, 99.5])
    for axes, (title, image) in zip(panels, shown, strict=True):
        difference = " - " in title
        limits = (-900, 900) if difference else (low, high)
        axes.set_facecolor(EDGE)
        axes.imshow(image, cmap="RdBu_r" if difference else "gray", vmin=limits[0], vmax=limits[1])
        axes.set_title(title.replace("-", "−"), pad=4)
        axes.set_xticks([]), axes.set_yticks([])
        axes.spines[:].set_color(EDGE)
    for axes, mm in zip(panels[2:], (before, after), strict=True):
        axes.set_xlabel(f"landmarks {mm:.2f} mm apart", labelpad=3)
    figure.subplots_adjust(0.005, 0.09, 0.995, 0.89, wspace=0.03)
    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor="white")
    # 256 colours are half of the bytes.
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        HERE / "thorax.png", optimize=True
    )


def conventions():
    """Where out(p) is read, on a grid of 5 x 7 voxels."""
    figure = Figure((6.4, 3.5))
    axes = figure.subplots()
    for y in range(5):
        for x in range(7):
            axes.plot(x, y, "o", color=EDGE, markersize=5)
    axes.add_patch(
        FancyArrowPatch(
            (1, 1), (4.5, 2.75), arrowstyle="-|>", mutation_scale=14, color=BLUE, lw=1.8, shrinkB=2
        )
    )
    axes.plot(1, 1, "o", color=INK, markersize=7)
    axes.plot(4.5, 2.75, "D", color=RED, markersize=6)
    axes.annotate("voxel p = (1, 1) of the output", (1, 1), (0.6, 0.45))
    axes.annotate("u(p) = (1.75, 3.5) voxels,\nchannel 0 along y, 1 along x", (3, 2), (0.3, 3.2), color=BLUE)
    axes.annotate("the image is read here,\nout(p) = image(p + u(p))", (4.5, 2.75), (4.05, 3.5), color=RED)
    axes.annotate("index (0, 0)", (0, 0), (-0.45, -0.3), color="#666c74")
    axes.add_patch(
        FancyArrowPatch((-0.6, -0.75), (1.2, -0.75), arrowstyle="-|>", mutation_scale=10, color=INK)
    )
    axes.add_patch(
        FancyArrowPatch((-0.85, -0.5), (-0.85, 1.3), arrowstyle="-|>", mutation_scale=10, color=INK)
    )
    axes.text(1.3, -0.75, "x, the last axis", va="center")
    axes.text(-0.85, 1.5, "y", ha="center", va="top")
    axes.set_xlim(-1.1, 6.6), axes.set_ylim(4.5, -1)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(HERE / "conventions.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    conventions()
    thorax(Path(sys.argv[1]))
