"""The figures of `benchmarks.figures`: lines, their thresholds, and the table made of them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.statistics import mean


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
    """A measured line: mean, 95 % interval (Wilson's of shares of cases), number of cases and of those that raised an error."""

    title: str
    value: float
    low: float
    high: float
    count: int
    errors: int
    first: float | None
    goal: float | None


LINES = (
    Line("VAE reconstruction, test scenes: PSNR, dB", "real test", "psnr", 27, 30),
    Line("judge on real scenes, test: category and look", "real test", "both", 0.97),
    Line("judge on real scenes, new hue: category and look", "real new_hue", "both", 0.97),
    Line("judge on real scenes, new art: category and look", "real new_art", "both", 0.97),
    Line("judge on VAE reconstructions, test: category and look", "real test", "rebuilt_both"),
    Line("judge on VAE reconstructions, new hue: category and look", "real new_hue", "rebuilt_both"),
    Line("judge on VAE reconstructions, new art: category and look", "real new_art", "rebuilt_both"),
    Line("caption only: right category", "caption", "category", 0.90, 0.97),
    Line("caption only: right background", "caption", "background", 0.98, 1.0),
    Line("subject in new hue: right category", "subject new_hue", "category"),
    Line("subject in new hue: right category and look", "subject new_hue", "both", 0.70, 0.95),
    Line("subject in new hue: right background", "subject new_hue", "background", 0.98, 1.0),
    Line("subject of held-out art: right category", "subject new_art", "category"),
    Line("subject of held-out art: right category and look", "subject new_art", "both", None, 0.80),
    Line("subject of held-out art: right background", "subject new_art", "background", 0.98, 1.0),
    Line("subject of a known look: right category", "subject test", "category"),
    Line("subject of a known look: right category and look", "subject test", "both"),
    Line("subject of a known look: right background", "subject test", "background", 0.98, 1.0),
    Line("default mask, inverted test scenes: IoU", "mask test", "iou", 0.85, 0.92),
    Line("default mask, inverted scenes of held-out art: IoU", "mask new_art", "iou"),
    Line("default mask on the twin, test scenes: IoU", "mask twin test", "iou", 0.70, 0.85),
    Line("swap: right category", "swap", "category"),
    Line("swap: right category and look", "swap", "both", 0.70, 0.90),
    Line("swap: right background", "swap", "background", 0.98, 1.0),
    Line("swap, nothing pasted back: right category and look", "swap", "unpasted_both"),
    Line("swap: IoU of the mask with old and new subject", "swap", "iou"),
    Line("swap, nothing pasted back: background PSNR, dB", "swap", "psnr"),
    Line("the same of the VAE reconstruction, dB", "swap", "rebuilt_psnr"),
    Line("swap: background bit-exact outside the mask", "swap", "exact"),
    Line("no edit (the source): right category and look", "swap", "copy_both"),
    Line("true edited scene: right category and look", "swap", "truth_both"),
    Line("caption with tint instead of the swap: right category", "swap by caption", "category"),
    Line("caption with tint instead of the swap: category and look", "swap by caption", "both"),
    Line("caption with tint instead of the swap: background", "swap by caption", "background"),
    Line("U-Net rows a step of an edit", "swap", "rows", failed=None),
    Line("inversion, s", "swap", "invert_seconds", failed=None),
    Line("inversion and edit, s", "swap", "seconds", 10, 5, failed=None),
)
"""The table, with the thresholds and the goals that were set before the figures were known."""


def summarise(line: Line, rows: Sequence[dict]) -> Figure | None:
    """Measure a line on the rows of its group (those with "error" failed); None where no row has a value."""
    own = [row for row in rows if row["group"] == line.group]
    values = [line.failed if "error" in row else row.get(line.field) for row in own]
    values = [float(value) for value in values if value is not None]
    if not values:
        return None
    errors = sum("error" in row for row in own)
    found = mean(values, share=any(isinstance(row.get(line.field), bool) for row in own))
    return Figure(line.title, found.value, found.low, found.high, found.count, errors, line.first, line.goal)


def table(figures: Sequence[Figure]) -> str:
    """The figures as text, one a line: value, interval, n, errors, thresholds and whether the first one is met."""
    width = max((len(figure.title) for figure in figures), default=0)
    text = [f"{'figure':{width}}  {'value':>8}  {'95 % interval':>17}  {'n':>5}  errors  {'first':>6}  {'goal':>6}"]
    for f in figures:
        thresholds = "  ".join(f"{'' if value is None else f'{value:g}':>6}" for value in (f.first, f.goal))
        measured = f"{f.title:{width}}  {f.value:8.3f}  {f.low:8.3f}-{f.high:8.3f}  {f.count:5d}  {f.errors:6d}"
        text.append(f"{measured}  {thresholds}  {standing(f)}".rstrip())
    return "\n".join(text)


def standing(figure: Figure) -> str:
    """Which threshold a figure meets: "goal", "met" (the first one), "NOT MET", or nothing without a first one.

    Higher is better, unless the goal is below the first threshold.
    """
    sign = -1 if figure.first is not None and figure.goal is not None and figure.goal < figure.first else 1
    if figure.goal is not None and sign * figure.value >= sign * figure.goal:
        return "goal"
    if figure.first is None:
        return ""
    return "met" if sign * figure.value >= sign * figure.first else "NOT MET"


def pivot(rows: Sequence[dict], by: str, fields: Sequence[str]) -> str:
    """Means of `fields` for each value of `by`, as text; rows with an error count as 0 and are counted."""
    names = list(dict.fromkeys(row[by] for row in rows if by in row))
    errors = [row for row in rows if "error" in row]
    width = max(map(len, names), default=0)
    text = [f"{by:{width}}  {'n':>4}" + "".join(f"  {name:>5}" for name in fields)]
    for name in names:
        own = [row for row in rows if row.get(by) == name]
        means = [sum(row[key] for row in own) / (len(own) + len(errors)) for key in fields]
        cells = [f"  {value:{max(len(key), 5)}.3f}" for key, value in zip(fields, means)]
        text.append("".join([f"{name:{width}}  {len(own):4d}", *cells]))
    return "\n".join([*text, f"cases that raised an error: {len(errors)}"])


def results(rows: Sequence[dict]) -> tuple[list[Figure], list[str]]:
    """All that rows say: the figures and, as texts, their table, IoU by rule and threshold, and the settings of a sweep.

    A field that holds a dict has a value for each threshold.
    """
    figures = [figure for line in LINES if (figure := summarise(line, rows))]
    texts = [table(figures)] if figures else []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        errors = [row for row in own if "error" in row]
        each = [{"rule": name} | value for row in own for name, value in row.items() if isinstance(value, dict)]
        if each:
            texts.append(f"{group}: IoU by threshold\n" + pivot(each + errors, "rule", list(each[0])[1:]))
        if any("setting" in row for row in own):
            texts.append(pivot(own, "setting", ("both", "category", "background", "iou", "psnr")))
    return figures, texts
