"""Displacement fields that are read straight from NIfTI are what SimpleITK reads."""

import gzip

import numpy as np
import pytest
import torch
from test_io import field, grid

from fastreg import io
from fastreg.io import _displacement

pytest.importorskip("SimpleITK")
GRID = grid(3, flip=(1,))


def header(raw, offset, kind, *values):
    raw = bytearray(raw)
    data = np.array(values, kind).tobytes()
    raw[offset : offset + len(data)] = data
    return bytes(raw)


def swapped(raw):
    """The same NIfTI-1 file in the other byte order."""
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image.from_bytes(raw)
    other = nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header.as_byteswapped())
    return other.to_bytes()


@pytest.mark.parametrize("kind", ["nii.gz", "nii", "swapped", "scaled", "slope 0", "sform"])
def test_nifti_is_read_once_into_its_place(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(_displacement, "SLAB", 500)
    path = tmp_path / ("u.nii.gz" if kind == "nii.gz" else "u.nii")
    u = field(GRID)
    io.write_displacement(path, u, GRID)
    raw = path.read_bytes()
    change = {
        "swapped": swapped,
        "scaled": lambda raw: header(raw, 112, "<f4", 2, 0),
        "slope 0": lambda raw: header(raw, 112, "<f4", 0, 0),
        "sform": lambda raw: header(raw, 252, "<i2", 0, 1),
    }.get(kind)
    if change:
        path.write_bytes(change(raw))
    assert _displacement._planar(path, io.Reading(), print) is not None
    read, geometry = io.read_displacement(path)
    assert geometry.matches(GRID)
    assert torch.allclose(read, u * (2 if kind == "scaled" else 1), atol=1e-5)
    monkeypatch.setattr(_displacement, "_planar", lambda *_: None)
    if kind == "scaled":  # it scales a third of the voxels
        with pytest.raises(io.InputError, match=r"its vectors are scaled .*, which SimpleITK reads wrongly"):
            io.read_displacement(path)
        return
    slow, other = io.read_displacement(path)
    assert other.matches(geometry)
    assert torch.allclose(read, slow, atol=1e-5)


@pytest.mark.parametrize("kind", ["named", "doubles", "2D", "mha"])
def test_what_else_there_is_simpleitk_reads(tmp_path, kind):
    geometry = grid(2) if kind == "2D" else GRID
    path = tmp_path / ("u.mha" if kind == "mha" else "u.nii")
    u = field(geometry)
    io.write_displacement(path, u, geometry)
    raw = path.read_bytes()
    if kind == "named":
        path.write_bytes(header(raw, 328, "S16", b"a name"))
    elif kind == "doubles":
        start = int(np.frombuffer(raw, "<f4", 1, 108)[0])
        values = np.frombuffer(raw, "<f4", -1, start).astype("<f8").tobytes()
        path.write_bytes(header(raw, 70, "<i2", 64, 64)[:start] + values)
    assert _displacement._planar(path, io.Reading(), print) is None
    read, own = io.read_displacement(path)
    assert own.matches(geometry)
    assert torch.allclose(read, u, atol=1e-5)


@pytest.mark.parametrize("suffix", ["img", "hdr"])
def test_a_header_of_its_own_says_whose_a_field_is(tmp_path, suffix):
    nibabel = pytest.importorskip("nibabel")
    vectors = np.ones((6, 5, 4, 1, 3), np.float32)
    image = nibabel.Nifti1Pair(vectors, np.eye(4))
    image.header["intent_code"] = 1007
    image.header["intent_name"] = b"NREG_TRANS"
    path = tmp_path / f"u.{suffix}"
    nibabel.save(image, path)
    with pytest.raises(io.InputError, match="is NiftyReg's"):
        io.read_displacement(path)


def test_damage_is_named(tmp_path):
    path = tmp_path / "u.nii.gz"
    io.write_displacement(path, field(GRID), GRID)
    raw = gzip.decompress(path.read_bytes())
    packed = bytearray(gzip.compress(raw))
    for bad, text in (
        (bytes(packed[:-8]) + b"\0\0\0\0" + bytes(packed[-4:]), "damaged"),
        (bytes(packed[: len(packed) // 2]), "damaged"),
        (gzip.compress(raw[:-40]), "damaged"),
        (gzip.compress(header(raw, len(raw) - 400, "<f4", np.nan)), "must be finite"),
    ):
        path.write_bytes(bad)
        with pytest.raises(io.InputError, match=text) as error:
            io.read_displacement(path)
        assert "\n" not in str(error.value)
