"""NiftyReg."""

from fastreg._files import InputError

from ._chain import Field, Step
from ._format import Format, Source, Target
from ._nifti import FLIP, intent, load, positions, read_vectors, write_vectors

# intent_p1; only the first two are fields of positions or displacements.
KINDS = {
    0: "deformation (RAS positions, mm)",
    1: "displacement (RAS, mm)",
    2: "grid of spline control points",
    3: "flow field (velocities)",
    4: "flow field (velocities)",
    5: "grid of spline velocities",
}


def read(source: Source) -> list[Step]:
    _, name, p1 = intent(load(source.path))
    kind = KINDS.get(int(p1), f"transform of kind {p1:g}")
    if name != "NREG_TRANS" or p1 not in (0, 1):
        kind = kind if name == "NREG_TRANS" else f"file of an old version ({name})"
        raise InputError(
            f"{source.path}: NiftyReg {kind} is not read: make a field of it with reg_transform -ref FIXED -disp {source.path.name} field.nii.gz"
        )
    array, grid = read_vectors(source, 5, "a NiftyReg field", "a 3D grid of 3 numbers (X, Y, Z, 1, 3)")
    vectors = array * FLIP - (positions(grid) if p1 == 0 else 0)
    return [Step(f"NiftyReg {kind}, {'x'.join(map(str, grid.size))}", str(source.path), Field(vectors, grid))]


def write(target: Target) -> None:
    write_vectors(target, target.vectors * FLIP, axes=5, code=1007, name="NREG_TRANS", p1=1)


FORMAT = Format(
    "niftyreg",
    "NiftyReg reg_f3d, reg_transform, reg_resample",
    ".nii.gz .nii",
    "NIfTI 5D, intent 1007 named NREG_TRANS; p1 says which kind",
    "positions (p1 0) or displacements (p1 1) in mm, RAS; other kinds are refused",
    read,
    write,
    suffixes=(".nii.gz", ".nii"),
    written="displacements in mm, RAS",
)
