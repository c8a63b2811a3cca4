import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import _channels, _descent
from fastreg._channels import Channels, in_turn
from fastreg.registration import _level, register
from tests.test_registration import error, pair, texture

SHAPE = (56, 60)
QUICK = {"iterations": 40}


class Peak(TorchDispatchMode):
    """The most bytes that what is made inside held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = (
            [t.untyped_storage() for t in torch.utils._pytree.tree_leaves(ts) if isinstance(t, torch.Tensor)]
            for ts in ((args, kwargs), out)
        )
        old = {storage.data_ptr() for storage in given}  # of which this is a view
        for storage in made:
            if storage.data_ptr() not in old:
                self._count(storage)
        return out

    def _count(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def level(channels, similarity="lcc", shares=None, **options):
    fixed, moving = (_descent.rescaled(texture(SHAPE, seed=s, channels=channels)) for s in (1, 2))
    field = 0.1 * torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    where = (fixed, moving, None, None), SHAPE, (1.0, 1.0), field, "dense", None
    return _level(*where, similarity, 5, 1.0, shares=shares, **options)


def loss_and_gradient(one):
    parameter = one.transform.parameter()
    loss = one.objective(parameter)[0]
    return loss.detach(), torch.autograd.grad(loss, parameter)[0]


@pytest.mark.parametrize("similarity", ["lcc", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_few_channels_at_a_time_are_all_of_them(similarity, symmetric):
    shares = [1 / 7] * 7
    at_once = level(7, similarity, symmetric=symmetric)
    few = level(7, similarity, shares, symmetric=symmetric)
    assert isinstance(few.similarity, Channels)
    assert [run[:3] for run in few.similarity.runs] == [
        (pytest.approx(4 / 7), 0, 4),
        (pytest.approx(3 / 7), 4, 7),
    ]
    for a, b in zip(loss_and_gradient(at_once), loss_and_gradient(few), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("similarity", ["lcc", "mse", "mind", "mi"])
def test_weights_of_channels(similarity):
    """The loss is the mean of those of the channels alone, by weight; one of weight 0 is not looked at."""
    weighted = level(3, similarity, [0.25, 0.75, 0.0])
    field = weighted.transform.base
    u = weighted.displacement(field)
    moved = fastreg.warp(weighted.moving, u, padding="border")
    fixed = _descent.rescaled(texture(SHAPE, seed=1, channels=3))
    alone = [
        _descent.Similarity(similarity, fixed[:, k : k + 1], None, 5)(moved[:, k : k + 1]) for k in range(3)
    ]
    found = weighted.objective(weighted.transform.parameter())[1]
    torch.testing.assert_close(found, 0.25 * alone[0] + 0.75 * alone[1])
    assert [run[1] for run in weighted.similarity.runs] == [0, 1]


def test_gradient_in_turn():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    parts = [torch.sum, lambda y: (y**3).sum(), lambda y: y.sin().prod()]
    assert torch.autograd.gradcheck(lambda x: in_turn(x, parts), x)
    with torch.no_grad():
        torch.testing.assert_close(in_turn(x, parts), sum(part(x) for part in parts))


@pytest.mark.parametrize("symmetric", [False, True])
def test_memory_does_not_grow_with_channels(symmetric, monkeypatch):
    def peak(channels):
        one = level(channels, shares=[1 / channels] * channels, symmetric=symmetric)
        parameter = one.transform.parameter()
        with Peak() as counted:
            one.objective(parameter)[0].backward()
        return counted.most

    few, many = peak(8), peak(32)
    assert many < 1.05 * few
    monkeypatch.setattr(_channels, "HELD", 32)  # what it would be
    assert peak(32) > 3 * few


@pytest.mark.parametrize("options", [{}, {"affine": True}, {"symmetric": True}, {"similarity": "mse"}])
def test_feature_maps(options):
    fixed, moving, truth = pair(SHAPE, (3.0, -3.0), channels=32)
    result = register(fixed, moving, **options, **QUICK)
    assert result.moved.shape == fixed.shape
    assert error(result.displacement, truth) < 0.2 * error(0 * truth, truth)


def test_a_channel_that_says_nothing_is_outweighed():
    fixed, moving, truth = pair(SHAPE, (3.0, -3.0))
    noise = texture(SHAPE, seed=8), texture(SHAPE, seed=9)
    two = torch.cat([fixed, noise[0]], 1), torch.cat([moving, noise[1]], 1)
    alone = register(fixed, moving, **QUICK).displacement
    found = {
        w: error(register(*two, channel_weights=w, **QUICK).displacement, truth)
        for w in ((1.0, 1.0), (1.0, 0.1), (0.1, 1.0))
    }
    assert found[1.0, 0.1] < 0.7 * found[1.0, 1.0] < 0.7 * found[0.1, 1.0]
    without = register(*two, channel_weights=torch.tensor([3.0, 0.0]), **QUICK).displacement
    torch.testing.assert_close(without, alone, atol=2e-2, rtol=0)
    torch.testing.assert_close(
        register(*two, channel_weights=[5, 5], **QUICK).displacement, register(*two, **QUICK).displacement
    )


@pytest.mark.parametrize("weights", [[2, 0], [1, 1, 0], [1, 3, 0]])
def test_a_channel_of_weight_0_is_not_looked_at(weights):
    """Not by what chooses the similarity or the start either."""
    n = len(weights) - 1
    fixed, moving, _ = pair(SHAPE, (3.0, -3.0), channels=n)
    other = texture(SHAPE, seed=8)
    both = torch.cat([fixed, other], 1), torch.cat([moving, other.abs().roll(20, -1)], 1)
    options = {"start": "auto", "iterations": 5}
    alone = register(fixed, moving, channel_weights=weights[:-1], **options)
    result = register(*both, channel_weights=weights, **options)
    assert result.consistency == alone.consistency
    assert torch.equal(result.displacement, alone.displacement)
    assert torch.equal(result.moved, fastreg.warp(both[1], result.displacement))


def test_consistency_is_by_weight():
    fixed, moving, _ = pair(SHAPE, (1.0, 1.0))
    both = torch.cat([fixed, fixed], 1), torch.cat([moving, (moving - moving.mean()).abs()], 1)
    found = [
        register(*both, channel_weights=w, iterations=0).consistency for w in ([1, 0], [9, 1], [1, 9], [0, 1])
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9
    assert found[3] < 0.1


@pytest.mark.parametrize(
    ("kind", "match", "weights"),
    [
        (ValueError, "channel_weights must be 2 numbers, one per channel, got 3", [1, 2, 3]),
        (ValueError, "channel_weights must be 2 numbers, one per channel, got 1.0", 1.0),
        (ValueError, "channel_weights must be a number >= 0, or one per axis", [1.0, -1.0]),
        (ValueError, "channel_weights must be a number >= 0, or one per axis", [1.0, float("nan")]),
        (ValueError, "channel_weights must be more than 0 somewhere", (0, 0)),
    ],
)
def test_errors_of_channel_weights(kind, match, weights):
    image = texture(SHAPE, channels=2)
    with pytest.raises(kind, match=f"fastreg::register: {match}"):
        register(image, image, channel_weights=weights)
