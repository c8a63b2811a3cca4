"""`fastreg register`: two scans, no training data; with --method a net is optimised on them alone."""

import argparse
import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastreg import _similarity, _start, convert, io, models, outcome_inverse, report_page
from fastreg._adaptive import PRESETS
from fastreg._console import bar, progress, seen, telling, warn
from fastreg._descent import LINEAR, TRANSFORMS, filled
from fastreg._files import InputError, output_folder, refuse_own_inputs
from fastreg.data.pairs import Case, sample_of, weights_of
from fastreg.outcome import OUTPUTS, Outcome, intensities
from fastreg.registration import register
from fastreg.training import Training
from fastreg.training.build import predict

from . import _judging, _moving, _using, nets
from .case import add_arguments, files_of, paths_of, read_case
from .options import (
    Parser,
    add_common,
    add_html,
    add_picture,
    add_reading,
    device_of,
    drawing,
    numbers,
    reading_of,
)

STEPS = 300  # of a net on one pair

HELP = {
    "similarity": "lcc, for images of one kind; mind, for different ones; mi: mutual information, the same where an intensity means one thing everywhere; auto: whichever local correlations suggest; mse for intensities "
    "that mean the same",
    "transform": "dense; velocity: integrated, invertible up to discretisation; bspline: cubic; rigid or affine: one matrix alone",
    "start": "where to begin: none: as the images lie; centres or masses: laid on each other; auto: one of these where it is clearly "
    "better; search: turned as well, by any angle; or a FILE: an ITK transform or displacement field",
    "affine": "find an affine part first",
    "search_range": "how far to search each place before the finest level, in mm, for large motion along walls; 0: not at all",
    "window": "side of the LCC window in voxels, odd; automatic: 9 in 2D, in 3D 5 and at the finest level 3",
    "regularization": "weight of the smoothness of the displacement; auto: by how strained the coarse levels find the image",
    "smoothing": "standard deviation in mm of the Gaussian that smooths updates; bspline: control point spacing",
    "levels": "number of resolutions, coarse to fine",
    "iterations": "at most, of every level or comma-separated from coarse to fine",
    "learning_rate": "step of the optimiser",
    "symmetric": "with the scans exchanged what is found is the inverse: both directions are compared; implies --inverse, takes twice the time",
    "label_weight": "use --fixed-labels and --moving-labels, with this weight: those that both have are laid on each other. Otherwise they are scored only",
    "landmark_weight": "use --fixed-landmarks and --moving-landmarks, with this weight; 1.0 brings them nearly together. Otherwise they are scored only",
}
CHOICES = {
    "similarity": _similarity.SIMILARITIES,
    "transform": (*TRANSFORMS, *LINEAR),
}
# that are not named as their parameter, and are off where not given
FLAGS = {"landmark_weight": "--use-landmarks", "label_weight": "--use-labels"}
# that are read from files, or otherwise made, and have no flag by which a number sets them
GIVEN = (
    "fixed",
    "moving",
    "spacing",
    "mask",
    "moving_mask",
    "start",
    "landmarks",
    "labels",
    "channel_weights",
    "preset",
    "progress",
)
METAVARS = {
    "search_range": "MM",
    "regularization": "X|auto",
    "window": "N",
    "smoothing": "MM",
    "levels": "N",
    "iterations": "N[,N...]",
}


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "register",
        help="register two images",
        usage="fastreg register FIXED MOVING -o OUT [...]\n       fastreg register FIXED MOVING -o OUT --method METHOD [...]",
        description="Registers MOVING to FIXED: 2D or 3D, scalar, each on its own grid. OUT becomes "
        "a folder with moved.nii.gz, displacement.nii.gz (ITK displacement field), picture.png, report.json, and affine.tfm (ITK "
        "transform) where there is an affine part.",
    )
    command.add_argument(
        "fixed",
        metavar="FIXED",
        help="image, or folder of DICOM slices; FOLDER#2, FOLDER#UID: one series of several",
    )
    command.add_argument("moving", metavar="MOVING", help="the same")
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder to make")
    command.add_argument(
        "--inverse",
        action="store_true",
        help="the other direction too: inverse_displacement.nii.gz on MOVING's grid, FIXED and its labels moved there, and "
        "where MOVING's landmarks lie in FIXED",
    )
    add_html(command)
    add_picture(command)
    known = command.add_argument_group("what else is known of the pair")
    add_arguments(known)
    _using.add_arguments(known)
    group = add_parameters(command, learning_rate="; with --method: of Adam (default: the paper's)")
    starts = "|".join((*_start.CHOICES, "FILE"))
    text = f"{HELP['start']} (default: auto)"
    group.add_argument("--start", metavar=starts, default=argparse.SUPPRESS, help=text)
    text = "default, or fast, which leaves out the finest level and takes about a quarter of the time; with --method: "
    group.add_argument("--preset", help=text + nets.presets())
    group = command.add_argument_group(
        "a net on the pair alone",
        "instead of the pairwise optimiser: --method, untrained, and what goes with it",
    )
    group.add_argument("--method", choices=sorted(models.MODELS), help="the net")
    group.add_argument("--steps", type=int, metavar="N", help=f"of its optimiser (default: {STEPS})")
    group.add_argument("--seed", type=int, metavar="N", help="of its weights and noise (default: 0)")
    nets.add_arguments(group)
    _moving.add_arguments(command)
    add_reading(command)
    add_common(command)
    command.set_defaults(run=_run)


def tunable() -> list[inspect.Parameter]:
    """The parameters of `register` that a number on the command line can set."""
    return [p for p in inspect.signature(register).parameters.values() if p.name not in GIVEN]


def add_parameters(parser: argparse.ArgumentParser, **also: str) -> argparse._ActionsContainer:
    """A flag for each parameter of `register`; one that is not given is not in the arguments. `also`: more of its help."""
    group = parser.add_argument_group("the pairwise optimiser", "parameters of fastreg.register")
    for p in tunable():
        flag, default = _flag(p.name), "" if p.name in FLAGS else f" (default: {_pasted(p)})"
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "dest": p.name,
            "help": f"{HELP.get(p.name, 'see fastreg.register')}{default}{also.get(p.name, '')}",
        }
        if isinstance(p.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif p.name in CHOICES:
            group.add_argument(flag, choices=CHOICES[p.name], **options)
        else:
            kind = _weight if p.name == "regularization" else numbers
            group.add_argument(flag, type=kind, metavar=METAVARS.get(p.name, "X"), **options)
    return group


def _flag(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _weight(text: str) -> Any:
    """A number, or "auto"."""
    return text if text == "auto" else numbers(text)


_weight.__name__ = "number or auto"


def _pasted(parameter: inspect.Parameter) -> str:
    """A default as one would type it."""
    value = parameter.default
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{parameter.name}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Callable[[int, int, int, int, float], None] | None]:
    """Yields the `progress` argument of register: a bar a level; where nobody looks a line a level; None if --quiet."""
    if args.quiet and not args.progress:
        yield None
        return
    shown: Any = None
    level_shown, levels = -1, 0
    ended: str | None = None
    begin = last = time.perf_counter()

    def end() -> None:
        if shown is not None:
            shown.close()
        elif ended is not None and not args.quiet:
            with telling():
                print(ended)

    def left_out(before: int) -> None:
        for level in range(level_shown + 1, before) if shown is None and not args.quiet else ():
            with telling():
                print(f"level {level + 1} of {levels}: left out")

    def told(level: int, n_levels: int, iteration: int, n_iterations: int, loss: float) -> None:
        nonlocal shown, level_shown, levels, ended, begin, last
        levels = n_levels
        if level != level_shown:
            end()
            left_out(level)
            level_shown, begin = level, last  # its first iteration is over
            name = f"level {level + 1}/{n_levels}"
            shown = bar(quiet=args.quiet, always=args.progress, total=n_iterations, desc=name)
        if shown is not None:
            shown.set_postfix(loss=f"{loss:.4f}", refresh=False)
            shown.update(iteration + 1 - shown.n)
        last = time.perf_counter()
        ended = f"level {level + 1} of {n_levels}: {iteration + 1} iteration{'s' * (iteration > 0)}, loss {loss:.4f}, {last - begin:.1f} s"

    try:
        yield told
    finally:
        end()
    left_out(levels)


def _begin(args: argparse.Namespace, case: Case, device: torch.device, what: str = "registering") -> None:
    if not args.quiet and not seen(always=args.progress):
        with telling():
            print(f"{what}: {case.fixed_grid}, {device}")


def _start_of(case: Case, args: argparse.Namespace) -> _start.Start | None:
    """What --start says; None: as the images lie."""
    asked, grid = getattr(args, "start", "auto"), case.fixed_grid
    if asked not in _start.CHOICES:
        if not Path(asked.removesuffix(",1")).exists():
            raise InputError(f"--start must be one of {', '.join(_start.CHOICES)} or a file, got {asked!r}")
        plane = grid.plane
        grids = [g if g.plane is None else g.plane.whole for g in (grid, case.moving_grid)]
        chain = convert.read_chain(asked, like=grids[0], moving=grids[1], reading=reading_of(args), warn=warn)
        matrix = chain.matrix
        if matrix is None:
            u, _ = chain.displacement(warn)
            if plane is not None:
                u = plane.flat_displacement(u)
            return _start.Start(asked, grid, displacement=filled(u, ~u.isnan().any(1, keepdim=True)))
        if plane is not None:
            matrix = plane.flat_map(matrix)
        if not np.linalg.cond(matrix[:, :-1]) < 1e6:
            raise InputError(f"{asked}: must be invertible, got the matrix {matrix[:, :-1].tolist()}")
        return _start.Start(asked, grid, matrix)
    images = intensities(case.fixed_seen), intensities(case.moving_seen), case.weights, case.moving_weights
    return _start.find(asked, grid, case.moving_grid, *images)


def _as_used(parameters: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """With what the preset stands for, where it was not given."""
    preset = PRESETS[parameters["preset"]]
    return parameters | {name: value for name, value in preset.items() if not hasattr(args, name)}


def solve(case: Case, args: argparse.Namespace) -> Outcome:
    """Registers a Case as the arguments say: an Outcome."""
    device = device_of(args)
    parameters = {p.name: getattr(args, p.name, p.default) for p in tunable() if p.name not in FLAGS}
    parameters["preset"] = getattr(args, "preset", None) or "default"
    parameters |= {name: getattr(args, name) for name in FLAGS if hasattr(args, name)}
    start = _start_of(case, args)
    grid, field = (case.moving_grid, None) if start is None else start.of_image(case.moving_grid)
    # Beyond the moving image its border goes on, and does not count: anything else would be an edge.
    laid = io.resample(intensities(case.moving_seen), grid, case.fixed_grid, field, outside=None)
    apart = "the fixed and the moving image do not overlap in physical space; --start auto lays them on each other"
    if start is not None and start.taken not in _start.CHOICES:
        apart = f"{start.taken}: leads nowhere into the moving image"
    doubts: list[str] = []

    def doubt(line: str) -> None:
        warn(line)
        doubts.append(line)

    overlap, weights = weights_of(case.weights, laid[1], doubt, apart)
    moving_weights = case.moving_weights
    if moving_weights is not None:
        moving_weights, _ = io.resample(moving_weights, grid, case.fixed_grid, field, outside=0.0)
    if parameters["symmetric"] and overlap < 1:
        # where the moving image reaches goes along with it, or this would count for one direction only
        weights = case.weights
        moving_weights = laid[1].float() if moving_weights is None else moving_weights * laid[1]
    if moving_weights is not None:
        if not (moving_weights if weights is None else moving_weights * weights).any():
            raise InputError("no voxel counts in both images: their masks, or NaN, leave nothing in common")
    _judging.few_voxels(weights, moving_weights, doubt)
    used = _using.landmarks(case, args, start, device) | _using.labels(case, args, start, device)
    fixed_channels, moving_channels, weighed = _using.channels(case, args, start, laid[1])
    parameters |= weighed
    _begin(args, case, device)
    if start is not None and not args.quiet:
        with telling():
            print(f"start: {start}")
    with _progress(args) as told:
        images = (
            torch.cat([intensities(case.fixed_seen), *fixed_channels], 1).to(device),
            torch.cat([laid[0], *moving_channels], 1).to(device),
        )
        masks = (
            None if weights is None else weights.to(device),
            None if moving_weights is None else moving_weights.to(device),
        )
        result = register(
            images[0],
            images[1],
            spacing=case.fixed_grid.spacing_zyx,
            mask=masks[0],
            moving_mask=masks[1],
            progress=told,
            **used,
            **parameters,
        )
    choice = _similarity.Choice(result.similarity, result.consistency)
    if choice.unlike and choice.taken == "lcc":
        doubt(f"{choice.why}: --similarity mind, or auto, suits these images, and lcc was asked for")
    judged, inconsistency = _judging.judge(
        result, images, masks, case.fixed_grid.spacing_zyx, parameters, used, doubt
    )
    if math.isnan(choice.consistency or 0.0) and inconsistency is not None and not inconsistency.seen.any():
        doubt(
            "the images show next to nothing in the same places: whether the motion is right cannot be told"
        )
    if parameters["transform"] in TRANSFORMS and not any(level["iterations"] for level in result.levels):
        warn("no level had an iteration: the displacement is that of the start")
    u, affine = result.displacement.detach().cpu(), result.affine
    if start is not None:
        u, affine = start.then(u), start.after(affine)
    summary = {
        "start": {"asked": getattr(args, "start", "auto"), **_start.plain(start)},
        "similarity": {
            "asked": parameters["similarity"],
            "taken": choice.taken,
            "consistency": choice.consistency,
            "why": choice.why if parameters["similarity"] == "auto" else "asked for",
            **judged,
        },
        "overlap": overlap,
        "parameters": _as_used(parameters, args),
        "affine_voxels_zyx": None if affine is None else affine[0].tolist(),
        "discrete": result.discrete,
        "levels": result.levels,
        "seconds": result.seconds,
    }
    matrix = None if affine is None else case.fixed_grid.map_to_physical(affine[0].double().cpu().numpy())
    before = laid
    if start is not None:
        lain = io.resample(intensities(case.moving), case.moving_grid, case.fixed_grid, outside=None)
        before = lain if lain[1].any() else laid  # rather than a picture of nothing
    weighs = {"landmark_weight": "tre", "label_weight": "dice"}
    scored = [key for name, key in weighs.items() if parameters.get(name, 0) > 0]
    return Outcome(case, u, device, summary, before, matrix, scored, doubts, inconsistency)


def _optimise(case: Case, args: argparse.Namespace) -> Outcome:
    """A net on the pair alone, as RRN's authors trained on the scans that they registered: an Outcome."""
    names = ["start", *(p.name for p in tunable() if p.name != "learning_rate")]
    given = [name for name in names if hasattr(args, name)]
    if given:
        raise InputError(
            f"{_flag(given[0])} is a parameter of fastreg.register, not of --method {args.method}"
        )
    device = device_of(args)
    began = time.perf_counter()
    net, seed = nets.net_of(args), args.seed or 0
    torch.manual_seed(seed % 2**63)
    model, preprocessing = net.model(case.fixed_grid.nd).to(device), net.preprocessing()
    sample, view = sample_of(case, preprocessing, warn=warn)
    steps = STEPS if args.steps is None else args.steps
    recipe = replace(model.recipe, batch_size=1, steps=steps, watch="loss")
    if hasattr(args, "learning_rate"):
        if isinstance(args.learning_rate, tuple) or not 0 < args.learning_rate < math.inf:
            raise InputError(f"--learning-rate must be one positive number, got {args.learning_rate}")
        recipe = replace(recipe, learning_rate=args.learning_rate)
    if recipe.steps < 1:
        raise InputError(f"--steps must be at least 1, got {recipe.steps}")
    _begin(args, case, device, args.method)
    training, losses = Training(model, [sample], recipe, seed=seed), []
    with progress(total=recipe.steps, quiet=args.quiet, always=args.progress) as after:
        while training.step < recipe.steps:
            losses.append(training.advance()["loss"])
            after({"loss": losses[-1]})
    u = predict(model, sample, view)
    summary = {
        "method": args.method,
        "arguments": model.arguments,
        "preprocessing": preprocessing.plain(),
        "seed": seed,
        "steps": training.step,
        "learning_rate": recipe.learning_rate,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seconds": time.perf_counter() - began,
    }
    return Outcome(case, u, device, summary, affine=view.matrix)


def _run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    picture = drawing(args)
    # Those of a run before that this one does not write go.
    outputs = (*OUTPUTS, *outcome_inverse.OUTPUTS, report_page.PAGE)
    refuse_own_inputs(
        args.out, (*paths_of(args), *_using.paths_of(args), getattr(args, "start", None)), outputs
    )
    if args.method is not None and args.channel:
        raise InputError("--channel is for the pairwise optimiser, not for --method")
    if args.method is None:
        for name in (*(n for n in nets.NAMES if n != "preset"), "steps", "seed"):
            if getattr(args, name) is not None:
                raise InputError(f"{_flag(name)} goes with --method")
    with output_folder(args.out, outputs, replace=args.force) as folder:
        outcome = (solve if args.method is None else _optimise)(read_case(args), args)
        written = {
            "inverse": args.inverse or getattr(args, "symmetric", False),
            "picture": picture,
            "page": bool(args.html),
            **_moving.chosen(args),
        }
        outcome.write(folder, began, files_of(args), **written)
    if not args.quiet:
        outcome.tell(args.out)
    return 0
