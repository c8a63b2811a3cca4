"""What docs/interoperability.md says, by its own blocks: each runs as it is printed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastreg
from fastreg import cli, io

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"


def grid(size, spacing, direction):
    """Centred near (5, 30, 15) mm."""
    matrix = np.array(direction).reshape(3, 3) * spacing
    return io.Geometry(size, spacing, tuple((5, 30, 15) - matrix @ (np.array(size) - 1) / 2), direction)


FIXED = grid((23, 19, 16), (1.5, 2.0, 2.5), (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1))
MOVING = grid((28, 24, 22), (1.6, 2.1, 2.3), (1, 0, 0, 0, 0.8, -0.6, 0, 0.6, 0.8))


def blocks(section):
    """The Python blocks of a section of the page."""
    text = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    (body,) = [part for part in text if part.partition("\n")[0] == section]
    found = re.findall(r"^```python\n(.*?)^```", body, re.M | re.S)
    assert found
    return found


def run(block):
    """The block's names, after it has run."""
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def scene(grid, shift=0.0):
    """Smooth all over, so that neighbouring samplings agree."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(grid.to_physical(index), -1, 0)
    return (100 + 40 * np.sin((x + shift) / 7) + 30 * np.cos(y / 6) + 20 * np.sin((z - shift) / 8)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("interoperability")
    io.write_image(path / "fixed.nii.gz", scene(FIXED), FIXED)
    io.write_image(path / "moving.nii.gz", scene(MOVING, 3.0), MOVING)
    files = [str(path / name) for name in ("fixed.nii.gz", "moving.nii.gz")]
    arguments = ["--iterations", "60", "--levels", "1", "--similarity", "mse", "--quiet"]
    assert cli.main(["register", *files, "-o", str(path / "out"), *arguments]) == 0
    u, _ = io.read_displacement(path / "out" / "displacement.nii.gz")
    assert (u.abs().amax((0, 2, 3, 4)) > 0.2).all()  # each component has something to be read wrongly
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def applied(field, out):
    """What `fastreg apply` makes of a field: (z, y, x)."""
    assert cli.main(["apply", "--field", field, "moving.nii.gz", "-o", out, "--force", "--quiet"]) == 0
    return io.read_image(Path(out) / "moved.nii.gz")[0]


def same(moved, truth, least=0.5):
    """Of the voxels that both fill, which are most; the scan's values lie in some 180."""
    inside = (truth > truth.min()) & (moved != 0)
    assert inside.mean() > least
    assert np.abs(moved - truth)[inside].max() < 0.02


def zyx(array):
    """Of nibabel and ANTs."""
    return np.asarray(array).T


def test_simpleitk():
    truth = io.read_image("out/moved.nii.gz")[0]
    with pytest.raises(RuntimeError, match="vector of 64-bit float"):
        sitk.DisplacementFieldTransform(sitk.ReadImage("out/displacement.nii.gz"))
    names = run(blocks("SimpleITK")[0])
    same(sitk.GetArrayFromImage(names["moved"]), truth)
    assert names["field"].GetNumberOfPixels() == 0
    assert sitk.ReadTransform("field.h5").GetName() == "DisplacementFieldTransform"

    start = FIXED.to_physical(np.array([[7.0, 8.0, 9.0]]))
    io.write_landmarks("points.csv", start)
    arguments = [
        "--field",
        "out/displacement.nii.gz",
        "moving.nii.gz",
        "--points",
        "points.csv",
        "-o",
        "points",
    ]
    assert cli.main(["apply", *arguments, "--force", "--quiet"]) == 0
    assert np.allclose(io.read_landmarks("points/points.csv", 3)[0], names["point"], atol=1e-4)
    far = FIXED.to_physical(np.array([[7.0, 8.0, 90.0]]))[0]
    assert np.allclose(names["transform"].TransformPoint(far), far)


def test_simpleitk_to_fastreg():
    names = run(blocks("SimpleITK")[1])
    moving = sitk.ReadImage("moving.nii.gz")
    truth = sitk.GetArrayFromImage(sitk.Resample(moving, names["fixed"], names["transform"], sitk.sitkLinear))
    same(truth, applied("from_simpleitk.nii.gz", "moved"))


def test_nibabel():
    pytest.importorskip("nibabel")
    pytest.importorskip("scipy")
    names = run(*blocks("nibabel and SciPy"))
    same(zyx(names["moved"]), io.read_image("out/moved.nii.gz")[0], least=0.4)  # nothing beyond voxel centres


def test_ants():
    pytest.importorskip("ants")
    same(zyx(run(blocks("ANTs")[0])["moved"].numpy()), io.read_image("out/moved.nii.gz")[0])


def test_ants_to_fastreg():
    pytest.importorskip("ants")
    names = run(blocks("ANTs")[1])
    moved = zyx(names["moved"].numpy())
    same(moved, applied(names["field"], "ants_moved"))
    alone = applied(names["found"][0], "ants_warp_alone")
    assert np.abs(alone - moved)[4:-4, 4:-4, 4:-4].max() > 1  # the affine part is missing


def test_nitransforms():
    pytest.importorskip("nitransforms")
    names = run(*blocks("NiTransforms"))
    same(zyx(names["moved"].get_fdata()), io.read_image("out/moved.nii.gz")[0], least=0.4)
    field = names["nibabel"].load("out/displacement.nii.gz")
    field = names["nibabel"].Nifti1Image(np.squeeze(field.get_fdata()), field.affine)
    unturned = names["DenseFieldTransform"](field, is_deltas=True)
    start = FIXED.to_physical(np.array([[7.0, 8.0, 9.0]]))[0] * (-1, -1, 1)
    u = np.asarray(field.dataobj)[9, 8, 7]
    assert np.allclose(
        unturned.map(start[None]) - start, u, atol=1e-3
    )  # and in RAS x and y are meant the other way


def test_monai():
    pytest.importorskip("monai")
    names = run(*blocks("PyTorch and MONAI"))
    ours = fastreg.warp(names["features"], names["u"], padding="border")
    assert torch.allclose(names["moved"], ours, atol=1e-5)


def test_simpleitk_ignores_direction_in_the_determinant(tmp_path):
    """Everything grows by a fifth, on a grid in RAS."""
    ras = io.Geometry((12, 12, 12), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    p = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij"))[None]
    io.write_displacement(tmp_path / "grown.nii.gz", 0.2 * p, ras)
    u, _ = io.read_displacement(tmp_path / "grown.nii.gz")
    assert torch.allclose(fastreg.jacobian_determinant(u)[0, 0, 6, 6, 6], torch.tensor(1.2**3))
    theirs = sitk.DisplacementFieldJacobianDeterminant(sitk.ReadImage(str(tmp_path / "grown.nii.gz")))
    assert np.isclose(theirs[6, 6, 6], 0.8 * 0.8 * 1.2)


def test_surfa_takes_mm_for_voxels(tmp_path):
    surfa = pytest.importorskip("surfa")
    warp = surfa.load_warp("out/displacement.nii.gz")
    assert warp.format == surfa.Warp.Format.disp_crs  # voxels
    mm = sitk.GetArrayFromImage(sitk.ReadImage("out/displacement.nii.gz"))
    assert np.allclose(zyx(warp.data[..., 0]), mm[..., 0])
    theirs = surfa.Warp(warp.data, source=warp.geom, target=warp.geom, format=surfa.Warp.Format.disp_crs)
    theirs.save(tmp_path / "warp.nii.gz")
    u, _ = io.read_displacement(tmp_path / "warp.nii.gz")
    assert np.allclose(u[0, 2], mm[..., 0], atol=1e-3)  # voxels along x, as surfa was given


def test_niftyreg_is_not_taken_for_ours(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    ours = nibabel.load("out/displacement.nii.gz")
    flipped = ours.get_fdata() * [-1, -1, 1]
    theirs = nibabel.Nifti1Image(flipped.astype(np.float32), ours.affine, ours.header)
    theirs.header.set_intent(1007, name="NREG_TRANS")
    theirs.header["intent_p1"] = 1  # displacements; in RAS, says NiftyReg
    nibabel.save(theirs, tmp_path / "nifty.nii.gz")
    with pytest.raises(io.InputError, match=r"NiftyReg's .* fastreg convert"):
        io.read_displacement(tmp_path / "nifty.nii.gz")
    truth = io.read_image("out/moved.nii.gz")[0]
    same(applied(str(tmp_path / "nifty.nii.gz"), "niftyreg"), truth)


def test_colours_are_not_taken_for_a_field(tmp_path):
    """torchio writes three channels as an ITK vector image; of floating-point numbers nothing tells it from a field."""
    for dtype in (np.uint8, np.int16):
        channels = sitk.GetImageFromArray(np.ones((8, 7, 6, 3), dtype), isVector=True)
        sitk.WriteImage(channels, str(tmp_path / "scan.nii.gz"))
        with pytest.raises(io.InputError, match="floating-point numbers"):
            io.read_displacement(tmp_path / "scan.nii.gz")
        assert cli.main(["apply", "--field", str(tmp_path / "scan.nii.gz"), "moving.nii.gz", "-o", "x"]) == 2


def test_the_other_direction(folder):
    """Its block, and its commands."""
    (block,) = blocks("The other direction")
    names = run(block)
    assert names["residual"].mean_voxels < 0.01
    assert names["v"].shape == (1, 3, *MOVING.shape)
    u, own = names["u"], names["fixed_grid"]
    index = torch.from_numpy(own.to_index(names["in_fixed"]))
    assert np.abs(own.to_physical(fastreg.metrics.move_points(index, u)) - names["points"]).max() < 1e-3
    page = re.search(r"^```bash\n(fastreg invert .*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for line in page[1].splitlines():
        assert cli.main([*line.split()[1:], "--quiet"]) == 0
    moved, grid = io.read_image("back/moved.nii.gz")
    assert grid.matches(MOVING)
    reached = moved > moved.min()
    assert reached.mean() > 0.3
    aligned, start = (np.abs(a - scene(MOVING, 3.0))[reached].mean() for a in (moved, scene(MOVING)))
    assert aligned < 0.6 * start
