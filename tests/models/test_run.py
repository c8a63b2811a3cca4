"""Training by a script: a folder that goes on, any model, any pairs, several processes."""

import contextlib
import csv
import json
import os
import signal

import pytest
import torch
from test_training import net, samples
from torchrun import run_two

import fastreg
from fastreg.io import InputError
from fastreg.models import VoxelMorph
from fastreg.training import Recipe, Run, Sample, checkpoint

FAST = Recipe(learning_rate=1e-2, steps=6)


class Own(torch.nn.Module):
    """A model of a user's: a displacement and a scalar, nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, fixed, moving):
        return self.conv(torch.cat([fixed, moving], 1))

    def loss(self, fixed, moving, displacement):
        return fastreg.mse_loss(fixed, fastreg.warp(moving, displacement)) + fastreg.diffusion(displacement)


class Pairs:
    """Pairs of a user's: made when they are asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 5

    def __getitem__(self, k):
        self.asked.append(k)
        return samples()[k]


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run(folder, model=None, pairs=None, **options):
    options = {"recipe": FAST, "validate_every": 3, "quiet": True, **options}
    return Run(folder, net() if model is None else model, samples() if pairs is None else pairs, **options)


def same(a, b):
    """Two checkpoints but for the time."""
    a, b = ({**checkpoint.load(path), "seconds": 0} for path in (a, b))
    for content in (a, b):
        content["values"] = [
            v.tolist() for s in content.pop("optimizer", {"state": {}})["state"].values() for v in s.values()
        ]
        content["weights"] = {name: w.tolist() for name, w in content["weights"].items()}
    return a == b


def test_a_script_of_ten_lines(tmp_path):
    """README's: samples, other samples to validate on, and what a run leaves."""
    one = run(tmp_path / "run", validation=samples(3))
    one.train()
    assert one.done
    assert sorted(os.listdir(tmp_path / "run")) == [
        "best.pt", "last.pt", "log.csv", "settings.json", "validation.csv", "validation.png",
    ]  # fmt: skip
    assert [int(r["step"]) for r in rows(tmp_path / "run" / "log.csv")] == [1, 2, 3, 4, 5, 6]
    validated = rows(tmp_path / "run" / "validation.csv")
    assert [int(r["step"]) for r in validated] == [3, 6]
    best = min(validated, key=lambda r: float(r["loss"]))
    with torch.no_grad():
        model = one.best()
        loss = sum(float(model.loss(s.fixed, s.moving, model(s.fixed, s.moving))) for s in samples(3)) / 3
    assert loss == pytest.approx(float(best["loss"]), rel=1e-4)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text(encoding="utf-8"))
    assert (settings["seed"], settings["learning_rate"]) == (0, 1e-2)


def test_iterating_tells_each_step(tmp_path, capsys):
    told = list(run(tmp_path / "run", quiet=False))
    assert [t["step"] for t in told] == [1, 2, 3, 4, 5, 6]
    assert [t["step"] for t in told if "validation" in t] == [3, 6]
    assert told[2]["validation"]["loss"] == pytest.approx(
        float(rows(tmp_path / "run" / "validation.csv")[0]["loss"])
    )
    assert all(t["loss"] == pytest.approx(t["similarity"] + t["regularity"]) for t in told)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("model", [net, Own])
def test_goes_on_bit_for_bit(tmp_path, model):
    """Left in the middle of a loop and started again, as if nothing had happened."""
    run(tmp_path / "whole", model()).train()
    for told in run(tmp_path / "parts", model()):
        if told["step"] == 2:
            break
    with contextlib.suppress(RuntimeError):
        for told in run(tmp_path / "parts", model()):
            if told["step"] == 4:
                raise RuntimeError("something of the script's")
    # A crash costs what was not saved: here nothing, as leaving the loop saves.
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["counted"]["step"] == 4
    last = run(tmp_path / "parts", model())
    assert last.training.step == 4
    last.train()
    for name in ("last.pt", "best.pt"):
        assert same(tmp_path / "whole" / name, tmp_path / "parts" / name)
    measured = ("seconds", "memory_mb")
    first, second = (
        [{k: v for k, v in r.items() if k not in measured} for r in rows(tmp_path / folder / "log.csv")]
        for folder in ("whole", "parts")
    )
    assert first == second
    # Done: nothing more happens, but with more steps.
    assert list(run(tmp_path / "parts", model())) == []
    more = run(tmp_path / "parts", model(), recipe=Recipe(learning_rate=1e-2, steps=7))
    assert [t["step"] for t in more] == [7]


def test_a_watched_validation_is_a_row_an_epoch(tmp_path):
    """Looked at once a step, whoever asks for it; a run that goes on waits as long as it would have."""
    recipe = Recipe(learning_rate=1e-2, epoch=2, steps=20, plateau=1, patience=2, watch="validation")

    def going(folder, seen):
        losses = {2: 3.0, 3: 9.0, 4: 2.0}

        def validation(model):
            seen.append(one.training.step)
            return {"loss": losses.get(one.training.step, 5.0)}

        one = run(tmp_path / folder, recipe=recipe, validation=validation)
        return one

    seen = []
    whole = going("whole", seen)
    whole.train()
    assert seen == [2, 3, 4, 6, 8]
    assert [int(r["step"]) for r in rows(tmp_path / "whole" / "validation.csv")] == seen
    assert checkpoint.load(tmp_path / "whole" / "best.pt")["counted"]["step"] == 4
    for told in going("parts", []):
        if told["step"] == 7:
            break
    last = going("parts", seen := [])
    last.train()
    assert (seen, last.training.step, last.done) == ([8], 8, True)
    assert same(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    rates = [float(r["learning_rate"]) for r in rows(tmp_path / "parts" / "log.csv")]
    assert rates == pytest.approx([1e-2] * 5 + [1e-3] * 2 + [1e-4])


def test_nothing_to_validate_on_is_told(tmp_path):
    recipe = Recipe(patience=2, watch="validation")
    with pytest.raises(ValueError, match="there must be at least one pair to validate on"):
        run(tmp_path / "run", recipe=recipe, validation=[])
    assert not (tmp_path / "run").exists()


def test_a_model_and_pairs_of_ones_own(tmp_path):
    pairs = Pairs()
    one = run(tmp_path / "run", Own(), pairs, validation=lambda model: {"loss": 1.0, "mine": 2.0})
    one.train()
    assert set(pairs.asked) == {0, 1, 2, 3, 4}
    assert {float(r["mine"]) for r in rows(tmp_path / "run" / "validation.csv")} == {2.0}
    assert not (tmp_path / "run" / "validation.png").exists()
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    assert (content["method"], content["preprocessing"]) == ("Own", None)
    torch.testing.assert_close(one.best().state_dict(), content["weights"])
    with pytest.raises(InputError, match="does not say how they are made"):
        checkpoint.preprocessing(content, "best.pt")


def test_masks_of_bool_weigh_as_ones(tmp_path):
    def told(mask):
        pairs = [Sample("a", *torch.rand(2, 1, 1, 16, 18, generator=torch.Generator().manual_seed(0)), mask)]
        return [t["loss"] for t in run(tmp_path / str(mask.dtype), net(), pairs)]

    mask = torch.zeros(1, 1, 16, 18)
    mask[..., :7] = 1
    assert told(mask.bool()) == told(mask)


def test_ctrl_c_saves_and_ends(tmp_path, capsys):
    one = run(tmp_path / "run", quiet=False)
    steps = iter(one)
    assert [next(steps)["step"], next(steps)["step"]] == [1, 2]
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert one.stopped
    assert checkpoint.load(tmp_path / "run" / "last.pt")["counted"]["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "was started with seed 0, and cannot go on with 1"),
        ({"recipe": Recipe(learning_rate=1e-3)}, "was started with learning_rate 0.01"),
        ({"model": VoxelMorph(ndim=2)}, "does not fit a training of voxelmorph"),
        ({"resume": False}, "already holds last.pt"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"minutes": -1}, "minutes must be positive"),
    ],
)
def test_what_cannot_go_on_says_why(tmp_path, options, message):
    run(tmp_path / "run").train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_replaces_only_when_told(tmp_path):
    with pytest.raises(InputError, match=r"holds no last\.pt to resume"):
        run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run").train()
    run(tmp_path / "run", resume=False, replace=True, recipe=Recipe(steps=1)).train()
    assert [r["step"] for r in rows(tmp_path / "run" / "log.csv")] == ["1"]


def test_a_validation_must_have_a_loss(tmp_path):
    with pytest.raises(ValueError, match="a validation must return a loss, got dice"):
        run(tmp_path / "run", validation=lambda model: {"dice": 1.0}).train()


PROCESS = """
import gc
import sys
import torch
from test_run import Own, net, samples
from torchrun import assert_no_threads_of_gloo
from fastreg.training import Recipe, Run, processes, ranks

gc.disable()
with processes("cpu") as device:
    torch.set_num_threads(1)
    recipe = Recipe(learning_rate=1e-2, batch_size=2, steps=4)
    for name, model in (("two", net()), ("own", Own())):
        options = {"recipe": recipe, "validate_every": 2, "quiet": True}
        run = Run(f"{sys.argv[1]}/{name}", model.to(device), samples(), **options)
        for told in run:
            if told["step"] == 3:
                break
        run = Run(f"{sys.argv[1]}/{name}", model, samples(), **options)
        run.train()
        assert run.done and run.training.step == 4
# The run and its model are still there, the process group's threads are not.
assert run.training.model is model
assert_no_threads_of_gloo()
"""


@pytest.mark.slow
def test_two_processes_and_one_log(tmp_path):
    """Left and gone on with, and as one process with that batch."""
    done = run_two(PROCESS, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, model in (("two", net()), ("own", Own())):
        recipe = Recipe(learning_rate=1e-2, batch_size=2, steps=4)
        run(tmp_path / "one" / name, model, recipe=recipe, validate_every=2).train()
        one, two = (
            [float(r["loss"]) for r in rows(tmp_path / folder / name / "log.csv")] for folder in ("one", ".")
        )
        assert two == pytest.approx(one, rel=1e-4)
        assert len(rows(tmp_path / name / "validation.csv")) == 2


STOPPED = """
import gc
import os
import signal
import sys
import torch
from test_run import net, samples
from torchrun import assert_no_threads_of_gloo
from fastreg.training import Recipe, Run, processes

gc.disable()
try:
    with processes("cpu") as device:
        torch.set_num_threads(1)
        recipe = Recipe(batch_size=2, steps=100)
        run = Run(sys.argv[1], net().to(device), samples(), recipe=recipe, quiet=True)
        for told in run:
            if told["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    assert run.stopped and run.training.step == 2
    assert_no_threads_of_gloo()
else:
    raise AssertionError("was not stopped")
"""


@pytest.mark.slow
def test_two_processes_that_a_signal_ends_part_as_at_the_end(tmp_path):
    done = run_two(STOPPED, tmp_path / "run", seconds=120)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "run" / "last.pt")["counted"]["step"] == 2
