import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import fastreg
from bench.experiments import common, r2n2, r2n2_speed
from fastreg.models import VoxelMorph
from fastreg.training import Recipe, Sample

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
        u = r2n2.breathing(lung, np.random.default_rng(seed), SPACING).sum(0, keepdim=True)
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


def made():
    """The series of a textured chest."""
    lung, rng = chest(), np.random.default_rng(0)
    texture = fastreg.smooth(common.tensor(rng.normal(0, 60, lung.shape)), 2.0)[0, 0].numpy()
    return r2n2.series("made", np.where(lung, 20.0, 100.0) + texture, lung, SPACING, 1)


def test_series_goes_both_ways_from_the_mean_phase(monkeypatch):
    monkeypatch.setattr(r2n2, "NOISE", 0.0)
    pairs = made()
    assert len(pairs) == r2n2.IMAGES - 1
    assert all(p.fixed is pairs[0].fixed or torch.equal(p.fixed, pairs[0].fixed) for p in pairs)
    further = np.array([p.further for p in pairs])
    assert -0.55 < further.min() < -0.4
    assert 0.4 < further.max() < 0.55
    for p in pairs:
        # The truth explains the images, but for what is interpolated twice, and points the way it says.
        inside = r2n2._inside(p.truth)[0, 0].bool() & p.lung
        before, after = (
            float((fastreg.warp(p.moving, u) - p.fixed)[0, 0][inside].square().mean())
            for u in (torch.zeros_like(p.truth), p.truth)
        )
        if abs(p.further) > 0.3:
            assert after < 0.2 * before
            assert float(p.truth[0, 0][p.lung].mean()) * p.further > 0
        assert fastreg.jacobian_determinant(p.truth).min() > 0


def test_bspline_finds_a_motion(monkeypatch):
    monkeypatch.setattr(r2n2, "AMPLITUDE", (28.0, 28.0))
    pair = max(made(), key=lambda p: p.further)
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
    training, held_out, tests = r2n2.pairs(data, {**r2n2.SETTINGS["small"], "motions": 1}, 3)
    names = [{p.series for p in some} for some in (training, held_out, tests)]
    assert not (names[0] & names[1])
    assert not (names[0] & names[2])
    assert not (names[1] & names[2])
    assert {n.split()[0] for n in names[2]} == set(r2n2.TESTED)
    assert (len(names[2]), len(tests)) == (2 * 3, 2 * 3 * (r2n2.IMAGES - 1))
    assert len(held_out) == r2n2.HELD_OUT


def test_summary_over_series_and_directions():
    rows = [
        {
            "tre": tre,
            "series": name,
            "further": further,
            "tre_max": 9,
            "image_mse": 0,
            "folding": 0,
            "seconds": 1,
        }
        for tre, name, further in ((1, "a", 0.1), (3, "a", -0.1), (2, "b", 0.4), (0, "b", -0.4))
    ]
    found = r2n2.summary(rows)
    assert (found["pairs"], found["tre_mean"], found["tre_worst"]) == (4, 1.5, 3)
    assert found["tre_slice"] == (3 + 2) / 2
    assert (found["tre_to_inhale"], found["tre_to_exhale"]) == (1.5, 1.5)


def test_training_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    samples = [Sample(str(k), *torch.rand(2, 1, 1, 16, 16)) for k in range(4)]
    recipe = Recipe(learning_rate=1e-3)

    def train(steps, path=None, recipe=recipe):
        torch.manual_seed(1)
        net = VoxelMorph(encoder=(2, 2, 2, 2), decoder=(2,) * 6, ndim=2, similarity="mse")
        done = common.train(net, samples, samples[:2], recipe, minutes=10, steps=steps, seed=3, state=path)
        return net, done

    whole, done = train(5)
    assert (done.steps, done.ended, len(done.looks)) == (5, "steps", 5)
    path = tmp_path / "state" / "net.pt"
    train(2, path)
    net, again = train(5, path)
    assert [look[::2] for look in again.looks] == [look[::2] for look in done.looks]
    assert again.seconds > again.looks[1][1]
    for a, b in zip(whole.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # The weights of the best look, and nothing more to do.
    assert again.best == min(loss for _, _, loss in again.looks)
    assert common.held_out_loss(net, samples[:2]) == again.best
    assert train(5, path)[1] == again
    with pytest.raises(common.Unusable, match="another training"):
        train(5, path, Recipe(learning_rate=2e-3))


@pytest.mark.slow
@needs_data
def test_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(r2n2, "ITERATIONS", 2)
    monkeypatch.setattr(r2n2, "IMAGES", 3)
    tiny = {"motions": 1, "tests": 1, "r2n2": {"steps": 2, "widths": (4, 4, 4, 4), "blocks": 1}}
    monkeypatch.setitem(r2n2.SETTINGS, "small", {**r2n2.SETTINGS["small"], **tiny})
    arguments = ["--steps", "2", "--results", str(tmp_path), "--state", str(tmp_path / "state")]
    assert r2n2.main(arguments) == 0
    assert {p.name for p in (tmp_path / "state").iterdir()} == {
        "small_r2n2_r2n2_0.pt",
        "small_r2n2_voxelmorph_0.pt",
    }
    with (tmp_path / "r2n2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == ["identity", "bspline", "voxelmorph", "r2n2"]
    for row in rows:
        for key in ("tre_mean", "tre_sd", "tre_slice", "image_mse", "folding", "numbers"):
            assert math.isfinite(float(row[key])), (row["label"], key)
    assert int(rows[1]["numbers"]) == 564
    assert int(rows[3]["numbers"]) == 14
    assert (tmp_path / "r2n2.png").stat().st_size > 10_000


def test_without_scans_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("FASTREG_DATA", raising=False)
    assert r2n2.main([]) == 2
    assert "FASTREG_DATA" in capsys.readouterr().err


@pytest.mark.slow
@needs_data
def test_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(r2n2, "ITERATIONS", 2)
    arguments = ["--size", "64", "64", "--rounds", "2", "--results", str(tmp_path)]
    assert r2n2_speed.main(arguments) == 0
    with (tmp_path / "r2n2_speed.csv").open(encoding="utf-8", newline="") as file:
        bspline, net = csv.DictReader(file)
    assert (bspline["method"], net["method"]) == ("bspline", "r2n2")
    assert int(net["numbers"]) == 175
    assert float(net["faster"]) == pytest.approx(float(bspline["seconds"]) / float(net["seconds"]))
    assert float(net["share"]) == pytest.approx(100 * 175 / int(bspline["numbers"]))
    assert all(float(r["p20"]) <= float(r["seconds"]) <= float(r["p80"]) for r in (bspline, net))
