"""Learn2Reg and VoxelMorph: voxels along the array's axes, (X, Y, Z, 3)."""

import numpy as np
import pytest
from convert.scene import FIXED, MOVING, U, error, image, images, mm, nibabel, points, ras, save, voxels, xyz
from scipy.ndimage import map_coordinates

from fastreg import convert, io

# In voxels, (X, Y, Z, 3), components along X, Y, Z.
ARRAY = xyz((U @ np.linalg.inv(FIXED.matrix).T)[..., ::-1])


def written(path, tool, array=ARRAY, affine=None, dtype=np.float32):
    """As the tools write them: npz of one array, or a plain NIfTI whose affine need not be right."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **{{"learn2reg": "arr_0", "voxelmorph": "vol"}[tool]: array.astype(dtype)})
        return path
    return save(path, array, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine, dtype=dtype)


def test_the_meaning_is_that_of_learn2regs_evaluation():
    """moving at identity + u by map_coordinates, on one grid of both."""
    moving = xyz(image(points(FIXED)))
    there = np.stack(np.meshgrid(*map(np.arange, moving.shape), indexing="ij")) + np.moveaxis(ARRAY, -1, 0)
    moved = map_coordinates(moving, there, order=1, mode="nearest")
    truth = xyz(image(points(FIXED) + U))
    inner = (slice(3, -3),) * 3
    assert np.median(np.abs(moved - truth)[inner]) < 0.2
    back = there - 2 * np.moveaxis(ARRAY, -1, 0)
    assert np.median(np.abs(map_coordinates(moving, back, order=1) - truth)[inner]) > 2


@pytest.mark.parametrize("tool", ["learn2reg", "voxelmorph"])
@pytest.mark.parametrize("suffix", ["nii.gz", "npz"])
def test_reads_when_told(tmp_path, tool, suffix):
    fixed, _ = images(tmp_path)
    path = written(tmp_path / f"disp.{suffix}", tool)
    u, own, what = convert.read_transform(path, format=tool, like=fixed)
    assert own.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what.endswith("displacement (voxels), 22x18x14")
    with pytest.raises(io.InputError, match="the file does not say: give --from, one of learn2reg"):
        convert.read_transform(path, like=fixed)
    with pytest.raises(io.InputError, match="itk was asked for"):
        convert.read_transform(path, format="itk", like=fixed)


@pytest.mark.parametrize("suffix", ["nii.gz", "npz"])
def test_needs_the_fixed_grid(tmp_path, suffix):
    path = written(tmp_path / f"disp.{suffix}", "learn2reg")
    with pytest.raises(io.InputError, match="give --like FIXED"):
        convert.read_transform(path, format="learn2reg")
    with pytest.raises(io.InputError, match="has the fixed image's grid, got 22x18x14 for one of 24x20x17"):
        convert.read_transform(path, format="learn2reg", like=MOVING)
    with pytest.raises(io.InputError, match="share, and they differ"):
        convert.read_transform(path, format="learn2reg", like=FIXED, moving=MOVING)
    assert convert.read_transform(path, format="learn2reg", like=FIXED, moving=FIXED)


def test_voxelmorphs_affine(tmp_path):
    """A given one is the grid's; the one it writes where it has none is not."""
    path = written(tmp_path / "own.nii.gz", "voxelmorph", affine=ras(FIXED))
    u, own, _ = convert.read_transform(path, format="voxelmorph")
    assert own.matches(FIXED)
    assert error(u) < 0.2
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(ARRAY.shape[:3]) / 2)
    path = written(tmp_path / "none.nii.gz", "voxelmorph", affine=affine)
    with pytest.raises(io.InputError, match="give --like FIXED"):
        convert.read_transform(path, format="voxelmorph")
    assert error(convert.read_transform(path, format="voxelmorph", like=FIXED)[0]) < 0.2


def test_half_precision_and_what_is_no_field(tmp_path):
    path = written(tmp_path / "half.npz", "learn2reg", dtype=np.float16)
    assert error(convert.read_transform(path, format="learn2reg", like=FIXED)[0]) < 0.3
    for name, arrays, message in (
        ("two", {"a": ARRAY, "b": ARRAY}, "must hold one array, got 2"),
        ("whole", {"a": ARRAY.astype(np.int32)}, "floating-point numbers, got int32"),
        ("first", {"a": np.moveaxis(ARRAY, -1, 0)}, r"must have shape \(X, Y, Z, 3\)"),
        ("nan", {"a": np.where(ARRAY > 1, np.nan, ARRAY)}, "must be finite"),
        ("object", {"a": np.array([{}], dtype=object)}, "not a .npz file of arrays"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(io.InputError, match=message):
            convert.read_transform(tmp_path / f"{name}.npz", format="learn2reg", like=FIXED)
    (tmp_path / "bad.npz").write_bytes(path.read_bytes()[:500])
    with pytest.raises(io.InputError, match="damaged"):
        convert.read_transform(tmp_path / "bad.npz", format="learn2reg", like=FIXED)
    path = written(tmp_path / "whole.nii.gz", "learn2reg", dtype=np.int16)
    with pytest.raises(io.InputError, match="floating-point numbers, got int16"):
        convert.read_transform(path, format="learn2reg", like=FIXED)


@pytest.mark.parametrize(("tool", "key"), [("learn2reg", "arr_0"), ("voxelmorph", "vol")])
def test_writes(tmp_path, tool, key):
    convert.write_transform(tmp_path / "out.npz", voxels(), FIXED, tool)
    with np.load(tmp_path / "out.npz") as file:
        assert file.files == [key]
        assert file[key].dtype == np.float32
        assert np.allclose(file[key], ARRAY, atol=1e-5)
    convert.write_transform(tmp_path / "out.nii.gz", voxels(), FIXED, tool)
    file = nibabel.load(tmp_path / "out.nii.gz")
    assert file.header.get_intent("code")[0] == 0
    assert np.allclose(file.get_fdata(), ARRAY, atol=1e-5)
    assert np.allclose(file.affine, ras(FIXED), atol=1e-4)
    for suffix in ("npz", "nii.gz"):
        assert error(convert.read_transform(tmp_path / f"out.{suffix}", format=tool, like=FIXED)[0]) < 0.2
    with pytest.raises(io.InputError, match="share, and they differ"):
        convert.write_transform(tmp_path / "out.npz", voxels(), FIXED, tool, moving=MOVING)
