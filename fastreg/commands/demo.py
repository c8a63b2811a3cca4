"""`fastreg demo`: a synthetic thorax whose motion is known."""

import argparse
import contextlib
import time

from fastreg import io, metrics, report
from fastreg._console import telling
from fastreg._files import output_folder, write_bytes
from fastreg.data import phantom
from fastreg.data.pairs import Case
from fastreg.outcome import OUTPUTS

from .options import Parser, add_common
from .register import add_parameters, solve

INPUTS = ("fixed.nii.gz", "moving.nii.gz", "fixed_labels.nii.gz", "moving_labels.nii.gz")
LANDMARKS = ("fixed_landmarks.csv", "moving_landmarks.csv")
PAIRS = "pairs.csv"  # for fastreg train
DEMO_OUTPUTS = (*OUTPUTS, *INPUTS, *LANDMARKS, PAIRS)


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "demo",
        help="register a synthetic breathing thorax and judge the result",
        description="Registers a synthetic thorax whose motion is known. Exit status 1 if a goal is missed.",
    )
    command.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="folder to make: outputs, inputs, and pairs.csv for fastreg train (default: nothing is written)",
    )
    add_parameters(command)
    add_common(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    if args.out is not None:
        report.require_matplotlib()
    with contextlib.ExitStack() as stack:
        folder = None
        if args.out is not None:
            folder = stack.enter_context(output_folder(args.out, DEMO_OUTPUTS, replace=args.force))
        if not args.quiet:
            with telling():
                print("making a breathing thorax whose motion is known ...")
        p = phantom.thorax()
        grid = io.Geometry.of(p.fixed.shape[2:], p.spacing)
        fixed, moving, fixed_labels, moving_labels = (
            t[0, 0].numpy() for t in (p.fixed, p.moving, p.fixed_labels, p.moving_labels)
        )
        landmarks = [grid.to_physical(t.numpy()) for t in (p.fixed_landmarks, p.moving_landmarks)]
        labels = fixed_labels, moving_labels
        case = Case("thorax phantom", fixed, grid, moving, grid, *labels, landmarks[0], landmarks[1])
        outcome = solve(case, args)
        u, summary = outcome.u, outcome.summary
        score = summary["score"] = phantom.score(p, u, summary["seconds"])
        missed = summary["missed"] = phantom.failures(score)
        if folder is not None:
            for name, array in zip(INPUTS, (fixed, moving, fixed_labels, moving_labels), strict=True):
                io.write_image(folder / name, array, grid)
            for name, points in zip(LANDMARKS, landmarks, strict=True):
                io.write_landmarks(folder / name, points)
            columns = "fixed,moving,fixed_labels,moving_labels,fixed_landmarks,moving_landmarks"
            lines = f"{columns}\n{','.join((*INPUTS, *LANDMARKS))}\n"
            write_bytes(folder / PAIRS, lines.encode())
            outcome.write(folder, began)
    if not args.quiet:
        near = p.near_wall
        wall = metrics.tre(p.fixed_landmarks[near], p.moving_landmarks[near], p.spacing).mean
        goals, dice = phantom.GOALS, summary["dice"]
        rows = [
            ("landmarks, mm", score["tre_before"], score["tre_after"], goals["tre_after"]),
            ("near the wall, mm", wall, score["tre_wall"], goals["tre_wall"]),
            ("folding, %", None, 100 * score["folding"], 100 * goals["folding"]),
            ("seconds", None, score["seconds"], None),
            ("Dice of the lungs", dice["before"]["mean"], dice["after"]["mean"], None),
        ]
        with telling():
            print(f"\n{'':20}{'before':>10}{'after':>10}{'goal':>10}")
            for name, *values in rows:
                print(f"{name:20}" + "".join(f"{'' if v is None else f'{v:.2f}':>10}" for v in values))
            print("all goals are met" if not missed else "missed: " + "; ".join(missed))
            if args.out is not None:
                print(f"written to {args.out}")
    return 1 if missed else 0
