"""Images, landmarks and displacements between files and tensors: grids in physical space.

Physical points are ITK's: millimetres, LPS, in the order (x, y, z). Arrays, tensors and voxel indices are
(z, y, x). Only images need SimpleITK.
"""

import contextlib
import csv
import gzip
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastreg._files import InputError, Name, replacing, require_utf8
from fastreg._refusals import Missing

__all__ = [
    "Geometry",
    "InputError",
    "read_displacement",
    "read_image",
    "read_landmarks",
    "resample",
    "write_displacement",
    "write_image",
    "write_landmarks",
]


SLAB = 1 << 20  # voxels


def _sitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise Missing("SimpleITK", "reading and writing images") from error
    return SimpleITK


@dataclass(frozen=True)
class Geometry:
    """Where a voxel grid lies: point = origin + direction @ (spacing * index), in ITK's order (x, y, z)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, shape: Sequence[int], spacing: Sequence[float]) -> "Geometry":
        """The grid of an array: shape and spacing (mm) in (z, y, x), origin 0, axes along the patient's."""
        nd = len(shape)
        eye = tuple(float(v) for v in np.eye(nd).ravel())
        return cls(tuple(shape)[::-1], tuple(float(s) for s in spacing)[::-1], (0.0,) * nd, eye)

    @property
    def nd(self) -> int:
        return len(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x)."""
        return self.size[::-1]

    @property
    def spacing_zyx(self) -> tuple[float, ...]:
        """mm, (z, y, x)."""
        return self.spacing[::-1]

    @property
    def matrix(self) -> np.ndarray:
        """(nd, nd): turns a step in voxels (z, y, x) into mm (x, y, z)."""
        direction = np.asarray(self.direction, dtype=np.float64).reshape(self.nd, self.nd)
        return (direction * np.asarray(self.spacing))[:, ::-1].copy()

    def to_physical(self, index: ArrayLike) -> np.ndarray:
        """(..., nd) voxels (z, y, x) -> (..., nd) mm (x, y, z)."""
        return np.asarray(index, dtype=np.float64) @ self.matrix.T + np.asarray(self.origin)

    def to_index(self, points: ArrayLike) -> np.ndarray:
        """(..., nd) mm (x, y, z) -> (..., nd) voxels (z, y, x)."""
        return (np.asarray(points, dtype=np.float64) - self.origin) @ np.linalg.inv(self.matrix).T

    def contains(self, index: np.ndarray) -> np.ndarray:
        """(..., nd) voxels (z, y, x) -> bool: inside the image, half a voxel around its centres included."""
        return np.all((index >= -0.5) & (index <= np.asarray(self.shape) - 0.5), axis=-1)

    def matches(self, other: "Geometry") -> bool:
        """Whether both are one grid, up to what file formats round away (a thousandth of a voxel)."""
        if self.size != other.size:
            return False
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), -1)
        apart = np.abs(self.to_physical(corners) - other.to_physical(corners)).max()
        return bool(apart <= 1e-3 * min(self.spacing))

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} voxels of {' x '.join(f'{s:g}' for s in self.spacing)} mm"


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The C libraries below SimpleITK print to file descriptor 2; what they say is in the error we raise."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _nifti_files(path: Path) -> tuple[Path, Path] | None:
    """(header, data) of a NIfTI or Analyze image, one file or two; None: it is none."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return path, path
    stem = path.name[:-3] if name.endswith(".gz") else path.name
    stem, suffix = os.path.splitext(stem)
    if suffix.lower() not in (".hdr", ".img"):
        return None
    found = []
    for wanted in (".hdr", ".img"):
        wanted = wanted.upper() if suffix.isupper() else wanted
        files = [path.with_name(stem + wanted + gz) for gz in ("", ".gz", ".GZ")]
        found += [file for file in files if file.exists()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def _not_finite_in_nifti(path: Path, image: Any) -> int:
    """How many values of a NIfTI or Analyze image are NaN or infinite; EOFError where it is cut short.

    SimpleITK reads both without a word, as zeros, so the bytes have to be looked at.
    """
    files = _nifti_files(path)
    if files is None:
        return 0
    fields = ("vox_offset", "bitpix", "datatype")
    offset, bits, kind = (int(float(image.GetMetaData(f))) if image.HasMetaDataKey(f) else 0 for f in fields)
    missing = math.prod(image.GetSize()) * image.GetNumberOfComponentsPerPixel() * bits // 8
    bad = 0
    header, data = ((gzip.open if f.name.lower().endswith(".gz") else open, f) for f in files)
    with header[0](header[1], "rb") as stream:
        order = "<" if int.from_bytes(stream.read(4), "little") in (348, 540) else ">"
    with data[0](data[1], "rb") as stream:
        stream.read(offset)
        dtype = {16: f"{order}f4", 64: f"{order}f8"}.get(kind)
        while block := stream.read(1 << 22):
            if dtype and missing > 0:
                values = np.frombuffer(block[:missing], dtype, min(len(block), missing) // (bits // 8))
                bad += values.size - int(np.count_nonzero(np.isfinite(values)))
            missing -= len(block)
    if missing > 0:
        raise EOFError
    return bad


def _read(path: Name) -> tuple[Any, int]:
    sitk = _sitk()
    path = Path(path)
    require_utf8(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.name.lower().endswith((".nia", ".nia.gz")):
        # ITK reads its NaN as 0 and we cannot tell
        raise InputError(f"{path}: text NIfTI is not supported; save it as .nii.gz")
    source = str(path)
    if path.is_dir():
        for name in os.listdir(path):
            require_utf8(name)
        with _silent_stderr():
            series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(source)
            if len(series) == 1:
                source = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(source, series[0])
        if len(series) != 1:
            raise InputError(f"{path}: a folder must hold exactly one DICOM series, got {len(series)}")
    elif not os.access(path, os.R_OK):
        raise InputError(f"{path}: permission denied")
    try:
        with _silent_stderr():
            image = sitk.ReadImage(source)
        bad = 0 if path.is_dir() else _not_finite_in_nifti(path, image)
    except (RuntimeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: not an image SimpleITK can read, or damaged") from error
    return image, bad


def _geometry(image: Any, path: Name) -> Geometry:
    """The grid of a SimpleITK image, which must be one that can be interpolated on."""
    geometry = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    flat = [axis for axis, n in zip("xyz", geometry.size, strict=False) if n < 2]
    if flat:
        also = "; save it as a 2D image" if geometry.nd == 3 and len(flat) == 1 else ""
        axes = " and ".join(flat)
        raise InputError(f"{path}: must have at least 2 voxels an axis, got 1 along {axes}{also}")
    numbers = np.concatenate([geometry.spacing, geometry.origin, geometry.direction])
    usable = np.isfinite(numbers).all() and min(geometry.spacing) > 0
    if not (usable and np.linalg.cond(geometry.matrix) < 1e6):
        raise InputError(f"{path}: its spacing, origin or direction is not usable")
    return geometry


def read_image(path: Name) -> tuple[np.ndarray, Geometry]:
    """Reads a scalar 2D or 3D image: any file SimpleITK reads, or a folder with one DICOM series.

    Returns:
        (ndarray, Geometry): the array in (z, y, x), in the file's dtype.
    Raises:
        InputError: missing, damaged, 4D, one slice only, several values a voxel, not finite.
        ImportError: no SimpleITK.
    """
    sitk = _sitk()
    image, bad = _read(path)
    nd, n_components = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if nd not in (2, 3):
        raise InputError(f"{path}: must be a 2D or 3D image, got {nd} dimensions")
    if n_components != 1:
        raise InputError(f"{path}: must have one value a voxel, got {n_components}")
    geometry = _geometry(image, path)
    array = sitk.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise InputError(f"{path}: must have real values, got complex ones")
    bad = bad or array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise InputError(f"{path}: must be finite, got NaN or infinity in {bad} of {array.size} voxels")
    return array, geometry


def read_displacement(path: Name) -> tuple[torch.Tensor, Geometry]:
    """Reads an ITK displacement field (x, y, z), mm, LPS, as write_displacement writes it.

    Returns:
        (Tensor, Geometry): (1, nd, *spatial) fp32, in voxels (z, y, x) of its grid.
    Raises:
        InputError: as read_image, and where a voxel does not hold one number an axis.
    """
    image, bad = _read(path)
    nd = image.GetDimension()
    if nd not in (2, 3) or image.GetNumberOfComponentsPerPixel() != nd:
        raise InputError(
            f"{path}: must be a displacement field, a vector of 2 or 3 numbers at each pixel of a 2D or voxel of a 3D grid"
        )
    geometry = _geometry(image, path)
    vectors = np.asarray(_sitk().GetArrayFromImage(image), dtype=np.float64)
    if bad or not np.isfinite(vectors).all():
        raise InputError(f"{path}: must be finite, got NaN or infinity")
    voxels = vectors @ np.linalg.inv(geometry.matrix).T
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxels, -1, 0), dtype=np.float32))[
        None
    ], geometry


def read_landmarks(path: Name, nd: int) -> np.ndarray:
    """Reads points from a csv file whose header names x, y and z (2D: x and y); other columns are ignored.

    Returns:
        ndarray: (P, nd) fp64, mm, (x, y, z), P >= 1.
    Raises:
        InputError: missing, not text, without those columns, a row that is no point, no rows.
    """
    axes = ["x", "y", "z"][:nd]
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = [(n, row) for n, row in enumerate(csv.reader(stream), 1) if any(v.strip() for v in row)]
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a csv file") from error
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    if any(header.count(axis) != 1 for axis in axes) or (nd == 2 and "z" in header):
        raise InputError(f"{path}: the header must be {','.join(axes)}, got {','.join(header)[:60]!r}")
    columns = [header.index(axis) for axis in axes]
    points = []
    for line, row in rows[1:]:
        try:
            point = [float(row[c]) for c in columns]
        except (ValueError, IndexError):
            point = [math.nan]
        if not np.isfinite(point).all():
            raise InputError(f"{path}: line {line} must hold {nd} numbers, got {','.join(row)[:60]!r}")
        points.append(point)
    if not points:
        raise InputError(f"{path}: holds no landmarks")
    return np.asarray(points, dtype=np.float64)


def write_landmarks(path: Name, points: ArrayLike) -> None:
    """Writes (P, nd) points, mm, (x, y, z), as read_landmarks reads them."""
    points = np.asarray(points, dtype=np.float64)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow("xyz"[: points.shape[1]])
        writer.writerows([f"{v:.9g}" for v in point] for point in points)


def _write(path: Name, image: Any, geometry: Geometry) -> None:
    require_utf8(path)
    sitk = _sitk()
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with replacing(path) as temporary:
        try:
            with _silent_stderr():
                sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written as an image") from error


def write_image(path: Name, array: ArrayLike, geometry: Geometry) -> None:
    """Writes an array (z, y, x) on its grid; the extension of path is the format. OSError when that fails."""
    array = np.asarray(array)
    known = {np.dtype(np.float16): np.float32, np.dtype(bool): np.uint8}  # what files cannot hold
    array = np.ascontiguousarray(array, dtype=known.get(array.dtype))
    _write(path, _sitk().GetImageFromArray(array), geometry)


def write_displacement(path: Name, u: torch.Tensor, geometry: Geometry) -> None:
    """Writes u (1, nd, *spatial), in voxels of geometry, as an ITK displacement field: (x, y, z), mm, fp32.

    ITK's DisplacementFieldTransform of the file maps a fixed point to the moving point it corresponds to.
    """
    voxels = u[0].detach().cpu().double().movedim(0, -1).numpy()
    vectors = (voxels @ geometry.matrix.T).astype(np.float32)
    _write(path, _sitk().GetImageFromArray(vectors, isVector=True), geometry)


def resample(
    image: torch.Tensor,
    geometry: Geometry,
    onto: Geometry,
    u: torch.Tensor | None = None,
    *,
    mode: str = "linear",
    outside: float | None = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolates an image once on another grid: out(p) = image at the physical point of p + u(p).

    Args:
        image (Tensor): (1, C, *geometry.shape). geometry, onto (Geometry): its grid, and that of the result.
        u (Tensor): (1, nd, *onto.shape), in voxels of onto; None: zero. mode: "linear" or "nearest".
        outside (float): the value where that point is not inside the image; None: the nearest value inside.
            As in ITK the image reaches half a voxel beyond its outermost voxel centres, with their value.
    Returns:
        (Tensor, Tensor): the image (1, C, *onto.shape), dtype of image; bool (1, 1, *onto.shape): inside.
    """
    nd, shape = onto.nd, onto.shape
    # index_moving = m (p + u) + t
    inverse = np.linalg.inv(geometry.matrix)
    m = torch.from_numpy(inverse @ onto.matrix)
    t = torch.from_numpy(inverse @ (np.asarray(onto.origin) - np.asarray(geometry.origin)))
    if geometry == onto:
        m = torch.eye(nd, dtype=torch.float64)  # what the inverse gives, without its rounding
    upper = torch.tensor(geometry.shape, dtype=torch.float64).view(-1, *[1] * nd) - 0.5
    out = image.new_empty((1, image.shape[1], *shape))
    inside = torch.empty((1, 1, *shape), dtype=torch.bool)
    # Slabs along the first axis: a whole grid of fp64 positions would outweigh everything else.
    step = max(1, SLAB // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        axes = [torch.arange(start, stop), *(torch.arange(n) for n in shape[1:])]
        p = torch.stack(torch.meshgrid(*axes, indexing="ij")).double()
        target = p if u is None else p + u[0, :, start:stop].cpu().double()
        target = torch.einsum("ij,j...->i...", m, target) + t.view(-1, *[1] * nd)
        # A thousandth of a millionth of a voxel forgives the rounding of grids that share a face.
        reach = 0.5 + 1e-9
        kept = ((target >= -reach) & (target <= upper + 1e-9)).all(0)
        p[0] -= start
        slab = torch.ops.fastreg.warp(image, (target - p)[None], None, mode, "border")
        if outside is not None:
            slab = torch.where(kept, slab, torch.as_tensor(outside, dtype=image.dtype))
        out[:, :, start:stop] = slab
        inside[0, 0, start:stop] = kept
    return out, inside
