"""DICOM Deformable Spatial Registration (PS3.3 C.20.3)."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from fastreg._files import InputError, require_utf8
from fastreg._refusals import Missing
from fastreg.io import Geometry

from ._chain import Field, Step
from ._format import Format, Source
from ._nifti import finite, positions

DEFORMABLE = "1.2.840.10008.5.1.4.1.1.66.3"


# What pydicom raises where bytes are not what they should be; of attributes, when they are asked for.
DAMAGED = (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError)


def dataset(path: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise Missing("pydicom", "reading DICOM transforms") from error
    require_utf8(path)
    try:
        return pydicom.dcmread(path)
    except (pydicom.errors.InvalidDicomError, struct.error, *DAMAGED) as error:
        raise InputError(f"{path}: not a DICOM file, or damaged") from error


def _matrix(item: Any, name: str) -> np.ndarray:
    sequence = item.get(name)
    if not sequence:
        return np.eye(4)
    return np.array(sequence[0].FrameOfReferenceTransformationMatrix, dtype=np.float64).reshape(4, 4)


def read(source: Source) -> list[Step]:
    data, path = dataset(source.path), source.path
    if data.get("SOPClassUID") != DEFORMABLE:
        raise InputError(f"{path}: is DICOM, but no Deformable Spatial Registration")
    with_grid = [
        i
        for i in data.get("DeformableRegistrationSequence", ())
        if i.get("DeformableRegistrationGridSequence")
    ]
    if len(with_grid) != 1:
        raise InputError(f"{path}: must deform one image, got {len(with_grid)} grids of vectors")
    (item,) = with_grid
    try:
        grid = item.DeformableRegistrationGridSequence[0]
        size = tuple(int(n) for n in grid.GridDimensions)
        spacing = tuple(float(v) for v in grid.GridResolution)
        row, column = np.array(grid.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
        origin = tuple(float(v) for v in grid.ImagePositionPatient)
        raw = np.frombuffer(grid.VectorGridData, "<f4").astype(np.float64)
        array = raw.reshape(*size[::-1], 3)
        before, after = (_matrix(item, f"{p}DeformationMatrixRegistrationSequence") for p in ("Pre", "Post"))
    except DAMAGED as error:
        raise InputError(f"{path}: its Deformable Registration Grid is incomplete or damaged") from error
    direction = np.stack([row, column, np.cross(row, column)], axis=1)
    if min(size) < 2 or min(spacing) <= 0 or not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise InputError(
            f"{path}: its grid must have 2 points an axis or more, a spacing and perpendicular axes"
        )
    geometry = Geometry(size, spacing, origin, tuple(float(v) for v in direction.ravel()))
    array = finite(path, array, undefined=True)
    start = positions(geometry)
    # The vector is that of the point before the first matrix moves it.
    middle = start @ before[:3, :3].T + before[:3, 3] + array
    vectors = middle @ after[:3, :3].T + after[:3, 3] - start
    what = f"DICOM Deformable Spatial Registration (LPS displacements, mm), {'x'.join(map(str, size))}"
    return [Step(what, str(path), Field(vectors, geometry))]


FORMAT = Format(
    "dicom",
    "DICOM Deformable Spatial Registration",
    ".dcm",
    f"SOP class {DEFORMABLE}",
    "displacements in mm, LPS, between two matrices; NaN: not defined",
    read,
    instead="is read only: write --to itk",
    undefined=True,
)
