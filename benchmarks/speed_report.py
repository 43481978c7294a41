"""The figures of `benchmarks.speed` with their bounds, as tables and as a plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
MIB = 2**20
LABELS = {
    "step plain-2": "plain call, 2 rows",
    "step recorded-2": "controlled call, recorded source, 2 rows",
    "step plain-3": "plain call, 3 rows",
    "step edit-3": "controlled call, 3 rows",
    "step plain-4": "plain call, 4 rows",
    "step explicit-4": "call with explicit maps, 4 rows",
    "run generate": "plain generation of one picture",
    "run edit-recorded": "edit of a recorded source",
    "run edit-generated": "edit of a generated source",
    "run edit-inverted": "edit of an inverted source",
    "run published": "published loop (source and edit)",
    "run published-fused": "published loop, maps not needed left out",
    "run generate-4": "plain generation of four pictures",
    "run edit-recorded-4": "four edits of a recorded source",
    "run record": "recording a source",
    "peak plain-2": "plain generation, 2 rows",
    "peak recorded-2": "edit of a recorded source, 2 rows",
    "peak plain-3": "plain generation, 3 rows",
    "peak edit-3": "edit, 3 rows",
    "peak plain-4": "plain generation, 4 rows",
    "peak explicit-4": "published loop, 4 rows",
}
PLAIN, OURS, PEER = "#8a8f98", "#1f6feb", "#d1793b"


@dataclass(frozen=True)
class Figure:
    """A measured value, as text, its bound, and whether the bound is kept (None: there is none, or no value)."""

    title: str
    measured: str
    bound: str = ""
    met: bool | None = None


class Results:
    """The rows of one setting by case."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.cases: dict[str, dict[int, Row]] = {}
        for row in rows:
            self.cases.setdefault(row["case"], {})[row["round"]] = row

    def values(self, case: str, key: str) -> list[float]:
        """The values of all rounds."""
        return [row[key] for row in self.cases.get(case, {}).values() if key in row]

    def middle(self, case: str, key: str = "seconds") -> float | None:
        """The median over the rounds."""
        return median(self.values(case, key)) if self.values(case, key) else None

    def ratios(self, case: str, other: str) -> list[float]:
        """Seconds of a case over those of another in the same round, for all rounds."""
        ours, theirs = self.cases.get(case, {}), self.cases.get(other, {})
        return [ours[number]["seconds"] / theirs[number]["seconds"] for number in sorted(ours.keys() & theirs.keys())]


def _ratio(
    title: str, results: Results, case: str, other: str, low: float = 0.0, high: float | None = None, factor: float = 1.0
) -> list[Figure]:
    ratios = [ratio / factor for ratio in results.ratios(case, other)]
    if not ratios:
        return []
    value, most = median(ratios), math.inf if high is None else high
    bound = ", ".join(text for text, given in ((f">= {low:g}", low > 0), (f"<= {most:g}", most < math.inf)) if given)
    measured = f"{value:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return [Figure(title, measured, bound, low <= value <= most if bound else None)]


def _published(title: str, results: Results, case: str, other: str, low: float = 0.0) -> list[Figure]:
    """A ratio to the published loop; refused unless the outputs are equal."""
    checked = next(iter(results.cases.get("equality", {}).values()), None)
    figures = _ratio(title, results, case, other, low)
    if checked is not None and checked["equal"]:
        return figures
    why = "outputs were not compared" if checked is None else f"outputs differ by {checked['deviation']:.1e}"
    return [Figure(title, f"refused: {why}", figure.bound, False) for figure in figures]


def _peak(title: str, results: Results, case: str, plain: str, high: float | None = None, key: str = "peak") -> list[Figure]:
    ours, theirs = results.middle(case, key), results.middle(plain, key)
    if ours is None or not theirs:
        return []
    share = ours / theirs - 1
    measured = f"{100 * share:+.1f} % ({(ours - theirs) / MIB:+.1f} MiB)"
    return [Figure(title, measured, "" if high is None else f"<= {100 * high:g} %", None if high is None else share <= high)]


def _rows(title: str, results: Results, case: str, expected: int, steps: int) -> list[Figure]:
    rows = set(results.values(case, "rows"))
    a_step = [total / steps for total in sorted(rows)]
    return [Figure(title, ", ".join(f"{x:.2f}" for x in a_step), f"{expected}", a_step == [expected])] if rows else []


def _equality(results: Results) -> list[Figure]:
    return [
        Figure(
            "published loop against ours: largest difference of latents",
            f"{row['deviation']:.1e} (the edit changes {row['changed']:.2g})",
            f"<= {row['bound']:g}",
            row["equal"],
        )
        for row in results.cases.get("equality", {}).values()
    ]


def _startup(results: Results) -> list[Figure]:
    figures = []
    for row in list(results.cases.get("startup inversion", {}).values())[:1]:
        seconds, whole = results.middle("startup inversion"), results.middle("startup inversion", "seconds_with_torch")
        alone = not row["beside_torch"]
        beside = "torch only" if alone else "with " + ", ".join(row["beside_torch"])
        measured = f"{seconds:.2f} s beyond torch, {whole:.2f} s with it; {beside}"
        figures.append(Figure("import inversion", measured, "< 0.5 s beyond torch, torch only", seconds < 0.5 and alone))
    for row in list(results.cases.get("startup help", {}).values())[:1]:
        seconds, alone = results.middle("startup help"), not row["torch"]
        measured = f"{seconds:.2f} s, {'without' if alone else 'with'} torch"
        figures.append(Figure("p2p-subject --help, as a process", measured, "< 0.5 s, without torch", seconds < 0.5 and alone))
    return figures


def figures(rows: Sequence[Row], device: str, steps: int) -> list[Figure]:
    """The figures that the rows of one setting give."""
    r, most = Results(rows), 1.03 if device.startswith("cuda") else 1.05
    return [
        *_ratio("controlled call / plain call, 3 rows each", r, "step edit-3", "step plain-3", high=most),
        *_ratio("the same, recorded source, 2 rows each", r, "step recorded-2", "step plain-2", high=most),
        *_ratio("call with explicit maps / plain call, 4 rows each", r, "step explicit-4", "step plain-4"),
        *_rows("U-Net rows a step: edit of a generated source", r, "run edit-generated", 3, steps),
        *_rows("U-Net rows a step: edit of an inverted source", r, "run edit-inverted", 3, steps),
        *_rows("U-Net rows a step: edit of a recorded source", r, "run edit-recorded", 2, steps),
        *_rows("U-Net rows a step: published loop", r, "run published", 4, steps),
        *_equality(r),
        *_published("published loop / edit of a recorded source", r, "run published", "run edit-recorded", 3.5),
        *_published("published loop / edit of a generated source", r, "run published", "run edit-generated"),
        *_published("published loop, maps not needed left out / recorded", r, "run published-fused", "run edit-recorded"),
        *_ratio("edit of a recorded source / generation", r, "run edit-recorded", "run generate", 0.95, 1.05),
        *_ratio("edit of an inverted source / generation", r, "run edit-inverted", "run generate"),
        *_ratio("4 edits of it / generation of 4 pictures", r, "run edit-recorded-4", "run generate-4", 0.95, 1.05),
        *_ratio("4 edits of it / 4 x generation of one", r, "run edit-recorded-4", "run generate", factor=4),
        *_ratio("recording a source / generation", r, "run record", "run generate"),
        *_peak("extra peak memory over plain, 3 rows: edit", r, "peak edit-3", "peak plain-3", 0.02),
        *_peak("extra peak memory over plain, 2 rows: recorded", r, "peak recorded-2", "peak plain-2", 0.02),
        *_peak("extra peak memory over plain, 4 rows: published", r, "peak explicit-4", "peak plain-4"),
        *_peak("extra that torch allocates in a call, 3 rows: edit", r, "peak edit-3", "peak plain-3", 0.02, "allocated"),
        *_peak("the same, 2 rows: recorded", r, "peak recorded-2", "peak plain-2", 0.02, "allocated"),
        *_peak("the same, 4 rows: published", r, "peak explicit-4", "peak plain-4", key="allocated"),
        *_startup(r),
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _medians(rows: Sequence[Row], steps: int) -> list[list[str]]:
    results, lines = Results(rows), [["case", "seconds", "rows", "rows a step", "peak, MiB", "a call, MiB", "recording, MiB"]]
    for case in (case for case in LABELS if case in results.cases):
        seconds, count = results.middle(case), results.middle(case, "rows")
        a_step = count / steps if count is not None and case.startswith("run") else None
        sizes = [results.middle(case, key) for key in ("peak", "allocated", "recording")]
        cells = [(seconds, ".4g"), (count, "g"), (a_step, ".2f"), *((size and size / MIB, ".1f") for size in sizes)]
        lines.append([LABELS[case], *["" if value is None else format(value, spec) for value, spec in cells]])
    return lines


def report(results: Mapping[Any, Sequence[Row]]) -> str:
    """For each setting: the medians of its cases, and the figures beside their bounds."""
    texts = []
    for settings, rows in results.items():
        if not rows:
            continue
        place = rows[0]["environment"]
        where = place.get("gpu", f"{place['machine']}, {settings.threads} threads")
        versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
        if settings.model != "none":
            texts.append(f"{settings.model}, {settings.steps} steps, {settings.dtype} on {where}; {versions}")
        medians = _medians(rows, settings.steps)
        if len(medians) > 1:
            texts.append(_table(medians))
        found = figures(rows, settings.device, settings.steps)
        verdicts = {None: "", True: "met", False: "NOT MET"}
        lines = [[figure.title, figure.measured, figure.bound, verdicts[figure.met]] for figure in found]
        if lines:
            texts.append(_table([["figure", "measured (lowest to highest round)", "bound", ""], *lines]))
    return "\n\n".join(texts)


def plot(results: Mapping[Any, Sequence[Row]], path: Path) -> None:
    """Draw seconds and peaks of memory, a row of panels a setting; without matplotlib, say so and draw nothing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        print(f"no plot: {path} needs matplotlib; install the extra p2p_subject[benchmarks]", file=sys.stderr)
        return
    shown = {settings: Results(rows) for settings, rows in results.items() if settings.model != "none" and rows}
    seconds = ("seconds a U-Net call", "step", "seconds", 1), ("seconds a run", "run", "seconds", 1)
    panels = (*seconds, ("peak over the model, MiB", "peak", "peak", MIB))
    if not shown:
        return
    canvas = Canvas(figsize=(18, 0.8 + 3.6 * len(shown)), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(len(shown), len(panels), squeeze=False)
    for line, (settings, own) in zip(grid, shown.items()):
        for axes, (title, group, key, unit) in zip(line, panels):
            cases = [case for case in LABELS if case.startswith(group + " ") and own.values(case, key)]
            axes.set_visible(bool(cases))
            _bars(axes, own, cases, key, unit)
            axes.set_title(f"{settings.model}, {settings.dtype}, {settings.device}: {title}", fontsize=10, loc="left")
    canvas.savefig(path, dpi=110)


def _bars(axes: Any, results: Results, cases: Sequence[str], key: str, unit: float) -> None:
    values = [results.middle(case, key) / unit for case in cases]
    spread = [[x / unit for x in results.values(case, key)] for case in cases]
    errors = [[v - min(s) for v, s in zip(values, spread)], [max(s) - v for v, s in zip(values, spread)]]
    labels = [LABELS[case] for case in cases]
    bars = axes.barh(labels, values, xerr=errors, color=[_colour(label) for label in labels], error_kw={"lw": 1})
    axes.bar_label(bars, fmt="{:.3g}", padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(label: str) -> str:
    if label.startswith("plain"):
        return PLAIN
    return PEER if "published" in label or "explicit" in label else OURS
