"""What is done to a pair before a net sees it, and undone in what comes out: aligned, cropped, padded, matched; in a script, in
`fastreg train` and in `apply`.
"""

import csv
import doctest
import json
import os
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

import fastreg
from fastreg import cli, io
from fastreg._refusals import Missing
from fastreg.data import Case, Pairs, Preprocessing, alignment, find_alignment, find_pairs
from fastreg.data.alignment import Alignments
from fastreg.data.pairs import sample_of
from fastreg.data.preprocessing import View
from fastreg.io import Geometry, InputError
from fastreg.training import Net, checkpoint
from fastreg.training.build import regridded

pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")


def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s], [s, c]])


def oblique(shape, spacing, origin=(0.0, 0.0), degrees=0.0):
    return Geometry(shape[::-1], spacing[::-1], origin, tuple(turned(degrees).ravel().tolist()))


# Of a scene that is smooth and nowhere alike, in mm: what any grid sees of it.
RNG = np.random.default_rng(0)
CENTRES, WIDTHS = RNG.uniform(-10, 70, (60, 2)), RNG.uniform(3, 8, 60)
FIXED = oblique((48, 44), (1.0, 1.25), (5.0, -3.0), 10.0)
MOVING = oblique((50, 40), (1.2, 1.4), (2.0, -6.0), -5.0)
MATRIX = np.concatenate(
    [turned(6.0) @ np.diag([1.05, 0.95]), [[3.0], [-4.0]]], 1
)  # of fixed points to moving ones
BEND = np.array([[0.06, 0.09], [-0.09, 0.03]])
WINDOW = (-3.0, 3.0)  # of intensities that mean the same in both


def points(grid):
    """(*shape, nd) mm."""
    return grid.to_physical(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))


def scene(p):
    near = np.exp(-((p[..., None, :] - CENTRES) ** 2).sum(-1) / (2 * WIDTHS**2))
    return near @ np.linspace(-1, 1, len(CENTRES))


def affine(p):
    return p @ MATRIX[:, :2].T + MATRIX[:, 2]


def pair(bend=0.0):
    """A Case of which a fixed point p belongs to affine(p + bend * BEND (p - centre)), and the fixed points' motion in voxels."""
    linear = np.eye(2) + bend * BEND
    shift = -bend * BEND @ FIXED.centre
    forth = np.concatenate([MATRIX[:, :2] @ linear, (affine(shift))[:, None]], 1)
    back = np.linalg.inv(forth[:, :2])
    moving = scene((points(MOVING) - forth[:, 2]) @ back.T)
    motion = points(FIXED) @ forth[:, :2].T + forth[:, 2] - points(FIXED)
    u = torch.from_numpy(np.moveaxis(motion @ np.linalg.inv(FIXED.matrix).T, -1, 0)[None]).float()
    return Case("scene", scene(points(FIXED)), FIXED, moving, MOVING), u


def off(u, truth, where=(slice(6, -6), slice(6, -6))):
    """mm between two displacements on the fixed grid, at most, away from its rim."""
    mm = np.einsum("ij,j...->i...", FIXED.matrix, (u - truth)[0].double().numpy())
    return np.linalg.norm(mm, axis=0)[where].max()


# Grids


def test_cut_out_of_the_centre_without_interpolation():
    """So many voxels of the image's own size are its voxels; of another size they lie about its centre."""
    case, _ = pair()
    case.moving, case.moving_grid = case.fixed + 1, FIXED
    sample, view = sample_of(case, Preprocessing("minmax", size=(31, 20), spacing=(1.0 + 1e-8, 1.25)))
    part = Preprocessing("minmax").scaled(case.fixed)[8:39, 12:32]
    np.testing.assert_allclose(sample.fixed[0, 0], part, atol=1e-12)
    np.testing.assert_allclose(sample.moving[0, 0], part, atol=1e-6)
    assert sample.mask is None
    assert view.grid.spacing == FIXED.spacing
    other = Preprocessing(size=(9, 10), spacing=(2.0, 3.0), crop=((4, 40), (0, 30))).grid(FIXED)
    assert (other.shape, other.spacing_zyx) == ((9, 10), (2.0, 3.0))
    np.testing.assert_allclose(other.centre, FIXED.to_physical((21.5, 14.5)))


def test_padding_is_the_border_and_counts_nothing():
    case, _ = pair()
    case.moving, case.moving_grid = case.fixed, FIXED
    sample, view = sample_of(case, Preprocessing("minmax", size=(64, 30), spacing=(1.0, 1.25)))
    whole = Preprocessing("minmax").scaled(case.fixed)[:, 7:37]
    np.testing.assert_allclose(sample.fixed[0, 0, 8:-8], whole, atol=1e-12)
    np.testing.assert_allclose(sample.fixed[0, 0, 0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(sample.mask[0, 0, :, 0], np.repeat([0, 1, 0], [8, 48, 8]))
    u = torch.zeros(1, 2, *view.grid.shape)
    u[0, 0] = torch.arange(64.0)[:, None]
    torch.testing.assert_close(view.displacement(u)[0, 0, :, 3], torch.arange(8.0, 56.0))


def test_crop_to_the_box_of_both_masks():
    case, _ = pair()
    case.mask = np.zeros(FIXED.shape, np.uint8)
    case.mask[20:30, 15:25] = 1
    crop = Preprocessing(crop="mask")
    assert sample_of(case, crop)[1].grid.shape == (10, 10)
    assert sample_of(case, Preprocessing(crop="mask", margin=2.6))[1].grid.shape == (16, 16)
    assert sample_of(case, Preprocessing(crop="mask", margin=1e6))[1].grid.shape == FIXED.shape
    # what the moving one's mask holds, where the matrix lays it: with the affine motion undone, the fixed one's own place
    view = View(FIXED, FIXED, MATRIX)
    case.moving_mask = np.zeros(MOVING.shape, np.uint8)
    within, at = np.rint(MOVING.to_index(affine(FIXED.to_physical([(25.0, 20.0), (40.0, 30.0)])))).astype(int)
    case.moving_mask[tuple(within)] = case.moving_mask[tuple(at)] = 1
    aligned = Preprocessing(crop="mask", align="affine")
    laid = sample_of(case, aligned, alignments=lambda case, kind: MATRIX)[1]
    assert laid.laid(MOVING) == view.laid(MOVING)
    low, high = (FIXED.to_index(laid.grid.to_physical(p)) for p in ((0, 0), np.array(laid.grid.shape) - 1))
    np.testing.assert_allclose(low, (20, 15), atol=1e-6)
    np.testing.assert_allclose(high, (40, 30), atol=1.01)
    case.mask = None
    case.moving_mask[:] = 0
    case.moving_mask[tuple(at)] = 1
    assert min(sample_of(case, aligned, alignments=lambda case, kind: MATRIX)[1].grid.shape) >= 2
    case.moving_mask = None
    with pytest.raises(
        InputError, match="scene: the crop is to the box of the masks, and neither image has one"
    ):
        sample_of(case, crop)


# The way back


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(WINDOW, align="affine"),
        Preprocessing(WINDOW, align="affine", size=(30, 28)),
        Preprocessing(WINDOW, align="affine", size=(40, 52), spacing=(1.5, 1.1)),
        Preprocessing(WINDOW, align="affine", crop=((3, -2), (1, None)), spacing=(1.3, 0.9)),
    ],
    ids=["aligned", "resampled", "padded", "cropped"],
)
def test_known_motion_comes_back_in_voxels_of_the_fixed_image(preprocessing):
    """What moves p to p + B(p) on the net's grid, and then by the matrix, is the known motion on the image's own."""
    case, truth = pair(bend=1.0)
    sample, view = sample_of(case, preprocessing, alignments=lambda case, kind: MATRIX)
    mm = (points(view.grid) - FIXED.centre) @ BEND.T
    u = torch.from_numpy(np.moveaxis(mm @ np.linalg.inv(view.grid.matrix).T, -1, 0)[None]).float()
    assert off(view.displacement(u), truth) < 1e-3
    # and it is what lays the sample's moving image on its fixed one
    moved = fastreg.warp(sample.moving, u)
    inner = (..., slice(9, -9), slice(9, -9))
    before = (sample.moving - sample.fixed)[inner].abs().mean()
    assert (moved - sample.fixed)[inner].abs().mean() < 0.25 * before


@pytest.mark.parametrize(
    "options",
    [
        {"align": "affine", "size": (44, 40), "spacing": (1.0, 1.0)},
        {"size": (40, 36)},
        {"crop": "mask", "margin": 6.0},
    ],
    ids=["aligned, cut out", "resampled", "mask"],
)
def test_what_is_found_on_the_nets_grid_is_the_motion(options):
    """With fastreg.register in the net's place."""
    case, truth = pair(bend=1.0)
    case.mask = np.zeros(FIXED.shape, np.uint8)
    case.mask[8:-8, 8:-8] = 1
    if options.get("crop") is None:
        case.mask = None
    sample, view = sample_of(case, Preprocessing(WINDOW, **options))
    found = fastreg.register(
        sample.fixed,
        sample.moving,
        spacing=view.grid.spacing_zyx,
        mask=sample.mask,
        affine=True,
        similarity="mse",
        levels=2,
    )
    inner = (slice(12, -12), slice(12, -12))
    u = view.displacement(found.displacement)
    assert u.shape == truth.shape
    assert off(torch.zeros_like(u), truth, inner) > 3
    assert off(u, truth, inner) < 0.8  # a part of a voxel


# Alignment


def test_alignment_is_registers():
    case, truth = pair()
    matrix = find_alignment(case)
    corners = FIXED.to_physical([(0, 0), (47, 0), (0, 43), (47, 43)])
    np.testing.assert_allclose(
        corners @ matrix[:, :2].T + matrix[:, 2], affine(corners), atol=0.7
    )  # half a voxel
    u = View(FIXED, FIXED, matrix).displacement(torch.zeros(1, 2, *FIXED.shape))
    assert off(u, truth) < 0.5
    rigid = find_alignment(case, "rigid")
    assert io.is_rigid(rigid)
    assert doctest.testmod(alignment).failed == 0
    with pytest.raises(InputError, match="an alignment must be rigid or affine, got none"):
        find_alignment(case, "none")
    case.moving_mask = np.zeros(MOVING.shape, np.uint8)
    case.moving_mask[0, 0] = 1
    case.mask = np.zeros(FIXED.shape, np.uint8)
    case.mask[24, 22] = 1
    with pytest.raises(InputError, match="nothing in common"):
        find_alignment(case)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two images in files, of which one is the other, turned and shifted; with landmarks."""
    monkeypatch.chdir(tmp_path)
    case, _ = pair()
    io.write_image("fixed.nii.gz", case.fixed.astype(np.float32), FIXED)
    io.write_image("moving.nii.gz", case.moving.astype(np.float32), MOVING)
    marks = FIXED.to_physical(np.random.default_rng(1).uniform(8, 34, (6, 2)))
    io.write_landmarks("fixed.csv", marks)
    io.write_landmarks("moving.csv", affine(marks))
    lines = "fixed,moving,fixed_landmarks,moving_landmarks\nfixed.nii.gz,moving.nii.gz,fixed.csv,moving.csv\n"
    (tmp_path / "pairs.csv").write_text(lines, encoding="utf-8")
    return tmp_path


def counted(monkeypatch, matrix=MATRIX):
    """Alignments that are found from here on."""
    calls = []
    monkeypatch.setattr(alignment, "find_alignment", lambda case, kind: calls.append(kind) or matrix)
    return calls


def test_found_once_a_pair(folder, monkeypatch):
    calls = counted(monkeypatch)
    made = lambda **options: Pairs(find_pairs("pairs.csv"), Preprocessing(align="affine"), **options)  # noqa: E731
    pairs = made(keep=0)
    assert torch.equal(pairs[0].moving, pairs[0].moving)
    assert calls == ["affine"]
    assert len(made(cache="kept")) == 1
    for _ in range(2):
        assert torch.equal(made(cache="kept")[0].moving, pairs[0].moving)
    assert calls == ["affine"] * 2
    (file,) = os.listdir("kept")
    stored = json.loads((folder / "kept" / file).read_text(encoding="utf-8"))
    assert stored["pair"] == "moving.nii.gz → fixed.nii.gz"
    assert stored["matrix_lps_mm"] == MATRIX.tolist()
    # another kind, another image, a damaged file: anew
    Pairs(find_pairs("pairs.csv"), Preprocessing(align="rigid"), cache="kept")[0]
    assert calls[2:] == ["rigid"]
    for damage in ("", "[1]", json.dumps({**stored, "matrix_lps_mm": [[1, 2], [3, 4]]})):
        (folder / "kept" / file).write_text(damage, encoding="utf-8")
        made(cache="kept")[0]
    assert calls[3:] == ["affine"] * 3
    assert json.loads((folder / "kept" / file).read_text(encoding="utf-8")) == stored
    io.write_image("moving.nii.gz", pair(1.0)[0].moving.astype(np.float32), MOVING)
    made(cache="kept")[0]
    assert len(calls) == 7
    Alignments("elsewhere", write=False)(pair()[0], "affine")
    assert not os.path.exists("elsewhere")


TINY = ["--method", "voxelmorph", "--threads", "1", "--quiet"]
for setting in ("encoder=(2,2,2,2)", "decoder=(2,2,2,2,2,2)", "similarity=mse"):
    TINY += ["--set", setting]


def train(*options, steps="2"):
    return cli.main(["train", *TINY, "--pairs", "pairs.csv", "-o", "run", "--steps", steps, *options])


def apply(*options):
    images = [
        "fixed.nii.gz",
        "moving.nii.gz",
        "--fixed-landmarks",
        "fixed.csv",
        "--moving-landmarks",
        "moving.csv",
    ]
    command = [
        "apply",
        "--weights",
        "run/best.pt",
        *images,
        "-o",
        "out",
        "--force",
        "--quiet",
        "--no-picture",
    ]
    return cli.main([*command, *options])


def line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_trained_validated_and_applied_alike(folder, capsys, monkeypatch):
    assert train("--align", "affine", "--size", "32,40", "--spacing", "1.5,1.5", "--match-histograms") == 0
    stored = checkpoint.load("run/best.pt")["preprocessing"]
    assert (stored["align"], stored["size"], stored["spacing"]) == ("affine", (32, 40), (1.5, 1.5))
    assert stored["match_histograms"]
    with open("run/validation.csv", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["tre_before"]) > 3
    assert float(row["tre"]) < 0.5  # a net that moves next to nothing, after the matrix
    (file,) = os.listdir("run/alignments")
    matrix = json.loads((folder / "run" / "alignments" / file).read_text(encoding="utf-8"))["matrix_lps_mm"]
    monkeypatch.setattr(alignment, "find_alignment", lambda *_: pytest.fail("is known"))
    assert apply() == 0
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["affine"]["matrix_lps_mm"] == matrix
    assert report["tre"]["after"]["mean"] == pytest.approx(float(row["tre"]), abs=1e-4)
    assert report["preprocessing"]["align"] == "affine"
    u, grid = io.read_displacement("out/displacement.nii.gz")
    assert grid.matches(FIXED)
    assert off(u, pair()[1]) < 0.5
    moved, _ = io.read_image("out/moved.nii.gz")
    assert np.abs(moved - pair()[0].fixed)[8:-8, 8:-8].max() < 0.2
    assert cli.main(["train", "--resume", "-o", "run", "--align", "rigid"]) == 2
    assert "was started with --align affine, and cannot be resumed with rigid" in line(capsys)
    assert cli.main(["train", "--resume", "-o", "run", "--steps", "3", "--quiet"]) == 0


def test_a_net_on_the_pair_alone(folder):
    options = [*TINY, "--align", "affine", "--steps", "1", "--no-picture"]
    assert cli.main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", *options]) == 0
    assert os.path.exists("out/affine.tfm")
    assert off(io.read_displacement("out/displacement.nii.gz")[0], pair()[1]) < 0.5


# Another grid than in training


def test_applied_on_another_grid(folder, capsys):
    assert train("--size", "24,24", "--crop", "2:,:-2") == 0
    assert apply("--size", "40,36") == 0
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["preprocessing"]["size"] == [40, 36]
    assert report["preprocessing"]["crop"] == [[2, None], [None, -2]]
    model = checkpoint.build(checkpoint.load("run/best.pt"), "best.pt")
    case, _ = pair()
    case.fixed, case.moving = case.fixed.astype(np.float32), case.moving.astype(np.float32)
    crop = ((2, None), (None, -2))
    sample, view = sample_of(case, Preprocessing(crop=crop, size=(40, 36)))
    with torch.no_grad():
        u = view.displacement(model(sample.fixed, sample.moving).displacement)
    torch.testing.assert_close(io.read_displacement("out/displacement.nii.gz")[0], u, rtol=1e-3, atol=1e-5)
    assert apply("--spacing", "2,2", "--crop", ":,:") == 0
    assert apply("--crop", "mask") == 2
    assert "neither image has one" in line(capsys)
    assert apply("--margin", "3") == 2
    assert "margin goes with the crop to a mask" in line(capsys)
    assert cli.main(["apply", "--field", "u.nii.gz", "moving.nii.gz", "-o", "x", "--size", "3,3"]) == 2
    assert "--size goes with --weights" in line(capsys)


@pytest.mark.parametrize("method", ["lindef", "r2n2"])
def test_what_answers_in_units_of_the_extent_stays_on_its_grid(method):
    stored = Preprocessing(size=(32, 32), align="affine")
    assert regridded(stored, Net(method)) is stored
    assert regridded(stored, Net(method, size="32,32")) == stored
    with pytest.raises(InputError, match=f"--size: {method} answers in units of the image's extent"):
        regridded(stored, Net(method, size="48,32"))
    other = regridded(stored, Net("voxelmorph", spacing="1,2"))
    assert other == Preprocessing(spacing=(1.0, 2.0), align="affine")
    masked = Preprocessing(crop="mask", margin=2.0, size=(9, 9))
    assert regridded(masked, Net("rrn", margin=5.0)) == Preprocessing(crop="mask", margin=5.0, size=(9, 9))
    assert regridded(masked, Net("rrn", crop="1:,:")) == Preprocessing(
        crop=((1, None), (None, None)), size=(9, 9)
    )


def test_the_papers_input():
    """Cut out where the paper says of which voxels, resampled to otherwise."""
    f3rnet = Net("f3rnet", size="paper").preprocessing()
    assert (f3rnet.size, f3rnet.spacing) == ((128, 144, 144), (1, 1, 1))
    assert Net("f3rnet", size="paper", spacing="2,2,2").preprocessing().spacing == (2.0, 2.0, 2.0)
    assert Net("rrn", size="paper").preprocessing().spacing is None
    with pytest.raises(InputError, match="rrn has no spacing of a paper"):
        Net("rrn", spacing="paper").preprocessing()


# Intensities


def test_histograms_are_matched():
    """A moving image of other intensities in the same order gets those of the fixed one; background stays apart."""
    fixed = ndimage.gaussian_filter(np.random.default_rng(2).random((64, 64)), 3)
    fixed = (fixed - fixed.min()) / np.ptp(fixed)
    moving = 200 * fixed[::-1] ** 2 + 50
    matched = Preprocessing(match_histograms=True).matched(moving, fixed)
    above = fixed[::-1] > fixed.mean() + 0.1
    assert np.abs(matched - fixed[::-1])[above].max() < 0.03
    assert np.abs(moving - fixed[::-1])[above].min() > 1
    assert Preprocessing().matched(moving, fixed) is moving
    grid = Geometry.of(fixed.shape, (1.0, 1.0))
    case = Case("levels", fixed, grid, moving, grid)
    sample, _ = sample_of(case, Preprocessing((0, 1), match_histograms=True))
    np.testing.assert_allclose(sample.moving[0, 0], np.clip(matched, 0, 1), atol=1e-6)


def test_without_simpleitk_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    case, _ = pair()
    with pytest.raises(Missing, match="matching histograms needs SimpleITK: pip install SimpleITK"):
        sample_of(case, Preprocessing(match_histograms=True))
