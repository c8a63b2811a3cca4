"""Other tools' transforms: read as displacements in voxels, and written as those tools take them.

Chains are composed in fp64; where a file does not say what its numbers mean, `format` has to.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from fastreg._files import InputError, Name
from fastreg.io import Geometry, Reading, volume_geometry
from fastreg.io._reading import Warn, ignore

from . import dicom, dipy, freesurfer, fsl, itk, matrices, mrtrix, niftyreg, others, spm, voxels
from ._chain import Chain, Step
from ._detect import hint, names_of
from ._format import Format, Source, Target

__all__ = ["FORMATS", "Chain", "Format", "read_chain", "read_transform", "write_transform"]

FORMATS = {
    f.name: f
    for f in (
        itk.FIELD,
        itk.TRANSFORM,
        fsl.FORMAT,
        freesurfer.FORMAT,
        niftyreg.FORMAT,
        voxels.LEARN2REG,
        mrtrix.FORMAT,
        voxels.VOXELMORPH,
        dipy.FORMAT,
        spm.FORMAT,
        matrices.FORMAT,
        dicom.FORMAT,
        *others.FORMATS,
    )
}
# How else one may call them.
ALIASES = {"ants": "itk", "greedy": "itk", "fnirt": "fsl", "surfa": "freesurfer", "synthmorph": "freesurfer"}
MATRIX = (
    "a matrix of 4 x 4 numbers, as FSL flirt, NiftyReg, greedy and MRtrix write it, and they mean different axes: give --from ras-matrix for "
    "one of greedy or of NiftyReg's reg_aladin, or make an ITK matrix of it: c3d_affine_tool (flirt: -ref FIXED -src MOVING FILE -fsl2ras) -oitk affine.txt"
)
TRANSFORMS = {"itk", "itk-transform"}

# ANTs, old ANTs, greedy: a warp, and the matrix that its tool writes into another file.
BESIDE = (
    (
        r"(.*?)\d+(Inverse)?Warp\.nii(\.gz)?",
        r"\d+(GenericAffine|DerivedInitialMovingTranslation|Rigid|Affine)\.mat",
    ),
    (r"(.*?)(Inverse)?Warp\.nii(\.gz)?", r"Affine\.txt"),
    (r"(.*?)warp\.nii(\.gz)?", r"affine\.(mat|lta)"),
)


def table() -> str:
    """FORMATS as a table of Markdown."""
    rows = ["| format | tools | files | known by | holds | read | written |", "|---|---|---|---|---|---|---|"]
    for f in FORMATS.values():
        known = f.known or f"nothing: `--from {f.name}`"
        read = f"yes{', needs ' + f.needs if f.needs else ''}" if f.read else f"no: {f.instead}"
        written = ", ".join(f"`{s}`" for s in f.suffixes) if f.write else "no"
        rows.append(f"| `{f.name}` | {f.tools} | {f.files} | {known} | {f.holds} | {read} | {written} |")
    return "\n".join(rows)


def _named(name: str) -> Format:
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def geometry(path: Name, reading: Reading = Reading(), warn: Warn = ignore) -> Geometry:
    """The grid of an image, whatever its voxels hold."""
    return volume_geometry(path, reading, warn)


def _optional(given: Name | Geometry | None, reading: Reading, warn: Warn) -> Geometry | None:
    return given if given is None or isinstance(given, Geometry) else geometry(given, reading, warn)


def path_of(name: Name) -> tuple[Path, bool]:
    """What a transform's name says: (path, whether it is to be inverted) of PATH, `PATH,1` and `[PATH,1]` as ANTs has them."""
    text = os.fspath(name)
    found = re.fullmatch(r"\[?(.+?),([01])\]?", text)
    if found is None or Path(text).exists():
        return Path(text), False
    return Path(found[1]), found[2] == "1"


def require_written(format: str, path: Name) -> Format:
    """The format of a name, which must be one that can be written to a file of this name."""
    kind = _named(format)
    if kind.write is None:
        raise InputError(f"{path}: {kind.tools} is not written{': it ' + kind.instead if kind.read else ''}")
    if not Path(path).name.lower().endswith(kind.suffixes):
        raise InputError(f"{path}: {kind.name} must be written as {', '.join(kind.suffixes)}")
    return kind


def _format_of(path: Path, names: frozenset[str], wanted: Format | None) -> Format:
    """Of the formats that a file may be of: the only one, or the wanted one."""
    if wanted is not None and (wanted.name in names or (names <= TRANSFORMS and wanted.name in TRANSFORMS)):
        return wanted if len(names) > 1 else FORMATS[next(iter(names))]
    if len(names) == 1:
        (name,) = names
        if wanted is None:
            return FORMATS[name]
        raise InputError(
            f"{path}: says that it is {name} ({FORMATS[name].known}), and {wanted.name} was asked for"
        )
    options = ", ".join(sorted(names - {""}))
    if wanted is None and names == frozenset({"ras-matrix", ""}):
        raise InputError(f"{path}: is {MATRIX}")
    if wanted is None:
        raise InputError(
            f"{path}: voxels or mm, displacements or positions? the file does not say{hint(path)}: give --from, one of {options}"
        )
    raise InputError(f"{path}: may be one of {options}, and {wanted.name} was asked for")


def read_chain(
    paths: Name | Iterable[Name],
    *,
    format: str | None = None,
    like: Name | Geometry | None = None,
    moving: Name | Geometry | None = None,
    reading: Reading = Reading(),
    warn: Warn = ignore,
) -> Chain:
    """Reads transforms as antsApplyTransforms lists them: the first of the list moves a point first, then the next.

    As read_transform. Of the Chain, `displacement()` is what read_transform gives, `map(points)` sends points (P, nd), mm, LPS, from
    the fixed image to the moving one, and `what` says in words what was recognised.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not names:
        raise InputError("at least one transform must be given")
    wanted = None if format is None else _named(format)
    split = [path_of(name) for name in names]
    found = [names_of(path) for path, _ in split]
    fixed, other = _optional(like, reading, warn), _optional(moving, reading, warn)
    # In a list, --from is for those that do not say.
    if wanted is not None and len(found) > 1 and any(wanted.name in f for f in found):
        formats = [
            _format_of(p, f, wanted if wanted.name in f else None)
            for (p, _), f in zip(split, found, strict=True)
        ]
    else:
        formats = [_format_of(p, f, wanted) for (p, _), f in zip(split, found, strict=True)]
    steps: list[Step] = []
    for (path, inverse), kind in zip(split, formats, strict=True):
        if kind.read is None:
            raise InputError(f"{path}: {kind.tools} is not read: {kind.instead}".replace("FILE", path.name))
        source = Source(path, fixed, other, reading, warn)
        if kind.name == "itk-transform":
            steps += itk.read_transform(source, inverse)
        elif kind.name == "ras-matrix":
            steps += matrices.read(source, inverse)
        elif inverse:
            raise InputError(
                f"{path}: only a matrix can be inverted by ',1'; give the file of the inverse warp"
            )
        else:
            steps += kind.read(source)
    dimensions = [step.nd for step in steps] + ([] if fixed is None else [fixed.nd])
    if len(set(dimensions)) > 1:
        raise InputError(f"{names[0]}: transforms and images must have one dimension, got {dimensions}")
    _look_beside([path for path, _ in split], steps, warn)
    return Chain(tuple(steps), fixed)


def _look_beside(paths: list[Path], steps: list[Step], warn: Warn) -> None:
    """Warns where a warp was given without the matrix that lies beside it."""
    if any(step.field is None for step in steps):
        return
    for path in paths:
        for warp, matrix in BESIDE:
            if (found := re.fullmatch(warp, path.name)) is None:
                continue
            pattern = re.compile(re.escape(found[1]) + matrix)
            others = sorted(f.name for f in path.absolute().parent.iterdir() if pattern.fullmatch(f.name))
            if others:
                order = f"{others[0]},1 {path.name}" if "Inverse" in path.name else f"{path.name} {others[0]}"
                warn(
                    f"{path}: is one part of a registration, and {others[0]} beside it was not given; both are: {order}"
                )
                return


def read_transform(
    paths: Name | Iterable[Name],
    *,
    format: str | None = None,
    like: Name | Geometry | None = None,
    moving: Name | Geometry | None = None,
    reading: Reading = Reading(),
    warn: Warn = ignore,
) -> tuple[torch.Tensor, Geometry, str]:
    """Reads transforms of other tools, a list in ANTs' order, as one displacement.

    Composed in fp64; between fields and beyond them ITK's rules hold: linear interpolation, no displacement outside. A matrix (".mat", ".tfm",
    ".txt") is inverted where ",1" follows its name, as in ANTs.

    Args:
        paths (path or list of paths): the first one moves a point of the fixed image first: warp, then affine.
        format (str): a name of FORMATS, for files that do not say themselves what they hold; an error for those that say otherwise.
        like (path or Geometry): the grid of the result; None: that of the first field, if it comes first.
        moving (path or Geometry): the moving image, which FSL's warps count from.
        reading (Reading): how images are read. warn (callable): is told what may not be meant.
    Returns:
        (Tensor, Geometry, str): u (1, nd, *spatial) fp32 in voxels (z, y, x) of the grid, NaN where the file defines none; the
        grid; what was recognised, in words.
    Raises:
        InputError: not recognised, contradicted, damaged, integers, infinities, or something missing: the line says what to give.
        ImportError: no SimpleITK; no nibabel (NIfTI of other tools), pydicom (DICOM).
    Example:
        >>> import tempfile, pathlib
        >>> from fastreg.convert import read_transform, write_transform
        >>> from fastreg.io import Geometry
        >>> grid = Geometry.of((4, 5, 6), (2.5, 2.0, 1.5))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "warp.nii.gz")
        >>> write_transform(path, torch.ones(1, 3, 4, 5, 6), grid, "niftyreg")
        >>> u, grid, what = read_transform(path)
        >>> what
        'NiftyReg displacement (RAS, mm), 6x5x4'
        >>> bool((u - 1).abs().max() < 1e-6)
        True
    """
    chain = read_chain(paths, format=format, like=like, moving=moving, reading=reading, warn=warn)
    u, geometry = chain.displacement(warn)
    return u, geometry, chain.what


def write_transform(
    path: Name,
    u: torch.Tensor,
    geometry: Geometry,
    format: str = "itk",
    moving: Name | Geometry | None = None,
) -> None:
    """Writes a displacement as another tool takes it, fp32 but for ITK transforms (.h5, fp64).

    Args:
        path (path): its suffix must be one of the format's.
        u (Tensor): (1, nd, *spatial), in voxels (z, y, x) of geometry; NaN where it is not defined, if the format can say so.
        geometry (Geometry): the fixed grid.
        format (str): a name of FORMATS.
        moving (path or Geometry): the moving image: FSL's warps count from it, Learn2Reg's must lie on the grid of both.
    Returns:
        None.
    Raises:
        InputError: a format that is not written, another suffix, infinities, or moving is missing or does not fit. ImportError: as
        read_transform. OSError: it cannot be written.
    Example:
        >>> import tempfile, pathlib
        >>> from fastreg.convert import write_transform
        >>> from fastreg.io import Geometry
        >>> path = pathlib.Path(tempfile.mkdtemp(), "disp.npz")
        >>> write_transform(path, torch.zeros(1, 3, 4, 5, 6), Geometry.of((4, 5, 6), (1, 1, 1)), "learn2reg")
        >>> import numpy
        >>> numpy.load(path)["arr_0"].shape
        (6, 5, 4, 3)
    """
    kind = require_written(format, path)
    assert kind.write is not None
    path = Path(path)
    if tuple(u.shape) != (1, geometry.nd, *geometry.shape):
        raise InputError(
            f"{path}: u must have shape {(1, geometry.nd, *geometry.shape)}, got {tuple(u.shape)}"
        )
    bad = int((~torch.isfinite(u)).any(1).sum())
    if bad and (not kind.undefined or bool(torch.isinf(u).any())):
        raise InputError(
            f"{path}: the field is not defined in {bad} of {np.prod(geometry.shape)} voxels, and {kind.name} cannot say so (mrtrix can)"
        )
    kind.write(Target(path, u, geometry, _optional(moving, Reading(), ignore)))
