"""What a run looks at now and then: the loss and the scores of some pairs, and a picture."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastreg import evaluation, io, metrics
from fastreg._files import Name
from fastreg._refusals import refuse
from fastreg.data.pairs import Case, Pairs, read_case
from fastreg.data.preprocessing import View
from fastreg.data.sample import Sample
from fastreg.outcome import draw

from .labels import labels_of, with_labels
from .step import PLACE, displacement_of, terms_of


class Validation:
    """Means over pairs of the loss and of what landmarks and labels say.

    pairs: a Pairs, whose files may name landmarks and labels, or any sequence of Sample, not empty. At most `most` of them are
    looked at. labels_weight: of the recipe, for the loss.
    """

    def __init__(self, pairs: Sequence[Sample], most: int = 8, labels_weight: float = 0.0) -> None:
        if len(pairs) == 0:
            refuse(ValueError, PLACE, "there must be at least one pair to validate on")
        self.pairs, self.labels_weight = pairs, labels_weight
        # Evenly over the list: the first pairs of a folder share one fixed image.
        self.which = range(len(pairs))[:: max(1, len(pairs) // most)][:most]
        self._read = functools.lru_cache(maxsize=8)(self._of_pair)
        self._drawn: tuple[Case, torch.Tensor, dict[str, Any]] | None = None

    def _of_pair(self, k: int) -> tuple[Case, Sample, View]:
        if isinstance(self.pairs, Pairs):
            case = read_case(self.pairs.pairs[k], self.pairs.warn, self.pairs.reading)
            return case, *self.pairs.of_case(case, labels=self.labels_weight > 0)
        sample = self.pairs[k]
        fixed, moving = (t[0, 0].float().cpu().numpy() for t in (sample.fixed, sample.moving))
        grid = io.Geometry.of(fixed.shape, (1.0,) * fixed.ndim)
        return Case(sample.name, fixed, grid, moving, grid), sample, View(grid, grid)

    def read(self) -> None:
        """Reads the pairs: what is wrong with one is better known before the first step than hours later."""
        for k in self.which:
            self._read(k)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """A row of validation.csv; `draw` then shows the first pair."""
        model.eval()
        device, rows, self._drawn = next(model.parameters()).device, [], None
        for k in self.which:
            case, sample, view = self._read(k)
            fixed, moving = (t.to(device) for t in (sample.fixed, sample.moving))
            prediction = model(fixed, moving)
            mask = None if sample.mask is None else sample.mask.to(device)
            parts = terms_of(model, fixed, moving, prediction, mask)
            u = displacement_of(prediction).float()
            if self.labels_weight > 0:
                first, second = (labels.to(device) for labels in labels_of(sample))
                parts = with_labels(parts, self.labels_weight, (first, second), u, [sample.name])
            terms, u = {name: float(part) for name, part in parts.items()}, view.displacement(u.cpu())
            found = evaluation.scores(case, u, surfaces=True)
            rows.append(
                {
                    "loss": sum(terms.values()),
                    **terms,
                    **{
                        name + suffix: found[name][when]["mean"]
                        for name in ("tre", "dice", "assd")
                        for suffix, when in (("", "after"), ("_before", "before"))
                        if name in found
                    },
                    "folding": metrics.folding(u),
                    "sdlogj": metrics.sdlogj(u),
                }
            )
            if self._drawn is None:
                self._drawn = case, u, found
        names = dict.fromkeys(name for row in rows for name in row)
        means = {}
        for name in names:
            values = [row[name] for row in rows if name in row]
            means[name] = sum(values) / len(values)
        return means

    def draw(self, path: Name, title: str = "") -> None:
        """The picture of the first pair, as it was last looked at."""
        if self._drawn is not None:
            draw(*self._drawn, path, title=title)
