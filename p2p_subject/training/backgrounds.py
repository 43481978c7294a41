"""The twelve named procedural backgrounds of the miniature world.

Each painter takes a NumPy generator and a side length S and returns an (S, S, 3) float32 picture in [0, 1]. Textures are
drawn at a scale that a 4x autoencoder can carry: strokes of two pixels and more, little per-pixel noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Painter = Callable[[np.random.Generator, int], np.ndarray]


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int | None = None) -> np.ndarray:
    """Smooth noise in about [0, 1], (S, S): a random grid of rows x columns cells, enlarged bicubically."""
    grid = rng.random((rows, columns or rows), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def _ramp(amount: np.ndarray, *colours: tuple[float, float, float]) -> np.ndarray:
    """Map values in [0, 1] to colours spaced evenly along it; (S, S) -> (S, S, 3)."""
    stops = np.linspace(0, 1, len(colours), dtype=np.float32)
    table = np.asarray(colours, np.float32)
    return np.stack([np.interp(amount, stops, table[:, channel]) for channel in range(3)], -1).astype(np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return y, x


def grass(rng: np.random.Generator, size: int) -> np.ndarray:
    blades = 0.6 * _noise(rng, size, 7, 22) + 0.4 * _noise(rng, size, 4)
    return _ramp(blades, (0.10, 0.36, 0.08), (0.28, 0.62, 0.16), (0.55, 0.82, 0.30))


def sand(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    ripples = np.sin(2 * np.pi * (rng.uniform(4, 6) * y + rng.uniform(-1, 1) * x) + 4 * _noise(rng, size, 4))
    return _ramp(0.5 + 0.3 * ripples, (0.76, 0.62, 0.38), (0.88, 0.76, 0.52), (0.96, 0.88, 0.68))


def snow(rng: np.random.Generator, size: int) -> np.ndarray:
    return _ramp(_noise(rng, size, 4), (0.78, 0.85, 0.95), (0.92, 0.95, 0.99), (1.0, 1.0, 1.0))


def sky(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    clouds = np.clip(2.2 * (_noise(rng, size, 4, 3) - rng.uniform(0.5, 0.65)), 0, 1)[..., None]
    return (1 - clouds) * _ramp(y, (0.22, 0.50, 0.90), (0.62, 0.82, 0.98)) + clouds


def space(rng: np.random.Generator, size: int) -> np.ndarray:
    nebula = _ramp(0.8 * _noise(rng, size, 3), (0.02, 0.02, 0.10), (0.07, 0.04, 0.20), (0.24, 0.08, 0.36))
    y, x = _grid(size)
    for cy, cx, brightness in rng.uniform((0, 0, 0.4), (1, 1, 1), (14, 3)):
        star = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (0.9 / 64) ** 2))
        nebula = nebula + brightness * star[..., None]
    return nebula


def water(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    waves = np.sin(2 * np.pi * (rng.uniform(6, 9) * y + 0.25 * np.sin(2 * np.pi * (2 * x + rng.random()))))
    amount = 0.5 + 0.25 * waves + 0.3 * (_noise(rng, size, 5) - 0.5)
    return _ramp(amount, (0.02, 0.28, 0.52), (0.06, 0.48, 0.70), (0.45, 0.80, 0.90))


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    rows = 8
    row = np.floor(y * rows)
    along = x * 4 + 0.5 * (row % 2) + rng.random()
    tone = rng.random((rows, 6), dtype=np.float32)[row.astype(int), np.floor(along).astype(int) % 6]
    mortar = (np.mod(y * rows, 1) < 0.2) | (np.mod(along, 1) < 0.1)
    return np.where(mortar[..., None], np.float32(0.80), _ramp(tone, (0.56, 0.20, 0.14), (0.76, 0.34, 0.24)))


def wood(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    plank = np.floor(y * 5)
    shade = rng.random(5, dtype=np.float32)[plank.astype(int)]
    grain = np.sin(2 * np.pi * (3 * y * 5 + 1.5 * _noise(rng, size, 5, 3)))
    amount = 0.25 + 0.4 * shade + 0.12 * grain - 0.35 * (np.mod(y * 5, 1) < 0.12)
    return _ramp(np.clip(amount, 0, 1), (0.28, 0.15, 0.06), (0.55, 0.34, 0.16), (0.78, 0.56, 0.32))


def tiles(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    count = 4
    fy, fx = y * count + rng.random(), x * count + rng.random()
    odd = (np.floor(fy) + np.floor(fx)) % 2
    grout = (np.mod(fy, 1) < 0.1) | (np.mod(fx, 1) < 0.1)
    colours = _ramp(odd.astype(np.float32), (0.90, 0.90, 0.86), (0.52, 0.62, 0.68))
    return np.where(grout[..., None], np.float32(0.36), colours)


def lava(rng: np.random.Generator, size: int) -> np.ndarray:
    crack = np.abs(_noise(rng, size, 6) - 0.5) * 2
    return _ramp(np.clip(1 - 2.2 * crack, 0, 1), (0.12, 0.05, 0.05), (0.72, 0.14, 0.02), (1.0, 0.72, 0.12))


def leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    points = rng.random((34, 2), dtype=np.float32)
    distance = np.hypot(y[..., None] - points[:, 0], (x[..., None] - points[:, 1]) * rng.uniform(0.8, 1.2))
    nearest = distance.argmin(-1)
    tone = rng.random(34, dtype=np.float32)[nearest] - 3.0 * np.take_along_axis(distance, nearest[..., None], -1)[..., 0]
    return _ramp(np.clip(0.45 + 0.6 * tone, 0, 1), (0.04, 0.16, 0.06), (0.20, 0.40, 0.08), (0.58, 0.56, 0.12))


def sunset(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    horizon = rng.uniform(0.7, 0.85)
    picture = _ramp(np.clip(y / horizon, 0, 1), (0.28, 0.14, 0.44), (0.80, 0.30, 0.42), (0.99, 0.66, 0.30))
    disc = np.clip(12 * (0.14 - np.hypot(y - horizon, x - rng.uniform(0.15, 0.85))), 0, 1)[..., None]
    picture = (1 - disc) * picture + disc * np.float32((1.0, 0.92, 0.55))
    ground = np.clip((y - horizon) * 40, 0, 1)[..., None]
    return (1 - ground) * picture + ground * np.float32((0.16, 0.08, 0.18))


PAINTERS: dict[str, Painter] = {
    painter.__name__: painter for painter in (grass, sand, snow, sky, space, water, bricks, wood, tiles, lava, leaves, sunset)
}

PHRASES: dict[str, str] = {name: f"on {name}" for name in PAINTERS} | {
    "sky": "in the sky",
    "space": "in space",
    "sunset": "at sunset",
}


def paint(name: str, seed: int, size: int) -> np.ndarray:
    """Paint background `name` of side `size`; (S, S, 3) float32 in [0, 1]. The same seed gives the same picture."""
    rng = np.random.default_rng(seed)
    picture = PAINTERS[name](rng, size) * rng.uniform(0.9, 1.08) + rng.uniform(-0.03, 0.03, 3)
    return np.clip(picture, 0, 1).astype(np.float32)
