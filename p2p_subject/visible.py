"""Masks and heat maps at the size of the picture: what a user sees of the attention maps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from p2p_subject.blend import RULES, binary_mask, region
from p2p_subject.images import Frame
from p2p_subject.prompts import Plan
from p2p_subject.sampling import Target, scores, threshold_of


def latent_mask(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Bring a user's mask (H, W) to latents of `size` (h, w): 1 where any part of the latent pixel may change."""
    return (F.adaptive_max_pool2d(torch.from_numpy(mask)[None, None], size)[0, 0] > 0.5).float()


def pixel_mask(target: Target, maps: Tensor, frame: Frame, cell: float) -> np.ndarray | None:
    """The edit's mask at the picture's own size, (H, W) float32 of 0 and 1, or None for a global edit.

    `maps` (2, T, h, w): mean maps of source and target; `cell`: pixels of the picture a side of one latent pixel. The scores
    are enlarged before they are thresholded, so the outline is finer than the maps.
    """
    if target.blend is None:
        return None
    width, height = frame.original_size
    found = scores(target, maps[0], maps[1], (height, width))
    return binary_mask(found, threshold_of(target.blend), round(target.blend.grow * cell)).numpy() if found else None


def heat_maps(maps: Tensor, plan: Plan, size: tuple[int, int]) -> dict[str, Image.Image]:
    """Heat maps of the edited words at `size` (width, height), each over its maximum; the target's win where words agree."""
    rule, _ = RULES["peak"]
    width, height = size
    return {
        label: to_gray(region(attention, columns, (), rule, (height, width)).numpy())
        for attention, words in zip(maps, (plan.source_words, plan.target_words))
        for label, columns in words.labels
    }


def to_gray(values: np.ndarray) -> Image.Image:
    """(H, W) floats in [0, 1] to a picture of mode "L"."""
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
