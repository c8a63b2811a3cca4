"""The models' losses: what they weigh does not depend on the size of the images; the choices of LinDef and VoxelMorph."""

import math

import pytest
import torch

import fastreg
from fastreg.models import MODELS, PRDFE, R2N2, RRN, F3RNet, LinDef, VoxelMorph, lindef
from fastreg.models.base import SIMILARITIES, Prediction

SIZE, MARGIN = 24, 9  # MARGIN: voxels near a border see it, through two windows of the LCC or MIND

NARROW = {"encoder": (2, 2, 2, 2, 2), "decoder": (2, 2, 2, 2, 2)}
# name: model; by which factor a term and its gradient a voxel change where the image has twice the voxels along each axis
LOSSES = {
    "f3rnet": (lambda: F3RNet(weight=0.7), {}),
    **{f"lindef {s}": (lambda s=s: LinDef(similarity=s, beta=0.2, **NARROW), {}) for s in SIMILARITIES},
    "lindef single_pass": (lambda: LinDef(order="single_pass", **NARROW), {}),
    "lindef keras": (lambda: LinDef(reduction="keras", beta=0.2, **NARROW), {"regularity": 8}),
    "lindef sum": (lambda: LinDef(reduction="sum", **NARROW), {"similarity": 8, "regularity": 8}),
    "prdfe": (PRDFE, {}),
    "prdfe2d": (lambda: PRDFE(ndim=2), {}),
    # Of displacements in parts of the image: as its paper has it, at its one size.
    "r2n2": (lambda: R2N2(steps=2, widths=(2, 2, 2, 2)), {"regularity": (SIZE - 1) / (2 * SIZE - 1)}),
    **{f"rrn {r}": (lambda r=r: RRN(regularizer=r, pyramid=(2,) * 4, dense=(2,), refine=(2,) * 6), {}) for r in ("tv", "diffusion")},
    **{f"voxelmorph {s}": (lambda s=s: VoxelMorph(similarity=s), {}) for s in SIMILARITIES},
    "voxelmorph tv": (lambda: VoxelMorph(regularizer="tv", window=5), {}),
}  # fmt: skip


def content(nd):
    """Two smooth images that are alike, a displacement of less than a voxel and gradients Phi, fp64, without seams when repeated."""
    draw = torch.Generator().manual_seed(0)
    images, u, phi = (
        torch.rand(1, n, *[SIZE] * nd, generator=draw, dtype=torch.float64) for n in (2, nd, nd)
    )
    for axis in range(2, nd + 2):
        images = (images.roll(1, axis) + images + images.roll(-1, axis)) / 3
    images = (images - images.amin()) / (images.amax() - images.amin())
    fixed, other = images.split(1, 1)
    return fixed, 0.7 * fixed + 0.3 * other, 0.4 * u, 0.5 + phi


def weighed(model, fixed, moving, u, phi):
    """Each term of the loss, and its gradient to the displacement and to Phi times the number of voxels."""
    leaves = [t.clone().requires_grad_() for t in (u, phi)]
    affine = torch.eye(u.shape[1], u.shape[1] + 1, dtype=u.dtype)[None].requires_grad_()
    fields = {LinDef: leaves[::-1], R2N2: [leaves[0]] * 2}.get(type(model), [])
    prediction = Prediction(leaves[0], fields, affine if isinstance(model, LinDef) else None)
    found = {}
    for name, term in model.terms(fixed, moving, prediction).items():
        grads = torch.autograd.grad(term, leaves, allow_unused=True, retain_graph=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        found[name] = term.detach(), torch.cat(grads, 1) * u[0, 0].numel()
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_a_voxel_do_not_depend_on_the_size(name):
    """The same content at two sizes: once, and twice along each axis."""
    build, factors = LOSSES[name]
    model = build().double()
    model.padding = "border"  # what zeros outside do to borders is not of the size either, but more
    parts = content(model.ndim)
    tiled = [t.repeat(1, 1, *[2] * model.ndim) for t in parts]
    small, large = weighed(model, *parts), weighed(model, *tiled)
    inner = (..., *[slice(MARGIN, SIZE - MARGIN)] * model.ndim)
    assert any(small[term][1][inner].abs().max() > 0 for term in small)
    assert {"similarity", "regularity"} <= small.keys()
    for term, (value, gradient) in small.items():
        factor = factors.get(term, 1)
        # Borders count less in a larger image.
        torch.testing.assert_close(large[term][0], factor * value, rtol=0.15, atol=0)
        expected = factor * gradient[inner]
        scale = expected.abs().max().item()
        torch.testing.assert_close(large[term][1][inner], expected, rtol=0.05, atol=0.05 * scale)


def test_no_model_is_left_out():
    assert {type(build()) for build, _ in LOSSES.values()} == set(MODELS.values())


def test_lindefs_affine_term_does_not_depend_on_the_size():
    """It is of [-1, 1] coordinates."""
    model, step = LinDef(alpha=0.3, deformable=False, **NARROW), torch.rand(1, 3, 4)
    for shape in ((9, 12, 10), (18, 24, 20)):
        prediction = Prediction(torch.zeros(1, 3, *shape), [], lindef._to_voxels(step, shape))
        term = model.terms(*torch.rand(2, 1, 1, *shape), prediction)["affine"]
        torch.testing.assert_close(term, 0.3 * step.sum(), rtol=1e-4, atol=0)


def test_lindef_can_deform_at_the_papers_size_and_weights():
    """At the identity the squared error pulls on more of Phi than beta holds, whatever the size; beside a sum ("keras") on ever less."""
    draw = torch.Generator().manual_seed(0)
    share = {}
    for reduction in ("mean", "keras"):
        model = LinDef(reduction=reduction, beta=1e-6, affine=False, **NARROW)
        for n in (8, 16, 32):
            coarse = torch.rand(2, 1, 1, 4, 4, 4, generator=draw)
            fixed, moving = (torch.nn.functional.interpolate(t, (n,) * 3, mode="trilinear") for t in coarse)
            phi = torch.ones(1, 3, n, n, n, requires_grad=True)
            u = fastreg.integrate_gradients(phi)
            similarity = model.terms(fixed, moving, Prediction(u, [phi, u]))["similarity"]
            (pull,) = torch.autograd.grad(similarity, phi)
            above = Prediction(u, [phi + 1e-3, u])
            (hold,) = torch.autograd.grad(model.terms(fixed, moving, above)["regularity"], phi)
            share[reduction, n] = float((pull.abs() > hold.abs()).float().mean())
    # The rest is where the images are flat: an eighth along each axis.
    assert min(share["mean", n] for n in (8, 16, 32)) > 0.85
    assert share["keras", 32] < share["keras", 16] < share["keras", 8]


def test_similarities_are_the_ops():
    fixed, moving = torch.rand(2, 1, 1, 16, 17, 18)
    options = {"radius": 1, "dilation": 1}
    expected = {
        "mse": fastreg.mse_loss(fixed, moving),
        "lcc": fastreg.lcc_loss(fixed, moving, 5),
        "mi": fastreg.mi_loss(fixed, moving),
        "mind": fastreg.mind_loss(fixed, moving, **options),
    }
    assert expected.keys() == SIMILARITIES.keys()
    still = torch.zeros(1, 3, *fixed.shape[2:])
    lone = Prediction(still, [still + 1, still], torch.eye(3, 4)[None])
    for name, value in expected.items():
        mind = options if name == "mind" else None
        for model in (
            VoxelMorph(similarity=name, window=5, mind=mind),
            LinDef(similarity=name, window=5, mind=mind, **NARROW),
        ):
            terms = model.terms(fixed, moving, lone)
            torch.testing.assert_close(terms["similarity"], value, rtol=1e-4, atol=1e-6)
            mask = torch.zeros_like(fixed)
            mask[..., :9] = 1
            assert model.terms(fixed, moving, lone, mask)["similarity"] != terms["similarity"]
    for build in (VoxelMorph, LinDef):
        assert f"similarity must be one of {tuple(SIMILARITIES)}" in _refused(build, similarity="ncc")
        assert 'mind is for similarity="mind"' in _refused(build, mind={"radius": 1})
        assert "window must be odd" in _refused(build, window=4)


def _refused(build, **options):
    with pytest.raises(ValueError, match=build.__name__) as caught:
        build(**options)
    return str(caught.value)


def test_voxelmorph_has_rrns_loss():
    """LCC and total variation of 0.01, as RRN's ablation compares the nets by."""
    fixed, moving = torch.rand(2, 1, 1, 16, 16, 16)
    prediction = Prediction(torch.rand(1, 3, 16, 16, 16))
    rrn = RRN(pyramid=(2,) * 4, dense=(2,), refine=(2,) * 6)
    same = VoxelMorph(window=5, regularizer="tv", weight=0.01)
    a, b = (m.terms(fixed, moving, prediction) for m in (rrn, same))
    assert a == b
    assert VoxelMorph().terms(fixed, moving, prediction) != b
    assert "regularizer must be one of" in _refused(VoxelMorph, regularizer="l1")


def test_lindef_of_one_part():
    fixed, moving = torch.rand(2, 1, 1, 9, 10, 11)
    linear = LinDef(deformable=False)
    assert sum(p.numel() for p in linear.parameters()) == 420_228
    torch.nn.init.normal_(linear.linear.weight, std=0.01)
    prediction = linear(fixed, moving)
    assert prediction.fields == []
    torch.testing.assert_close(
        prediction.displacement, fastreg.affine_displacement(prediction.affine, (9, 10, 11))
    )
    assert prediction.displacement.abs().max() > 0.01
    terms = linear.terms(fixed, moving, prediction)
    assert terms.keys() == {"similarity", "affine"}
    moved = fastreg.warp(moving, prediction.displacement, padding="border")
    torch.testing.assert_close(terms["similarity"], fastreg.mse_loss(fixed, moved), rtol=1e-4, atol=1e-6)
    linear.loss(fixed, moving, prediction).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in linear.parameters())
    assert "affine and deformable must not both be False" in _refused(LinDef, affine=False, deformable=False)
    assert "reduction must be one of" in _refused(LinDef, reduction="none")


def test_lindefs_reductions_are_one_loss_at_one_voxel_count():
    fixed, moving = torch.rand(2, 1, 1, 8, 9, 10)
    predicted = LinDef(**NARROW)(fixed, moving)
    prediction = predicted._replace(fields=[predicted.fields[0] + 0.1, predicted.fields[1]])
    mean, total, keras = (
        LinDef(reduction=r, beta=1e-6, **NARROW).terms(fixed, moving, prediction)
        for r in ("mean", "sum", "keras")
    )
    mean, total, keras = ({k: t.item() for k, t in terms.items()} for terms in (mean, total, keras))
    n = math.prod(fixed.shape)
    assert total["similarity"] == pytest.approx(n * mean["similarity"])
    assert total["regularity"] == pytest.approx(n * mean["regularity"])
    assert keras["similarity"] == mean["similarity"]
    assert keras["regularity"] == total["regularity"]
    assert total["regularity"] == pytest.approx(1e-6 * 0.1 * 3 * n, rel=1e-3)
    assert [LinDef(reduction=r, **NARROW).beta for r in ("mean", "sum", "keras")] == [0.01, 0.01, 1e-6]
