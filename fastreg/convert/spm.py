"""SPM: y_ and iy_ deformations of Segment, Normalise, Deformations (spm_deformations.m, save_def and apply_def)."""

from ._chain import Field, Step
from ._format import Format, Source
from ._nifti import FLIP, positions, read_vectors


def read(source: Source) -> list[Step]:
    wanted = "a 3D grid of 3 numbers (X, Y, Z, 1, 3)"
    array, grid = read_vectors(source, 5, "an SPM deformation", wanted, undefined=True)
    what = f"SPM deformation (RAS positions, mm), {'x'.join(map(str, grid.size))}"
    return [Step(what, str(source.path), Field(array * FLIP - positions(grid), grid))]


FORMAT = Format(
    "spm",
    "SPM, CAT12: y_ and iy_ files",
    ".nii .nii.gz",
    "NIfTI 5D, intent 1007 named Mapping; of those without an intent nothing: `--from spm`",
    "positions in mm, RAS; NaN: not defined",
    read,
    instead="is read only: write --to itk",
    undefined=True,
)
