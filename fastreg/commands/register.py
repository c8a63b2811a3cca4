"""`fastreg register`: two scans, no training data; with --method a net is optimised on them alone."""

import argparse
import contextlib
import inspect
import math
import time
from dataclasses import replace

from fastreg import io, models, report
from fastreg.data.pairs import sample_of, weights_of
from fastreg.io import InputError
from fastreg.registration import register
from fastreg.training import RECIPES, Training

from . import nets
from .case import OUTPUTS, Run, add_arguments, intensities, paths_of, read_case, refuse_own_inputs
from .options import add_common, bar, device_of, numbers, progress, warn

STEPS = 300  # of a net on one pair

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


def add(commands):
    command = commands.add_parser(
        "register",
        help="register two images",
        description="Registers MOVING to FIXED: 2D or 3D, scalar, each on its own grid. OUT becomes "
        "a folder with moved.nii.gz, displacement.nii.gz (ITK displacement field), picture.png, report.json.",
    )
    command.add_argument("fixed", metavar="FIXED", help="image, or folder with one DICOM series")
    command.add_argument("moving", metavar="MOVING")
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to make")
    add_arguments(command)
    add_parameters(command)
    command.add_argument(
        "--method",
        choices=sorted(models.MODELS),
        help="optimise this net, untrained, on the pair alone, instead of fastreg.register",
    )
    command.add_argument("--steps", type=int, help=f"of a net's optimiser (default: {STEPS})")
    nets.add_arguments(command)
    command.set_defaults(run=_run)


def tunable():
    """The parameters of `register` that a number on the command line can set."""
    given = ("fixed", "moving", "spacing", "mask", "progress")
    return [p for p in inspect.signature(register).parameters.values() if p.name not in given]


def add_parameters(parser):
    """A flag for each parameter of `register`; one that is not given is not in the arguments."""
    group = parser.add_argument_group("parameters of fastreg.register")
    for p in tunable():
        flag, shown = "--" + p.name.replace("_", "-"), "automatic" if p.default is None else p.default
        options = {
            "default": argparse.SUPPRESS,
            "help": f"{HELP.get(p.name, 'see fastreg.register')} (default: {shown})",
        }
        if isinstance(p.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = str if isinstance(p.default, str) else numbers
            group.add_argument(flag, type=kind, metavar="VALUE", **options)
    add_common(parser)


@contextlib.contextmanager
def _progress(args):
    """Yields the `progress` argument of register: a bar a level, or None."""
    shown, level_shown = bar(args, total=0), None
    if shown is None:
        yield None
        return

    def told(level, n_levels, iteration, n_iterations, loss):
        nonlocal shown, level_shown
        if level != level_shown:
            shown.close()
            shown = bar(args, total=n_iterations, desc=f"level {level + 1}/{n_levels}")
            level_shown = level
        shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
        shown.update(iteration + 1 - shown.n)

    try:
        yield told
    finally:
        shown.close()


def solve(case, args):
    """Registers a Case as the arguments say: a Run."""
    device = device_of(args)
    parameters = {p.name: getattr(args, p.name, p.default) for p in tunable()}
    # Beyond the moving image its border goes on, and does not count: anything else would be an edge.
    start, inside = io.resample(intensities(case.moving), case.moving_grid, case.fixed_grid, outside=None)
    overlap, weights = weights_of(case.weights, inside, warn)
    with _progress(args) as told:
        result = register(
            intensities(case.fixed).to(device),
            start.to(device),
            spacing=case.fixed_grid.spacing_zyx,
            mask=None if weights is None else weights.to(device),
            progress=told,
            **parameters,
        )
    u = result.displacement.detach().cpu()
    summary = {
        "overlap": overlap,
        "parameters": parameters,
        "affine_voxels_zyx": None if result.affine is None else result.affine[0].tolist(),
        "levels": result.levels,
        "seconds": result.seconds,
    }
    return Run(case, u, device, summary, (start, inside))


def _optimise(case, args):
    """A net on the pair alone, as RRN's authors trained on the scans that they registered: a Run."""
    given = [p.name for p in tunable() if hasattr(args, p.name) and p.name != "learning_rate"]
    if given:
        raise InputError(
            f"--{given[0].replace('_', '-')} is a parameter of fastreg.register, not of --method {args.method}"
        )
    device = device_of(args)
    began = time.perf_counter()
    model = nets.model_of(args, args.method, case.fixed_grid.nd).to(device)
    preprocessing = nets.preprocessing_of(args, args.method)
    sample, grid = sample_of(case, preprocessing, warn=warn)
    recipe = replace(RECIPES[args.method], batch_size=1, steps=STEPS if args.steps is None else args.steps)
    if hasattr(args, "learning_rate"):
        if isinstance(args.learning_rate, tuple) or not 0 < args.learning_rate < math.inf:
            raise InputError(f"--learning-rate must be one positive number, got {args.learning_rate}")
        recipe = replace(recipe, learning_rate=args.learning_rate)
    if recipe.steps < 1:
        raise InputError(f"--steps must be at least 1, got {recipe.steps}")
    training, losses = Training(model, [sample], recipe), []
    with progress(args, total=recipe.steps) as after:
        while training.step < recipe.steps:
            losses.append(training.advance()["loss"])
            after({"loss": losses[-1]})
    u = nets.predict(model, sample, grid, case, preprocessing)
    summary = {
        "method": args.method,
        "arguments": model.arguments,
        "preprocessing": preprocessing.plain(),
        "steps": training.step,
        "learning_rate": recipe.learning_rate,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seconds": time.perf_counter() - began,
    }
    return Run(case, u, device, summary)


def _run(args):
    began = time.perf_counter()
    report.require_matplotlib()
    refuse_own_inputs(args, paths_of(args))
    if args.method is None:
        for name in (*nets.NAMES, "steps"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} goes with --method")
    with io.output_folder(args.out, OUTPUTS, replace=args.force) as folder:
        run = (solve if args.method is None else _optimise)(read_case(args), args)
        run.write(folder, began, args)
    run.tell(args)
    return 0
