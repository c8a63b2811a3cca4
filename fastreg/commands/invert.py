"""`fastreg invert`: the inverse of a displacement field, as a file."""

import argparse

import torch

from fastreg import convert, io, outcome_inverse
from fastreg._console import telling, warn
from fastreg._files import InputError

from .options import (
    PLACES,
    Parser,
    add_one_file,
    add_reading,
    add_source,
    reading_of,
    require_free,
    set_threads,
)


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "invert",
        help="the inverse of a displacement field",
        usage="fastreg invert FIELD [FIELD ...] -o OUT [--like MOVING] [--from FORMAT] [...]",
        description="FIELD warps the moving image onto the fixed one; OUT warps the fixed image onto the moving one: "
        "fastreg apply --field OUT FIXED. Says how far one after the other is from nothing.",
    )
    command.add_argument(
        "field",
        nargs="+",
        metavar="FIELD",
        help="a displacement field, as fastreg register and other tools write it, or transforms as apply --field takes them",
    )
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="file to make: inverse.nii.gz say")
    command.add_argument(
        "--like",
        metavar="MOVING",
        help="the moving image, whose grid OUT gets, or any other (default: FIELD's own grid)",
    )
    add_source(command)
    add_reading(command, PLACES)
    add_one_file(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    set_threads(args)
    convert.require_written("itk", args.out)
    require_free(args.out, (*(convert.path_of(p)[0] for p in args.field), args.like), args.force)
    reading = reading_of(args)
    field = " ".join(args.field)
    onto = None if args.like is None else convert.geometry(args.like, reading, warn)
    # A field in voxels is on the one grid of both images.
    fixed = onto if args.source in ("learn2reg", "voxelmorph") else None
    chain = convert.read_chain(
        args.field, format=args.source, like=fixed, moving=onto, reading=reading, warn=warn
    )
    if not args.quiet:
        with telling():
            print(f"recognised  {chain.what}")
    if chain.steps[0].field is None and fixed is None:
        raise InputError(_without_grid(args, chain))
    u, grid = chain.displacement(warn)
    if bad := int(torch.isnan(u).any(1).sum()):
        raise InputError(f"{field}: must be defined everywhere to be inverted, and is not in {bad} voxels")
    onto = grid if onto is None else onto
    if onto.nd != grid.nd:
        raise InputError(f"{field} is {grid.nd}D and {args.like} is {onto.nd}D")
    v, residual = io.invert(u, grid, onto)
    outcome_inverse.check(residual, field)
    io.write_displacement(args.out, v, onto)
    if not args.quiet:
        with telling():
            print(*outcome_inverse.lines(residual), sep="\n")
            print(f"written to  {args.out} ({onto})")
    return 0


def _without_grid(args: argparse.Namespace, chain: convert.Chain) -> str:
    """What to do with a chain that begins with a matrix: --like is the grid of the inverse, not its own."""
    source = "" if args.source is None else f" --from {args.source}"
    if chain.matrix is None:
        field = " ".join(args.field)
        one = f"fastreg convert {field} FIELD.nii.gz --like FIXED{source}"
        return f"{field}: begins with a matrix, which has no grid; make one field of it first: {one}"
    named = [convert.path_of(path) for path in reversed(args.field)]
    inverted = " ".join(str(path) if inverse else f"{path},1" for path, inverse in named)
    one = f"fastreg convert {inverted} {args.out} --like {args.like or 'MOVING'}{source}"
    return f"{' '.join(args.field)}: a matrix, which has no grid and an exact inverse: {one}"
