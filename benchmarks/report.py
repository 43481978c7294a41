"""The report of a run: tables as Markdown, and a page with the pictures side by side, worst cases first.

    python -m benchmarks.report runs/x

Writes `report.md`, `report.html` (one file that needs no other), `plots/` and `sheets/` (pictures of cases, evenly from the
worst to the best) into the folder and prints the tables. A run of several kinds of edit has an overview of them. Where
methods have run different cases, a table of those that all have says how they compare. It reads what is there, so a run
under way can be looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report_page import page, plot, sheet
from benchmarks.report_tables import Section, Table, markdown, overview_of, sections
from benchmarks.run_folder import Row, file_name, read_rows, read_settings
from benchmarks.suite import Suite
from benchmarks.suites import suite_class
from p2p_subject.errors import ArgumentError, P2PSubjectError
from p2p_subject.outputs import atomic_write, save_image

SHOWN = 12
"""Cases of a kind whose pictures are on the page."""
STAR = (
    "* was given the true mask (mask_input); † puts original pixels back after decoding. n is the number of cases (of subjects "
    "in DreamBench and DreamEdit) with a value. A failed case counts as 0 in shares, cosines and IoUs, and has no value in the "
    "rest; the last column says how many failed. Intervals of shares of cases are Wilson's, others by bootstrap, each for "
    "itself: of twenty differences that are none, about one is called ahead or behind; of fewer than 20 cases none is."
)
MIXED = ("hardware", "threads", "code", "versions", "networks")
"""What one run should have one of."""


def present(folder: Path, rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows with those of their pictures that are in the folder, and the number of the others."""
    kept = [{k: path for k, path in row.get("pictures", {}).items() if (folder / path).is_file()} for row in rows]
    named = {path for row in rows for path in row.get("pictures", {}).values()}
    lost = len(named - {path for own in kept for path in own.values()})
    return [{**row, "pictures": own} for row, own in zip(rows, kept)], lost


def facts(settings: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What the figures hold for, one a line; more than one code, device or set of versions in a run is said."""
    values = settings["settings"]
    lines = [f"command: {command}" for command in settings.get("commands", [])]
    values = values | {"model": values.get("model") or "the miniature"}
    lines += [", ".join(f"{name} {value}" for name, value in values.items() if value is not None)]
    known = [{**row, "hardware": hardware(row)} for row in rows]
    for name in ("device", "hardware", "machine", "threads", "code", "versions", "networks"):
        # Rows that failed before they had one, and those of suites without networks, have none.
        found = list(dict.fromkeys(_text(row[name]) for row in known if row.get(name)))
        if not found:
            continue
        mixed = f" (MIXED: {len(found)} in one run)" if len(found) > 1 and name in MIXED else ""
        lines.append(f"{name}: {'; '.join(found)}{mixed}")
    failed = sum("error" in row for row in rows)
    return [*lines, f"{len(rows)} rows, {failed} failed"]


def hardware(row: Row) -> str | None:
    """What times and memory of a row are of: the GPU's name, or the machine whose processor it was; None where a row has none.

    Two GPUs of one kind are alike; a row that ended its process on one does not know its name.
    """
    if row.get("accelerator"):
        return row["accelerator"]
    return f"processor of {row['machine']}" if row.get("device") == "cpu" and row.get("machine") else None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items() if version is not None)
    return str(value)


def text(
    suite: type[Suite], facts: Sequence[str], overview: Sequence[Table], found: Sequence[Section], brief: bool = False
) -> str:
    """The whole report in Markdown; `brief` leaves out the measures that are not in the suite's headline."""
    told = [measure for measure in suite.measures if measure.about and (measure.name in suite.headline or not brief)]
    about = "\n".join(f"- {measure.title}: {measure.about}" for measure in told)
    parts = [f"# Suite {suite.name}", "\n".join(f"- {line}" for line in facts), STAR.replace("*", "\\*"), about]
    if overview:
        parts += ["## Overview", *_titled(overview)]
    for section in found:
        parts.append(f"## {section.kind} ({section.cases} cases)")
        tables = section.tables if brief else (*section.tables, section.rest)
        parts += _titled(tables)
    return "\n\n".join(parts) + "\n"


def _titled(tables: Sequence[Table]) -> list[str]:
    return [part for table in tables for part in (f"### {table.title}", markdown(table))]


def report(folder: Path, against: str | None = None, shown: int = SHOWN, brief: bool = False) -> str:
    """Write the report of a run and return its Markdown, or the `brief` one, which is not written.

    `against` is the method whose paired differences are shown and whose worst cases come first (None: the run's first).
    Raises `RunError` for a folder that is no run, `ArgumentError` for a method that it does not hold.
    """
    settings, rows = read_settings(folder), read_rows(folder)
    suite, methods = suite_class(settings["settings"]["suite"]), list(settings["methods"])
    against = against or methods[0]
    if against not in methods or not rows:
        held = f"the methods {', '.join(methods)}" if rows else "no rows"
        raise ArgumentError(f"against={against!r}; {folder} holds {held}")
    rows, lost = present(folder, rows)
    found = sections(rows, suite, methods, against)
    told = facts(settings, rows) + ([f"{lost} pictures are missing in the folder"] if lost else [])
    overview = overview_of(found, suite, methods)
    made = text(suite, told, overview, found)
    atomic_write(folder / "report.md", made)
    plots = {section.kind: plot(section, suite) for section in found}
    for name in ("plots", "sheets"):
        (folder / name).mkdir(exist_ok=True)
    for section in found:
        if (picture := plots[section.kind]) is not None:
            atomic_write(folder / "plots" / f"{file_name(section.kind)}.png", picture)
        if (cases := sheet(folder, suite, section, against)) is not None:
            save_image(cases, folder / "sheets" / f"{file_name(section.kind)}.png")
    atomic_write(folder / "report.html", page(folder, suite, told, overview, found, plots, against, shown, STAR))
    return text(suite, told, overview, found, brief=True) if brief else made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 for bad input, with its message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of a run")
    parser.add_argument("--against", metavar="METHOD", help="whose differences and worst cases (default: the run's first)")
    parser.add_argument("--shown", type=int, default=SHOWN, help="cases a kind with pictures on the page (default %(default)s)")
    parser.add_argument("--brief", action="store_true", help="print the headline's measures alone")
    given = parser.parse_args(argv)
    try:
        print(report(given.folder, given.against, max(0, given.shown), given.brief))
    except P2PSubjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
