"""Models and what they return go where PyTorch takes them: copies, other processes, DataParallel, torch.export."""

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from test_models import BUILD, build, pair
from torch.nn.parallel.scatter_gather import gather

from fastreg.models import Model, Prediction

NETS = [name for name in BUILD if name != "rrn_features"]


def assert_same(ours, theirs):
    ours, theirs = (pytree.tree_leaves(p) for p in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_copies_are_the_same_model(name):
    model, images = build(name), pair(name)
    with torch.no_grad():
        expected = model(*images)
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert repr(other) == repr(model)
            assert other.arguments == model.arguments
            assert_same(other(*images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_spawned_process_runs_it(name, tmp_path):
    model, images = build(name), pair(name)
    torch.multiprocessing.spawn(_run, (model, images, tmp_path / "out"))
    with torch.no_grad():
        assert_same(torch.load(tmp_path / "out", weights_only=False), model(*images))


def _run(rank, model, images, path):
    with torch.no_grad():
        torch.save(model(*images), path)


@pytest.mark.parametrize("name", NETS)
def test_predictions_are_gathered(name, monkeypatch):
    class Cat:
        """PyTorch's own takes tensors of GPUs alone."""

        @staticmethod
        def apply(device, dim, *tensors):
            return torch.cat(tensors, dim)

    monkeypatch.setattr("torch.nn.parallel.scatter_gather.Gather", Cat)
    model, images = build(name), pair(name, 2)
    with torch.no_grad():
        parts = [model(*(t[k : k + 1] for t in images)) for k in range(2)]
        whole = gather(parts, "cpu")
        assert isinstance(whole, Prediction)
        assert_same(whole, model(*images))
    assert_same(whole.sample(1), parts[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_exports(name):
    """For any batch, where it is traced with more than one pair; LinDef goes through its samples one by one."""
    model, images = build(name), pair(name, 2)
    batch = None if name == "lindef" else torch.export.Dim("batch", min=1, max=8)
    shapes = None if name == "lindef" else ({0: batch}, {0: batch})
    program = torch.export.export(model, tuple(images), dynamic_shapes=shapes)
    with torch.no_grad():
        for some in (images, pair(name, 2 if name == "lindef" else 3)):
            assert_same(program.module()(*some), model(*some))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_compiles(name):
    torch._dynamo.reset()
    model, images = build(name), pair(name)
    with torch.no_grad():
        assert_same(torch.compile(model, backend="aot_eager")(*images), model(*images))


class Sized(Model, small={"width": 2}):
    """A method whose arguments have no defaults."""

    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)


def test_a_method_with_required_arguments_is_copied():
    model = Sized(3)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other.layer.weight, model.layer.weight)
        assert other.arguments == {"width": 3}
