"""`fastreg apply --field`: labels, series, colours, types, interpolation, the grid of the result; against SimpleITK where it does the same."""

import numpy as np
import pytest
import torch
from test_io import as_sitk, field, pair

from fastreg import _moved, cli, io

sitk = pytest.importorskip("SimpleITK")

RNG = np.random.default_rng(0)
# A moving and a fixed grid that share nothing.
FIXED, MOVING = pair(3, {}, {"oblique": False, "size": (19, 15, 16)})
U = field(FIXED, size=0.8)


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.write_displacement("u.nii.gz", U, FIXED)


def apply(*arguments, moving="m.nrrd"):
    assert (
        cli.main(["apply", "--field", "u.nii.gz", moving, "-o", "out", "--force", "--quiet", *arguments]) == 0
    )
    return sitk.ReadImage("out/moved.nii.gz")


def refused(capsys, *arguments, moving="m.nrrd"):
    assert cli.main(["apply", "--field", "u.nii.gz", moving, "-o", "none", *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fastreg: ")
    return line


def itks(image, how, outside=0.0, onto=FIXED, kind=None):
    vectors = sitk.ReadImage("u.nii.gz", sitk.sitkVectorFloat64)
    where = (
        onto.size,
        sitk.DisplacementFieldTransform(vectors),
        how,
        onto.origin,
        onto.spacing,
        onto.direction,
    )
    return sitk.GetArrayFromImage(sitk.Resample(image, *where, outside, kind or sitk.sitkFloat64))


def save(array, name="m.nrrd", geometry=MOVING, **options):
    image = as_sitk(array, geometry, **options)
    sitk.WriteImage(image, name)
    return image


def scan(dtype=np.int16):
    return (RNG.normal(size=MOVING.shape) * 300 + 1000).astype(dtype)


def labels(values):
    return np.asarray(values)[RNG.integers(0, len(values), MOVING.shape)]


def regions(n, shape=(24, 24, 24), step=3):
    """Cubes of n labels on a background."""
    cubes = RNG.permutation(n)[np.arange((shape[0] // step) ** 3) % n].reshape([s // step for s in shape]) + 1
    out = np.kron(cubes, np.ones((step,) * 3, int))
    out[:8] = 0
    return out


def smooth(shape=(24, 24, 24)):
    """A picture of some 200 levels that changes by one or none from voxel to voxel."""
    x = sum(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    return np.repeat((x * 2.7).astype(np.int16), 3, axis=2)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.array([0, 4, 17], np.int16)[RNG.integers(0, 3, (5, 6, 7))], 3),
        (RNG.integers(0, 2, (5, 6, 7)).astype(np.uint8), 2),
        (RNG.integers(0, 3, (5, 6, 7)).astype(np.float64), 3),  # as nibabel saves them
        (RNG.integers(0, 3, (9, 9)).astype(np.float32), 3),
        (np.array([2**40, 0, 7], np.int64)[RNG.integers(0, 3, (5, 6, 7))], 3),
        (regions(100).astype(np.int32), 101),
        (regions(400), 385),
        # cells, numbered in no order
        (np.kron((np.arange(4096) * 1237 % 4099).reshape(16, 16, 16), np.ones((3, 3, 3), int)), 4096),
        (regions(100).astype(np.float32), 101),
        (RNG.integers(0, 256, (9, 9, 9)).astype(np.uint8), 0),  # a photo
        (RNG.normal(size=(9, 9, 9)), 0),
        (RNG.integers(0, 3, (5, 6, 7)) / 2, 0),  # a soft mask
        (RNG.integers(-1000, 2000, (24, 24, 24)).astype(np.int16), 0),
        (smooth(), 0),
        (np.arange(2000, dtype=np.int32).repeat(10).reshape(20, 1000), 0),
        (np.array([-128, 127, 3], np.int8)[RNG.integers(0, 3, (5, 6, 7))], 3),
        (regions(100).astype(np.int8), 101),
        (regions(100).astype(np.int64) * 2**40, 101),
        (regions(100) - np.float32(2**20), 101),
        (np.array([np.inf, 1.0])[RNG.integers(0, 2, (5, 6))], 2),
        (np.array([np.nan, 1.0])[RNG.integers(0, 2, (5, 6))], 0),
        (np.array([2**64 - 1, 0], np.uint64)[RNG.integers(0, 2, (5, 6))], 2),
    ],
)
def test_what_looks_like_labels(array, found):
    assert _moved.labels_in(array) == found


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.uint32, np.int64])
def test_labels_stay_labels_and_a_line_says_so(capsys, dtype):
    big = 4 if np.dtype(dtype).itemsize < 4 or dtype == np.float32 else 2**31 + 5
    image = save(labels([0, big, 17]).astype(dtype))
    moved = sitk.GetArrayFromImage(apply())
    assert moved.dtype == dtype
    assert set(np.unique(moved)) == {0, big, 17}
    truth = itks(image, sitk.sitkNearestNeighbor)
    assert (moved != truth).mean() < 1e-3  # ties
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "m.nrrd: holds 3 values, all of them whole numbers: taken for labels, nearest" in line
    assert "--interpolation linear" in line
    between = sitk.GetArrayFromImage(apply("--interpolation", "linear", "--output-type", "float32"))
    assert len(np.unique(between)) > 100
    assert "labels" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_scan_keeps_its_type_and_is_rounded(capsys, dtype):
    array = scan() if np.dtype(dtype).itemsize > 1 else np.clip(scan() / 10, 0, 255)
    image = save(array.astype(dtype))
    moved = apply()
    assert moved.GetPixelID() == image.GetPixelID()
    truth = itks(image, sitk.sitkLinear, float(array.astype(dtype).min()))
    wrong = np.abs(sitk.GetArrayFromImage(moved) - truth)
    assert (wrong > (0.51 if np.dtype(dtype).kind in "iu" else 1e-2)).mean() < 1e-3  # the very edge
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "how"), [("cubic", "sitkBSpline"), ("lanczos", "sitkLanczosWindowedSinc")])
@pytest.mark.parametrize("nd", [2, 3])
def test_cubic_and_lanczos_are_simpleitks(name, how, nd):
    fixed, moving = (FIXED, MOVING) if nd == 3 else pair(2, {}, {"spacing": (1.1, 0.7), "size": (15, 21)})
    io.write_displacement("u.nii.gz", field(fixed, size=0.8), fixed)
    array = (RNG.normal(size=moving.shape) * 300).astype(np.int16)
    image = save(array, geometry=moving)
    moved = apply("--interpolation", name, "--output-type", "float64")
    truth = itks(image, getattr(sitk, how), float(array.min()), fixed)
    wrong = np.abs(sitk.GetArrayFromImage(moved) - truth) > 1e-2 * np.ptp(array)
    assert wrong.mean() < 1e-2
    linear = sitk.GetArrayFromImage(apply("--output-type", "float64"))
    assert (np.abs(linear - truth) > 1e-2 * np.ptp(array)).mean() > 0.1


def test_what_a_type_does_not_hold_is_clamped_and_said(capsys):
    save(scan())
    moved = apply("--output-type", "uint8")
    assert moved.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert sitk.GetArrayFromImage(moved).max() == 255
    total = np.prod(FIXED.shape)
    assert f"of {total} values are beyond what uint8 holds: clamped" in capsys.readouterr().err
    save(scan(np.float32) / 1000)
    apply("--output-type", "int16")
    assert "are rounded to whole numbers (int16)" in capsys.readouterr().err
    array = np.zeros(MOVING.shape, np.int16)
    array[8:] = 2**15 - 1  # what overshoots
    save(array)
    moved = apply("--interpolation", "cubic")
    assert "are beyond what int16 holds: clamped" in capsys.readouterr().err
    assert sitk.GetArrayFromImage(moved).max() == 2**15 - 1
    save(labels([0, 1, 2**24 + 1]).astype(np.int32))
    apply("--output-type", "float32")
    assert "float32 does not hold labels above 16777216 exactly" in capsys.readouterr().err


@pytest.mark.parametrize("to", _moved.INTEGERS)
def test_conversion_is_the_nearest_number_that_a_type_holds(to):
    info = np.iinfo(to)
    for array in (
        np.array([-1e30, -0.5, 0.5, 1.5, 2.51, 1e30]),
        np.array([np.iinfo(np.int64).min, 0, 100, np.iinfo(np.int64).max]),
        np.array([0, 100, np.iinfo(np.uint64).max], np.uint64),
    ):
        out, beyond = _moved.converted(array, np.dtype(to))
        exact = [round(float(v)) if array.dtype.kind == "f" else int(v) for v in array]
        assert out.tolist() == [min(max(v, info.min), info.max) for v in exact]
        assert beyond == sum(not info.min <= v <= info.max for v in exact)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_series_is_moved_volume_by_volume(capsys, channels):
    shape = (3, *MOVING.shape, channels)
    array = RNG.integers(0, 200, shape).astype(np.uint8 if channels > 1 else np.int16)
    several = channels > 1
    volumes = [as_sitk(v if several else v[..., 0], MOVING, isVector=several) for v in array]
    sitk.WriteImage(sitk.JoinSeries(volumes, 5.0, 1.25), "m.nrrd")
    moved = apply()
    assert moved.GetSize() == (*FIXED.size, 3)
    assert (moved.GetSpacing()[3], moved.GetOrigin()[3]) == (1.25, 5.0)
    for t in range(3):
        one = sitk.Extract(moved, [*FIXED.size, 0], [0, 0, 0, t])
        assert np.allclose(one.GetDirection(), FIXED.direction, atol=1e-6)
        assert np.allclose(one.GetSpacing(), FIXED.spacing)
        truth = itks(volumes[t], sitk.sitkLinear, kind=sitk.sitkVectorFloat64 if several else None)
        wrong = np.abs(sitk.GetArrayFromImage(one) - truth) > 0.51
        assert wrong.mean() < 1e-3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_each_component_is_moved(capsys, channels, dtype):
    array = RNG.integers(0, 200, (*MOVING.shape, channels)).astype(dtype)
    image = save(array, isVector=True)
    moved = apply()
    assert moved.GetPixelID() == image.GetPixelID()
    assert moved.GetNumberOfComponentsPerPixel() == channels
    outside = 0.0 if dtype == np.uint8 and channels in (3, 4) else float(array.min())
    truth = itks(image, sitk.sitkLinear, outside, kind=sitk.sitkVectorFloat64)
    wrong = np.abs(sitk.GetArrayFromImage(moved) - truth) > (0.51 if dtype == np.uint8 else 1e-3)
    assert wrong.mean() < 1e-3
    said = capsys.readouterr().err
    assert ("components are moved, not rotated" in said) == (dtype == np.float32 and channels in (3, 6))


def test_a_photo(capsys):
    geometry = io.Geometry.of((20, 30), (1, 1))
    u = torch.zeros(1, 2, 20, 30)
    u[:, 1] = 2
    io.write_displacement("u.nii.gz", u, geometry)
    array = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), "m.png")
    moved = sitk.GetArrayFromImage(apply(moving="m.png"))
    assert np.array_equal(moved[:, :-2], array[:, 2:])
    assert not moved[:, -2:].any()
    assert capsys.readouterr().err == ""


def test_the_result_on_another_grid(capsys):
    """Beyond the field ITK does not displace, and neither do we."""
    onto = io.Geometry(FIXED.size, tuple(s * 1.2 for s in FIXED.spacing), FIXED.origin, FIXED.direction)
    image = save(scan())
    save(np.zeros(onto.shape, np.uint8), "r.nii.gz", onto)
    moved = apply("--reference", "r.nii.gz", "--output-type", "float64")
    assert "% of the result lies beyond its grid and is not moved by it" in capsys.readouterr().err
    truth = itks(image, sitk.sitkLinear, float(sitk.GetArrayViewFromImage(image).min()), onto)
    assert (np.abs(sitk.GetArrayFromImage(moved) - truth) > 1e-2).mean() < 2e-3
    assert io.volume_geometry("out/moved.nii.gz").matches(onto)
    save(labels([0, 5]).astype(np.uint16), "l.nrrd")
    apply("--reference", "r.nii.gz", "--labels", "l.nrrd")
    assert io.volume_geometry("out/moved_labels.nii.gz").matches(onto)
    assert set(np.unique(io.read_image("out/moved_labels.nii.gz")[0])) == {0, 5}
    inner = io.Geometry(
        tuple(n - 6 for n in FIXED.size), FIXED.spacing, tuple(FIXED.to_physical([3] * 3)), FIXED.direction
    )
    save(np.zeros((*inner.shape, 3), np.uint8), "r.nii.gz", inner, isVector=True)
    capsys.readouterr()
    part = sitk.GetArrayFromImage(apply("--reference", "r.nii.gz"))
    assert capsys.readouterr().err == ""
    whole = sitk.GetArrayFromImage(apply())[3:-3, 3:-3, 3:-3]
    assert (np.abs(part - whole) > 1).mean() < 1e-3  # whole numbers, at ties


def test_what_cannot_be_moved(capsys):
    save(scan().astype(np.complex64))
    assert "must have real values, got complex ones: save magnitude" in refused(capsys)
    save(RNG.integers(0, 9, (5, 6)).astype(np.int16), geometry=io.Geometry.of((5, 6), (1, 1)))
    assert "u.nii.gz is 3D and m.nrrd is 2D" in refused(capsys)
    far = io.Geometry(MOVING.size, MOVING.spacing, (1e4,) * 3, MOVING.direction)
    save(scan(), geometry=far)
    assert "leads nowhere into m.nrrd" in refused(capsys)
    save(scan())
    save(scan(), "r.nrrd", far)
    assert "does not reach the image" in refused(capsys, "--reference", "r.nrrd")
    assert "no such file" in refused(capsys, "--reference", "none.nii.gz")
    array = scan(np.float32)
    array[3, 4, 5] = np.nan
    save(np.stack([array, array], -1), isVector=True)
    assert "must be finite, got NaN or infinity in 2 of" in refused(capsys)
    assert "invalid choice" in refused(capsys, "--interpolation", "sinc")
    assert "invalid choice" in refused(capsys, "--output-type", "float16")


def test_five_dimensions_are_refused(capsys):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.zeros((5, 6, 7, 2, 2), np.float32), np.eye(4))
    nibabel.save(image, "m.nii.gz")
    assert "a series of 3D ones, got 5 dimensions" in refused(capsys, moving="m.nii.gz")


def test_register_moves_as_apply_does(capsys):
    """Labels that are registered stay labels, an integer scan stays one; --output-type and --interpolation are register's too."""
    pytest.importorskip("matplotlib")
    grid = io.Geometry.of((24, 22), (1, 1))
    y, x = np.mgrid[:24, :22]
    cubes = np.where((y > 6) & (y < 15) & (x > 5), 17, 0) + np.where(y > 18, 4, 0)
    scan = 100 * np.sin(y / 3) * np.cos(x / 4)
    save(cubes.astype(np.int16), "f.nrrd", grid)
    save(np.roll(cubes, 1, 0).astype(np.int16), "m.nrrd", grid)
    few = ["-o", "out", "--force", "--quiet", "--levels", "1", "--iterations", "3"]

    def register(*more):
        assert cli.main(["register", "f.nrrd", "m.nrrd", *few, *more]) == 0
        return io.read_image("out/moved.nii.gz")[0]

    moved = register()
    assert moved.dtype == np.int16
    assert set(np.unique(moved)) == {0, 4, 17}
    said = capsys.readouterr().err
    assert "m.nrrd: holds 3 values, all of them whole numbers: taken for labels" in said
    assert "f.nrrd: holds 3 whole numbers, as label maps do: they are compared as intensities" in said
    assert "far above all others" not in said
    assert len(np.unique(register("--interpolation", "linear", "--output-type", "float32"))) > 3
    save(scan.astype(np.int16), "f.nrrd", grid)
    save(np.roll(scan, 1, 0).astype(np.int16), "m.nrrd", grid)
    capsys.readouterr()
    moved = register()
    assert moved.dtype == np.int16
    assert capsys.readouterr().err == ""
    cli.main(["apply", "--field", "out/displacement.nii.gz", "m.nrrd", "-o", "again", "--quiet"])
    assert np.abs(io.read_image("again/moved.nii.gz")[0] - moved).max() <= 1
    assert register("--output-type", "float32").dtype == np.float32
