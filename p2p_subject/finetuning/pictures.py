"""The pictures of a subject and where in them it is, as users give them and as latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p_subject import checks
from p2p_subject.errors import ArgumentError, ImageError, MaskError
from p2p_subject.images import INSIDE, fit, load_alpha, load_image, load_mask
from p2p_subject.models import Model
from p2p_subject.outputs import IMAGE_FORMATS

Contexts = Callable[[Sequence[str]], Tensor]
"""`contexts(prompts of B rows) -> (B, L, D)`: what the U-Net is told of each row."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of the subject (RGB) and where it is, (H, W) float32 in [0, 1] of its size; None: everywhere."""

    image: Image.Image
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A picture as it is learned: `latents` (1, C, h, w) float32, `weight` (1, 1, h, w) of each latent pixel in the loss."""

    latents: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Views:
    """Pictures that are learned alike: what they are called, what the U-Net is told of that, how much they count."""

    views: Sequence[View]
    prompts: Sequence[str]
    contexts: Contexts
    factor: float = 1.0


def read_pictures(given: Any, what: str, masks: Any = None) -> list[Picture]:
    """Read one or more pictures: a folder, or a list of anything that `load_image` reads, with a mask for each or without.

    `masks` is a folder with files of the same names (any suffix of a picture), or a list of anything that `load_mask` reads
    or None. Without, a picture's own transparency is its mask. Raises `ArgumentError`, `ImageError`, `MaskError`.
    """
    sources = _listed(given, what)
    own = [None] * len(sources) if masks is None else _masks(sources, masks)
    return [_picture(source, mask, f"{what}[{at}]") for at, (source, mask) in enumerate(zip(sources, own))]


def _picture(source: Any, mask: Any, name: str) -> Picture:
    image = load_image(source, what=name)
    if mask is not None:
        return Picture(image, load_mask(mask, image.size))
    alpha = load_alpha(source)
    if alpha is not None and alpha.max() < INSIDE:
        raise ImageError(f"{name} is all but transparent; give a picture in which the subject is visible")
    return Picture(image, alpha)


def _listed(given: Any, what: str) -> list[Any]:
    if isinstance(given, str | Path) and Path(given).is_dir():
        sources = files_of(Path(given))
        if not sources:
            raise ArgumentError(f"{what}: the folder {str(given)!r} has no picture; expected {', '.join(IMAGE_FORMATS)} files")
        return sources
    sources = list(given) if isinstance(given, list | tuple) else [given]
    if not sources:
        raise ArgumentError(f"{what}: no pictures; expected one or more, or the folder they are in")
    return sources


def files_of(folder: Path) -> list[Any]:
    """The picture files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_FORMATS and path.name[0] != ".")


def _masks(sources: Sequence[Any], masks: Any) -> list[Any]:
    if isinstance(masks, str | Path) and Path(masks).is_dir():
        by_name = {path.stem: path for path in files_of(Path(masks))}
        names = [Path(source).stem if isinstance(source, str | Path) else None for source in sources]
        missing = [str(source) for source, name in zip(sources, names) if name not in by_name]
        if missing:
            raise MaskError(f"masks: the folder {str(masks)!r} has none for {missing[0]!r}; expected files of the same names")
        return [by_name[name] for name in names]
    own = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(own) != len(sources):
        raise MaskError(f"masks: {len(own)} given for {len(sources)} pictures; expected one for each, None where all counts")
    return own


def split(pictures: list[Picture], validation: Any, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to learn from and held-out ones: `validation` is a share of the pictures, or pictures of its own, or None."""
    if validation is None:
        return pictures, []
    if isinstance(validation, int | float):
        held = max(1, round(validation * len(pictures))) if checks.is_number(validation, 0, 1) and validation > 0 else 0
        if not 0 < held < len(pictures):
            raise ArgumentError(
                f"validation={validation!r} of {len(pictures)} pictures; expected a share above 0 that leaves one to learn from"
            )
        order = np.random.default_rng(seed).permutation(len(pictures))
        return [pictures[at] for at in sorted(order[held:])], [pictures[at] for at in sorted(order[:held])]
    return pictures, read_pictures(validation, "validation")


def encode(model: Model, pictures: Iterable[Picture]) -> list[View]:
    """Latents of pictures, each at about the area that the model was trained on, in its own shape."""
    views = []
    for picture in pictures:
        fitted, _ = fit(picture.image, multiple=model.multiple, area=model.area)
        latents = model.encode_images([fitted])
        weight = torch.ones_like(latents[:, :1])
        if picture.mask is not None:
            # Of the mask as it was given: at the model's size a small one could be gone.
            mask = torch.from_numpy(picture.mask)[None, None]
            weight = F.adaptive_avg_pool2d(mask, latents.shape[-2:]).to(latents)
        views.append(View(latents, weight))
    return views


def digest(pictures: Iterable[Picture]) -> str:
    """Short hash of pictures and masks, to tell whether a run is of the same ones."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(f"{picture.image.size}".encode() + picture.image.tobytes())
        found.update(b"" if picture.mask is None else picture.mask.tobytes())
    return found.hexdigest()[:16]
