"""Triton kernels, one file per op, imported as ``fastreg.kernels``. None exist yet: GPU tensors take the reference."""
