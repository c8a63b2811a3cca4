"""SPM: RAS positions in y_ files, named Mapping, or with no intent at all."""

import numpy as np
import pytest
import torch
from convert.scene import FIXED, FLIP, U, error, mm, points, ras, save, voxels, xyz

from fastreg import convert, io

POSITIONS = xyz((points(FIXED) + U) * FLIP)[:, :, :, None]


def test_reads(tmp_path):
    path = save(tmp_path / "y_a.nii", POSITIONS, ras(FIXED), code=1007, name="Mapping", dtype=">f4")
    u, own, what = convert.read_transform(path)
    assert own.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what == "SPM deformation (RAS positions, mm), 22x18x14"
    for format in ("itk", "niftyreg"):
        with pytest.raises(io.InputError, match="says that it is spm"):
            convert.read_transform(path, format=format)
    with pytest.raises(io.InputError, match=r"SPM's \(Mapping\)"):
        io.read_displacement(path)


def test_without_an_intent_it_has_to_be_told(tmp_path):
    path = save(tmp_path / "y_a.nii", POSITIONS, ras(FIXED))
    with pytest.raises(
        io.InputError, match=r"does not say \(ITK's fields have NIfTI intent 1007\): give --from, one of spm"
    ):
        convert.read_transform(path)
    assert error(convert.read_transform(path, format="spm")[0]) < 0.2


def test_undefined_voxels_and_other_names(tmp_path):
    array = POSITIONS.copy()
    array[:, :, 2] = np.nan
    path = save(tmp_path / "y_a.nii", array, ras(FIXED), code=1007, name="Mapping")
    assert torch.isnan(convert.read_transform(path)[0][0, :, 2]).all()
    path = save(tmp_path / "u_a.nii", POSITIONS, ras(FIXED), code=1007, name="Velocity")
    with pytest.raises(io.InputError, match="SPM DARTEL flow field is not read"):
        convert.read_transform(path)
    path = save(tmp_path / "a.nii", xyz(U)[:, :, :, None], ras(FIXED), code=1007, name="Something")
    with pytest.raises(io.InputError, match=r"calls it 'Something'\): give --from, one of itk"):
        convert.read_transform(path)
    assert error(convert.read_transform(path, format="itk")[0]) < 0.2
    with pytest.raises(io.InputError, match="SPM, CAT12: y_ and iy_ files is not written: it is read only"):
        convert.write_transform(path, voxels(), FIXED, "spm")
