"""The two pictures of prompted context generation (Li et al. 2023, section 3.2): what the encoder sees, what is to be drawn.

The encoder sees the cut-out subject, scaled, mirrored and placed at random, on a background that has nothing to do with the
picture: an encoder that saw the picture itself would learn to copy it. What is to be drawn is the picture. Backgrounds are
a folder's, or else the procedural ones of the miniature world: the backgrounds of the other pictures have holes where their
subjects are, and plain colours would teach the encoder that what is not plain is the subject.

Sizes are in pixels. All is a function of its arguments and the generator's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from p2p_subject import checks
from p2p_subject.errors import ArgumentError
from p2p_subject.images import load_image
from p2p_subject.training.backgrounds import PAINTERS, paint
from p2p_subject.training.world import paste

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

# Alpha below this is a trace of the matting; it does not widen a subject's box.
_TRACE = 0.05
# The smallest part of a background picture that is shown, as a fraction of its short side.
_CLOSEST = 0.5


@dataclass(frozen=True)
class Composition:
    """How the two pictures are made. Raises `ArgumentError`.

    `extent`: least and greatest longer side of the subject in the encoder's picture, as fractions of its side. `mirror`: share
    of the subjects that are mirrored there. `crop`: where the square to be drawn is cut from a picture that is not square:
    "random", or as near to its "center" as the subject allows; both keep the subject in it as far as it fits.
    """

    extent: tuple[float, float] = (0.5, 0.95)
    mirror: float = 0.5
    crop: Literal["random", "center"] = "random"

    def __post_init__(self) -> None:
        low, high = self.extent
        if not checks.is_number(low, 0, 1) or not checks.is_number(high, low, 1) or low == 0:
            raise ArgumentError(f"extent={self.extent!r}; expected two fractions of the side with 0 < least <= greatest <= 1")
        if not checks.is_number(self.mirror, 0, 1):
            raise ArgumentError(f"mirror={self.mirror!r}; expected a share from 0 to 1")
        if self.crop not in ("random", "center"):
            raise ArgumentError(f"crop={self.crop!r}; expected 'random' or 'center'")


def subject_box(cutout: Image.Image) -> Box:
    """Where the subject of an RGBA picture is; the whole picture if it is nowhere more than a trace."""
    alpha = cutout.getchannel("A").point(lambda level: 255 * (level > 255 * _TRACE))
    return alpha.getbbox() or (0, 0, *cutout.size)


def compose(cutout: Image.Image, background: np.ndarray, how: Composition, rng: np.random.Generator) -> np.ndarray:
    """Place a cut-out (RGBA, straight alpha), whole, on a background (S, S, 3) float32 in [0, 1]; (S, S, 3) uint8."""
    side = len(background)
    extent = rng.uniform(*how.extent)
    mirrored = rng.random() < how.mirror
    subject = cutout.crop(subject_box(cutout))
    factor = extent * side / max(subject.size)
    size = tuple(max(1, round(length * factor)) for length in subject.size)
    # Premultiplied while resampling, so that the black behind the alpha does not bleed into the edge.
    subject = subject.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    if mirrored:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Corners in whole pixels, so that pasting neither moves nor cuts the subject.
    left, top = (int(rng.integers(side - length, endpoint=True)) for length in size)
    centre = (left + size[0] / 2) / side, (top + size[1] / 2) / side
    picture, _ = paste(background, np.asarray(subject, np.float32) / 255, *centre)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw_background(pictures: Sequence[Path], side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of a random picture, or a procedural background if there are no pictures; (S, S, 3) float32 in [0, 1]."""
    if not pictures:
        name = list(PAINTERS)[rng.integers(len(PAINTERS))]
        return paint(name, int(rng.integers(2**31)), side)
    picture = load_image(pictures[rng.integers(len(pictures))], what="background")
    shown = min(picture.size) * rng.uniform(_CLOSEST, 1)
    left, top = (rng.uniform(0, length - shown) for length in picture.size)
    box = (left, top, left + shown, top + shown)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box, 3.0), np.float32) / 255


def square_box(
    size: tuple[int, int], subject: Box, how: Literal["random", "center"], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The square, as large as a picture of `size` (width, height) allows, that holds the subject's box as far as it fits."""
    side = min(size)
    corner = []
    for length, begin, end in zip(size, subject[:2], subject[2:]):
        lowest, highest = max(0, math.ceil(end - side)), min(math.floor(begin), length - side)
        if lowest > highest:
            # Wider than the square: its middle is shown.
            lowest = highest = min(max(round((begin + end - side) / 2), 0), length - side)
        drawn = int(rng.integers(lowest, highest, endpoint=True))
        corner.append(drawn if how == "random" else min(max((length - side) // 2, lowest), highest))
    return corner[0], corner[1], corner[0] + side, corner[1] + side
