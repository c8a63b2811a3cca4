"""DICOM Deformable Spatial Registration, by PS3.3 C.20.3: M_post (M_pre x + D(x))."""

import numpy as np
import pytest
import torch
from convert.scene import FIXED, U, error, mm, points, turned

from fastreg import convert, io

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

PRE, POST = np.eye(4), np.eye(4)
PRE[:3, :3], PRE[:3, 3] = turned((0.4, 0.02, -0.04)), (3.0, -2.0, 1.0)
POST[:3, :3], POST[:3, 3] = turned((-0.03, 0.3, 0.2)), (-1.0, 2.0, -3.0)


def matrix(values):
    item = Dataset()
    item.FrameOfReferenceTransformationMatrixType = "RIGID"
    item.FrameOfReferenceTransformationMatrix = [f"{v:.10g}" for v in values.ravel()]
    return Sequence([item])


def written(path, vectors, pre=None, post=None, sop="1.2.840.10008.5.1.4.1.1.66.3", n=1):
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = sop, "1.2.3.4", "REG"
    grid = Dataset()
    direction = np.array(FIXED.direction).reshape(3, 3)
    grid.ImageOrientationPatient = [f"{v:.12g}" for v in (*direction[:, 0], *direction[:, 1])]
    grid.ImagePositionPatient = [f"{v:.10g}" for v in FIXED.origin]
    grid.GridDimensions, grid.GridResolution = list(FIXED.size), list(FIXED.spacing)
    grid.VectorGridData = vectors.astype("<f4").tobytes()
    item, itself = Dataset(), Dataset()
    itself.SourceFrameOfReferenceUID = "1.2.3"
    item.DeformableRegistrationGridSequence = Sequence([grid])
    if pre is not None:
        item.PreDeformationMatrixRegistrationSequence = matrix(pre)
    if post is not None:
        item.PostDeformationMatrixRegistrationSequence = matrix(post)
    data.DeformableRegistrationSequence = Sequence([itself, *[item] * n])
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = sop, "1.2.3.4"
    data.save_as(path, enforce_file_format=True)
    return path


def test_reads(tmp_path):
    path = written(tmp_path / "r.dcm", U)
    u, own, what = convert.read_transform(path)
    assert own.matches(FIXED)
    assert np.abs(mm(u) - U).max() < 1e-4
    assert error(u) < 0.2
    assert what == "DICOM Deformable Spatial Registration (LPS displacements, mm), 22x18x14"


def test_the_matrices_before_and_after(tmp_path):
    """D such that the whole leads where U does: wrong with either matrix left out, or their order exchanged."""
    start = points(FIXED)
    middle = (start + U - POST[:3, 3]) @ np.linalg.inv(POST[:3, :3]).T
    vectors = middle - (start @ PRE[:3, :3].T + PRE[:3, 3])
    u, _, _ = convert.read_transform(written(tmp_path / "r.dcm", vectors, PRE, POST))
    assert error(u) < 0.2
    assert np.abs(mm(u) - U).max() < 1e-4
    for pre, post in ((PRE, None), (None, POST), (POST, PRE)):
        u, _, _ = convert.read_transform(written(tmp_path / "r.dcm", vectors, pre, post))
        assert np.abs(mm(u) - U).max() > 1


def test_undefined_and_damaged(tmp_path):
    vectors = U.copy()
    vectors[2:4] = np.nan
    u, _, _ = convert.read_transform(written(tmp_path / "r.dcm", vectors))
    assert torch.isnan(u[:, :, 2:4]).all()
    assert torch.isfinite(u[:, :, 4:]).all()
    with pytest.raises(io.InputError, match="incomplete or damaged"):
        convert.read_transform(written(tmp_path / "r.dcm", U[:-1]))
    with pytest.raises(io.InputError, match="got 2 grids"):
        convert.read_transform(written(tmp_path / "r.dcm", U, n=2))


def test_other_dicom(tmp_path):
    path = written(tmp_path / "r.dcm", U, sop="1.2.840.10008.5.1.4.1.1.66.1")
    with pytest.raises(io.InputError, match="DICOM Spatial Registration is not read"):
        convert.read_transform(path)
    path = written(tmp_path / "r.dcm", U, sop="1.2.840.10008.5.1.4.1.1.2")
    with pytest.raises(io.InputError, match="is a DICOM file, but no Deformable"):
        convert.read_transform(path)
