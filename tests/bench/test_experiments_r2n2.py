import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import fastreg
from bench.experiments import r2n2

DATA = os.environ.get("FASTREG_DATA")
HAVE = bool(DATA) and (Path(DATA) / "lungmr_proton.npz").exists()
needs_data = pytest.mark.skipif(not HAVE, reason="FASTREG_DATA names no folder with lungmr_proton.npz")
SPACING = 3.9


def chest():
    """A lung of two blocks, feet first."""
    lung = np.zeros((128, 96), bool)
    lung[40:95, 18:44] = lung[36:95, 52:78] = True
    return lung


def test_breathing_is_largest_at_the_diaphragm_and_folds_nothing():
    lung = chest()
    for seed in range(8):
        u = r2n2.breathing(lung, np.random.default_rng(seed), SPACING)
        assert u.shape == (1, 2, 128, 96)
        assert fastreg.jacobian_determinant(u).min() > 0.3
        along, across = u[0].abs()
        reach = float(along.max()) * SPACING
        assert 0.7 * r2n2.AMPLITUDE[0] < reach < 1.6 * r2n2.AMPLITUDE[1]
        assert 25 < int(along.amax(1).argmax()) < 50
        assert along.max() > 2 * across.max()
        # nothing moves at the apex, at the foot end and outside of the body
        for still in (along[98:], along[0], along[:, 0], along[:, -1]):
            assert still.max() < 0.1 * along.max()


def test_bspline_finds_a_motion():
    lung = chest()
    rng = np.random.default_rng(0)
    image = (
        np.where(lung, 20.0, 100.0)
        + fastreg.smooth(r2n2.common.tensor(rng.normal(0, 60, lung.shape)), 2.0)[0, 0].numpy()
    )
    pair = r2n2.made("made", image, lung, SPACING, 1)
    rows, _ = r2n2.scores([pair], lambda f, m: r2n2.bspline(f, m)[0], SPACING, "cpu")
    still = SPACING * pair.truth[0].norm(dim=0)[pair.lung].mean()
    assert rows[0]["tre"] < 0.4 * still
    # 1152 + 648 + 512 numbers for 256 x 256
    assert (
        sum(
            2 * math.prod(r2n2.control_shape((n, n), s, 2))
            for n, s in zip((64, 128, 256), (3, 8, 19), strict=True)
        )
        == 2312
    )


@needs_data
def test_persons_are_not_in_two_parts():
    data = r2n2.common.scans("lungmr_proton")
    training, held_out, tests = r2n2.pairs(data, {**r2n2.SETTINGS["small"], "motions": 1}, 6)
    names = [{p.name for p in some} for some in (training, held_out, tests)]
    assert not (names[0] & names[1])
    assert not (names[0] & names[2])
    assert not (names[1] & names[2])
    assert {n.split()[0] for n in names[2]} == set(r2n2.TESTED)
    assert len(tests) == 6


@pytest.mark.slow
@needs_data
def test_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(r2n2, "ITERATIONS", 2)
    tiny = {"motions": 1, "tests": 2, "r2n2": {"steps": 2, "widths": (4, 4, 4, 4), "blocks": 1}}
    monkeypatch.setitem(r2n2.SETTINGS, "small", {**r2n2.SETTINGS["small"], **tiny})
    assert r2n2.main(["--steps", "2", "--results", str(tmp_path)]) == 0
    with (tmp_path / "r2n2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == ["identity", "bspline", "voxelmorph", "r2n2"]
    for row in rows:
        for key in ("tre_mean", "tre_sd", "image_mse", "folding", "numbers"):
            assert math.isfinite(float(row[key])), (row["label"], key)
    assert int(rows[1]["numbers"]) == 564
    assert int(rows[3]["numbers"]) == 14
    assert (tmp_path / "r2n2.png").stat().st_size > 10_000


def test_without_scans_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("FASTREG_DATA", raising=False)
    assert r2n2.main([]) == 2
    assert "FASTREG_DATA" in capsys.readouterr().err
