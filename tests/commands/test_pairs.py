"""Lists of pairs, and what a net is given of them."""

import json

import numpy as np
import pytest
import torch

from fastreg import io
from fastreg.data.pairs import Pairs, find_pairs, read_case, sample_of
from fastreg.data.preprocessing import Preprocessing, View
from fastreg.io import Geometry, InputError

pytest.importorskip("SimpleITK")

GRID = Geometry.of((12, 14, 10), (2.0, 1.0, 1.5))


def write(path, seed=0, grid=GRID):
    array = np.random.default_rng(seed).random(grid.shape, dtype=np.float32)
    io.write_image(path, array, grid)
    return array


@pytest.fixture
def folder(tmp_path):
    for sub in ("images", "labels", "landmarks"):
        (tmp_path / sub).mkdir()
    for k, name in enumerate(("a_in", "a_out", "b_in", "b_out")):
        write(tmp_path / "images" / f"{name}.nii.gz", k)
        io.write_image(tmp_path / "labels" / f"{name}.nii.gz", np.ones(GRID.shape, np.uint8), GRID)
        io.write_landmarks(tmp_path / "landmarks" / f"{name}.csv", [[1.0, 2.0, 3.0]])
    return tmp_path


def test_folder(folder):
    assert len(find_pairs(folder, "inter")) == 12
    intra = find_pairs(folder, "intra")
    assert [p.name for p in intra] == [
        "a_out.nii.gz → a_in.nii.gz", "a_in.nii.gz → a_out.nii.gz",
        "b_out.nii.gz → b_in.nii.gz", "b_in.nii.gz → b_out.nii.gz",
    ]  # fmt: skip
    assert intra[0].fixed_labels == str(folder / "labels" / "a_in.nii.gz")
    assert intra[0].moving_landmarks == str(folder / "landmarks" / "a_out.csv")
    (folder / "labels" / "b_in.nii.gz").unlink()
    assert find_pairs(folder, "intra")[2].fixed_labels is None
    with pytest.raises(InputError, match="one-shot takes two images, got 4"):
        find_pairs(folder, "one-shot")
    # without images/ the images themselves
    assert len(find_pairs(folder / "images", "inter")) == 12


def test_series(tmp_path):
    """Each series by itself: the image whose mean intensity is nearest to the mean of all is fixed, whichever it is by name."""
    for name, bright in (
        ("a_t0", 0),
        ("a_t1", 5),
        ("a_t2", 6),
        ("a_t9", 7),
        ("b7", 3),
        ("b8", 1),
        ("b12", 2),
    ):
        array = np.random.default_rng(0).random(GRID.shape, dtype=np.float32) + bright
        io.write_image(tmp_path / f"{name}.nii.gz", array, GRID)
    found = [p.name.replace(".nii.gz", "") for p in find_pairs(tmp_path, "series")]
    assert found == ["a_t0 → a_t1", "a_t2 → a_t1", "a_t9 → a_t1", "b7 → b12", "b8 → b12"]
    write(tmp_path / "c_1.nii.gz")
    with pytest.raises(InputError, match=r"a series takes at least two images, got one: c_1.nii.gz"):
        find_pairs(tmp_path, "series")
    write(tmp_path / "c_2.nii.gz", 1, Geometry.of((12, 14, 9), (2.0, 1.0, 1.5)))
    with pytest.raises(
        InputError, match=r"c_2.nii.gz: must lie on the grid of .*c_1.nii.gz, as an image of one"
    ):
        find_pairs(tmp_path, "series")


def test_csv(folder):
    table = folder / "pairs.csv"
    table.write_text(
        "fixed, moving, fixed_labels, moving_labels, mask\n"
        "images/a_in.nii.gz, images/a_out.nii.gz, labels/a_in.nii.gz, labels/a_out.nii.gz,\n"
        "images/b_in.nii.gz, images/a_in.nii.gz,,, labels/b_in.nii.gz\n",
        encoding="utf-8",
    )
    first, second = find_pairs(table)
    assert first.fixed == str(folder / "images" / "a_in.nii.gz")
    assert first.mask is None
    assert second.fixed_labels is None
    assert read_case(second).mask is not None
    with pytest.raises(InputError, match="one-shot takes one pair, got 2"):
        find_pairs(table, "one-shot")


def names(tmp_path, *files):
    """Empty files; find_pairs looks at names alone."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).touch()


# Images, what belongs to them, and its kind.
CONVENTIONS = {
    "alike": (["images/a.nii.gz", "images/b.nii.gz"], ["labels/a.nii.gz", "labels/b.nii.gz"], "labels"),
    "other extensions": (["images/a.nii.gz", "images/b.mha"], ["labels/a.mha", "labels/b.nrrd"], "labels"),
    "_seg": (["images/a.nii.gz", "images/b.nii.gz"], ["labels/a_seg.nii.gz", "labels/b_SEG.nii.gz"], "labels"),
    "-label": (["images/a.nii", "images/b.nii"], ["labels/a-label.nii", "labels/b_labels.nii"], "labels"),
    "nnU-Net": (["imagesTr/a_1_0000.nii.gz", "imagesTr/a_2_0000.nii.gz"], ["labelsTr/a_1.nii.gz", "labelsTr/a_2.nii.gz"], "labels"),
    "Learn2Reg": (["imagesTr/L_0001_0000.nii.gz", "imagesTr/L_0001_0001.nii.gz"], ["labelsTr/L_0001_0000.nii.gz", "labelsTr/L_0001_0001.nii.gz"], "labels"),
    "Learn2Reg's keypoints": (["imagesTr/L_0001_0000.nii.gz", "imagesTr/L_0001_0001.nii.gz"], ["keypointsTr/L_0001_0000.csv", "keypointsTr/L_0001_0001.csv"], "landmarks"),
    "BIDS": (["images/sub-1_T1w.nii.gz", "images/sub-2_T1w.nii.gz"], ["labels/sub-1_desc-aseg_dseg.nii.gz", "labels/sub-2_dseg.nii.gz"], "labels"),
    "BTCV": (["images/img0001.nii.gz", "images/img0002.nii.gz"], ["labels/label0001.nii.gz", "labels/label0002.nii.gz"], "labels"),
    "LiTS": (["images/volume-0.nii", "images/volume-10.nii"], ["labels/segmentation-0.nii", "labels/segmentation-10.nii"], "labels"),
    "beside each other": (["a.nii.gz", "b.nii.gz"], ["a_seg.nii.gz", "b_mask.nii.gz"], "labels"),
    "Slicer": (["images/a.nrrd", "images/b.nrrd"], ["landmarks/a.mrk.json", "landmarks/b_landmarks.fcsv"], "landmarks"),
    "the longer name": (["images/a.nii", "images/a_ct.nii"], ["labels/a_seg.nii", "labels/a_ct_seg.nii"], "labels"),
}  # fmt: skip


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_names_of_labels_and_landmarks(tmp_path, convention):
    images, files, kind = CONVENTIONS[convention]
    names(tmp_path, *images, *files)
    told = []
    first, second = find_pairs(tmp_path, warn=told.append)
    expected = [str(tmp_path / f) for f in files]
    assert [first.fixed, first.moving] == [str(tmp_path / f) for f in images]
    assert [getattr(first, f"{side}_{kind}") for side in ("fixed", "moving")] == expected
    assert [getattr(second, f"{side}_{kind}") for side in ("moving", "fixed")] == expected
    assert told == []


def test_labels_that_are_missing_are_told(tmp_path):
    names(tmp_path, "images/a.nii", "images/b.nii", "images/c.nii", "labels/README.md", "labels/a_seg.nii")
    names(tmp_path, "labels/d.nii", "labels/b.nii", "landmarks/x", "masksTr/a.nii", "masks/b.nii")
    (tmp_path / "landmarks/x").unlink()
    told = []
    pairs = find_pairs(tmp_path, warn=told.append)
    assert told == [
        f"{tmp_path}/labels: nothing for 1 of 3 images (c.nii), and d.nii of no image",
        f"{tmp_path}/landmarks: is empty",
        f"{tmp_path}/masks: nothing for 2 of 3 images (a.nii, c.nii)",
    ]
    assert sum(p.fixed_labels is not None for p in pairs) == 2
    assert [p.mask is not None for p in pairs] == [p.fixed.endswith("b.nii") for p in pairs]
    assert [p.moving_mask is not None for p in pairs] == [p.moving.endswith("b.nii") for p in pairs]
    for file in ("a_seg", "b", "d"):
        (tmp_path / f"labels/{file}.nii").rename(tmp_path / f"labels/{file}_of_someone.vol")
    with pytest.raises(
        InputError,
        match=r"none of its 4 files \(README.md, .*, \.\.\.\) is named as one of the images \(a.nii, b.nii, c.nii\)",
    ):
        find_pairs(tmp_path)  # fmt: skip


def test_labels_that_may_belong_to_two_are_refused(tmp_path):
    names(tmp_path, "images/a.nii", "images/b.nii", "labels/a_seg.nii", "labels/a_mask.nii", "labels/b.nii")
    with pytest.raises(InputError, match=r"a_mask.nii, a_seg.nii may all belong to a.nii"):
        find_pairs(tmp_path)
    names(tmp_path / "2", "images/a_ct.nii", "images/a_mr.nii", "labels/a.nii")
    with pytest.raises(InputError, match=r"a.nii may belong to a_ct.nii, a_mr.nii"):
        find_pairs(tmp_path / "2")


def test_the_list_of_a_data_set(tmp_path):
    files = [f"imagesTr/L_{k}_000{t}.nii.gz" for k in range(3) for t in range(2)]
    labels = [f.replace("images", "labels") for f in files]
    names(tmp_path, *files, *labels)
    pair = [{"fixed": f"./{files[2 * k]}", "moving": f"./{files[2 * k + 1]}"} for k in range(3)]
    content = {
        "training": [{"image": f"./{f}", "label": f"./{n}"} for f, n in zip(files, labels, strict=True)]
    }
    path = tmp_path / "L_dataset.json"
    path.write_text(json.dumps({**content, "training_paired_images": pair, "registration_val": pair[2:]}))
    trained = find_pairs(path)
    assert [(p.fixed, p.moving) for p in trained] == [
        (str(tmp_path / files[2 * k]), str(tmp_path / files[2 * k + 1])) for k in range(2)
    ]
    assert trained[1].moving_labels == str(tmp_path / labels[3])
    (held,) = find_pairs(path, validation=True)
    assert held.fixed == str(tmp_path / files[4])
    path.write_text(json.dumps(content))
    assert len(find_pairs(path)) == 30
    assert len(find_pairs(path, "intra")) == 6
    for bad, message in (
        ("[", "not JSON"),
        ("{}", "lists no pairs"),
        ('{"training": 3}', "training must be a list, got int"),
        ('{"registration_val": [{"fixed": "a"}]}', "entry 1 of registration_val must name fixed and moving"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=message):
            find_pairs(path)


HEADER = "fixed,moving,fixed_labels,moving_labels,mask\n"
IMAGES = "images/a_in.nii.gz,images/a_out.nii.gz"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the header must name fixed and moving"),
        ("fixed;moving\na;b\n", "the header must name fixed and moving"),
        ("fixed,moving,label\n", "the header must name"),
        (HEADER, "lists no pairs"),
        (HEADER + f"{IMAGES},labels/a_in.nii.gz,,\n", "line 2 must name labels of both images or of none"),
        (HEADER + "images/a_in.nii.gz,,,,\n", "line 2 must name a fixed and a moving image"),
        (
            HEADER + f"{IMAGES},,,,,,\n",
            "line 2 must name a fixed and a moving image, and have a field a column",
        ),
        (HEADER + "images/a_in.nii.gz,images/none.nii.gz,,,\n", "none.nii.gz: no such file"),
        (HEADER + f"{IMAGES},,,no.nii.gz\n", r"no.nii.gz: no such file \(mask of"),
    ],
)
def test_bad_csv(folder, text, message):
    (folder / "pairs.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        find_pairs(folder / "pairs.csv")


def test_bad_places(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_pairs(tmp_path / "none")
    with pytest.raises(InputError, match="at least two images, got 0"):
        find_pairs(tmp_path)
    write(tmp_path / "a.nii.gz"), write(tmp_path / "b.nii.gz")
    with pytest.raises(InputError, match="agree up to the last"):
        find_pairs(tmp_path, "intra")
    with pytest.raises(InputError, match="task must be"):
        find_pairs(tmp_path, "both")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a csv file"):
        find_pairs(tmp_path / "bytes.csv")


def test_samples(folder):
    pairs = Pairs(find_pairs(folder, "intra"), Preprocessing(), ndim=3)
    assert len(pairs) == 4
    sample = pairs[0]
    assert sample.fixed.shape == (1, 1, *GRID.shape)
    assert sample.fixed.dtype == torch.float32
    assert (sample.fixed.min(), sample.fixed.max()) == (0, 1)
    assert sample.mask is None
    assert pairs[0] is sample
    with pytest.raises(InputError, match="the net registers 2D images, got 3D"):
        Pairs(find_pairs(folder, "intra"), Preprocessing(), ndim=2)[0]


# What a net is given


def test_intensities():
    array = np.linspace(-500, 1500, 4096).reshape(16, 16, 16)
    scaled = Preprocessing("minmax").scaled(array)
    np.testing.assert_allclose(scaled, np.linspace(0, 1, 4096).reshape(scaled.shape), atol=1e-6)
    scaled = Preprocessing().scaled(array)
    low, high = np.percentile(array, [0.5, 99.5])
    np.testing.assert_allclose(scaled, np.clip((array - low) / (high - low), 0, 1), atol=1e-6)
    scaled = Preprocessing((-1000, 0)).scaled(array)
    assert scaled.max() == 1
    assert scaled.min() == pytest.approx(0.5)
    scaled = Preprocessing("zscore").scaled(array)
    assert abs(scaled.mean()) < 1e-3
    assert np.abs(Preprocessing("zscore").scaled(np.r_[array.ravel(), 1e6].reshape(1, -1))).max() == 2
    with pytest.raises(InputError, match="must not be constant between the intensities 2000 and 3000"):
        Preprocessing((2000, 3000)).scaled(array)
    # almost nothing but background: percentiles would see none of it
    spot = np.zeros((16, 16, 16))
    spot[0, 0, 0] = 5
    assert Preprocessing().scaled(spot).max() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intensity": "mean"}, "intensity must be one of"),
        ({"intensity": (3, 1)}, "intensity must be one of"),
        ({"align": "bspline"}, "align must be one of none, rigid, affine"),
        ({"crop": "lungs"}, "crop must be a range for each axis or mask"),
        ({"margin": 3.0}, "margin goes with the crop to a mask"),
        ({"crop": "mask", "margin": -1.0}, "margin must be 0 mm or more"),
        ({"size": (4, 1, 4)}, "size must be at least 2"),
        ({"spacing": (1, 0, 4)}, "spacing must be positive"),
    ],
)
def test_bad_preprocessing(options, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**options)


def test_grid():
    assert Preprocessing().grid(GRID) == GRID
    cropped = Preprocessing(crop=((2, 10), (None, -4), (1, None))).grid(GRID)
    assert cropped.shape == (8, 10, 9)
    np.testing.assert_allclose(cropped.origin, GRID.to_physical((2, 0, 1)))
    sized = Preprocessing(size=(23, 14, 4)).grid(GRID)
    assert sized.spacing_zyx == pytest.approx((1.0, 1.0, 4.5))
    corner = np.array(GRID.shape) - 1
    np.testing.assert_allclose(sized.to_physical(np.array(sized.shape) - 1), GRID.to_physical(corner))
    assert Preprocessing(spacing=(1, 1, 1)).grid(GRID).shape == (23, 14, 15)
    with pytest.raises(InputError, match="size must have 3 numbers"):
        Preprocessing(size=(4, 4)).grid(GRID)
    with pytest.raises(InputError, match="crop must leave at least 2 voxels"):
        Preprocessing(crop=((5, 6), (0, 9), (0, 9))).grid(GRID)


def test_displacement_comes_back_in_voxels_of_the_fixed_image():
    """A linear field in mm is the same field on any grid."""
    grid = Preprocessing(size=(7, 9, 8), crop=((2, 11), (0, 14), (1, 9))).grid(GRID)

    def field(g):
        p = np.stack(np.meshgrid(*[np.arange(n) for n in g.shape], indexing="ij"), -1)
        mm = g.to_physical(p) @ np.array([[0.1, 0.02, 0], [0, 0.05, 0.1], [0.03, 0, -0.1]]).T + [1, 2, 3]
        voxels = mm @ np.linalg.inv(g.matrix).T
        return torch.from_numpy(np.moveaxis(voxels, -1, 0)[None]).float()

    back = View(grid, GRID).displacement(field(grid))
    inside = (slice(None), slice(None), slice(2, 11), slice(0, 14), slice(1, 9))
    torch.testing.assert_close(back[inside], field(GRID)[inside], rtol=1e-4, atol=1e-4)
    # and beyond the crop its border
    torch.testing.assert_close(back[:, :, 0], back[:, :, 2])
    u = torch.randn(1, 3, *GRID.shape)
    assert View(GRID, GRID).displacement(u) is u


def test_smaller_grids_are_smoothed():
    """A checkerboard becomes grey, not whatever voxels are hit."""
    array = np.indices((32, 32)).sum(0) % 2
    grid = Geometry.of((32, 32), (1.0, 1.0))
    image, inside = Preprocessing("minmax").image(array, grid, Preprocessing(size=(8, 8)).grid(grid))
    assert inside.all()
    assert (image - 0.5)[..., 1:-1, 1:-1].abs().max() < 1e-3


def test_other_grids_and_masks(tmp_path):
    write(tmp_path / "fixed.nii.gz")
    write(tmp_path / "moving.nii.gz", 1, Geometry.of((8, 9, 7), (2.0, 1.0, 1.5)))
    mask = np.zeros(GRID.shape, np.uint8)
    mask[:4] = 200
    io.write_image(tmp_path / "mask.nii.gz", mask, GRID)
    table = tmp_path / "pairs.csv"
    table.write_text("fixed,moving,mask\nfixed.nii.gz,moving.nii.gz,mask.nii.gz\n", encoding="utf-8")
    sample = Pairs(find_pairs(table), Preprocessing())[0]
    assert sample.moving.shape == sample.fixed.shape
    assert sample.mask[:, :, :4, :9, :7].min() == 1
    assert sample.mask[:, :, 4:].max() == 0
    assert sample.mask[:, :, :, 10:].max() == 0
    for value in (-1, 0):
        io.write_image(tmp_path / "mask.nii.gz", np.full(GRID.shape, value, np.int16), GRID)
        with pytest.raises(InputError, match="a mask must be 0 or more everywhere"):
            Pairs(find_pairs(table), Preprocessing())[0]
    io.write_image(tmp_path / "mask.nii.gz", mask, GRID)
    case = read_case(find_pairs(table)[0])
    case.mask[:] = 0
    case.mask[-1] = 1
    with pytest.raises(InputError, match="the mask is 0 wherever the moving image reaches"):
        sample_of(case, Preprocessing())
    case.moving_grid = Geometry.of((8, 9, 7), (2.0, 1.0, 1.5))
    case.moving_grid = Geometry(
        case.moving_grid.size, case.moving_grid.spacing, (900.0, 0.0, 0.0), case.moving_grid.direction
    )
    with pytest.raises(InputError, match="do not overlap"):
        sample_of(case, Preprocessing())
