"""fastreg: fused kernels for deformable image registration, as PyTorch ops with gradients.

Conventions: images (N, C, D, H, W) or (N, C, H, W); displacements (N, nd, *spatial) in voxels, channels in axis order
(z, y, x); ``out(p) = image(p + u(p))`` with voxel centres on integers.
"""

import gc as _gc

# torch's import makes a million objects, and all of them stay: to look for garbage among them takes 0.2 s.
_collects = _gc.isenabled()
_gc.disable()
try:
    from fastreg import _ext, metrics, models, nn
    from fastreg import _tree as _tree_ops  # noqa: F401
    from fastreg import io as _io  # noqa: F401
    from fastreg._ext import backends
    from fastreg._version import __version__
    from fastreg.ops import *  # noqa: F403
    from fastreg.ops import __all__ as _ops
    from fastreg.registration import Registration, register

    # Last, when all schemas are declared, those of fastreg.io and _tree too: an extension that has others is found out here.
    _ext.load()
finally:
    if _collects:
        _gc.enable()


__all__ = ["Registration", "__version__", "backends", "metrics", "models", "nn", "register", *_ops]
