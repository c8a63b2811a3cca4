"""Trained models in files: written in one go or not at all, read without running what they hold."""

import io as _io
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from fastreg import models
from fastreg._files import InputError, Name, replacing
from fastreg._version import __version__
from fastreg.data.preprocessing import Preprocessing

FORMAT = "fastreg checkpoint 1"
KEYS = ("method", "preset", "arguments", "preprocessing", "weights")


def save(path: Name, content: Mapping[str, Any]) -> None:
    """Writes a dict with at least KEYS; until it is all on disk the file that was there stays. OSError says why it failed."""
    # In memory first: a write that fails inside of torch.save does not come back as an OSError.
    buffer = _io.BytesIO()
    torch.save({"format": FORMAT, "fastreg": __version__, **content}, buffer)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(
            error.errno, f"cannot be saved: {error.strerror or error}; the previous one is kept", str(path)
        ) from error


def load(path: Name) -> dict[str, Any]:
    """The dict that `save` wrote, on the CPU. InputError: none, damaged, or of another program."""
    try:
        with open(path, "rb") as stream:
            stored = _io.BytesIO(stream.read())
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
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
    """The model of what `load` returned, with its weights."""
    method = content["method"]
    if not isinstance(method, str) or method not in models.MODELS:
        raise InputError(f"{path}: a checkpoint of {method!r}, which this version does not have")
    try:
        model = models.MODELS[method](**content["arguments"])
        model.load_state_dict(content["weights"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit {method} of this version") from error
    return model.eval()


def preprocessing(content: Mapping[str, Any], path: Name) -> Preprocessing:
    """The Preprocessing of what `load` returned."""
    if content["preprocessing"] is None:
        raise InputError(
            f"{path}: was trained on samples of a script's own, and does not say how they are made"
        )
    try:
        return Preprocessing(**content["preprocessing"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its preprocessing is none of this version's") from error
