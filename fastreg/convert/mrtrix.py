"""MRtrix."""

from ._chain import Field, Step
from ._format import Format, Source, Target
from ._nifti import FLIP, positions, read_vectors, write_vectors


def read(source: Source) -> list[Step]:
    array, grid = read_vectors(
        source, 4, "an MRtrix warp", "a 3D grid of 3 numbers (X, Y, Z, 3)", undefined=True
    )
    vectors = array * FLIP - positions(grid)
    what = f"MRtrix deformation (RAS positions, mm), {'x'.join(map(str, grid.size))}"
    return [Step(what, str(source.path), Field(vectors, grid))]


def write(target: Target) -> None:
    write_vectors(target, (positions(target.geometry) + target.vectors) * FLIP, axes=4)


FORMAT = Format(
    "mrtrix",
    "MRtrix mrregister, mrtransform, warpconvert",
    ".nii.gz .nii",
    "",
    "positions in mm, RAS; NaN: not defined",
    read,
    write,
    suffixes=(".nii.gz", ".nii"),
    undefined=True,
)
