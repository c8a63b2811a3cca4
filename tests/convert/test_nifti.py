"""What NIfTI files of all tools may have: two places, none, sheared axes, a name that does not fit."""

import shutil

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, error, nibabel, ras, xyz

from fastreg import convert, io


def written(path, qform, sform):
    """FreeSurfer's warp; None: that code is 0."""
    image = nibabel.Nifti1Image(xyz(U * FLIP)[:, :, :, None].astype(np.float32), None)
    image.header["intent_code"] = 1006
    image.header.set_qform(qform, 0 if qform is None else 1)
    image.header.set_sform(sform, 0 if sform is None else 1)
    nibabel.save(image, path)
    return path


def test_two_places(tmp_path):
    away = ras(FIXED)
    away[0, 3] += 5
    path, told = written(tmp_path / "w.nii.gz", ras(FIXED), away), []
    assert convert.read_transform(path, warn=told.append)[1].matches(FIXED)
    assert len(told) == 1
    assert "--affine-source sform" in told[0]
    other = convert.read_transform(path, reading=io.Reading(affine_source="sform"))[1]
    assert np.allclose(np.array(other.origin) - FIXED.origin, (-5, 0, 0), atol=1e-4)


def test_no_place_and_sheared(tmp_path):
    with pytest.raises(io.InputError, match="does not say where it lies"):
        convert.read_transform(written(tmp_path / "w.nii.gz", None, None))
    sheared = ras(FIXED)
    sheared[0, 1] += 0.5
    with pytest.raises(io.InputError, match="must be perpendicular, and are sheared"):
        convert.read_transform(written(tmp_path / "w.nii.gz", None, sheared))


def test_packed_under_another_name(tmp_path):
    path = written(tmp_path / "w.nii.gz", ras(FIXED), ras(FIXED))
    shutil.move(path, tmp_path / "w.nii")
    assert error(convert.read_transform(tmp_path / "w.nii")[0]) < 0.2


def test_damaged(tmp_path):
    path = written(tmp_path / "w.nii.gz", ras(FIXED), ras(FIXED))
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 8):
        path.write_bytes(content[:size])
        with pytest.raises(io.InputError, match=str(path)):
            convert.read_transform(path)
    broken = bytearray(content)
    broken[len(content) // 2] ^= 4
    path.write_bytes(broken)
    with pytest.raises(io.InputError, match=str(path)):
        convert.read_transform(path)
