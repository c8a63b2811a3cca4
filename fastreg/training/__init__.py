"""Training of nets: one step (Training), a run with its folder (Run), both from what a command line says (Settings).

from fastreg import models, training

with training.processes() as device:  # one, or torchrun's
    run = training.Run("runs/mine", models.VoxelMorph().to(device), pairs, validation=others)
    run.train()  # goes on where runs/mine ended
"""

from fastreg.data.sample import Sample
from fastreg.models.recipe import Recipe

from .build import PAPER, RECIPES, Net
from .distributed import processes, ranks
from .run import Run
from .settings import Settings
from .step import NotFinite, Training
from .validation import Validation

__all__ = [
    "PAPER",
    "RECIPES",
    "Net",
    "NotFinite",
    "Recipe",
    "Run",
    "Sample",
    "Settings",
    "Training",
    "Validation",
    "processes",
    "ranks",
]
