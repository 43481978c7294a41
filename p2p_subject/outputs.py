"""Results on their way out: pictures from tensors, blended into the original, written whole or not at all."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from p2p_subject.errors import ImageError, MaskError, NonFiniteError, OutputError, P2PSubjectError
from p2p_subject.images import INSIDE, Frame

if TYPE_CHECKING:
    from torch import Tensor

# Suffix -> (Pillow format, options). Lossless where the format can be, so that a kept background stays kept.
IMAGE_FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".bmp": ("BMP", {}),
}


def to_pil(tensor: Tensor) -> list[Image.Image]:
    """Turn a (B, 3, h, w) tensor in [-1, 1], of any float dtype and device, into B 8-bit RGB pictures.

    Values are rounded, those out of range clamped: the inverse of `to_tensor`. Raises `ImageError` for
    another shape, `NonFiniteError` for NaN or infinity.
    """
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ImageError(f"expected a tensor (B, 3, h, w), got {tuple(tensor.shape)}")
    values = tensor.detach().float()
    if not values.isfinite().all():
        raise NonFiniteError("the decoded picture has NaN or infinite values; run the model in float32")
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def restore(image: Image.Image, frame: Frame) -> Image.Image:
    """Resize an output of the model to the size of the original picture; the same object if it has that."""
    if image.size == frame.original_size:
        return image
    return image.resize(frame.original_size, Image.Resampling.LANCZOS)


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Widen the inside of a (H, W) mask by `pixels` in rows and columns, diagonals included, as max-pooling does.

    Returns (H, W) float32 of 0 and 1. Takes the same time for any width. Raises `MaskError` for a negative one.
    """
    from scipy.ndimage import maximum_filter

    if pixels < 0:
        raise MaskError(f"a mask is widened by 0 or more pixels, got {pixels}")
    inside = (mask >= INSIDE).astype(np.uint8)
    # Wider than the mask is as wide as the mask; scipy pads by the width.
    size = [2 * min(pixels, side) + 1 for side in mask.shape]
    return maximum_filter(inside, size, mode="constant").astype(np.float32)


def feather(mask: np.ndarray, dilate: int, feather: float) -> np.ndarray:
    """Widen a (H, W) mask in [0, 1] by `dilate` pixels, then let it fall linearly to 0 over `feather` more.

    The inside of the mask is where it is at least `INSIDE`; distances are Euclidean. Returns (H, W) float32
    in [0, 1]: exactly 1 inside and up to `dilate` away, exactly 0 from `dilate + feather` away, so that what
    is kept is kept bit for bit. A mask of zeros stays one. Raises `MaskError` for negative widths and for a
    mask that nowhere reaches `INSIDE`.
    """
    from scipy.ndimage import distance_transform_edt

    if dilate < 0 or feather < 0:
        raise MaskError(f"a mask is widened by 0 or more pixels, got dilate={dilate}, feather={feather}")
    inside = mask >= INSIDE
    alpha = np.zeros(mask.shape, np.float32)
    if not inside.any():
        if mask.any():
            raise MaskError(f"the mask reaches only {mask.max():.3g}; its inside must be {INSIDE} or more")
        return alpha
    # Only the box that the result can reach: on large photos the distance transform is the slow part.
    margin = math.ceil(dilate + feather)
    spans = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    box = tuple(slice(max(int(span[0]) - margin, 0), int(span[-1]) + margin + 1) for span in spans)
    distance = distance_transform_edt(~inside[box])
    beyond = np.maximum(distance - dilate, 0)
    # A feather of next to nothing divides to infinity, which is 0 of the edit as it should be.
    with np.errstate(over="ignore"):
        alpha[box] = np.clip(1 - beyond / feather, 0, 1) if feather else beyond == 0
    # The quotient may miss 1 by a rounding.
    alpha[box][(beyond > 0) & (distance >= dilate + feather)] = 0
    return alpha


def paste_back(original: Image.Image, edited: Image.Image, alpha: np.ndarray) -> Image.Image:
    """Composite two RGB pictures of one size: `edited` where `alpha` (H, W) is 1, `original` where it is 0.

    Both ends are bit-exact; between them `alpha`, in [0, 1], counts in steps of 1/255 and the result is
    rounded. Raises `ImageError` if the pictures differ in size or mode, `MaskError` if `alpha` does not fit
    them.
    """
    if (original.mode, original.size) != (edited.mode, edited.size):
        raise ImageError(f"expected pictures alike, got {original.mode} {original.size}, {edited.mode} {edited.size}")
    if alpha.shape != (original.height, original.width) or not (alpha.min() >= 0 and alpha.max() <= 1):
        expected = f"({original.height}, {original.width})"
        raise MaskError(f"alpha of shape {alpha.shape} given, expected {expected} with values in [0, 1]")
    return Image.composite(edited, original, Image.fromarray(np.rint(alpha * 255).astype(np.uint8)))


def check_target(path: str | os.PathLike[str], suffixes: Collection[str] | None = None) -> Path:
    """Return the absolute path of a file that can be written, links followed; creates nothing.

    Call it before a long computation whose result goes to `path`. `suffixes` lists the allowed lower-case
    suffixes, dot included; `IMAGE_FORMATS` fits there for pictures. Raises `OutputError` for another suffix,
    a missing folder, a directory or device in the file's place, and a file or folder without write
    permission.
    """
    shown = repr(os.fspath(path))
    target = Path(os.path.realpath(path))
    suffix = Path(path).suffix.lower()
    if suffixes is not None and suffix not in suffixes:
        raise OutputError(f"cannot write {shown}: unknown suffix {suffix!r}; use {', '.join(suffixes)}")
    if os.path.isdir(target):
        raise OutputError(f"cannot write {shown}: it is a directory; give the name of a file")
    if not os.path.isdir(target.parent):
        raise OutputError(f"cannot write {shown}: no folder {str(target.parent)!r}; create it first")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"cannot write {shown}: it is not a regular file; give another name")
    # The folder counts as well: the finished file is moved into it.
    for needed in (target.parent, target):
        if os.path.exists(needed) and not os.access(needed, os.W_OK):
            raise OutputError(f"cannot write {shown}: no permission to write {str(needed)!r}")
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file of the same suffix that becomes `path` when the block succeeds.

    It lies in the folder of `path`. Readers see the old content or the whole new one, never a part; if the
    block raises, `path` is as it was and the temporary file is gone. The permissions of an existing file are
    kept. Raises `OutputError` where `check_target` does, and for any `OSError` on the way, such as a full
    disk.
    """
    target = check_target(path)
    temporary = target.with_name(f".{secrets.token_hex(8)}{Path(path).suffix}")
    try:
        temporary.touch(exist_ok=False)
        if target.exists():
            shutil.copymode(target, temporary)
        mode = temporary.stat().st_mode
        yield temporary
        # Some writers put a file of their own, which nobody else may read, in its place.
        temporary.chmod(mode)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except P2PSubjectError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` (text as UTF-8) whole or not at all; raises `OutputError` as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PIL image in the format of the suffix, one of `IMAGE_FORMATS`, as a whole or not at all.

    Everything but JPEG is lossless. Raises `OutputError` for an unknown suffix, where `check_target` does,
    and when the format cannot hold the picture.
    """
    check_target(path, IMAGE_FORMATS)
    name, options = IMAGE_FORMATS[Path(path).suffix.lower()]
    with atomic_path(path) as temporary:
        image.save(temporary, format=name, **options)
