"""FSL: mm from the corner of each image, x from the other end where the axes are right-handed."""

import numpy as np
import pytest
from convert.scene import (
    FIXED,
    FLIP,
    MOVING,
    U,
    error,
    grid,
    images,
    mm,
    nibabel,
    points,
    ras,
    save,
    voxels,
    xyz,
)

from fastreg import convert, io


def scaled(geometry, p):
    """LPS points in FSL's coordinates, as fslpy defines them, from nibabel's affine."""
    affine = ras(geometry)
    index = (p * FLIP - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    out = index * geometry.spacing
    if np.linalg.det(affine) > 0:
        out[..., 0] = (geometry.size[0] - 1 - index[..., 0]) * geometry.spacing[0]
    return out


LEFT = grid((22, 18, 14), (1.5, 2.0, 2.5), (0.2, -0.15, 0.1), (5.0, 30.0, 15.0), flip=(-1, 1, 1))


def test_the_corner_of_a_right_handed_image():
    """The number of fslpy: voxel 0 of 22 voxels of 1.5 mm is at x 31.5."""
    assert np.linalg.det(ras(FIXED)) > 0
    assert np.allclose(scaled(FIXED, FIXED.to_physical([0, 0, 0])), [31.5, 0, 0])
    assert np.allclose(scaled(LEFT, LEFT.to_physical([0, 0, 0])), 0)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("fixed", [FIXED, LEFT], ids=["right-handed", "left-handed"])
@pytest.mark.parametrize("turn", [1, -1], ids=["moving-right", "moving-left"])
def test_reads(tmp_path, absolute, fixed, turn):
    moving = grid((24, 20, 17), (1.7, 1.8, 2.2), (0.12, -0.1, 0.17), (7.0, 28.0, 16.0), flip=(turn, 1, 1))
    u = np.array([2.1, -2.7, 1.2]) + np.sin(points(fixed) / 9)
    start = points(fixed)
    array = scaled(moving, start + u) - (0 if absolute else scaled(fixed, start))
    path = save(tmp_path / "f.nii.gz", xyz(array), ras(fixed), code=2006)
    got, own, what = convert.read_transform(path, moving=moving)
    assert own.matches(fixed)
    assert np.abs(mm(got, fixed) - u).max() < 2e-4
    assert what.startswith(f"FSL {'absolute' if absolute else 'relative'} warp")
    with pytest.raises(io.InputError, match="give --moving MOVING"):
        convert.read_transform(path)
    with pytest.raises(io.InputError, match="says that it is fsl"):
        convert.read_transform(path, format="mrtrix", moving=moving)


def test_writes(tmp_path):
    _, moving = images(tmp_path)
    convert.write_transform(tmp_path / "out.nii.gz", voxels(), FIXED, "fsl", moving=moving)
    file = nibabel.load(tmp_path / "out.nii.gz")
    assert file.shape == (22, 18, 14, 3)
    assert file.header.get_intent("code")[0] == 2006
    start = points(FIXED)
    assert np.allclose(file.get_fdata(), xyz(scaled(MOVING, start + U) - scaled(FIXED, start)), atol=1e-3)
    assert error(convert.read_transform(tmp_path / "out.nii.gz", moving=moving)[0]) < 0.2
    with pytest.raises(io.InputError, match="give --moving MOVING"):
        convert.write_transform(tmp_path / "b.nii.gz", voxels(), FIXED, "fsl")


@pytest.mark.parametrize("code", [2007, 2008, 2009, 2016])
def test_coefficients_are_refused(tmp_path, code):
    path = save(tmp_path / "f.nii.gz", xyz(U), ras(FIXED), code=code)
    with pytest.raises(io.InputError, match=r"coefficients is not read: .*fnirtfileutils --in=f.nii.gz"):
        convert.read_transform(path, moving=MOVING)
