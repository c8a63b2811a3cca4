"""fastreg: fused kernels for deformable image registration, as PyTorch ops with gradients.

Conventions: images (N, C, D, H, W) or (N, C, H, W); displacements (N, nd, *spatial) in voxels, channels in axis order
(z, y, x); ``out(p) = image(p + u(p))`` with voxel centres on integers.
"""

from fastreg import _ext
from fastreg._ext import backends
from fastreg._version import __version__
from fastreg.ops import *  # noqa: F403
from fastreg.ops import __all__ as _ops

_ext.load()

from fastreg import metrics, models, nn  # noqa: E402
from fastreg.registration import Registration, register  # noqa: E402

__all__ = ["Registration", "__version__", "backends", "metrics", "models", "nn", "register", *_ops]
