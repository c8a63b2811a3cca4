"""Trained models in files: written in one go or not at all, read without running what they hold."""

import io as _io
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from fastreg import models
from fastreg._files import InputError, Name, require_regular, write_bytes
from fastreg._version import __version__
from fastreg.data.preprocessing import Preprocessing

from . import schema
from .build import suits

FORMAT = "fastreg checkpoint 1"
KEYS = ("method", "preset", "arguments", "preprocessing", "weights")


def save(path: Name, content: Mapping[str, Any]) -> None:
    """Writes a dict with at least KEYS; until it is all on disk the file that was there stays. OSError says why it failed."""
    # In memory first: a write that fails inside of torch.save does not come back as an OSError.
    buffer = _io.BytesIO()
    torch.save({"format": FORMAT, "fastreg": __version__, **content}, buffer)
    try:
        write_bytes(path, buffer.getbuffer())
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot be saved: {error.strerror or error}; the previous one is kept",
            error.filename or str(path),
        ) from error


def load(path: Name) -> dict[str, Any]:
    """The dict that `save` wrote, on the CPU. InputError: none, damaged, or of another program."""
    require_regular(path)
    try:
        with open(path, "rb") as stream:
            stored = _io.BytesIO(stream.read())
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    try:
        # torch.load does not look at the CRC-32 that each part carries: a flipped bit would be another weight.
        with zipfile.ZipFile(stored) as parts:
            broken = parts.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError):
        broken = "all"
    if broken is not None:
        raise InputError(f"{path}: not a checkpoint, or damaged")
    stored.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other programs' files
            content = torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for bytes that are none of its
        raise InputError(f"{path}: not a checkpoint, or damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not set(KEYS) <= set(content):
        raise InputError(f"{path}: not a checkpoint of fastreg train")
    return content


def build(content: Mapping[str, Any], path: Name) -> models.Model:
    """The model of what `load` returned, with its weights. InputError: of another version, or entries that are none."""
    method, arguments = content["method"], content["arguments"]
    if not isinstance(method, str) or method not in models.MODELS:
        raise InputError(f"{path}: a checkpoint of {method!r}, which this version does not have")
    cls, wrong = models.MODELS[method], None
    try:
        odd = [name for name, value in dict(arguments).items() if not suits(cls, name, value)]
        if odd:
            wrong = f"argument {odd[0]}"
        else:
            # Without memory first: widths that no weights have would take all there is.
            with torch.device("meta"):
                empty = cls(**arguments)
            wrong = schema.weights_misfit(content["weights"], empty.state_dict(), finite=True)
            if wrong is None:
                model = cls(**arguments)
                model.load_state_dict(content["weights"])
                return model.eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit {method} of this version") from error
    raise InputError(f"{path}: its weights do not fit {method} of this version ({wrong})")


def preprocessing(content: Mapping[str, Any], path: Name) -> Preprocessing:
    """The Preprocessing of what `load` returned."""
    stored = content["preprocessing"]
    if stored is None:
        raise InputError(
            f"{path}: was trained on samples of a script's own, and does not say how they are made"
        )
    wrong = schema.misfit(stored, Preprocessing)
    try:
        if wrong is None:
            return Preprocessing(**stored)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its preprocessing is none of this version's: {error}") from error
    raise InputError(f"{path}: its preprocessing is none of this version's ({wrong})")
