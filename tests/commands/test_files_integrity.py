"""Files that are not what was written: flipped bits, headers that claim too much, what is no file at all."""

import gzip
import os
import resource
import socket

import numpy as np
import pytest

from fastreg import _memory, io
from fastreg.data.pairs import find_pairs
from fastreg.training import checkpoint

sitk = pytest.importorskip("SimpleITK")

GRID = io.Geometry.of((9, 10, 11), (1.0, 2.0, 3.0))
VALUES = (np.random.default_rng(0).normal(size=GRID.shape) * 100).astype(np.int16)


def written(folder, name):
    path = folder / name
    io.write_image(path, VALUES, GRID)
    return path


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.nii.gz", "a.img.gz", "a.gipl.gz"])
def test_a_flipped_bit_in_packed_data_is_refused(tmp_path, name):
    path = written(tmp_path, name)
    data = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    whole = data.read_bytes()
    for k in np.random.default_rng(1).integers(len(whole) // 2, len(whole), 8):
        content = bytearray(whole)
        content[k] ^= 1 << int(k) % 8
        data.write_bytes(content)
        with pytest.raises(io.InputError, match=r"damaged|cut short"):
            io.read_image(path)
    data.write_bytes(whole)
    np.testing.assert_array_equal(io.read_image(path)[0], VALUES)


@pytest.mark.parametrize(
    "name", ["a.nii", "a.hdr", "a.gipl", "a.vtk", "a.mrc", "a.gipl.gz", "a.mhd", "a.nhdr"]
)
def test_a_byte_too_few_is_refused(tmp_path, name):
    path = written(tmp_path, name)
    data = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(io.InputError, match=r"damaged|cut short"):
        io.read_image(path)


@pytest.mark.parametrize("array", [np.zeros((4, 5, 6, 3), np.uint8), np.zeros((4, 5, 6), np.complex64)])
@pytest.mark.parametrize("suffix", ["nii", "nrrd", "mha"])
def test_colours_and_complex_numbers_are_not_called_damaged(tmp_path, array, suffix):
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    sitk.WriteImage(image, str(tmp_path / f"a.{suffix}"))
    with pytest.raises(io.InputError, match=r"one value a voxel|real values"):
        io.read_image(tmp_path / f"a.{suffix}")


def claims(kind, side):
    if kind == "nrrd":
        return f"NRRD0004\ntype: short\ndimension: 3\nsizes: {side} {side} {side}\nendian: little\nencoding: raw\n\n".encode()
    packed = kind == "packed.mha"
    return f"ObjectType = Image\nNDims = 3\nDimSize = {side} {side} {side}\nElementType = MET_SHORT\nCompressedData = {packed}\nElementDataFile = LOCAL\n".encode()


@pytest.mark.parametrize("kind", ["nrrd", "mha", "packed.mha", "nii.gz"])
def test_a_claim_is_refused_before_memory_is_taken(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "nii.gz":
        written(tmp_path, "b.nii")
        content = bytearray((tmp_path / "b.nii").read_bytes()[:452])
        content[42:48] = np.full(3, 1000, "<i2").tobytes()
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(claims(kind, 1000) + bytes(100))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(io.InputError, match="its header claims 2000000000 bytes of voxels"):
        io.read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("kind", ["nrrd", "mha"])
def test_an_image_that_memory_does_not_hold_is_not_called_damaged(tmp_path, monkeypatch, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(claims(kind, 1000))
    os.truncate(path, (2 << 30) + 1000)  # without blocks
    monkeypatch.setattr(_memory, "available", lambda: 10**9)
    with pytest.raises(io.InputError, match=r"an image of 2.00 GB needs 4.00 GB of memory, 1.00 GB are free"):
        io.read_image(path)


def test_limits_of_memory_are_known():
    free = _memory.available()
    assert free is None or free > 1 << 20
    limit = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 41, limit[1]))
        (least,) = _memory._process()
        assert 0 < least < 1 << 41
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def make(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


READERS = {
    "a.nii.gz": io.read_image,
    "u.mha": io.read_displacement,
    "p.csv": lambda p: io.read_landmarks(p, 3),
    "pairs.csv": find_pairs,
    "c.pt": checkpoint.load,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    make(kind, tmp_path / name)
    # A folder may hold slices, or images.
    what = "" if kind == "folder" else f"is a {kind}, and must be a file"
    with pytest.raises(io.InputError, match=what):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr", "a.hdr"])
def test_a_header_may_not_name_a_pipe(tmp_path, name):
    path = written(tmp_path, name)
    data = max(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(io.InputError, match="is a pipe, and must be a file"):
        io.read_image(path)


@pytest.mark.parametrize("n", [0, 60])
def test_a_metaimage_cut_within_its_header_is_named(tmp_path, n):
    path = tmp_path / "a.mha"
    io.write_image(path, np.zeros((3, 4, 5), np.float32), io.Geometry.of((3, 4, 5), (1.0, 1.0, 1.0)))
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(io.InputError, match=r"a.mha: is (empty|a MetaImage that SimpleITK cannot read)"):
        io.read_image(path)
