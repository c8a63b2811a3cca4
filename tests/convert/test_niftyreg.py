"""NiftyReg: NREG_TRANS, RAS, positions (p1 0) and displacements (p1 1)."""

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, error, mm, nibabel, points, ras, save, voxels, xyz

from fastreg import convert, io


def file(path, array, p1, name="NREG_TRANS", **options):
    return save(path, xyz(array)[:, :, :, None], ras(FIXED), code=1007, name=name, p1=p1, **options)


@pytest.mark.parametrize("p1", [0, 1])
def test_reads(tmp_path, p1):
    array = U * FLIP + (points(FIXED) * FLIP if p1 == 0 else 0)
    path = file(tmp_path / "f.nii.gz", array, p1)
    u, grid, what = convert.read_transform(path)
    assert grid.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what.startswith("NiftyReg " + ("deformation (RAS positions", "displacement (RAS")[p1])
    assert what.endswith("22x18x14")
    assert convert.read_transform(path, format="niftyreg")[2] == what
    with pytest.raises(io.InputError, match=r"says that it is niftyreg.* itk was asked for"):
        convert.read_transform(path, format="itk")


@pytest.mark.parametrize("p1", [2, 3, 4, 5, 7])
def test_other_kinds_are_refused_by_name(tmp_path, p1):
    path = file(tmp_path / "f.nii.gz", U * FLIP, p1)
    with pytest.raises(io.InputError, match=r"NiftyReg .* is not read: .*reg_transform -ref FIXED -disp"):
        convert.read_transform(path)


def test_old_and_integer_and_nan_files_are_refused(tmp_path):
    path = file(tmp_path / "old.nii.gz", U * FLIP, 1, name="NREG_CPP_FILE")
    with pytest.raises(io.InputError, match=r"old version \(NREG_CPP_FILE\)"):
        convert.read_transform(path)
    path = file(tmp_path / "whole.nii.gz", U * FLIP, 1, dtype=np.int16)
    with pytest.raises(io.InputError, match="floating-point numbers, got int16"):
        convert.read_transform(path)
    array = U * FLIP
    array[3, 4, 5, 1] = np.nan
    path = file(tmp_path / "nan.nii.gz", array, 1)
    with pytest.raises(io.InputError, match="must be finite"):
        convert.read_transform(path)


def test_without_its_name_it_is_not_niftyregs(tmp_path):
    path = file(tmp_path / "f.nii.gz", U, 1, name="")
    with pytest.raises(io.InputError, match=r"says that it is itk .* niftyreg was asked for"):
        convert.read_transform(path, format="niftyreg")


def test_writes(tmp_path):
    path = tmp_path / "out.nii.gz"
    convert.write_transform(path, voxels(), FIXED, "niftyreg")
    image = nibabel.load(path)
    assert image.shape == (22, 18, 14, 1, 3)
    assert image.get_data_dtype() == np.float32
    assert image.header.get_intent("code")[0] == 1007
    assert image.header["intent_name"] == b"NREG_TRANS"
    assert image.header["intent_p1"] == 1
    assert np.allclose(image.affine, ras(FIXED), atol=1e-4)
    assert np.allclose(image.get_fdata()[:, :, :, 0], xyz(U * FLIP), atol=1e-4)
    assert error(convert.read_transform(path)[0]) < 0.2
