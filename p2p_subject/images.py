"""Pictures and masks on their way in: reading what users give, fitting it to a model's sizes and tensors.

Sizes are (width, height) in pixels, as in Pillow; arrays (H, W) or (H, W, channels); tensors (B, 3, h, w).
torch is imported only where tensors are made, so that reading pictures does not wait for it.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from p2p_subject.errors import ImageError, MaskError, P2PSubjectError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SIDE = 8  # pixels: one latent of the usual autoencoder
MAX_ASPECT = 20  # long side over short side
MAX_PIXELS = 178_956_970  # where Pillow's own guard against decompression bombs stops

INSIDE = 0.5
"""A mask's inside is where it is at least this."""

_CHANNELS = (1, 3, 4)
_GREY_TOLERANCE = 8  # levels between channels, left by lossy files
_SAME_PROFILE = 2  # levels between two makers' profiles of sRGB


def load_image(source: Any, *, what: str = "image") -> Image.Image:
    """Read a picture as a fresh 8-bit RGB PIL image, or refuse it.

    `source` is a PIL image, a path, the bytes of a picture file, a numpy array (H, W) or (H, W, C), or
    a torch tensor (C, H, W) or (1, C, H, W), C being 1, 3 or 4; arrays and tensors are uint8, uint16 or float
    in [0, 1]. The EXIF orientation is applied, the colour profile of a picture of 8 bits is (which makes the pixels sRGB),
    transparency is composited on white, 16 bits are scaled to 8, metadata is dropped. `what` names the picture in messages.
    Warns of a profile that does not fit the picture, whose pixels are taken as sRGB then.

    Raises `ImageError` for anything else: no or a broken picture, more than one frame, values out of range, a
    side below `MIN_SIDE`, an aspect ratio beyond `MAX_ASPECT`, more than `MAX_PIXELS` pixels.
    """
    name = _name(source, what)
    array = _as_array(source)
    if array is not None:
        return _image_from_array(array if array is source else _channels_last(array, name), name)
    with _opened(source, name, ImageError) as image:
        _check_size(image.size, name)
        picture = _upright(image)
        values = _deep_values(picture)
        if values is not None:
            grey = _to_bytes(values, name)
            grey[values == picture.info.get("transparency", -1)] = 255
            picture = Image.fromarray(grey)
        return _on_white(in_srgb(picture, name))


def load_alpha(source: Any) -> np.ndarray | None:
    """Opacity of a picture that `load_image` reads, (H, W) float32 in [0, 1]; None for a picture that is opaque throughout."""
    array = _as_array(source)
    if array is None:
        with _opened(source, "image", ImageError) as image:
            picture = _upright(image)
            if not picture.has_transparency_data or _deep_values(picture) is not None:
                return None
            array = np.asarray(picture.convert("RGBA"))
    elif array is not source:
        array = _channels_last(array, "image")
    if array.ndim != 3 or array.shape[2] != 4:
        return None
    alpha = _to_bytes(array[..., 3], "image").astype(np.float32) / 255
    return None if alpha.min() == 1 else alpha


def mask_values(mask: Any) -> np.ndarray:
    """Read a mask as a (H, W) float32 array in [0, 1], of its own size: 1 is edited, 0 is kept.

    `mask` is a PIL image, a path, the bytes of a file, or a (H, W) array or tensor (further axes of length 1
    are dropped): boolean, integers that are all 0 or 1, uint8, uint16, or float in [0, 1]. Raises `MaskError` for
    anything else: colours, transparency, NaN, values out of range.
    """
    name = _name(mask, "mask")
    values = _as_array(mask)
    if values is None:
        with _opened(mask, name, MaskError) as image:
            values = _mask_values(_upright(image), name)
    shape = values.shape
    while values.ndim > 2 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or not values.size:
        raise MaskError(f"{name} has shape {shape}, expected (H, W): one value for each pixel")
    return _to_unit(values, name)


def load_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """Read a mask as `mask_values` does and bring it to `size` (W, H); one of zeros and ones only by nearest neighbour.

    Raises `MaskError` for what is no mask and for one that nowhere reaches `INSIDE`.
    """
    values = mask_values(mask)
    if values.shape != (size[1], size[0]):
        hard = bool(np.all((values == 0) | (values == 1)))
        resampling = Image.Resampling.NEAREST if hard else Image.Resampling.BILINEAR
        values = np.asarray(Image.fromarray(values).resize(size, resampling)).clip(0, 1)
    if values.max() < INSIDE:
        reached = f"reaches only {values.max():.3g}, so it " if values.any() else ""
        raise MaskError(
            f"{_name(mask, 'mask')} {reached}selects nothing at {size[0]}x{size[1]}; mark what to edit with 1 (white), "
            f"at least {INSIDE}"
        )
    return values


@dataclass(frozen=True)
class Frame:
    """How a picture was fitted to a model: its own size and the one the model works at, (width, height)."""

    original_size: tuple[int, int]
    model_size: tuple[int, int]


def fit(
    image: Image.Image,
    *,
    multiple: int,
    max_pixels: int | None = None,
    size: tuple[int, int] | None = None,
    area: int | None = None,
) -> tuple[Image.Image, Frame]:
    """Resize an RGB picture to multiples of `multiple`, keeping the aspect as well as those allow.

    The size aimed at is the picture's own, or `size` (width, height), or the picture scaled up or down to
    about `area` pixels; `max_pixels` is then a hard limit. Returns the resized picture and the `Frame` that
    `restore` needs. Raises `ImageError` for numbers that are not positive, `size` with `area`, or no room for
    one multiple.
    """
    given = [multiple, *(size or ()), *(n for n in (area, max_pixels) if n is not None)]
    if min(given) < 1 or (size and area):
        raise ImageError(f"cannot fit to size={size}, area={area}: give at most one, as positive numbers")
    limit = sys.maxsize if max_pixels is None else max_pixels // multiple**2
    if limit < 1:
        raise ImageError(f"{max_pixels} pixels are too few: the model needs at least {multiple}x{multiple}")
    width, height = size or image.size
    pixels = min(area or width * height, max_pixels or sys.maxsize)
    scale = math.sqrt(pixels / (width * height)) / multiple
    columns, rows = _whole_sides(width * scale, height * scale, limit)
    frame = Frame(image.size, (columns * multiple, rows * multiple))
    if frame.model_size != image.size:
        image = image.resize(frame.model_size, Image.Resampling.LANCZOS)
    return image, frame


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Stack RGB pictures of one size into (B, 3, h, w) float32 in [-1, 1]; raises `ImageError` for others."""
    import torch

    kinds = {(image.mode, image.size) for image in images}
    if len(kinds) != 1 or next(iter(kinds))[0] != "RGB":
        raise ImageError(f"expected RGB pictures of one size, got {sorted(kinds)}; use load_image and fit")
    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (levels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _name(source: Any, what: str) -> str:
    return f"{what} {os.fspath(source)!r}" if isinstance(source, str | os.PathLike) else what


def _as_array(source: Any) -> np.ndarray | None:
    """An array as it is, a tensor as a new array, None for anything else."""
    if isinstance(source, np.ndarray):
        return source
    # A tensor can only exist once someone else has imported torch.
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.Tensor):
        return None
    # numpy has no bfloat16.
    return (source.float() if source.is_floating_point() else source).detach().cpu().numpy()


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    picture = array[0] if array.ndim == 4 and len(array) == 1 else array
    if picture.ndim != 3 or len(picture) not in _CHANNELS:
        raise ImageError(f"{name} has shape {array.shape}, expected a tensor (3, H, W) or (1, 3, H, W)")
    return picture.transpose(1, 2, 0)


def _handle(source: Any, name: str, error: type[P2PSubjectError]) -> AbstractContextManager[Image.Image]:
    """A PIL image, or the one in a file or its bytes, not yet decoded; leaves a caller's own image open."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if not isinstance(source, str | os.PathLike):
        raise error(f"{name} is a {type(source).__name__}, expected a PIL image, path, bytes, array or tensor")
    if not os.path.exists(source):
        raise error(f"{name}: there is no such file; check the path")
    if not os.path.isfile(source):
        raise error(f"{name} is a directory or device, expected a picture file")
    return Image.open(source)


@contextmanager
def _opened(source: Any, name: str, error: type[P2PSubjectError]) -> Iterator[Image.Image]:
    """Open a still picture; what goes wrong here or in decoding it in the block becomes an `error`."""
    try:
        with _handle(source, name, error) as image:
            # An MPO file is a camera's JPEG with previews or a second view behind the photo.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise error(f"{name} has {frames} frames, expected a still picture; save one by itself")
            # Pillow hands these to an outside program.
            if image.format in ("EPS", "WMF"):
                raise error(f"{name} is a drawing ({image.format}), expected pixels; export it as PNG")
            yield image
    except P2PSubjectError:
        raise
    # Decoders raise nearly anything on broken files: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as cause:
        raise error(f"{name} cannot be read ({cause}); expected a whole PNG, JPEG or WebP") from cause


def _upright(image: Image.Image) -> Image.Image:
    """A decoded copy with the EXIF orientation applied, which still knows the format it came from."""
    upright = ImageOps.exif_transpose(image)
    upright.format = image.format
    return upright


def in_srgb(image: Image.Image, name: str) -> Image.Image:
    """A picture of 8 bits in sRGB by its embedded colour profile; as it is without one, or one that does what sRGB's does.

    Transparency is kept. Warns of a profile that does not fit the picture, and returns it as it is.
    """
    if not image.info.get("icc_profile"):
        return image
    from PIL import ImageCms

    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    opaque = image.convert({"L": "L", "LA": "L", "1": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), opaque.mode, "RGB")
        # Names do not tell: "DCI-P3 D65 Gamut with sRGB Transfer". Other makers' profiles of sRGB would move pixels by a level.
        if opaque.mode != "CMYK":
            probe = _probe(opaque.mode)
            moved = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
            if np.abs(moved).max() <= _SAME_PROFILE:
                return image
        converted = ImageCms.applyTransform(opaque, transform)
    except (OSError, ImportError, ImageCms.PyCMSError) as error:
        said = f"{name}: its colour profile cannot be applied ({error}); its pixels are taken as sRGB"
        warnings.warn(said, UserWarning, stacklevel=3)
        return image
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _probe(mode: str) -> Image.Image:
    """Every grey, and in "RGB" colours from all of the cube."""
    greys = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode == "L":
        return greys
    cube = np.stack(np.meshgrid(*[np.linspace(0, 255, 6, dtype=np.uint8)] * 3), -1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([np.asarray(greys.convert("RGB")), cube], axis=1))


def _deep_values(image: Image.Image) -> np.ndarray | None:
    """The (H, W) values of a picture of more than 8 bits: uint16, int32 or float32; None for others."""
    # Pillow reads 16-bit PGM, and once did PNG, into 32-bit integers; from elsewhere their range is unknown.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image) if image.mode in ("I", "F") else None


def _on_white(image: Image.Image) -> Image.Image:
    """A new RGB picture without metadata, transparency composited on white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    picture = image.convert("RGB")
    picture.info.clear()
    return picture


def _image_from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        raise ImageError(f"{name} has shape {array.shape}, expected (H, W), (H, W, 3) or (H, W, 4)")
    _check_size((array.shape[1], array.shape[0]), name)
    levels = _to_bytes(array, name)
    return _on_white(Image.fromarray(levels[..., 0] if levels.shape[2:] == (1,) else levels))


def _check_size(size: tuple[int, int], name: str) -> None:
    short, long = sorted(size)
    given = f"{name} is {size[0]}x{size[1]} pixels"
    if short < MIN_SIDE:
        raise ImageError(f"{given}, expected sides of at least {MIN_SIDE}; give a larger picture")
    if long > MAX_ASPECT * short:
        raise ImageError(f"{given}, expected an aspect ratio of at most {MAX_ASPECT}:1; crop it")
    if short * long > MAX_PIXELS:
        raise ImageError(f"{given}, expected at most {MAX_PIXELS / 1e6:.0f} million in all; make it smaller")


def _check_unit(values: np.ndarray, name: str, error: type[P2PSubjectError]) -> None:
    low, high = values.min(), values.max()
    # Put so that NaN fails.
    if not (low >= 0 and high <= 1):
        raise error(f"{name} has values from {low:.4g} to {high:.4g}, expected [0, 1]; rescale it first")


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Scale the values of a picture to uint8, rounded."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ImageError(f"{name} has {values.dtype} values, expected uint8, uint16 or float in [0, 1]")
    _check_unit(values, name, ImageError)
    return np.rint(values * 255).astype(np.uint8)


def _to_unit(values: np.ndarray, name: str) -> np.ndarray:
    """Scale the values of a mask to float32 in [0, 1]."""
    if values.dtype.kind not in "buif":
        raise MaskError(f"{name} has {values.dtype} values, expected bool, uint8 or float in [0, 1]")
    # Integers 0 and 1 mean what booleans mean: no mask goes only up to 1/255.
    if values.dtype in (np.uint8, np.uint16) and values.max() > 1:
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    _check_unit(values, name, MaskError)
    return values.astype(np.float32)


def _mask_values(image: Image.Image, name: str) -> np.ndarray:
    """The (H, W) values of a grey or black-and-white picture."""
    values = _deep_values(image)
    if values is not None:
        return values
    see_through = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    colours = np.asarray(image.convert("RGB"))
    if see_through or np.ptp(colours, axis=2).max() > _GREY_TOLERANCE:
        fault = "transparency" if see_through else "colours"
        raise MaskError(f"{name} has {fault}, expected grey; paint what to edit white and the rest black")
    return np.asarray(image.convert("L"))


def _whole_sides(width: float, height: float, limit: int) -> tuple[int, int]:
    """The whole sides next to `width` and `height`, product <= `limit`, nearest in aspect, then in area."""
    rows = [min(max(side, 1), limit) for side in (math.floor(height), math.ceil(height))]
    columns = [max(side, 1) for side in (math.floor(width), math.ceil(width))]
    sides = [(min(across, limit // down), down) for down in rows for across in columns]

    def misfit(side: tuple[int, int]) -> tuple[float, float]:
        across, down = math.log(side[0] / width), math.log(side[1] / height)
        return abs(across - down), abs(across + down)

    return min(sides, key=misfit)
