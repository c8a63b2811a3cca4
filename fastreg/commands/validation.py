"""What `fastreg train` looks at now and then: the loss and the scores of some pairs, and a picture."""

import functools

import torch

from fastreg import evaluation, metrics
from fastreg.data.pairs import read_case, sample_of

from .case import draw


class Validation:
    """Means over pairs of the loss and of what landmarks and labels say."""

    def __init__(self, pairs, preprocessing, ndim):
        self.pairs, self.preprocessing, self.ndim = pairs, preprocessing, ndim
        self._read = functools.lru_cache(maxsize=8)(self._of_pair)

    def _of_pair(self, k):
        case = read_case(self.pairs[k])
        return case, *sample_of(case, self.preprocessing, self.ndim)

    def read(self):
        """Reads the pairs: what is wrong with one is better known before the first step than hours later."""
        for k in range(len(self.pairs)):
            self._read(k)

    @torch.no_grad()
    def __call__(self, model):
        """(row of validation.csv, function that draws the first pair: of path and title)."""
        model.eval()
        device, rows, drawn = next(model.parameters()).device, [], None
        for k in range(len(self.pairs)):
            case, sample, grid = self._read(k)
            images = [t.to(device) for t in (sample.fixed, sample.moving)]
            prediction = model(*images)
            mask = None if sample.mask is None else sample.mask.to(device)
            terms = {name: float(v) for name, v in model.terms(*images, prediction, mask).items()}
            u = self.preprocessing.displacement(prediction.displacement.float().cpu(), grid, case.fixed_grid)
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
            if drawn is None:
                drawn = case, u, found
        names = dict.fromkeys(name for row in rows for name in row)
        means = {}
        for name in names:
            values = [row[name] for row in rows if name in row]
            means[name] = sum(values) / len(values)
        return means, functools.partial(draw, *drawn)
