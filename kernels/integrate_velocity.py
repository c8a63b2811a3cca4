"""compose and integrate_velocity in Triton: warps of a displacement by a displacement, which is added to what is read.

A step of scaling and squaring reads a field and writes one, 6 volumes (kept: 8, a field's voxel being padded to 4
numbers); 256^3 in fp32: 400 MB, 0.13 ms at 3 TB/s, 0.9 ms for 7 steps. A step back reads flow and field twice, writes its
result and adds to it by atomics, 21 volumes: 1.4 GB, 0.47 ms. Memory: the kept fields, or two; in the backward two more.
"""

import math

import torch

from fastreg.kernels.launch import arithmetic_of, contiguous
from fastreg.kernels.warp import WarpCall, check


def compose(u, v, padding):
    check("compose", u, v, None)
    u, v = contiguous(u, v)
    out = u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, v.dtype))
    if out.numel():
        WarpCall(u, v, None, "linear", padding, compose=True).forward(out, arithmetic_of(u, v))
    return out


def compose_bwd(grad, u, v, padding, need_u, need_v):
    check("compose_bwd", u, v, None)
    if not grad.shape == u.shape == v.shape:
        raise ValueError("fastreg::compose_bwd: grad, u and v must have one shape")
    arithmetic = arithmetic_of(u, v)
    grad_u = torch.zeros(u.shape if need_u else 0, dtype=arithmetic, device=u.device)
    grad_v = v.new_empty(v.shape if need_v else 0)
    if u.numel() and (need_u or need_v):
        grad, u, v = contiguous(grad, u, v)
        call = WarpCall(u, v, None, "linear", padding, compose=True)
        call.backward(grad, arithmetic, grad_u if need_u else None, grad_v if need_v else None)
    return grad_u.to(u.dtype), grad_v


class _Integration:
    """Steps of scaling and squaring. Fields are of the arithmetic type, planar or, where kept, components side by side."""

    def __init__(self, v, steps, padding):
        self.v, self.steps, self.padding = v, steps, padding
        self.arithmetic = arithmetic_of(v)

    def start(self):
        return (self.v.to(self.arithmetic) * 2.0**-self.steps).contiguous()

    def empty(self):
        return torch.empty(self.v.shape, dtype=self.arithmetic, device=self.v.device)

    def kept(self, fields, s):
        """The field after s steps, as (N, nd, *spatial)."""
        return fields[:, s - 1, ..., : self.v.shape[1]].movedim(-1, 1)

    def call(self, u):
        return WarpCall(u, u, None, "linear", self.padding, compose=True)

    def advance(self, u, out, pad=False):
        self.call(u).forward(out, self.arithmetic, pad)
        return out

    def back(self, u, flow, out):
        """Two launches: what the first writes at a voxel's own place the second adds to, so nothing is cleared."""
        call = self.call(u)
        call.backward(flow, self.arithmetic, grad_u=out)
        call.backward(flow, self.arithmetic, grad_image=out)
        return out


def integrate_velocity(v, steps, padding, keep):
    nd = v.dim() - 2
    run = _Integration(v.contiguous(), steps, padding)
    n_kept = max(steps - 1, 0) if keep else 0
    shape = (v.shape[0], n_kept, *v.shape[2:], 2 if nd == 2 else 4)
    fields = torch.empty(shape, dtype=run.arithmetic, device=v.device)
    if steps == 0 or v.numel() == 0:
        return v.clone(memory_format=torch.contiguous_format), fields
    u, spare = run.start(), None
    for s in range(1, steps):
        if keep:
            u = run.advance(u, run.kept(fields, s), pad=nd == 3)
        else:
            u, spare = run.advance(u, run.empty() if spare is None else spare), u
    return run.advance(u, v.new_empty(v.shape)), fields


def integrate_velocity_bwd(grad, v, fields, steps, padding):
    if steps == 0 or v.numel() == 0:
        return grad.to(v.dtype).clone(memory_format=torch.contiguous_format)
    if grad.shape != v.shape:
        raise ValueError("fastreg::integrate_velocity_bwd: grad must have the shape of v")
    run, fields = _Integration(v.contiguous(), steps, padding), fields.contiguous()
    kept = fields.shape[1] > 0 or steps == 1
    # Without kept fields those of every sqrt(steps)-th step are computed first, then, from the last to the first,
    # those between.
    every = 1 if kept else math.isqrt(steps - 1) + 1
    marks = {0: run.start()}
    if not kept:
        u = marks[0]
        for s in range(1, (steps - 1) // every * every + 1):
            u = run.advance(u, run.empty())
            if s % every == 0:
                marks[s] = u
    flow, spare = grad.to(run.arithmetic).contiguous(), None
    for first in range((steps - 1) // every * every, -1, -every):
        between = [run.kept(fields, first) if kept and first > 0 else marks.pop(first)]
        while len(between) < min(every, steps - first):
            between.append(run.advance(between[-1], run.empty()))
        while between:
            out = run.empty() if spare is None else spare
            # The first flow may be the caller's.
            spare = None if first + len(between) == steps else flow
            flow = run.back(between.pop(), flow, out)
    return (flow * 2.0**-steps).to(v.dtype)
