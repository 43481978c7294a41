"""Measures of pictures, masks and samples of results. Pure functions on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures (H, W, 3), in dB; higher is closer, infinite when equal.

    With `mask` (H, W) bool only its pixels count and the error is averaged over them, so the figure does not depend on the
    mask's area. Raises `ValueError` for pictures or masks that do not fit, and for a mask without pixels.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"pictures {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected uint8 of one shape")
    squared = (a.astype(np.float64) - b) ** 2
    if mask is not None:
        if mask.shape != a.shape[:2] or mask.dtype != bool or not mask.any():
            raise ValueError(f"mask {mask.dtype} {mask.shape}; expected bool {a.shape[:2]} with a pixel or more")
        squared = squared[mask]
    error = squared.mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks (H, W), 0 to 1; higher is closer, 1 when both are empty."""
    if a.shape != b.shape or a.dtype != bool or b.dtype != bool:
        raise ValueError(f"masks {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected bool of one shape")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def interval(values: Sequence[float], *, share: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, in their unit; the same seed gives the same interval.

    Raises `ValueError` without values.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"values of shape {sample.shape}; expected a list of one or more")
    chosen = np.random.default_rng(seed).integers(0, len(sample), (draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Line:
    """A line of the table: the mean of `field` over the rows of `group`; thresholds in the field's unit, None: none set.

    `failed` is what a case that raised an error counts as; None leaves it out, for times and costs.
    """

    title: str
    group: str
    field: str
    first: float | None = None
    goal: float | None = None
    failed: float | None = 0.0


@dataclass(frozen=True)
class Figure:
    """A measured line: mean, 95 % bootstrap interval, number of cases and how many of them raised an error."""

    title: str
    value: float
    low: float
    high: float
    count: int
    errors: int
    first: float | None
    goal: float | None


def summarise(line: Line, rows: Sequence[dict]) -> Figure | None:
    """Measure a line on the rows of its group (those with "error" failed); None where no row has a value."""
    own = [row for row in rows if row["group"] == line.group]
    values = [line.failed if "error" in row else row.get(line.field) for row in own]
    values = [float(value) for value in values if value is not None]
    if not values:
        return None
    errors = sum("error" in row for row in own)
    return Figure(line.title, float(np.mean(values)), *interval(values), len(values), errors, line.first, line.goal)


def table(figures: Sequence[Figure]) -> str:
    """The figures as text, one a line: value, interval, n, errors, thresholds and whether the first one is met."""
    width = max((len(figure.title) for figure in figures), default=0)
    text = [f"{'figure':{width}}  {'value':>8}  {'95 % interval':>17}  {'n':>5}  errors  {'first':>6}  {'goal':>6}"]
    for f in figures:
        thresholds = "  ".join(f"{'' if value is None else f'{value:g}':>6}" for value in (f.first, f.goal))
        met = "" if f.first is None else ("  goal met" if f.goal and f.value >= f.goal else "  met" if f.value >= f.first else "  NOT MET")
        text.append(
            f"{f.title:{width}}  {f.value:8.3f}  {f.low:8.3f}-{f.high:8.3f}  {f.count:5d}  {f.errors:6d}  {thresholds}{met}"
        )
    return "\n".join(text)
