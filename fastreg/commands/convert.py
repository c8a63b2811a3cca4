"""`fastreg convert`: transforms of other tools, from one's files to another's."""

import argparse

from fastreg import convert
from fastreg._console import telling, warn
from fastreg._files import InputError
from fastreg.convert._chain import landing, require_landing

from .options import (
    PLACES,
    Parser,
    add_one_file,
    add_reading,
    add_transforms,
    reading_of,
    require_free,
    set_threads,
)

READ = [name for name, format in convert.FORMATS.items() if format.read]
WRITTEN = [name for name, format in convert.FORMATS.items() if format.write]


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "convert",
        help="transforms of other tools",
        usage="fastreg convert IN [IN ...] OUT --to FORMAT [--from FORMAT] [--like FIXED] [--moving MOVING]",
        description="Reads transforms, several in the order of antsApplyTransforms (the warp before the affine), makes one displacement "
        "field of them on the grid of the first one or of --like, and writes it for another tool.",
    )
    command.add_argument("paths", nargs="+", metavar="IN", help="transforms, and last the file to make")
    command.add_argument(
        "--to",
        metavar="FORMAT",
        default="itk",
        help=f"{', '.join(WRITTEN)}, or ants, fnirt, surfa, ... (default: itk)",
    )
    add_transforms(command)
    command.add_argument(
        "--moving",
        metavar="MOVING",
        help="the moving image: FSL's warps need it; and whether the field leads there",
    )
    add_reading(command, PLACES)
    add_one_file(command)
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    set_threads(args)
    *paths, out = args.paths
    if not paths:
        raise InputError("convert takes a transform and the file to make, got one path")
    target = convert.require_written(args.to, out)
    require_free(out, (*(convert.path_of(p)[0] for p in paths), args.like, args.moving), args.force)
    reading = reading_of(args)
    chain = convert.read_chain(
        paths, format=args.source, like=args.like, moving=args.moving, reading=reading, warn=warn
    )
    if not args.quiet:
        with telling():
            print(f"recognised  {chain.what}")
    u, grid = chain.displacement(warn)
    moving = None if args.moving is None else convert.geometry(args.moving, reading, warn)
    if moving is not None and moving.nd != grid.nd:
        raise InputError(f"{' '.join(paths)} is {grid.nd}D and {args.moving} is {moving.nd}D")
    if moving is not None:
        require_landing(landing(u, grid, moving), " ".join(paths), args.moving, warn)
    if moving is None and "voxels" in target.holds:
        warn(
            f"{out}: {target.name} counts voxels of one grid that fixed and moving image must share: --moving MOVING has that checked"
        )
    convert.write_transform(out, u, grid, target.name, moving)
    if not args.quiet:
        with telling():
            print(f"written to  {out} ({target.written or target.holds}; {grid})")
    return 0
