"""What the models share: the interface, padding to the sizes a net can halve, checkpointing, losses by name."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastreg import ops
from fastreg._refusals import refuse
from fastreg._repr import shapes
from fastreg.ops.warp import PADDINGS

from .recipe import PaperInput, Recipe

if TYPE_CHECKING:
    from typing_extensions import Self

CHECKPOINTS = ("none", "blocks")

# Each minimised; what a model's `similarity` may name.
SIMILARITIES: dict[str, Callable[..., torch.Tensor]] = {
    "lcc": ops.lcc_loss,
    "mi": ops.mi_loss,
    "mind": ops.mind_loss,
    "mse": ops.mse_loss,
}


class Prediction(NamedTuple):
    """What a model says of a pair: a named tuple, which DataParallel, torch.export and pytrees take apart and build again.

    displacement (Tensor): (N, nd, *spatial), voxels of the images' grid; all of the motion. fp32, also under autocast
        (fp64 of an fp64 model).
    fields (sequence of Tensor): what led there, coarse to fine; each model's docstring says what.
    affine (Tensor or None): (N, nd, nd + 1), voxels: the affine part of the motion.
    parameters (Tensor or None): the few numbers that make the motion, where there are (R2N2).
    """

    displacement: torch.Tensor
    fields: Sequence[torch.Tensor] = ()
    affine: torch.Tensor | None = None
    parameters: torch.Tensor | None = None

    def __repr__(self) -> str:
        return shapes(self)

    def sample(self, k: int) -> "Prediction":
        """That of the k-th pair of the batch alone."""

        def one(t: Any) -> Any:
            return None if t is None else t[k : k + 1]

        fields = [one(f) for f in self.fields]
        return Prediction(one(self.displacement), fields, one(self.affine), one(self.parameters))


class Model(nn.Module):
    """A registration network.

    ``model(fixed, moving) -> Prediction``; ``model.loss(fixed, moving, prediction)`` is the paper's loss, a scalar;
    ``model.terms(...)`` its weighted terms by name. Images are (N, 1, D, H, W) or, where the model is 2D, (N, 1, H, W), of
    the dtype of the weights (halves under autocast), intensities in [0, 1] but where a model says otherwise. Sizes that the
    net cannot halve are padded with zeros at the end of each axis, and the result is cropped. Flow heads and
    displacements are fp32 under autocast.

    ``model(fixed, moving, fixed_features=model.encode_fixed(fixed))`` reads a fixed image's features, which later calls with
    other moving images (and the same batch size) can share; RRN, R2N2 and PRDFE have that.

    A subclass has `ndims` and `divisor`, `recipe` (how the paper trains it), `paper_input` (on what) and, where it is not
    percentiles, `default_intensity` (see Preprocessing), names its presets' arguments ("paper" has none), and implements
    `predict` and `terms`. `size_bound`: what it says is in units of the image's extent, so that a trained one is not for images of
    another; others answer in voxels, at any size.
    Arguments that each takes: `checkpoint`: "blocks" recomputes blocks in the backward pass instead of keeping what is
    inside; `padding`: what a warp reads outside of an image.
    """

    ndims: tuple[int, ...] = (3,)
    divisor = 16
    ndim = 3
    checkpoint = "none"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    arguments: dict[str, Any]
    recipe = Recipe()
    paper_input: PaperInput | None = None
    default_intensity = "percentiles"
    size_bound = False
    similarity: str
    similarity_options: dict[str, Any]

    def __init_subclass__(cls, **presets: dict[str, Any]) -> None:
        super().__init_subclass__()
        cls.presets = {"paper": {}, **presets}

    def __new__(cls, *args: Any, **options: Any) -> "Self":
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **options)
        except TypeError as error:
            cls.fail(TypeError, f"{error}; presets: {cls.__name__}.from_preset of {tuple(cls.presets)}")
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        # What a checkpoint has to carry to build the model again.
        object.__setattr__(self, "arguments", arguments)
        for name, allowed in (("checkpoint", CHECKPOINTS), ("ndim", cls.ndims), ("padding", PADDINGS)):
            cls.choice(name, arguments.get(name, allowed[0]), allowed)
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        """Copies and unpickled models pass __new__ with the arguments they were built with."""
        return (), self.arguments

    @classmethod
    def from_preset(cls, name: str = "paper", **options: Any) -> "Self":
        """The model as the paper has it ("paper") or as its authors released it ("released"), where there is one."""
        cls.choice("preset", name, cls.presets)
        return cls(**{**cls.presets[name], **options})

    @classmethod
    def fail(cls, kind: type[ValueError] | type[TypeError], text: str) -> NoReturn:
        refuse(kind, "fastreg.models.", f"{cls.__name__}: {text}")

    @classmethod
    def choice(cls, name: str, value: Any, allowed: Collection[Any]) -> None:
        if value not in allowed:
            cls.fail(ValueError, f"{name} must be one of {tuple(allowed)}, got {value!r}")

    @classmethod
    def mind_options(cls, mind: dict[str, Any] | None, default: Mapping[str, Any]) -> dict[str, Any]:
        """A dict of options of fastreg.mind_loss, or `default` for None."""
        known = inspect.signature(ops.mind_loss).parameters.keys() - {"fixed", "moved", "mask", "reduction"}
        if not (mind is None or (isinstance(mind, dict) and mind.keys() <= known)):
            cls.fail(TypeError, f"mind must be a dict of {', '.join(sorted(known))}, got {mind!r}")
        return dict(default if mind is None else mind)

    def compare_by(self, similarity: str, window: int, mind: dict[str, Any] | None) -> None:
        """What `compared` is: one of SIMILARITIES; window of "lcc", options of "mind"."""
        self.choice("similarity", similarity, SIMILARITIES)
        if mind is not None and similarity != "mind":
            self.fail(ValueError, f'mind is for similarity="mind", got similarity={similarity!r}')
        if window < 1 or window % 2 == 0:
            self.fail(ValueError, f"window must be odd, got {window}")
        options = {"lcc": {"window": window}, "mind": self.mind_options(mind, {})}
        self.similarity, self.similarity_options = similarity, options.get(similarity, {})

    def compared(
        self, fixed: torch.Tensor, moved: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The similarity of `compare_by`, a scalar to be minimised."""
        return SIMILARITIES[self.similarity](fixed, moved, mask=mask, **self.similarity_options)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor, *, fixed_features: Any = None) -> Prediction:
        """Prediction of the motion from fixed to moving.

        Args: fixed, moving (Tensor): see the class, of one shape. fixed_features: what encode_fixed(fixed) returned.
        Raises: TypeError, ValueError.
        """
        self._check(fixed, moving)
        crop: Any = (..., *(slice(n) for n in fixed.shape[2:]))
        padded = [self._padded(t) for t in (fixed, moving)]
        if self._encode is None and fixed_features is not None:
            self.fail(TypeError, "takes no fixed_features")
        if self._encode is not None:
            padded.append(self._encode(padded[0]) if fixed_features is None else fixed_features)
        prediction = self.predict(*padded)
        if padded[0].shape != fixed.shape:
            prediction = prediction._replace(displacement=prediction.displacement[crop])
        return prediction

    _encode: Callable[[torch.Tensor], Any] | None = None

    def encode_fixed(self, fixed: torch.Tensor) -> Any:
        """What the net makes of the fixed image alone, for ``fixed_features``. TypeError for a model that has no such part."""
        self._check(fixed, fixed)
        if self._encode is None:
            self.fail(TypeError, "has no features of the fixed image alone")
        return self._encode(self._padded(fixed))

    def predict(self, fixed: torch.Tensor, moving: torch.Tensor, *features: Any) -> Prediction:
        """The prediction for images of sizes that the net can halve (and the features of the fixed one, where it has)."""
        raise NotImplementedError

    def terms(
        self,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        prediction: Prediction,
        mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of the loss by name, scalars; their sum is `loss`. mask: see `loss`."""
        raise NotImplementedError

    def _padded(self, image: torch.Tensor) -> torch.Tensor:
        """With zeros at the end of each axis, up to the next size that the net can halve."""
        d = self.divisor
        missing = [(n + d - 1) // d * d - n for n in image.shape[2:]]
        return F.pad(image, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else image

    def _check(self, fixed: torch.Tensor, moving: torch.Tensor) -> None:
        weights = next(self.parameters())
        for name, image in (("fixed", fixed), ("moving", moving)):
            if not isinstance(image, torch.Tensor):
                self.fail(TypeError, f"{name} must be a tensor, got {type(image).__name__}")
            if image.dtype != weights.dtype and not (
                image.is_floating_point() and torch.is_autocast_enabled(image.device.type)
            ):
                self.fail(
                    TypeError,
                    f"{name} must have the dtype of the weights, {weights.dtype} (or a half one, under autocast), got {image.dtype}",
                )
            if image.ndim != self.ndim + 2 or image.shape[1] != 1 or image.numel() == 0:
                shape = "(N, 1, D, H, W)" if self.ndim == 3 else "(N, 1, H, W)"
                self.fail(
                    ValueError, f"{name} must have shape {shape} and not be empty, got {tuple(image.shape)}"
                )
        if fixed.shape != moving.shape:
            self.fail(
                ValueError,
                f"moving must have the shape of fixed, {tuple(fixed.shape)}, got {tuple(moving.shape)}",
            )
        for name, image in (("fixed", fixed), ("moving", moving)):
            if image.device != weights.device:
                self.fail(
                    ValueError,
                    f"{name} must be on the device of the weights, {weights.device}, got {image.device}",
                )

    def loss(
        self,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        prediction: Prediction,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The paper's loss of a prediction: a scalar with gradient.

        mask (Tensor or None): (N, 1, *spatial), 0 or more: weights of the similarity (of the fixed image's voxels).
        Value and gradient a voxel do not depend on the size of the images, but where a model says otherwise.
        """
        total: Any = sum(self.terms(fixed, moving, prediction, mask).values())
        return total

    def block(self, function: Callable[..., Any], *tensors: Any) -> Any:
        """function(*tensors), recomputed in the backward pass under checkpoint="blocks"."""
        if self.checkpoint == "blocks" and torch.is_grad_enabled():
            return checkpoint(function, *tensors, use_reentrant=False)
        return function(*tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
