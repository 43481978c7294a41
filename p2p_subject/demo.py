"""Subjects the model has never seen, put into scenes it has never seen, beside the true answers of the same edits.

The scenes are drawn by `p2p_subject.training.world`, which can also draw each scene with the other subject in it: what the
edit should have given.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from p2p_subject.commands import Report, given, listed, load_editor, require_writable, run_report
from p2p_subject.edits import Subject, swap_subject
from p2p_subject.errors import OutputError
from p2p_subject.outputs import check_target, save_image
from p2p_subject.training import world
from p2p_subject.viz import contact_sheet, mask_area, overlay

if TYPE_CHECKING:
    from p2p_subject.editor import Editor, EditResult
    from p2p_subject.source import Source

ROWS = 4
PICTURES = ("source", "subject", "heatmap", "mask", "edited", "truth")
COLUMNS = ("source", "the subject", "attention to the word", "mask", "edited", "true answer")


@dataclass(frozen=True)
class Row:
    """One edit of the demonstration: what was asked and every picture of it, the true answer included."""

    word: str
    category: str
    source: Source
    result: EditResult
    subject: Image.Image
    truth: Image.Image

    @property
    def heatmap(self) -> Image.Image:
        """Attention to the swapped word over the source."""
        return overlay(self.result.source_image, np.asarray(self.result.maps[self.word], np.float32) / 255)

    def pictures(self) -> dict[str, Image.Image]:
        """The pictures of the row by the name of their file."""
        result = self.result
        pictures = (result.source_image, self.subject, self.heatmap, result.mask, result.image, self.truth)
        return dict(zip(PICTURES, pictures))

    def panels(self) -> list[tuple[str, Image.Image]]:
        """The row of the contact sheet."""
        captions = (
            f"“{self.source.prompt}”",
            f"this {self.category}, in a colour never seen in training",
            f"“{self.word}” in the source",
            f"{mask_area(self.result.mask):.0%} of the picture may change",
            f"“{self.result.prompt}”, with this {self.category}",
            "drawn, not generated",
        )
        return list(zip(captions, self.pictures().values()))


def choose(seed: int, count: int = ROWS) -> Iterator[tuple[world.SceneSpec, world.Look, int]]:
    """Held-out scenes, each with a look in a held-out hue and the look's index; never a swap within one category."""
    index = seed * count
    for number in range(index, index + count):
        scene, look = world.sample("test", number), world.sample("new_hue", index).look
        while look.category == scene.look.category:
            index += 1
            look = world.sample("new_hue", index).look
        yield scene, look, index
        index += 1


def edit_rows(editor: Editor, seed: int, *, guidance_scale: float | None = None, **sampling: Any) -> Iterator[Row]:
    """Draw, invert and edit the scenes of a seed, one row at a time; `sampling` is for `Editor.invert`."""
    for scene, look, index in choose(seed):
        word = scene.look.category
        subject = Image.fromarray(world.reference(look, "new_hue", index))
        source = editor.invert(world.draw(scene).picture, scene.caption(), **sampling)
        result = editor.edit(source, swap_subject(word, Subject(subject, look.category)), guidance_scale=guidance_scale)
        yield Row(word, look.category, source, result, subject, world.draw(scene.with_look(look)).picture)


def sheet(rows: list[Row]) -> Image.Image:
    """All rows on one contact sheet."""
    return contact_sheet([row.panels() for row in rows], title="Put this subject in that picture", columns=COLUMNS)


def prepare(folder: Path) -> Path:
    """Make the folders that the pictures go to, or raise `OutputError`; call it before any work is done."""
    places = [folder / "sheet.png", *(row / f"{name}.png" for row in _row_folders(folder) for name in PICTURES)]
    for own in (folder, *_row_folders(folder)):
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {str(own)!r}: {error.strerror or error}") from error
        require_writable(own)
    for place in places:
        check_target(place)
    return folder


def _row_folders(folder: Path, count: int = ROWS) -> list[Path]:
    return [folder / f"row-{number}" for number in range(1, count + 1)]


def write(rows: list[Row], folder: Path) -> dict[str, Path]:
    """Write the sheet and the single pictures of each row into a prepared folder; returns the paths by name."""
    paths = {"sheet": folder / "sheet.png"}
    for own, row in zip(_row_folders(folder, len(rows)), rows):
        for name, picture in row.pictures().items():
            save_image(picture, own / f"{name}.png")
        paths[own.name] = own
    save_image(sheet(rows), paths["sheet"])
    return paths


def command(arguments: Namespace) -> Report:
    """The command `demo` of the command line."""
    folder = prepare(Path(arguments.out))
    arguments.seed = arguments.seed or 0
    editor = load_editor(arguments)
    edits = edit_rows(editor, **given(arguments, "seed", "steps", "guidance_scale"))
    rows = list(tqdm(edits, total=ROWS, desc="demo", disable=None, leave=False))
    outputs = {name: str(path.resolve()) for name, path in write(rows, folder).items()}
    told = [
        {"prompt": row.source.prompt, "word": row.word, "category": row.category, "target_prompt": row.result.prompt}
        for row in rows
    ]
    lines = [
        f"row-{at}: {row.source.prompt!r} -> {row.result.prompt!r}, the {row.category} being that of row-{at}/subject.png"
        for at, row in enumerate(rows, 1)
    ]
    return {"outputs": outputs, "edits": told, **run_report(editor, arguments, rows[0].source)}, [*lines, *listed(outputs)]
