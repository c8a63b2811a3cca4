from fastreg.ops.warp import warp

__all__ = ["warp"]
