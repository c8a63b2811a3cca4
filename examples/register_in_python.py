"""Registration of two arrays, without files or the command line, and its result for other tools.

    python examples/register_in_python.py -o field.nii.gz

Arrays become tensors, spacing and a mask are given, the displacement is written as ITK's (SimpleITK, ITK, ANTs, 3D Slicer).
"""

import argparse

import numpy as np
import torch

import fastreg
from fastreg.data import phantom


def tensor(array):
    """(D, H, W), whatever its dtype -> (1, 1, D, H, W), fp32."""
    return torch.from_numpy(np.ascontiguousarray(array)).float()[None, None]


def write_itk(path, u, spacing):
    """u (1, 3, D, H, W) in voxels -> (x, y, z) in mm. For scans with an origin and a direction: fastreg.io.write_displacement."""
    import SimpleITK as sitk

    mm = u[0] * torch.tensor(spacing).view(3, 1, 1, 1)
    field = sitk.GetImageFromArray(mm.flip(0).movedim(0, -1).numpy().astype(np.float64), isVector=True)
    field.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(field, path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=(56, 56, 80), help="voxels (56 56 80)")
    parser.add_argument("--iterations", type=int, default=60, help="of each level, at most (60)")
    parser.add_argument("-o", "--out", help="write the displacement there (needs SimpleITK)")
    args = parser.parse_args(argv)

    # Your arrays: (z, y, x), as SimpleITK's GetArrayFromImage gives them, on one grid; spacing in the same order, mm.
    thorax = phantom.thorax(args.size)
    fixed, moving = thorax.fixed[0, 0].numpy(), thorax.moving[0, 0].numpy()
    lungs, spacing = thorax.fixed_labels[0, 0].numpy() > 0, thorax.spacing

    # What counts: the lungs. Without a mask, everything.
    result = fastreg.register(
        tensor(fixed),
        tensor(moving),
        spacing=spacing,
        mask=tensor(lungs),
        iterations=args.iterations,
    )

    # Points of the fixed scan, in voxels, go where the displacement says.
    points = fastreg.metrics.move_points(thorax.fixed_landmarks, result.displacement)
    before = fastreg.metrics.tre(thorax.fixed_landmarks, thorax.moving_landmarks, spacing).mean
    after = fastreg.metrics.tre(points, thorax.moving_landmarks, spacing).mean
    folded = fastreg.metrics.folding(result.displacement)
    print(f"landmarks {before:.2f} mm -> {after:.2f} mm apart, {folded:.2%} of the voxels folded")

    # What belongs to the moving scan comes along: labels keep their dtype, and are not mixed.
    labels = fastreg.warp(thorax.moving_labels, result.displacement, mode="nearest")
    dice = fastreg.metrics.dice(thorax.fixed_labels, labels)
    print(f"Dice of the lungs {dice.mean:.3f}")
    if args.out:
        write_itk(args.out, result.displacement, spacing)
        print(
            f"{args.out}: SimpleITK.ReadImage(path, SimpleITK.sitkVectorFloat64), then DisplacementFieldTransform"
        )


if __name__ == "__main__":
    main()
