"""MIND and its loss: patch distances march along z, in slabs, through a scratch of a few planes; descriptors are never stored.

A tensor of a kernel is (channels, voxels of a tile): one voxel a thread, its channels in registers, and what depends on the
channel alone folds into constants. (The x index is clamped, not only masked: were its contiguity known, the compiler would
load four voxels a thread and spread channels over warps.) 2D is a volume of one row a plane: the march goes along y.

Stages: squares windowed along x -> windows along y and z, and what each voxel does with its distances -> transposed windows
of their adjoints along z and y -> the same along x, and the gradient of the image. Between two stages stand as many planes as
the later one reads behind the earlier: slab by slab, every plane is made once. Windows are sums of their samples, never
subtractive; gradients are gathers: results do not depend on the order of programs.

At 256^3, fp32, ssc, radius 2, gradient to moved, in volumes of 67 MB (22 us at 3 TB/s):
  squares x4   write 12; 31 words from L1 and 260 operations a voxel
  voxels  x4   read 12: variance of each image, then the comparison of both, which writes the adjoints of 12 distances
  windows      read 12, write 12
  image        read 12, in 24 places of 5 samples from L1
  floor by bytes: 144 volumes, 3.2 ms; by arithmetic: 2,900 operations a voxel at 33 T/s, 1.5 ms; by L1: 650 words, 1.5 ms.
Memory beyond results: the scratch, the most of 3 images' worth, SCRATCH_BYTES and 8 planes a step.
"""

import functools
import math

import torch
import triton

from fastreg.kernels.launch import TYPES, arithmetic_of, blocks, launch, power_of_two
from fastreg.kernels.mind_march import MARCH, march_kernel
from fastreg.kernels.mind_squares import image_kernel, squares_kernel
from fastreg.ops.mind import channels, patch_weights, seen_or_finite

SCRATCH_BYTES = 2**27
_LEAST_PLANES = 8


@functools.cache
def _weights(radius, patch, sigma, dtype, device):
    """The 2 radius + 1 weights of a patch, then the sums of the last radius + 1, radius, ... of them. Kept for good: a CUDA graph reads them at each replay, and cannot capture the copy to the device."""
    weights = patch_weights(radius, patch, sigma)
    tails = [math.fsum(weights[radius + t :]) for t in range(radius + 1)]
    return torch.tensor(weights + tails, dtype=dtype, device="cpu").to(device)


class _Mind:
    """What the kernels must know of images of one shape and of the options."""

    def __init__(self, image, radius, dilation, neighbourhood, patch, sigma):
        self.shape, nd = image.shape, image.dim() - 2
        spatial = (*image.shape[2:], 1)[:3] if nd == 3 else (image.shape[2], 1, image.shape[3])
        self.N, self.C, (self.D, self.H, self.W) = *image.shape[:2], spatial
        self.dtype = arithmetic_of(image)
        self.image = image
        pairs = channels(neighbourhood, nd)
        axes = (0, 1, 2) if nd == 3 else (0, 2)

        def code(offset):
            return sum(2 * axis + 1 + (o > 0) for axis, o in zip(axes, offset, strict=True) if o)

        codes = [[code(pair[side]) for pair in pairs] for side in (0, 1)]
        self.pairs = {
            name: sum(c << 3 * k for k, c in enumerate(of_side))
            for name, of_side in zip(("FIRST", "SECOND"), codes, strict=True)
        }
        self.used = sum(1 << c for c in {*codes[0], *codes[1]})
        self.NC = len(pairs)
        # Longer offsets end at the border all the same; windows of one sample do nothing.
        self.steps = [min(dilation, n - 1) for n in spatial]
        self.radii = [radius if n > 1 else 0 for n in spatial]
        self.weights = _weights(radius, patch, sigma, self.dtype, image.device)
        TX = power_of_two(self.W, 32 if self.H > 1 else 256)
        TY = power_of_two(self.H, 256 // TX)
        self.tiles = blocks(self.W, TX) * blocks(self.H, TY)
        self.a_plane = self.N * self.H * blocks(self.W, TX) * TX * self.NC
        self.tile = {
            "NC": self.NC, "A": TYPES[self.dtype], "K": triton.next_power_of_2(self.NC), "TY": TY, "TX": TX,
        }  # fmt: skip
        self.TZ = 256 // (TY * TX)
        self.march_warps = max(1, TY * TX // 32)
        self.march = {
            "SIX": neighbourhood == "six", "TINY": torch.finfo(self.dtype).tiny,
        }  # fmt: skip

    def schedule(self, stages, buffers):
        """Ranges of planes of each stage at each step, and planes that the scratch behind each stage holds.

        stages: planes that a stage reads ahead of those it makes; buffers: how many scratches are behind it.
        """
        a_plane = self.a_plane * self.dtype.itemsize
        budget = max(SCRATCH_BYTES, 3 * self.image.numel() * self.dtype.itemsize)
        kept = sum(n * (stages[i] + stages[i + 1]) for i, n in enumerate(buffers) if n)
        step = max(_LEAST_PLANES, (budget // a_plane - kept) // max(sum(buffers), 1))
        fronts, steps = [0] * len(stages), []
        while fronts[-1] < self.D:
            after, made = [], min(self.D, fronts[0] + step)
            for ahead in stages:
                made = made if made == self.D else max(0, made - ahead)
                after.append(made)
            steps.append(list(zip(fronts, after, strict=True)))
            fronts = after
        slots = [
            max(s[i][1] - max(0, s[i + 1][0] - stages[i + 1]) for s in steps) if n else 1
            for i, n in enumerate(buffers)
        ]
        return steps, slots

    def run(
        self, task, images, means=(None, None), weight=None, upstream=None, out=None, grads=(None, None),
        masked=False, l1=False,
    ):  # fmt: skip
        """One task over all planes: (N,) sums in fp64 of what it adds up, if it does."""
        rz, ry, _ = self.radii
        # Beyond radius 2 windows along y are passes of their own.
        wide = ry > 2
        wanted = [i for i, g in enumerate(grads) if g is not None]
        stages = ["squares", *["rows"] * wide, "voxels"]
        if wanted:
            stages += [*["rows back"] * wide, "columns back", "image"]
        ahead = {"voxels": rz, "columns back": rz, "image": self.steps[0]}
        behind = [len(images if s in ("squares", "rows") else wanted) for s in stages[:-1]]
        behind.append(0)
        steps, slots = self.schedule([ahead.get(s, 0) for s in stages], behind)
        scratch = [
            {
                i: self.weights.new_empty(slots[j] * self.a_plane)
                for i in (range(len(images)) if s in ("squares", "rows") else wanted)
            }
            for j, s in enumerate(stages)
        ]
        adds = task in ("variance", "compare")
        march = MARCH.value
        at = stages.index("voxels")
        n_segments = sum(blocks(s[at][1] - s[at][0], march) for s in steps)
        partial = (
            self.weights.new_empty(self.N, n_segments, self.tiles, dtype=torch.float64) if adds else None
        )
        segment = 0
        for ranges in steps:
            for j, stage in enumerate(stages):
                begin, end = ranges[j]
                if begin == end:
                    continue
                before = scratch[j - 1] if j else None
                if stage == "squares":
                    for i, image in enumerate(images):
                        self.squares(image, scratch[j][i], slots[j], begin, end)
                elif stage == "image":
                    for i in wanted:
                        self.gather(before[i], images[i], grads[i], slots[j - 1], begin, end)
                elif stage == "voxels":
                    two = before.get(1)
                    launch(
                        march_kernel, self.grid(end - begin, march), before[0], two, *means, weight, upstream, out, partial,
                        scratch[j].get(0), scratch[j].get(1), self.weights, self.D, self.H, self.W,
                        slots[j - 1], slots[j], begin, end, segment, n_segments,
                        TASK=task, RZ=rz, RY=0 if wide else ry, MASKED=masked, L1=l1, num_warps=self.march_warps, **self.march, **self.tile,
                    )  # fmt: skip
                    segment += blocks(end - begin, march)
                else:
                    windows = {
                        "rows": (0, ry, "rows"),
                        "rows back": (0, ry, "columns"),
                        "columns back": (rz, 0 if wide else ry, "columns"),
                    }[stage]
                    for i, source in before.items():
                        self.windows(source, scratch[j][i], slots[j - 1], slots[j], begin, end, *windows)
        return partial.sum((1, 2)) if adds else None

    def grid(self, planes, of_program, channels=1):
        """See mind_squares.place_of_program."""
        return (self.N * channels * blocks(planes, of_program) * self.tiles,)

    def squares(self, image, out, slots, begin, end):
        launch(
            squares_kernel, self.grid(end - begin, self.TZ), image, out, self.weights, self.C, self.D, self.H, self.W,
            *self.steps, slots, begin, end, USED=self.used, RX=self.radii[2], TZ=self.TZ, num_warps=8, **self.pairs, **self.tile,
        )  # fmt: skip

    def windows(self, source, out, slots_in, slots_out, begin, end, rz, ry, task):
        launch(
            march_kernel, self.grid(end - begin, MARCH.value), source, *[None] * 7, out, None,
            self.weights, self.D, self.H, self.W, slots_in, slots_out, begin, end, 0, 0,
            TASK=task, RZ=rz, RY=ry, MASKED=False, L1=False, num_warps=self.march_warps, **self.march, **self.tile,
        )  # fmt: skip

    def gather(self, adjoint, image, grad, slots, begin, end):
        launch(
            image_kernel, self.grid(end - begin, self.TZ, self.C), adjoint, image, grad, self.weights,
            self.C, self.D, self.H, self.W, *self.steps, slots, begin, end, RX=self.radii[2], TZ=self.TZ, num_warps=8,
            **self.pairs, **self.tile,
        )  # fmt: skip

    def mean_variance(self, image):
        mean = self.run("variance", (image,)) / (self.D * self.H * self.W)
        return torch.where(mean.isfinite(), mean, float("nan"))


def mind_mean_variance(image, mask, *options):
    image = seen_or_finite(image, mask, *options).contiguous()
    if image.numel() == 0:
        return image.new_zeros(image.shape[0], dtype=torch.float64)
    return _Mind(image, *options).mean_variance(image)


def mind(image, *options):
    image = image.contiguous()
    out = image.new_empty((image.shape[0], len(channels(options[2], image.dim() - 2)), *image.shape[2:]))
    if image.numel():
        op = _Mind(image, *options)
        op.run("describe", (image,), (op.mean_variance(image), None), out=out)
    return out


def mind_bwd(grad, image, *options):
    image = image.contiguous()
    out = torch.empty_like(image)
    if image.numel():
        op = _Mind(image, *options)
        mean = op.mean_variance(image)
        op.run("describe_bwd", (image,), (mean, None), upstream=grad.contiguous(), grads=(out, None))
    return out


def _compare(fixed, moved, fixed_variance, mask, options, norm, **arguments):
    fixed, moved = (seen_or_finite(t, mask, *options) for t in (fixed, moved))
    op = _Mind(fixed, *options)
    if fixed_variance is None:
        fixed_variance = op.mean_variance(fixed)
    means = fixed_variance.double().contiguous(), op.mean_variance(moved)
    return op.run("compare", (fixed, moved), means, l1=norm == "l1", **arguments)


def mind_loss(fixed, moved, fixed_variance, mask, *options_and_needs):
    *options, norm, need_fixed, need_moved = options_and_needs
    fixed, moved = fixed.contiguous(), moved.contiguous()
    dtype = arithmetic_of(fixed)
    grads = [
        torch.empty_like(t, dtype=dtype) if need else None
        for t, need in ((fixed, need_fixed), (moved, need_moved))
    ]
    if fixed.numel():
        if mask is not None:
            mask = mask.to(dtype).contiguous()
        total = _compare(
            fixed, moved, fixed_variance, mask, options, norm, weight=mask, masked=True, grads=grads
        ).to(dtype)
    else:
        total = fixed.new_zeros(fixed.shape[0], dtype=dtype)
    return total, *(fixed.new_empty(0, dtype=dtype) if g is None else g for g in grads)


def mind_map(fixed, moved, fixed_variance, mask, *options_and_norm):
    *options, norm = options_and_norm
    fixed, moved = fixed.contiguous(), moved.contiguous()
    dtype = arithmetic_of(fixed)
    out = fixed.new_empty((fixed.shape[0], 1, *fixed.shape[2:]), dtype=dtype)
    if fixed.numel():
        _compare(fixed, moved, fixed_variance, mask, options, norm, out=out)
    return out


def mind_map_bwd(grad, fixed, moved, fixed_variance, mask, *options_and_needs):
    *options, norm, need_fixed, need_moved = options_and_needs
    fixed, moved = fixed.contiguous(), moved.contiguous()
    grads = [torch.empty_like(t) if need else None for t, need in ((fixed, need_fixed), (moved, need_moved))]
    if fixed.numel() and (need_fixed or need_moved):
        weight = grad.contiguous() / len(channels(options[2], fixed.dim() - 2))
        _compare(fixed, moved, fixed_variance, mask, options, norm, weight=weight, grads=grads)
    return tuple(t.new_empty(0) if g is None else g for g, t in zip(grads, (fixed, moved), strict=True))
