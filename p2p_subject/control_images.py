"""Control pictures for ControlNets, made from pictures: edges, a drawing, depth (Zhang, Rao, Agrawala; ICCV 2023).

All are RGB of the size of the picture that they are made from, white or bright on black, and the same every time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from p2p_subject import checks
from p2p_subject.errors import ArgumentError, ModelError, did_you_mean
from p2p_subject.images import load_image
from p2p_subject.outputs import feather

if TYPE_CHECKING:
    from transformers import Pipeline

__all__ = ["DRAWN", "KINDS", "CannyDetector", "HEDdetector", "canny", "control_image", "depth", "scribble"]


def control_image(picture: Any, kind: str, **options: Any) -> Image.Image:
    """Make a control picture of a kind, one of `KINDS`, from a picture (PIL, path, bytes, array or tensor).

    `options` are those of the function of that kind: "canny" takes `low`, `high` and `sigma`, "scribble" `low`, `high` and
    `width`, "depth" `file` or `model`. Returns RGB of the picture's size, which should be about the one that is generated:
    lines made of a large photo fade when it is made smaller. Raises `ArgumentError` for another kind, option or value,
    `ImageError` for what is no picture.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArgumentError(f"kind={kind!r};{did_you_mean(str(kind), KINDS)} expected one of {list(KINDS)}")
    make = KINDS[kind]
    known = list(inspect.signature(make).parameters)[1:]
    for name in options:
        if name not in known:
            raise ArgumentError(f"{kind} takes no {name!r};{did_you_mean(name, known)} its options: {known}")
    return make(load_image(picture), **options)


def canny(picture: Image.Image, low: float = 100, high: float = 200, sigma: float = 0.0) -> Image.Image:
    """Edges of a picture by Canny's method, one pixel wide, white on black.

    An edge of any colour channel counts. Edges are where the norm of the Sobel gradient, in levels of 255, reaches
    `high`, and where it reaches `low` next to those; `sigma` pixels of Gaussian blur come before, none by default, as in the
    pictures that published ControlNets were trained on.
    """
    return _to_rgb(_edges(picture, low, high, _number("sigma", sigma)))


def scribble(picture: Image.Image, low: float = 40, high: float = 100, width: float | None = None) -> Image.Image:
    """A drawing of a picture as with a thick soft pen, white on black, for ControlNets on scribbles.

    The long contours of the blurred picture (thresholds as in `canny`), in strokes about `width` pixels wide; None is a 64th of
    the longer side, at least 2.5.
    """
    from scipy.ndimage import label

    side = max(picture.size)
    width = max(side / 64, 2.5) if width is None else _number("width", width, above=True)
    # Blurred by a fourth of a stroke: what a pen could not draw is not drawn.
    contours, _ = label(_edges(picture, low, high, width / 4), np.ones((3, 3)))
    lengths = np.bincount(contours.ravel())
    lengths[0] = 0
    return _to_rgb(feather(lengths[contours] >= 2 * width, round(width / 4), width / 2))


def depth(picture: Image.Image, file: Any = None, model: str | None = None) -> Image.Image:
    """Depth of a picture as grey levels, near is bright, as published ControlNets take it.

    From a `file` (anything `load_image` reads; brought to the picture's size), or found by a depth-estimation `model` of
    transformers: a folder or hub name of one that gives relative depth, such as "Intel/dpt-large", loaded from safetensors.

    Raises:
        ArgumentError: neither or both are given.
        ModelError: the model cannot be loaded.
    """
    if (file is None) == (model is None):
        given = "neither" if file is None else "both"
        raise ArgumentError(
            f"depth: {given} of file and model given; pass one: file= a picture of the depth, or model= a depth-estimation "
            'model of transformers, such as "Intel/dpt-large"'
        )
    if model is None:
        found = load_image(file, what="depth").convert("L")
    else:
        # Turned into a picture here, from black to white, since releases of transformers differ in how they do it.
        values = _depth_model(model)(picture)["predicted_depth"].squeeze().float().numpy()
        found = Image.fromarray(np.rint(255 * (values - values.min()) / max(np.ptp(values), 1e-12)).astype(np.uint8))
    return found.resize(picture.size, Image.Resampling.BICUBIC).convert("RGB")


KINDS: dict[str, Callable[..., Image.Image]] = {"canny": canny, "scribble": scribble, "depth": depth}
"""What control pictures there are, by name: functions of an RGB picture and options."""
DRAWN = ("canny", "scribble")
"""Those that need nothing but the picture."""


class CannyDetector:
    """Edges by a call, as in scripts written for `controlnet_aux`: `CannyDetector()(picture, 30, 70, output_type="pil")`."""

    def __call__(
        self, input_image: Any, low_threshold: float = 100, high_threshold: float = 200, output_type: str = "pil"
    ) -> Image.Image | np.ndarray:
        """Edges of a picture at its own size, as `canny`: PIL, or for "np" a uint8 array (H, W, 3)."""
        if output_type not in ("pil", "np"):
            raise ArgumentError(f"output_type={output_type!r}; expected 'pil' or 'np'")
        edges = control_image(input_image, "canny", low=low_threshold, high=high_threshold)
        return edges if output_type == "pil" else np.asarray(edges)


class HEDdetector:
    """The learned edges (Xie and Tu 2015) of the package `controlnet_aux`, where that is installed."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        """That package's detector; `ModelError` where it is not installed."""
        try:
            from controlnet_aux import HEDdetector as Detector
        except ImportError as error:
            raise ModelError(
                f"HEDdetector needs the package controlnet_aux ({error}): pip install controlnet_aux. Without it, "
                "control_image(picture, 'scribble') makes a drawing for the same ControlNets"
            ) from error
        return Detector.from_pretrained(name, **options)


def _edges(picture: Image.Image, low: Any, high: Any, sigma: float) -> np.ndarray:
    """Edges of any channel as (H, W) bool, thinned to lines one pixel wide."""
    from skimage.feature import canny
    from skimage.morphology import skeletonize

    low, high = _number("low", low), _number("high", high)
    if low > high:
        raise ArgumentError(f"low={low:g} is above high={high:g}; edges begin at high and go on down to low")
    channels = np.moveaxis(np.asarray(picture, np.float64) / 255, -1, 0)
    found = [canny(own, sigma=sigma, low_threshold=low / 255, high_threshold=high / 255) for own in channels]
    # Where channels differ by a pixel, or two pixels share the greatest gradient, lines are two wide.
    return skeletonize(np.any(found, axis=0))


def _number(name: str, value: Any, *, above: bool = False) -> float:
    if not checks.is_number(value, 0) or (above and value == 0):
        raise ArgumentError(f"{name}={value!r}; expected a number {'above 0' if above else 'of 0 or more'}")
    return float(value)


def _to_rgb(values: np.ndarray) -> Image.Image:
    """(H, W) values in [0, 1] as an RGB picture of greys."""
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _depth_model(name: str) -> Pipeline:
    from transformers import pipeline

    try:
        return pipeline("depth-estimation", model=name, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"model={name!r} cannot be loaded for depth estimation ({type(error).__name__}: {error}). Pass a folder or hub "
            'name of such a model with safetensors, such as "Intel/dpt-large", or file='
        ) from error
