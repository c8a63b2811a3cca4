"""`fastreg train`, `apply` and `register --method`, as users call them: files, continuing, bad input."""

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrun import run_two

from fastreg import cli, io, models
from fastreg.commands.apply import FIELD_OUTPUTS
from fastreg.data.preprocessing import Preprocessing
from fastreg.io import Geometry
from fastreg.outcome import OUTPUTS
from fastreg.training import Settings, Training, checkpoint, distributed
from fastreg.training.run import BROKEN, FILES

pytest.importorskip("SimpleITK")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
GRID = Geometry.of((20, 24), (1.0, 1.5))
# A net of a few hundred weights.
TINY = ["--method", "voxelmorph"]
for setting in ("encoder=(2,2,2,2)", "decoder=(2,2,2,2,2,2)", "similarity=mse"):
    TINY += ["--set", setting]
SHORT = ["--steps", "4", "--validate-every", "2", "--save-every", "1", "--threads", "1"]


def blob(centre, grid=GRID):
    p = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1)
    return np.exp(-((p - centre) ** 2).sum(-1) / 30).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Three images with labels and landmarks."""
    data = tmp_path / "data"
    for sub in ("images", "labels", "landmarks"):
        (data / sub).mkdir(parents=True)
    for k, centre in enumerate(((9, 10), (11, 12), (10, 14))):
        image = blob(centre)
        io.write_image(data / "images" / f"s{k}.nii.gz", image, GRID)
        io.write_image(data / "labels" / f"s{k}.nii.gz", (image > 0.5).astype(np.uint8), GRID)
        io.write_landmarks(data / "landmarks" / f"s{k}.csv", [GRID.to_physical(centre)])
    return data


def train(folder, out, *more):
    return cli.main(["train", *TINY, "--pairs", str(folder), "-o", str(out), *SHORT, *more])


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def images(folder, *which):
    return [str(folder / "images" / f"s{k}.nii.gz") for k in which]


def test_trains_and_applies(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out) == 0
    assert sorted(os.listdir(out)) == sorted(set(FILES) - {BROKEN})
    log = rows(out / "log.csv")
    assert [int(r["step"]) for r in log] == [1, 2, 3, 4]
    for r in log:
        assert float(r["loss"]) == pytest.approx(float(r["similarity"]) + float(r["regularity"]), rel=1e-5)
        assert float(r["memory_mb"]) > 10
        assert json.loads(r["names"])[0].count("→") == 1
    validated = rows(out / "validation.csv")
    assert [int(r["step"]) for r in validated] == [2, 4]
    assert all(np.isfinite([float(r[k]) for k in r]).all() for r in validated)
    assert {"loss", "tre", "dice", "assd", "folding", "tre_before", "dice_before"} <= set(validated[0])
    told = capsys.readouterr().out
    assert "6 pairs" in told
    assert "step 4: loss" in told
    assert f"dice {float(validated[1]['dice_before']):.4g} -> {float(validated[1]['dice']):.4g}" in told

    content = checkpoint.load(out / "last.pt")
    assert (content["method"], content["preset"], content["counted"]["step"]) == ("voxelmorph", "paper", 4)
    assert content["preprocessing"]["intensity"] == "percentiles"
    assert content["arguments"]["ndim"] == 2

    applied = tmp_path / "applied"
    labels = [str(folder / "labels" / f"s{k}.nii.gz") for k in (0, 1)]
    arguments = ["--fixed-labels", labels[0], "--moving-labels", labels[1]]
    assert (
        cli.main(
            [
                "apply",
                "--weights",
                str(out / "best.pt"),
                *images(folder, 0, 1),
                "-o",
                str(applied),
                *arguments,
            ]
        )
        == 0
    )
    assert sorted(os.listdir(applied)) == sorted({*OUTPUTS} - {"affine.tfm"})
    summary = json.loads((applied / "report.json").read_text(encoding="utf-8"))
    assert summary["method"] == "voxelmorph"
    assert 0 < summary["dice"]["after"]["mean"] <= 1
    # The field says what the net said.
    u, grid = io.read_displacement(applied / "displacement.nii.gz")
    model = checkpoint.build(checkpoint.load(out / "best.pt"), "best.pt")
    pair = [Preprocessing().image(*io.read_image(path), grid)[0] for path in images(folder, 0, 1)]
    with torch.no_grad():
        torch.testing.assert_close(u, model(*pair).displacement, rtol=1e-4, atol=1e-5)


def test_another_validation_set_and_size(folder, tmp_path):
    out, table = tmp_path / "run", tmp_path / "validation.csv"
    table.write_text(f"fixed,moving\n{','.join(images(folder, 2, 0))}\n", encoding="utf-8")
    options = [
        "--validation",
        str(table),
        "--size",
        "16,18",
        "--crop",
        "2:,:",
        "--intensity",
        "0,1",
        "--quiet",
    ]
    assert train(folder, out, *options) == 0
    assert {"tre", "dice"}.isdisjoint(rows(out / "validation.csv")[0])
    assert checkpoint.load(out / "last.pt")["preprocessing"] == {
        "intensity": (0.0, 1.0), "crop": ((2, None), (None, None)), "size": (16, 18), "spacing": None,
        "align": "none", "margin": 0.0, "match_histograms": False,
    }  # fmt: skip
    applied = tmp_path / "applied"
    assert (
        cli.main(
            ["apply", "--weights", str(out / "last.pt"), *images(folder, 0, 1), "-o", str(applied), "--quiet"]
        )
        == 0
    )
    assert io.read_displacement(applied / "displacement.nii.gz")[1].matches(GRID)


def test_one_shot_and_register(folder, tmp_path):
    table = tmp_path / "pair.csv"
    table.write_text(f"fixed,moving\n{','.join(images(folder, 0, 1))}\n", encoding="utf-8")
    assert train(table, tmp_path / "run", "--task", "one-shot", "--quiet") == 0
    out = tmp_path / "registered"
    options = ["--steps", "60", "--learning-rate", "0.01", "--quiet", "--threads", "1"]
    assert cli.main(["register", *images(folder, 0, 1), "-o", str(out), *TINY, *options]) == 0
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert summary["loss_last"] < 0.8 * summary["loss_first"]
    assert (summary["method"], summary["steps"], summary["learning_rate"]) == ("voxelmorph", 60, 0.01)
    assert summary["seed"] == 0


def test_a_seed_decides_on_the_net(folder, tmp_path):
    """Also where the process has drawn numbers before."""
    found = []
    for k, seed in enumerate(("3", "3", "4")):
        torch.rand(k + 1)
        options = [*TINY, "--steps", "2", "--seed", seed, "--quiet", "--threads", "1"]
        assert cli.main(["register", *images(folder, 0, 1), "-o", str(tmp_path / str(k)), *options]) == 0
        summary = json.loads((tmp_path / str(k) / "report.json").read_text(encoding="utf-8"))
        assert summary["seed"] == int(seed)
        found.append(summary["loss_last"])
    assert found[0] == found[1] != found[2]


def test_settings_in_a_script(folder, tmp_path, monkeypatch):
    """What fastreg train does, and what it goes on with, from another folder too."""
    monkeypatch.chdir(folder.parent)
    given = {"encoder": (2, 2, 2, 2), "decoder": (2, 2, 2, 2, 2, 2), "similarity": "mse"}
    settings = Settings("voxelmorph", set=given, pairs=folder.name, size=(16, 18), steps=2, validate_every=2)
    settings.run(tmp_path / "run", quiet=True).train()
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    assert content["preprocessing"]["size"] == (16, 18)
    assert content["arguments"]["encoder"] == (2, 2, 2, 2)
    settings.steps = 3
    settings.run(tmp_path / "run", quiet=True).train()
    with pytest.raises(io.InputError, match="was started with --size"):
        replace(settings, size=(16, 20)).run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for steps, more in (("4", []), ("5", ["--pairs", str(folder)])):
        assert cli.main(["train", "--resume", "-o", "run", "--steps", steps, "--quiet", *more]) == 0
    assert [int(r["step"]) for r in rows(tmp_path / "run" / "log.csv")] == [1, 2, 3, 4, 5]


def test_field_moves_images_labels_and_points(folder, tmp_path):
    """By a shift of two voxels down and one to the right."""
    u = torch.zeros(1, 2, *GRID.shape)
    u[:, 0], u[:, 1] = 2, 1
    io.write_displacement(tmp_path / "field.nii.gz", u, GRID)
    io.write_landmarks(tmp_path / "points.csv", [GRID.to_physical((5, 6))])
    out = tmp_path / "out"
    arguments = ["apply", "--field", str(tmp_path / "field.nii.gz"), *images(folder, 1), "-o", str(out)]
    arguments += [
        "--labels",
        str(folder / "labels" / "s1.nii.gz"),
        "--points",
        str(tmp_path / "points.csv"),
        "--quiet",
    ]
    assert cli.main(arguments) == 0
    assert sorted(os.listdir(out)) == sorted(FIELD_OUTPUTS)
    moved, grid = io.read_image(out / "moved.nii.gz")
    assert grid.matches(GRID)
    np.testing.assert_allclose(moved[:-2, :-1], blob((11, 12))[2:, 1:], atol=1e-6)
    labels, _ = io.read_image(out / "moved_labels.nii.gz")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[:-2, :-1], (blob((11, 12)) > 0.5)[2:, 1:])
    points = io.read_landmarks(out / "points.csv", 2)
    np.testing.assert_allclose(GRID.to_index(points), [[7, 7]], atol=1e-5)


# Continuing


def same(a, b):
    """Two checkpoints: weights, optimiser and counts, bit for bit."""
    a, b = checkpoint.load(a), checkpoint.load(b)
    assert a["counted"] == b["counted"]
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    states = [c.get("optimizer", {"state": {}})["state"] for c in (a, b)]
    assert states[0].keys() == states[1].keys()
    for k, values in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][k][name])) for name, v in values.items()
        )


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_same(folder, tmp_path):
    """SIGKILL in the middle of a step; what had been done since the last checkpoint is done again."""
    arguments = [
        *TINY,
        "--pairs",
        str(folder),
        "--threads",
        "1",
        "--quiet",
        "--save-every",
        "7",
        "--steps",
        "150",
    ]
    arguments += ["--validate-every", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastreg", "train", *arguments, "-o", str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    last = tmp_path / "killed" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 0 < checkpoint.load(last)["counted"]["step"] < 150
    assert cli.main(["train", "--resume", "-o", str(tmp_path / "killed"), "--threads", "1", "--quiet"]) == 0
    assert cli.main(["train", *arguments, "-o", str(tmp_path / "whole")]) == 0
    same(last, tmp_path / "whole" / "last.pt")
    same(tmp_path / "killed" / "best.pt", tmp_path / "whole" / "best.pt")
    for table in ("log.csv", "validation.csv"):
        tables = [rows(tmp_path / run / table) for run in ("killed", "whole")]
        measured = ("seconds", "memory_mb")
        first, second = ([{k: v for k, v in r.items() if k not in measured} for r in t] for t in tables)
        assert first == second


def test_interrupted_saves_and_ends_with_130(folder, tmp_path, capsys, monkeypatch):
    advance = Training.advance

    def interrupted(self):
        told = advance(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return told

    monkeypatch.setattr(Training, "advance", interrupted)
    out = tmp_path / "run"
    assert train(folder, out, "--save-every", "100", "--validate-every", "100", "--quiet") == 130
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 2
    assert "interrupted" in one_line(capsys)
    monkeypatch.undo()
    assert cli.main(["train", "--resume", "-o", str(out), "--steps", "5"]) == 0
    told = capsys.readouterr().out.splitlines()
    # No terminal here: a line after the first step.
    assert re.match(r"step 3 of 5, [\d.]+ s each: loss ", told[1])
    assert told[-1].startswith("5 steps")
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 5
    assert [int(r["step"]) for r in rows(out / "log.csv")] == [1, 2, 3, 4, 5]


def test_what_is_done_says_so_and_stays(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert cli.main(["train", "--resume", "-o", str(out)]) == 0
    assert "is done after 4 steps; more steps" in capsys.readouterr().out
    # The batch of a run stays, also where nobody named it.
    assert cli.main(["train", "--resume", "-o", str(out), "--batch-size", "2"]) == 2
    assert "was started with --batch-size 1" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_run_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    advance = Training.advance

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    assert train(folder, tmp_path / "run") == 130
    assert f"go on with: fastreg train --resume -o {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_twice_still_saves(folder, tmp_path, monkeypatch, name):
    """As from a scheduler that tells every process, and torchrun, which passes it on."""
    advance = Training.advance

    def interrupted(self):
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, name))
        return advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    out = tmp_path / "run"
    assert train(folder, out, "--save-every", "100", "--validate-every", "100", "--quiet") == 130
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 1


def test_another_process_that_ended_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def ended(self):
        raise RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
        )

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(Training, "advance", ended)
    assert train(folder, tmp_path / "run", "--quiet", "--device", "cpu") == 2
    assert "another process of this run has ended" in one_line(capsys)


def test_the_best_weights_come_without_the_optimiser(folder, tmp_path):
    out = tmp_path / "run"
    assert train(folder, out) == 0
    assert "optimizer" not in checkpoint.load(out / "best.pt")
    (out / "last.pt").write_bytes((out / "best.pt").read_bytes())
    assert cli.main(["train", "--resume", "-o", str(out)]) == 2


def test_a_checkpoint_with_foreign_settings(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out) == 0
    content = checkpoint.load(out / "last.pt")
    for key, value in (("settings", []), ("counted", 3)):
        checkpoint.save(out / "last.pt", {**content, key: value})
        capsys.readouterr()
        assert cli.main(["train", "--resume", "-o", str(out)]) == 2
        assert "holds no state of a training" in one_line(capsys)


def test_minutes_end_a_run(folder, tmp_path):
    out = tmp_path / "run"
    assert train(folder, out, "--steps", "1000000", "--minutes", "0.02", "--quiet") == 0
    assert 0 < checkpoint.load(out / "last.pt")["counted"]["step"] < 1_000_000


PROCESS = """
import gc
import runpy
from torchrun import assert_no_threads_of_gloo

gc.disable()
try:
    runpy.run_module("fastreg.train", run_name="__main__", alter_sys=True)
finally:
    assert_no_threads_of_gloo()
"""


@pytest.mark.slow
def test_two_processes(folder, tmp_path):
    """torchrun of the README: one log, one set of checkpoints, and what one process with that batch gives."""
    arguments = ["train", *TINY, "--pairs", str(folder), *SHORT, "--batch-size", "2", "--quiet"]
    done = run_two(PROCESS, *arguments[1:], "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert cli.main([*arguments, "-o", str(tmp_path / "one")]) == 0
    one, two = ([float(r["loss"]) for r in rows(tmp_path / run / "log.csv")] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


FAILING = """
import os
import signal
import sys
import time
import torch
import torch.distributed as dist
from fastreg import cli
from fastreg.io import InputError
from fastreg.training import Training

advance = Training.advance

def failing(self):
    if os.environ["RANK"] == "1" and self.step == 1:
        dist.all_reduce(torch.ones(()), async_op=True)
        raise InputError("s1.nii.gz: damaged")
    if self.step == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)
    return advance(self)

Training.advance = failing
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_an_error_in_one_process_does_not_wait_for_the_other(folder, tmp_path):
    """Though the first has begun what only both can end."""
    arguments = [*TINY, "--pairs", str(folder), *SHORT, "--batch-size", "2", "--quiet"]
    done = run_two(FAILING, *arguments, "-o", tmp_path / "two", seconds=120)
    assert done.returncode != 0
    assert "s1.nii.gz: damaged" in done.stderr


# Bad input


def not_finite(folder, monkeypatch):
    terms = models.VoxelMorph.terms

    def broken(self, *arguments):
        found = terms(self, *arguments)
        return {**found, "similarity": found["similarity"] * (float("nan") if torch.is_grad_enabled() else 1)}

    monkeypatch.setattr(models.VoxelMorph, "terms", broken)


def test_not_finite_says_which_pair(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert train(folder, out, "--steps", "2", "--quiet") == 0
    not_finite(folder, monkeypatch)
    assert cli.main(["train", "--resume", "-o", str(out), "--steps", "9", "--quiet"]) == 2
    line = one_line(capsys)
    assert "step 2: the loss or its gradient is not finite" in line
    told = json.loads((out / "not_finite.json").read_text(encoding="utf-8"))
    assert told["step"] == 2
    assert told["pairs"][0] in line
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 2


def test_a_pair_that_turns_out_bad_costs_no_step(folder, tmp_path, capsys, monkeypatch):
    advance = Training.advance

    def failing(self):
        if self.step == 3:
            raise io.InputError("s1.nii.gz: damaged")
        return advance(self)

    monkeypatch.setattr(Training, "advance", failing)
    out = tmp_path / "run"
    assert train(folder, out, "--save-every", "100", "--validate-every", "100", "--quiet") == 2
    assert "s1.nii.gz: damaged" in one_line(capsys)
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 3
    monkeypatch.undo()
    assert cli.main(["train", "--resume", "-o", str(out), "--quiet"]) == 0
    assert [int(r["step"]) for r in rows(out / "log.csv")] == [1, 2, 3, 4]


def test_existing_runs_are_not_replaced(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--quiet") == 0
    assert train(folder, out, "--quiet") == 2
    assert "already holds last.pt; --resume (resume=True) goes on with it" in one_line(capsys)
    assert train(folder, out, "--quiet", "--force", "--steps", "1") == 0
    assert checkpoint.load(out / "last.pt")["counted"]["step"] == 1
    assert [int(r["step"]) for r in rows(out / "validation.csv")] == [1]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from fastreg import cli
from fastreg.training import checkpoint
def fill(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
real = checkpoint.save
def save(path, content):
    fill()
    real(path, content)
if sys.argv[2] == "at once":
    fill()
checkpoint.save = save
sys.exit(cli.main(sys.argv[3:]))
"""


def test_a_full_disk_keeps_the_previous_checkpoint(folder, tmp_path):
    """Files cannot grow past 2000 bytes, as if there were no room."""
    out = tmp_path / "run"
    assert train(folder, out, "--quiet", "--steps", "2") == 0
    before = (out / "last.pt").read_bytes()
    assert len(before) > 2000
    script = tmp_path / "full.py"
    script.write_text(FULL, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), "2000", "later", "train", "--resume", "-o", str(out), "--steps", "4", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "last.pt: cannot be saved" in line
    assert "the previous one is kept" in line
    assert (out / "last.pt").read_bytes() == before
    assert sorted(os.listdir(out)) == sorted(set(FILES) - {BROKEN})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "file"), [(20, "settings.json"), (700, "log.csv"), (50_000, "validation.png")]
)
def test_a_full_disk_is_named(folder, tmp_path, most, file):
    script, out = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(most), "at once", "train", *TINY, "--pairs", str(folder), "-o", str(out),
         *SHORT, "--steps", "40", "--save-every", "40", "--validate-every", "40" if most < 1000 else "2", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"{out / file}: file too large" in line
    assert not out.exists() or not [name for name in os.listdir(out) if name.startswith(".")]


def other_size(folder):
    for k in range(3):
        (folder / "labels" / f"s{k}.nii.gz").unlink()
    (folder / "labels").rmdir()
    grid = Geometry.of((17, 19), (1.0, 1.5))
    io.write_image(folder / "images" / "s1.nii.gz", blob((9, 9), grid), grid)
    io.write_image(
        folder / "images" / "s2.nii.gz",
        blob((9, 9), Geometry.of((15, 19), (1.0, 1.5))),
        Geometry.of((15, 19), (1.0, 1.5)),
    )


def damaged(folder):
    (folder / "images" / "s1.nii.gz").write_bytes(b"nothing of the kind")


def three_axes(folder):
    grid = Geometry.of((4, 20, 24), (1.0, 1.0, 1.5))
    io.write_image(
        folder / "images" / "s1.nii.gz", np.random.default_rng(0).random(grid.shape, dtype=np.float32), grid
    )


def other_labels(folder):
    io.write_image(
        folder / "labels" / "s0.nii.gz", np.ones((5, 5), np.uint8), Geometry.of((5, 5), (1.0, 1.0))
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (damaged, [], "not an image SimpleITK can read"),
        (other_size, ["--batch-size", "6"], "the images of a batch must have one size"),
        (three_axes, [], "is 3D|is 2D"),
        (other_labels, [], "must lie on the grid of"),
        (None, ["--pairs", "nowhere"], "no such file or folder"),
        (None, ["--set", "widths=3"], "--set takes NAME=VALUE with a name of"),
        (None, ["--set", "weight"], "--set takes NAME=VALUE"),
        (None, ["--set", "similarity=ssd"], "similarity must be one of"),
        (None, ["--set", "encoder=(2,2)"], "encoder must have 4 widths"),
        (None, ["--preset", "best"], "error: --preset must be one of"),
        (None, ["--method", "rrn", "--set", "radius=2"], "rrn registers 3D images, got 2D|--set takes"),
        (None, ["--intensity", "5,1"], "error: --intensity must be"),
        (None, ["--intensity", "a,b"], "--intensity must be comma-separated numbers"),
        (None, ["--size", "3"], "size must have 2 numbers"),
        (None, ["--crop", "1,2"], "--crop must be ranges"),
        (None, ["--steps", "0"], "--steps must be at least 1"),
        (None, ["--minutes", "-1"], "--minutes must be positive"),
        (None, ["--learning-rate", "nan"], "--learning-rate must be positive"),
        (None, ["--set", "weight=abc"], "--set weight must be of the kind of its default, 1.0, got 'abc'"),
        (None, ["--set", "encoder=(0,2,2,2)"], "--set encoder must be of the kind of its default"),
        (None, ["--set", "ndim=3"], r"VoxelMorph: fixed must have shape \(N, 1, D, H, W\)"),
        (None, ["--spacing", "nan,1"], "error: --spacing must be positive"),
        (None, ["--spacing", "1e-300,1"], "too many voxels"),
        (None, ["--size", f"{10**22},3"], "too many voxels"),
        (None, ["--intensity=-inf,inf"], "error: --intensity must be"),
        (None, ["--intensity", "-2,-1"], "must not be constant between the intensities -2 and -1"),
        (None, ["--threads", "100000"], "--threads must be at most 1024"),
        (three_axes, ["--validation", "{csv}"], "the net registers 2D images, got 3D"),
        (None, ["--task", "intra"], "agree up to the last"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, tmp_path, capsys, change, options, message):
    if change is not None:
        change(folder)
    pairs, table = folder, tmp_path / "solid.csv"
    if "{csv}" in options:
        table.write_text(f"fixed,moving\n{','.join(images(folder, 1, 1))}\n", encoding="utf-8")
        pairs = tmp_path / "flat.csv"
        pairs.write_text(f"fixed,moving\n{','.join(images(folder, 0, 2))}\n", encoding="utf-8")
    options = [option.format(csv=table) for option in options]
    assert train(pairs, tmp_path / "deep" / "run", "--quiet", *options) == 2
    line = one_line(capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("options", [["--pairs", "nowhere"], ["--set", "ndim=3"], ["--batch-size", "6"]])
def test_force_replaces_a_run_only_by_one_that_does_a_step(folder, tmp_path, capsys, options):
    out = tmp_path / "run"
    assert train(folder, out, "--quiet") == 0
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    if "--batch-size" in options:
        other_size(folder)
    assert train(folder, out, "--quiet", "--force", *options) == 2
    one_line(capsys)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


@pytest.mark.slow
def test_force_on_a_full_disk_keeps_the_old_run(folder, tmp_path):
    script, out = tmp_path / "full.py", tmp_path / "run"
    script.write_text(FULL, encoding="utf-8")
    assert train(folder, out, "--quiet") == 0
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    done = subprocess.run(
        [sys.executable, str(script), "2000", "at once", "train", *TINY, "--pairs", str(folder), "-o", str(out),
         *SHORT, "--quiet", "--force"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the previous one is kept" in done.stderr
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_inputs_are_not_replaced(folder, tmp_path, capsys):
    table = tmp_path / "validation.csv"
    table.write_text(f"fixed,moving\n{','.join(images(folder, 0, 1))}\n", encoding="utf-8")
    before = table.read_bytes()
    assert train(table, tmp_path, "--quiet", "--force") == 2
    assert "validation.csv: is an input, and an output would replace it" in one_line(capsys)
    assert table.read_bytes() == before
    assert train(folder / "images", folder / "images", "--quiet") == 2
    assert "holds the images, and validation.png would be one of them" in one_line(capsys)
    assert train(folder, "", "--quiet") == 2
    assert "the output folder must have a name" in one_line(capsys)
    assert train(folder, folder, "--quiet") == 0


def test_one_run_at_a_time_in_a_folder(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fcntl")
    out, advance, told = tmp_path / "run", Training.advance, []

    def another(self):
        if not told:
            told.append(None)
            told.append(train(folder, out, "--quiet", "--force"))
        return advance(self)

    monkeypatch.setattr(Training, "advance", another)
    assert train(folder, out, "--quiet") == 0
    assert told[1] == 2
    assert "another run is writing to it" in one_line(capsys)


def test_half_a_line_of_a_killed_run(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--quiet") == 0
    for name, rest in (("log.csv", "1"), ("validation.csv", "2,\0")):
        with open(out / name, "a", encoding="utf-8") as stream:
            stream.write(rest)
    assert cli.main(["train", "--resume", "-o", str(out), "--quiet", "--steps", "6"]) == 0
    assert [int(r["step"]) for r in rows(out / "log.csv")] == [1, 2, 3, 4, 5, 6]
    assert [int(r["step"]) for r in rows(out / "validation.csv")] == [2, 4, 6]
    (out / "log.csv").write_bytes(b"\xff\xfe")
    assert cli.main(["train", "--resume", "-o", str(out), "--quiet", "--steps", "7"]) == 2
    assert "log.csv: not a table of fastreg train" in one_line(capsys)


def test_ignored_interrupts_stay_ignored(folder, tmp_path, monkeypatch):
    """As of a run that a shell started with & or nohup."""
    advance = Training.advance

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(folder, tmp_path / "run", "--quiet") == 0
    finally:
        signal.signal(signal.SIGINT, previous)


def test_closed_streams(folder, tmp_path, monkeypatch):
    """As of `fastreg train ... >&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train(folder, tmp_path / "run", "--progress") == 0


def test_any_seed(folder, tmp_path):
    for k, seed in enumerate(("-5", "1764353202000", "99999999999999999999")):
        assert train(folder, tmp_path / str(k), "--quiet", "--steps", "1", "--seed", seed) == 0


def test_missing_arguments(tmp_path, capsys):
    assert cli.main(["train", "-o", str(tmp_path / "run"), "--pairs", "x"]) == 2
    assert "--method is missing" in one_line(capsys)
    assert cli.main(["train", "-o", str(tmp_path / "run"), "--method", "rrn"]) == 2
    assert "--pairs is missing" in one_line(capsys)
    assert cli.main(["train", "-o", str(tmp_path / "run"), "--resume"]) == 2
    assert "holds no last.pt to resume" in one_line(capsys)


def test_resume_with_other_arguments(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--quiet") == 0
    for options, message in (
        (["--method", "prdfe"], "was started with --method voxelmorph, and cannot be resumed with prdfe"),
        (["--learning-rate", "1"], "was started with --learning-rate None"),
        (["--seed", "3"], "was started with --seed 0"),
        (["--pairs", "elsewhere"], "elsewhere: no such file or folder; where the data has moved: --pairs"),
    ):
        assert cli.main(["train", "--resume", "-o", str(out), *options]) == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize("listed", [False, True], ids=["folder", "csv"])
def test_data_that_moved_goes_on(folder, tmp_path, capsys, listed):
    """Another mount, another machine: the same pairs by name; other pairs are another training."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    source = folder
    if listed:
        source = folder / "pairs.csv"
        source.write_text("fixed,moving\nimages/s0.nii.gz,images/s1.nii.gz\n", encoding="utf-8")
    assert train(source, out, "--quiet", "--steps", "2", "--validation", str(source)) == 0
    folder.rename(moved)
    where = moved / source.name if listed else moved
    resume = ["train", "--resume", "-o", str(out), "--steps", "4", "--quiet", "--threads", "1"]
    assert cli.main(resume) == 2
    assert "where the data has moved: --pairs" in one_line(capsys)
    assert cli.main([*resume, "--pairs", str(where), "--validation", str(where)]) == 0
    assert [int(r["step"]) for r in rows(out / "log.csv")] == [1, 2, 3, 4]
    # From there on without saying it again.
    assert cli.main([*resume[:-4], "5", "--quiet", "--threads", "1"]) == 0
    if listed:
        where.write_text("fixed,moving\nimages/s1.nii.gz,images/s0.nii.gz\n", encoding="utf-8")
    else:
        (moved / "images" / "s9.nii.gz").write_bytes((moved / "images" / "s0.nii.gz").read_bytes())
    before = (out / "last.pt").read_bytes()
    assert cli.main([*resume[:-4], "6", "--quiet", "--threads", "1"]) == 2
    assert (
        "was trained on" in capsys.readouterr().err.splitlines()[-1]
    )  # the new image has no labels, which is told
    assert (out / "last.pt").read_bytes() == before


def test_bad_checkpoints(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(folder, out, "--quiet") == 0
    content = torch.load(out / "last.pt", weights_only=True)

    def apply(path):
        status = cli.main(
            ["apply", "--weights", str(path), *images(folder, 0, 1), "-o", str(tmp_path / "out")]
        )
        assert not (tmp_path / "out").exists()
        assert status == 2
        return one_line(capsys)

    bad = tmp_path / "bad.pt"
    bad.write_bytes((out / "last.pt").read_bytes()[:-2000])
    assert "not a checkpoint, or damaged" in apply(bad)
    torch.save({"weights": {}}, bad)
    assert "not a checkpoint of fastreg train" in apply(bad)
    torch.save({**content, "method": "unet"}, bad)
    assert "a checkpoint of 'unet', which this version does not have" in apply(bad)
    torch.save({**content, "method": "prdfe"}, bad)
    assert "its weights do not fit prdfe of this version" in apply(bad)
    torch.save({**content, "method": ["rrn"]}, bad)
    assert "which this version does not have" in apply(bad)
    torch.save({**content, "preprocessing": {"sharpness": 1}}, bad)
    assert "its preprocessing is none of this version's" in apply(bad)
    weights = {name: w * 1e38 for name, w in content["weights"].items()}
    torch.save({**content, "weights": weights}, bad)
    assert "s1.nii.gz → s0.nii.gz: the net's displacement is not finite" in apply(bad)
    assert "no such file" in apply(tmp_path / "none.pt")
    # States of a training that cannot be gone on with.
    optimizer = copy.deepcopy(content["optimizer"])
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)
    for changed in (
        {"counted": {}},
        {"weights": {}},
        {"optimizer": optimizer},
        {"best": None},
        {"settings": 0},
    ):
        torch.save({**content, **changed}, out / "last.pt")
        assert cli.main(["train", "--resume", "-o", str(out), "--steps", "9"]) == 2
        assert re.search(
            "does not fit a training of voxelmorph|holds no state of a training", one_line(capsys)
        )
    # A class of somebody's: not loaded, let alone run.
    torch.save({**content, "preset": Path("x")}, bad)
    assert "not a checkpoint, or damaged" in apply(bad)
    bad.rename(out / "last.pt")
    assert cli.main(["train", "--resume", "-o", str(out)]) == 2
    assert "not a checkpoint, or damaged" in one_line(capsys)


def test_apply_takes_what_goes_together(folder, tmp_path, capsys):
    one, two = images(folder, 0, 1)
    for arguments, message in (
        (["--weights", "x.pt", one], "--weights takes FIXED and MOVING, got 1 image"),
        ([one, two, "--field", "x.nii.gz"], "--field takes MOVING alone, got 2 images"),
        (["--weights", "x.pt", one, two, "--points", "p.csv"], "--points goes with --field"),
        (["--field", "x.nii.gz", one, "--mask", one], "--mask goes with --weights"),
        (["--field", one], "--field takes a transform and then MOVING"),
        (["--field", one, two], "must be a displacement field"),
        ([one], "one of the arguments --weights --field is required"),
    ):
        assert cli.main(["apply", *arguments, "-o", str(tmp_path / "out")]) == 2
        assert message in one_line(capsys)
    assert cli.main(["register", one, two, "-o", str(tmp_path / "out"), "--steps", "3"]) == 2
    assert "--steps goes with --method" in one_line(capsys)
    assert cli.main(["register", one, two, "-o", str(tmp_path / "out"), *TINY, "--levels", "3"]) == 2
    assert "--levels is a parameter of fastreg.register, not of --method voxelmorph" in one_line(capsys)
    for rate in ("-1", "nan", "0.1,0.2"):
        options = ["-o", str(tmp_path / "out"), *TINY, "--learning-rate", rate]
        assert cli.main(["register", one, two, *options]) == 2
        assert "--learning-rate must be one positive number" in one_line(capsys)
    assert not (tmp_path / "out").exists()
