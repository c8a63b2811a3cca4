"""The trainer: what seed and step decide, continuing, stopping, several processes."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torchrun import run_two

from fastreg.models import R2N2, VoxelMorph
from fastreg.training import RECIPES, NotFinite, Recipe, Sample, Training, Validation


def net(**options):
    torch.manual_seed(0)
    model = VoxelMorph(
        encoder=(2, 2, 3, 3), decoder=(3, 3, 3, 2, 2, 2, 2), ndim=2, similarity="mse", **options
    )
    torch.nn.init.normal_(model.head.conv.weight, std=0.1)
    return model


def samples(count=5, shape=(16, 18), **options):
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(2, 1, 1, *shape, generator=generator) for _ in range(count)]
    return [Sample(f"pair {k}", *pair, **options) for k, pair in enumerate(images)]


def masked():
    """Each with another mask, the last one with none."""
    found = samples()
    for k in range(4):
        mask = torch.zeros(1, 1, 16, 18)
        mask[..., : 2 + 4 * k] = 1 + k
        found[k] = replace(found[k], mask=mask)
    return found


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(steps, **options):
    training = Training(net(), samples(), **options)
    told = [training.advance() for _ in range(steps)]
    return training, told


def test_trains():
    training, told = trained(60, recipe=Recipe(learning_rate=1e-2))
    assert sum(t["loss"] for t in told[-10:]) < 0.95 * sum(t["loss"] for t in told[:10])
    assert told[0]["loss"] == pytest.approx(told[0]["similarity"] + told[0]["regularity"])
    assert 0 <= told[0]["folding"] <= 1
    assert told[0]["gradient"] > 0
    assert training.step == 60


def test_a_step_is_adams():
    """The first step by hand, with the gradient of the batch."""
    recipe = Recipe(learning_rate=1e-2, batch_size=2)
    training = Training(net(), samples(), recipe)
    first = training.drawn(0)
    training.advance()
    model, chosen = net(), [samples()[k] for k in first]
    fixed, moving = (torch.cat([getattr(s, side) for s in chosen]) for side in ("fixed", "moving"))
    model.loss(fixed, moving, model(fixed, moving)).backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    torch.testing.assert_close(weights(training.model), weights(model), rtol=1e-5, atol=1e-7)


def test_each_epoch_takes_every_pair_once_in_its_own_order():
    training = Training(net(), samples(6), Recipe(batch_size=2))
    epochs = [[k for step in range(3 * e, 3 * e + 3) for k in training.drawn(step)] for e in range(3)]
    assert all(sorted(e) == list(range(6)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert Training(net(), samples(6), Recipe(batch_size=2), seed=1).drawn(0) != epochs[0][:2]


def test_batches_do_not_straddle_epochs():
    training = Training(net(), samples(5), Recipe(batch_size=2))
    assert training.per_epoch == 2
    for epoch in range(4):
        taken = training.drawn(2 * epoch) + training.drawn(2 * epoch + 1)
        assert len(set(taken)) == 4
    assert sorted(Training(net(), samples(2), Recipe(batch_size=4)).drawn(7)) == [0, 0, 1, 1]


@pytest.mark.parametrize("noisy", [False, True])
def test_continues_bit_for_bit(noisy):
    """Also where the model draws noise."""

    def build():
        torch.manual_seed(0)
        return R2N2(steps=2, widths=(2, 2, 4, 4), noise="released") if noisy else net()

    recipe = Recipe(learning_rate=1e-3, amsgrad=True, clip_gradient=0.05, plateau=1)
    whole = Training(build(), samples(3), recipe)
    for _ in range(4):
        whole.advance()
    kept = torch.load(_saved(whole.state()), weights_only=True)
    rest = [whole.advance()["loss"] for _ in range(5)]
    torch.manual_seed(99)
    again = Training(build(), samples(3), recipe)
    again.restore(kept)
    assert [again.advance()["loss"] for _ in range(5)] == rest
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def _saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_what_a_model_draws_hangs_on_seed_and_step():
    def drawn(seed):
        numbers, training = [], Training(net(), samples(), seed=seed)
        training.model.register_forward_pre_hook(lambda *_: numbers.append(float(torch.rand(()))))
        training.advance(), training.advance()
        return numbers

    assert drawn(0) == drawn(0)
    assert len({*drawn(0), *drawn(1)}) == 4


def test_gradient_is_clipped():
    loose, _ = trained(1, recipe=Recipe(learning_rate=1e-2))
    norm = trained(1)[1][0]["gradient"]
    model = net()
    training = Training(model, samples(), Recipe(clip_gradient=norm / 10))
    assert training.advance()["gradient"] == pytest.approx(norm)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(total) == pytest.approx(norm / 10, rel=1e-4)
    assert loose.step == 1


def test_plateau_and_patience():
    training = Training(net(), samples(2), Recipe(learning_rate=1.0, plateau=2, patience=5))
    for loss in (3.0, 1.0, 2.0, 2.0):  # an epoch of mean 2, then one no better
        training._count(loss)
    assert training.optimizer.param_groups[0]["lr"] == 1.0
    assert training.waited == 1
    for _ in range(2):
        training._count(2.5)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert not training.done
    for _ in range(6):
        training._count(2.5)
    assert training.done
    training._count(0.0), training._count(0.0)
    assert not training.done


def watching(values, recipe=None, **options):
    """A training of epochs of two steps whose validation finds one value after the other."""
    left, asked = iter(values), []

    def validation(model):
        asked.append(training.step)
        return next(left)

    recipe = recipe or Recipe(learning_rate=1e-2, plateau=2, patience=3, watch="validation")
    training = Training(net(), samples(2), recipe, validation=validation, **options)
    return training, asked


def test_plateau_and_patience_look_at_validation():
    """Whatever becomes of the training loss: once an epoch, of the weights that it ends with."""
    training, asked = watching([2.0, 1.0, 1.5, {"loss": 1.5, "dice": 0.9}, math.nan])
    rates = []
    while not training.done:
        training.advance()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert asked == [2, 4, 6, 8, 10]
    assert training.best == 1.0
    assert rates == pytest.approx([1e-2] * 7 + [1e-3] * 3)


def test_what_is_watched_is_kept_when_it_goes_on():
    """Also where validation itself has failed: the epoch is not lost, and is asked about again."""
    values = [2.0, 1.0, 1.5, 1.4, 1.2]
    whole, _ = watching(values)
    for _ in range(7):
        whole.advance()
    part, _ = watching(values[:2])
    for _ in range(5):
        part.advance()
    with pytest.raises(StopIteration):
        part.advance()
    kept = torch.load(_saved(part.state()), weights_only=True)
    again, asked = watching(values[2:])
    again.restore(kept)
    again.advance()
    assert asked == [6]
    for training in (whole, again):
        while not training.done:
            training.advance()
    assert asked == [6, 8, 10]
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] < 1e-2


def test_a_term_is_watched_up_to_a_tolerance():
    """RRN's LCC: flat is what gains less than that."""
    recipe = Recipe(learning_rate=1e-9, epoch=2, watch="similarity", patience=3, tolerance=1e-3)
    training = Training(net(), samples(1), recipe)
    told = [training.advance() for _ in range(2)]
    assert training.best == pytest.approx(sum(t["similarity"] for t in told) / 2)
    assert training.best != pytest.approx(sum(t["loss"] for t in told) / 2)
    while not training.done:
        training.advance()
    assert training.step == 8


def test_what_cannot_be_watched_is_told():
    recipe = Recipe(patience=3, watch="validation")
    with pytest.raises(ValueError, match=r"watches the loss of pairs to validate on, and there are none"):
        Training(net(), samples(), recipe)
    with pytest.raises(ValueError, match="there must be at least one pair to validate on"):
        Training(net(), samples(), recipe, validation=Validation([]))
    # Nobody waits for it.
    Training(net(), samples(), replace(recipe, patience=None)).advance()
    training = Training(net(), samples(), Recipe(watch="ncc"))
    with pytest.raises(
        ValueError, match="must watch validation or a term of loss, similarity, regularity, got ncc"
    ):
        training.advance()
    assert torch.equal(weights(training.model), weights(net()))


def test_epochs_are_continued():
    training, again = (Training(net(), samples(2), Recipe(plateau=3, patience=5)) for _ in range(2))
    for loss in (3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0):  # an epoch of mean 2, two no better, half of one
        training._count(loss)
    again.restore(training.state())
    counted = ("epoch_sum", "epoch_steps", "best", "stale", "waited")
    assert [getattr(again, name) for name in counted] == [2.0, 1, 2.0, 2, 2]


def test_recipes_are_those_of_the_papers():
    assert RECIPES["lindef"] == Recipe(
        1e-3, batch_size=2, plateau=50, patience=100, epoch=100, steps=30_000, watch="validation"
    )
    assert (RECIPES["rrn"].watch, RECIPES["rrn"].steps) == ("similarity", 500 * RECIPES["rrn"].epoch)
    assert RECIPES["r2n2"].amsgrad
    assert RECIPES["r2n2"].clip_gradient == 1.0
    assert {m: r.learning_rate for m, r in RECIPES.items() if m not in ("lindef", "r2n2")} == {
        "rrn": 1e-4, "f3rnet": 1e-5, "prdfe": 1e-4, "voxelmorph": 1e-4,
    }  # fmt: skip
    assert RECIPES["prdfe"].batch_size == 4


def test_not_finite_stops_before_the_weights_change():
    bad = samples()
    bad[2].fixed[0, 0, 3, 3] = math.nan
    training = Training(net(), bad)
    while training.drawn(training.step) != [2]:
        training.advance()
    with pytest.raises(NotFinite, match=r"step \d: the loss .* not finite .* pair 2") as caught:
        training.advance()
    assert caught.value.names == ["pair 2"]
    assert caught.value.step == training.step
    assert weights(training.model).isfinite().all()


def test_mask_takes_part():
    half = torch.zeros(1, 1, 16, 18)
    half[..., :9] = 1
    whole = Training(net(), samples(1)).advance()["similarity"]
    masked = Training(net(), samples(1, mask=half)).advance()["similarity"]
    assert whole != masked
    pairs = [*samples(1, mask=half), *samples(2)[1:]]
    assert math.isfinite(Training(net(), pairs, Recipe(batch_size=2)).advance()["loss"])


def test_masks_weigh_as_in_the_models_loss():
    """LCC's mask is also a weight within windows: to scale it would change what is trained. A batch is its pairs."""

    def lcc():
        model = net()
        model.similarity = "lcc"
        return model

    pairs = [replace(s, mask=torch.zeros(1, 1, 16, 18)) for s in samples(2)]
    for k, s in enumerate(pairs):
        s.mask[..., : 3 + 5 * k] = 1
    losses = []
    for s in pairs:
        model = lcc()
        losses.append(float(model.loss(s.fixed, s.moving, model(s.fixed, s.moving), s.mask).detach()))
        assert Training(lcc(), [s]).advance()["loss"] == pytest.approx(losses[-1], rel=1e-5)
    both = Training(lcc(), pairs, Recipe(batch_size=2)).advance()["loss"]
    assert both == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_lindefs_plateau_comes_before_its_end():
    """Of all ordered pairs of 56 images an epoch would be 1540 steps, and patience longer than training."""
    recipe = RECIPES["lindef"]
    training = Training(net(), samples(2) * 1540, recipe, validation=lambda model: 1.0)
    assert training.per_epoch * recipe.patience < recipe.steps


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one pair"):
        Training(net(), [])
    with pytest.raises(ValueError, match="batch_size must be"):
        Training(net(), samples(), Recipe(batch_size=0))
    mixed = [*samples(1), *samples(1, (17, 18))]
    with pytest.raises(ValueError, match="must have one size, got 16x18, 17x18"):
        Training(net(), mixed, Recipe(batch_size=2)).advance()


PROCESS = """
import gc
import sys
import torch
import torch.distributed as dist
from test_training import masked, net, weights
from torchrun import TASKS, assert_no_threads_of_gloo, threads_of_gloo
from fastreg.training import Recipe, Training

gc.disable()
dist.init_process_group("gloo")
torch.set_num_threads(1)
recipe = Recipe(learning_rate=1e-2, batch_size=2, plateau=9, watch="validation")
# The first process alone is asked, and all know what it has found.
training = Training(net(), masked(), recipe, validation=lambda model: 3.0 + dist.get_rank())
told = [training.advance() for _ in range(3)]
assert training.best == 3.0
if dist.get_rank() == 0:
    gradients = torch.cat([p.grad.flatten() for p in training.model.parameters()])
    torch.save({"gradients": gradients, "weights": weights(training.model), "losses": [t["loss"] for t in told]}, sys.argv[1])
assert threads_of_gloo() or not TASKS.is_dir()
del training
gc.collect()
dist.destroy_process_group()
assert_no_threads_of_gloo()
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    done = run_two(PROCESS, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    one = Training(net(), masked(), Recipe(learning_rate=1e-2, batch_size=2))
    losses = [one.advance()["loss"] for _ in range(3)]
    gradients = torch.cat([p.grad.flatten() for p in one.model.parameters()])
    assert two["losses"] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(two["gradients"], gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(two["weights"], weights(one.model), rtol=1e-3, atol=1e-5)


def test_pairs_must_be_samples():
    training = Training(net(), [tuple(torch.rand(2, 1, 1, 16, 18))])
    with pytest.raises(
        TypeError, match=r"fastreg::train: pairs\[0\] must be a fastreg.training.Sample, got tuple"
    ):
        training.advance()


def test_a_prediction_shows_shapes():
    image = samples(1)[0].fixed
    assert repr(net()(image, image)) == (
        "Prediction(displacement=1x2x16x18, fields=<0>, affine=None, parameters=None)"
    )
