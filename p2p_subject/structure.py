"""The structure that a generation keeps to: a control picture and its strength (Zhang, Rao, Agrawala; ICCV 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from inversion import TrajectoryError
from p2p_subject import checks
from p2p_subject.control_images import KINDS, control_image
from p2p_subject.errors import ArgumentError, ImageError, did_you_mean
from p2p_subject.images import load_image, to_tensor

EDGES = "edges"
"""Name of the ControlNet on edges that comes with the library, for the miniature."""
PROPORTION = 0.02
"""How far, as a share, the proportions of a control picture may lie from those of the picture it belongs to."""


# Compared by identity, as sources are.
@dataclass(frozen=True, eq=False)
class Structure:
    """What a ControlNet is given.

    `picture` (RGB) is drawn as the ControlNet was trained on, such as edges by `control_image`; in a `Source` it has the
    model's size. `strength`, 0 or more, multiplies what the ControlNet adds to the U-Net.
    """

    picture: Image.Image
    strength: float = 1.0

    @classmethod
    def read(
        cls, control: Any, strength: Any, of: Image.Image | None = None, size: tuple[int, int] | None = None
    ) -> Structure | None:
        """Read the arguments `control` and `control_strength` of a call; None where there is no control.

        `control`: a control picture (anything `load_image` takes), or a kind of them, to be made from the picture `of`. A
        given one must have the proportions of `size` (width, height).

        Raises:
            ArgumentError: a kind without a picture to make it from, or a strength that is none.
            ImageError: what is no picture, or one of other proportions.
        """
        if not checks.is_number(strength, 0):
            raise ArgumentError(f"control_strength={strength!r}; expected a number of 0 or more, such as 1")
        if control is None:
            return None
        if isinstance(control, str) and control in KINDS:
            if of is None:
                raise ArgumentError(
                    f"control={control!r} names a kind of control picture, and there is no picture to make it from; pass "
                    f"control_image(picture, {control!r}) or a file"
                )
            return cls(control_image(of, control), float(strength))
        if isinstance(control, str) and not Path(control).exists():
            raise ArgumentError(
                f"control={control!r}: there is no such file, nor such a kind of control picture."
                f"{did_you_mean(control, KINDS)} Pass a picture, a path, or one of {list(KINDS)}"
            )
        picture = load_image(control, what="control")
        if size is not None:
            width, height = size
            misfit = abs(math.log(picture.width * height / (picture.height * width)))
            # A pixel more or less is no other proportion, however small the picture.
            if misfit > max(PROPORTION, 1 / min(*picture.size, *size)):
                raise ImageError(
                    f"control is {picture.width}x{picture.height} pixels, the picture it belongs to {width}x{height}; draw it "
                    "at the picture's size, or crop both alike"
                )
        return cls(picture, float(strength))

    def resized(self, size: tuple[int, int]) -> Structure:
        """The same with its picture at `size` (width, height)."""
        if self.picture.size == size:
            return self
        return Structure(self.picture.resize(size, Image.Resampling.BICUBIC), self.strength)

    def tensor(self) -> Tensor:
        """The picture as (1, 3, H, W) float32 in [0, 1]."""
        return (to_tensor([self.picture]) + 1) / 2

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as a safetensors file holds it; `from_tensors` is the inverse."""
        import numpy as np
        import torch

        strength = torch.tensor(self.strength, dtype=torch.float64)
        return {"control": torch.from_numpy(np.array(self.picture)), "control_strength": strength}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], size: tuple[int, int], name: str) -> Structure | None:
        """Read what `tensors` gave from among others; None if there is none.

        Raises `TrajectoryError` if it is damaged or its picture is not of `size` (width, height), the model's.
        """
        import torch

        picture, strength = tensors.get("control"), tensors.get("control_strength")
        if picture is None and strength is None:
            return None
        width, height = size
        fits = picture is not None and picture.dtype == torch.uint8 and tuple(picture.shape) == (height, width, 3)
        if not fits or strength is None or strength.numel() != 1 or not checks.is_number(strength.item(), 0):
            raise TrajectoryError(
                f"{name}: the control picture in it is damaged; expected control ({height}, {width}, 3) uint8 and "
                "control_strength, a number of 0 or more. Generate or invert the picture again"
            )
        return cls(Image.fromarray(picture.numpy()), strength.item())
