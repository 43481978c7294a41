"""Tables and plot of `benchmarks.finetuning`: fidelity against steps, and what equal fidelity costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import interval
from p2p_subject.outputs import atomic_path

Row = dict[str, Any]
FIGURES = ("fidelity", "category", "look", "background", "likeness")
REACHED = (40, 80)
"""Steps of ours whose fidelity the others are to reach."""
CLAIM = "The paper: up to 20 times fewer steps than DreamBooth."


def label(row: Row) -> str:
    """The method of a row, with its rate where rates are compared."""
    return f"{row['method']} {row['rate']:g}" if row["tuning"] else row["method"]


def grouped(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Rows by label and by steps, in their order."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(label(row), {}).setdefault(row["steps"], []).append(row)
    return {name: dict(sorted(by_steps.items())) for name, by_steps in found.items()}


def mean(rows: Sequence[Row], field: str) -> float:
    """Mean of a field over rows."""
    return float(np.mean([row[field] for row in rows]))


def first_reaching(by_steps: dict[int, list[Row]], target: float, field: str = "fidelity") -> int | None:
    """The first measured number of steps at which the mean of `field` is `target` or more; None where it never is."""
    return next((steps for steps, rows in by_steps.items() if mean(rows, field) >= target), None)


def tables(rows: Sequence[Row], ceiling: Row) -> list[str]:
    """The figures of every method at every milestone, and the steps and seconds to equal fidelity."""
    groups = grouped(rows)
    return [_figures(groups, ceiling), *([_costs(groups)] if any(name.startswith("ours") for name in groups) else [])]


def _figures(groups: dict[str, dict[int, list[Row]]], ceiling: Row) -> str:
    width = max(map(len, [*groups, "the judge's ceiling"]))
    lines = [
        f"{'method':{width}}{'steps':>7}{'fidelity (95 %)':>19}"
        + "".join(f"{name:>12}" for name in FIGURES[1:])
        + f"{'seconds':>9}"
    ]
    for name, by_steps in groups.items():
        for steps, own in by_steps.items():
            low, high = interval([row["fidelity"] for row in own])
            fidelity = f"{mean(own, 'fidelity'):.2f} ({low:.2f}-{high:.2f})"
            others = "".join(f"{mean(own, field):>12.2f}" for field in FIGURES[1:])
            lines.append(f"{name:{width}}{steps:>7}{fidelity:>19}{others}{mean(own, 'cpu_seconds'):>9.1f}")
    best = "".join(f"{ceiling[field]:>12.2f}" for field in FIGURES[1:])
    lines.append(f"{'real, reconstructed':{width}}{'':>7}{ceiling['fidelity']:>19.2f}{best}")
    return "\n".join(lines)


def _costs(groups: dict[str, dict[int, list[Row]]]) -> str:
    lines = [f"Steps, and seconds of one core, to the fidelity of ours. {CLAIM}"]
    for name, by_steps in groups.items():
        for steps in REACHED:
            if not name.startswith("ours") or steps not in by_steps:
                continue
            target, seconds = mean(by_steps[steps], "fidelity"), mean(by_steps[steps], "cpu_seconds")
            lines.append(f"{name} at {steps} steps, {seconds:.1f} s: fidelity {target:.2f}")
            for other, theirs in groups.items():
                if other.startswith("ours"):
                    continue
                reached = first_reaching(theirs, target)
                if reached is None:
                    lines.append(f"  {other}: not in {max(theirs)} steps")
                    continue
                spent = mean(theirs[reached], "cpu_seconds")
                lines.append(f"  {other}: {reached} steps ({reached / steps:.1f} x), {spent:.1f} s ({spent / seconds:.1f} x)")
    return "\n".join(lines)


def plot(rows: Sequence[Row], ceiling: Row, path: Path) -> None:
    """Draw fidelity and background against steps and against seconds; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    kinds = (("steps", "fidelity"), ("cpu_seconds", "fidelity"), ("steps", "background"))
    titles = {"steps": "steps of 3 pictures", "cpu_seconds": "seconds of one core"}
    for axes, (along, field) in zip(panels, kinds):
        for name, by_steps in grouped(rows).items():
            x, y = ([mean(own, key) for own in by_steps.values()] for key in (along, field))
            (line,) = axes.plot(x, y, marker="o", markersize=3, label=name)
            bounds = [interval([row[field] for row in own]) for own in by_steps.values()]
            axes.fill_between(x, *zip(*bounds), color=line.get_color(), alpha=0.12, linewidth=0)
        axes.axhline(ceiling[field], color="grey", linestyle=":", label="real, reconstructed")
        axes.set_xscale("symlog", linthresh=20 if along == "steps" else 5)
        axes.set(xlabel=titles[along], ylim=(-0.03, 1.03))
        axes.set_title({"fidelity": "right category and look", "background": "right background"}[field])
    panels[0].legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
