"""From the rows of a run to its tables: means with intervals and n, and paired differences between methods. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.run_folder import Row
from benchmarks.statistics import Mean, mean, paired
from benchmarks.suite import Measure, Suite

ALL = "all kinds"
FEWEST = 20
"""Cases from which on a difference is called one: of normal values, the bootstrap finds one in a sixth of those that are none
with 5 cases, in a twelfth with 20, and in about a twentieth, as it should, with 60 and more."""


@dataclass(frozen=True)
class Table:
    """A table as texts: a title, headings, and lines of as many cells."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """What a report says of one kind of edit: its rows by method and case, its tables, and that of the measures not in them."""

    kind: str
    rows: Mapping[str, Mapping[str, Row]]
    tables: tuple[Table, ...]
    rest: Table

    @property
    def cases(self) -> int:
        """Number of cases that any method ran."""
        return len({case for own in self.rows.values() for case in own})

    def of_case(self, case: str) -> dict[str, Row]:
        """The rows of one case by method, those that there are."""
        return {name: own[case] for name, own in self.rows.items() if case in own}


def leading(rows: Mapping[str, Mapping[str, Row]], wanted: str) -> str:
    """The method that the others are compared with and whose worst cases come first: the one that is wanted, or the first,
    where it ran none of these cases."""
    return wanted if wanted in rows else next(iter(rows))


def value_of(row: Row, measure: Measure) -> float | None:
    """What a row counts as: its value, or for a case that failed what the measure says of those."""
    return measure.failed if "error" in row else row["metrics"].get(measure.name)


def grouped(values: Mapping[str, float | None], suite: type[Suite]) -> dict[str, float | None]:
    """Means of the values that there are in each of the suite's groups of cases; None for a group without any."""
    found: dict[str, list[float]] = {}
    for case, value in values.items():
        found.setdefault(suite.group(case), []).extend([] if value is None else [value])
    return {group: sum(own) / len(own) if own else None for group, own in found.items()}


def shared(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], suite: type[Suite]
) -> list[dict[str, float | None]]:
    """Values of two methods by group, over the cases of which both have one."""
    cases = sorted(ours.keys() | theirs.keys())
    both = {case for case in cases if ours.get(case) is not None and theirs.get(case) is not None}
    return [grouped({case: own[case] if case in both else None for case in cases}, suite) for own in (ours, theirs)]


def values_of(rows: Mapping[str, Row], measure: Measure) -> dict[str, float | None]:
    """The values of a method by case. A failure counts only in what the method has values of: it may make no masks at all."""
    worked = [row for row in rows.values() if "error" not in row]
    if worked and all(value_of(row, measure) is None for row in worked):
        return dict.fromkeys(rows)
    return {case: value_of(row, measure) for case, row in rows.items()}


def sections(rows: Sequence[Row], suite: type[Suite], methods: Sequence[str], against: str) -> list[Section]:
    """A section for each kind that was run, and one of all where the suite's figures are pooled; methods in their order."""
    kinds = [kind for kind in suite.kinds if any(row["kind"] == kind for row in rows)]
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    if suite.pooled and len(kinds) > 1:
        groups = {ALL: list(rows)} | groups
    found = []
    for kind, own in groups.items():
        by_method = {name: {row["case"]: row for row in own if row["method"] == name} for name in methods}
        by_method = {name: cases for name, cases in by_method.items() if cases}
        if by_method:
            shown = [measure for measure in suite.measures if measure.name not in suite.headline]
            rest = _means("the other measures", by_method, shown, suite)
            found.append(Section(kind, by_method, tuple(tables(by_method, suite, leading(by_method, against))), rest))
    return found


def overview_of(found: Sequence[Section], suite: type[Suite], methods: Sequence[str]) -> list[Table]:
    """Fidelity and preservation, also before pasting, of every method, a column a kind; none where there is one kind. A kind
    without values has no column, a method that did not run a kind an empty cell."""
    if len(found) < 2:
        return []
    of_all = {name: [row for section in found for row in section.rows.get(name, {}).values()] for name in methods}
    names = {name: label(name, *rows) for name, rows in of_all.items() if rows}
    made = []
    for measure in suite.named(*suite.axes.shown):
        columns = {}
        for section in found:
            own = {name: mean_of(rows, measure, suite) for name, rows in section.rows.items()}
            if any(value is not None for value, _ in own.values()):
                columns[section.kind] = {name: cell(*value, measure) for name, value in own.items()}
        lines = [(shown, *(column.get(name, "") for column in columns.values())) for name, shown in names.items()]
        if columns:
            made.append(Table(f"{heading(measure)} (95 % interval; n)", ("method", *columns), tuple(lines)))
    return made


def tables(rows: Mapping[str, Mapping[str, Row]], suite: type[Suite], against: str) -> list[Table]:
    """The headline measures, the same over the cases of all methods where they have run different ones, and the paired
    differences of one method to every other in them."""
    first = suite.named(*suite.headline)
    made = [_means("mean (95 % interval; n)", rows, first, suite)]
    common = set.intersection(*(set(own) for own in rows.values()))
    if common and any(len(own) > len(common) for own in rows.values()):
        alike = {name: {case: row for case, row in own.items() if case in common} for name, own in rows.items()}
        made.append(_means(f"the same over the {len(common)} cases that every method has", alike, first, suite))
    if len(rows) > 1:
        made.append(_differences(rows, first, against, suite))
    return made


def _means(title: str, rows: Mapping[str, Mapping[str, Row]], measures: Sequence[Measure], suite: type[Suite]) -> Table:
    lines = []
    for name, own in rows.items():
        failed = sum("error" in row for row in own.values())
        cells = [cell(*mean_of(own, measure, suite), measure) for measure in measures]
        lines.append((label(name, *own.values()), *cells, str(failed)))
    return Table(title, ("method", *map(heading, measures), "failed"), tuple(lines))


def mean_of(rows: Mapping[str, Row], measure: Measure, suite: type[Suite]) -> tuple[Mean | None, int]:
    """The mean of a method's cases, or of groups of them (None without values), and how many of these there are."""
    values = list(grouped(values_of(rows, measure), suite).values())
    return mean(values, share=measure.share), len(values)


def _differences(rows: Mapping[str, Mapping[str, Row]], measures: Sequence[Measure], against: str, suite: type[Suite]) -> Table:
    lines = []
    for name, own in rows.items():
        if name == against:
            continue
        cells = []
        for measure in measures:
            both = shared(values_of(rows[against], measure), values_of(own, measure), suite)
            difference = paired(*both)
            text = cell(difference, len(both[0]), measure, signed=True)
            cells.append(f"{text} {standing(difference, measure)}".strip())
        lines.append((label(name, *own.values()), *cells))
    title = f"{against} less the method in this line, over the cases that both have: + ahead, - behind, = neither shown"
    return Table(title, ("method", *map(heading, measures)), tuple(lines))


def label(name: str, *rows: Row) -> str:
    """A method's name, with a star where it was given the true mask in rows of its, a dagger where it pasted."""
    marks = (("*", "mask_input"), ("†", "pasted"))
    return " ".join([name, *[mark for mark, field in marks if any(row.get(field) for row in rows)]])


def heading(measure: Measure) -> str:
    """Title, unit and an arrow for the direction that is better."""
    unit = f", {measure.unit}" if measure.unit else ""
    return f"{measure.title}{unit}" + {True: " ↑", False: " ↓", None: ""}[measure.higher]


def cell(found: Mean | None, total: int, measure: Measure, signed: bool = False) -> str:
    """A mean with its interval, if it has a width, and n, in the measure's scale; n as "of" where some cases have no value."""
    if found is None:
        return f"- (0 of {total})"
    value, low, high = (measure.scale * x for x in (found.value, found.low, found.high))
    count = str(found.count) if found.count == found.total else f"{found.count} of {found.total}"
    digits = _digits(max(abs(value), abs(low), abs(high)))
    sign = "+" if signed else ""
    width = "" if low == high else f"{low:.{digits}f} to {high:.{digits}f}; "
    return f"{value:{sign}.{digits}f} ({width}{count})"


def _digits(size: float) -> int:
    return 1 if size >= 100 else 2 if size >= 10 else 3


def standing(difference: Mean | None, measure: Measure) -> str:
    """Whether a difference is ahead ("+"), behind ("-"), or its interval holds zero ("="); nothing where no way is better, or
    where there are fewer than `FEWEST` cases, whose bootstrap says little."""
    if difference is None or measure.higher is None or difference.count < FEWEST:
        return ""
    if difference.low <= 0 <= difference.high:
        return "="
    return "+" if (difference.value > 0) == measure.higher else "-"


def worst_first(section: Section, suite: type[Suite], of: str) -> list[str]:
    """Ids of the cases, those that `of` did worst on first: failed, then by fidelity, then by preservation, then by id."""
    wanted, rows = suite.named(suite.axes.fidelity, suite.axes.preservation), section.rows[leading(section.rows, of)]

    def key(case: str) -> tuple:
        row = rows[case]
        parts = []
        for measure in wanted:
            value = row["metrics"].get(measure.name)
            # No value is no reason to be shown first; a failure is.
            parts.append(float("inf") if value is None else value if measure.higher else -value)
        return ("error" not in row, *parts, case)

    return sorted(rows, key=key)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [table.columns, ("---",) * len(table.columns), *table.lines]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
