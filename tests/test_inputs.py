"""What strangers pass to the ops: what is unambiguous is accepted, else the error has the line that works."""

import inspect
import re

import pytest
import torch

import fastreg

IMAGE, U = torch.rand(1, 1, 6, 7, 8), torch.randn(1, 3, 6, 7, 8)
MODULES = [getattr(fastreg.nn, name) for name in fastreg.nn.__all__]
LOSSES = [m.op for m in MODULES if "mask" in m.inputs and "reduction" in inspect.signature(m.op).parameters]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_bool_mask_is_weights_of_0_and_1(loss, dtype):
    fixed, moved = IMAGE.to(dtype), IMAGE.flip(2).to(dtype).requires_grad_()
    mask = IMAGE > 0.4
    for reduction in ("mean", "sum", "none"):
        results = [loss(fixed, moved, mask=m, reduction=reduction) for m in (mask, mask.to(dtype))]
        assert torch.equal(*results)
        assert not torch.equal(results[0], loss(fixed, moved, reduction=reduction))
        grads = [torch.autograd.grad(r.sum(), moved)[0] for r in results]
        assert torch.equal(*grads)


def test_register_takes_a_bool_mask():
    mask = IMAGE > 0.4
    results = [fastreg.register(IMAGE, IMAGE.flip(2), mask=m, iterations=3) for m in (mask, mask.float())]
    assert torch.equal(results[0].displacement, results[1].displacement)
    assert not torch.equal(
        results[0].displacement, fastreg.register(IMAGE, IMAGE.flip(2), iterations=3).displacement
    )


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda: fastreg.warp(IMAGE[0, 0].numpy(), U), TypeError, "torch.from_numpy(image)[None, None]"),
        (lambda: fastreg.warp(IMAGE, U[0].numpy()), TypeError, "torch.from_numpy(displacement)[None]"),
        (lambda: fastreg.mind(IMAGE.numpy()), TypeError, "torch.from_numpy(image)"),
        (lambda: fastreg.metrics.folding(U[0].numpy()), TypeError, "torch.from_numpy(u)[None]"),
        (
            lambda: fastreg.register(IMAGE[0, 0].numpy(), IMAGE),
            TypeError,
            "torch.from_numpy(fixed)[None, None]",
        ),
        (
            lambda: fastreg.mind(IMAGE[0, 0]),
            ValueError,
            "image[None, None] for (D, H, W), image[None] for (C, H, W)",
        ),
        (lambda: fastreg.mind(IMAGE[0, 0, 0]), ValueError, "image[None, None] for (H, W)"),
        (lambda: fastreg.register(IMAGE[0, 0], IMAGE[0, 0]), ValueError, "fixed[None, None]"),
        (lambda: fastreg.diffusion(U[0]), ValueError, "u[None]"),
        (lambda: fastreg.warp(IMAGE, U[0]), ValueError, "displacement[None]"),
        (lambda: fastreg.mse_loss(IMAGE.byte(), IMAGE), TypeError, "fixed.float()"),
        (lambda: fastreg.mse_loss(IMAGE, IMAGE, mask=IMAGE.int()), TypeError, "mask.float()"),
        (lambda: fastreg.warp(IMAGE.int(), U), TypeError, 'image.float(), or labels with mode="nearest"'),
    ],
)
def test_the_error_has_the_line_that_works(call, error, line):
    with pytest.raises(error, match=f"got .*: pass {re.escape(line)}$"):
        call()


def test_one_for_all_by_the_line_of_the_error():
    images, fields = torch.rand(4, 1, 6, 7, 8), torch.randn(4, 3, 6, 7, 8)
    for image, displacement in ((IMAGE, fields), (images, U)):
        with pytest.raises(ValueError, match=r"got .*: pass (.*)$") as caught:
            fastreg.warp(image, displacement)
        line = str(caught.value).rpartition("pass ")[2]
        given = {"image": image, "displacement": displacement}
        given |= {line.split(".")[0]: eval(line, dict(given))}
        expected = [
            fastreg.warp(image[n % len(image)][None], displacement[n % len(displacement)][None])
            for n in range(4)
        ]
        assert torch.equal(fastreg.warp(**given), torch.cat(expected))
