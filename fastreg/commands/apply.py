"""`fastreg apply`: a trained net on two scans, or a displacement field on images, labels and points."""

import argparse
import time
from pathlib import Path

import numpy as np

from fastreg import convert, io, report_page
from fastreg._console import telling, warn
from fastreg._files import InputError, output_folder, refuse_own_inputs
from fastreg._moved import move
from fastreg.convert._chain import require_landing
from fastreg.data import landmarks
from fastreg.data.alignment import Alignments
from fastreg.data.pairs import read_labels, sample_of
from fastreg.outcome import OUTPUTS, Outcome
from fastreg.training import checkpoint
from fastreg.training.build import GRID, Net, predict, regridded
from fastreg.training.run import ALIGNMENTS

from . import _moving, nets
from .case import add_arguments, files_of, paths_of, read_case
from .options import (
    Parser,
    add_common,
    add_html,
    add_picture,
    add_reading,
    add_transforms,
    device_of,
    drawing,
    reading_of,
)

FIELD_OUTPUTS = ("moved.nii.gz", "moved_labels.nii.gz", "points.csv")
FIELD_ONLY = ("labels", "points", "source", "like")
POINTS = ("points.fcsv", "points.mrk.json", "points.txt")  # beside points.csv, where they came so
PAIR_ONLY = (
    "fixed_landmarks",
    "moving_landmarks",
    "fixed_labels",
    "moving_labels",
    "mask",
    "moving_mask",
    "html",
    "no_picture",
    *GRID,
)


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "apply",
        help="a trained net, or a displacement field",
        usage="fastreg apply --weights RUN.pt FIXED MOVING -o OUT [...]\n       fastreg apply --field FIELD [FIELD ...] MOVING -o OUT [--labels IMAGE] [--points FILE] [...]",
        description="With --weights: registers MOVING to FIXED with a net that fastreg train has trained; OUT becomes what "
        "fastreg register makes. With --field: moves MOVING (and its labels) by a displacement field, as "
        "fastreg register and other tools write it, or by several transforms in the order of antsApplyTransforms (the warp before "
        "the affine), and sends points of the fixed image to where they lie in the moving one.",
    )
    command.add_argument(
        "images", nargs="*", metavar="IMAGE", help="FIXED MOVING with --weights, MOVING with --field"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="RUN.pt", help="a checkpoint of fastreg train")
    what.add_argument(
        "--field",
        nargs="+",
        metavar="FIELD",
        help="a displacement field on the grid of the result, or transforms of which the first one moves a point of the fixed image first",
    )
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to make")
    command.add_argument("--labels", metavar="IMAGE", help="with --field: labels on the grid of MOVING")
    command.add_argument(
        "--points",
        metavar="FILE",
        help="with --field: points in the fixed image (csv: x,y,z, mm, LPS; or Slicer's, elastix's); OUT/points.csv: in the moving one, and "
        "in the format they came in",
    )
    _moving.add_arguments(command)
    add_transforms(command)
    group = command.add_argument_group("with --weights, what else is known of the pair")
    add_arguments(group)
    add_html(group)
    add_picture(group)
    text = "which the checkpoint has: for nets that answer in voxels, whatever the image's size"
    nets.add_grid(command.add_argument_group("with --weights, another grid than in training", text))
    add_reading(command)
    add_common(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    by_net = args.weights is not None
    if args.field and not args.images:
        *args.field, moving = args.field  # what follows the fields, which argparse takes for one more
        args.images = [moving]
        if not args.field:
            raise InputError(f"--field takes a transform and then MOVING, got {moving} alone")
    for name in FIELD_ONLY if by_net else PAIR_ONLY:
        if getattr(args, name) is not None:
            flag = {"source": "from"}.get(name, name).replace("_", "-")
            raise InputError(f"--{flag} goes with {'--field' if by_net else '--weights'}")
    if len(args.images) != (2 if by_net else 1):
        wanted = "--weights takes FIXED and MOVING" if by_net else "--field takes MOVING alone"
        raise InputError(f"{wanted}, got {len(args.images)} image{'s' * (len(args.images) != 1)}")
    return _apply_net(args) if by_net else _apply_field(args)


def _apply_net(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    picture = drawing(args)
    args.fixed, args.moving = args.images
    outputs = (*OUTPUTS, report_page.PAGE)
    refuse_own_inputs(args.out, (*paths_of(args), args.weights), outputs)
    device = device_of(args)
    content = checkpoint.load(args.weights)
    model = checkpoint.build(content, args.weights).to(device)
    preprocessing = checkpoint.preprocessing(content, args.weights)
    grid = {name: getattr(args, name) for name in GRID}
    preprocessing = regridded(preprocessing, Net(content["method"], **grid))
    alignments = Alignments(Path(args.weights).parent / ALIGNMENTS, write=False)
    with output_folder(args.out, outputs, replace=args.force) as folder:
        case = read_case(args)
        sample, view = sample_of(case, preprocessing, model.ndim, warn, alignments=alignments)
        start = time.perf_counter()
        u = predict(model, sample, view)
        summary = {
            "weights": str(args.weights),
            "method": content["method"],
            "arguments": content["arguments"],
            "preprocessing": preprocessing.plain(),
            "seconds": time.perf_counter() - start,
        }
        outcome = Outcome(case, u, device, summary, affine=view.matrix)
        written = {"picture": picture, "page": bool(args.html), **_moving.chosen(args)}
        outcome.write(folder, began, files_of(args), **written)
    if not args.quiet:
        outcome.tell(args.out)
    return 0


def _apply_field(args: argparse.Namespace) -> int:
    (args.moving,) = args.images
    refuse_own_inputs(
        args.out, (*args.field, args.moving, args.like, args.labels, args.points), (*FIELD_OUTPUTS, *POINTS)
    )
    device_of(args)
    with output_folder(args.out, (*FIELD_OUTPUTS, *POINTS), replace=args.force) as folder:
        reading = reading_of(args)
        moving = io.read_volumes(args.moving, reading, warn)
        chain = convert.read_chain(
            args.field, format=args.source, like=args.like, moving=moving.geometry, reading=reading, warn=warn
        )
        if not args.quiet:
            with telling():
                print(f"recognised  {chain.what}")
        u, grid = chain.displacement(warn)
        field = " ".join(args.field)
        if moving.geometry.nd != grid.nd:
            raise InputError(f"{field} is {grid.nd}D and {args.moving} is {moving.geometry.nd}D")
        image, share = _moving.moved_volumes(args, args.moving, moving, grid, u)
        require_landing(share, field, args.moving, warn)
        io.write_volumes(folder / "moved.nii.gz", image)
        if args.labels is not None:
            labels = read_labels(args.labels, moving.geometry, args.moving, reading, warn)
            moved = move(labels[None], moving.geometry, grid, u, interpolation="nearest")
            io.write_image(folder / "moved_labels.nii.gz", moved.array[0], grid)
        if args.points is not None:
            _write_points(args.points, folder, chain, field, moving.geometry, reading)
    if not args.quiet:
        with telling():
            print(f"written to  {args.out}")
    return 0


def _write_points(
    path: str, folder: Path, chain: convert.Chain, field: str, moving_grid: io.Geometry, reading: io.Reading
) -> None:
    """points.csv, and where the points came in another format that one too: points of the fixed image, in the moving one."""
    read = io.read_points(path, chain.geometry.nd, chain.geometry, reading, warn)
    known = np.isfinite(read.points).all(1)
    points = read.points[known]
    outside = len(points) - landmarks.n_inside(points, chain.geometry)
    better = landmarks.better_inside(points, read.space, chain.geometry) if outside else ""
    if outside == len(points):
        raise InputError(f"{path}: no point lies in {field}{better or ' (they must be mm, LPS)'}")
    if outside:
        warn(
            f"{path}: {outside} of {len(points)} points lie outside {field}: moved as its border is{better.replace('would', 'would be inside', 1)}"
        )
    moved = np.full_like(read.points, np.nan)
    moved[known] = chain.map(points)
    lost = int(np.isnan(moved[known]).any(1).sum())
    if lost:
        warn(f"{path}: {lost} of {len(points)} points lie where {field} is not defined: nan")
    if read.suffix != ".csv":
        names = None if read.names is None else tuple(n for n, k in zip(read.names, known, strict=True) if k)
        io.write_landmarks(folder / "points.csv", moved[known], names)
    if not (lost and read.suffix == ".txt"):  # rows of elastix have no names that would tell which is missing
        read.write(folder / f"points{read.suffix}", moved, moving_grid)
