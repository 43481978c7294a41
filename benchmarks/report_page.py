"""The page of a report: one HTML file with its tables, plots and pictures inlined."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.report_tables import Section, Table, label, leading, mean_of, worst_first
from benchmarks.run_folder import Row
from benchmarks.suite import Measure, Suite
from p2p_subject.errors import ArgumentError
from p2p_subject.viz import Panel, contact_sheet

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SIDE = 256
"""Larger side in pixels from which pictures are shrunk for the page; the whole ones are in the folder."""
ASKED = ("source", "reference0", "true_mask", "truth")
CAPTIONS = {"source": "source", "reference0": "subject", "true_mask": "true region", "truth": "true answer"}


def inlined(path: Path) -> str:
    """A picture file as a data address: small ones as they are, larger ones shrunk."""
    with Image.open(path) as picture:
        if max(picture.size) <= SIDE and picture.format == "PNG":
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(
    folder: Path,
    suite: type[Suite],
    facts: Sequence[str],
    overview: Sequence[Table],
    sections: Sequence[Section],
    plots: Mapping[str, bytes | None],
    against: str,
    shown: int,
    star: str,
) -> str:
    """The whole page. Raises `ArgumentError` without jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ArgumentError("the page needs jinja2; install the extra p2p_subject[benchmarks]") from error
    # Everything that is inserted is escaped: prompts and errors come from anywhere.
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text())
    shown_sections = [
        {
            "kind": section.kind,
            "count": section.cases,
            "tables": (*section.tables, section.rest),
            "leading": leading(section.rows, against),
            "plot": None if plots[section.kind] is None else base64.b64encode(plots[section.kind]).decode(),
            "cases": [case_view(folder, suite, section, case) for case in worst_first(section, suite, against)[:shown]],
        }
        for section in sections
    ]
    about = [(measure.title, measure.about) for measure in suite.measures if measure.about]
    return template.render(suite=suite.name, facts=facts, overview=overview, sections=shown_sections, about=about, star=star)


def case_view(folder: Path, suite: type[Suite], section: Section, case: str) -> dict[str, Any]:
    """One case as the page shows it: what was asked, and what each method returned."""
    rows = section.of_case(case)
    first = telling(rows)
    asked = [{"caption": caption, "picture": inlined(folder / path)} for caption, path in asked_of(first)]
    return {
        "id": case,
        "prompts": [first.get("prompt", ""), first.get("target_prompt", "")],
        "asked": asked,
        "edits": [edit_view(folder, suite, name, row) for name, row in rows.items()],
    }


def telling(rows: Mapping[str, Row]) -> Row:
    """A row of a case that says what was asked: one whose process died does not."""
    return next((row for row in rows.values() if "prompt" in row), next(iter(rows.values())))


def asked_of(row: Row) -> list[tuple[str, str]]:
    """Captions and paths of the pictures that say what a row's case asked for."""
    pictures = row.get("pictures", {})
    return [(CAPTIONS[name], pictures[name]) for name in ASKED if name in pictures]


def sheet(folder: Path, suite: type[Suite], section: Section, against: str, rows: int = 8) -> Image.Image | None:
    """What the methods returned for some cases, evenly from the one that `against` did worst on to its best; None without
    pictures. A method has its column, which is blank where it has no picture."""
    axes = axes_of(suite)
    order = worst_first(section, suite, against)
    count = min(rows, len(order))
    cases = [order[round(at * (len(order) - 1) / max(1, count - 1))] for at in range(count)]
    of_cases = [section.of_case(case) for case in cases]
    shown = [name for name in section.rows if any("edited" in own.get(name, {}).get("pictures", {}) for own in of_cases)]
    panels = []
    for own in of_cases:
        asked = [(text, Image.open(folder / path)) for text, path in asked_of(telling(own))]
        panels.append([*asked, *(made_panel(folder, name, own.get(name, {}), axes) for name in shown)])
    measured = ", ".join(measure.title for measure in axes)
    title = f"{section.kind}: from the worst of {leading(section.rows, against)} to its best; {measured}"
    return contact_sheet(panels, panel=112, title=title) if any(panels) else None


def made_panel(folder: Path, name: str, row: Row, axes: Sequence[Measure]) -> Panel:
    """Caption and picture of what a method returned; blank where there is nothing."""
    if "edited" not in row.get("pictures", {}):
        return f"{name}: {'failed' if 'error' in row else '-'}", Image.new("RGB", (8, 8), "white")
    values = [short(measure, row["metrics"].get(measure.name), named=False) for measure in axes]
    return f"{label(name, row)}: {', '.join(filter(None, values))}", Image.open(folder / row["pictures"]["edited"])


def axes_of(suite: type[Suite]) -> list[Measure]:
    """The measures of fidelity and of preservation."""
    return suite.named(suite.axes.fidelity, suite.axes.preservation)


def edit_view(folder: Path, suite: type[Suite], name: str, row: Row) -> dict[str, Any]:
    """What one method returned for a case: its pictures, its two headline values, or its error."""
    pictures = row.get("pictures", {})
    return {
        "caption": label(name, row),
        "edited": inlined(folder / pictures["edited"]) if "edited" in pictures else None,
        "mask": inlined(folder / pictures["mask"]) if "mask" in pictures else None,
        "values": [text for measure in axes_of(suite) if (text := short(measure, row["metrics"].get(measure.name)))],
        "error": row.get("error"),
    }


def short(measure: Measure, value: float | None, named: bool = True) -> str:
    """A value with its unit and its measure's name, for under a picture; nothing without a value."""
    return "" if value is None else f"{measure.title if named else ''} {measure.scale * value:.3g} {measure.unit}".strip()


def plot(section: Section, suite: type[Suite]) -> bytes | None:
    """Fidelity against preservation, as returned and before original pixels were put back, and against cost: a point a method
    with its intervals, as PNG; None without points."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("plots need matplotlib; install the extra p2p_subject[benchmarks]") from error
    fidelity, *preservation = suite.named(*suite.axes.shown)
    panels = [*preservation, *suite.named(suite.axes.cost)]
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    # Of every method once: each is a bootstrap.
    means = {
        name: {measure.name: mean_of(own, measure, suite)[0] for measure in (fidelity, *panels)}
        for name, own in section.rows.items()
    }
    points = {}
    for axes, across in zip(figure.subplots(1, len(panels)), panels):
        for number, (name, own) in enumerate(section.rows.items()):
            x, y = means[name][across.name], means[name][fidelity.name]
            if x is None or y is None:
                continue
            # Rounding may put the end of an interval without width on the wrong side of its mean.
            ends = [(m.scale, v.value - v.low, v.high - v.value) for m, v in ((across, x), (fidelity, y))]
            errors = [[[scale * max(0.0, low)], [scale * max(0.0, high)]] for scale, low, high in ends]
            points[label(name, *own.values())] = axes.errorbar(
                across.scale * x.value,
                fidelity.scale * y.value,
                xerr=errors[0],
                yerr=errors[1],
                marker="os^DvP*X<>ph"[number % 12],
                color=f"C{number % 10}",
                markersize=8,
                elinewidth=0.8,
                linestyle="",
            )
        axes.set_xlabel(f"{across.title}{f', {across.unit}' if across.unit else ''}", fontsize=9)
        axes.set_ylabel(fidelity.title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if not points:
        return None
    figure.legend(list(points.values()), list(points), loc="outside right center", fontsize=8, frameon=False)
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same rows give the same file.
    figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    return buffer.getvalue()
