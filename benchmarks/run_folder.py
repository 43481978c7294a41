"""The folder of a run: settings, rows, pictures. A run that was killed goes on; nothing is lost and nothing doubled.

`run.json` holds the settings and the methods with theirs, `rows.jsonl` a row a case and method, each appended and flushed to
the disk, `pictures/` what each method returned and what was asked. A folder belongs to one set of settings, others are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.suite import Case, Edited
from p2p_subject.errors import P2PSubjectError
from p2p_subject.outputs import atomic_write, save_image
from p2p_subject.visible import to_gray

Row = dict[str, Any]
SETTINGS, ROWS, LOCK = "run.json", "rows.jsonl", ".lock"
PICTURES, CASES, REFERENCES = "pictures", "_cases", "_references"


class RunError(P2PSubjectError, ValueError):
    """The folder of a run is in use, damaged, or holds the rows of other settings."""


def file_name(name: str) -> str:
    """A name that any file system takes; names that differ stay different."""
    plain = re.sub(r"[^\w.+-]", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class RunFolder:
    """The folder of one run. `rows` are those written so far, by (method, case)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        self._shown: set[str] = set()

    @contextmanager
    def opened(
        self, settings: Mapping[str, Any], methods: Mapping[str, Any], command: str | None = None
    ) -> Iterator[RunFolder]:
        """Hold the folder for the duration of a `with` block, to add rows.

        `settings` must be those that it was begun with; `methods`, by name, may be added to but not changed. What a killed run
        left of its last line is cut off. Raises `RunError` for other settings, for damaged rows, and where another process
        holds the folder. `command`, if any, is noted, so that the report can say how to repeat the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a") as lock:
            _lock(lock, self.path)
            known = held_settings(self.path)
            merged = merged_settings(known, settings, methods, self.path)
            written = (self.path / ROWS).read_bytes() if (self.path / ROWS).exists() else b""
            whole = written[: written.rfind(b"\n") + 1]
            self.rows = _parsed(whole, self.path)
            if whole != written or not written:
                atomic_write(self.path / ROWS, whole)
            commands = [] if known is None else known.get("commands", [])
            merged["commands"] = list(dict.fromkeys([*commands, *([command] if command else [])]))
            atomic_write(self.path / SETTINGS, json.dumps(merged, indent=2))
            yield self

    def add(self, row: Row) -> None:
        """Write a row, whole, and wait until it is on the disk. It takes the place of one of the same that failed."""
        key = row["method"], row["case"]
        if key not in self.rows:
            with (self.path / ROWS).open("ab") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        elif "error" in self.rows[key]:
            atomic_write(self.path / ROWS, b"".join(map(_line, (self.rows | {key: row}).values())))
        else:
            raise RunError(f"{self.path}: a row of {key[0]!r} for {key[1]!r} is there already")
        self.rows[key] = row

    def lacks(self, key: tuple[str, str], retry: bool) -> bool:
        """Whether a method and case have no row; with `retry`, or one that failed."""
        return key not in self.rows or (retry and "error" in self.rows[key])

    def save_case(self, case: Case) -> dict[str, str]:
        """Write the pictures of a case, once; their paths within the folder, by name."""
        found = {"source": case.source, "truth": case.truth}
        found |= {"true_mask": None if case.mask is None else to_gray(case.mask.astype(float))}
        # What is there already may be of other settings, where a run was stopped before its first row.
        paths = self._save(CASES, case.id, found, again=case.id not in self._shown)
        self._shown.add(case.id)
        for picture in case.references[:1]:
            # Many cases have the same one.
            digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]
            paths |= self._save(REFERENCES, digest, {"reference0": picture}, again=False)
        return paths

    def save_edited(self, method: str, case: Case, edited: Edited) -> dict[str, str]:
        """Write what a method returned; paths within the folder, by name."""
        return self._save(file_name(method), case.id, {"edited": edited.image, "mask": edited.mask}, again=True)

    def _save(self, folder: str, id: str, pictures: Mapping[str, Any], again: bool) -> dict[str, str]:
        (self.path / PICTURES / folder).mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, picture in pictures.items():
            if picture is None:
                continue
            path = Path(PICTURES) / folder / f"{file_name(id)}.{name}.png"
            if again or not (self.path / path).exists():
                save_image(picture, self.path / path)
            paths[name] = path.as_posix()
        return paths


def require_folder(path: Path) -> None:
    """Raise `RunError` where `path` is no folder that can be written into, and none can be made; makes nothing."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written into" if there.is_dir() else "is a file"
        raise RunError(f"--out {path}: {there} {why}; expected a folder, there or to be made")


def read_settings(path: Path) -> dict[str, Any]:
    """What `run.json` of a folder says; `RunError` where there is none."""
    try:
        return json.loads((path / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no folder of a run ({error}); make one with benchmarks.run --out {path}") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a folder, those of a run under way included; a torn last line is left out."""
    if not (path / ROWS).is_file():
        raise RunError(f"{path} has no {ROWS}; make one with benchmarks.run --out {path}")
    written = (path / ROWS).read_bytes()
    return list(_parsed(written[: written.rfind(b"\n") + 1], path).values())


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _parsed(content: bytes, path: Path) -> dict[tuple[str, str], Row]:
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        where = f"{path / ROWS}, line {number}"
        try:
            row = json.loads(line)
            key = row["method"], row["case"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{where}: no row ({error}); take the line out, its case is run again") from error
        if key in rows:
            raise RunError(f"{where}: a second row of {key[0]!r} for {key[1]!r}; take one of them out")
        rows[key] = row
    return rows


def held_settings(path: Path) -> dict[str, Any] | None:
    """The settings that the rows of a folder are of; None where it holds no rows, such as after a run that was refused.

    Raises `RunError` for rows without them.
    """
    if not (path / ROWS).exists():
        return None
    with (path / ROWS).open("rb") as rows:
        if not rows.readline().endswith(b"\n"):
            return None
    if not (path / SETTINGS).exists():
        raise RunError(f"{path} holds rows but no {SETTINGS} that says of what; put it back or give another --out")
    return read_settings(path)


def merged_settings(known: Row | None, settings: Mapping[str, Any], methods: Mapping[str, Any], path: Path) -> Row:
    """The settings to write: those given, with the methods of earlier calls; `RunError` where they contradict."""
    # As they will be read back: with lists for tuples.
    settings, methods = json.loads(json.dumps([dict(settings), dict(methods)]))
    if known is None:
        return {"settings": settings, "methods": methods}
    before = known["settings"]
    differing = [name for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {before.get(name)!r} there, {settings.get(name)!r} now" for name in differing)
        raise RunError(f"{path} holds rows of other settings ({shown}); give another --out, or the settings that it has")
    changed = [name for name in methods if name in known["methods"] and known["methods"][name] != methods[name]]
    if changed:
        raise RunError(f"{path} holds rows of {', '.join(changed)} with other settings of theirs; give another --out")
    return {"settings": before, "methods": known["methods"] | methods}


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; two runs into one folder then show as a doubled row
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"{path} is in use by another run; wait for it, or give another --out") from error
