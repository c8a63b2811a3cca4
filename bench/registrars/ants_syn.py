"""antspyx: SyN after its affine, mutual information, the iterations it comes with; seeded, which is on one thread."""

import shutil
import sys

import ants

fixed, moving, out, _ = sys.argv[1:]
# A random_seed that registration is given it drops.
ants.config.set_ants_deterministic(True, 1)
found = ants.registration(ants.image_read(fixed), ants.image_read(moving), "SyN", outprefix=f"{out}/syn")
for path, name in zip(found["fwdtransforms"], ("warp.nii.gz", "affine.mat"), strict=True):
    shutil.move(path, f"{out}/{name}")
