"""Displacement fields of ITK."""

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastreg._files import InputError, Name, replacing, require_utf8, reserve

from . import _integrity
from ._geometry import Geometry
from ._images import geometry_of, read, usable, write
from ._nifti import _nifti_files, chosen, grid_of, header_of, opened
from ._reading import Reading, Warn, ignore
from ._shear import made_straight
from ._sitk import silent_stderr, sitk

IMAGES = (".nii.gz", ".nii", ".mha", ".nrrd")
# ITK reads a NIfTI file of vectors with one voxel along z as 2D. One along x it reads as it is: a slice is written so, and says it.
NOTES, ROLLED = "ITK_FileNotes", "one slice: its axes are z, x, y"
SLAB = 1 << 20  # voxels


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Of the first axis: what is computed in fp64 comes and goes."""
    step = max(1, SLAB // math.prod(shape[1:]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def read_displacement(
    path: Name, reading: Reading = Reading(), warn: Warn = ignore
) -> tuple[torch.Tensor, Geometry]:
    """Reads an ITK displacement field (x, y, z), mm, LPS, as write_displacement writes it; fastreg.convert reads others.

    Returns:
        (Tensor, Geometry): (1, nd, *spatial) fp32, in voxels (z, y, x) of its grid.
    Raises:
        InputError: as read_image, and where a voxel does not hold one floating-point number an axis, or the file says that it
            is another tool's.
    """
    u, geometry = _planar(path, reading, warn) or _by_itk(path, reading, warn)
    inverse = np.linalg.inv(geometry.matrix)
    field = u[0].numpy()
    for slab in _slabs(geometry.shape):
        part = field[:, slab].reshape(geometry.nd, -1).astype(np.float64)
        if not np.isfinite(part).all():
            raise InputError(f"{path}: must be finite, got NaN or infinity")
        field[:, slab] = (inverse @ part).reshape(field[:, slab].shape)
    return u, geometry


def _by_itk(path: Name, reading: Reading, warn: Warn) -> tuple[torch.Tensor, Geometry]:
    """(1, nd, *spatial) fp32, mm, LPS, (x, y, z); its grid."""
    image, bad = read(path, reading, warn)
    nd = image.GetDimension()
    if nd not in (2, 3) or image.GetNumberOfComponentsPerPixel() != nd:
        raise InputError(
            f"{path}: must be a displacement field, a vector of 2 or 3 numbers at each pixel of a 2D or voxel of a 3D grid"
        )
    tags = {k: image.GetMetaData(k).strip() for k in image.GetMetaDataKeys()}
    name = tags.get("intent_name", "")
    theirs = "NiftyReg" if name.startswith("NREG") else "SPM" if name in ("Mapping", "Velocity") else None
    if theirs:
        raise InputError(
            f"{path}: is {theirs}'s ({name}), not an ITK displacement field: read it with fastreg convert"
        )
    if image.GetPixelID() not in (sitk().sitkVectorFloat32, sitk().sitkVectorFloat64):
        raise InputError(
            f"{path}: a displacement field must hold floating-point numbers, got {image.GetPixelIDTypeAsString()}: a colour image?"
        )
    if any("color" in v.lower() for k, v in tags.items() if k.startswith("NRRD_kinds")):
        raise InputError(f"{path}: is a colour image, not a displacement field")
    if bad:
        raise InputError(f"{path}: must be finite, got NaN or infinity")
    geometry = geometry_of(image, path)
    vectors = sitk().GetArrayViewFromImage(image)
    if tags.get(NOTES) == ROLLED:
        vectors, geometry = np.moveaxis(vectors, 2, 0), geometry.rolled(-1)
    u = torch.empty((1, nd, *geometry.shape))
    u[0].numpy()[:] = np.moveaxis(vectors, -1, 0)
    return u, geometry


def _planar(path: Name, reading: Reading, warn: Warn) -> tuple[torch.Tensor, Geometry] | None:
    """The same of a 3D NIfTI file of fp32 as ITK writes it; None: SimpleITK is to read it, or to say what is wrong with it.

    NIfTI has one component after the other, as we have: it is read once, into its place. SimpleITK holds three copies
    at a time, and reads NaN as 0, so that the file has to be read once more.
    """
    file = Path(path)
    # Of two files the header, which says whose it is, is the other one.
    header = header_of(file) if file.is_file() and _nifti_files(file) == (file, file) else None
    if header is None or (header.version, header.kind, header.intent) != (1, 16, 1007):
        return None
    if len(header.dim) != 5 or header.dim[3:] != (1, 3) or min(header.dim[:3]) < 2:
        return None
    said: list[str] = []
    u = torch.empty((1, 3, *header.dim[2::-1]))
    try:
        with opened(file) as stream:
            if stream.read(header.offset)[328:344].strip(b"\0"):  # a name: another tool's
                return None
            _integrity.check(file)
            for component in u[0]:
                missing = memoryview(component.numpy()).cast("B")
                while missing:
                    n = stream.readinto(missing[: 1 << 24])  # type: ignore[attr-defined]
                    if not n:
                        return None
                    missing = missing[n:]
            while stream.read(1 << 20):  # up to the checksum
                pass
    except (OSError, EOFError, RuntimeError, zlib.error):
        return None
    form = chosen(file, header, reading, said.append)
    if form is None:
        return None
    for message in said:
        warn(message)
    grid = grid_of(form, header.dim[:3])
    usable(grid, path)
    vectors = np.broadcast_to(np.float32(0), (*grid.shape, 3))  # of whose values nothing depends
    _, grid = made_straight(vectors, grid, file, reading, warn, rough=header.rough)
    if header.order == ">":
        u.numpy().byteswap(inplace=True)
    if header.scale != (1, 0):
        u.mul_(header.scale[0]).add_(header.scale[1])
    return u, grid


def write_displacement(path: Name, u: torch.Tensor, geometry: Geometry) -> None:
    """Writes u (1, nd, *spatial), in voxels of geometry, as an ITK displacement field: (x, y, z), mm, fp32.

    ITK's DisplacementFieldTransform of the file maps a fixed point to the moving point it corresponds to. .h5 is that transform
    itself, which ReadTransform reads (fp64); other suffixes: .nii.gz, .nii, .mha, .nrrd. InputError for others, for NaN and infinity.
    """
    name = Path(path).name.lower()
    if not name.endswith((*IMAGES, ".h5")):
        raise InputError(f"{path}: a displacement field must be written as {', '.join(IMAGES)} or .h5")
    if not bool(torch.isfinite(u).all()):
        raise InputError(f"{path}: a displacement field must be finite, got NaN or infinity")
    single = geometry.plane is None and not name.endswith(".h5")
    vectors = np.empty((*geometry.shape, geometry.nd), np.float32 if single else np.float64)
    for slab in _slabs(geometry.shape):
        vectors[slab] = u[0, :, slab].detach().cpu().double().movedim(0, -1).numpy() @ geometry.matrix.T
    if geometry.plane is not None:
        vectors, geometry = geometry.plane.vectors(vectors), geometry.plane.whole
    rolled = geometry.nd == 3 and geometry.size[2] == 1 and name.endswith((".nii", ".nii.gz"))
    if rolled:
        vectors, geometry = np.moveaxis(vectors, 0, 2), geometry.rolled(1)
    if not name.endswith(".h5"):
        image = sitk().GetImageFromArray(vectors.astype(np.float32, copy=False), isVector=True)
        if rolled:
            image.SetMetaData(NOTES, ROLLED)
        write(path, image, geometry)
        return
    require_utf8(path)
    image = sitk().GetImageFromArray(vectors, isVector=True)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    transform = sitk().DisplacementFieldTransform(image)
    with replacing(path) as temporary:
        try:
            reserve(temporary, vectors.nbytes + (1 << 16))
            with silent_stderr():
                sitk().WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written as a transform") from error
