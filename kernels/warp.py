"""Warp in Triton: ``out(p) = image(A [p, 1] + u(p))`` and its gradients; the rules are those of csrc/common/warp.h.

A program owns a tile of ROWS x LANES voxels of the output grid, one voxel a thread, and marches over `steps` of them along
z (2D: y). Rows of a tile lie along x within a warp, so loads coalesce and a thread can hand what it scatters to its
neighbour. Positions, corners and weights are computed once per voxel; the loop over channels is inside.
"""

import math

import torch

from fastreg.kernels.launch import TYPES, arithmetic_of, blocks, contiguous, launch
from fastreg.kernels.warp_backward import warp_bwd_kernel
from fastreg.kernels.warp_sampling import warp_fwd_kernel
from fastreg.kernels.warp_scatter import from_fixed_kernel, largest_kernel

# Voxels of a tile along z, y and x (2D: y and x). Those along x fill a warp, so that neighbours exchange by shuffles; a tile has
# as many voxels as a program has threads, so that every tensor has one layout. AMD's waves have 64 threads.
_TILE = (1, 8, 32)
_WARPS = 4 if torch.version.hip else 8
# Steps of a march, and the programs below which it is shortened to fill the device.
_STEPS, _ENOUGH = 8, 4096
_WIDE_FROM = 2**31
_CHUNK = 1024


def _strides(t):
    """Of (N, C, *spatial), contiguous or with the channels of a voxel side by side: along samples, channels and voxels."""
    n_voxels = math.prod(t.shape[2:])
    if t.is_contiguous():
        return t.shape[1] * n_voxels, n_voxels, 1
    return t.stride(0), t.stride(1), t.stride(-1)


class WarpCall:
    """The tensors of a call and what its launches have in common. What is not a field of integrate_velocity is contiguous."""

    def __init__(self, image, u, affine, mode, padding, compose=False):
        nd = image.dim() - 2
        spatial = (image if u is None else u).shape[2:]
        sizes = [*[1] * (3 - nd), *image.shape[2:], *[1] * (3 - nd), *spatial]
        if max(sizes) >= 2**29:
            raise ValueError("fastreg::warp: an axis must be shorter than 2^29")
        self.image, self.u, self.affine = image, u, affine
        self.n_in, self.n_out = math.prod(image.shape[2:]), math.prod(spatial)
        d, h, w = sizes[3:]
        depth, rows, lanes = _TILE
        n_lanes = blocks(w, lanes)
        n_march, n_rows = (blocks(d, depth), blocks(h, rows)) if nd == 3 else (blocks(h, depth * rows), 1)
        steps = min(_STEPS, n_march, max(1, image.shape[0] * n_march * n_rows * n_lanes // _ENOUGH))
        march = (steps, blocks(n_march, steps), n_rows, n_lanes)
        self.tiles = (image.shape[0], math.prod(march[1:]))
        self.grid = (math.prod(self.tiles),)
        *image_strides, image_stride = _strides(image)
        u_strides = (0, 0, 0) if u is None else _strides(u)
        self.arguments = (image.shape[1], *sizes, *march, *image_strides, *u_strides)
        furthest = max(self.n_in * image_stride, self.n_out * u_strides[2], self.n_out)
        self.options = {
            "ND": nd,
            "STRIDE": image_stride,
            "PADDING": padding,
            "NEAREST": mode == "nearest",
            "COMPOSE": compose,
            "WIDE": furthest >= _WIDE_FROM,
            "DEPTH": depth,
            "ROWS": rows,
            "LANES": lanes,
            "num_warps": _WARPS,
            "num_stages": 1,
        }

    def forward(self, out, arithmetic, pad=False):
        strides = _strides(out)
        wide = self.options["WIDE"] or self.n_out * strides[2] >= _WIDE_FROM
        arguments = (self.image, self.u, self.affine, out, *self.arguments, *strides)
        options = self.options | {"WIDE": wide, "PAD": pad, "A": TYPES[arithmetic]}
        launch(warp_fwd_kernel, self.grid, *arguments, **options)

    def backward(self, grad, arithmetic, grad_image=None, grad_u=None, grad_affine=None):
        """Adds to grad_image, which is of the arithmetic type, and fills the others."""
        words, fixed, largest = 0, None, None
        # No voxel sums more than all gradients of its sample: the weights of each add up to 1.
        log_count = max(self.n_out - 1, 1).bit_length()
        n_each, n_words = self.image.shape[1] * self.n_in, self.image.numel()
        if grad_image is not None and torch.are_deterministic_algorithms_enabled():
            words = 1 if arithmetic == torch.float32 else 2
            fixed = torch.zeros((words, n_words), dtype=torch.int64, device=grad.device)
            largest = torch.zeros(grad.shape[0], dtype=torch.int64, device=grad.device)
            n_grad = grad[0].numel()
            n_chunks = blocks(n_grad, _CHUNK)
            arguments = (grad, largest, n_grad, n_chunks)
            launch(largest_kernel, (grad.shape[0] * n_chunks,), *arguments, BLOCK=_CHUNK)
        arguments = (grad, self.image, self.u, self.affine, grad_image, fixed, largest, grad_u, grad_affine)
        options = self.options | {"WORDS": words, "A": TYPES[arithmetic]}
        launch(warp_bwd_kernel, self.grid, *arguments, *self.arguments, n_words, log_count, **options)
        if words:
            n_chunks = blocks(n_each, _CHUNK)
            arguments = (fixed, largest, grad_image, n_each, n_chunks, n_words, log_count)
            launch(from_fixed_kernel, (grad.shape[0] * n_chunks,), *arguments, WORDS=words, BLOCK=_CHUNK)


def check(op, image, u, affine):
    """What the kernels would read beyond; the public function says what is wrong."""
    n, nd = image.shape[0], image.dim() - 2
    if (
        nd not in (2, 3)
        or (u is None and affine is None)
        or (u is not None and (u.dim() != nd + 2 or u.shape[:2] != (n, nd)))
        or (affine is not None and affine.shape != (n, nd, nd + 1))
    ):
        raise ValueError(f"fastreg::{op}: the shapes of image, displacement and affine do not fit")


def warp(image, displacement, affine, mode, padding):
    check("warp", image, displacement, affine)
    image, u, affine = contiguous(image, displacement, affine)
    out = image.new_empty((*image.shape[:2], *(image if u is None else u).shape[2:]))
    if out.numel() == 0 or image.numel() == 0:
        return out.zero_()
    WarpCall(image, u, affine, mode, padding).forward(out, arithmetic_of(image, u))
    return out


def warp_bwd(grad, image, displacement, affine, mode, padding, need_image, need_displacement, need_affine):
    check("warp_bwd", image, displacement, affine)
    grad, image, u, affine = contiguous(grad, image, displacement, affine)
    if grad.shape != (*image.shape[:2], *(image if u is None else u).shape[2:]):
        raise ValueError("fastreg::warp_bwd: grad must have the shape of the output")
    if (need_displacement and u is None) or (need_affine and affine is None):
        raise ValueError("fastreg::warp_bwd: a gradient must be to a tensor that is given")
    arithmetic = arithmetic_of(image, u)
    grad_image = torch.zeros_like(image, dtype=arithmetic) if need_image else None
    gather = mode == "linear" and grad.numel() > 0 and image.numel() > 0
    grad_u = (torch.empty_like if gather else torch.zeros_like)(u) if need_displacement else None
    grad_affine = torch.zeros_like(affine) if need_affine else None
    if grad.numel() and image.numel() and (need_image or (gather and (need_displacement or need_affine))):
        call = WarpCall(image, u, affine, mode, padding)
        shares = None
        if gather and need_affine:
            shares = torch.empty((*call.tiles, *affine.shape[1:]), dtype=torch.float64, device=grad.device)
        call.backward(grad, arithmetic, grad_image, grad_u if gather else None, shares)
        if shares is not None:
            grad_affine = shares.sum(1).to(affine.dtype)
    if need_image:
        grad_image = grad_image.to(image.dtype)
    return tuple(grad.new_zeros(0) if g is None else g for g in (grad_image, grad_u, grad_affine))
