"""NIfTI and its kin: an image lies where its header says, two places are chosen between, what is not read is named."""

import gzip
import re
import shutil
import struct
import zipfile

import numpy as np
import pytest

from fastreg import io
from fastreg.data.pairs import Pair, Pairs, read_case, read_labels
from fastreg.data.preprocessing import Preprocessing
from fastreg.io import Geometry, InputError, Reading

sitk = pytest.importorskip("SimpleITK")

SIZE, SIZES = (7, 6, 5), (1.5, 2.0, 3.0)  # (x, y, z)
DATA = np.random.default_rng(0).integers(-500, 500, SIZE).astype(np.int16)
LPS = np.diag([-1, -1, 1, 1.0])


def turned(angles=(0.2, -0.4, 0.3)):
    matrix = np.eye(3)
    for k, angle in enumerate(angles):
        i, j = [(1, 2), (0, 2), (0, 1)][k]
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    return matrix


AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = turned() * SIZES, (10, -20, 30)


def form_at(shift=(0, 0, 0), shear=0.0, affine=AFFINE):
    new = affine.copy()
    new[:3, 3] += shift
    new[:3, 2] += shear * new[:3, 0] / SIZES[0] * SIZES[2]
    return new


def save(path, qform=AFFINE, sform=AFFINE, codes=(1, 1), edit=None, data=DATA, cls="Nifti1Image", **header):
    """edit: {byte of the header: (struct format, value)}."""
    nibabel = pytest.importorskip("nibabel")
    kind = getattr(nibabel, cls)
    image = kind(data, None, kind.header_class(**header))
    if qform is not None:
        image.set_qform(qform, codes[0])
    image.set_sform(sform, codes[1] if sform is not None else 0)
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    for at, (form, value) in (edit or {}).items():
        struct.pack_into(form, raw, at, value)
    path.write_bytes(raw)
    return path


def read(path, **reading):
    said = []
    array, grid = io.read_image(path, Reading(**reading), said.append)
    return array, grid, said


def lies_at(grid, affine):
    """Whether voxels lie where a RAS affine says."""
    index = np.array([[0, 0, 0], [6, 0, 0], [0, 5, 4], [6, 5, 4], [1, 2, 3]])
    points = np.column_stack([index, np.ones(len(index))]) @ (LPS @ affine)[:3].T
    return np.abs(grid.to_physical(index[:, ::-1]) - points).max() < 2e-4


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1)])
def test_two_places(tmp_path, codes):
    other = form_at((20, 0, 1))
    path = save(tmp_path / "a.nii", sform=other, codes=codes)
    array, grid, said = read(path)
    np.testing.assert_array_equal(array, DATA.T)
    assert lies_at(grid, AFFINE)
    assert said == [
        f"{path}: its qform and its sform place it differently, by 20 mm; read by the qform, --affine-source sform takes the other"
    ]
    _, grid, said = read(path, affine_source="sform")
    assert lies_at(grid, other)
    assert said == []


def test_places_that_agree_or_stand_alone(tmp_path):
    near = form_at((0.0005, 0, 0))
    for name, given, wanted in [
        ("near", {"sform": near}, near),
        ("qform", {"sform": None}, AFFINE),
        ("sform", {"qform": None}, AFFINE),  # whose pixdim is 1
    ]:
        path = save(tmp_path / f"{name}.nii", **given)
        for source in ("qform", "sform"):
            _, grid, said = read(path, affine_source=source)
            assert lies_at(grid, wanted), name
            assert said == [], name


def test_half_a_turn_is_not_said_to_differ(tmp_path):
    # a quaternion in single precision cannot hold these
    for angle in (1e-4, 3e-4, 1e-3, 1e-2):
        c, s = np.cos(angle), np.sin(angle)
        affine = np.diag([-1, -1, 1, 1.0])
        affine[:2, :2] = [[-c, s], [-s, -c]]
        data = np.zeros((200, 3, 3), np.int16)
        data[0] = 1
        assert read(save(tmp_path / "a.nii", qform=affine, sform=affine, data=data))[2] == []


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("flip", [1, -1])
def test_order_and_handedness(tmp_path, order, flip):
    affine = AFFINE.copy()
    affine[:3, 0] *= flip
    for forms in ({"sform": None}, {"qform": None}):
        path = save(tmp_path / "a.nii", **{"qform": affine, "sform": affine, **forms}, endianness=order)
        array, grid, said = read(path)
        assert lies_at(grid, affine)
        np.testing.assert_array_equal(array, DATA.T)
        assert said == []


def test_units(tmp_path):
    for unit, scale, word in ((1, 1e3, "metres"), (3, 1e-3, "microns")):
        affine = AFFINE.copy()
        affine[:3] *= scale
        _, grid, said = read(save(tmp_path / "a.nii", edit={123: ("<B", unit)}))
        np.testing.assert_allclose(grid.spacing, np.multiply(SIZES, scale), rtol=1e-5)
        np.testing.assert_allclose(grid.origin, (LPS @ affine)[:3, 3], rtol=1e-5)
        assert len(said) == 1
        assert word in said[0]


def test_headers_that_say_little(tmp_path):
    _, grid, said = read(save(tmp_path / "a.nii", qform=None, sform=None))
    assert grid.origin == (0, 0, 0)
    assert len(said) == 1
    assert "does not say where it lies" in said[0]
    _, grid, said = read(save(tmp_path / "b.nii", edit={80: ("<f", -1.5)}))
    assert lies_at(grid, AFFINE)  # as nibabel and the standard's own code
    assert len(said) == 1
    assert "pixdim" in said[0]
    for slope in (0.0, np.nan, np.inf):
        array = read(save(tmp_path / "c.nii", edit={112: ("<f", slope)}))[0]
        np.testing.assert_array_equal(array, DATA.T)
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.AnalyzeImage(DATA, np.diag([*SIZES, 1])), tmp_path / "d.img")
    array, grid, said = read(tmp_path / "d.img")
    np.testing.assert_array_equal(array, DATA.T)
    assert len(said) == 1
    assert "nor which side is left" in said[0]


def test_sheared(tmp_path):
    path = save(tmp_path / "a.nii", qform=None, sform=form_at(shear=0.05))
    with pytest.raises(InputError, match=r"its sform is sheared by 2.86 degrees.*--tilt resample"):
        read(path)
    # linear along x, so that interpolation is exact
    index = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)
    sheared = form_at(shear=0.05)
    axis = AFFINE[:3, 0] / SIZES[0]
    ramp = (index @ sheared[:3, :3].T + sheared[:3, 3]) @ axis
    for qform in (None, AFFINE):
        path = save(tmp_path / "b.nii", qform=qform, sform=sheared, data=ramp.astype(np.float32))
        array, grid, _ = read(path, tilt="resample", affine_source="sform")
        points = grid.to_physical(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
        own = (points @ LPS[:3, :3] - sheared[:3, 3]) @ np.linalg.inv(sheared[:3, :3]).T
        inside = ((own > -1e-4) & (own < np.array(SIZE) - 1 + 1e-4)).all(-1)
        assert inside.sum() > 0.8 * DATA.size
        np.testing.assert_allclose(array[inside], (points @ (LPS[:3, :3] @ axis))[inside], atol=1e-3)
    marks = (ramp > ramp.mean()).astype(np.int16) * 7
    marked = save(tmp_path / "l.nii", qform=AFFINE, sform=sheared, data=marks)
    reading = Reading(tilt="resample", affine_source="sform")
    labels = read_labels(marked, grid, path, reading)  # on the grid that the image was brought to
    assert sorted(np.unique(labels)) == [0, 7]
    assert (labels[inside] == 7 * (array > ramp.mean())[inside]).mean() > 0.9
    barely = save(tmp_path / "c.nii", qform=None, sform=form_at(shear=1e-3))
    _, grid, said = read(barely)
    assert len(said) == 1
    assert "left out" in said[0]
    assert read(save(tmp_path / "d.nii", qform=None, sform=form_at(shear=1e-4)))[2] == []
    singular = np.zeros((4, 4))
    _, grid, said = read(save(tmp_path / "f.nii", sform=singular), affine_source="sform")
    assert lies_at(grid, AFFINE)
    assert len(said) == 1
    assert "its sform is no place in space" in said[0]
    with pytest.raises(InputError, match="not usable"):
        read(save(tmp_path / "e.nii", qform=None, sform=singular))


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_sheared_axes_of_other_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    image = sitk.GetImageFromArray(DATA.T.astype(np.float32))
    image.SetSpacing(SIZES)
    sitk.WriteImage(image, str(path))
    text = path.read_text()
    for old, new in (("= 1 0 0 0 1 0 0 0 1", "= 1 0 0 0 1 0 0.2 0 1"), ("(0,0,3)", "(0.6,0,3)")):
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(InputError, match=r"its axes are sheared by 11.\d degrees.*--tilt resample"):
        read(path)
    _, grid, _ = read(path, tilt="resample")
    axes = np.reshape(grid.direction, (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    sheared = Geometry(SIZE, SIZES, (0, 0, 0), (1, 0, 0.2, 0, 1, 0, 0, 0, 1))
    with pytest.raises(InputError, match="sheared"):
        io.write_image(tmp_path / "b.nii.gz", DATA.T, sheared)


def test_oblique_picture_is_a_slice_in_space(tmp_path):
    """Its pixels keep their size: of the affine, x and y alone would make them smaller."""
    nibabel = pytest.importorskip("nibabel")
    for code in ("qform", "sform"):
        image = nibabel.Nifti1Image(DATA[..., 0], AFFINE)
        image.set_sform(*((AFFINE, 1) if code == "sform" else (None, 0)))
        image.set_qform(*((AFFINE, 1) if code == "qform" else (None, 0)))
        nibabel.save(image, tmp_path / "a.nii.gz")
        array, grid, said = read(tmp_path / "a.nii.gz")
        assert said == []
        np.testing.assert_array_equal(array, DATA[..., :1].T)
        assert lies_at(grid, AFFINE)
    flat = AFFINE.copy()
    flat[:3, :3] = turned((0, 0, 0.3)) * SIZES
    nibabel.save(nibabel.Nifti1Image(DATA[..., 0], flat), tmp_path / "b.nii.gz")
    _, grid, _ = read(tmp_path / "b.nii.gz")
    assert grid.nd == 2
    np.testing.assert_allclose(grid.spacing, SIZES[:2], rtol=1e-5)


def same(path, **reading):
    array, grid, said = read(path, **reading)
    np.testing.assert_array_equal(array, DATA.T)
    assert lies_at(grid, AFFINE)
    assert said == []


def test_names_that_are_wrong(tmp_path):
    plain = save(tmp_path / "a.nii")
    shutil.copy(plain, tmp_path / "b.nii.gz")
    same(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii").write_bytes(gzip.compress(plain.read_bytes()))
    same(tmp_path / "c.nii")


def test_what_nibabel_reads(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for name in ("a.nii", "a.nii.gz"):
        image = nibabel.Nifti2Image(DATA, AFFINE)
        nibabel.save(image, tmp_path / name)
        same(tmp_path / name)
    for name in ("a.mgh", "a.mgz"):
        nibabel.save(nibabel.MGHImage(DATA, AFFINE), tmp_path / name)
        same(tmp_path / name)
    nibabel.save(nibabel.Nifti2Image(DATA[:, :, 0], np.diag([1.5, 2, 3, 1])), tmp_path / "flat.nii")
    array, grid, _ = read(tmp_path / "flat.nii")
    np.testing.assert_array_equal(array, DATA[:, :, 0].T)
    assert grid.spacing == (1.5, 2)
    nibabel.save(nibabel.MGHImage(np.stack([DATA] * 2, -1), AFFINE), tmp_path / "b.mgz")
    with pytest.raises(InputError, match="got 4 dimensions"):
        read(tmp_path / "b.mgz")
    whole = (tmp_path / "a.mgh").read_bytes()
    (tmp_path / "c.mgh").write_bytes(whole[:400])
    with pytest.raises(InputError, match="is FreeSurfer MGH, but damaged or cut short"):
        read(tmp_path / "c.mgh")


def test_without_nibabel(tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.MGHImage(DATA, AFFINE), tmp_path / "a.mgz")
    path = save(tmp_path / "a.nii", sform=form_at((20, 0, 0)))
    cut = tmp_path / "cut.nii"
    cut.write_bytes(path.read_bytes()[:-50])
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    assert "by 20 mm" in read(path)[2][0]
    with pytest.raises(
        ImportError, match=r"a.mgz: reading FreeSurfer MGH needs nibabel: pip install nibabel"
    ):
        read(tmp_path / "a.mgz")
    with pytest.raises(InputError, match="damaged"):
        read(cut)


def archive(**files):
    def write(path):
        with zipfile.ZipFile(path, "w") as out:
            for name, text in files.items():
                out.writestr(name.replace("_", "."), text)

    return write


NAMED = {
    "lfs.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer.*git lfs pull"),
    "page.nii.gz": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page: the download went wrong"),
    "page.nii": (b"\n<html lang='en'>", "a web page"),
    "s3.nii.gz": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "an XML file"),
    "x.json": (b'{"message": "no"}', "a JSON file"),
    "p.nii.gz": (b"%PDF-1.4 ...", "a PDF document"),
    "p.nii": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture under another name: rename it to end in .png"),
    "n.nii": (b"NRRD0004\ntype: short\n", "a NRRD image under another name: rename it to end in .nrrd"),
    "m.mif": (b"mrtrix image\ndim: 3,4,5\n", "an MRtrix image: convert it: mrconvert"),
    "t.tfm": (b"#Insight Transform File V1.0\n#Transform 0\n", "an ITK transform: no image; apply it with"),
    "e.txt": (b'(Transform "BSplineTransform")\n', "an elastix transform"),
    "f.mat": (b"1 0 0 2\n0 1 0 3\n0 0 1 4\n0 0 0 1\n", "a matrix of 4x4 numbers"),
    "h.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "z.nii.gz": (bytes(5000), "nothing but zeros"),
    "k.pkl": (b"\x80\x04\x95" + bytes(50), "a Python pickle"),
    "a.npy": (b"\x93NUMPY\x01\x00" + bytes(200), "a NumPy array: it does not say where it lies"),
    "g.nii.gz": (gzip.compress(bytes(range(256)) * 400)[:200], "packed by gzip, and damaged or cut short"),
    "l.npz": (archive(fixed_npy="", moving_npy=""), "a NumPy archive of fixed, moving: they do not say"),
    "s.mrb": (archive(a_nrrd="x"), "a zip archive: unpack it first"),
    "c.pt": (archive(run_data_pkl=""), "a zip archive|a PyTorch file"),
    "b.bz2": (b"BZh91AY", "an archive: unpack it"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_is_not_read_is_named(tmp_path, capfd, name):
    content, message = NAMED[name]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: is ({message})") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_itk_transforms_are_named(tmp_path):
    affine = sitk.AffineTransform(3)
    for suffix in ("tfm", "mat", "h5", "txt"):
        path = tmp_path / f"t.{suffix}"
        sitk.WriteTransform(affine, str(path))
        with pytest.raises(InputError, match=r"an ITK transform|an HDF5 file.*a transform of ITK goes to"):
            read(path)


# Images that must lie on one grid


def on(path, grid, size=SIZE):
    io.write_image(path, np.arange(np.prod(size)).reshape(size[::-1]).astype(np.int16), grid)
    return path


GRID = Geometry(SIZE, SIZES, (10.0, -20.0, 30.0), tuple(np.diag([1.0, -1, 1]).ravel()))


def moved(**changed):
    return Geometry(**{**vars(GRID), **changed})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (moved(origin=(10.0, -20.0, 31.5)), "it is 1.5 mm off at the corner where it is farthest; its origin is shifted by 0, 0, 1.5 mm"),
        (moved(origin=(-10.0, 20.0, 30.0), direction=(-1.0, 0, 0, 0, 1, 0, 0, 0, 1)), "x and y have the other sign (RAS for LPS)"),
        (moved(origin=(10.0, -30.0, 30.0), direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)), "its y axis runs the other way"),
        (moved(origin=(0.0, 0.0, 0.0)), "its origin is 0, as of a file that has lost its place"),
        (moved(spacing=(1.5, 2.0, 3.1)), "it is 0.4 mm off at the corner where it is farthest; 7x6x5 voxels of 1.5 x 2 x 3.1 mm against"),
        (moved(direction=tuple(turned().ravel())), "its axes have another direction"),
        (moved(size=(6, 7, 5)), "6x7x5 voxels of 1.5 x 2 x 3 mm against 7x6x5 voxels of 1.5 x 2 x 3 mm, its axes are in another order"),
    ],
)  # fmt: skip
def test_another_grid_is_described(tmp_path, grid, message):
    image, labels = on(tmp_path / "i.nii", GRID), on(tmp_path / "l.nii", grid, grid.size)
    with pytest.raises(InputError, match=re.escape(message)):
        read_labels(labels, io.read_image(image)[1], image)


def test_labels_that_nibabel_saved_with_the_other_place(tmp_path):
    other = form_at((20, 0, 0))
    image = save(tmp_path / "i.nii", sform=other)
    labels = save(tmp_path / "l.nii", qform=other, sform=other, codes=(2, 2))
    pair = Pair(str(image), str(image), str(labels), str(labels))
    with pytest.raises(
        InputError, match=r"it is 20 mm off at the corner.*with --affine-source sform they agree"
    ):
        read_case(pair)
    assert lies_at(read_case(pair, reading=Reading(affine_source="sform")).fixed_grid, other)


def test_what_a_net_is_trained_on_is_told_of_too(tmp_path):
    good, odd = (str(save(tmp_path / f"{k}.nii", sform=form_at((k, 0, 0)))) for k in (0, 20))
    told = []
    pairs = Pairs([Pair(good, good), Pair(good, odd)], Preprocessing(), warn=told.append)
    assert pairs[0].name
    assert told == []
    assert pairs[1].name
    assert len(told) == 1
    assert "20.nii: its qform and its sform place it differently" in told[0]
