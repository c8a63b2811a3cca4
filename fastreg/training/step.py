"""Training of a model on pairs: the papers' optimisers, and a step that can be continued bit for bit.

    training = Training(RRN(), pairs)
    while training.step < 1000:
        training.advance()

`pairs` is a sequence of `Sample`; what is drawn at a step follows from the seed and the step alone, so that model, optimiser
and step number are the whole state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastreg import ops
from fastreg._refusals import ValueRefused, refuse
from fastreg.data.sample import Sample
from fastreg.models.recipe import Recipe

from . import schema
from .distributed import ranks
from .labels import PLACE, labels_of, with_labels


class NotFinite(ValueRefused):
    """A loss or gradient is NaN or infinite: step, the names of the pairs, the terms of the loss."""

    def __init__(self, step: int, names: Sequence[str], terms: Mapping[str, float]) -> None:
        self.step, self.names, self.terms = step, names, terms
        values = ", ".join(f"{k} {v:g}" for k, v in terms.items())
        super().__init__(
            f"step {step}: the loss or its gradient is not finite ({values}) for {', '.join(names)}"
        )


def displacement_of(prediction: Any) -> torch.Tensor:
    """What a model returned is a displacement, or has one."""
    return prediction if isinstance(prediction, torch.Tensor) else prediction.displacement


def terms_of(
    model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, prediction: Any, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The weighted terms of a model's loss by name; of one that has no `terms`, its `loss` alone, which need not take a mask."""
    own: Any = model
    if hasattr(own, "terms"):
        return own.terms(fixed, moving, prediction, mask)
    given = {} if mask is None else {"mask": mask}
    return {"loss": own.loss(fixed, moving, prediction, **given)}


def _one(prediction: Any, k: int) -> Any:
    return prediction[k : k + 1] if isinstance(prediction, torch.Tensor) else prediction.sample(k)


class _Loss(nn.Module):
    """Prediction and loss in one forward, so that DDP sees all of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, fixed: torch.Tensor, moving: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        prediction = self.model(fixed, moving)
        if mask is None or len(mask) == 1:
            return terms_of(self.model, fixed, moving, prediction, mask), displacement_of(prediction)
        # Pair by pair, so that pairs count alike, however much their masks hold, and a batch can be split between processes.
        terms = [
            terms_of(self.model, fixed[k : k + 1], moving[k : k + 1], _one(prediction, k), mask[k : k + 1])
            for k in range(len(mask))
        ]
        means: Any = {name: sum(t[name] for t in terms) / len(terms) for name in terms[0]}
        return means, displacement_of(prediction)


def recipe_of(model: nn.Module) -> Recipe:
    """How the model's paper trains it, where it has one."""
    recipe = getattr(model, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else Recipe()


class Training:
    """Trains a model, one optimiser step after the other.

    Args:
        model: a fastreg.models.Model, or any module whose ``model(fixed, moving)`` is a displacement (N, nd, *spatial) in
            voxels or has one (`.displacement`), and that has ``loss(fixed, moving, prediction)``, a scalar (with `mask`
            where samples have masks; `terms` instead: its terms by name). On the device it is to be trained on.
        pairs: a sequence of Sample (len, [k]); a batch's samples must have one shape. What they hold is moved to the
            model's device.
        recipe (Recipe): None: the model's own, where it has one.
        validation: a function of the model that returns its loss on other pairs, or numbers by name with one of them "loss" (as a
            Validation does): called at each epoch's end, in the first process, where the recipe's plateau or patience watches it.
        seed (int): of the order of pairs and of what a model draws (R2N2's noise).
        amp (bool): bf16 convolutions under torch.autocast. compile (bool): torch.compile.

    Under an initialised torch.distributed the model is wrapped in DistributedDataParallel and each process takes its part
    of a batch. With gloo: import this module before init_process_group, and let go of the group (`release`, gc.collect())
    before destroy_process_group, or its threads outlive the interpreter and may abort the process; `processes` does both.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[Sample],
        recipe: Recipe | None = None,
        *,
        validation: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
        seed: int = 0,
        amp: bool = False,
        compile: bool = False,
    ) -> None:
        if len(pairs) == 0:
            refuse(ValueError, PLACE, "there must be at least one pair to train on")
        self.model, self.pairs = model, pairs
        self.recipe = recipe or recipe_of(model)
        self.seed, self.amp, self.compile = seed, amp, compile
        self.rank, self.world = ranks()
        waits = self.recipe.plateau is not None or self.recipe.patience is not None
        self.validation = validation if waits and self.recipe.watch == "validation" else None
        if waits and self.recipe.watch == "validation" and validation is None:
            refuse(
                ValueError,
                PLACE,
                "the recipe watches the loss of pairs to validate on, and there are none; "
                'pass validation=, or a recipe with watch="loss"',
            )
        if self.recipe.batch_size < 1 or self.recipe.batch_size % self.world:
            refuse(
                ValueError,
                PLACE,
                f"batch_size must be a positive multiple of the number of processes, {self.world}, "
                f"got {self.recipe.batch_size}",
            )
        if not 0 <= self.recipe.labels_weight < math.inf:
            got = self.recipe.labels_weight
            refuse(ValueError, PLACE, f"labels_weight must be a number of at least 0, got {got}")
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            refuse(ValueError, PLACE, "the model must have weights to train")
        self.device = parameters[0].device
        self._loss: nn.Module | None = self._wrapped()
        self.optimizer = torch.optim.Adam(
            parameters, lr=self.recipe.learning_rate, amsgrad=self.recipe.amsgrad, fused=True
        )
        self.step = 0
        # Of the epochs: sum of what is watched and steps of the running one, the best mean, epochs since.
        self.epoch_sum, self.epoch_steps, self.best, self.stale, self.waited = 0.0, 0, math.inf, 0, 0

    def _wrapped(self) -> nn.Module:
        loss: nn.Module = _Loss(self.model)
        if self.world > 1:
            on = [self.device] if self.device.type == "cuda" else None
            loss = nn.parallel.DistributedDataParallel(loss, device_ids=on)
        return torch.compile(loss) if self.compile else loss  # type: ignore[return-value]

    def release(self) -> None:
        """Lets go of the process group; `advance` takes it up again."""
        self._loss = None

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.recipe.epoch or max(1, len(self.pairs) // self.recipe.batch_size)

    def drawn(self, step: int) -> list[int]:
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
    def done(self) -> bool:
        """Whether the recipe's steps are done, or patience has run out."""
        patience = self.recipe.patience
        return self.step >= self.recipe.steps or (patience is not None and self.waited >= patience)

    def _batch(
        self,
    ) -> tuple[
        list[str], torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None
    ]:
        mine = self.drawn(self.step)[self.rank :: self.world]
        samples = [self.pairs[k] for k in mine]
        for k, sample in zip(mine, samples, strict=True):
            if not isinstance(sample, Sample):
                got = type(sample).__name__
                refuse(TypeError, PLACE, f"pairs[{k}] must be a fastreg.training.Sample, got {got}")
        shapes = {tuple(s.fixed.shape[2:]) for s in samples}
        if len(shapes) > 1:
            sizes = ", ".join("x".join(map(str, s)) for s in sorted(shapes))
            refuse(ValueError, PLACE, f"the images of a batch must have one size, got {sizes}")
        mask = None
        if any(s.mask is not None for s in samples):
            masks = [torch.ones_like(s.fixed) if s.mask is None else s.mask for s in samples]
            mask = torch.cat([m.float() if m.dtype == torch.bool else m for m in masks]).to(self.device)
        fixed = torch.cat([s.fixed for s in samples]).to(self.device)
        moving = torch.cat([s.moving for s in samples]).to(self.device)
        labels = None
        if self.recipe.labels_weight > 0:
            maps = zip(*map(labels_of, samples), strict=True)
            first, second = (torch.cat(some).to(self.device) for some in maps)
            labels = first, second
        return [s.name for s in samples], fixed, moving, mask, labels

    def advance(self) -> dict[str, Any]:
        """One optimiser step on the next batch.

        Returns:
            dict: "loss" and its terms, "gradient" (its norm) and "folding" (share of voxels), floats; "names" of the pairs.
        Raises:
            NotFinite: before the weights are touched.
        """
        self._end_epoch()  # what a validation that failed has left
        names, fixed, moving, mask, labels = self._batch()
        # What a model draws at random hangs on nothing but seed, step and process.
        torch.manual_seed(((self.seed * 1_000_003 + self.step) * 1009 + self.rank) % 2**63)
        self.model.train()
        if self._loss is None:
            self._loss = self._wrapped()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            terms, displacement = self._loss(fixed, moving, mask)
        if labels is not None:
            terms = with_labels(terms, self.recipe.labels_weight, labels, displacement, names)
        watch = self.recipe.watch
        if watch not in ("validation", "loss", *terms):
            known = ", ".join(dict.fromkeys(("loss", *terms)))
            refuse(ValueError, PLACE, f"the recipe must watch validation or a term of {known}, got {watch}")
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
            every: list[Any] = [names] * self.world
            if self.world > 1:
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
        self._count(told["loss" if watch == "validation" else watch])
        return {"names": names, **told}

    def _mean(self, values: Sequence[torch.Tensor]) -> list[float]:
        stacked = torch.stack([v.double() for v in values])
        if self.world > 1:
            dist.all_reduce(stacked)
            stacked /= self.world
        return stacked.tolist()

    def _validated(self) -> float:
        """The first process's, so that all wait for as long."""
        value: Any = math.nan
        if self.rank == 0 and self.validation is not None:
            found = self.validation(self.model)
            value = found["loss"] if isinstance(found, Mapping) else found
        if self.world > 1:
            told = torch.tensor(float(value), dtype=torch.float64, device=self.device)
            dist.broadcast(told, 0)
            value = told
        return float(value)

    def _count(self, value: float) -> None:
        """What is watched, of a step."""
        self.epoch_sum, self.epoch_steps = self.epoch_sum + value, self.epoch_steps + 1
        self._end_epoch()

    def _end_epoch(self) -> None:
        """An epoch's mean, or what validation finds then, decides on the learning rate and on the end."""
        if self.epoch_steps < self.per_epoch:
            return
        value = self.epoch_sum / self.epoch_steps if self.validation is None else self._validated()
        self.epoch_sum, self.epoch_steps = 0.0, 0
        if value < self.best - self.recipe.tolerance:
            self.best, self.stale, self.waited = value, 0, 0
            return
        self.stale, self.waited = self.stale + 1, self.waited + 1
        if self.recipe.plateau is not None and self.stale >= self.recipe.plateau:
            self.stale = 0
            for group in self.optimizer.param_groups:
                group["lr"] /= 10

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened."""
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counted": {name: getattr(self, name) for name in schema.COUNTED},
            "recipe": asdict(self.recipe),
            "seed": self.seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. ValueError where it is another training's, or none; then nothing has changed."""
        wrong = (
            schema.not_a_state(state)
            or schema.weights_misfit(state.get("weights"), self.model.state_dict())
            or schema.optimizer_misfit(state.get("optimizer"), self.optimizer)
        )
        if wrong is not None:
            refuse(ValueError, PLACE, f"the state does not fit this training: {wrong}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in schema.COUNTED:
            setattr(self, name, state["counted"][name])
