"""FreeSurfer, surfa: intent 1006, RAS displacements."""

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, error, mm, nibabel, ras, save, voxels, xyz

from fastreg import convert, io


def test_reads_as_simpleitk_does(tmp_path):
    path = save(tmp_path / "f.nii.gz", xyz(U * FLIP)[:, :, :, None], ras(FIXED), code=1006)
    u, grid, what = convert.read_transform(path)
    assert grid.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what == "FreeSurfer warp (RAS displacements, mm), 22x18x14"
    assert np.allclose(io.read_displacement(path)[0], u, atol=1e-5)
    assert convert.read_transform(path, format="surfa")[2] == what
    with pytest.raises(io.InputError, match="says that it is freesurfer"):
        convert.read_transform(path, format="niftyreg")


def test_writes(tmp_path):
    path = tmp_path / "out.nii.gz"
    convert.write_transform(path, voxels(), FIXED, "freesurfer")
    image = nibabel.load(path)
    assert image.header.get_intent("code")[0] == 1006
    assert image.shape == (22, 18, 14, 1, 3)
    assert not image.header.extensions
    assert np.allclose(image.get_fdata()[:, :, :, 0], xyz(U * FLIP), atol=1e-4)
    assert error(convert.read_transform(path)[0]) < 0.2


def test_mgz_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "warp.mgz").write_bytes(b"\x1f\x8b not looked at")
    with pytest.raises(io.InputError, match=r"FreeSurfer .mgz is not read: save the warp as .nii.gz"):
        convert.read_transform(tmp_path / "warp.mgz")
