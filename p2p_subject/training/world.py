"""The miniature world: one subject on one named background, with its mask, caption and the true answer of every edit.

A `SceneSpec` says everything about a scene in a few numbers and `draw` is a pure function of it, so the picture "the same
scene with another subject" is drawn, not guessed. `sample(split, index)` makes a spec from an integer.

Splits keep whole appearances apart. Twelve pairs of category and source of art (`HELD_OUT_ART`) and two arcs of hue
(`HELD_OUT_HUES`) never occur in "train"; "validation" and "test" hold new scenes of known looks; "new_hue" shows known
art in held-out hues, "new_art" the held-out art, "judge" everything, for a classifier that has to know it all.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

from p2p_subject.training.backgrounds import PAINTERS, PHRASES, paint

SIZE = 64
"""Side of a scene in pixels."""

SOURCES = ("fluent", "google", "twitter")
CATEGORIES = (
    "apple", "ball", "banana", "bear", "burger", "bus", "cactus", "cake", "car", "cat", "cow", "dog", "donut", "fish",
    "fox", "frog", "gift", "guitar", "hat", "house", "lion", "monkey", "mushroom", "owl", "panda", "penguin", "pig",
    "pizza", "rabbit", "rocket", "rose", "strawberry", "sunflower", "tiger", "tree", "turtle",
)  # fmt: skip
BACKGROUNDS = tuple(PAINTERS)
HUES = {"red": 0, "orange": 30, "yellow": 55, "green": 115, "teal": 175, "blue": 220, "purple": 275, "pink": 320}
"""Names of tints and the hue each is centred on, in degrees."""

HELD_OUT_HUES = ((130.0, 160.0), (240.0, 265.0))
HELD_OUT_ART = frozenset((category, SOURCES[i % 3]) for i, category in enumerate(CATEGORIES[1::3]))
SPLITS = ("train", "validation", "test", "new_hue", "new_art", "judge")


@dataclass(frozen=True)
class Look:
    """An appearance: category, source of art, and hue in degrees (None: the natural colours)."""

    category: str
    source: str
    hue: float | None = None

    @property
    def tint(self) -> str | None:
        """The nearest colour name, or None for natural colours."""
        if self.hue is None:
            return None
        return min(HUES, key=lambda name: hue_distance(self.hue, HUES[name]))


@dataclass(frozen=True)
class Pose:
    """Where a subject stands: centre (x, y) and largest extent as fractions of the side, degrees, mirrored or not."""

    x: float
    y: float
    extent: float
    angle: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class SceneSpec:
    """Everything that determines a scene's pixels."""

    look: Look
    pose: Pose
    background: str
    background_seed: int

    def with_look(self, look: Look) -> SceneSpec:
        """The same scene with another subject: the true answer of a swap."""
        return replace(self, look=look)

    def with_background(self, background: str, seed: int) -> SceneSpec:
        """The same subject in the same place before another background: the true answer of a change of background."""
        return replace(self, background=background, background_seed=seed)

    def with_hue(self, hue: float | None) -> SceneSpec:
        """The same scene with its subject in another hue: the true answer of a change of colour."""
        return replace(self, look=replace(self.look, hue=hue))

    def caption(self, *, tint: bool = False) -> str:
        """ "a dog on grass", or "a blue dog on grass" with `tint`."""
        words = [self.look.tint] if tint and self.look.tint else []
        return with_article(" ".join([*words, self.look.category, PHRASES[self.background]]))


def empty_caption(background: str) -> str:
    """What describes a scene without its subject: "grass", "the sky"."""
    return PHRASES[background].split(" ", 1)[1]


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def hue_distance(a: float, b: float) -> float:
    """Distance of two hues on the circle, in degrees, 0 to 180."""
    return abs((a - b + 180) % 360 - 180)


@cache
def _art(category: str, source: str) -> Image.Image:
    with (files("p2p_subject.training") / "art" / f"{category}_{source}.png").open("rb") as file:
        art = Image.open(file).convert("RGBA")
    return art.crop(art.getbbox())


def cut_out(look: Look, extent: int, angle: float = 0.0, mirrored: bool = False) -> np.ndarray:
    """The subject alone, (h, w, 4) float32 in [0, 1], straight alpha; its larger side before rotation is `extent` pixels."""
    art = _art(look.category, look.source)
    scale = extent / max(art.size)
    # Premultiplied while resampling, so that the invisible colour behind the alpha does not bleed into the edge.
    art = art.convert("RGBa").resize([max(1, round(side * scale)) for side in art.size], Image.Resampling.HAMMING)
    if mirrored:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        art = art.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(art.convert("RGBA"), np.float32) / 255
    return pixels if look.hue is None else np.concatenate([_tinted(pixels[..., :3], look.hue), pixels[..., 3:]], -1)


def _tinted(rgb: np.ndarray, hue: float) -> np.ndarray:
    """Recolour by luminance, from a dark to a pale tone of the hue; a fifth of the own colours stays."""
    luminance = rgb @ np.float32((0.299, 0.587, 0.114))
    tones = np.float32([hsv_to_rgb(hue / 360, *sv) for sv in ((1.0, 0.22), (0.92, 0.86), (0.25, 1.0))])
    recoloured = np.stack([np.interp(luminance, (0.0, 0.55, 1.0), tones[:, c]) for c in range(3)], -1)
    return (0.8 * recoloured + 0.2 * rgb).astype(np.float32)


def paste(background: np.ndarray, subject: np.ndarray, x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """Paste (h, w, 4) centred at fractions (x, y) of (S, S, 3); returns the picture and its alpha, (S, S) in [0, 1]."""
    size = background.shape[0]
    height, width = subject.shape[:2]
    top, left = round(y * size - height / 2), round(x * size - width / 2)
    rows = slice(max(top, 0), min(top + height, size))
    columns = slice(max(left, 0), min(left + width, size))
    part = subject[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    alpha = np.zeros((size, size), np.float32)
    alpha[rows, columns] = part[..., 3]
    picture = background.copy()
    picture[rows, columns] += part[..., 3:] * (part[..., :3] - picture[rows, columns])
    return picture, alpha


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `image` (S, S, 3) uint8, `alpha` of the subject (S, S) float32 in [0, 1], and its spec."""

    spec: SceneSpec
    image: np.ndarray
    alpha: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Pixels of the subject, (S, S) bool."""
        return self.alpha > 0.5

    @property
    def picture(self) -> Image.Image:
        """The scene as a PIL image."""
        return Image.fromarray(self.image)


def draw(spec: SceneSpec, size: int = SIZE) -> Scene:
    """Draw a scene; a pure function of the spec."""
    pose = spec.pose
    subject = cut_out(spec.look, round(pose.extent * size), pose.angle, pose.mirrored)
    picture, alpha = paste(paint(spec.background, spec.background_seed, size), subject, pose.x, pose.y)
    return Scene(spec, np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8), alpha)


def draw_empty(spec: SceneSpec, size: int = SIZE) -> np.ndarray:
    """Draw a scene without its subject, (S, S, 3) uint8: the true answer of its removal."""
    return np.rint(np.clip(paint(spec.background, spec.background_seed, size), 0, 1) * 255).astype(np.uint8)


def _rng(split: str, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((SPLITS.index(split), index, purpose))


def _hue(rng: np.random.Generator, held_out: bool) -> float:
    if held_out:
        low, high = HELD_OUT_HUES[rng.integers(len(HELD_OUT_HUES))]
        return float(rng.uniform(low, high))
    while True:
        hue = float(rng.uniform(0, 360))
        if not any(low <= hue <= high for low, high in HELD_OUT_HUES):
            return hue


def sample_look(split: str, rng: np.random.Generator, *, category: str | None = None) -> Look:
    """Draw an appearance that `split` allows; `category` fixes the category, where the split has art of it."""
    wanted = [
        (name, source)
        for name in CATEGORIES
        for source in SOURCES
        if category in (None, name) and (split == "judge" or ((name, source) in HELD_OUT_ART) == (split == "new_art"))
    ]
    name, source = wanted[rng.integers(len(wanted))]
    if split == "new_hue":
        return Look(name, source, _hue(rng, held_out=True))
    if rng.random() < 0.3:
        return Look(name, source)
    return Look(name, source, float(rng.uniform(0, 360)) if split == "judge" else _hue(rng, held_out=False))


def sample(split: str, index: int) -> SceneSpec:
    """Scene number `index` of a split; the same integer gives the same scene everywhere."""
    rng = _rng(split, index, 0)
    extent = rng.uniform(0.38, 0.66)
    margin = 0.46 * extent
    pose = Pose(
        x=float(rng.uniform(margin, 1 - margin)),
        y=float(rng.uniform(margin, 1 - margin)),
        extent=float(extent),
        angle=float(rng.uniform(-10, 10)),
        mirrored=bool(rng.random() < 0.5),
    )
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return SceneSpec(sample_look(split, rng), pose, background, int(rng.integers(2**31)))


def reference(look: Look, split: str, index: int, size: int = SIZE) -> np.ndarray:
    """A picture of a subject for the encoder: large, on a random background that has nothing to do with any scene.

    (S, S, 3) uint8. BLIP-Diffusion composes the segmented subject on a random background for the same reason: an encoder
    that sees the target scene learns to copy it (Li et al. 2023, section 3.2).
    """
    return reference_scene(look, split, index, size).image


def reference_scene(look: Look, split: str, index: int, size: int = SIZE) -> Scene:
    """The scene that `reference` shows, with the mask of its subject."""
    rng = _rng(split, index, 1)
    pose = Pose(
        x=float(rng.uniform(0.46, 0.54)),
        y=float(rng.uniform(0.46, 0.54)),
        extent=float(rng.uniform(0.6, 0.95)),
        angle=float(rng.uniform(-8, 8)),
        mirrored=bool(rng.random() < 0.5),
    )
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return draw(SceneSpec(look, pose, background, int(rng.integers(2**31))), size)
