"""Pictures to the Q-Former's input and decoded samples back to pictures (BLIP's and CLIP's preprocessing)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.errors import ArgumentError, ImageError, ModelError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BlipImageProcessor", "Picture", "as_pictures", "is_batch"]

Picture: TypeAlias = Image.Image | np.ndarray | Tensor

_FILE = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_DEFAULTS: dict[str, Any] = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(_CLIP_MEAN),
    "image_std": list(_CLIP_STD),
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
}


class BlipImageProcessor:
    """Squeezes pictures to a fixed size and normalises them.

    Every key of the official `preprocessor_config.json` is accepted by name; unknown ones are kept and saved
    again.

    Args:
        options: `size` {"height", "width"} or one int for a square, `resample` (Pillow's number),
            `rescale_factor`, `image_mean`, `image_std` (3 each), and the switches `do_convert_rgb`,
            `do_resize`, `do_rescale`, `do_normalize`, `do_center_crop`. Without `do_resize`, the crop alone
            brings a picture to `size`, with zeros around a smaller one.

    Raises:
        ModelError: `size`, `image_mean` or `image_std` has another form.
    """

    def __init__(self, **options: Any) -> None:
        self.config: dict[str, Any] = {**_DEFAULTS, **options}
        size = self.config["size"]
        if isinstance(size, int):
            size = self.config["size"] = {"height": size, "width": size}
        if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
            raise ModelError(f'image processor: size is {size!r}; expected {{"height": int, "width": int}} or an int.')
        self.output_size: tuple[int, int] = (size["height"], size["width"])
        for name in ("image_mean", "image_std"):
            _require_channels(name, self.config[name])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `preprocessor_config.json` of a folder.

        Raises:
            ModelError: the file is missing or damaged.
        """
        return cls(**read_json(Path(folder) / _FILE))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` into a folder, which is made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {**self.config, "image_processor_type": type(self).__name__}
        (folder / _FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def preprocess(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> Tensor:
        """Prepare pictures for the Q-Former's image encoder.

        Args:
            pictures: one or several: PIL images; arrays (H, W, 3), uint8 or floats in [0, 1]; tensors (3, H,
                W), uint8 or floats in [0, 1]; or a batch of either, (B, H, W, 3) or (B, 3, H, W). Sizes may
                differ.
            image_mean: three numbers used in place of the processor's own; so is `image_std`.
            image_std: see `image_mean`.

        Returns:
            (B, 3, height, width) float32, normalised.

        Raises:
            ImageError: a picture is of another kind, shape or range, or without resizing and cropping their
                sizes differ.
        """
        mean = _require_channels("image_mean", self.config["image_mean"] if image_mean is None else image_mean)
        std = _require_channels("image_std", self.config["image_std"] if image_std is None else image_std)
        rows = [self._prepare(picture, mean, std) for picture in as_pictures(pictures)]
        if len({row.shape for row in rows}) > 1:
            sizes = ", ".join(f"{row.shape[1]}x{row.shape[0]}" for row in rows)
            raise ImageError(f"pictures of sizes {sizes} make no batch; set do_resize or do_center_crop.")
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()

    def _prepare(self, picture: Picture, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        switches = self.config
        pixels = _to_uint8(picture, switches["do_convert_rgb"])  # (H, W, 3)
        if switches["do_resize"]:
            height, width = self.output_size
            resized = Image.fromarray(pixels).resize((width, height), resample=switches["resample"])
            pixels = np.asarray(resized)
        values = pixels.astype(np.float64)
        if switches["do_rescale"]:
            values = values * switches["rescale_factor"]
        elif _is_float(picture):
            values = values / 255
        values = values.astype(np.float32)
        if switches["do_normalize"]:
            values = (values - mean) / std
        return _center_crop(values, self.output_size) if switches["do_center_crop"] else values

    @staticmethod
    def postprocess(samples: Tensor, output_type: str = "pil") -> Tensor | np.ndarray | list[Image.Image]:
        """Turn decoded samples (B, 3, H, W) in [-1, 1] into pictures; values outside are clamped.

        Returns:
            "pt": (B, 3, H, W) tensor in [0, 1], dtype kept; "np": (B, H, W, 3) float32 array in [0, 1];
            "pil": list of B RGB images.

        Raises:
            ArgumentError: `output_type` is none of these.
        """
        if output_type not in {"pt", "np", "pil"}:
            raise ArgumentError(f'output_type is {output_type!r}; expected "pil", "np" or "pt".')
        samples = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return samples
        arrays = samples.float().cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return arrays
        return [Image.fromarray(array) for array in (arrays * 255).round().astype(np.uint8)]


def is_batch(pictures: object) -> bool:
    """Whether this is several pictures: a sequence, or an array or tensor with four dimensions."""
    if isinstance(pictures, np.ndarray | Tensor):
        return pictures.ndim == 4
    return isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes)


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """Return one picture, a sequence or a batch as a list of pictures.

    Raises:
        ImageError: there is none.
    """
    listed = list(pictures) if is_batch(pictures) else [pictures]
    if not listed:
        raise ImageError("no picture was given: the list is empty; pass at least one.")
    return listed


def _require_channels(name: str, values: Any) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (3,):
        raise ModelError(f"image processor: {name} is {values!r}; expected three numbers, one a channel.")
    return numbers


def _is_float(picture: Picture) -> bool:
    if isinstance(picture, Tensor):
        return picture.is_floating_point()
    return isinstance(picture, np.ndarray) and np.issubdtype(picture.dtype, np.floating)


def _to_uint8(picture: Picture, convert: bool) -> np.ndarray:
    """Return (H, W, 3) uint8: resizing works on these, as it does in the original."""
    if isinstance(picture, Image.Image):
        return _rgb_array(picture, convert)
    if isinstance(picture, Tensor):
        layout, array = "(3, H, W)", picture.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        fits = array.ndim == 3 and array.shape[0] == 3
        array = array.transpose(1, 2, 0) if fits else array
    elif isinstance(picture, np.ndarray):
        layout, array = "(H, W, 3)", picture
        fits = array.ndim == 3 and array.shape[2] == 3
    else:
        raise ImageError(
            f"a reference picture is a {type(picture).__name__}; expected a PIL image, an array (H, W, 3) or "
            "a tensor (3, H, W). Open files with PIL.Image.open first."
        )
    if not fits or 0 in array.shape:
        raise ImageError(
            f"a {type(picture).__name__} picture has shape {tuple(picture.shape)}; expected {layout} with H "
            "and W above zero. Convert it to RGB."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    # The comparison is false for NaN as well.
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(
            f"a picture of dtype {array.dtype} has values from {array.min()} to {array.max()}; expected "
            "uint8, or floats from 0 to 1. Divide by its largest possible value."
        )
    return (array * 255).round().astype(np.uint8)


def _rgb_array(picture: Image.Image, convert: bool) -> np.ndarray:
    if picture.mode.startswith(("I", "F")) or (picture.mode != "RGB" and not convert):
        raise ImageError(f'a picture has mode {picture.mode!r}; expected "RGB". Convert it to 8-bit RGB first.')
    if 0 in picture.size:
        raise ImageError(f"a picture has size {picture.size}; expected width and height above zero.")
    try:
        return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ImageError(f"a picture cannot be decoded ({error}); its file is damaged.") from error


def _center_crop(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (H, W, 3) to `size` around the middle, with zeros where it is smaller."""
    if values.shape[:2] == size:
        return values
    cropped = np.zeros((*size, 3), dtype=values.dtype)
    taken, placed = [], []
    for have, want in zip(values.shape, size, strict=False):
        offset, length = (have - want) // 2, min(have, want)
        taken.append(slice(max(offset, 0), max(offset, 0) + length))
        placed.append(slice(max(-offset, 0), max(-offset, 0) + length))
    cropped[tuple(placed)] = values[tuple(taken)]
    return cropped
