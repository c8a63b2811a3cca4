"""The five published methods, and VoxelMorph, on fastreg's ops: `Model` (base.py) is the interface.

model = fastreg.models.RRN.from_preset("paper")
prediction = model(fixed, moving)  # .displacement (N, nd, *spatial) in voxels
model.loss(fixed, moving, prediction).backward()
"""

from .base import Model, Prediction
from .f3rnet import F3RNet
from .lindef import LinDef
from .prdfe import PRDFE
from .r2n2 import R2N2
from .recipe import PaperInput, Recipe
from .rrn import RRN
from .voxelmorph import VoxelMorph

MODELS = {cls.__name__.lower(): cls for cls in (F3RNet, LinDef, PRDFE, R2N2, RRN, VoxelMorph)}

__all__ = [
    "MODELS",
    "Model",
    "PaperInput",
    "Prediction",
    "Recipe",
    *(cls.__name__ for cls in MODELS.values()),
]
