"""Training of a model on pairs: the papers' optimisers, and a step that can be continued bit for bit.

    training = Training(RRN(), pairs, recipe=RECIPES["rrn"])
    while training.step < 1000:
        training.advance()

`pairs` is a sequence of `Sample`; what is drawn at a step follows from the seed and the step alone, so that model, optimiser
and step number are the whole state.
"""

import contextlib
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn

from fastreg import ops
from fastreg.models import MODELS
from fastreg.models.recipe import Recipe

# DDP imports it, and imported later than init_process_group it keeps the group in its default arguments for good; gloo's
# threads then outlive destroy_process_group, and may abort the process at its end.
with contextlib.suppress(ImportError):  # a torch without torch.distributed
    import torch.distributed.nn.functional


@dataclass(frozen=True)
class Sample:
    """A pair as a net takes it: images (1, 1, *spatial) of one shape; mask: the same shape, weights, or None."""

    name: str
    fixed: torch.Tensor
    moving: torch.Tensor
    mask: torch.Tensor | None = None


# The papers'.
RECIPES = {name: cls.recipe for name, cls in MODELS.items()}


class NotFinite(ValueError):
    """A loss or gradient is NaN or infinite: step, the names of the pairs, the terms of the loss."""

    def __init__(self, step, names, terms):
        self.step, self.names, self.terms = step, names, terms
        values = ", ".join(f"{k} {v:g}" for k, v in terms.items())
        super().__init__(
            f"step {step}: the loss or its gradient is not finite ({values}) for {', '.join(names)}"
        )


class _Loss(nn.Module):
    """Prediction and loss in one forward, so that DDP sees all of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, fixed, moving, mask):
        prediction = self.model(fixed, moving)
        if mask is None or len(mask) == 1:
            return self.model.terms(fixed, moving, prediction, mask), prediction.displacement
        # Pair by pair, so that pairs count alike, however much their masks hold, and a batch can be split between processes.
        terms = [
            self.model.terms(*(t[k : k + 1] for t in (fixed, moving)), prediction.sample(k), mask[k : k + 1])
            for k in range(len(mask))
        ]
        return {name: sum(t[name] for t in terms) / len(terms) for name in terms[0]}, prediction.displacement


def ranks():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Training:
    """Trains a model, one optimiser step after the other.

    Args:
        model (fastreg.models.Model): on the device it is to be trained on.
        pairs: a sequence of Sample (len, [k]); a batch's samples must have one shape. What they hold is moved to the
            model's device.
        recipe (Recipe): RECIPES[method], for one.
        seed (int): of the order of pairs and of what a model draws (R2N2's noise).
        amp (bool): bf16 convolutions under torch.autocast. compile (bool): torch.compile.

    Under an initialised torch.distributed the model is wrapped in DistributedDataParallel and each process takes its part
    of a batch. With gloo: import this module before init_process_group, and let go of the training (del, gc.collect())
    before destroy_process_group, or its threads outlive the interpreter and may abort the process.
    """

    def __init__(self, model, pairs, recipe=None, *, seed=0, amp=False, compile=False):
        if len(pairs) == 0:
            raise ValueError("fastreg::train: there must be at least one pair to train on")
        self.model, self.pairs, self.recipe = model, pairs, recipe or Recipe()
        self.seed, self.amp = seed, amp
        self.rank, self.world = ranks()
        if self.recipe.batch_size < 1 or self.recipe.batch_size % self.world:
            raise ValueError(
                f"fastreg::train: batch_size must be a positive multiple of the number of processes, {self.world}, "
                f"got {self.recipe.batch_size}"
            )
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = parameters[0].device
        self.loss = _Loss(model)
        if self.world > 1:
            on = [self.device] if self.device.type == "cuda" else None
            self.loss = nn.parallel.DistributedDataParallel(self.loss, device_ids=on)
        if compile:
            self.loss = torch.compile(self.loss)
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.recipe.learning_rate, amsgrad=self.recipe.amsgrad, fused=True
        )
        self.step = 0
        # Of the epochs: sum of losses and steps of the running one, the best mean, epochs since.
        self.epoch_sum, self.epoch_steps, self.best, self.stale, self.waited = 0.0, 0, math.inf, 0, 0

    @property
    def per_epoch(self):
        """Steps of an epoch."""
        return self.recipe.epoch or max(1, len(self.pairs) // self.recipe.batch_size)

    def drawn(self, step):
        """Which pairs a step takes, of all processes: each epoch in another order, nothing twice in one; what does not fill a
        batch at its end is left out, and fewer pairs than a batch come again.
        """
        n, size = len(self.pairs), self.recipe.batch_size
        epoch, at = divmod(step, max(1, n // size))
        order = torch.randperm(
            n, generator=torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        )
        return [int(order[(at * size + k) % n]) for k in range(size)]

    @property
    def done(self):
        """Whether the recipe's steps are done, or patience has run out."""
        patience = self.recipe.patience
        return self.step >= self.recipe.steps or (patience is not None and self.waited >= patience)

    def _batch(self):
        mine = self.drawn(self.step)[self.rank :: self.world]
        samples = [self.pairs[k] for k in mine]
        for k, sample in zip(mine, samples, strict=True):
            if not isinstance(sample, Sample):
                raise TypeError(
                    f"fastreg::train: pairs[{k}] must be a fastreg.training.Sample, got {type(sample).__name__}"
                )
        shapes = {tuple(s.fixed.shape[2:]) for s in samples}
        if len(shapes) > 1:
            raise ValueError(
                f"fastreg::train: the images of a batch must have one size, got {', '.join('x'.join(map(str, s)) for s in sorted(shapes))}"
            )
        masks = [s.mask for s in samples]
        if any(m is not None for m in masks):
            masks = [
                torch.ones_like(s.fixed) if m is None else m for m, s in zip(masks, samples, strict=True)
            ]
            mask = torch.cat(masks).to(self.device)
        else:
            mask = None
        images = (torch.cat([getattr(s, k) for s in samples]).to(self.device) for k in ("fixed", "moving"))
        return [s.name for s in samples], *images, mask

    def advance(self):
        """One optimiser step on the next batch.

        Returns:
            dict: "loss" and its terms, "gradient" (its norm) and "folding" (share of voxels), floats; "names" of the pairs.
        Raises:
            NotFinite: before the weights are touched.
        """
        names, fixed, moving, mask = self._batch()
        # What a model draws at random hangs on nothing but seed, step and process.
        torch.manual_seed(((self.seed * 1_000_003 + self.step) * 1009 + self.rank) % 2**63)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            terms, displacement = self.loss(fixed, moving, mask)
        loss = sum(terms.values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients)
        values = self._mean([loss.detach(), norm, *(t.detach() for t in terms.values())])
        told = dict(zip(("loss", "gradient", *terms), values, strict=True))
        # The norm is the same in all processes, and so is the mean loss: all stop or none.
        if not (math.isfinite(told["loss"]) and math.isfinite(told["gradient"])):
            every = [names]
            if self.world > 1:
                every = [None] * self.world
                dist.all_gather_object(every, names)
            raise NotFinite(self.step, [n for some in every for n in some], {k: told[k] for k in terms})
        if self.recipe.clip_gradient is not None:
            nn.utils.clip_grads_with_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]],
                self.recipe.clip_gradient,
                norm,
            )
        with torch.no_grad():
            told["folding"] = float((ops.jacobian_determinant(displacement.detach()) <= 0).float().mean())
        self.optimizer.step()
        self.step += 1
        self._count(told["loss"])
        return {"names": names, **told}

    def _mean(self, values):
        values = torch.stack([v.double() for v in values])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values.tolist()

    def _count(self, loss):
        """An epoch's mean loss decides on the learning rate and on the end."""
        self.epoch_sum, self.epoch_steps = self.epoch_sum + loss, self.epoch_steps + 1
        if self.epoch_steps < self.per_epoch:
            return
        mean = self.epoch_sum / self.epoch_steps
        self.epoch_sum, self.epoch_steps = 0.0, 0
        if mean < self.best:
            self.best, self.stale, self.waited = mean, 0, 0
            return
        self.stale, self.waited = self.stale + 1, self.waited + 1
        if self.recipe.plateau is not None and self.stale >= self.recipe.plateau:
            self.stale = 0
            for group in self.optimizer.param_groups:
                group["lr"] /= 10

    COUNTED = ("step", "epoch_sum", "epoch_steps", "best", "stale", "waited")

    def state(self):
        """All that `restore` needs to go on as if nothing had happened."""
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counted": {name: getattr(self, name) for name in self.COUNTED},
            "recipe": asdict(self.recipe),
            "seed": self.seed,
        }

    def restore(self, state):
        """Continues where `state` was taken. KeyError, TypeError, ValueError, RuntimeError where it is another training's."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused step writes to them unchecked.
        for parameter, kept in self.optimizer.state.items():
            if any(v.shape not in (parameter.shape, ()) for v in kept.values()):
                raise ValueError("fastreg::train: the optimiser's state must fit the weights")
        for name in self.COUNTED:
            setattr(self, name, state["counted"][name])
