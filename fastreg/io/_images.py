"""Scans: any file SimpleITK reads."""

import errno
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastreg._files import InputError, Name, probe, replacing, require_regular, require_utf8, reserve

from . import _integrity
from ._dicom import is_dicom, parted, read_dicom
from ._geometry import Geometry
from ._nibabel import read_foreign
from ._nifti import LPS, Header, chosen, grid_of, header_of, not_finite, packed, where_not_finite
from ._reading import Reading, Warn, ignore
from ._recognise import recognise, refusal
from ._shear import STRAIGHT, made_straight, shear
from ._sitk import heard, silent_stderr, sitk

FOREIGN = ("NIfTI-1", "NIfTI-2", "FreeSurfer MGH")  # what nibabel may read where SimpleITK does not


def read(
    path: Name, reading: Reading = Reading(), warn: Warn = ignore, *, nearest: bool = False
) -> tuple[Any, int]:
    """(SimpleITK image, how many values are not finite that it reads as 0). nearest: the interpolation, should a sheared image need one."""
    itk = sitk()
    require_utf8(path)
    file, which = parted(path)
    if not file.exists():
        raise InputError(f"{file}: no such file")
    if file.name.lower().endswith((".nia", ".nia.gz")):
        # ITK reads its NaN as 0 and we cannot tell
        raise InputError(f"{file}: text NIfTI is not supported; save it as .nii.gz")
    if file.is_dir():
        return read_dicom(path, reading, warn), 0
    require_regular(file)
    if is_dicom(file):
        return read_dicom(path, reading, warn), 0
    if which is not None:
        raise InputError(f"{path}: no such file")
    header = header_of(file)
    scaled = header is not None and (header.scale != (1, 0) or header.stray != 0)
    if header is not None and scaled and math.prod(header.dim[4:]) > 1:
        if header.stray:
            raise InputError(
                f"{file}: its vectors have an intercept (scl_inter {header.stray:g}) without a slope, which SimpleITK adds: set it to 0"
            )
        raise InputError(  # SimpleITK 2.5 scales the first third of three components, and writes beyond what it has of integers
            f"{file}: its vectors are scaled (scl_slope {header.scale[0]:g}, scl_inter {header.scale[1]:g}), which SimpleITK reads "
            "wrongly: save them unscaled"
        )
    try:
        _integrity.check(file)
        # What it says of NIfTI headers is about what we read of them ourselves.
        with heard(file, warn) if header is None else silent_stderr():
            image = itk.ReadImage(str(file))
        if header is not None and header.stray:
            image = _unscaled(image, file)
        bad = 0 if header is None else not_finite(file, header)
    except (RuntimeError, EOFError, OSError, zlib.error) as error:
        if "memory" in str(error) or "bad_alloc" in str(error):
            raise InputError(f"{file}: not enough memory for an image of this size") from error
        image, bad = _foreign(file, header, reading, warn, error, nearest), 0
    else:
        if header is not None:
            image = _placed(image, header, file, reading, warn, nearest)
        else:
            image = _itk_upright(image, file, reading, warn, nearest)
    return image, bad


def _unscaled(image: Any, file: Path) -> Any:
    """A slope of 0 says that values are not scaled (NIfTI-1); SimpleITK adds the intercept all the same, in fp32: what it rounds off
    does not come back by taking it away."""
    kind = recognise(file)
    if kind is None or kind.name not in FOREIGN:
        raise InputError(
            f"{file}: has an intercept without a slope, which SimpleITK adds: set scl_inter to 0"
        )
    array, _ = read_foreign(file, kind.name, file)
    raw = sitk().GetImageFromArray(array.reshape(image.GetSize()[::-1]))
    raw.CopyInformation(image)
    return raw


def _put(image: Any, grid: Geometry) -> Any:
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def _foreign(
    file: Path, header: Header | None, reading: Reading, warn: Warn, error: Exception, nearest: bool
) -> Any:
    """What SimpleITK does not read, but nibabel does; InputError names what it is."""
    kind = recognise(file)
    if kind is None or kind.name not in FOREIGN:
        raise InputError(refusal(file)) from error
    if kind.name == "NIfTI-1" and (
        header is None
        or not (set(header.forms) == {"sform"} or packed(file) != file.name.lower().endswith(".gz"))
    ):
        raise InputError(refusal(file)) from error
    array, affine = read_foreign(file, kind.name, file)
    form = LPS @ affine if header is None else chosen(file, header, reading, warn)
    form = LPS @ affine if form is None else form
    plane = _flat(form, array.shape[::-1]) if array.ndim == 2 else None
    if array.ndim == 2 and plane is None:
        array = array[None]
    grid = plane or grid_of(form, array.shape[::-1])
    usable(grid, file)
    array, grid = made_straight(array, grid, file, reading, warn, nearest=nearest)
    return _put(sitk().GetImageFromArray(array), grid)


def _placed(image: Any, header: Header, file: Path, reading: Reading, warn: Warn, nearest: bool) -> Any:
    """A NIfTI image where its header and what is chosen say that it lies."""
    itk, form = sitk(), chosen(file, header, reading, warn)
    nd, size = image.GetDimension(), image.GetSize()
    if form is None or nd < 2:
        return image
    if nd == 2:
        plane = _flat(form, size)
        if plane is None and image.GetNumberOfComponentsPerPixel() > 1:
            return image
        if plane is None:
            image, nd, size = itk.JoinSeries(image), 3, (*size, 1)
        grid = plane or grid_of(form, size)
    else:
        grid = grid_of(form, size[:3])
    usable(grid, file)
    what = "its sform is sheared"
    return _upright(image, grid, file, reading, warn, what, nearest, header.rough)


def _flat(form: np.ndarray, size: tuple[int, ...]) -> Geometry | None:
    """The 2D grid of a picture that lies across the axis of the body; None: it lies obliquely, and is one slice in space."""
    rise = float(np.abs(form[2, :2]) @ np.subtract(size[:2], 1))
    if rise > 1e-3 * np.linalg.norm(form[:, :2], axis=0).min():
        return None
    return grid_of(form[:2, [0, 1, 3]], size)


def _upright(
    image: Any, grid: Geometry, file: Path, reading: Reading, warn: Warn, what: str, nearest: bool, rough: float = 0.0
) -> Any:  # fmt: skip
    """The image on grid, that of its first axes, put on one of right angles where it has none."""
    itk, nd, size = sitk(), image.GetDimension(), image.GetSize()
    array = itk.GetArrayViewFromImage(image)
    straight, grid = made_straight(array, grid, file, reading, warn, what, rough, nearest)
    if straight is not array:
        return _put(itk.GetImageFromArray(straight), grid)
    if nd > 3:  # more axes, such as time
        direction = np.eye(nd)
        direction[:3, :3] = np.reshape(grid.direction, (3, 3))
        more = image.GetSpacing()[3:], image.GetOrigin()[3:]
        grid = Geometry(
            size, (*grid.spacing, *more[0]), (*grid.origin, *more[1]), tuple(direction.ravel().tolist())
        )
    own = Geometry(size, image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    return image if own.matches(grid) else _put(image, grid)


def _itk_upright(image: Any, file: Path, reading: Reading, warn: Warn, nearest: bool) -> Any:
    """MetaImage and NRRD hold any axes, and SimpleITK takes them as they are; what it writes of them as NIfTI has others."""
    nd = image.GetDimension()
    if nd not in (2, 3):
        return image
    grid = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    usable(grid, file)
    return _upright(image, grid, file, reading, warn, "its axes are sheared", nearest)


def usable(geometry: Geometry, path: Name) -> None:
    numbers = np.concatenate([geometry.spacing, geometry.origin, geometry.direction])
    usable = np.isfinite(numbers).all() and min(geometry.spacing) > 0
    if not (usable and np.linalg.cond(geometry.matrix) < 1e6):
        raise InputError(f"{path}: its spacing, origin or direction is not usable")


def geometry_of(image: Any, path: Name) -> Geometry:
    """The grid of a SimpleITK image, which must be one that can be interpolated on."""
    geometry = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    flat = [axis for axis, n in zip("xyz", geometry.size, strict=False) if n < 2]
    if len(flat) > geometry.nd - 2:  # one slice in space is an image
        raise InputError(
            f"{path}: must have at least 2 voxels along two axes, got 1 along {' and '.join(flat)}"
        )
    usable(geometry, path)
    return geometry


def read_image(
    path: Name,
    reading: Reading = Reading(),
    warn: Warn = ignore,
    *,
    labels: bool = False,
    undefined: bool = False,
) -> tuple[np.ndarray, Geometry]:
    """Reads a scalar 2D or 3D image: any file SimpleITK or nibabel reads, or a DICOM series (FOLDER, FOLDER#2, FOLDER#UID).

    reading: what is chosen where a file can be understood in two ways. warn(message): what may not be meant. labels: its values
    must not be mixed, should it have to be resampled. undefined: what is not finite is NaN, and no error unless that is all.
    Returns:
        (ndarray, Geometry): the array in (z, y, x), in the file's dtype.
    Raises:
        InputError: missing, damaged, 4D, not on one even grid, several values a voxel, not finite.
        ImportError: no SimpleITK.
    """
    itk = sitk()
    image, bad = read(path, reading, warn, nearest=labels)
    nd, n_components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if nd not in (2, 3):
        size = "x".join(map(str, image.GetSize()))
        raise InputError(
            f"{path}: must be a 2D or 3D image, got {nd} dimensions ({size}): take one volume out of it"
        )
    if n_components != 1:
        whole = "integer" in image.GetPixelIDTypeAsString()
        does = (
            "colours? register one channel or grey values, and move the colours by fastreg apply --field"
            if whole
            else "a displacement field? fastreg apply --field moves images by it"
        )
        raise InputError(f"{path}: must have one value a voxel, got {n_components}: {does}")
    geometry = geometry_of(image, path)
    array = itk.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise InputError(f"{path}: must have real values, got complex ones")
    unread, bad = bad, bad or array.size - np.count_nonzero(np.isfinite(array))
    if bad and undefined and bad < array.size:
        return _with_nan(array, path if unread else None), geometry
    if bad:
        raise InputError(f"{path}: must be finite, got NaN or infinity in {bad} of {array.size} voxels")
    return array, geometry


def _with_nan(array: np.ndarray, path: Name | None) -> np.ndarray:
    """NaN where values are not finite: of an array, or of the NIfTI file at path, which SimpleITK reads as 0."""
    bad = ~np.isfinite(array)
    if path is not None:
        header = header_of(Path(path))
        found = None if header is None else where_not_finite(Path(path), header)
        if found is None or found.size != array.size:
            raise InputError(f"{path}: must be finite where it has to be resampled, got NaN or infinity")
        bad = bad | found.reshape(array.shape)
    return np.where(bad, np.nan, array).astype(array.dtype if array.dtype.kind == "f" else np.float64)


def write(path: Name, image: Any, geometry: Geometry) -> None:
    require_utf8(path)
    if shear(geometry) > STRAIGHT and ".nii" in Path(path).suffixes:
        # SimpleITK writes other axes without a word.
        raise InputError(
            f"{path}: its axes are sheared by {shear(geometry):.3g} degrees, which ITK's NIfTI cannot hold"
        )
    itk = sitk()
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with replacing(path) as temporary:
        try:
            if temporary.suffix.lower() in (".h5", ".hdf5", ".mnc"):
                size = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel()
                reserve(temporary, size * image.GetSizeOfPixelComponent() + (1 << 16))
            with silent_stderr():
                itk.WriteImage(image, str(temporary), useCompression=True)
            _integrity.require_written(temporary, image)
        except (RuntimeError, EOFError, OSError, zlib.error) as error:
            probe(temporary)
            raise OSError(errno.EIO, "cannot be written as an image", str(temporary)) from error


def write_image(path: Name, array: ArrayLike, geometry: Geometry) -> None:
    """Writes an array (z, y, x) on its grid; the extension of path is the format. OSError when that fails."""
    array = np.asarray(array)
    if geometry.plane is not None:
        geometry = geometry.plane.whole
        array = array.reshape(geometry.shape)
    known = {np.dtype(np.float16): np.float32, np.dtype(bool): np.uint8}  # what files cannot hold
    array = np.ascontiguousarray(array, dtype=known.get(array.dtype))
    write(path, sitk().GetImageFromArray(array), geometry)
