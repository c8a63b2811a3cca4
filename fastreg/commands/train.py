"""`fastreg train`: a net on many pairs, or on the one that it is to register."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastreg import models, report
from fastreg._console import telling
from fastreg._files import InputError
from fastreg.data.pairs import TASKS
from fastreg.training import Settings, processes, ranks
from fastreg.training.run import resumable
from fastreg.training.settings import merged

from . import nets
from .options import Parser, add_common, add_reading, reading_given, set_threads


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "train",
        help="train a net",
        usage="fastreg train --method METHOD --pairs CSV|FOLDER -o OUT [...]\n       fastreg train --resume -o OUT [...]",
        description="Trains a net. OUT becomes a folder with last.pt and best.pt (for fastreg apply --weights), log.csv, "
        "validation.csv and validation.png. Ctrl-C saves and ends; --resume goes on. "
        "Several GPUs: torchrun --nproc-per-node=N -m fastreg.train ...",
    )
    command.add_argument("--method", choices=sorted(models.MODELS), help="the net")
    command.add_argument(
        "--pairs",
        metavar="CSV|FOLDER",
        help="csv: columns fixed, moving and perhaps fixed_labels, moving_labels, fixed_landmarks, moving_landmarks, mask, moving_mask; "
        "paths relative to it. Folder: images, or images/ with labels/, masks/, landmarks/ (also imagesTr/ ...), which names "
        "match. JSON: the list that comes with a data set of Learn2Reg",
    )
    command.add_argument(
        "--task",
        choices=TASKS,
        help="which pairs of a folder: inter (default): all; intra: names that agree up to the last _; series: of those, or of names that agree but for a number at their end, the image "
        "nearest the mean phase and each other one; one-shot: the only one",
    )
    command.add_argument(
        "--validation",
        metavar="CSV|FOLDER",
        help="other pairs, to validate on (default: those trained on); of a JSON its registration_val",
    )
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="folder of the run")
    command.add_argument(
        "--resume", action="store_true", help="go on from OUT/last.pt, with the arguments it was started with"
    )
    net = command.add_argument_group("the net")
    net.add_argument("--preset", help=nets.presets())
    nets.add_arguments(net)
    group = command.add_argument_group("training")
    group.add_argument("--steps", type=int, metavar="N", help="of the optimiser (default: the paper's)")
    group.add_argument(
        "--minutes", type=float, metavar="X", help="end after so many, if --steps are not done before"
    )
    group.add_argument("--learning-rate", type=float, metavar="X", help="of Adam (default: the paper's)")
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="pairs a step, over all processes (default: the paper's)"
    )
    group.add_argument(
        "--patience", type=int, metavar="N", help="end after N epochs in which what is watched is no better"
    )
    group.add_argument(
        "--watch",
        metavar="TERM",
        help="for the end and for the learning rate's: loss, a term of it (similarity, ...), each the mean of an epoch, "
        "or validation, the loss of the pairs validated on (default: the paper's)",
    )
    group.add_argument(
        "--labels-weight",
        type=float,
        metavar="X",
        help="adds X times 1 - Dice of the pairs' labels, moved, to the loss (default: 0, labels only judge)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of weights, order and noise (default: 0)")
    group.add_argument("--amp", action="store_true", default=None, help="bf16 convolutions")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile")
    group.add_argument(
        "--validate-every", type=int, metavar="N", help="steps (default: a twentieth of them, 10 at least)"
    )
    group.add_argument("--validate-most", type=int, metavar="N", help="pairs (default: 8)")
    group.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 100)")
    add_reading(command)
    add_common(command)
    command.set_defaults(run=_run)


def _settings(args: argparse.Namespace, saved: Mapping[str, Any] | None) -> Settings:
    """All arguments of the run: given ones before those of the checkpoint, these before defaults."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    given["reading"] = reading_given(args)
    given = {name: value for name, value in given.items() if value is not None}
    return Settings(**(given if saved is None else merged(args.out, given, saved)))


def _run(args: argparse.Namespace) -> int:
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes must be positive, got {args.minutes}")
    saved = resumable(args.out, args.resume)
    settings = _settings(args, saved)
    settings.check()
    report.require_matplotlib()
    set_threads(args)
    with processes(args.device) as device:
        run = settings.run(
            args.out,
            resume=saved or False,
            replace=args.force,
            device=device,
            minutes=args.minutes,
            quiet=args.quiet,
            progress=args.progress,
        )
        try:
            run.train()
        except KeyboardInterrupt:
            if run.stopped and run.first and not (args.quiet or run.done):
                begin = "fastreg train" if ranks()[1] == 1 else "torchrun ... -m fastreg.train"
                with telling():
                    print(f"go on with: {begin} --resume -o {shlex.quote(args.out)}")
            raise
    return 0
