"""Masks and heat maps at the size of the picture: what a user sees of the attention maps."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p_subject.blend import RULES, region
from p2p_subject.images import INSIDE, Frame
from p2p_subject.outputs import dilate
from p2p_subject.prompts import Columns, Plan
from p2p_subject.sampling import Target, edit_mask

SUBJECT, TARGET = " (subject)", " (target)"
"""What a key of `heat_maps` ends with where the source's prompt has the same word."""

HEAT = RULES["heat"]

_NUMBER = re.compile(r"#\d+$")


def latent_mask(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Bring a user's mask (H, W) to latents of `size` (h, w): 1 where any part of the latent pixel may change."""
    return (F.adaptive_max_pool2d(torch.from_numpy(mask)[None, None], size)[0, 0] >= INSIDE).float()


def pixel_mask(target: Target, source_maps: Tensor, target_maps: Tensor, frame: Frame, cell: float) -> np.ndarray | None:
    """The edit's mask at the picture's own size, (H, W) float32 of 0 and 1, or None where no words make one.

    Mean maps (T, h, w) of source and target; `cell`: pixels of the picture a side of one latent pixel. The scores are enlarged
    before they are thresholded, so the outline is finer than the maps; a square that is open to the last step is part of it.
    """
    width, height = frame.original_size
    mask = edit_mask(target, source_maps, target_maps, (height, width), 0, open_square=target.room == 1)
    return None if mask is None else dilate(mask.numpy(), round(target.grow * cell))


def heat_maps(source_maps: Tensor, target_maps: Tensor, plan: Plan, size: tuple[int, int]) -> dict[str, Image.Image]:
    """Heat maps of the edited words at `size` (width, height), each over its maximum; those of the source's prompt first.

    The key is the word. Several places of one word in one prompt are "cat#0", "cat#1" in reading order. A word that is edited
    in both prompts is the source's; the target's is "dog (subject)" where it is the inserted subject, else "dog (target)".
    """
    width, height = size
    keyed = [(key, source_maps, columns) for key, columns in _distinct(plan.source_words.labels)]
    taken = {word for word, _ in plan.source_words.labels}
    for key, columns in _distinct(plan.target_words.labels):
        suffix = SUBJECT if set(plan.layout.subject) & set(columns) else TARGET
        keyed.append((key + suffix if _NUMBER.sub("", key) in taken else key, target_maps, columns))
    return {key: to_gray(region(own, columns, (), HEAT, (height, width)).numpy()) for key, own, columns in keyed}


def _distinct(labels: tuple[tuple[str, Columns], ...]) -> Iterator[tuple[str, Columns]]:
    """Labels of one prompt without repetitions, numbered where one word has several places."""
    places: dict[str, set[Columns]] = {}
    for word, columns in labels:
        places.setdefault(word, set()).add(columns)
    for word, columns in dict.fromkeys(labels):
        yield (f"{word}#{sorted(places[word]).index(columns)}" if len(places[word]) > 1 else word), columns


def of_target(key: str, source_words: Container[str]) -> bool:
    """Whether a key of `heat_maps` is of the target's prompt, the edited words of the source's being `source_words`."""
    return key.endswith((SUBJECT, TARGET)) or _NUMBER.sub("", key) not in source_words


def to_gray(values: np.ndarray) -> Image.Image:
    """(H, W) floats in [0, 1] to a picture of mode "L"."""
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
