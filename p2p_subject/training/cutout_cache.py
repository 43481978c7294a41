"""Cut-outs made once, kept on disk, and found again.

The cache is a folder of its own: `ab/abcd....png`, RGBA with straight alpha, named by what it was made from: the bytes of the
picture, those of its mask or else the subject and the weights of CLIPSeg, and the settings. So a run that was interrupted
goes on where it was, and a changed picture, mask or setting makes a new cut-out. `ab/abcd....txt` says why there is none.
`cutouts.json` lists what the last complete run made of which picture; it is what a training run reads.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from p2p_subject.errors import ArgumentError, DatasetError, ImageError, MaskError
from p2p_subject.outputs import atomic_path, atomic_write
from p2p_subject.training.clipseg import ClipSeg
from p2p_subject.training.cutouts import CutoutSettings, cut_out, require_pymatting
from p2p_subject.training.listing import Entry, shortened

INDEX = "cutouts.json"
_VERSION = 2


@dataclass(frozen=True)
class Segmenter:
    """Which CLIPSeg finds subjects, and where it runs: arguments of `ClipSeg.load`."""

    name: str
    revision: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Report:
    """What became of the pictures of a folder: `made` counts cut-outs by their source, `skipped` maps rows to reasons."""

    made: dict[str, int]
    skipped: dict[str, str]

    def lines(self) -> list[str]:
        """The report in words, every skipped picture named."""
        made = ", ".join(f"{count} by {source}" for source, count in sorted(self.made.items()))
        skipped = [f"  {row}: {reason}" for row, reason in self.skipped.items()]
        return [f"{sum(self.made.values())} cut-outs ({made}), {len(skipped)} pictures skipped", *skipped]


def make_cutouts(
    entries: Sequence[Entry],
    folder: Path,
    settings: CutoutSettings | None = None,
    segmenter: Segmenter | None = None,
    processes: int = 1,
) -> Report:
    """Cut out the subjects of all pictures into the cache `folder`; what is there already is not made again.

    `segmenter` is needed where pictures have neither mask nor transparency. Each of `processes` loads its own. Pictures in
    which no subject is found are skipped, with a warning that names them; the index is written when all have been seen.

    Raises:
        DatasetError: a picture needs a segmenter and none is given; cache and pictures lie in each other; none has a subject.
        ArgumentError: `processes` is below 1.
        ModelError, SubjectError, MissingPackageError: CLIPSeg or pymatting cannot be used; raised before any cut-out is made.
    """
    settings = settings or CutoutSettings()
    if processes < 1:
        raise ArgumentError(f"processes={processes}; expected 1 or more")
    _require(entries, folder, segmenter)
    if segmenter is not None:
        loaded(segmenter).require(entry.subject for entry in entries)
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(_row, folder=folder, settings=settings, segmenter=segmenter)
    rows = list(tqdm(_mapped(make, entries, processes), total=len(entries), desc="cut-outs", disable=None))
    skipped = {_label(row["file"], row["subject"]): row["skipped"] for row in rows if "skipped" in row}
    report = Report(dict(Counter(row["source"] for row in rows if "source" in row)), skipped)
    origin = {"settings": asdict(settings), "clipseg": segmenter and segmenter.name, "made": report.made}
    atomic_write(folder / INDEX, json.dumps(origin | {"rows": rows}, ensure_ascii=False, indent=1))
    if not report.made:
        first = next(iter(skipped.items()))
        raise DatasetError(f"no picture of {len(entries)} has a subject; {first[0]}: {first[1]}. All are in {folder / INDEX}")
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(entries)} pictures are skipped, no subject was cut out: {shortened(list(skipped))}; "
            f"the reasons are in {folder / INDEX}",
            stacklevel=2,
        )
    return report


def read_cutouts(entries: Sequence[Entry], folder: Path) -> list[tuple[Entry, Path]]:
    """The entries that have a cut-out, each with its file; a warning names those that have none.

    Raises `DatasetError` if the cache has no index, or does not know a picture as it is now.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DatasetError(f"{folder} holds no {INDEX}: no run of the stage `cutouts` has been completed there; run it first")
    rows = {(row["file"], row["subject"]): row for row in json.loads(path.read_text("utf-8"))["rows"]}
    found, skipped, unknown = [], [], []
    for entry in entries:
        row = rows.get((entry.file, entry.subject), {})
        if row.get("bytes") != entry.picture.stat().st_size:
            unknown.append(_label(entry.file, entry.subject))
        elif "skipped" in row:
            skipped.append(_label(entry.file, entry.subject))
        else:
            found.append((entry, _place(folder, row["key"])))
    unknown += [_label(entry.file, entry.subject) for entry, place in found if not place.is_file()]
    if unknown or not found:
        named = f"{len(unknown)} pictures ({shortened(unknown)})" if unknown else "all pictures"
        raise DatasetError(f"{folder} has no cut-outs of {named} as they are now; run the stage `cutouts` again")
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(entries)} pictures are left out, they have no cut-out: {shortened(skipped)}; see {path}",
            stacklevel=2,
        )
    return found


def _require(entries: Sequence[Entry], folder: Path, segmenter: Segmenter | None) -> None:
    for pictures in {entry.folder for entry in entries}:
        first, second = pictures.resolve(), folder.resolve()
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise DatasetError(f"the pictures' folder {pictures} and the cache {folder} lie in one another; keep them apart")
    plain = [entry.file for entry in entries if entry.mask is None and not _may_be_transparent(entry.picture)]
    if plain and segmenter is None:
        raise DatasetError(
            f"{len(plain)} of {len(entries)} pictures have neither mask nor transparency ({shortened(plain)}); name a CLIPSeg "
            "model that finds their subjects, or give them masks"
        )
    if plain or any(entry.mask is not None for entry in entries):
        require_pymatting()


def _may_be_transparent(path: Path) -> bool:
    with Image.open(path) as image:
        return image.has_transparency_data


@cache
def loaded(segmenter: Segmenter) -> ClipSeg:
    """The CLIPSeg of a segmenter, loaded once in each process."""
    return ClipSeg.load(segmenter.name, revision=segmenter.revision, device=segmenter.device)


def _mapped(make: Any, entries: Iterable[Entry], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from map(make, entries)
        return
    # Started anew, not forked: threads of torch and of numba do not survive a fork.
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(make, entries, chunksize=4)


def _row(entry: Entry, folder: Path, settings: CutoutSettings, segmenter: Segmenter | None) -> dict[str, Any]:
    """Make the cut-out of one entry unless it is there; its line of the index."""
    content = entry.picture.read_bytes()
    clipseg = None if segmenter is None else loaded(segmenter)
    searched = entry.mask is None
    made_from = {
        "version": _VERSION,
        "picture": hashlib.sha256(content).hexdigest(),
        "mask": None if searched else hashlib.sha256(entry.mask.read_bytes()).hexdigest(),
        "subject": entry.subject if searched else None,
        "settings": asdict(settings),
        "clipseg": clipseg.fingerprint if searched and clipseg else None,
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    row = {"file": entry.file, "subject": entry.subject, "bytes": len(content)}
    place = _place(folder, key)
    reason = place.with_suffix(".txt")
    if reason.is_file():
        return row | {"skipped": reason.read_text("utf-8")}
    if not place.is_file():
        place.parent.mkdir(exist_ok=True)
        try:
            _write(cut_out(entry, settings, clipseg), place)
        except DatasetError as error:
            atomic_write(reason, str(error))
            return row | {"skipped": str(error)}
        # Not kept in the cache: a file may fail to be read for a reason that passes.
        except (ImageError, MaskError) as error:
            return row | {"skipped": str(error)}
    with Image.open(place) as image:
        return row | {"key": key, "source": image.info["source"]}


def _write(cutout: Any, place: Path) -> None:
    origin = PngInfo()
    origin.add_text("source", cutout.source)
    with atomic_path(place) as temporary:
        cutout.rgba.save(temporary, format="PNG", pnginfo=origin)


def _place(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.png"


def _label(file: str, subject: str) -> str:
    return f"{file} ({subject})"
