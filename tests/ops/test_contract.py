"""What contract.py says of every op, checked for each op and each way to call it."""

import pytest
import torch
from common import BACKEND, COMPILED, assert_close, layouts
from contract import PROPERTIES, contracts, held
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg

pytestmark = pytest.mark.contract
CONTRACTS = contracts()


def every(name, kernel=False):
    """A test of each case for which the property `name` holds; `kernel`: of the kernels, not of what is around them."""
    mark = [pytest.mark.kernel] if kernel else []
    found = [
        pytest.param(contract, case, id=f"{op}-{key}", marks=mark)
        for op, contract in CONTRACTS.items()
        for key, case in held(contract, name).items()
    ]
    return pytest.mark.parametrize(("contract", "case"), found)


def ops(kept=lambda contract: True):
    return pytest.mark.parametrize("op", [op for op, contract in CONTRACTS.items() if kept(contract)])


def wanted(inputs):
    return [t for t in inputs if t.requires_grad]


def run(call, inputs, weight=None):
    """Output and gradients."""
    out = call(*inputs)
    return out, *torch.autograd.grad(out, wanted(inputs), torch.ones_like(out) if weight is None else weight)


def again(inputs, change=lambda t: t):
    return [change(t.detach()).requires_grad_(t.requires_grad) for t in inputs]


def assert_same(ours, theirs, tolerance=0.0):
    for a, b in zip(ours, theirs, strict=True):
        if tolerance:
            assert_close(a, b.double(), tolerance, floor=1)
        else:
            assert torch.equal(a, b)


# It takes a millisecond a statement; gradients are compared with the reference's, programs run in one order.
not_interpreted = pytest.mark.skipif(BACKEND == "triton", reason="minutes under the interpreter")


def spatial(contract, three, two):
    """A size for each number of axes; under the interpreter a small one."""
    if BACKEND == "triton":
        return [(*(min(s, 3) for s in three[:-1]), min(three[-1], 9))]
    return [{3: three, 2: two}[nd] for nd in contract.dimensions]


def test_every_op_has_every_property():
    for contract in CONTRACTS.values():
        for name in PROPERTIES:
            value = getattr(contract, name)
            assert value is True or (isinstance(value, (dict, str)) and value)
        assert contract.errors
    registered = {
        n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastreg::")
    }
    checked = {op.name().split("::")[1] for c in CONTRACTS.values() for op, *_ in c.opcheck(torch.float64)}
    assert checked == registered


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@ops()
def test_opcheck(op, dtype):
    for function, arguments, *tests in CONTRACTS[op].opcheck(dtype):
        # What is traced does not depend on the type.
        tests = tests[0] if tests else torch.library._OPCHECK_DEFAULT_UTILS
        if dtype != torch.float64:
            tests = [t for t in tests if "aot" not in t]
        torch.library.opcheck(function, arguments, test_utils=tests)


@not_interpreted
@pytest.mark.usefixtures("reproducible")
@every("gradcheck", kernel=True)
def test_gradcheck(contract, case):
    for n, size in enumerate(spatial(contract, (3, 4, 3), (4, 3)), 1):
        inputs = case.make(n, size, torch.float64)
        fast = BACKEND != "cpu" or len(held(contract, "gradcheck")) > 9
        assert torch.autograd.gradcheck(case.call, inputs, fast_mode=fast)
        if contract.double_backward:
            assert torch.autograd.gradgradcheck(case.call, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("contract", "case"),
    [
        pytest.param(c, case, id=f"{op}-{key}")
        for op, c in CONTRACTS.items()
        if not c.double_backward
        for key, case in c.cases.items()
    ],
)
def test_double_backward_raises(contract, case):
    inputs = case.make(1, spatial(contract, (3, 4, 5), (4, 5))[-1], torch.float64)
    out = case.call(*inputs)
    for grad in torch.autograd.grad(out.square().sum(), wanted(inputs), create_graph=True):
        with pytest.raises(RuntimeError, match=r"fastreg::\w+: double backward is not supported"):
            torch.autograd.grad(grad.sum(), wanted(inputs), retain_graph=True)


@pytest.mark.usefixtures("reproducible")
@every("layouts", kernel=True)
def test_layouts(contract, case):
    """Of inputs and of the gradient that comes in."""
    tolerance = contract.tolerance or (0 if COMPILED or BACKEND != "cpu" else 1e-5)
    for size in spatial(contract, (5, 6, 17), (8, 9)):
        plain = again(case.make(2, size, torch.float32))
        weight = torch.randn_like(case.call(*plain))
        expected = run(case.call, plain, weight)
        for name in layouts(plain[0].detach()):
            given = again(plain, lambda t, name=name: layouts(t)[name])
            upstream = layouts(weight)[name] if weight.dim() else weight
            assert_same(run(case.call, given, upstream), expected, tolerance)
        # A gradient of stride 0, and samples that share memory.
        assert_same(
            torch.autograd.grad(case.call(*plain).sum(), wanted(plain)), run(case.call, plain)[1:], tolerance
        )
        shared = again(plain, lambda t: t[:1].expand(2, *t.shape[1:]))
        assert_same(
            run(case.call, shared, weight), run(case.call, again(shared, torch.clone), weight), tolerance
        )


@every("layouts")
def test_fakes_lie_in_memory_as_results_do(contract, case):
    """torch.compile takes the strides of results and gradients from the fake kernels."""

    def strides(name):
        inputs = case.make(2, spatial(contract, (3, 4, 5), (4, 5))[-1], torch.float32)
        return [t.stride() for t in run(case.call, again(inputs, lambda t: layouts(t)[name]))]

    for name in ("transposed", "channels_last"):
        expected = strides(name)
        with FakeTensorMode():
            assert strides(name) == expected


@pytest.mark.usefixtures("reproducible")
@every("vmap")
def test_vmap(contract, case):
    size = spatial(contract, (3, 4, 5), (5, 6))[-1]
    inputs = [
        t.detach().unflatten(0, (4, 2)).requires_grad_(t.requires_grad)
        for t in case.make(8, size, torch.float64)
    ]
    expected = torch.stack([case.call(*some) for some in zip(*inputs, strict=True)])
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, wanted(inputs), weight)
    assert_same(run(torch.vmap(case.call), inputs, weight), (expected, *grads), 1e-12)
    dims = [2, *[0] * (len(inputs) - 1)]
    moved = [t.detach().movedim(0, d) for t, d in zip(inputs, dims, strict=True)]
    assert_same([torch.vmap(case.call, tuple(dims))(*moved)], [expected], 1e-12)
    for i in range(len(inputs) if len(inputs) > 1 else 0):  # one for all
        given = [t.detach()[0] if k == i else t.detach() for k, t in enumerate(inputs)]
        dims = tuple(None if k == i else 0 for k in range(len(inputs)))
        alone = [case.call(*(t if k == i else t[j] for k, t in enumerate(given))) for j in range(4)]
        assert_same([torch.vmap(case.call, dims)(*given)], [torch.stack(alone)], 1e-12)
    if expected.dim() > 1:  # torch's own clamp_min, of a mask, does not map over nothing
        assert torch.vmap(case.call)(*(t.detach()[:0] for t in inputs)).shape == (0, *expected.shape[1:])
    # Several gradients at once.
    single = [t.detach()[0].requires_grad_(t.requires_grad) for t in inputs]
    out = case.call(*single)
    many = torch.autograd.grad(out, wanted(single), weight, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, wanted(single), w, retain_graph=True) for w in weight]
    assert_same(many, [torch.stack(g) for g in zip(*each, strict=True)], 1e-12)


@pytest.mark.usefixtures("reproducible")
@ops(lambda contract: held(contract, "compiled"))
def test_compile(op):
    check_compiled(CONTRACTS[op], list(held(CONTRACTS[op], "compiled").values()), "aot_eager")


@pytest.mark.usefixtures("reproducible")
def test_compile_to_machine_code():
    """What inductor makes of the code around an op does not depend on the op: one will do."""
    check_compiled(CONTRACTS["warp"], [CONTRACTS["warp"].cases["border"]], "inductor")


def check_compiled(contract, cases, backend):
    """All cases in one graph, which takes two sizes."""
    torch._dynamo.reset()  # it counts the graphs of one line of source

    def step(*inputs):
        return sum(
            case.call(*(2 * t for t in some)).square().mean()
            for case, some in zip(cases, inputs, strict=True)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for three, two in (((4, 5, 6), (5, 6)), ((7, 6, 5), (8, 5))):
        inputs = [case.make(1, spatial(contract, three, two)[0], torch.float32) for case in cases]
        flat = [t for some in inputs for t in wanted(some)]
        expected, loss = step(*inputs), compiled(*inputs)
        assert_close(loss, expected.double())
        for a, b in zip(torch.autograd.grad(loss, flat), torch.autograd.grad(expected, flat), strict=True):
            assert_close(a, b, floor=0.1)


def check_empty(case, n, size):
    inputs = case.make(n, size, torch.float32)
    out = case.call(*inputs)
    with FakeTensorMode():
        assert out.shape == case.call(*case.make(n, size, torch.float32)).shape
    expected = torch.full_like(out, 0.0 if out.dim() else case.empty)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    for grad, t in zip(torch.autograd.grad(out.sum(), wanted(inputs)), wanted(inputs), strict=True):
        assert grad.shape == t.shape
        assert grad.eq(0).all()


@every("empty_batch", kernel=True)
def test_empty_batch(contract, case):
    for size in spatial(contract, (4, 5, 6), (4, 5)):
        check_empty(case, 0, size)


@every("empty_axes", kernel=True)
def test_empty_axes(contract, case):
    for size in spatial(contract, (3, 4, 5), (4, 5)):
        for k in range(len(size)):
            check_empty(case, 2, (*size[:k], 0, *size[k + 1 :]))


@every("empty_channels", kernel=True)
def test_empty_channels(contract, case):
    for size in spatial(contract, (3, 4, 5), (4, 5)):
        check_empty(case, 2, size)


@not_interpreted
@pytest.mark.skipif(BACKEND == "cpu" and not COMPILED, reason="PyTorch's own sums depend on the threads")
@pytest.mark.usefixtures("reproducible")
@every("repeats", kernel=True)
def test_repeats(contract, case):
    before = torch.get_num_threads()
    # Emulated threads take turns.
    for size in spatial(contract, (4, 6, 33), (9, 40)) if BACKEND == "emulation" else contract.large:
        for dtype in (torch.float32, torch.float64):
            inputs = case.make(2, size, dtype)
            weight, results = torch.randn_like(case.call(*inputs)), []
            try:
                for threads in (1, 2, 3, 4, 7, 2):
                    torch.set_num_threads(threads)
                    out = case.call(*inputs)
                    grads = torch.autograd.grad(out, wanted(inputs), weight, retain_graph=True)
                    results.append((out, *grads))
            finally:
                torch.set_num_threads(before)
            for other in results[1:]:
                assert_same(results[0], other)
            twice = torch.autograd.grad(out, wanted(inputs), 2 * weight)
            assert_same(twice, [2 * g for g in grads])


@ops()
def test_transforms_without_a_derivative_raise(op):
    contract = CONTRACTS[op]
    case = next(iter(contract.cases.values()))
    inputs = case.make(1, spatial(contract, (4, 5, 6), (4, 5))[-1], torch.float32)
    for i, t in enumerate(inputs):
        if not t.requires_grad:
            continue
        given = [t.detach() for t in inputs]

        def call(t, i=i, given=given):
            return case.call(*given[:i], t, *given[i + 1 :])

        with pytest.raises(RuntimeError, match=rf"fastreg::{op}: torch\.func\.grad"):
            torch.func.grad(lambda t, call=call: call(t).sum())(given[i])
        with pytest.raises(RuntimeError, match=rf"fastreg::{op}: torch\.func\.grad"):
            torch.func.jvp(call, (given[i],), (given[i],))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(given[i], given[i])
            with pytest.raises(RuntimeError, match=f"fastreg::{op}: forward-mode"):
                call(dual)


@pytest.mark.parametrize(
    ("op", "error", "match", "change"), [(op, *row) for op, c in CONTRACTS.items() for row in c.errors]
)
def test_errors(op, error, match, change):
    with pytest.raises(error, match=f"fastreg::{op}: .*{match}"):
        getattr(fastreg, op)(**(CONTRACTS[op].valid | change))


@ops()
def test_errors_of_tensors(op):
    valid = CONTRACTS[op].valid
    tensors = [name for name, t in valid.items() if isinstance(t, torch.Tensor)]
    for name in tensors:
        for error, match, change in (
            (TypeError, "be a tensor, got list", [1.0]),
            (TypeError, "be .*, got torch.complex64", valid[name].to(torch.complex64)),
            (ValueError, "be a dense tensor", valid[name].to_sparse()),
            (ValueError, "(have shape|have the shape)", valid[name][0, 0]),
            (ValueError, "be on", valid[name].to("meta") if len(tensors) > 1 else None),
        ):
            if change is not None:
                with pytest.raises(error, match=f"fastreg::{op}: .*must {match}"):
                    getattr(fastreg, op)(**(valid | {name: change}))


@ops()
def test_autocast_changes_nothing(op):
    contract = CONTRACTS[op]
    for case in contract.cases.values():
        inputs = case.make(2, spatial(contract, (4, 5, 6), (4, 5))[0], torch.float32)
        expected = run(case.call, inputs)
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            assert_same(run(case.call, inputs), expected)
