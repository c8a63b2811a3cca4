from fastreg.ops.lcc_loss import lcc_loss
from fastreg.ops.warp import warp

__all__ = ["lcc_loss", "warp"]
