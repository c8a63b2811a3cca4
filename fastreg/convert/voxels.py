"""Learn2Reg and VoxelMorph: voxels of the fixed grid, in the order of its axes."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fastreg._files import InputError, replacing, require_utf8
from fastreg.io import Geometry

from . import _nifti
from ._chain import Field, Step
from ._format import Format, Source, Target


def _npz(path: Path) -> np.ndarray:
    """The one array of a .npz, (*size, nd)."""
    require_utf8(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            array = file[names[0]] if len(names) == 1 else None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a .npz file of arrays, or damaged") from error
    if array is None:
        raise InputError(f"{path}: must hold one array, got {len(names)}")
    if array.dtype.kind != "f":
        raise InputError(f"{path}: a field must hold floating-point numbers, got {array.dtype}")
    if array.ndim not in (3, 4) or array.shape[-1] != array.ndim - 1:
        raise InputError(f"{path}: a field must have shape (X, Y, Z, 3), got {array.shape}")
    return _nifti.finite(path, array.astype(np.float64))


def _placeholder(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether an affine is the one that VoxelMorph writes where it was given none."""
    axes = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    axes[:3, 3] = -(axes @ [*(n / 2 for n in shape), 1])[:3]
    return bool(np.allclose(affine, axes, atol=1e-4))


def _read(source: Source, tool: str, own: bool) -> list[Step]:
    """own: whether the grid that a NIfTI file says is the field's."""
    path = source.path
    place = source.like
    if path.name.lower().endswith(".npz"):
        array = _npz(path)
        place = source.needs("like", "an array has no grid in space")
    else:
        image = _nifti.load(path)
        _nifti.require_shape(path, image, 4, f"a {tool} field", "a 3D grid of 3 numbers (X, Y, Z, 3)")
        array = _nifti.values(path, image)
        if place is None and own and not _placeholder(image.affine, array.shape[:3]):
            place = _nifti.geometry(path, image, source.reading, source.warn)
        elif place is None:
            place = source.needs("like", f"the header of a {tool} field need not say where its grid lies")
    if array.shape[:-1] != place.size:
        sizes = ["x".join(map(str, s)) for s in (array.shape[:-1], place.size)]
        raise InputError(
            f"{path}: a {tool} field has the fixed image's grid, got {sizes[0]} for one of {sizes[1]}"
        )
    if source.moving is not None and not source.moving.matches(place):
        raise InputError(
            f"{path}: a {tool} field counts voxels of one grid that fixed and moving image share, and they differ: resample the moving image first"
        )
    voxels = array.transpose(*range(place.nd)[::-1], place.nd)[..., ::-1]  # (z, y, x) both
    what = f"{tool} displacement (voxels), {'x'.join(map(str, place.size))}"
    return [Step(what, str(path), Field(voxels @ place.matrix.T, place))]


def _write(target: Target, key: str) -> None:
    if not target.path.name.lower().endswith(".npz"):
        _nifti.write_vectors(target, target.voxels[..., ::-1], axes=4)
        return
    nd = target.geometry.nd
    array = target.voxels[..., ::-1].transpose(*range(nd)[::-1], nd).astype(np.float32)
    require_utf8(target.path)
    with replacing(target.path) as temporary:
        np.savez_compressed(temporary, **{key: array})  # type: ignore[arg-type]


def same_grid(geometry: Geometry, moving: Geometry | None, path: Path, tool: str) -> None:
    if moving is not None and not moving.matches(geometry):
        raise InputError(
            f"{path}: a {tool} field counts voxels of one grid that fixed and moving image share, and they differ"
        )


def read_learn2reg(source: Source) -> list[Step]:
    return _read(source, "Learn2Reg", own=False)


def write_learn2reg(target: Target) -> None:
    same_grid(target.geometry, target.moving, target.path, "Learn2Reg")
    _write(target, "arr_0")


def read_voxelmorph(source: Source) -> list[Step]:
    return _read(source, "VoxelMorph", own=True)


def write_voxelmorph(target: Target) -> None:
    same_grid(target.geometry, target.moving, target.path, "VoxelMorph")
    _write(target, "vol")


HOLDS = "displacements in voxels, along the array's axes, of a grid that fixed and moving image share"
LEARN2REG = Format(
    "learn2reg",
    "Learn2Reg challenges",
    ".nii.gz .nii .npz",
    "",
    HOLDS,
    read_learn2reg,
    write_learn2reg,
    needs="--like",
    suffixes=(".nii.gz", ".nii", ".npz"),
)
VOXELMORPH = Format(
    "voxelmorph",
    "VoxelMorph save_volfile",
    ".nii.gz .nii .npz",
    "",
    HOLDS,
    read_voxelmorph,
    write_voxelmorph,
    needs="--like for .npz and files without an affine",
    suffixes=(".nii.gz", ".nii", ".npz"),
)
