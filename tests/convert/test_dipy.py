"""DIPY: (X, Y, Z, 3, 2), forward and backward; the header's affine leads from mm to voxels."""

import numpy as np
import pytest
from convert.scene import FIXED, FLIP, U, error, mm, nibabel, ras, voxels, xyz

from fastreg import convert, io


def written(path, backward, **options):
    """As dipy.align.imwarp writes it: nibabel's own choice of qform and sform."""
    array = np.stack([xyz(-2 * backward), xyz(backward)], -1).astype(options.get("dtype", np.float32))
    nibabel.save(nibabel.Nifti1Image(array, np.linalg.inv(ras(FIXED))), path)
    return path


def test_reads_the_backward_field(tmp_path):
    path = written(tmp_path / "map.nii.gz", U * FLIP)
    told = []
    u, own, what = convert.read_transform(path, warn=told.append)
    assert own.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what == "DIPY mapping (backward, RAS displacements, mm), 22x18x14"
    assert len(told) == 1
    assert "prealign" in told[0]
    with pytest.raises(io.InputError, match="says that it is dipy"):
        convert.read_transform(path, format="mrtrix")


def test_is_not_written_and_must_be_of_numbers(tmp_path):
    with pytest.raises(io.InputError, match="DIPY write_mapping is not written"):
        convert.write_transform(tmp_path / "map.nii.gz", voxels(), FIXED, "dipy")
    with pytest.raises(io.InputError, match="floating-point numbers"):
        convert.read_transform(written(tmp_path / "map.nii.gz", U, dtype=np.int16))
