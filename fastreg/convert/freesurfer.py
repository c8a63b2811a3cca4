"""FreeSurfer, surfa, SynthMorph."""

from ._chain import Field, Step
from ._format import Format, Source, Target
from ._nifti import FLIP, read_vectors, write_vectors


def read(source: Source) -> list[Step]:
    array, grid = read_vectors(source, 5, "a FreeSurfer warp", "a 3D grid of 3 numbers (X, Y, Z, 1, 3)")
    what = f"FreeSurfer warp (RAS displacements, mm), {'x'.join(map(str, grid.size))}"
    return [Step(what, str(source.path), Field(array * FLIP, grid))]


def write(target: Target) -> None:
    write_vectors(target, target.vectors * FLIP, axes=5, code=1006)


FORMAT = Format(
    "freesurfer",
    "FreeSurfer, surfa, SynthMorph",
    ".nii.gz .nii",
    "NIfTI 5D, intent 1006",
    "displacements in mm, RAS",
    read,
    write,
    suffixes=(".nii.gz", ".nii"),
)
