"""NIfTI files whose vectors SimpleITK does not give as they are."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastreg._files import InputError, replacing, require_regular, require_utf8
from fastreg._refusals import Missing
from fastreg.io import Geometry, Reading
from fastreg.io._nifti import chosen, grid_of, header_of, opened, packed
from fastreg.io._reading import Warn
from fastreg.io._recognise import refusal

from ._format import Source, Target

# Of x, y and z, between RAS and LPS.
FLIP = np.array([-1.0, -1.0, 1.0])


def nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise Missing("nibabel", "reading and writing transforms of other tools") from error
    return nibabel


def load(path: Path) -> Any:
    """nibabel's image, data unread. InputError: no NIfTI."""
    require_regular(path)
    try:
        if packed(path) == path.name.lower().endswith(".gz"):
            image = nibabel().load(path)
        else:  # whose name does not say that it is packed, or says so wrongly
            with opened(path) as stream:
                image = nibabel().Nifti1Image.from_bytes(stream.read())
    except (
        nibabel().filebasedimages.ImageFileError,
        nibabel().spatialimages.HeaderDataError,
        nibabel().wrapstruct.WrapStructError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        raise InputError(refusal(path)) from error
    if not isinstance(image, nibabel().Nifti1Pair):
        raise InputError(f"{path}: must be NIfTI, and is {type(image).__name__.removesuffix('Image')}")
    return image


def intent(image: Any) -> tuple[int, str, float]:
    """(code, name, first parameter)."""
    header = image.header
    name = bytes(header["intent_name"].tobytes()).split(b"\0")[0].decode("latin-1").strip()
    return int(header["intent_code"]), name, float(header["intent_p1"])


def grid(path: Path, form: np.ndarray, shape: tuple[int, ...]) -> Geometry:
    """Of a form (3, 4): voxel (x, y, z) -> mm, LPS."""
    found = grid_of(form, tuple(int(n) for n in shape))
    numbers = np.concatenate([found.spacing, found.origin, found.direction])
    if not (np.isfinite(numbers).all() and min(found.spacing) > 0):
        raise InputError(f"{path}: its spacing, origin or direction is not usable")
    direction = np.reshape(found.direction, (3, 3))
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise InputError(f"{path}: the axes of its grid must be perpendicular, and are sheared")
    if min(shape) < 2:
        size = "x".join(map(str, shape))
        raise InputError(f"{path}: must have at least 2 voxels an axis, got {size}; 2D is not read")
    return found


def geometry(path: Path, image: Any, reading: Reading, warn: Warn) -> Geometry:
    """Where the voxels of an image lie, as `reading` says where qform and sform differ."""
    header = header_of(path)
    form = chosen(path, header, reading, warn) if header is not None and header.forms else None
    if form is None:
        raise InputError(f"{path}: does not say where it lies: its qform and sform codes are 0")
    return grid(path, form, image.shape[:3])


def values(path: Path, image: Any, *, undefined: bool = False) -> np.ndarray:
    """All values, fp64, in the file's order of axes. InputError: integers, infinity, NaN where it has no meaning."""
    if image.header.get_data_dtype().kind != "f":
        raise InputError(
            f"{path}: a field must hold floating-point numbers, got {image.header.get_data_dtype()}"
        )
    try:
        if isinstance(image, nibabel().Nifti1Image) and packed(path):
            with opened(path) as stream:  # all of it, up to the checksum, which nibabel does not read
                image = type(image).from_bytes(stream.read())
        array = np.asarray(image.dataobj, dtype=np.float64)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut short") from error
    return finite(path, array, undefined=undefined)


def finite(path: Path, array: np.ndarray, *, undefined: bool = False) -> np.ndarray:
    """The array, which must be finite. undefined: but for vectors with a NaN, which become NaN altogether; not all of them."""
    if not undefined and not np.isfinite(array).all():
        raise InputError(f"{path}: must be finite, got NaN or infinity")
    if np.isinf(array).any():
        raise InputError(f"{path}: must be finite or NaN, got infinity")
    bad = np.isnan(array).any(-1)
    if bad.all():
        raise InputError(f"{path}: is not defined anywhere, all its vectors are NaN")
    if bad.any():
        array = np.where(bad[..., None], np.nan, array)
    return array


def require_shape(path: Path, image: Any, n: int, title: str, wanted: str) -> None:
    """InputError unless an image has n axes, the last one (after one of length 1, of five) of length 3."""
    shape = image.shape
    if len(shape) != n or shape[-1] != 3 or (n == 5 and shape[3] != 1):
        raise InputError(f"{path}: {title} must be {wanted}, got {'x'.join(map(str, shape))}")


def zyx(array: np.ndarray) -> np.ndarray:
    """(X, Y, Z[, 1], 3) -> (Z, Y, X, 3)."""
    return np.moveaxis(array.reshape(*array.shape[:3], 3), (0, 1, 2), (2, 1, 0))


def positions(geometry: Geometry) -> np.ndarray:
    """(*spatial, nd) fp64: where the voxels are, mm, LPS."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), -1)
    return geometry.to_physical(index)


def read_vectors(
    source: Source, n: int, title: str, wanted: str, *, undefined: bool = False
) -> tuple[np.ndarray, Geometry]:
    """((z, y, x, 3) fp64 numbers as they stand in the file, its grid)."""
    image = load(source.path)
    require_shape(source.path, image, n, title, wanted)
    place = geometry(source.path, image, source.reading, source.warn)
    return zyx(values(source.path, image, undefined=undefined)), place


def write_vectors(
    target: Target, array: np.ndarray, *, axes: int, code: int = 0, name: str = "", p1: float = 0.0
) -> None:
    """Writes (z, y, x, 3) numbers as (X, Y, Z, 3), or (X, Y, Z, 1, 3) with axes=5, fp32."""
    if target.geometry.nd != 3:
        raise InputError(f"{target.path}: this format holds 3D fields, got {target.geometry.nd}D")
    require_utf8(target.path)
    data = np.moveaxis(array, (0, 1, 2), (2, 1, 0)).astype(np.float32)
    data = data[:, :, :, None] if axes == 5 else data
    affine = np.eye(4)
    affine[:3, :3] = FLIP[:, None] * target.geometry.matrix[:, ::-1]
    affine[:3, 3] = FLIP * target.geometry.origin
    image = nibabel().Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header["intent_code"], image.header["intent_name"], image.header["intent_p1"] = code, name, p1
    with replacing(target.path) as temporary:
        nibabel().save(image, temporary)
