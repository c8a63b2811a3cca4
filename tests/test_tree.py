"""The search along a tree: against all labellings, the reference, and a tree that is minimal by networks' definition."""

import itertools

import pytest
import torch

from fastreg._tree import min_marginals, min_marginals_ref, spanning_tree, spanning_tree_ref

GRIDS = [
    pytest.param((3, 4, 5), id="3x4x5"),
    pytest.param((7, 9), id="7x9"),
    pytest.param((1, 1, 6), id="a-line"),
    pytest.param((1, 1), id="one-cell"),
    pytest.param((12, 1, 11), id="flat"),
]


def labels(radius):
    return torch.tensor(list(itertools.product(*(range(-r, r + 1) for r in radius))), dtype=torch.float64)


def problem(grid, radius):
    order, parent = spanning_tree(torch.randn(grid))
    cells = len(order)
    return torch.rand(cells, len(labels(radius))), torch.randn(cells, len(radius)), order, parent


def by_all_labellings(cost, previous, parent, radius, alpha):
    """Of each label of each cell, the least that any labelling with it costs."""
    offsets, cells = labels(radius), len(parent)
    result = torch.full(cost.shape, torch.inf, dtype=torch.float64)
    for labelling in itertools.product(range(len(offsets)), repeat=cells):
        u = previous.double() + offsets[list(labelling)]
        total = sum(float(cost[c, label]) for c, label in enumerate(labelling))
        for c, p in enumerate(parent.tolist()):
            if p >= 0:
                total += alpha * float((u[c] - u[p]).square().sum())
        for c, label in enumerate(labelling):
            result[c, label] = min(result[c, label], total)
    return result - result.amin(1, keepdim=True)


@pytest.mark.kernel
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.7])
@pytest.mark.parametrize(
    ("grid", "radius"),
    [((2, 2), (1, 0)), ((1, 4), (0, 2)), ((2, 1, 2), (0, 1, 0)), ((1, 1, 3), (1, 1, 0)), ((1, 3), (1, 1))],
    ids=str,
)
def test_marginals_are_those_of_all_labellings(grid, radius, alpha):
    cost, previous, order, parent = problem(grid, radius)
    truth = by_all_labellings(cost, previous, parent, radius, alpha)
    ours = min_marginals(cost, previous, order, parent, radius, alpha)
    assert (ours - truth).abs().max() <= 2e-6
    double = min_marginals_ref(cost.double(), previous.double(), order, parent, radius, alpha)
    assert (double - truth).abs().max() <= 2e-7  # alpha and the displacements were rounded to fp32


@pytest.mark.kernel
@pytest.mark.parametrize(
    "radius", [(0, 0, 0), (1, 1, 1), (2, 3, 1), (1, 0, 6), (2, 1, 8), (4, 2, 2)], ids=str
)
@pytest.mark.parametrize("grid", [g for g in GRIDS if len(g.values[0]) == 3])
def test_the_kernel_is_the_reference(grid, radius):
    """The last axis in vectors of 4, 8 and 16, whole and not, more than one of them; in groups of rows, and what is left."""
    arguments = (*problem(grid, radius), list(radius), 0.01)
    ours = torch.ops.fastreg_tree.min_marginals(*arguments)
    truth = min_marginals_ref(arguments[0].double(), *arguments[1:])
    assert (ours - truth).abs().max() <= 2e-6 * max(1.0, truth.abs().max())


@pytest.mark.kernel
@pytest.mark.parametrize("radius", [(3, 4), (0, 17)], ids=str)
def test_the_kernel_is_the_reference_in_a_plane(radius):
    arguments = (*problem((7, 9), radius), list(radius), 0.03)
    truth = min_marginals_ref(arguments[0].double(), *arguments[1:])
    assert (torch.ops.fastreg_tree.min_marginals(*arguments) - truth).abs().max() <= 4e-6 * max(
        1, truth.max()
    )


@pytest.mark.kernel
def test_labels_of_radius_8():
    arguments = (*problem((2, 3, 2), (8, 8, 8)), [8, 8, 8], 0.002)
    truth = min_marginals_ref(arguments[0].double(), *arguments[1:])
    assert (torch.ops.fastreg_tree.min_marginals(*arguments) - truth).abs().max() <= 4e-6


def test_a_strong_tie_makes_all_motion_one():
    """Of all motion, not of the increment: cells that lie apart are brought together."""
    cost, previous, order, parent = problem((3, 4), (2, 2))
    previous = previous.round().clamp(-1, 1)
    best = min_marginals(cost, previous, order, parent, (2, 2), 1e3).argmin(1)
    motion = previous + labels((2, 2))[best].float()
    assert torch.equal(motion, motion[:1].expand_as(motion))


def test_without_a_tie_every_cell_decides_alone():
    cost, previous, order, parent = problem((3, 4), (2, 2))
    result = min_marginals(cost, previous, order, parent, (2, 2), 0.0)
    torch.testing.assert_close(result, cost - cost.amin(1, keepdim=True))


def test_a_cell_without_costs_follows_its_neighbours():
    values = torch.arange(5.0).view(1, 5)
    order, parent = spanning_tree(values)
    cost = torch.full((5, 5), 1.0)
    cost[:, 4] = 0
    cost[2] = 0
    result = min_marginals(cost, torch.zeros(5, 2), order, parent, (0, 2), 0.01)
    assert result.argmin(1).tolist() == [4] * 5


@pytest.mark.kernel
def test_bits_do_not_depend_on_threads():
    arguments = (*problem((6, 7, 8), (2, 2, 2)), (2, 2, 2), 0.01)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results.append(min_marginals(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.kernel
def test_any_order_with_parents_first():
    cost, previous, order, parent = problem((3, 4, 5), (1, 1, 1))
    done, waiting, deep = [], [int(order[0])], []
    while waiting:  # depth first
        done.append(waiting.pop())
        waiting += [c for c, p in enumerate(parent.tolist()) if p == done[-1]]
    deep = torch.tensor(done)
    assert not torch.equal(deep, order)
    a, b = (min_marginals(cost, previous, o, parent, (1, 1, 1), 0.1) for o in (order, deep))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def weight_of(values, parent):
    flat = values.double().flatten()
    return sum(abs(float(flat[c] - flat[p])) for c, p in enumerate(parent.tolist()) if p >= 0)


@pytest.mark.kernel
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_tree_is_the_reference(grid, ties):
    values = torch.randint(0, 3, grid).float() if ties else torch.randn(grid)
    order, parent = torch.ops.fastreg_tree.spanning_tree(values)
    expected, of = spanning_tree_ref(values)
    assert torch.equal(order, expected)
    assert torch.equal(parent, of)


@pytest.mark.parametrize("grid", GRIDS)
def test_tree_spans_is_minimal_and_hangs_by_its_middle(grid):
    values = torch.randn(grid)
    order, parent = spanning_tree(values)
    n = values.numel()
    assert sorted(order.tolist()) == list(range(n))
    assert parent[order[0]] == -1
    where = torch.stack(torch.meshgrid(*(torch.arange(g) for g in grid), indexing="ij"), -1).view(n, -1)
    depth = {int(order[0]): 0}
    for c in order.tolist()[1:]:
        p = int(parent[c])
        assert (where[c] - where[p]).abs().sum() == 1
        depth[c] = depth[p] + 1
    assert list(depth.values()) == sorted(depth.values())
    # Prim, on a dense matrix.
    flat = values.double().flatten()
    links = torch.where(
        torch.cdist(where.double(), where.double(), p=1) == 1, (flat[:, None] - flat).abs(), torch.inf
    )
    reached, total = [0], 0.0
    while len(reached) < n:
        out = links[reached].clone()
        out[:, reached] = torch.inf
        total += float(out.min())
        reached.append(int(out.argmin()) % n)
    assert weight_of(values, parent) == pytest.approx(total)
    far = sorted(max(depth[c] for c in branch) for branch in branches(order, parent)) or [0]
    assert len(far) == 1 or far[-1] - far[-2] <= 1


def branches(order, parent):
    """Cells below each child of the root."""
    of, found = {}, {}
    for c in order.tolist()[1:]:
        p = int(parent[c])
        of[c] = of.get(p, c)
        found.setdefault(of[c], []).append(c)
    return found.values()


def test_a_nan_is_no_link_that_anything_prefers():
    values = torch.zeros(3, 3)
    values[1, 1] = torch.nan
    order, parent = spanning_tree(values)
    assert sorted(order.tolist()) == list(range(9))
    assert 4 not in parent.tolist() or (parent == 4).sum() + (parent[4] >= 0) == 1
    assert all(map(torch.equal, (order, parent), spanning_tree_ref(values)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cost": torch.zeros(6, 8)}, r"cost must have shape \(cells, 9\)"),
        ({"cost": torch.full((6, 9), torch.nan)}, "cost must be finite"),
        ({"cost": torch.eye(6, 9).log()}, "cost must be finite"),
        ({"cost": torch.full((6, 9), 1e38)}, r"cost must be finite, below 2\^100"),
        ({"previous": torch.zeros(6, 3)}, r"previous must have shape \(6, 2\)"),
        ({"previous": torch.full((6, 2), torch.inf)}, "previous must be finite"),
        ({"order": torch.zeros(5).long()}, r"order must have shape \(6,\)"),
        ({"alpha": -1.0}, "alpha must be a number >= 0"),
        ({"alpha": 1e20, "previous": 1e6 * torch.eye(6, 2)}, r"alpha must leave penalties below 2\^100"),
    ],
)
def test_errors(change, match):
    cost, previous, order, parent = problem((2, 3), (1, 1))
    valid = {
        "cost": cost, "previous": previous, "order": order, "parent": parent, "radius": (1, 1), "alpha": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"fastreg::min_marginals: {match}"):
        min_marginals(**(valid | change))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("order", "parent"),
    [([0, 0, 1], [-1, 0, 1]), ([0, 1, 3], [-1, 0, 1]), ([0, 2, 1], [-1, 0, 1]), ([1, 0, 2], [-1, 0, 1])],
    ids=["twice", "outside", "child first", "root not first"],
)
def test_the_kernel_refuses_what_is_no_tree(order, parent):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastreg_tree::min_marginals", "CPU"):
        pytest.skip("of the kernel, which would write outside of its memory")
    with pytest.raises(ValueError, match="order must"):
        torch.ops.fastreg_tree.min_marginals(
            torch.zeros(3, 3), torch.zeros(3, 2), torch.tensor(order), torch.tensor(parent), [0, 1], 0.1
        )
