from fastreg.ops.affine_displacement import affine_displacement
from fastreg.ops.bending_energy import bending_energy
from fastreg.ops.bspline_displacement import bspline_displacement
from fastreg.ops.compose import compose
from fastreg.ops.cost_volume import cost_volume
from fastreg.ops.diffusion import diffusion
from fastreg.ops.gaussian_displacement import gaussian_displacement
from fastreg.ops.integrate_gradients import integrate_gradients
from fastreg.ops.integrate_velocity import integrate_velocity
from fastreg.ops.invert_displacement import invert_displacement
from fastreg.ops.jacobian_determinant import jacobian_determinant
from fastreg.ops.lcc_loss import lcc_loss
from fastreg.ops.local_correlation import local_correlation
from fastreg.ops.mi_loss import mi_loss
from fastreg.ops.mind import mind
from fastreg.ops.mind_loss import mind_loss
from fastreg.ops.mse_loss import mse_loss
from fastreg.ops.resize_displacement import resize_displacement
from fastreg.ops.smooth import smooth
from fastreg.ops.total_variation import total_variation
from fastreg.ops.warp import warp
from fastreg.ops.warp_coarse import warp_coarse

__all__ = [
    "affine_displacement",
    "bending_energy",
    "bspline_displacement",
    "compose",
    "cost_volume",
    "diffusion",
    "gaussian_displacement",
    "integrate_gradients",
    "integrate_velocity",
    "invert_displacement",
    "jacobian_determinant",
    "lcc_loss",
    "local_correlation",
    "mi_loss",
    "mind",
    "mind_loss",
    "mse_loss",
    "resize_displacement",
    "smooth",
    "total_variation",
    "warp",
    "warp_coarse",
]
