"""The models' losses: what they weigh does not depend on the size of the images; the choices of VoxelMorph."""

import pytest
import torch

import fastreg
from fastreg.models import PRDFE, R2N2, RRN, F3RNet, VoxelMorph
from fastreg.models.base import SIMILARITIES, Prediction

SIZE, MARGIN = 24, 9  # MARGIN: voxels near a border see it, through two windows of the LCC or MIND

# name: model; by which factor a term and its gradient a voxel change where the image has twice the voxels along each axis
LOSSES = {
    "f3rnet": (lambda: F3RNet(weight=0.7), {}),
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
    prediction = Prediction(leaves[0], [leaves[0]] * 2 if isinstance(model, R2N2) else [])
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
        model = VoxelMorph(similarity=name, window=5, mind=mind)
        terms = model.terms(fixed, moving, lone)
        torch.testing.assert_close(terms["similarity"], value, rtol=1e-4, atol=1e-6)
        mask = torch.zeros_like(fixed)
        mask[..., :9] = 1
        assert model.terms(fixed, moving, lone, mask)["similarity"] != terms["similarity"]
    for build in (VoxelMorph,):
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
