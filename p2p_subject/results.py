"""What an edit returns, and how it is put together from latents and attention maps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from p2p_subject.edits import Blend, EditSpec
from p2p_subject.images import INSIDE, Frame, load_mask
from p2p_subject.outputs import feather, paste_back, restore
from p2p_subject.prompts import Plan
from p2p_subject.sampling import EditRun, Target
from p2p_subject.source import Source
from p2p_subject.visible import heat_maps, pixel_mask, to_gray


@dataclass(frozen=True, eq=False)
class EditResult:
    """An edit. Pictures have the size of the source picture.

    `image` is the edited picture (None with output_type="latent"); `mask` what was edited (mode "L", 0 or 255; None for a
    global edit; up to one latent pixel around it, pixels fade into the original); `maps` a heat map (mode "L") for each word
    that made the mask; `source_image` the picture edited; `latents` (1, C, h, w) float32; `prompt` that of the target;
    `unet_rows` the rows that all U-Net calls of the edit had.
    """

    image: Image.Image | None
    mask: Image.Image | None
    maps: dict[str, Image.Image]
    source_image: Image.Image
    latents: Tensor
    prompt: str
    unet_rows: int
    spec: EditSpec = field(repr=False)


def result_of(
    k: int,
    run: EditRun,
    source: Source,
    spec: EditSpec,
    plan: Plan,
    latents: Tensor,
    image: Image.Image | None,
    scale_factor: int,
    paste: bool,
) -> EditResult:
    """The result of edit `k` of a run; `latents` (1, C, h, w) and `image`, if decoded, at the model's size."""
    source_maps, target_maps = (maps.cpu() for maps in run.seen(k))
    pixels = _pixels(run.targets[k], spec, source, source_maps, target_maps, pixels_a_latent(source.frame, scale_factor))
    if image is not None:
        image = restore(image, source.frame)
        if paste and pixels is not None:
            image = paste_back(source.image, image, feather(pixels, *rim(spec.blend, source.frame, scale_factor)))
    return EditResult(
        image=image,
        mask=None if pixels is None else to_gray(pixels),
        maps=heat_maps(source_maps, target_maps, plan, source.image.size),
        source_image=source.image,
        latents=latents,
        prompt=plan.layout.prompt,
        unet_rows=sum(run.calls),
        spec=spec,
    )


def pixels_a_latent(frame: Frame, scale_factor: int) -> float:
    """Pixels of the picture a side of one latent pixel."""
    return scale_factor * max(frame.original_size) / max(frame.model_size)


def rim(blend: Blend, frame: Frame, scale_factor: int) -> tuple[int, float]:
    """By how many pixels of the picture an edit is wider than its mask, and over how many more it fades into the original."""
    half = pixels_a_latent(frame, scale_factor) / 2
    return (round(half), half) if blend.feather is None else (0, blend.feather)


def _pixels(
    target: Target, spec: EditSpec, source: Source, source_maps: Tensor, target_maps: Tensor, cell: float
) -> np.ndarray | None:
    """The mask at the picture's own size, or None for a global edit."""
    if spec.blend is None:
        return None
    if spec.blend.mask is not None:
        return (load_mask(spec.blend.mask, source.image.size) >= INSIDE).astype(np.float32)
    return pixel_mask(target, source_maps, target_maps, source.frame, cell)
