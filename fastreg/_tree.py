"""Which labels are best for all cells of a grid together, neighbours tied along a spanning tree."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, library

from fastreg import _check

# Beside the ops of `fastreg`, which all have gradients and answer on GPUs: these have neither.
_lib = library.Library("fastreg_tree", "DEF")
_MOST = 2.0**100  # of a cost or a penalty: fp32 holds what millions of cells add up to


def spanning_tree(values: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum spanning tree of a grid of cells, neighbours along the axes, a link weighing |difference of values|.

    Args:
        values (Tensor): (z, y, x) or (y, x), any real dtype: of each cell, the mean of the fixed image, say
            ``F.avg_pool3d(fixed, cell, ceil_mode=True, count_include_pad=False)[0, 0]``. NaN: no link is worse.

    Returns:
        (Tensor, Tensor): order (cells,), int64, cells by their index in ``values.flatten()``: from the root on, which is the middle of
        the longest path, by depth; parent (cells,), int64, of each cell, -1 of the root. On the device of values. Links of one weight
        are taken by cell, then axis: the result is the same everywhere.
    """
    if values.dim() not in (2, 3):
        _check.fail("spanning_tree", "values", "have 2 or 3 axes", tuple(values.shape))
    order, parent = torch.ops.fastreg_tree.spanning_tree(values.detach().cpu())
    return order.to(values.device), parent.to(values.device)


def min_marginals(
    cost: Tensor,
    previous: Tensor,
    order: Tensor,
    parent: Tensor,
    radius: Sequence[int],
    alpha: float,
) -> Tensor:
    """What each label of each cell costs all cells at best, exactly, on a tree: less the least, which is 0 at the best label.

    The sum of cost(c, d_c) over cells and of ``alpha |(previous(c) + d_c) - (previous(p) + d_p)|^2`` over links to parents p, least
    over the labels of all other cells. Labels are offsets d in the cube of radius, lexicographic as in `cost_volume`.

    Args:
        cost (Tensor): (cells, prod(2 radius + 1)), finite, below 2^100: ``cost_volume(...)[0].flatten(0, -2)``; computed in fp32.
        previous (Tensor): (cells, nd): what the labels are added to, in their unit, axis order (z, y, x).
        order, parent (Tensor): (cells,) int64, as from `spanning_tree`.
        radius (sequence): of the labels, a number per axis.
        alpha (float): weight of the links, >= 0.

    Returns:
        Tensor: (cells, prod(2 radius + 1)), fp32, on the device of cost: tensors of a GPU are brought to the CPU and back (a tree is no
        work for a GPU).

    Notes:
        The same bits whatever the thread count. Memory: twice the cost, with the result. A message of n labels an axis takes nd n^(nd + 1)
        sums and minima.
    """
    op = "min_marginals"
    labels = math.prod(2 * r + 1 for r in radius)
    if cost.dim() != 2 or cost.shape[1] != labels:
        _check.fail(op, "cost", f"have shape (cells, {labels})", tuple(cost.shape))
    for name, t, shape in (
        ("previous", previous, (cost.shape[0], len(radius))),
        ("order", order, cost.shape[:1]),
        ("parent", parent, cost.shape[:1]),
    ):
        if tuple(t.shape) != tuple(shape):
            _check.fail(op, name, f"have shape {tuple(shape)}", tuple(t.shape))
    if not 0 <= alpha < math.inf:
        _check.fail(op, "alpha", "be a number >= 0", alpha)
    given = [t.detach().cpu() for t in (cost.float(), previous.float(), order, parent)]
    for name, t in zip(("cost", "previous"), given, strict=False):
        # A NaN is neither least nor most, and would not be seen; aminmax passes it on.
        if t.numel() and not all(abs(float(v)) < _MOST for v in torch.aminmax(t)):
            _check.fail(op, name, "be finite, below 2^100", "others")
    if cost.numel() and alpha * (2 * float(given[1].abs().max()) + 2 * max(radius)) ** 2 >= _MOST:
        _check.fail(op, "alpha", "leave penalties below 2^100", alpha)
    result = torch.ops.fastreg_tree.min_marginals(*given, list(radius), float(alpha))
    return result.to(cost.device)


def spanning_tree_ref(values: Tensor) -> tuple[Tensor, Tensor]:
    size, flat = values.shape, values.double().flatten().tolist()
    step = [math.prod(size[k + 1 :]) for k in range(len(size))]
    links = []
    for c, where in enumerate(itertools.product(*map(range, size))):
        for k, s in enumerate(step):
            if where[k] + 1 < size[k]:
                weight = abs(flat[c] - flat[c + s])
                links.append((math.inf if math.isnan(weight) else weight, c, k, c + s))
    sets = list(range(len(flat)))

    def set_of(c):
        while sets[c] != c:
            sets[c] = sets[sets[c]]
            c = sets[c]
        return c

    neighbours: list[list[int]] = [[] for _ in flat]
    for _, a, _, b in sorted(links):
        x, y = set_of(a), set_of(b)
        if x != y:
            sets[max(x, y)] = min(x, y)
            neighbours[a].append(b)
            neighbours[b].append(a)

    def walk(root):
        order, parent = [root], {root: -1}
        for c in order:
            for other in sorted(neighbours[c]):
                if other != parent[c]:
                    order.append(other)
                    parent[other] = c
        return order, parent

    if not flat:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    order, parent = walk(walk(0)[0][-1])
    path = [order[-1]]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    order, parent = walk(path[(len(path) - 1) // 2])
    return torch.tensor(order), torch.tensor([parent[c] for c in range(len(flat))])


def min_marginals_ref(
    cost: Tensor, previous: Tensor, order: Tensor, parent: Tensor, radius: Sequence[int], alpha: float
) -> Tensor:
    """Depth by depth: all cells of a depth at once. In the dtype of cost."""
    window, axes = [2 * r + 1 for r in radius], range(1, len(radius) + 1)
    depth = torch.zeros_like(parent)
    for c in order.tolist():
        if parent[c] >= 0:
            depth[c] = depth[parent[c]] + 1
    depths = int(depth.max()) + 1 if len(depth) else 0
    levels = [order[depth[order] == d] for d in range(depths)]
    belief, message = cost.unflatten(1, window).clone(), torch.zeros_like(cost).unflatten(1, window)
    previous = previous.to(cost.dtype)
    weight = torch.tensor(alpha, dtype=cost.dtype)

    def lowered(x):
        return x - x.amin(tuple(axes), keepdim=True)

    def convolved(x, t):
        for k in reversed(axes):
            n = x.shape[k]
            j = torch.arange(n)
            steps = (j[:, None] - j).to(x.dtype)  # of the label that is read from that which is written
            shape = (-1, *(n if a == k else 1 for a in axes))
            out = torch.full_like(x, math.inf)
            for read in range(n):
                d = steps[read] + t[:, k - 1 : k]
                out = torch.minimum(out, x.narrow(k, read, 1) + (weight * d * d).view(shape))
            x = out
        return lowered(x)

    for d in reversed(range(depths)):
        cells = levels[d]
        if d == 0:
            belief[cells] = lowered(belief[cells])
        else:
            above = parent[cells]
            message[cells] = convolved(belief[cells], previous[cells] - previous[above])
            belief.index_add_(0, above, message[cells])
    for d in range(1, depths):
        cells, above = levels[d], parent[levels[d]]
        told = convolved(belief[above] - message[cells], previous[above] - previous[cells])
        belief[cells] = lowered(belief[cells] + told)
    return belief.flatten(1)


_lib.define("spanning_tree(Tensor values) -> (Tensor, Tensor)")
_lib.impl("spanning_tree", spanning_tree_ref, "CompositeExplicitAutograd")
_lib.define(
    "min_marginals(Tensor cost, Tensor previous, Tensor order, Tensor parent, int[] radius, float alpha) -> Tensor"
)
_lib.impl("min_marginals", min_marginals_ref, "CompositeExplicitAutograd")
