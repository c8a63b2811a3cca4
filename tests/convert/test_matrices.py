"""4 x 4 numbers in text, which greedy and reg_aladin mean in RAS, from fixed to moving."""

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, mm, points, ras, save, turned, xyz

from fastreg import convert, io

MATRIX = np.eye(4)
MATRIX[:3, :3], MATRIX[:3, 3] = turned((0.05, -0.08, 0.06)) * 1.03, (4.0, -3.0, 2.0)


def moved(p):
    """LPS points."""
    return ((p * FLIP) @ MATRIX[:3, :3].T + MATRIX[:3, 3]) * FLIP


def test_reads_when_told(tmp_path):
    np.savetxt(tmp_path / "affine.mat", MATRIX)
    u, own, what = convert.read_transform(tmp_path / "affine.mat", format="ras-matrix", like=FIXED)
    assert own == FIXED
    assert np.abs(mm(u) - (moved(points(FIXED)) - points(FIXED))).max() < 1e-4
    assert what == "RAS matrix (fixed to moving, mm)"
    back, _, _ = convert.read_transform(f"{tmp_path / 'affine.mat'},1", format="ras-matrix", like=FIXED)
    assert np.abs(moved(points(FIXED) + mm(back)) - points(FIXED)).max() < 1e-4
    with pytest.raises(io.InputError, match="comes first and has no grid: --like FIXED"):
        convert.read_transform(tmp_path / "affine.mat", format="ras-matrix")
    with pytest.raises(io.InputError, match="give --from ras-matrix"):
        convert.read_transform(tmp_path / "affine.mat", like=FIXED)


def test_after_a_warp_as_greedy_has_it(tmp_path):
    np.savetxt(tmp_path / "affine.mat", MATRIX)
    warp, told = save(tmp_path / "warp.nii.gz", xyz(U)[:, :, :, None], ras(FIXED), code=1007), []
    u, _, _ = convert.read_transform([warp, tmp_path / "affine.mat"], format="ras-matrix", warn=told.append)
    assert told == []
    assert np.abs(mm(u) - (moved(points(FIXED) + U) - points(FIXED))).max() < 1e-4


def test_what_is_no_such_matrix(tmp_path):
    wrong = MATRIX.copy()
    wrong[3, 0] = 1
    np.savetxt(tmp_path / "a.txt", wrong)
    with pytest.raises(io.InputError, match="the last row 0 0 0 1"):
        convert.read_transform(tmp_path / "a.txt", format="ras-matrix", like=FIXED)
    flat = np.diag([1.0, 1.0, 0.0, 1.0])
    np.savetxt(tmp_path / "a.txt", flat)
    with pytest.raises(io.InputError, match="singular"):
        convert.read_transform(f"{tmp_path / 'a.txt'},1", format="ras-matrix", like=FIXED)
