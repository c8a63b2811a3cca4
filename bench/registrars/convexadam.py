"""ConvexAdam with MIND: its defaults."""

import sys

import itk_field
import numpy as np
import SimpleITK
import torch
from convexAdam.convex_adam_MIND import convex_adam_pt

fixed, moving, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
images = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(f)).astype(np.float32) for f in (fixed, moving)]
found = convex_adam_pt(*map(torch.from_numpy, images), device=torch.device("cpu"))
itk_field.write(f"{out}/field.nii.gz", found, fixed)
