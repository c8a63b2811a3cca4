"""Slices, contours and curves, as the pictures of the experiments on scans draw them."""

import numpy as np

# One colour a method in all pictures (Okabe and Ito: told apart by those who see few colours, too).
COLOURS = {
    "identity": "0.6",
    "before": "0.6",
    "VoxelMorph": "#D55E00",
    "VoxelMorph-1": "#E69F00",
    "VoxelMorph-2": "#D55E00",
    "RRN": "#0072B2",
    "RRN without cost volume": "#56B4E9",
    "LinDef": "#009E73",
    "LinDef without affine": "#8FD3BF",
    "LinDef, affine alone": "#332288",
    "F3RNet": "#CC79A7",
    "F3RNet mrb": "#CC79A7",
    "F3RNet full": "#0072B2",
    "F3RNet none": "#009E73",
    "PRDFE": "#332288",
    "fastreg.register": "black",
    "SyN": "#882255",
    "Demons": "#999933",
}


def cut(volume, axis, at):
    """A plane of a (1, 1, *spatial) or (*spatial) volume, as numpy."""
    volume = np.asarray(volume).reshape(np.asarray(volume).shape[-3:])
    return np.take(volume, at, axis)


def show(ax, plane, spacing, title="", *, cmap="gray", low=0.0, high=1.0):
    """A plane in true proportions, without axes. spacing: of its rows and columns."""
    ax.imshow(
        plane,
        cmap=cmap,
        vmin=low,
        vmax=high,
        aspect=spacing[0] / spacing[1],
        interpolation="nearest",
    )
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)


def contour(ax, plane, colour, width=1.0, style="solid"):
    """Around a plane of labels, each by itself."""
    for label in np.unique(plane):
        if label:
            ax.contour(plane == label, [0.5], colors=[colour], linewidths=width, linestyles=[style])


def difference(ax, fixed, moved, spacing, title="", **options):
    """moved - fixed, blue to red."""
    show(ax, moved - fixed, spacing, title, cmap="RdBu_r", low=-0.6, high=0.6, **options)


def curves(ax, trained, ylabel, *, start=None):
    """What was watched over seconds of training. trained: name -> Trained; start: its value before."""
    for name, done in trained.items():
        points = [(s, v) for _, s, v in done.watched]
        if start is not None:
            points = [(0.0, start), *points]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLOURS.get(name), label=name, linewidth=1.4)
    if start is not None:
        ax.axhline(start, color=COLOURS["identity"], linestyle=":", linewidth=1.2, label="identity")
    ax.set_xlabel("seconds of training", fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    plain(ax)


def plain(ax):
    """Small ticks, a light grid, no box."""
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def spread(ax, values, ylabel):
    """Each value, and the mean, by name."""
    for k, (name, some) in enumerate(values.items()):
        around = k + 0.28 * np.linspace(-1, 1, len(some)) if len(some) > 1 else [k]
        ax.scatter(around, some, s=9, color=COLOURS[name], alpha=0.75, linewidths=0)
        ax.hlines(np.mean(some), k - 0.36, k + 0.36, color=COLOURS[name], linewidth=2)
        ax.annotate(
            f"{np.mean(some):.3f}",
            (k, np.max(some)),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    ax.margins(y=0.12)
    ax.set_xticks(range(len(values)), [name.replace(" without", "\nwithout") for name in values], rotation=20)
    ax.set_ylabel(ylabel, fontsize=8)
    plain(ax)


def figure(width, height):
    """A figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")
