import csv
import os
import signal
import time

import numpy as np
import pytest
import torch

from fastreg import _exchange, io
from fastreg._files import output_folder, replacing

sitk = pytest.importorskip("SimpleITK")

SIZES = {2: (17, 12), 3: (14, 17, 11)}  # (x, y[, z])


def rotation(nd, angles=(0.4, -0.3, 0.25)):
    matrix = np.eye(nd)
    planes = [(0, 1)] if nd == 2 else [(0, 1), (0, 2), (1, 2)]
    for (i, j), angle in zip(planes, angles, strict=False):
        turn = np.eye(nd)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    return matrix


def grid(nd, *, size=None, oblique=True, flip=(), spacing=(0.8, 1.3, 2.5), origin=(30.0, -12.0, 7.0)):
    direction = rotation(nd) if oblique else np.eye(nd)
    for axis in flip:
        direction[:, axis] *= -1
    size = size or SIZES[nd]
    return io.Geometry(tuple(size[:nd]), spacing[:nd], origin[:nd], tuple(direction.ravel()))


def noise(geometry, seed=0):
    return np.random.default_rng(seed).normal(size=geometry.shape).astype(np.float32)


def as_sitk(array, geometry, **keywords):
    image = sitk.GetImageFromArray(array, **keywords)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


# A fixed and a moving grid that overlap but share nothing: size, spacing, origin, direction, handedness.
PAIRS = [
    pytest.param(2, {}, {"flip": (0,), "spacing": (1.1, 0.7), "size": (11, 21)}, id="2d-flipped"),
    pytest.param(3, {"oblique": False}, {"oblique": False, "spacing": (1.7, 0.9, 1.1)}, id="3d-axes"),
    pytest.param(3, {}, {"oblique": False, "size": (19, 15, 16)}, id="3d-oblique-fixed"),
    pytest.param(3, {"flip": (1,)}, {"spacing": (0.9, 1.2, 3.1), "size": (16, 15, 9)}, id="3d-both-oblique"),
    pytest.param(3, {"flip": (0, 2)}, {"flip": (1, 2), "size": (25, 20, 7)}, id="3d-both-flipped"),
    pytest.param(3, {"spacing": (0.5, 0.5, 5.0)}, {"spacing": (0.6, 0.4, 4.0)}, id="3d-thick-slices"),
]


def pair(nd, fixed, moving):
    """Both grids, the moving one brought so that its centre lies near the fixed one's."""
    fixed, moving = grid(nd, **fixed), grid(nd, **moving)
    middles = [g.to_physical((np.array(g.shape) - 1) / 2) for g in (fixed, moving)]
    origin = np.array(moving.origin) + middles[0] - middles[1] + 0.37
    return fixed, io.Geometry(moving.size, moving.spacing, tuple(origin), moving.direction)


@pytest.mark.parametrize("nd", [2, 3])
def test_geometry_is_itks(nd):
    geometry = grid(nd, flip=(0,))
    image = as_sitk(noise(geometry), geometry)
    index = np.random.default_rng(1).uniform(-3, 20, (20, nd))
    expected = [image.TransformContinuousIndexToPhysicalPoint(p[::-1].tolist()) for p in index]
    np.testing.assert_allclose(geometry.to_physical(index), expected, atol=1e-9)
    np.testing.assert_allclose(geometry.to_index(expected), index, atol=1e-9)
    assert geometry.shape == SIZES[nd][::-1]
    assert geometry.spacing_zyx == geometry.spacing[::-1]


def test_geometry_contains_and_matches():
    geometry = grid(3)
    inside = [[-0.5, 0, 0], [10.5, 16, 13], [-0.51, 0, 0], [5, 16.6, 3]]
    assert geometry.contains(np.array(inside)).tolist() == [True, True, False, False]
    nearly = io.Geometry(geometry.size, geometry.spacing, (30.0004, -12.0, 7.0), geometry.direction)
    moved = io.Geometry(geometry.size, geometry.spacing, (30.1, -12.0, 7.0), geometry.direction)
    assert geometry.matches(nearly)
    assert not geometry.matches(moved)
    assert not geometry.matches(grid(3, size=(14, 17, 12)))
    assert not geometry.matches(grid(3, flip=(1,)))


@pytest.mark.parametrize("suffix", ["nii.gz", "nii", "mha", "nrrd"])
@pytest.mark.parametrize("nd", [2, 3])
def test_images_survive_files(tmp_path, nd, suffix):
    geometry = grid(nd, flip=(0,))
    array = noise(geometry)
    path = tmp_path / f"image.{suffix}"
    io.write_image(path, array, geometry)
    again, own = io.read_image(path)
    np.testing.assert_array_equal(again, array)
    assert own.matches(geometry)
    assert os.listdir(tmp_path) == [path.name]


def test_read_keeps_integer_types(tmp_path):
    geometry = grid(3)
    for dtype in (np.uint8, np.int16, np.uint16, np.int32):
        array = np.arange(np.prod(geometry.shape)).reshape(geometry.shape).astype(dtype)
        io.write_image(tmp_path / "i.nrrd", array, geometry)
        assert io.read_image(tmp_path / "i.nrrd")[0].dtype == dtype


def test_write_widens_what_files_cannot_hold(tmp_path):
    geometry = grid(2)
    for array, wide in ((noise(geometry) > 0, np.uint8), (noise(geometry).astype(np.float16), np.float32)):
        io.write_image(tmp_path / "i.nii.gz", array, geometry)
        again, _ = io.read_image(tmp_path / "i.nii.gz")
        assert again.dtype == wide
        np.testing.assert_array_equal(again, array)


def test_read_dicom_folder(tmp_path):
    geometry = grid(3, oblique=False, spacing=(0.8, 1.25, 2.5))
    array = np.random.default_rng(0).integers(0, 2000, geometry.shape).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for i, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing(geometry.spacing[:2])
        position = geometry.to_physical([i, 0, 0])
        for key, value in {
            "0008|0060": "CT",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{i + 1}",
            "0020|0013": str(i),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": "2.5",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(tmp_path / f"{i:03}.dcm"))
        writer.Execute(image)
    again, own = io.read_image(tmp_path)
    np.testing.assert_array_equal(again, array)
    assert own.matches(geometry)
    (tmp_path / "none").mkdir()
    with pytest.raises(io.InputError, match="holds no DICOM image"):
        io.read_image(tmp_path / "none")


def _bad_image(kind, folder):
    geometry = grid(3)
    array = noise(geometry)
    path = folder / "bad.nii.gz"
    if kind == "garbage":
        path.write_bytes(b"this is no image" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("truncated.nii.gz", "truncated.nii", "truncated.mha", "truncated.nrrd"):
        path = folder / kind
        io.write_image(path, array, geometry)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    elif kind == "damaged":
        io.write_image(path, array, geometry)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
        path.write_bytes(data)
    elif kind == "4d":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 6), np.float32), isVector=False), str(path))
    elif kind == "vector":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.float32), isVector=True), str(path))
    elif kind == "slice":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 5, 6), np.float32)), str(path))
    elif kind == "complex":
        path = folder / "bad.nrrd"
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.complex64)), str(path))
    elif kind == "text.nia":
        path = folder / kind
        path.write_text("")
    elif kind.startswith("nan"):
        path = folder / kind
        array[3, 4, 5], array[0, 0, 0] = np.nan, np.inf
        array = array.astype(np.float64 if "64" in kind else np.float32)
        sitk.WriteImage(as_sitk(array, geometry), str(path))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 7.0), (np.nan, 7.0), (0.0, 0.5), (0.0, -1e9)])
def test_an_intercept_without_a_slope_counts_for_nothing(tmp_path, slope, intercept, dtype):
    values = np.arange(60, dtype=dtype).reshape(3, 4, 5)
    # what fp32 and an intercept together cannot hold
    values.flat[-2:] = {np.int32: 123456789, np.int64: 2**40 + 1, np.float32: 1e-4, np.float64: 1e-4}.get(
        dtype, 101
    )
    path = tmp_path / "i.nii"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    read, _ = io.read_image(path)
    np.testing.assert_array_equal(read, values)
    assert read.dtype == dtype


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing", "no such file"),
        ("garbage", "not an image SimpleITK can read, or damaged"),
        ("empty", "is empty: it was not copied or written whole"),
        ("truncated.nii.gz", "damaged"),
        ("truncated.nii", "damaged"),
        ("truncated.mha", "damaged"),
        ("truncated.nrrd", "damaged"),
        ("damaged", "damaged"),
        ("4d", "must be a 2D or 3D image, got 4 dimensions"),
        ("vector", "must have one value a voxel, got 3: a displacement field. fastreg apply --field"),
        ("complex", "real values"),
        ("nan.nii.gz", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
        ("nan64.nii", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
        ("nan.hdr", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
        ("nan64.img", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
        ("nan.img.gz", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
        ("text.nia", "text NIfTI is not supported"),
        ("nan.mha", "must be finite, got NaN or infinity in 2 of 2618 voxels"),
    ],
)
def test_bad_images(tmp_path, capfd, kind, match):
    path = _bad_image(kind, tmp_path)
    with pytest.raises(io.InputError, match=match) as error:
        io.read_image(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_landmarks_survive_files(tmp_path):
    points = np.random.default_rng(0).normal(scale=100, size=(7, 3))
    io.write_landmarks(tmp_path / "p.csv", points)
    np.testing.assert_allclose(io.read_landmarks(tmp_path / "p.csv", 3), points, rtol=1e-8)
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([["name", " X", "Z", "y "], ["a", 1, 3, 2], [], ["b", "-4e1", "6.5", 5]])
    assert io.read_landmarks(tmp_path / "q.csv", 3).tolist() == [[1, 2, 3], [-40, 5, 6.5]]
    (tmp_path / "r.csv").write_text("x,y\n1,2\n")
    assert io.read_landmarks(tmp_path / "r.csv", 2).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no such file"),
        ("", "the header must be x,y,z .*, got ''"),
        ("1,2,3\n4,5,6\n", "the header must be x,y,z .*, got '1,2,3'; .*--landmarks-space"),
        ("x,y\n1,2\n", "the header must be x,y,z .*; column z is missing, got 'x,y'"),
        ("x,y,z,x\n1,2,3,4\n", "the header must be x,y,z"),
        ("x,y,z\n", "holds no landmarks"),
        ("x,y,z\n1,2,3\n1,2\n", "line 3 must hold 3 numbers, got '1,2'"),
        ("x,y,z\n\n1,two,3\n", "line 3 must hold 3 numbers, got '1,two,3'"),
        ("x,y,z\n1,nan,3\n", "line 2 must hold 3 numbers"),
        (b"x,y,z\n\x80\xff", "not a text file in UTF-8"),
        (b"x,y,z\n\x00\x01", "not a file that landmarks are read from"),
    ],
)
def test_bad_landmarks(tmp_path, text, match):
    path = tmp_path / "p.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(io.InputError, match=match) as error:
        io.read_landmarks(path, 3)
    assert str(error.value).startswith(str(path))


def test_2d_landmarks_refuse_z(tmp_path):
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(io.InputError, match="the header must be x,y"):
        io.read_landmarks(tmp_path / "p.csv", 2)


def field(geometry, seed=3, size=2.5):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(1, geometry.nd, *geometry.shape, generator=generator)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("moved", [False, True], ids=["identity", "displaced"])
@pytest.mark.parametrize(("nd", "fixed", "moving"), PAIRS)
def test_resample_agrees_with_itk(tmp_path, monkeypatch, nd, fixed, moving, moved, mode):
    monkeypatch.setattr(io._resample, "SLAB", 500)  # several slabs
    fixed, moving = pair(nd, fixed, moving)
    image = noise(moving)
    u = field(fixed) if moved else None
    transform = sitk.Transform(nd, sitk.sitkIdentity)
    if moved:
        io.write_displacement(tmp_path / "u.nii.gz", u, fixed)
        vectors = sitk.ReadImage(str(tmp_path / "u.nii.gz"), sitk.sitkVectorFloat64)
        transform = sitk.DisplacementFieldTransform(vectors)
    interpolator = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}[mode]
    reference = as_sitk(noise(fixed), fixed)
    arguments = (reference, transform, interpolator, -7.0)
    expected = sitk.GetArrayFromImage(sitk.Resample(as_sitk(image, moving), *arguments))

    result, inside = io.resample(
        torch.from_numpy(image)[None, None], moving, fixed, u, mode=mode, outside=-7.0
    )
    result, inside = result[0, 0].numpy(), inside[0, 0].numpy()
    assert 0.05 < inside.mean() < 1
    # Both count half a voxel around the outermost centres as image, so there is no zone to leave out; only a
    # point on that very edge, or for "nearest" between two voxels, may fall to either side (fp32 vectors).
    p = np.stack(np.meshgrid(*[np.arange(n) for n in fixed.shape], indexing="ij"), -1).astype(float)
    index = moving.to_index(fixed.to_physical(p if u is None else p + np.moveaxis(u[0].numpy(), 0, -1)))
    edge = np.abs(np.minimum(index + 0.5, np.array(moving.shape) - 0.5 - index)).min(-1) < 1e-5
    if mode == "nearest":
        edge |= (np.abs(index - np.floor(index) - 0.5) < 1e-5).any(-1)
    assert edge.mean() < 1e-2
    np.testing.assert_array_equal((expected != -7.0)[~edge], inside[~edge])
    tolerance = 1e-3 * np.ptp(image) if mode == "linear" else 0
    np.testing.assert_allclose(result[~edge], expected[~edge], atol=tolerance, rtol=0)
    assert np.all(result[~inside] == -7.0)


def test_resample_on_its_own_grid_is_the_identity():
    geometry = grid(3, flip=(0,))
    image = torch.from_numpy(noise(geometry))[None, None]
    result, inside = io.resample(image, geometry, geometry)
    assert torch.equal(result, image)
    assert inside.all()
    labels = torch.randint(0, 2**40, image.shape).double()
    assert torch.equal(io.resample(labels, geometry, geometry, mode="nearest")[0], labels)


def test_resample_without_outside_continues_the_border():
    fixed, moving = pair(3, {"oblique": False}, {"oblique": False, "size": (6, 6, 6)})
    image = torch.from_numpy(noise(moving))[None, None]
    filled, inside = io.resample(image, moving, fixed, outside=0.0)
    continued, _ = io.resample(image, moving, fixed, outside=None)
    assert torch.equal(continued[inside], filled[inside])
    assert (continued[~inside] != 0).all()
    assert continued.min() >= image.min()
    assert continued.max() <= image.max()


@pytest.mark.parametrize("nd", [2, 3])
def test_displacement_file_is_in_physical_millimetres(tmp_path, nd):
    geometry = grid(nd, flip=(0,))
    u = field(geometry)
    io.write_displacement(tmp_path / "u.nii.gz", u, geometry)
    transform = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(tmp_path / "u.nii.gz"), sitk.sitkVectorFloat64)
    )
    for p in ([1, 2, 3][:nd], [4, 6, 5][:nd], [0, 0, 0][:nd]):
        start = geometry.to_physical(p)
        moved = geometry.to_physical(np.array(p) + u[(0, slice(None), *p)].numpy())
        np.testing.assert_allclose(transform.TransformPoint(start.tolist()), moved, atol=1e-4)


def test_paths_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin\udce9.nii"
    for function in (io.read_image, lambda p: io.write_image(p, noise(grid(3)), grid(3)), fill):
        with pytest.raises(io.InputError, match=r"latin\\udce9.nii: the path must be UTF-8"):
            function(path)
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "image.nii.gz"
    path.write_text("precious")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text(encoding="utf-8") == "precious"
    assert os.listdir(tmp_path) == ["image.nii.gz"]
    with pytest.raises(OSError, match="cannot be written as an image"):
        io.write_image(tmp_path / "image.nonsense", noise(grid(3)), grid(3))
    assert os.listdir(tmp_path) == ["image.nii.gz"]


def test_output_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with output_folder(out, ["x", "y"]) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["x"]
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def fill(out, names=("x", "y"), *, write=("x",), text="1", error=None, **keywords):
    with output_folder(out, names, **keywords) as folder:
        for name in write:
            (folder / name).write_text(text)
        if error is not None:
            raise error


def test_output_folder_failure_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            fill(tmp_path / "a" / "out", error=error)
        assert os.listdir(tmp_path) == []


def test_output_folder_that_exists(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    fill(out, write=("x", "y"))
    with pytest.raises(io.InputError, match="already holds x; give another folder, or --force"):
        fill(out)
    with pytest.raises(KeyboardInterrupt):
        fill(out, text="half", error=KeyboardInterrupt, replace=True)
    assert {p.name: p.read_text(encoding="utf-8") for p in out.iterdir()} == {
        "mine": "kept",
        "x": "1",
        "y": "1",
    }
    # A file that this run does not write must not stay from an earlier one.
    fill(out, text="2", replace=True)
    assert {p.name: p.read_text(encoding="utf-8") for p in out.iterdir()} == {"mine": "kept", "x": "2"}


def test_output_folder_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(io.InputError, match="file: exists and is not a folder"):
        fill(tmp_path / "file")
    with pytest.raises(io.InputError, match="out: cannot be made: not a directory"):
        fill(tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_output_folder_refuses_folders_in_place_of_files(tmp_path):
    with pytest.raises(io.InputError, match="must have a name"):
        fill("")
    (tmp_path / "y").mkdir()
    with pytest.raises(io.InputError, match="y: is a folder"):
        fill(tmp_path, replace=True)
    (tmp_path / "y").rmdir()

    def appears():
        with output_folder(tmp_path, "xy") as folder:
            (folder / "x").write_text("1")
            (tmp_path / "y").mkdir()  # while the run goes on

    with pytest.raises(io.InputError, match="y: is a folder"):
        appears()
    assert os.listdir(tmp_path) == ["y"]


def test_output_folder_is_never_mixed(tmp_path, monkeypatch):
    fill(tmp_path, write=("x", "y"))
    monkeypatch.setattr(_exchange, "_swap", lambda: None)
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        fill(tmp_path, write=("x", "y"), text="2", replace=True)
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == {"x": "1", "y": "1"}


@pytest.mark.parametrize("step", ["rename", "replace"])
def test_ctrl_c_does_not_stop_the_last_step(tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    if step == "replace":
        monkeypatch.setattr(_exchange, "_swap", lambda: None)
    real, calls = getattr(os, step), []

    def interrupted(source, target):
        real(source, target)
        calls.append(target)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    monkeypatch.setattr(os, step, interrupted)
    fill(out, write=("x", "y"), replace=True)
    assert calls
    assert {p.name: p.read_text(encoding="utf-8") for p in out.iterdir()} == {"x": "1", "y": "1"}


@pytest.mark.parametrize("when", ["before it is held", "while it is held"])
def test_a_folder_that_another_process_sweeps_is_made_anew(tmp_path, monkeypatch, when):
    """One that writes the same file takes away what nobody holds: for a moment a new folder is such a one."""
    hold, swept = _exchange.hold, []

    def late(path, create=False):
        if swept:
            return hold(path, create)
        swept.append(path)
        theirs = hold(path, create)
        path.rmdir()
        if when == "before it is held":
            os.close(theirs)
            return hold(path, create)
        raise BlockingIOError

    monkeypatch.setattr(_exchange, "sweep", lambda *_: None)
    monkeypatch.setattr(_exchange, "hold", late)
    with _exchange.scratch(tmp_path, "x") as made:
        assert made.is_dir()
        assert made != swept[0]
    assert os.listdir(tmp_path) == []
