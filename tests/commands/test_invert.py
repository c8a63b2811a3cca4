"""The inverse of what was registered: fastreg invert, register --inverse, Registration.inverse, on grids of their own."""

import json

import numpy as np
import pytest
import torch

import fastreg
from fastreg import cli, io, metrics
from fastreg._inverse import nearest_affine
from fastreg.outcome_inverse import OUTPUTS

sitk = pytest.importorskip("SimpleITK")


def turn(a, b):
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z @ about_x


def grid(size, spacing, direction, centre=(5.0, 30.0, 15.0)):
    middle = direction * spacing @ ((np.array(size) - 1) / 2)
    origin = tuple(float(v) for v in np.array(centre) - middle)
    return io.Geometry(size, spacing, origin, tuple(float(v) for v in direction.ravel()))


# Both oblique, of other spacings, one of them mirrored; the moving one is the smaller.
FIXED = grid((34, 30, 26), (1.5, 2.0, 2.5), turn(0.3, 0.1))
MOVING = grid((28, 24, 22), (1.3, 1.7, 1.9), turn(-0.2, 0.25) * (1, 1, -1))


def places(geometry):
    index = np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), -1)
    return geometry.to_physical(index)


def forward(points, angle=0.0):
    """Where points (mm) of the fixed image lie in the moving one; angle: of a turn about the middle."""
    centre = np.array([5.0, 30.0, 15.0])
    p = points - centre
    wave = np.stack(
        [2.5 * np.sin(p[..., 1] / 9), 2.0 * np.cos(p[..., 2] / 8), 1.5 * np.sin(p[..., 0] / 10 + 1)], -1
    )
    return centre + p @ turn(angle, angle / 2).T + wave


def field(geometry, angle=0.0):
    """forward as a displacement of a grid, voxels."""
    mm = forward(places(geometry), angle) - places(geometry)
    voxels = mm @ np.linalg.inv(geometry.matrix).T
    return torch.from_numpy(np.moveaxis(voxels, -1, 0))[None].float()


def scene(points):
    x, y, z = np.moveaxis(points, -1, 0)
    return (100 + 40 * np.sin(x / 7) + 30 * np.cos(y / 6) + 20 * np.sin(z / 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.write_displacement("field.nii.gz", field(FIXED), FIXED)
    # What moving shows at forward(p), fixed shows at p.
    io.write_image("fixed.nii.gz", scene(forward(places(FIXED))), FIXED)
    io.write_image("moving.nii.gz", scene(places(MOVING)), MOVING)
    return tmp_path


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("onto", [MOVING, FIXED], ids=["moving", "own"])
def test_sends_points_back(angle, onto):
    """However large the affine part: points go to the moving image and come back."""
    u = field(FIXED, angle)
    v, residual = io.invert(u, FIXED, onto)
    assert v.shape == (1, 3, *onto.shape)
    assert residual.mean_voxels < 1e-5
    assert residual.max_voxels < 1e-3
    assert 0 < residual.max_mm < 3 * residual.max_voxels
    assert residual.folded == 0
    # Of the map itself, beyond what interpolating u leaves of it.
    index = np.random.default_rng(0).uniform(4, np.array(FIXED.shape) - 5, (200, 3))
    there = forward(FIXED.to_physical(index), angle)
    near = onto.to_index(there)
    near = near[np.all((near >= 1) & (near <= np.array(onto.shape) - 2), -1)].round()
    assert len(near) > 20
    moved = metrics.move_points(torch.from_numpy(near), v).numpy()
    back = forward(onto.to_physical(moved), angle)
    kept = FIXED.contains(FIXED.to_index(onto.to_physical(moved)))
    assert np.abs(back - onto.to_physical(near))[kept].max() < 0.12


@pytest.mark.parametrize("angle", [0.0, 2.0])
def test_points_exactly(angle):
    u = field(FIXED, angle)
    index = np.random.default_rng(0).uniform(0, np.array(FIXED.shape) - 1, (50, 3))
    there = FIXED.to_physical(metrics.move_points(torch.from_numpy(index), u).numpy())
    assert np.abs(io.invert_points(there, u, FIXED) - FIXED.to_physical(index)).max() < 1e-4
    flat = io.Geometry.of((20, 30), (2.0, 1.0))
    u = fastreg.smooth(torch.randn(1, 2, 20, 30), 4.0)
    points = torch.rand(9, 2).double() * 15 + 2
    there = flat.to_physical(metrics.move_points(points, u).numpy())
    assert np.abs(io.invert_points(there, u, flat) - flat.to_physical(points.numpy())).max() < 1e-5


def test_slabs_are_one_field(monkeypatch):
    u = field(FIXED)
    whole = io.invert(u, FIXED, MOVING)
    monkeypatch.setattr("fastreg.io._inverse.LEAST", 1)
    parts = io.invert(u, FIXED, MOVING)
    assert (parts[0] - whole[0]).abs().max() < 1e-5
    assert parts[1].mean_voxels == pytest.approx(whole[1].mean_voxels, rel=0.5)
    assert parts[1].outside == whole[1].outside


def test_residual_is_measured():
    """A residual that was read off the solution itself would say 0 of whatever is written."""
    u = field(FIXED)
    u[..., ::2] += 2.5  # folds
    v, residual = io.invert(u, FIXED)
    assert v.isfinite().all()
    assert residual.folded > 0.03
    found = metrics.inverse_residual(u, v)
    assert 0.1 < residual.max_voxels <= found.max() + 1e-3


@pytest.mark.parametrize("shape", [(12, 9), (8, 9, 10), (1, 9, 7)])
def test_nearest_affine(shape):
    nd = len(shape)
    matrix = torch.eye(nd, nd + 1) + 0.2 * torch.randn(nd, nd + 1)
    matrix[:, :nd][:, [n == 1 for n in shape]] = torch.eye(nd)[:, [n == 1 for n in shape]]
    u = fastreg.affine_displacement(matrix[None].double(), shape)
    assert (nearest_affine(u) - matrix).abs().max() < 1e-6
    assert torch.equal(nearest_affine(torch.full_like(u, float("nan"))), torch.eye(nd, nd + 1).double())
    mirrored = torch.zeros_like(u)
    mirrored[0, -1] = -2 * torch.arange(shape[-1])
    assert torch.equal(nearest_affine(mirrored), torch.eye(nd, nd + 1).double())


@pytest.mark.parametrize("affine", [False, True])
def test_registration_inverse(affine):
    shape = (20, 22, 24)
    steps = torch.stack(torch.meshgrid(*[torch.arange(float(s)) for s in shape], indexing="ij"))
    image = torch.sin(steps / 3).prod(0)[None, None]
    moved = fastreg.warp(
        image, 1.5 * torch.sin(steps / 6)[None] + 0.02 * (affine * (steps - 10)), padding="border"
    )
    found = fastreg.register(moved, image, levels=1, iterations=20, affine=affine)
    v = found.inverse()
    assert v.dtype == torch.float32
    residual = metrics.inverse_residual(found.displacement, v)[:, 4:-4, 4:-4, 4:-4]
    assert residual.mean() < 1e-4
    # It warps the fixed image onto the moving one.
    inner = (..., *[slice(4, -4)] * 3)
    back = fastreg.warp(moved, v, padding="border")
    assert (back - image)[inner].abs().mean() < 0.5 * (moved - image)[inner].abs().mean()


def test_command_and_back(folder, capsys):
    """invert --like, then apply: the fixed image in the moving one's space, on another oblique grid."""
    assert cli.main(["invert", "field.nii.gz", "--like", "moving.nii.gz", "-o", "back.nii.gz"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "voxels in the mean" in out
    assert "come from outside of the field" in out
    v, own = io.read_displacement("back.nii.gz")
    assert own.matches(MOVING)
    assert cli.main(["apply", "--field", "back.nii.gz", "fixed.nii.gz", "-o", "there", "--quiet"]) == 0
    moved, _ = io.read_image("there/moved.nii.gz")
    reached = io.resample(torch.ones(1, 1, *FIXED.shape), FIXED, MOVING, v)[0][0, 0].numpy() == 1
    assert reached.mean() > 0.4
    difference = np.abs(moved - scene(places(MOVING)))[reached]
    assert difference.mean() < 0.5  # of values that spread over 180; interpolated twice
    assert difference.max() < 4
    # The other way round, the inverse of the inverse is the field.
    w, _ = io.invert(v, MOVING, FIXED)
    inner = io.resample(torch.ones(1, 1, *MOVING.shape), MOVING, FIXED, w)[0] == 1
    assert inner.double().mean() > 0.2
    assert ((w - field(FIXED)).abs() * inner).sum() / (3 * inner.sum()) < 0.02


def test_simpleitk_reads_it_as_an_inverse(folder):
    """DisplacementFieldTransform of one after that of the other, at physical points."""
    assert cli.main(["invert", "field.nii.gz", "-o", "back.nii.gz", "--quiet"]) == 0
    there, back = (
        sitk.DisplacementFieldTransform(sitk.ReadImage(f, sitk.sitkVectorFloat64))
        for f in ("field.nii.gz", "back.nii.gz")
    )
    index = np.random.default_rng(0).integers(8, np.array(FIXED.shape) - 8, (60, 3))
    for point in FIXED.to_physical(index):
        moved = back.TransformPoint(point.tolist())
        assert np.abs(np.array(there.TransformPoint(moved)) - point).max() < 1e-3


def test_simpleitks_own_inverse_is_near(folder):
    """Where both are far from the border, beyond which ITK takes a field for 0."""
    image = sitk.ReadImage("field.nii.gz", sitk.sitkVectorFloat64)
    theirs = sitk.InvertDisplacementField(
        image, 50, maxErrorToleranceThreshold=1e-3, meanErrorToleranceThreshold=1e-5, enforceBoundaryCondition=False
    )  # fmt: skip
    theirs = sitk.GetArrayFromImage(theirs) @ np.linalg.inv(FIXED.matrix).T
    v = io.invert(field(FIXED), FIXED)[0][0].movedim(0, -1).numpy()
    assert np.abs(theirs - v)[7:-7, 7:-7, 7:-7].max() < 0.02


def test_folds_are_told(folder, capsys):
    u = field(FIXED)
    u[..., ::2] += 3.0
    io.write_displacement("folds.nii.gz", u, FIXED)
    assert cli.main(["invert", "folds.nii.gz", "-o", "back.nii.gz", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastreg: warning: folds.nii.gz: its inverse is off by")
    assert len(err.splitlines()) == 1
    assert io.read_displacement("back.nii.gz")[0].isfinite().all()


def test_two_dimensions(folder, capsys):
    flat = io.Geometry((30, 20), (1.5, 1.2), (3.0, -4.0), (0.8, -0.6, 0.6, 0.8))
    u = 2 * fastreg.smooth(torch.randn(1, 2, *flat.shape), 5.0)
    io.write_displacement("flat.nii.gz", u, flat)
    assert cli.main(["invert", "flat.nii.gz", "-o", "back.nii.gz"]) == 0
    v, _ = io.read_displacement("back.nii.gz")
    assert metrics.inverse_residual(u, v)[:, 3:-3, 3:-3].max() < 1e-3
    assert cli.main(["invert", "flat.nii.gz", "--like", "moving.nii.gz", "-o", "other.nii.gz"]) == 2
    assert "flat.nii.gz is 2D and moving.nii.gz is 3D" in capsys.readouterr().err


def test_what_is_refused(folder, capsys):
    far = grid((8, 8, 8), (1.0, 1.0, 1.0), np.eye(3), (500.0, 0.0, 0.0))
    io.write_image("far.nii.gz", scene(places(far)), far)
    (folder / "there.nii.gz").write_bytes(b"kept")
    cases = [
        (["field.nii.gz", "-o", "there.nii.gz"], "there.nii.gz: exists; give another name, or --force to replace it"),
        (["field.nii.gz", "-o", "field.nii.gz", "--force"], "field.nii.gz: is an input, and the output would replace it"),
        (["field.nii.gz", "--like", "far.nii.gz", "-o", "back.nii.gz"], "field.nii.gz: no voxel of the inverse's grid comes from inside of it"),
        (["gone.nii.gz", "-o", "back.png"], "back.png: itk must be written as"),  # before anything is read
        (["fixed.nii.gz", "-o", "back.nii.gz"], "fixed.nii.gz: must be a displacement field"),
        (["turn.tfm", "field.nii.gz", "-o", "back.nii.gz"], "fastreg convert turn.tfm field.nii.gz FIELD.nii.gz --like FIXED"),
    ]  # fmt: skip
    matrix = np.hstack([turn(0.1, 0.2), [[1.0], [2.0], [3.0]]])
    io.write_affine("turn.tfm", matrix, FIXED.centre)
    for arguments, message in cases:
        assert cli.main(["invert", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    # Of a matrix --like is not its own grid; what is said instead makes the inverse.
    assert cli.main(["invert", "turn.tfm", "--like", "moving.nii.gz", "-o", "back.nii.gz"]) == 2
    advice = capsys.readouterr().err.split(": fastreg ")[1].split()
    assert (folder / "there.nii.gz").read_bytes() == b"kept"
    assert not (folder / "back.nii.gz").exists()
    assert cli.main(["invert", "field.nii.gz", "-o", "there.nii.gz", "--force", "--quiet"]) == 0
    assert cli.main(advice) == 0
    u, own = io.read_displacement("back.nii.gz")
    assert own.matches(MOVING)
    index = np.array([[3.0, 4.0, 5.0], [20.0, 10.0, 2.0]])
    there = own.to_physical(metrics.move_points(torch.from_numpy(index), u).numpy())
    assert np.abs(there @ matrix[:, :3].T + matrix[:, 3] - own.to_physical(index)).max() < 1e-3


def test_register_inverse(folder):
    """Images, labels and points of the other direction, each on the moving image's side."""
    pytest.importorskip("matplotlib")
    for name, geometry, points in (
        ("fixed", FIXED, forward(places(FIXED))),
        ("moving", MOVING, places(MOVING)),
    ):
        io.write_image(
            f"{name}_labels.nii.gz", np.digitize(scene(points), [90, 130]).astype(np.uint8), geometry
        )
    marks = FIXED.to_physical(np.random.default_rng(1).uniform(8, 16, (12, 3)))
    io.write_landmarks("fixed.csv", marks)
    io.write_landmarks("moving.csv", forward(marks))
    arguments = ["--iterations", "60", "--levels", "1", "--similarity", "mse", "--quiet", "--inverse"]
    for which in ("labels", "landmarks"):
        end = "_labels.nii.gz" if which == "labels" else ".csv"
        arguments += [f"--fixed-{which}", f"fixed{end}", f"--moving-{which}", f"moving{end}"]
    assert cli.main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *arguments]) == 0
    report = json.loads((folder / "out" / "report.json").read_text())["inverse"]
    assert report["mean_voxels"] < 0.01
    assert 0 <= report["outside"] < 0.6
    _, own = io.read_displacement("out/inverse_displacement.nii.gz")
    assert own.matches(MOVING)
    moved, own = io.read_image("out/moved_fixed.nii.gz")
    assert own.matches(MOVING)
    moving = scene(places(MOVING))
    before, inside = io.resample(torch.from_numpy(scene(forward(places(FIXED))))[None, None], FIXED, MOVING)
    kept = inside[0, 0].numpy() & (moved > moved.min())
    after, start = (np.abs(a - moving)[kept].mean() for a in (moved, before[0, 0].numpy()))
    assert after < 0.7 * start
    labels, own = io.read_image("out/moved_fixed_labels.nii.gz")
    assert own.matches(MOVING)
    assert labels.dtype == np.uint8
    wanted = np.digitize(moving, [90, 130])
    assert (labels == wanted)[kept].mean() > 0.85
    # What moves a landmark back is what moved it there.
    back = io.read_landmarks("out/moving_landmarks_in_fixed.csv", 3)
    u, own = io.read_displacement("out/displacement.nii.gz")
    again = own.to_physical(metrics.move_points(torch.from_numpy(own.to_index(back)), u).numpy())
    assert np.abs(again - forward(marks)).max() < 1e-3
    assert (
        np.linalg.norm(back - marks, axis=1).mean()
        < 0.6 * np.linalg.norm(forward(marks) - marks, axis=1).mean()
    )
    # Registered again without it, the files of the other direction are gone.
    plain = ["--iterations", "1", "--levels", "1", "--quiet", "--force"]
    assert cli.main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *plain]) == 0
    assert not [name for name in OUTPUTS if (folder / "out" / name).exists()]


def test_register_inverse_beside_nan(folder, capsys):
    """What lies outside is the least value of the fixed image, which a NaN is not."""
    pytest.importorskip("matplotlib")
    fixed = scene(forward(places(FIXED)))
    fixed[:3] = np.nan
    io.write_image("fixed.nii.gz", fixed, FIXED)
    arguments = ["--iterations", "1", "--levels", "1", "--similarity", "mse", "--nan", "mask", "--inverse"]
    assert cli.main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *arguments]) == 0
    assert "\ninverse     off by " in capsys.readouterr().out
    report = json.loads((folder / "out" / "report.json").read_text())["inverse"]
    assert report["outside_value"] == pytest.approx(np.nanmin(fixed))
    assert report["mean_voxels"] < 0.01
