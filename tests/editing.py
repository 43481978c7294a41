"""What the tests of the editor share: its pictures, its swap, and what fails where a network runs."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from p2p_subject import Editor, EditSpec, edits

STEPS = 4


def swap_subject(word, subject, **changes) -> EditSpec:
    """A swap that follows the source in one step at least: of four, the windows of the default hold none."""
    return edits.swap_subject(word, subject, **{"cross_replace": 0.4, "self_replace": 0.4, **changes})


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth noise of any size."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def same(a, b) -> bool:
    return torch.equal(a.latents, b.latents) and np.array_equal(a.image, b.image)


def forbid_networks(editor: Editor, monkeypatch) -> None:
    """Fail the test if the U-Net or the image encoder runs: bad input has to be refused before."""

    def forward(*_, **__):
        raise AssertionError("a network ran")

    monkeypatch.setattr(editor.model.unet, "forward", forward)
    monkeypatch.setattr(editor.model.pipeline.vae, "encode", forward)
