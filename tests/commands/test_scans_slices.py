"""One slice in space is registered in 2D, and what comes out lies where it lay."""

import json
import shutil

import numpy as np
import pytest
import torch

from fastreg import io
from fastreg.cli import main
from fastreg.data.pairs import Pair, Pairs, read_case
from fastreg.data.preprocessing import Preprocessing
from fastreg.io import Geometry, InputError

sitk = pytest.importorskip("SimpleITK")

N, THICK = 40, 5.0
BLOBS = [
    (c, s)
    for c, s in zip(np.random.default_rng(5).uniform(-22, 22, (25, 2)), np.linspace(3, 6, 25), strict=True)
]
SHIFT = np.array([2.5, -1.5])  # in the plane, mm


def texture(points):
    return sum(np.exp(-((points - c) ** 2).sum(-1) / (2 * s * s)) for c, s in BLOBS)


def turned():
    c, s = np.cos(0.4), np.sin(0.4)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


AXES = turned()  # the plane's x, y and its normal, in space
MIDDLE = np.array([30.0, -50, 80])


def slice_at(path, thin, shift=(0, 0), depth=0.0, lean=0.0, fun=texture, flip=False, dtype=np.float32):
    """A slice whose thin axis is x, y or z; what is at p in the plane is at p + shift here."""
    order = [k for k in range(3) if k != thin]
    direction = np.zeros((3, 3))
    direction[:, order[0]], direction[:, order[1]], direction[:, thin] = AXES.T
    if flip:
        direction[:, order[0]] *= -1
    if lean:
        c, s = np.cos(lean), np.sin(lean)
        direction[:, order[0]], direction[:, thin] = (
            c * AXES[:, 0] + s * AXES[:, 2],
            c * AXES[:, 2] - s * AXES[:, 0],
        )
    size, spacing = [N, N, N], [1.5, 1.5, 1.5]
    size[thin], spacing[thin] = 1, THICK
    middle = np.array([(n - 1) / 2 for n in size])
    origin = MIDDLE + depth * AXES[:, 2] - direction @ (np.array(spacing) * middle)
    grid = Geometry(tuple(size), tuple(spacing), tuple(origin), tuple(direction.ravel()))
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    in_plane = (grid.to_physical(index) - MIDDLE) @ AXES[:, :2]
    io.write_image(path, fun(in_plane - shift).astype(dtype), grid)
    return grid


POINTS = np.array([[0, 0], [10, -8], [-12, 6], [7, 14.0]])


def in_space(points, depth=0.0):
    return MIDDLE + points @ AXES[:, :2].T + depth * AXES[:, 2]


@pytest.mark.parametrize(
    ("thin", "thin_moving", "depth", "flip"), [(2, 2, 0, False), (0, 0, 0, True), (1, 2, 12, False)]
)
def test_register(tmp_path, monkeypatch, thin, thin_moving, depth, flip):
    monkeypatch.chdir(tmp_path)
    fixed = slice_at("f.nii.gz", thin)
    slice_at("m.nii.gz", thin_moving, SHIFT, depth, flip=flip)
    bright = lambda p: texture(p) > 0.8  # noqa: E731
    slice_at("fl.nii.gz", thin, fun=bright, dtype=np.uint8)
    slice_at("ml.nii.gz", thin_moving, SHIFT, depth, flip=flip, fun=bright, dtype=np.uint8)
    io.write_landmarks("f.csv", in_space(POINTS))
    io.write_landmarks("m.csv", in_space(POINTS + SHIFT, depth))
    sides = [
        f"--{side}-{kind}={side[0]}{end}"
        for side in ("fixed", "moving")
        for kind, end in (("labels", "l.nii.gz"), ("landmarks", ".csv"))
    ]
    assert main(["register", "f.nii.gz", "m.nii.gz", "-o", "out", "--quiet", "--inverse", *sides]) == 0
    with open("out/report.json", encoding="utf-8") as stream:
        report = json.load(stream)
    assert report["tre"]["before"]["mean"] == pytest.approx(np.linalg.norm(SHIFT), abs=1e-3)
    assert report["tre"]["after"]["mean"] < 0.3
    assert report["dice"]["after"]["mean"] > 0.95
    for name in ("moved", "moved_labels"):
        assert io.read_image(f"out/{name}.nii.gz")[1].matches(fixed)
    # ITK takes the displacement as it is
    field = sitk.ReadImage("out/displacement.nii.gz", sitk.sitkVectorFloat64)
    assert sorted(field.GetSize()) == sorted(fixed.size)  # NIfTI holds no vectors that are flat along z
    moved = sitk.Resample(
        sitk.ReadImage("m.nii.gz"),
        sitk.ReadImage("f.nii.gz"),
        sitk.DisplacementFieldTransform(field),
        sitk.sitkLinear,
    )
    ours = io.read_image("out/moved.nii.gz")[0]
    inner = np.s_[2:-2]
    both = [np.squeeze(a)[inner, inner] for a in (sitk.GetArrayFromImage(moved), ours)]
    np.testing.assert_allclose(*both, atol=1e-3)
    # and the inverse
    back = sitk.ReadImage("out/inverse_displacement.nii.gz", sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(back)
    for p, q in zip(in_space(POINTS), in_space(POINTS + SHIFT, depth), strict=True):
        np.testing.assert_allclose(transform.TransformPoint(q), p, atol=0.6)
    found = io.read_landmarks("out/moving_landmarks_in_fixed.csv", 3)
    np.testing.assert_allclose(found, in_space(POINTS), atol=0.6)
    assert io.read_image("out/moved_fixed.nii.gz")[1].matches(io.read_image("m.nii.gz")[1])
    # and so do we
    io.write_landmarks("p.csv", in_space(POINTS))
    arguments = ["--labels", "ml.nii.gz", "--points", "p.csv", "--quiet", "-o", "applied"]
    assert main(["apply", "--field", "out/displacement.nii.gz", "m.nii.gz", *arguments]) == 0
    again, grid = io.read_image("applied/moved.nii.gz")
    assert grid.matches(fixed)
    np.testing.assert_allclose(again, ours, atol=1e-4)
    labels = [io.read_image(f"{folder}/moved_labels.nii.gz")[0] for folder in ("out", "applied")]
    assert (labels[0] != labels[1]).mean() < 0.01
    there = io.read_landmarks("applied/points.csv", 3)
    assert np.linalg.norm(there - in_space(POINTS + SHIFT, depth), axis=1).max() < 0.6


def test_a_net_takes_slices(tmp_path):
    slice_at(tmp_path / "f.nii", 2)
    slice_at(tmp_path / "m.nii", 2, SHIFT)
    pair = Pair(str(tmp_path / "f.nii"), str(tmp_path / "m.nii"))
    sample = Pairs([pair], Preprocessing(), ndim=2)[0]
    assert sample.fixed.shape == (1, 1, N, N)


@pytest.mark.parametrize("lean", [0.0, 0.05, 0.2])
def test_slices_of_one_plane_only(tmp_path, lean):
    slice_at(tmp_path / "f.nii", 2)
    slice_at(tmp_path / "m.nii", 2, lean=lean)
    pair = Pair(str(tmp_path / "f.nii"), str(tmp_path / "m.nii"))
    if lean < 0.1:
        assert read_case(pair).moving_grid.nd == 2
        return
    with pytest.raises(InputError, match=r"m.nii: both must be slices of one plane.*by 5.81 mm at a corner"):
        read_case(pair)


def test_what_is_no_pair_of_slices(tmp_path):
    slice_at(tmp_path / "f.nii", 2)
    grid = Geometry.of((N, N, N), (1.0, 1.0, 1.0))
    io.write_image(tmp_path / "m.nii", np.random.default_rng(0).random(grid.shape), grid)
    with pytest.raises(InputError, match=r"f.nii is one slice in 3D and .*m.nii is 3D"):
        read_case(Pair(str(tmp_path / "f.nii"), str(tmp_path / "m.nii")))
    flat = Geometry.of((N, N), (1.0, 1.0))
    io.write_image(tmp_path / "m.mha", np.random.default_rng(0).random(flat.shape), flat)
    with pytest.raises(InputError, match=r"f.nii is one slice in 3D and .*m.mha is 2D"):
        read_case(Pair(str(tmp_path / "f.nii"), str(tmp_path / "m.mha")))
    io.write_landmarks(tmp_path / "p.csv", np.concatenate([in_space(POINTS), in_space(POINTS[:1], 3.0)]))
    points = str(tmp_path / "p.csv")
    fixed = str(tmp_path / "f.nii")
    with pytest.raises(InputError, match=r"p.csv: landmark 5 lies 3 mm off the slice, which is 5 mm thick"):
        read_case(Pair(fixed, fixed, fixed_landmarks=points, moving_landmarks=points))
    line = Geometry.of((1, 1, N), (1.0, 1.0, 1.0))
    io.write_image(tmp_path / "line.nii", np.arange(N).reshape(line.shape).astype(np.int16), line)
    with pytest.raises(InputError, match="at least 2 voxels along two axes, got 1 along y and z"):
        io.read_image(tmp_path / "line.nii")


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_displacement_of_a_slice_survives_a_file(tmp_path, thin):
    slice_at(tmp_path / "f.nii", thin)
    case = read_case(Pair(str(tmp_path / "f.nii"), str(tmp_path / "f.nii")))
    u = torch.randn(1, 2, N, N)
    for suffix in ("nii.gz", "h5"):
        io.write_displacement(tmp_path / f"u.{suffix}", u, case.fixed_grid)
    again, grid = io.read_displacement(tmp_path / "u.nii.gz")
    assert grid.matches(case.fixed_grid.plane.whole)
    flat = 2 - thin  # of z, y, x
    torch.testing.assert_close(
        again[:, [k for k in range(3) if k != flat]].squeeze(2 + flat), u, atol=1e-4, rtol=1e-4
    )
    assert again[:, flat].abs().max() < 1e-4
    sitk.ReadTransform(str(tmp_path / "u.h5"))


def test_a_matrix_lies_in_space(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slice_at("f.nii.gz", 1)
    slice_at("m.nii.gz", 1, SHIFT, depth=12)
    assert main(["register", "f.nii.gz", "m.nii.gz", "-o", "out", "--quiet", "--transform", "rigid"]) == 0
    assert "m.nii.gz: its slice lies 12 mm off that of the fixed image" in capsys.readouterr().err
    # what comes out can be a start, and be inverted
    for file in ("affine.tfm", "displacement.nii.gz"):
        shutil.rmtree("again", ignore_errors=True)
        arguments = [
            "-o",
            "again",
            "--quiet",
            "--start",
            f"out/{file}",
            "--iterations",
            "1",
            "--no-affine",
            "--learning-rate",
            "1e-6",
        ]
        assert main(["register", "f.nii.gz", "m.nii.gz", *arguments]) == 0
        fields = [io.read_displacement(f"{folder}/displacement.nii.gz")[0] for folder in ("out", "again")]
        torch.testing.assert_close(*fields, atol=0.3, rtol=0)
    assert (
        main(["invert", "out/displacement.nii.gz", "-o", "back.nii.gz", "--like", "m.nii.gz", "--quiet"]) == 0
    )
    back = sitk.DisplacementFieldTransform(sitk.ReadImage("back.nii.gz", sitk.sitkVectorFloat64))
    transform = sitk.ReadTransform("out/affine.tfm")
    for p, q in zip(in_space(POINTS), in_space(POINTS + SHIFT, 12), strict=True):
        np.testing.assert_allclose(transform.TransformPoint(p), q, atol=0.3)
        np.testing.assert_allclose(back.TransformPoint(q), p, atol=0.3)
