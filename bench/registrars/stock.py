"""The loop that tutorials write, on PyTorch's own ops: three levels, a dense displacement, local cross-correlation, diffusion, Adam."""

import sys

import itk_field
import numpy as np
import SimpleITK
import torch
import torch.nn.functional as F

LEVELS = ((4, 100), (2, 100), (1, 50))  # factor, iterations
WINDOW, WEIGHT, RATE = 9, 1.0, 0.1


def read(path):
    image = torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)).astype(np.float32))
    low, high = image.min(), image.max()
    return ((image - low) / (high - low))[None, None]


def box(x):
    for axis in range(3):
        size = [WINDOW if a == axis else 1 for a in range(3)]
        x = F.avg_pool3d(x, size, 1, [n // 2 for n in size], count_include_pad=False)
    return x


def lcc(a, b):
    ma, mb, aa, bb, ab = (box(x) for x in (a, b, a * a, b * b, a * b))
    return -((ab - ma * mb) ** 2 / ((aa - ma * ma) * (bb - mb * mb)).clamp(min=1e-5)).mean()


def warp(image, u):
    size = u.shape[2:]
    identity = F.affine_grid(torch.eye(3, 4)[None], [1, 1, *size], align_corners=True)
    scale = 2 / (torch.tensor(size) - 1).clamp(min=1)
    grid = identity + (u.movedim(1, -1) * scale).flip(-1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def diffusion(u):
    return sum(u.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3


def resized(x, size):
    return F.interpolate(x, size=size, mode="trilinear", align_corners=True)


fixed, moving, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
images, u = [read(fixed), read(moving)], None
for factor, iterations in LEVELS:
    size = [max(8, round(n / factor)) for n in images[0].shape[2:]]
    f, m = (resized(x, size) for x in images)
    if u is None:
        u = torch.zeros(1, 3, *size)
    else:
        ratio = torch.tensor([(n - 1) / (o - 1) for n, o in zip(size, u.shape[2:], strict=True)])
        u = resized(u, size) * ratio.view(1, 3, 1, 1, 1)
    u = u.detach().requires_grad_()
    adam = torch.optim.Adam([u], lr=RATE)
    for _ in range(iterations):
        adam.zero_grad()
        (lcc(f, warp(m, u)) + WEIGHT * diffusion(u)).backward()
        adam.step()
itk_field.write(f"{out}/field.nii.gz", u.detach()[0].movedim(0, -1).numpy(), fixed)
