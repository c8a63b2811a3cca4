"""ITK: displacement fields as images, and transforms (.mat .tfm .txt .h5), which are those of ANTs, Slicer, SimpleITK."""

from pathlib import Path
from typing import Any

import numpy as np

from fastreg._files import InputError, require_utf8
from fastreg.io import Geometry, read_displacement, write_displacement
from fastreg.io._sitk import silent_stderr, sitk

from ._chain import Field, Step
from ._format import Format, Source, Target


def read_field(source: Source) -> list[Step]:
    u, grid = read_displacement(source.path, source.reading, source.warn)
    what = f"ITK displacement field (LPS, mm), {'x'.join(map(str, grid.size))}"
    return [Step(what, str(source.path), Field(u, grid))]


def read_transform(source: Source, inverse: bool = False) -> list[Step]:
    """One Step a transform, the first applied one first. inverse: of a matrix."""
    itk = sitk()
    require_utf8(source.path)
    try:
        with silent_stderr():
            transform = itk.ReadTransform(str(source.path))
    except RuntimeError as error:
        raise InputError(f"{source.path}: not a transform that SimpleITK can read, or damaged") from error
    steps = [_step(t, source.path) for t in _flat(transform)]
    if not steps:
        raise InputError(f"{source.path}: holds no transform")
    return [_inverted(s) for s in reversed(steps)] if inverse else steps


def _flat(transform: Any) -> list[Any]:
    """The first applied one first."""
    # SimpleITK shows a transform that it has no class for, as old ANTs' MatrixOffsetTransformBase, as a composite of itself.
    if transform.GetName() != "CompositeTransform" or transform.IsLinear():
        return [transform]
    composite = sitk().CompositeTransform(transform)
    parts = [composite.GetNthTransform(i) for i in range(composite.GetNumberOfTransforms())]
    return [leaf for part in reversed(parts) for leaf in _flat(part)]


def _step(transform: Any, path: Path) -> Step:
    if transform.GetName() == "DisplacementFieldTransform":
        image = sitk().DisplacementFieldTransform(transform).GetDisplacementField()
        numbers = image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()
        vectors = np.asarray(sitk().GetArrayFromImage(image), dtype=np.float64)
        if not np.isfinite(vectors).all():
            raise InputError(f"{path}: must be finite, got NaN or infinity")
        size = "x".join(map(str, image.GetSize()))
        return Step(
            f"ITK displacement field (LPS, mm), {size}", str(path), Field(vectors, Geometry(*numbers))
        )
    name = "matrix" if transform.GetName() == "CompositeTransform" else transform.GetName()
    return Step(f"ITK {name}", str(path), other=transform)


def _inverted(step: Step) -> Step:
    if step.field is not None or not step.other.IsLinear():
        raise InputError(
            f"{step.path}: only a matrix can be inverted by ',1'; give the file of the inverse warp"
        )
    try:
        inverse = step.other.GetInverse()
    except RuntimeError as error:
        raise InputError(f"{step.path}: its matrix is singular and has no inverse") from error
    return Step(f"{step.what} (inverted)", step.path, other=inverse)


def write(target: Target) -> None:
    write_displacement(target.path, target.u, target.geometry)


FIELD = Format(
    "itk",
    "ITK, SimpleITK, ANTs, greedy, elastix, plastimatch, Slicer, NiTransforms",
    ".nii.gz .nii .mha .nrrd",
    "vectors of floating-point numbers; NIfTI 5D, intent 1007 without a name",
    "displacements in mm, LPS",
    read_field,
    write,
    suffixes=(".nii.gz", ".nii", ".mha", ".nrrd", ".h5"),
)
TRANSFORM = Format(
    "itk-transform",
    "ITK, SimpleITK, ANTs (0GenericAffine.mat, Composite.h5), fMRIPrep, Slicer",
    ".mat .tfm .txt .h5",
    "first bytes of the file",
    "matrices, fields and lists of them in mm, LPS",
    read_transform,
    write,
    needs="--like where a matrix comes first",
    written="a displacement field in mm, LPS",
    suffixes=(".h5",),
)
