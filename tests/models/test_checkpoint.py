"""Checkpoints that are damaged or made up: one line, before anything is built of them."""

import copy
import math
import random
import zipfile

import pytest
import torch

from fastreg import io, models
from fastreg.training import Recipe, Run, Sample, checkpoint, schema

OPTIONS = {"encoder": (2, 2, 2, 2), "decoder": (2, 2, 2, 2, 2, 2), "ndim": 2, "similarity": "mse"}


def content(**more):
    model = models.VoxelMorph(**OPTIONS)
    return {
        "method": "voxelmorph",
        "preset": "paper",
        "arguments": model.arguments,
        "preprocessing": {"intensity": "minmax", "crop": None, "size": (16, 18), "spacing": None},
        "weights": model.state_dict(),
        **more,
    }


def opened(path):
    stored = checkpoint.load(path)
    checkpoint.preprocessing(stored, path)
    return checkpoint.build(stored, path)


def test_no_flipped_bit_is_another_net(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, content())
    good, weights = path.read_bytes(), opened(path).state_dict()
    draw, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(good)
        bit = draw.randrange(len(good) * 8)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = opened(path).state_dict()
        except io.InputError:
            refused += 1
        else:  # padding between the parts
            assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert refused > 75


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_one_that_is_cut_short(tmp_path, share):
    path = tmp_path / "c.pt"
    checkpoint.save(path, content())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(io.InputError, match="not a checkpoint, or damaged"):
        checkpoint.load(path)


def test_another_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(io.InputError, match="not a checkpoint, or damaged"):
        checkpoint.load(tmp_path / "c.pt")


NAN = math.nan
HUGE = torch.zeros(1).expand(10**6, 10**6)
WRONG = [
    *[("method", v) for v in (None, 3, True, [], "x", torch.zeros(2))],
    *[("arguments", v) for v in (None, 3, [], "encoder", {3: 4}, {"nothing": 1}, {"weight": torch.zeros(3)})],
    *[("arguments", {**OPTIONS, "encoder": v}) for v in ((10**9,) * 4, (NAN,) * 4, 16, (2, 2), [[2]] * 4)],
    *[("arguments", {**OPTIONS, "weight": v}) for v in (NAN, math.inf, True, "1", None, [1])],
    *[("arguments", {**OPTIONS, "mind": v}) for v in (3, "x")],
    *[
        ("preprocessing", v)
        for v in (3, [], "x", {"nothing": 1}, {"intensity": (1, NAN)}, {"intensity": "x"})
    ],
    *[("preprocessing", {"crop": v}) for v in (10**30, "x", ((1,),), ((1, 2, 3),), ((0.5, 2.0),), 3)],
    *[("preprocessing", {"size": v}) for v in (3, (NAN, 2), (1, 1), ("a", "b"), torch.zeros(2), (2.5, 3))],
    *[("preprocessing", {"spacing": v}) for v in (3, (NAN, 2), (0, 1), ("a", "b"), (math.inf, 1.0))],
    *[("weights", v) for v in (None, 3, [], {}, {"x": torch.zeros(1)}, {3: 4})],
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_entries_of_another_kind(tmp_path, key, value):
    path = tmp_path / "c.pt"
    checkpoint.save(path, content(**{key: value}))
    with pytest.raises(io.InputError, match=r"c\.pt: "):
        opened(path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "x",
        HUGE,
        torch.zeros(1),
        torch.zeros(2, 2, dtype=torch.int64).to_sparse(),
        "int",
        "nan",
        "meta",
    ],
    ids=str,
)
def test_weights_of_another_kind(tmp_path, value):
    path, stored = tmp_path / "c.pt", content()
    name, tensor = next(iter(stored["weights"].items()))
    if isinstance(value, str) and value != "x":
        value = {
            "int": tensor.long(), "nan": torch.full_like(tensor, NAN), "meta": tensor.to("meta"),
        }[value]  # fmt: skip
    checkpoint.save(path, {**stored, "weights": {**stored["weights"], name: value}})
    with pytest.raises(io.InputError, match=r"c\.pt: "):
        opened(path)


# What a training goes on from


@pytest.fixture(scope="module")
def going(tmp_path_factory):
    """A run of two steps: (function that starts it again from its folder, what its last.pt holds)."""
    folder = tmp_path_factory.mktemp("run")
    images = torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = [Sample("a", *images)]

    def start(steps):
        torch.manual_seed(0)
        recipe = Recipe(steps=steps, amsgrad=True)
        return Run(folder, models.VoxelMorph(**OPTIONS), pairs, recipe=recipe, quiet=True)

    start(2).train()
    return start, checkpoint.load(folder / "last.pt")


def damaged(stored, where, value):
    out = copy.deepcopy(stored)
    place = out
    for key in where[:-1]:
        place = place[key]
    if value is KeyError:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return out


ANYTHING = (None, "x", NAN, {}, [], torch.zeros(3), KeyError)
PLACES = {
    **{("counted", name): (-1, -math.inf) for name in schema.COUNTED if name not in ("best", "epoch_sum")},
    ("counted", "best"): (),
    ("counted", "epoch_sum"): (math.inf,),
    ("counted",): (3,),
    ("best",): (),
    ("seconds",): (math.inf,),
    ("seed",): (1.5, 7),
    ("recipe",): (3,),
    ("recipe", "learning_rate"): (True, 1.0),
    ("recipe", "amsgrad"): (0,),
    ("recipe", "batch_size"): (2.0,),
    ("settings",): (3,),
    ("pairs",): ({"number": 2},),
    ("weights",): (),
    ("optimizer",): (3,),
    ("optimizer", "state"): (3,),
    ("optimizer", "state", 0): (3,),
    ("optimizer", "state", 0, "exp_avg"): (HUGE,),
    ("optimizer", "state", 0, "step"): (torch.tensor(NAN),),
    ("optimizer", "param_groups"): ([3], [{}, {}]),
    ("optimizer", "param_groups", 0, "lr"): (0.0, -1.0, math.inf),
    ("optimizer", "param_groups", 0, "betas"): ((2.0, 3.0),),
    ("optimizer", "param_groups", 0, "fused"): (),
}
CASES = [(where, value) for where, more in PLACES.items() for value in (*ANYTHING, *more)]
# What may be missing, or be anything: a script's own settings; which pairs, of a checkpoint from before it was kept; moments of
# a weight that has had no gradient; options of another torch's Adam.
HARMLESS = {
    (("settings",), "{}"),
    (("pairs",), "KeyError"),
    (("optimizer", "state"), "{}"),
    (("optimizer", "state", 0), "KeyError"),
    *((("optimizer", "param_groups", 0, name), "KeyError") for name in ("betas", "fused")),
}


@pytest.mark.parametrize(("where", "value"), CASES)
def test_a_state_of_another_kind(going, where, value):
    start, stored = going
    path = start(2).folder / "last.pt"
    called = "KeyError" if value is KeyError else str(value)
    checkpoint.save(path, damaged(stored, where, value))
    try:
        if (where, called) in HARMLESS:
            start(3)
        else:
            with pytest.raises(io.InputError):
                start(3)
    finally:
        checkpoint.save(path, stored)


def test_a_refused_state_changes_nothing(going):
    start, stored = going
    training = start(2).training
    before = copy.deepcopy(training.state())
    with pytest.raises(ValueError, match="does not fit this training: optimizer exp_avg"):
        training.restore(damaged(stored, ("optimizer", "state", 0, "exp_avg"), torch.zeros(1)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(before["weights"].values(), training.state()["weights"].values(), strict=True)
    )
    assert before["counted"] == training.state()["counted"]


def test_old_checkpoints_go_on(going):
    """Of a torch whose Adam had fewer options, and of a fastreg that did not keep which pairs they were."""
    start, stored = going
    path = start(2).folder / "last.pt"
    old = damaged(stored, ("pairs",), KeyError)
    del old["optimizer"]["param_groups"][0]["fused"]
    checkpoint.save(path, old)
    run = start(4)
    run.train()
    assert run.training.step == 4
