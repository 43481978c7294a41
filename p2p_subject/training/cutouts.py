"""The subject of a picture, cut out: its alpha, and its colours without those of the background.

A mask file gives the alpha, or the picture's own transparency, or, as in BLIP-Diffusion (Li et al. 2023, section 3.2),
CLIPSeg prompted with the category: where it is confident is foreground, where it is less so is unknown, the rest is
background, and closed-form matting (Levin et al. 2008) solves for the unknown. The paper does not publish its thresholds.

Arrays are (H, W) or (H, W, 3) floats in [0, 1]. Matting is pymatting's, which the extra `training` installs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from p2p_subject import checks
from p2p_subject.errors import ArgumentError, DatasetError, ImageError, MissingPackageError
from p2p_subject.images import INSIDE, in_srgb, load_image, load_mask
from p2p_subject.outputs import dilate
from p2p_subject.training.listing import Entry

if TYPE_CHECKING:
    from p2p_subject.training.clipseg import ClipSeg

Source = Literal["mask", "alpha", "clipseg"]


@dataclass(frozen=True)
class CutoutSettings:
    """How subjects are cut out. Raises `ArgumentError`.

    `foreground`, `background`: CLIPSeg's confidence from which on a pixel is the subject, and below which it is not.
    `refine`: width in pixels, to both sides of a mask file's edge, in which matting looks for the alpha; 0 takes the mask as
    it is. `side`: pictures are made smaller to this short side in pixels, in which matting takes about a second.
    `smallest`, `largest`: shares of the picture outside which an alpha is no subject.
    """

    foreground: float = 0.5
    background: float = 0.1
    refine: int = 0
    side: int = 512
    smallest: float = 0.01
    largest: float = 0.95

    def __post_init__(self) -> None:
        for low, high in (("background", "foreground"), ("smallest", "largest")):
            pair = getattr(self, low), getattr(self, high)
            if not all(checks.is_number(value, 0, 1) for value in pair) or pair[0] >= pair[1]:
                raise ArgumentError(f"{low}={pair[0]!r}, {high}={pair[1]!r}; expected numbers with 0 <= {low} < {high} <= 1")
        for name, least in (("refine", 0), ("side", 8)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name}={value!r}; expected a whole number of pixels, {least} or more")


# Compared by identity: arrays have no single truth value to compare by.
@dataclass(frozen=True, eq=False)
class Cutout:
    """A subject and the steps to it, of the size of `picture`, whose short side is `CutoutSettings.side` or less.

    `alpha` (H, W) and `colours` (H, W, 3), straight, float32; `confidence` and `trimap` (H, W) where there were such steps;
    a trimap is 0 for background, 1 for foreground and 0.5 for unknown.
    """

    source: Source
    picture: Image.Image
    alpha: np.ndarray
    colours: np.ndarray
    confidence: np.ndarray | None = None
    trimap: np.ndarray | None = None

    @property
    def rgba(self) -> Image.Image:
        """The cut-out as an RGBA picture with straight alpha, black where nothing of the subject is."""
        pixels = np.rint(np.concatenate([self.colours, self.alpha[..., None]], -1) * 255).astype(np.uint8)
        # Colours that nobody sees would only make the file larger.
        return Image.fromarray(pixels * (pixels[..., 3:] > 0))


def cut_out(entry: Entry, settings: CutoutSettings, clipseg: ClipSeg | None = None) -> Cutout:
    """Cut the subject out of a picture: by its mask, else by its own transparency, else by `clipseg`.

    Raises `DatasetError` where no subject is found or nothing but it, `ImageError` or `MaskError` for files that cannot be
    used, `MissingPackageError` without pymatting where it is needed.
    """
    if entry.mask is not None:
        cutout = _by_mask(entry, settings)
    elif (rgba := own_alpha(entry.picture)) is not None:
        pixels = np.asarray(_reduced(rgba, settings.side), np.float32) / 255
        picture = _reduced(load_image(entry.picture), settings.side)
        cutout = Cutout("alpha", picture, pixels[..., 3], pixels[..., :3])
    elif clipseg is not None:
        cutout = _by_clipseg(entry, settings, clipseg)
    else:
        raise DatasetError("it has no mask and no transparency, and no CLIPSeg was named to find its subject")
    share = float(cutout.alpha.mean())
    if not settings.smallest <= share <= settings.largest:
        raise DatasetError(
            f"its alpha covers {share:.2%} of the picture; a subject covers {settings.smallest:.2%} to {settings.largest:.2%}"
        )
    return cutout


def _by_mask(entry: Entry, settings: CutoutSettings) -> Cutout:
    picture = _reduced(load_image(entry.picture), settings.side)
    image = np.asarray(picture, np.float64) / 255
    alpha, sure = load_mask(entry.mask, picture.size), None
    if settings.refine:
        sure = band(alpha, settings.refine)
        alpha = matted(image, sure)
    return Cutout("mask", picture, alpha, unmixed(image, alpha), trimap=sure)


def _by_clipseg(entry: Entry, settings: CutoutSettings, clipseg: ClipSeg) -> Cutout:
    picture = _reduced(load_image(entry.picture), settings.side)
    image = np.asarray(picture, np.float64) / 255
    confidence = clipseg(picture, entry.subject)
    sure = trimap(confidence, settings.foreground, settings.background)
    found = float((sure == 1).mean())
    if found < settings.smallest:
        raise DatasetError(
            f"no {entry.subject} was found: {found:.2%} of the picture reach a confidence of {settings.foreground}, the "
            f"highest is {confidence.max():.2f}"
        )
    alpha = matted(image, sure)
    return Cutout("clipseg", picture, alpha, unmixed(image, alpha), confidence, sure)


def own_alpha(path: Path) -> Image.Image | None:
    """The upright RGBA picture in a file that has transparent pixels, else None; raises `ImageError`."""
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return None
            rgba = in_srgb(ImageOps.exif_transpose(image), str(path)).convert("RGBA")
    # Decoders raise nearly anything on broken files.
    except Exception as error:
        raise ImageError(f"{str(path)!r} cannot be read ({error}); expected a whole PNG, JPEG or WebP") from error
    return rgba if rgba.getextrema()[3][0] < 255 else None


def trimap(confidence: np.ndarray, foreground: float, background: float) -> np.ndarray:
    """1 where the confidence is `foreground` or more, 0 where it is below `background`, 0.5 between; float64."""
    return np.where(confidence >= foreground, 1.0, np.where(confidence < background, 0.0, 0.5))


def band(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A trimap of a mask: unknown up to `pixels` to both sides of its edge; float64."""
    inside = (mask >= INSIDE).astype(np.float32)
    return (dilate(inside, pixels).astype(np.float64) + (1 - dilate(1 - inside, pixels))) / 2


def matted(image: np.ndarray, trimap: np.ndarray) -> np.ndarray:
    """Alpha by closed-form matting, (H, W) float32; exact where the trimap is known.

    Raises `DatasetError` for a trimap without foreground or background, or if the solver does not converge.
    """
    for value, name in ((1, "foreground"), (0, "background")):
        if not (trimap == value).any():
            raise DatasetError(f"nothing in the picture is certain to be {name}")
    if not (trimap == 0.5).any():
        return trimap.astype(np.float32)
    try:
        alpha = require_pymatting().estimate_alpha_cf(np.asarray(image, np.float64), trimap)
    except ValueError as error:
        raise DatasetError(f"closed-form matting failed: {error}") from error
    return alpha.astype(np.float32)


def unmixed(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The subject's own colours, (H, W, 3) float32 (Germer et al. 2020): at its edge, pixels also show the background."""
    return require_pymatting().estimate_foreground_ml(image, alpha).clip(0, 1)


def require_pymatting():
    """pymatting, or `MissingPackageError` with what to install. The number of torch's threads stays as it is."""
    import torch

    threads = torch.get_num_threads()
    try:
        import pymatting
    except ImportError as error:
        raise MissingPackageError(
            f"cutting out subjects by a mask or by CLIPSeg needs pymatting ({error}); pip install 'p2p_subject[training]'"
        ) from error
    # It starts numba's threads, which sets OpenMP's number in this thread: torch's too, which kernels are chosen by.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return pymatting


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    factor = side / min(picture.size)
    if factor >= 1:
        return picture
    size = tuple(max(side, round(length * factor)) for length in picture.size)
    if picture.mode != "RGBA":
        return picture.resize(size, Image.Resampling.LANCZOS)
    # Premultiplied while resampling, so that the invisible colour behind the alpha does not bleed into the edge.
    return picture.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
