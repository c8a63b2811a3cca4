import json

import numpy as np
import pytest

from fastreg import cli, io
from fastreg.data import pairs
from fastreg.data.preprocessing import Preprocessing
from fastreg.io._reading import Reading

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

GRID = io.Geometry((48, 40), (1.0, 1.2), (3.0, -8.0), (0.96, -0.28, 0.28, 0.96))
RNG = np.random.default_rng(3)
BLOBS = [*zip(RNG.uniform(-24, 24, (70, 2)), RNG.uniform(1.5, 4, 70), RNG.uniform(0.3, 1, 70), strict=True)]
SHIFT = np.array([1.5, -2.0])
POINTS = np.array([[-9.0, 3.0], [6.0, 8.0], [11.0, -4.0], [-2.0, -11.0], [1.0, 1.0]])


def anatomy(shift):
    index = np.stack(np.meshgrid(*[np.arange(n) for n in GRID.shape], indexing="ij"), -1)
    p = GRID.to_physical(index) - GRID.centre - shift
    return 1000 * sum(a * np.exp(-((p - c) ** 2).sum(-1) / (2 * w * w)) for c, w, a in BLOBS)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A function that writes a pair, and masks that are 0 where what is given is not nothing."""
    monkeypatch.chdir(tmp_path)

    def make(fixed=None, moving=None, suffix=".nii.gz"):
        for name, hidden, shift in (("fixed", fixed, 0), ("moving", moving, SHIFT)):
            image, mask = anatomy(shift).astype(np.float32), np.ones(GRID.shape, np.uint8)
            if hidden is not None:
                where, value = hidden
                image[where], mask[where] = value, 0
            io.write_image(f"{name}{suffix}", image, GRID)
            io.write_image(f"{name}_mask.nii.gz", mask, GRID)
            io.write_landmarks(f"{name}.csv", GRID.centre + POINTS + shift)
        return f"fixed{suffix}", f"moving{suffix}"

    return make


def run(files, *more, out="out"):
    landmarks = ["--fixed-landmarks", "fixed.csv", "--moving-landmarks", "moving.csv"]
    assert cli.main(["register", *files, "-o", out, *landmarks, "--iterations", "40", "--quiet", *more]) == 0
    with open(f"{out}/report.json", encoding="utf-8") as stream:
        return json.load(stream)["tre"]["after"]["mean"]


EDGE = np.s_[:, :13]


def test_padding_of_the_moving_image_is_told_and_left_out(pair, capsys):
    files = pair()
    clean = run(files)
    assert capsys.readouterr().err == ""
    files = pair(moving=(EDGE, -3024.0))
    padded = run(files, "--force")
    told = capsys.readouterr().err
    assert "moving.nii.gz: 27 % of its voxels hold -3024, far below all others" in told
    assert "--moving-mask can leave them out" in told
    assert "there and back" in told  # nothing good comes of it
    assert told.count("\n") == 2
    masked = run(files, "--force", "--moving-mask", "moving_mask.nii.gz")
    assert capsys.readouterr().err == ""
    assert clean < 0.2
    assert masked < 0.25
    assert padded > 2 * masked


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_nan_counts_nothing_where_it_may(pair, capsys, side, suffix):
    """SimpleITK reads NaN of NIfTI as 0, that of MetaImage as NaN."""
    files = pair(**{side: (EDGE, np.nan)}, suffix=suffix)
    command = ["register", *files, "-o", "out", "--quiet"]
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert (
        f"{side}{suffix}: must be finite, got NaN or infinity in 520 of 1920 voxels; with --nan mask" in told
    )
    found = run(files, "--nan", "mask", "--force")
    assert found < 0.25
    assert capsys.readouterr().err == ""
    # where the user's mask is 0 it is no error
    flag = "--mask" if side == "fixed" else "--moving-mask"
    assert run(files, "--force", flag, f"{side}_mask.nii.gz") == pytest.approx(found, abs=1e-6)
    mask = io.read_image(f"{side}_mask.nii.gz")[0]
    mask[:, 12] = 1
    io.write_image("less.nii.gz", mask, GRID)
    assert cli.main([*command, "--force", flag, "less.nii.gz"]) == 2
    assert "NaN or infinity in 40 of 1920 voxels" in capsys.readouterr().err


def test_moved_is_nan_where_the_scan_has_no_number(pair):
    files = pair(moving=(EDGE, np.nan), suffix=".mha")
    run(files, "--nan", "mask")
    moved = io.read_image("out/moved.nii.gz", undefined=True)[0]
    assert 0.15 < np.isnan(moved).mean() < 0.4


def test_both_masks_reach_a_nets_weights(pair):
    pair(moving=(EDGE, np.nan))
    mask = np.ones(GRID.shape, np.float32)
    mask[:5] = 0
    io.write_image("rows.nii.gz", mask, GRID)
    with open("pairs.csv", "w", encoding="utf-8") as stream:
        stream.write(
            "fixed,moving,mask,moving_mask\nfixed.nii.gz,moving.nii.gz,rows.nii.gz,moving_mask.nii.gz\n"
        )
    sample = pairs.Pairs(pairs.find_pairs("pairs.csv"), Preprocessing())[0]
    assert sample.moving.isfinite().all()
    expected = mask * io.read_image("moving_mask.nii.gz")[0]
    assert np.array_equal(sample.mask[0, 0].numpy(), expected)
    with open("pairs.csv", "w", encoding="utf-8") as stream:
        stream.write("fixed,moving\nfixed.nii.gz,moving.nii.gz\n")
    masked = pairs.Pairs(pairs.find_pairs("pairs.csv"), Preprocessing(), reading=Reading(nan="mask"))[0]
    assert (masked.mask[0, 0, :, :13] == 0).all()
    with pytest.raises(io.InputError, match="--nan mask"):
        pairs.Pairs(pairs.find_pairs("pairs.csv"), Preprocessing())[0]


def test_nothing_in_common(pair, capsys):
    files = pair()
    for name, hidden in (("left", np.s_[:, :24]), ("right", np.s_[:, 24:])):
        mask = np.ones(GRID.shape, np.uint8)
        mask[hidden] = 0
        io.write_image(f"{name}.nii.gz", mask, GRID)
    masks = ["--mask", "left.nii.gz", "--moving-mask", "right.nii.gz"]
    assert cli.main(["register", *files, "-o", "out", "--start", "none", *masks]) == 2
    assert "no voxel counts in both images" in capsys.readouterr().err
    everything = (np.s_[:], np.nan)
    files = pair(fixed=everything)
    assert cli.main(["register", *files, "-o", "out", "--nan", "mask"]) == 2
    assert "must be finite, got NaN or infinity in 1920 of 1920 voxels" in capsys.readouterr().err


def test_whole_numbers_have_no_nan_and_cubic_spreads_it(pair, capsys):
    files = pair(moving=(EDGE, np.nan))
    run(files, "--nan", "mask", "--output-type", "int16")
    moved = io.read_image("out/moved.nii.gz")[0]
    assert moved.dtype == np.int16
    assert moved.min() >= -1
    capsys.readouterr()
    command = [
        "register",
        *files,
        "-o",
        "cubic",
        "--nan",
        "mask",
        "--iterations",
        "2",
        "--interpolation",
        "cubic",
    ]
    assert cli.main(command) == 2
    assert "moving.nii.gz: holds NaN, which cubic interpolation spreads" in capsys.readouterr().err


def test_few_voxels_are_no_padding():
    from fastreg.data.weights import warn_of_padding

    told, array, mask = [], np.linspace(0, 1, 4096).reshape(16, 16, 16), np.zeros((16, 16, 16))
    mask[0, 0, :3], mask[8, 8, 8] = 1, 1
    warn_of_padding("a.nii.gz", array, mask, "--mask", told.append)
    assert told == []
