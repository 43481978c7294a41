"""What BLIP-Diffusion's paper shows, by the miniature: pictures of each use, figures of interpolation, curves of the training.

    python -m benchmarks.paper --out benchmarks/pictures --curves "stage one=runs/multimodal" "stage two=runs/final"

Scenes are new, subjects in hues that no training had but where they go from hue to hue. `generation.jpg`: one subject by
several prompts; `style.jpg`: the style of one picture, the structure of another; `interpolation.jpg`: subjects on the way from
one to another, and printed how far the judge sees their hue to have gone; `control.jpg`: subjects in given edges, and edits
that keep to those of what was there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benchmarks.judge import Judge, right_category
from benchmarks.statistics import mean
from p2p_subject import Editor, Subject, swap_subject
from p2p_subject.errors import ArgumentError, P2PSubjectError
from p2p_subject.outputs import atomic_path, save_image
from p2p_subject.training import world
from p2p_subject.viz import Panel, contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, PANEL, ROWS = 25, 96, 4
GROUNDS = ("grass", "snow", "bricks", "space", "sand", "water")
WAY = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = ("recall", "matched", "told", "category")
"""Figures of a log that are shares of what is done right, not losses."""
APART = 100.0
"""Degrees of hue between the two ends of an interpolation."""


def subject_of(look: world.Look, index: int, split: str = "new_hue") -> Subject:
    """A subject by one picture of it."""
    return Subject(Image.fromarray(world.reference(look, split, index)), look.category)


def looks(count: int, first: int = 0) -> list[world.Look]:
    """Looks in held-out hues, of `count` categories."""
    found: dict[str, world.Look] = {}
    for index in range(first, first + 1000):
        look = world.sample("new_hue", index).look
        if look.category not in found:
            found[look.category] = look
        if len(found) == count:
            break
    return list(found.values())


def generation(editor: Editor) -> list[list[Panel]]:
    """Subjects by several prompts."""
    rows = []
    for index, look in enumerate(looks(ROWS)):
        subject = subject_of(look, index)
        prompts = [world.with_article(f"{look.category} {world.PHRASES[ground]}") for ground in GROUNDS]
        made = editor.generate(prompts, subject=[subject] * len(prompts), seed=list(range(len(prompts))), steps=STEPS)
        rows.append([("subject", subject.pictures[0]), *[(told, one.image) for told, one in zip(prompts, made)]])
    return rows


def style(editor: Editor) -> list[list[Panel]]:
    """The style of one picture, the structure of another."""
    styles = [subject_of(look, index) for index, look in enumerate(looks(ROWS + 1, 2000))]
    rows: list[list[Panel]] = [[("structure, style:", Image.new("RGB", (64, 64), "white"))]]
    rows[0] += [(f"{own.category}", own.pictures[0]) for own in styles]
    for index in range(ROWS):
        scene = world.draw(world.sample("test", 300 + index))
        caption = scene.spec.caption()
        made = [editor.stylize(scene.picture, style=own, prompt=caption, seed=index, steps=STEPS).image for own in styles]
        rows.append([(caption, scene.picture), *[("", image) for image in made]])
    return rows


def interpolation(editor: Editor) -> list[list[Panel]]:
    """From one subject to another, in even steps: to another hue, and to another category, as the prompt is half way."""
    rows, found = [], looks(ROWS, 4000)
    others = [replace(look, hue=(look.hue + APART) % 360) for look in found[: ROWS // 2]] + found[::-1][: ROWS // 2]
    for index, (one, other) in enumerate(zip(found[: ROWS // 2] + found[: ROWS // 2], others)):
        ends = subject_of(one, index), subject_of(other, index)
        mixed = [Subject.mix(*ends, amount) for amount in WAY]
        prompts = [world.with_article(f"{own.category} on sand") for own in mixed]
        made = editor.generate(prompts, subject=mixed, seed=index, steps=STEPS)
        panels = [(f"{amount:g}", part.image) for amount, part in zip(WAY, made)]
        rows.append([(one.category, ends[0].pictures[0]), *panels, (other.category, ends[1].pictures[0])])
    return rows


def control(shaped: Editor, plain: Editor) -> list[list[Panel]]:
    """A subject in given edges; and a swap with and without the edges of what was there."""
    rows = []
    for index in range(ROWS):
        spec = world.sample("test", 400 + index)
        scene = world.draw(spec)
        subject = subject_of(replace(looks(1, 6000 + 10 * index)[0], category=spec.look.category), index)
        edges = shaped.generate(spec.caption(), subject=subject, control=("canny", scene.picture), seed=index, steps=STEPS)
        other = subject_of(looks(1, 7000 + 10 * index)[0], index)
        edits = []
        for editor, told in ((plain, {}), (shaped, {"control": "canny"})):
            source = editor.invert(scene.picture, spec.caption(), steps=STEPS, **told)
            edits.append(editor.edit(source, swap_subject(spec.look.category, other)).image)
        rows.append(
            [
                ("scene", scene.picture),
                (f"subject: {subject.category}", subject.pictures[0]),
                ("in the scene's edges", edges.image),
                (f"subject: {other.category}", other.pictures[0]),
                ("swapped in", edits[0]),
                ("swapped in, in the edges", edits[1]),
            ]
        )
    return rows


def positions(editor: Editor, judge: Judge, count: int) -> str:
    """Markdown: how far along the way between two hues of one drawing the judge sees the mixed subject; 0 to 1."""
    found: dict[float, list[float]] = {amount: [] for amount in WAY}
    right: dict[float, list[float]] = {amount: [] for amount in WAY}
    for index in range(count):
        drawn = (world.sample("test", 9000 + 50 * index + at).look for at in range(50))
        look = next(own for own in drawn if own.hue is not None)
        other = replace(look, hue=(look.hue + APART) % 360)
        ends = subject_of(look, index, "test"), subject_of(other, index, "test")
        mixed = [Subject.mix(*ends, amount) for amount in WAY]
        prompt = world.with_article(f"{look.category} on sand")
        made = editor.generate(prompt, subject=mixed, seed=index, steps=STEPS)
        for amount, verdict in zip(WAY, judge.verdicts([part.image for part in made])):
            right[amount].append(float(right_category(verdict, look)))
            if verdict.hue is not None:
                turned = (verdict.hue - look.hue + 180) % 360 - 180
                found[amount].append(turned / APART)
    lines = ["| amount | hue, 0 to 1 of the way (median; quarters) | right category |", "| --- | --- | --- |"]
    for amount in WAY:
        low, middle, high = np.quantile(found[amount], (0.25, 0.5, 0.75)) if found[amount] else [np.nan] * 3
        share = mean(right[amount], share=True)
        shares = f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f}; {share.count})"
        lines.append(f"| {amount:g} | {middle:.2f} ({low:.2f} to {high:.2f}; {len(found[amount])}) | {shares} |")
    return "\n".join(lines)


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's log, in the order of their steps; of a step that was run twice after a kill, the last."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ArgumentError(f"{folder} holds no log.jsonl; expected the folder of a training run")
    rows: dict[float, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def curves(logs: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """Write a plot of what the logs of runs, by their names, hold against steps."""
    figure = drawn_curves(logs)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def drawn_curves(logs: Mapping[str, list[dict[str, float]]]) -> Figure:
    """A column a run: losses above, shares of what is done right below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(logs), 6.4), layout="constrained")
    for column, (name, rows) in zip(figure.subplots(2, len(logs), squeeze=False).T, logs.items()):
        fields = dict.fromkeys(key for row in rows for key in row if key not in ("step", "seconds", "loss"))
        for field in fields:
            axes = column[int(field.split()[-1] in SHARES)]
            points = [(row["step"], row[field]) for row in rows if field in row]
            axes.plot(*zip(*points), label=field, linewidth=1.2, linestyle="--" if " " in field else "-")
        column[0].set(title=name, ylabel="losses", yscale="log")
        column[1].set(xlabel="steps", ylabel="shares", ylim=(0, 1.03))
        for axes in column:
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=7)
            else:
                axes.set_visible(False)
    return figure


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a name and a folder, such as 'stage one=runs/one'")
    return name, Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--curves", type=_named, nargs="*", default=[], metavar="NAME=RUN", help="training runs to plot")
    parser.add_argument("--count", type=int, default=24, help="interpolations that the judge sees (default %(default)s)")
    given = parser.parse_args(argv)
    try:
        logs = {name: read_log(folder) for name, folder in given.curves}
    except P2PSubjectError as error:
        parser.exit(2, f"error: {error}\n")
    given.out.mkdir(parents=True, exist_ok=True)
    if logs:
        curves(logs, given.out / "training.png")
    torch.set_num_threads(1)
    plain, shaped = Editor.from_pretrained(), Editor.from_pretrained(controlnet="edges")
    sheets = {
        "generation": (generation(plain), "one picture of a subject, six prompts"),
        "style": (style(shaped), "structure from the left, style from above"),
        "interpolation": (interpolation(plain), "from one subject to another"),
        "control": (control(shaped, plain), "structure control"),
    }
    for name, (rows, title) in sheets.items():
        save_image(contact_sheet(rows, panel=PANEL, title=title), given.out / f"{name}.jpg")
    print(positions(plain, Judge.load(), given.count))


if __name__ == "__main__":
    main()
