"""MONAI's data pipeline feeds a net of fastreg: dictionary transforms, augmentation, workers, batches.

    python examples/train_with_monai.py --steps 20
    python examples/train_with_monai.py --pairs scans/*_fixed.nii.gz

Needs MONAI; --pairs also what it reads files with (nibabel).
"""

import argparse
import itertools

import torch

try:
    from monai import transforms as mt
    from monai.data import CacheDataset, DataLoader
except ImportError as error:
    raise SystemExit('this example needs MONAI: pip install "monai==1.6.1"') from error

from fastreg import models
from fastreg.data import phantom

KEYS = ("fixed", "moving")


def pipeline(size, from_files):
    steps = [
        mt.Resized(KEYS, size),
        mt.ScaleIntensityRanged(KEYS, -1000, 500, 0, 1, clip=True),
        mt.RandFlipd(KEYS, prob=0.5, spatial_axis=-1),  # both alike: what is moved stays what it was
        mt.RandAdjustContrastd("moving", prob=0.5, gamma=(0.8, 1.25)),  # one alone: LCC does not mind
        mt.EnsureTyped(KEYS, track_meta=False),  # plain tensors
    ]
    return mt.Compose([mt.LoadImaged(KEYS, ensure_channel_first=True)] * from_files + steps)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", nargs="+", help="*_fixed.nii.gz, each beside its *_moving.nii.gz (default: phantoms)"
    )
    parser.add_argument(
        "--size", type=int, nargs=3, default=(32, 32, 48), help="voxels, multiples of 16 (32 32 48)"
    )
    parser.add_argument("--steps", type=int, default=20, help="of Adam (20)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load (0)")
    args = parser.parse_args(argv)

    if args.pairs:
        items = [{"fixed": path, "moving": path.replace("_fixed", "_moving")} for path in args.pairs]
    else:
        thoraces = [phantom.thorax(args.size, seed) for seed in range(2)]
        items = [{"fixed": t.fixed[0], "moving": t.moving[0]} for t in thoraces]
    dataset = CacheDataset(items, pipeline(args.size, bool(args.pairs)), progress=False)
    loader = DataLoader(dataset, batch_size=1, shuffle=True, num_workers=args.workers)
    batches = (batch for epoch in itertools.count() for batch in loader)

    # MONAI's arrays are (x, y, z) where fastreg's own reader has (z, y, x). The axes of a displacement are those of its image,
    # so nothing changes, until you write one: that takes fastreg.io, or the order that the file wants.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.VoxelMorph(encoder=(8, 16, 16, 16), decoder=(16,) * 6).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(1, args.steps + 1):
        batch = next(batches)
        fixed, moving = (batch[key].to(device) for key in KEYS)
        loss = model.loss(fixed, moving, model(fixed, moving))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
