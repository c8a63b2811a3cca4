"""Which files of a folder, or of the list that comes with a data set, belong together."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastreg._files import InputError
from fastreg.io._reading import Warn

IMAGES = (
    ".nii",
    ".nii.gz",
    ".mha",
    ".mhd",
    ".nrrd",
    ".png",
    ".tif",
    ".tiff",
    ".jpg",
    ".dcm",
    ".hdr",
    ".mgz",
    ".mgh",
)
POINTS = (".csv", ".tsv", ".fcsv", ".mrk.json", ".json", ".txt", ".pts")
# Folders beside `images` or `imagesTr`, whose ending they share, by what they hold.
KINDS = {"labels": ("labels",), "landmarks": ("landmarks", "keypoints"), "mask": ("masks",)}
# What names of images, labels and landmarks have beside the name of a case: at their end, at their beginning.
_LABEL = r"(segmentation|segm|seg|dseg|labelmap|labels?|lab|masks?|gt)"  # longer ones first
_POINT = r"(landmarks?|keypoints?|points?|fiducials?|lm|kp)"
_IMAGE = r"(0000|t1w?|t2w?|flair|ct|cbct|mri?|image|img|scan|volume|vol)"
DECORATED = {
    "images": (rf"[_.-]{_IMAGE}$", r"^(img|image|volume|vol|scan)[_-]?(?=.)"),
    "labels": (rf"[_.-]{_LABEL}$", rf"^{_LABEL}[_-]?(?=.)"),
    "mask": (rf"[_.-]{_LABEL}$", rf"^{_LABEL}[_-]?(?=.)"),
    "landmarks": (rf"[_.-]{_POINT}$", rf"^{_POINT}[_-]?(?=.)"),
}
_ENTITY = re.compile(r"_(desc|label|atlas|seg)-[^_]+")  # BIDS, of derivatives only


def stem(path: Path) -> str:
    """The name without the extension of an image or of points."""
    name = path.name
    known = sorted((*IMAGES, *POINTS), key=len, reverse=True)
    suffix = next((s for s in known if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def _names(path: Path, kind: str) -> list[str]:
    """What a file may call its case: its stem, without what decorates it, and without that of its image."""
    names = [stem(path)]
    for ornaments in (DECORATED[kind], DECORATED["images"]):
        for pattern in ornaments:
            for name in list(names):
                plain = re.sub(pattern, "", name, flags=re.I)
                if kind != "images":
                    plain = _ENTITY.sub("", plain)
                if plain and plain not in names:
                    names.append(plain)
    return names


def _some(files: Sequence[Path]) -> str:
    return ", ".join(f.name for f in files[:3]) + (", ..." if len(files) > 3 else "")


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(
        f for f in folder.iterdir() if f.name.lower().endswith(suffixes) and not f.name.startswith(".")
    )


def belonging(images: Sequence[Path], files: Sequence[Path], kind: str, where: Path) -> dict[Path, Path]:
    """The file of each image that has one: that from whose names least has to be taken off until they are one. InputError for two
    that are equally close.
    """
    by_name: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        for n, name in enumerate(_names(file, kind)):
            by_name.setdefault(name, []).append((n, file))
    chosen: dict[Path, tuple[int, Path]] = {}
    for image in images:
        ours = enumerate(_names(image, "images"))
        close = [(k + n, file) for k, name in ours for n, file in by_name.get(name, ())]
        best = sorted({file for n, file in close if n == min(close)[0]})
        if len(best) > 1:
            raise InputError(f"{where}: {_some(best)} may all belong to {image.name}; name one as the image")
        if best:
            chosen[image] = min(close)
    for file in {f for _, f in chosen.values()}:
        claims = sorted((c, image) for image, (c, f) in chosen.items() if f == file)
        if len(claims) > 1 and claims[0][0] == claims[1][0]:
            both = [image for c, image in claims if c == claims[0][0]]
            raise InputError(f"{where}: {file.name} may belong to {_some(both)}; name it as one of them")
        for _, image in claims[1:]:
            del chosen[image]
    return {image: file for image, (_, file) in chosen.items()}


def _beside(images: Sequence[Path], folder: Path, kind: str, warn: Warn) -> dict[Path, Path]:
    """The file in a folder of each image; says whose are missing, and InputError where the folder is of no use at all."""
    suffixes = POINTS if kind == "landmarks" else IMAGES
    files = _files(folder, suffixes)
    found = belonging(images, files, kind, folder)
    there = files or _files(folder, ("",))
    if not found:
        if not there:
            warn(f"{folder}: is empty")
            return {}
        raise InputError(
            f"{folder}: none of its {len(there)} files ({_some(there)}) is named as one of the images ({_some(images)})"
        )
    without = [image for image in images if image not in found]
    spare = [file for file in files if file not in found.values()]
    if without or spare:
        parts = [f"nothing for {len(without)} of {len(images)} images ({_some(without)})"] if without else []
        parts += [f"{_some(spare)} of no image"] if spare else []
        warn(f"{folder}: {', and '.join(parts)}")
    return found


def _flat(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    """(images, their labels) of a folder that holds both: labels are files that are named as an image and end as labels do."""
    files = _files(folder, IMAGES)
    ends = re.compile(DECORATED["labels"][0], re.I)
    labels = [f for f in files if ends.search(stem(f))]
    images = [f for f in files if f not in labels]
    found = belonging(images, labels, "labels", folder)
    return sorted({*images, *(f for f in labels if f not in found.values())}), found


def _group(task: str) -> Callable[[Path], str]:
    return (lambda f: re.sub(r"_[^_]*$", "", stem(f))) if task == "intra" else lambda f: ""


def _of_series(
    where: Path, images: Sequence[Path], fixed_of: Callable[[Sequence[Path]], int]
) -> Iterator[tuple[Path, Path]]:
    """(the fixed image, another one) of each series: names that agree but for the number at their end, or what follows the last _."""
    series: dict[str, list[Path]] = {}
    for image in images:
        name = re.sub(r"[_.-]?\d+$|_[^_]*$", "", stem(image), count=1)
        series.setdefault(name, []).append(image)
    alone = [some[0] for some in series.values() if len(some) == 1]
    if alone:
        raise InputError(f"{where}: a series takes at least two images, got one: {_some(alone)}")
    for some in series.values():
        fixed = some[fixed_of(some)]
        yield from ((fixed, image) for image in some if image != fixed)


def _paired(
    where: Path,
    images: Sequence[Path],
    extras: Mapping[str, Mapping[Path, Path]],
    task: str,
    fixed_of: Callable[[Sequence[Path]], int],
) -> list[dict[str, str]]:
    """The pairs of a task, as fields of Pair."""
    if task == "one-shot":
        if len(images) != 2:
            raise InputError(f"{where}: one-shot takes two images, got {len(images)}")
        both = [(images[0], images[1])]
    elif task == "series":
        both = list(_of_series(where, images, fixed_of))
    else:
        group = _group(task)
        both = [(a, b) for a in images for b in images if a != b and group(a) == group(b)]
    if not both:
        raise InputError(f"{where}: no two images have names that agree up to the last '_', as intra wants")
    return [_pair(a, b, extras) for a, b in both]


def _pair(fixed: Path, moving: Path, extras: Mapping[str, Mapping[Path, Path]]) -> dict[str, str]:
    files = {"fixed": str(fixed), "moving": str(moving)}
    for kind, of in extras.items():
        if kind == "mask":
            files |= {
                name: str(of[image])
                for name, image in (("mask", fixed), ("moving_mask", moving))
                if image in of
            }
        elif fixed in of and moving in of:
            files |= {f"fixed_{kind}": str(of[fixed]), f"moving_{kind}": str(of[moving])}
    return files


def of_folder(
    path: Path, task: str, warn: Warn, fixed_of: Callable[[Sequence[Path]], int]
) -> list[dict[str, str]]:
    """What find_pairs says of folders: fields of Pair. fixed_of: which image of a series is the fixed one."""
    ending = next((e for e in ("", "Tr") if (path / f"images{e}").is_dir()), None)
    folder = path if ending is None else path / f"images{ending}"
    extras: dict[str, Mapping[Path, Path]] = {}
    if ending is None:
        images, extras["labels"] = _flat(folder)
    else:
        images = _files(folder, IMAGES)
    if len(images) < 2:
        raise InputError(f"{folder}: must hold at least two images, got {len(images)}")
    for kind, names in KINDS.items() if ending is not None else ():
        folders = [path / f"{name}{ending}" for name in names if (path / f"{name}{ending}").is_dir()]
        if folders:
            extras[kind] = _beside(images, folders[0], kind, warn)
    return _paired(folder, images, extras, task, fixed_of)


def of_dataset(
    path: Path, task: str, validation: bool, fixed_of: Callable[[Sequence[Path]], int]
) -> list[dict[str, str]]:
    """What find_pairs says of a data set's list (JSON): fields of Pair. fixed_of: as for of_folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a data set's list, an object")

    def files(name: str, keys: tuple[str, ...]) -> list[dict[str, Path]]:
        entries = content.get(name) or []
        if not isinstance(entries, list):
            raise InputError(f"{path}: {name} must be a list, got {type(entries).__name__}")
        out = []
        for n, entry in enumerate(entries, 1):
            entry = {keys[0]: entry} if isinstance(entry, str) else entry
            if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys)):
                raise InputError(f"{path}: entry {n} of {name} must name {' and '.join(keys)}")
            out.append({k: path.parent / v for k, v in entry.items() if isinstance(v, str)})
        return out

    known = files("training", ("image",))
    extras: dict[str, Any] = {}
    for kind, names in (
        ("labels", ("label", "labels")),
        ("landmarks", ("landmarks", "keypoints")),
        ("mask", ("mask",)),
    ):
        extras[kind] = {e["image"]: e[n] for n in reversed(names) for e in known if n in e}
    held = files("registration_val", ("fixed", "moving"))
    listed = (
        held
        if validation
        else [p for p in files("training_paired_images", ("fixed", "moving")) if p not in held]
    )
    if listed:
        return [_pair(p["fixed"], p["moving"], extras) for p in listed]
    if validation or not known:
        wanted = "registration_val" if validation else "training_paired_images or training"
        raise InputError(f"{path}: lists no pairs ({wanted})")
    return _paired(path, [e["image"] for e in known], extras, task, fixed_of)
