"""What lies in a folder of training pictures: each with its caption, its subject and its mask, read and checked up front.

Two forms are read; paths in them are relative to the file that names them.

`metadata.jsonl` in the folder, as Hugging Face's imagefolder has it, one JSON object a line; further keys are ignored, and
so are pictures that no line names. A picture with two subjects has two lines:

    {"file_name": "a/x.jpg", "text": "a dog on grass", "subject": "dog", "mask": "masks/x.png"}

Without that file, every picture in the folder or below (`SUFFIXES`, hidden files left out) has its caption beside it:
`x.jpg` in `x.txt`, which holds the caption and nothing else, or in `x.json`, an object with the keys `text`, `subject` and
`mask`. Where both are there, `x.json` counts first. A picture that another one names as its mask needs no caption.

`text` is the caption, `subject` the category of what is to be learned ("dog"); `mask`, optional, a grey picture of the same
aspect, white where the subject is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from p2p_subject.errors import DatasetError
from p2p_subject.images import MAX_ASPECT, MIN_SIDE
from p2p_subject.outputs import IMAGE_FORMATS

SUFFIXES = tuple(IMAGE_FORMATS)
METADATA = "metadata.jsonl"

_NAMED = 5
# In the order of the message: what was found wrong, and how that is put right.
_FAULTS = {
    "line": (f"lines of {METADATA} are no JSON object with a file_name", "correct them"),
    "sidecar": ("caption files are not UTF-8, or no JSON object", "correct them"),
    "absent": (f"pictures named in {METADATA} do not exist", "correct file_name, which is relative to the folder"),
    "picture": (
        f"pictures cannot be opened, have a side under {MIN_SIDE} pixels or an aspect beyond {MAX_ASPECT}:1",
        "replace them or take them out",
    ),
    "text": ("pictures have no caption", "give each a text in its line, its .json or its .txt"),
    "subject": ("pictures have no subject", 'give each a subject such as "dog", or one that serves for all without'),
    "mask": ("pictures name a mask that does not exist, is no picture or has another aspect", "correct it, or leave it out"),
}

_Row = tuple[Path, Path, dict[str, Any]]
"""A picture, the folder that paths beside it are relative to, and what is said of it."""


@dataclass(frozen=True)
class Entry:
    """One row of a training set.

    `file` is the picture's path in `folder`, the training set's, and names it in messages. `size` is its (width, height) in
    pixels as stored. `subject` is "" where none is asked for.
    """

    folder: Path
    file: str
    text: str
    subject: str
    mask: Path | None
    size: tuple[int, int]

    @property
    def picture(self) -> Path:
        """The file of the picture."""
        return self.folder / self.file


def pictures_in(folder: Path) -> list[Path]:
    """Picture files in a folder and below, in order of name; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_folder(folder: str | Path, *, subject: str = "", need_subject: bool = True) -> list[Entry]:
    """Read a folder of one of the two forms above, and check all of it; only the pictures' headers are read.

    `subject` is the category of the pictures that do not name theirs. Raises `DatasetError` with what is wrong, how often
    and where first; without `need_subject`, a missing subject is no fault (captions alone are learned from).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{str(folder)!r} is no folder; give the one that holds the pictures")
    faults: dict[str, list[str]] = defaultdict(list)
    rows = list(_listed(folder, faults) if (folder / METADATA).is_file() else _beside(folder, faults))
    entries = []
    for row in tqdm(rows, desc="reading the folder", disable=None, leave=False):
        entry = _entry(folder, row, subject)
        wrong = _wrong(entry, need_subject)
        for fault in wrong:
            faults[fault].append(entry.file)
        entries += [] if wrong else [entry]
    if faults:
        raise DatasetError(_message(folder, len(rows), faults))
    if not entries:
        raise DatasetError(f"{folder} holds no picture; expected {METADATA}, or {', '.join(SUFFIXES)} files with captions")
    return entries


def read_backgrounds(folder: str | Path) -> list[Path]:
    """The pictures of a folder and below, which need no captions; `DatasetError` if there is none, or one is unusable."""
    folder = Path(folder)
    found = pictures_in(folder) if folder.is_dir() else []
    if not found:
        raise DatasetError(f"backgrounds: {str(folder)!r} is no folder with pictures in it ({', '.join(SUFFIXES)})")
    unusable = [str(path.relative_to(folder)) for path in found if not _usable(_size(path))]
    if unusable:
        raise DatasetError(_message(folder, len(found), {"picture": unusable}))
    return found


def _listed(folder: Path, faults: dict[str, list[str]]) -> Iterator[_Row]:
    for number, line in enumerate((folder / METADATA).read_bytes().splitlines(), 1):
        values = _object(line)
        name = None if values is None else values.get("file_name")
        if isinstance(name, str) and name:
            yield folder / name, folder, values
        elif line.strip():
            faults["line"].append(str(number))


def _beside(folder: Path, faults: dict[str, list[str]]) -> Iterator[_Row]:
    rows: list[_Row] = []
    for path in pictures_in(folder):
        values: dict[str, Any] | None = {}
        try:
            if path.with_suffix(".txt").is_file():
                values["text"] = path.with_suffix(".txt").read_text("utf-8")
            if path.with_suffix(".json").is_file():
                read = _object(path.with_suffix(".json").read_bytes())
                values = None if read is None else values | read
        except UnicodeDecodeError:
            values = None
        if values is None:
            faults["sidecar"].append(path.relative_to(folder).as_posix())
        else:
            rows.append((path, path.parent, values))
    masks = {(base / mask).resolve() for _, base, values in rows if isinstance(mask := values.get("mask"), str)}
    return (row for row in rows if row[2] or row[0].resolve() not in masks)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _entry(folder: Path, row: _Row, subject: str) -> Entry:
    """What a row says; "" and size (0, 0) where it says nothing usable."""
    path, base, values = row
    text, own, mask = (values.get(key) for key in ("text", "subject", "mask"))
    return Entry(
        folder=folder,
        file=path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
        text=" ".join(text.split()) if isinstance(text, str) else "",
        subject=" ".join((own if isinstance(own, str) and own.strip() else subject).split()),
        mask=base / mask if isinstance(mask, str) and mask else None,
        size=_size(path),
    )


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    # Decoders raise nearly anything on broken files.
    except Exception:
        return (0, 0)


def _wrong(entry: Entry, need_subject: bool) -> list[str]:
    if not entry.picture.is_file():
        return ["absent"]
    wrong = {
        "picture": not _usable(entry.size),
        "text": not entry.text,
        "subject": need_subject and not entry.subject,
        "mask": entry.mask is not None and not _fits(entry.mask, entry.size),
    }
    return [fault for fault, holds in wrong.items() if holds]


def _usable(size: tuple[int, int]) -> bool:
    short, long = sorted(size)
    return short >= MIN_SIDE and long <= MAX_ASPECT * short


def _fits(mask: Path, size: tuple[int, int]) -> bool:
    # Sorted, because either may be stored lying on its side; the rounding of small masks is allowed for.
    (short, long), (own_short, own_long) = sorted(size), sorted(_size(mask))
    return own_short > 0 and abs(own_short * long - own_long * short) <= 0.5 * (long + short) + 0.02 * own_long * short


def shortened(names: list[str]) -> str:
    """The first few of many names, for a message."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _message(folder: Path, rows: int, faults: dict[str, list[str]]) -> str:
    listed = [
        f"{len(faults[key])} {what} ({shortened(faults[key])}): {cure}"
        for key, (what, cure) in _FAULTS.items()
        if key in faults
    ]
    return f"{folder} cannot be trained on as it is. Of {rows} rows, " + "; ".join(listed) + "."
