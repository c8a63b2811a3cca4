import importlib
import itertools
import math

import pytest
import torch
from common import BACKEND, DTYPES, assert_close, check_against_reference, double
from contract import Case, Contract

import fastreg

# Rows of offsets of every width of vector, in one and in several; cells that an axis does not fill, of one voxel, of more
# than a block of voxels; radii beyond the image.
CASES = [
    pytest.param((2, 3, 5, 6, 7), (2, 3, 4), (1, 0, 2), (1, 1, 1), id="3d"),
    pytest.param((1, 2, 6, 5, 9), (4, 4, 4), (1, 1, 6), (2, 2, 2), id="every-second"),
    pytest.param((1, 1, 19, 3, 11), (19, 1, 11), (1, 1, 1), (1, 1, 2), id="blocks"),
    pytest.param((2, 1, 8, 21), (3, 5), (2, 8), (1, 3), id="2d"),
    pytest.param((1, 2, 3, 4), (7, 9), (5, 6), (1, 1), id="one-cell"),
    pytest.param((1, 1, 4, 5), (1, 1), (0, 0), (1, 1), id="voxels"),
]


def make(shape, dtype=torch.float64):
    return torch.rand(shape).to(dtype).requires_grad_(), torch.rand(shape).to(dtype).requires_grad_()


def make_mask(shape):
    """Weights with zeros among them, and a cell of them."""
    mask = torch.rand(shape[0], 1, *shape[2:])
    mask = mask * (mask > 0.4)
    mask[(0, 0, *(slice(0, 2) for _ in shape[2:]))] = 0
    return mask


def samples(n, cell, stride):
    """Of each cell along an axis, the voxels that count."""
    return [list(range(first, min(first + cell, n), stride)) for first in range(0, n, cell)]


def truth(fixed, moving, mask, cell, radius, stride):
    """Cell by cell, with an image whose border was repeated by hand."""
    size = fixed.shape[2:]
    wide = moving
    for k, r in enumerate(radius):
        ends = wide.narrow(2 + k, 0, 1), wide.narrow(2 + k, size[k] - 1, 1)
        wide = torch.cat([ends[0]] * r + [wide] + [ends[1]] * r, 2 + k)
    axes = [samples(n, c, s) for n, c, s in zip(size, cell, stride, strict=True)]
    weight = torch.ones_like(fixed[:, :1]) if mask is None else mask.clamp_min(0)
    costs = []
    for voxels in itertools.product(*axes):
        pick = (slice(None), slice(None), *torch.meshgrid(*map(torch.tensor, voxels), indexing="ij"))
        w = weight[pick].flatten(1)
        total = w.sum(1) * fixed.shape[1]
        for offset in itertools.product(*(range(2 * r + 1) for r in radius)):
            shifted = wide[
                (slice(None), slice(None), *(i + o for i, o in zip(pick[2:], offset, strict=True)))
            ]
            squares = (fixed[pick] - shifted).square().sum(1).flatten(1)
            cost = torch.where(w > 0, w * squares, 0).sum(1)
            costs.append(torch.where(total > 0, cost / torch.where(total > 0, total, 1), 0))
    return torch.stack(costs, 1).view(len(fixed), *map(len, axes), -1)


@pytest.mark.kernel
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "cell", "radius", "stride"), CASES)
def test_against_reference(shape, cell, radius, stride, dtype, masked):
    mask = make_mask(shape) if masked else None
    # Gradients of means would be subnormal halves.
    check_against_reference(
        lambda f, m: 100 * fastreg.cost_volume(f, m, cell, radius, stride=stride, mask=mask),
        lambda f, m: 100 * truth(f, m, double(mask), cell, radius, stride),
        make(shape, dtype),
    )


@pytest.mark.kernel
@pytest.mark.parametrize("radius", [1, 2, 3, 4, 5, 7, 8, 9, 13, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_of_offsets_of_any_length(dtype, radius):
    check_against_reference(
        lambda f, m: fastreg.cost_volume(f, m, (2, 4), (0, radius)),
        lambda f, m: truth(f, m, None, (2, 4), (0, radius), (1, 1)),
        make((1, 2, 2, 23), dtype),
    )


@pytest.mark.kernel
@pytest.mark.parametrize("masked", [False, True])
def test_a_radius_far_beyond_the_image(masked):
    """What a cell reaches does not fit the shared memory of a GPU."""
    fixed, moving = (t.detach() for t in make((1, 2, 8, 5), torch.float32))
    mask = make_mask((1, 1, 8, 5)) if masked else None
    arguments = (8, 5), (0, 1600)
    ours = fastreg.cost_volume(fixed, moving, *arguments, mask=mask)
    assert_close(ours, truth(fixed.double(), moving.double(), double(mask), *arguments, (1, 1)))


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1, 4, 16, 6, 9), (1, 4, 8, 12)], ids=str)
def test_is_local_correlation_of_squares(shape):
    """(f - m)^2 = f^2 - 2 f m + m^2, summed over cells that fill the image."""
    (fixed, moving), nd = (t.detach() for t in make(shape)), len(shape) - 2
    cell, radius = (4, 3, 3)[:nd], 2

    def correlated(f, m):
        return fastreg.local_correlation(f, m, radius, padding="border")

    one = torch.ones_like(fixed)
    squares = (
        correlated(fixed.square(), one) - 2 * correlated(fixed, moving) + correlated(one, moving.square())
    )
    pool = torch.nn.functional.avg_pool3d if nd == 3 else torch.nn.functional.avg_pool2d
    assert_close(fastreg.cost_volume(fixed, moving, cell, radius), pool(squares, cell).movedim(1, -1), 1e-10)


@pytest.mark.kernel
def test_finds_a_shift():
    fixed = torch.rand(1, 3, 12, 13, 14)
    moving = fixed.roll((1, -2, 2), (2, 3, 4))
    costs = fastreg.cost_volume(fixed, moving, 3, 2)
    inner = costs[0, 1:3, 1:3, 1:3].flatten(0, 2)
    assert (inner.argmin(1) == ((1 + 2) * 5 + (-2 + 2)) * 5 + (2 + 2)).all()
    assert inner.amin(1).eq(0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_input(frozen):
    inputs = make((2, 2, 4, 5, 6))
    expected = torch.autograd.grad(fastreg.cost_volume(*inputs, 2, 1).square().sum(), inputs)
    inputs = [t.detach() if i == frozen else t for i, t in enumerate(inputs)]
    out = fastreg.cost_volume(*inputs, 2, 1).square().sum()
    assert_close(torch.autograd.grad(out, inputs[1 - frozen])[0], expected[1 - frozen], 1e-12)


def test_the_reference_of_the_backward_takes_a_few_offsets_at_a_time(monkeypatch):
    inputs, weight = make((1, 2, 4, 5, 6)), torch.rand(1, 2, 3, 3, 27).double()
    options = (2, 2, 2), (1, 1, 1), (1, 1, 1)
    expected = torch.autograd.grad((truth(*inputs, None, *options) * weight).sum(), inputs)
    module = importlib.import_module("fastreg.ops.cost_volume")
    for chunk in (1, 1000, 2**22):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        images = (t.detach() for t in inputs)
        grads = module.cost_volume_bwd_ref(weight, *images, None, *options, True, True)
        for a, b in zip(grads, expected, strict=True):
            assert_close(a, b, 1e-12)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1, 2, 11, 2, 4), (1, 2, 11, 5)], ids=str)
@pytest.mark.parametrize("far", [1, 3, 12])
def test_layers_of_cells_that_reach_the_same_voxels(shape, far):
    """Neighbours, several cells away, all of them and far beyond: moving receives the sum."""
    rest = len(shape) - 3
    options = (2, *[3] * rest), (far, *[0] * rest), (1,) * (rest + 1)
    check_against_reference(
        lambda f, m: fastreg.cost_volume(f, m, *options[:2]),
        lambda f, m: truth(f, m, None, *options),
        make(shape),
    )


@pytest.mark.kernel
def test_nan_reaches_the_gradients_of_what_read_it():
    fixed, moving = make((1, 2, 4, 12), torch.float32)
    with torch.no_grad():
        moving[0, 1, 2, 5] = math.nan
    mask = torch.ones(1, 1, 4, 12)

    def where_not_finite():
        cost = fastreg.cost_volume(fixed, moving, (2, 4), (1, 1), mask=mask)
        grads = torch.autograd.grad(cost, (fixed, moving), torch.ones_like(cost))
        return [g[0].isfinite().logical_not().nonzero().tolist() for g in grads]

    readers = [[1, y, x] for y in (1, 2, 3) for x in (4, 5, 6)]
    assert where_not_finite() == [readers, [[1, 2, 5]]]
    mask[0, 0, 1:, 4:7] = 0  # nobody reads it
    assert where_not_finite() == [[], []]
    mask[0, 0, 0, 0] = math.nan  # of cell (0, 0): its voxels, and what they reach
    own = [[c, y, x] for c in (0, 1) for y in range(2) for x in range(4)]
    reached = [[c, y, x] for c in (0, 1) for y in range(3) for x in range(5)]
    assert where_not_finite() == [own, reached]
    mask[0, 0, :2, 1:4] = mask[0, 0, 1, 0] = 0  # alone in its cell
    around = [[c, y, x] for c in (0, 1) for y in range(2) for x in range(2)]
    assert where_not_finite() == [[[c, 0, 0] for c in (0, 1)], around]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(dtypes):
    fixed, moving = (
        t.detach().to(d).requires_grad_() for t, d in zip(make((1, 2, 4, 5, 6)), dtypes, strict=True)
    )
    cost = fastreg.cost_volume(fixed, moving, 2, 1)
    assert cost.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    check_against_reference(
        lambda f, m: 100 * fastreg.cost_volume(f, m, 2, 1),
        lambda f, m: 100 * truth(f, m, None, (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        (fixed, moving),
    )


@pytest.mark.kernel
def test_cells_without_weight_cost_nothing():
    fixed, moving = make((2, 2, 4, 6, 6), torch.float32)
    mask = torch.zeros(2, 1, 4, 6, 6)
    mask[1, :, :2, :3, :3] = 1
    cost = fastreg.cost_volume(fixed, moving, (2, 3, 3), 1, mask=mask)
    seen = cost.ne(0).flatten(-1).any(-1)
    assert seen.nonzero().tolist() == [[1, 0, 0, 0]]
    grads = torch.autograd.grad(cost.sum(), (fixed, moving))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][mask.expand_as(fixed) == 0].eq(0).all()


@pytest.mark.kernel
def test_a_mask_of_booleans_and_weights_below_zero():
    fixed, moving = (t.detach() for t in make((2, 3, 5, 6, 7), torch.float32))
    mask = torch.rand(2, 1, 5, 6, 7) > 0.5
    a, b = (fastreg.cost_volume(fixed, moving, 3, 1, mask=m) for m in (mask, torch.where(mask, 1.0, -2.0)))
    assert torch.equal(a, b)


@pytest.mark.kernel
def test_nan():
    fixed, moving = (t.detach() for t in make((1, 2, 4, 12), torch.float32))
    fixed[0, 1, 1, 4] = math.nan  # in cell (0, 1)
    moving[0, 0, 3, 8] = math.inf  # read by cell (1, 2) and (1, 1)
    cost = fastreg.cost_volume(fixed, moving, (2, 4), (0, 1))
    expected = torch.zeros(2, 3, 3, dtype=torch.bool)
    expected[0, 1] = True
    expected[1, 1, 2] = True  # voxel 7, one to the right
    expected[1, 2, :2] = True
    assert torch.equal(~cost[0].isfinite(), expected)
    # Masked out, neither counts.
    mask = torch.ones(1, 1, 4, 12)
    mask[0, 0, 1, 4] = 0
    mask[0, 0, 3, 7:10] = 0
    assert fastreg.cost_volume(fixed, moving, (2, 4), (0, 1), mask=mask).isfinite().all()
    # A weight that is not a number is not ignored.
    mask[0, 0, 0, 0] = math.nan
    assert fastreg.cost_volume(fixed, moving, (2, 4), (0, 1), mask=mask).isnan().nonzero()[:, 1:3].unique(
        dim=0
    ).tolist() == [[0, 0]]


@pytest.mark.kernel
def test_half_differences_do_not_overflow():
    fixed, moving = torch.full((1, 1, 8, 40), 60000.0).half(), torch.full((1, 1, 8, 40), -60000.0).half()
    assert_close(fastreg.cost_volume(fixed, moving, 8, 1), torch.full((1, 1, 5, 9), 120000.0**2))


@pytest.mark.kernel
def test_large_cells_keep_their_digits():
    size = (9, 100) if BACKEND == "triton" else (900, 1000)  # the interpreter takes a millisecond a voxel
    fixed, moving = (t.detach().float() for t in make((1, 1, *size)))
    truth = (fixed.double() - moving).square().mean().view(1, 1, 1, 1)
    assert_close(fastreg.cost_volume(fixed, moving, 1000, 0), truth, 1e-6)


@pytest.mark.kernel
def test_weights_of_any_size():
    """Subnormal ones, whose inverse is infinite, and ones that are lost beside the first, one by one."""
    fixed, moving = make((1, 2, 8, 64), torch.float32)
    many = torch.full((1, 1, 8, 64), 2.0**-25)
    many[..., 0, 0] = 1
    # Products with subnormal weights have few digits; in a row or a block what is beside the first loses a few.
    for mask, cell, tolerance in ((torch.full((1, 1, 8, 64), 1e-40), 2, 1e-3), (many, 64, 5e-6)):
        check_against_reference(
            lambda f, m, mask=mask, cell=cell: fastreg.cost_volume(f, m, cell, (0, 1), mask=mask),
            lambda f, m, mask=mask, cell=cell: truth(f, m, double(mask), (cell, cell), (0, 1), (1, 1)),
            (fixed, moving),
            tolerance,
        )


@pytest.mark.parametrize("radius", [3000, 32000])
def test_a_radius_that_no_memory_holds_is_told(radius):
    image = torch.zeros(1, 1, 64, 64, 64)
    # the CUDA launcher refuses what its indices cannot hold
    with pytest.raises(ValueError, match=r"radius (must leave a result that fits into memory|is too large)"):
        fastreg.cost_volume(image, image, 1, radius)


def opcheck(dtype):
    inputs, mask = make((2, 3, 4, 5, 6), dtype), make_mask((2, 3, 4, 5, 6))
    plain, op = [t.detach() for t in inputs], torch.ops.fastreg.cost_volume.default
    for m in (None, mask):
        options = (m, [2, 2, 4], [1, 1, 0], [1, 2, 1])
        yield op, (*inputs, *options)
        grad = torch.rand_like(op(*plain, *options))
        yield torch.ops.fastreg.cost_volume_bwd.default, (grad, *plain, *options, True, False)


def case(cell, radius, stride, masked=False, channels=2):
    def make_(n, spatial, dtype):
        images = make((n, channels, *spatial), dtype)
        return (*images, make_mask((n, 2, *spatial)).to(dtype)) if masked and n else images

    return Case(
        lambda f, m, mask=None: fastreg.cost_volume(f, m, cell, radius, stride=stride, mask=mask), make_
    )


VALID = {
    "fixed": torch.zeros(2, 3, 4, 5),
    "moving": torch.zeros(2, 3, 4, 5),
    "cell": 2,
    "radius": 1,
}
ERRORS = [
    (
        TypeError,
        "fixed must be fp64, fp32, fp16 or bf16, got torch.int64",
        {"fixed": torch.zeros(2, 3, 4, 5).long()},
    ),
    (ValueError, r"moving must have the shape \(2, 3, 4, 5\) of fixed", {"moving": torch.zeros(2, 3, 4, 6)}),
    (ValueError, "cell must be an int >= 1", {"cell": 0}),
    (ValueError, "cell must be an int >= 1", {"cell": (2, 2, 2)}),
    (TypeError, "radius must be an int or 2 ints", {"radius": 1.5}),
    (ValueError, "radius must be an int >= 0", {"radius": -1}),
    (ValueError, "stride must be an int >= 1", {"stride": 0}),
    (ValueError, r"mask must have shape \(2, 1, 4, 5\)", {"mask": torch.zeros(2, 3, 4, 5)}),
    (
        ValueError,
        "mask must not require a gradient",
        {"mask": torch.zeros(2, 1, 4, 5, requires_grad=True)},
    ),
]  # fmt: skip

CONTRACT = Contract(
    cases={"plain": case(2, 1, 1), "strided": case(3, 1, 2), "masked": case(2, 1, 1, True)},
    valid=VALID,
    errors=ERRORS,
    opcheck=opcheck,
    gradcheck=True,
    double_backward=False,
    layouts=True,
    vmap=True,
    compiled=True,
    empty_batch={"plain": case(2, 1, 1)},
    empty_axes=True,
    empty_channels={"plain": case(2, 1, 1, channels=0)},
    repeats=True,
)
