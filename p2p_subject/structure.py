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
from p2p_subject.control_images import DRAWN, KINDS, control_image
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

    `picture` (RGB) is drawn as the ControlNet was trained on, such as edges; in a `Source` it has the model's size.
    `strength`, 0 or more, multiplies what the ControlNet adds to the U-Net. `kind`, if any, says that the picture is an
    ordinary one yet, of which that kind of control picture is to be made, once it has the size that is generated.
    """

    picture: Image.Image
    strength: float = 1.0
    kind: str | None = None

    @classmethod
    def read(cls, control: Any, strength: Any, of: Image.Image | None = None) -> Structure | None:
        """Read the arguments `control` and `control_strength` of a call; None where there is no control.

        `control`: a control picture (anything `load_image` takes), (kind, picture) to make one of a picture, or the kind alone,
        to be made of the picture `of`, whose proportions any other must have.

        Raises:
            ArgumentError: a kind that there is not, or without a picture to make it of; a strength that is none.
            ImageError: what is no picture, or one of other proportions.
        """
        if not checks.is_number(strength, 0):
            raise ArgumentError(f"control_strength={strength!r}; expected a number of 0 or more, such as 1")
        if control is None:
            return None
        if isinstance(control, tuple) and len(control) == 2:
            return cls(_fitting(control[1], of), float(strength), _kind(control[0]))
        if isinstance(control, str) and (control in KINDS or not Path(control).exists()):
            kind = _kind(control)
            if of is None:
                raise ArgumentError(
                    f"control={control!r} names a kind of control picture, and there is no picture to make it of; pass both, "
                    f"({control!r}, picture), or a control picture"
                )
            return cls(of, float(strength), kind)
        return cls(_fitting(control, of), float(strength))

    def drawn(self, size: tuple[int, int]) -> Structure:
        """The same with its control picture at `size` (width, height), made now if it was to be made."""
        picture = self.picture
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC if self.kind is None else Image.Resampling.LANCZOS)
        return Structure(picture if self.kind is None else control_image(picture, self.kind), self.strength)

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


def _fitting(control: Any, of: Image.Image | None) -> Image.Image:
    """Load a picture; `ImageError` where it has other proportions than the picture `of`."""
    picture = load_image(control, what="control")
    if of is not None:
        misfit = abs(math.log(picture.width * of.height / (picture.height * of.width)))
        # A pixel more or less is no other proportion, however small the picture.
        if misfit > max(PROPORTION, 1 / min(*picture.size, *of.size)):
            raise ImageError(
                f"control is {picture.width}x{picture.height} pixels, the picture it belongs to {of.width}x{of.height}; "
                "draw it at that picture's size, or crop both alike"
            )
    return picture


def _kind(name: Any) -> str:
    if not isinstance(name, str) or name not in KINDS:
        close = did_you_mean(str(name), KINDS)
        raise ArgumentError(
            f"control={name!r}: there is no such file, nor such a kind of control picture.{close} Pass a picture, a path, or a "
            f"kind, one of {list(DRAWN)}"
        )
    if name not in DRAWN:
        raise ArgumentError(f"control={name!r} takes more than a picture; pass control_image(picture, {name!r}, ...)")
    return name
