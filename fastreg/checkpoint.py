"""Where it was: fastreg.training.checkpoint is its place."""

from fastreg.training.checkpoint import FORMAT, KEYS, build, load, preprocessing, save

__all__ = ["FORMAT", "KEYS", "build", "load", "preprocessing", "save"]
