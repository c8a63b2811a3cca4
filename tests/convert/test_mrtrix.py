"""MRtrix: RAS positions, NaN where there is none."""

import numpy as np
import pytest
import torch
from convert.scene import (
    FIXED,
    FLIP,
    MOVING,
    U,
    error,
    image,
    mm,
    nibabel,
    points,
    ras,
    save,
    sitk,
    voxels,
    xyz,
)

from fastreg import convert, io

POSITIONS = (points(FIXED) + U) * FLIP


def test_reads_when_told(tmp_path):
    path = save(tmp_path / "f.nii.gz", xyz(POSITIONS), ras(FIXED))
    u, grid, what = convert.read_transform(path, format="mrtrix")
    assert grid.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what == "MRtrix deformation (RAS positions, mm), 22x18x14"
    with pytest.raises(
        io.InputError, match=r"as MRtrix's do\): give --from, one of learn2reg, mrtrix, voxelmorph"
    ):
        convert.read_transform(path)
    with pytest.raises(io.InputError, match="does not say: give --from"):
        convert.read_transform(save(tmp_path / "v.nii.gz", xyz(U), ras(FIXED)))
    with pytest.raises(io.InputError, match=r"may be one of .* itk was asked for"):
        convert.read_transform(path, format="itk")


def test_undefined_voxels_are_outside(tmp_path):
    array = POSITIONS.copy()
    array[:3] = np.nan
    array[8, 9, 10, 1] = np.nan
    path = save(tmp_path / "f.nii.gz", xyz(array), ras(FIXED))
    chain = convert.read_chain(path, format="mrtrix")
    u, _ = chain.displacement()
    bad = torch.isnan(u)
    assert bad[:, :, :3].all()
    assert bad[0, :, 8, 9, 10].all()
    assert int(bad.sum()) == 3 * (3 * 18 * 22 + 1)
    moving = torch.from_numpy(image(points(MOVING)))[None, None]
    moved, inside = io.resample(moving, MOVING, FIXED, u, outside=-7.0)
    assert (moved[0, 0, :3] == -7).all()
    assert not inside[0, 0, 8, 9, 10]
    assert inside[0, 0, 8, 9, 9]
    start = FIXED.to_physical([[8, 9.4, 10], [8, 6, 10]])
    lost, kept = chain.map(start)
    assert np.isnan(lost).all()
    assert np.allclose(kept, start[1] + U[8, 6, 10], atol=1e-4)
    # what cannot be said in other formats is not lost silently, and MRtrix's own keep it
    with pytest.raises(io.InputError, match="not defined in 1189 of 5544 voxels, and niftyreg cannot say so"):
        convert.write_transform(tmp_path / "n.nii.gz", u, FIXED, "niftyreg")
    with pytest.raises(io.InputError, match="must be finite"):
        io.write_displacement(tmp_path / "n.nii.gz", u, FIXED)
    convert.write_transform(tmp_path / "m.nii.gz", u, FIXED, "mrtrix")
    again, _, _ = convert.read_transform(tmp_path / "m.nii.gz", format="mrtrix")
    assert torch.allclose(again, u, atol=1e-4, equal_nan=True)


def test_undefined_voxels_of_a_chain(tmp_path):
    """As the first step, and as one that another leads to."""
    array = POSITIONS.copy()
    array[:3] = np.nan
    path = save(tmp_path / "f.nii.gz", xyz(array), ras(FIXED))
    step = FIXED.matrix @ (2, 0, 0)  # two voxels along z
    sitk.WriteTransform(sitk.TranslationTransform(3, step.tolist()), str(tmp_path / "t.tfm"))
    first = convert.read_chain([path, tmp_path / "t.tfm"], format="mrtrix")
    then = convert.read_chain([tmp_path / "t.tfm", path], format="mrtrix", like=FIXED)
    for chain, planes, expected in ((first, 3, U[8] + step), (then, 1, U[10] + step)):
        u, _ = chain.displacement()
        assert torch.isnan(u[0, :, :planes]).all()
        assert torch.isfinite(u[0, :, planes:]).all()
        assert np.abs(mm(u)[8] - expected).max() < 1e-4
        start = FIXED.to_physical([[planes - 1.0, 5, 6], [8, 7, 9]])
        assert np.isnan(chain.map(start)[0]).all()
        assert np.allclose(chain.map(start)[1] - start[1], expected[7, 9], atol=1e-4)


def test_writes(tmp_path):
    convert.write_transform(tmp_path / "out.nii.gz", voxels(), FIXED, "mrtrix")
    file = nibabel.load(tmp_path / "out.nii.gz")
    assert file.shape == (22, 18, 14, 3)
    assert file.header.get_intent("code")[0] == 0
    assert np.allclose(file.get_fdata(), xyz(POSITIONS), atol=1e-4)


def test_nowhere_defined_and_infinite(tmp_path):
    path = save(tmp_path / "f.nii.gz", xyz(np.full_like(U, np.nan)), ras(FIXED))
    with pytest.raises(io.InputError, match="not defined anywhere"):
        convert.read_transform(path, format="mrtrix")
    array = POSITIONS.copy()
    array[1, 2, 3, 0] = np.inf
    with pytest.raises(io.InputError, match="got infinity"):
        convert.read_transform(save(tmp_path / "f.nii.gz", xyz(array), ras(FIXED)), format="mrtrix")


def test_mif_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "warp.mif").write_bytes(b"mrtrix image\ndim: 3,3,3,3\n")
    with pytest.raises(io.InputError, match=r"mrconvert warp.mif warp.nii.gz"):
        convert.read_transform(tmp_path / "warp.mif")
