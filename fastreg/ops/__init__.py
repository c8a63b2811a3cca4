from fastreg.ops.displacement import resize_displacement, smooth
from fastreg.ops.lcc_loss import lcc_loss
from fastreg.ops.regularizers import diffusion
from fastreg.ops.warp import warp

__all__ = ["diffusion", "lcc_loss", "resize_displacement", "smooth", "warp"]
