"""What the benchmarks of editing fidelity are made of: cases, suites of them, what a method returns, what is measured."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from benchmarks.features import Networks
from p2p_subject.checks import LAST_SEED, Word, is_whole
from p2p_subject.errors import P2PSubjectError
from p2p_subject.tokens import phrase_pattern

SEEDS = 100_000
"""Seeds of cases that a seed of a run has."""

Values = dict[str, float | None]
"""Measured values by name; None where a case has none, which is counted and never averaged."""


class SuiteError(P2PSubjectError, ValueError):
    """The data of a suite is missing, or not in its public format; or a case or kind of it does not exist."""


@dataclass(frozen=True, eq=False)
class Case:
    """One edit that is asked for, and what is known of its answer.

    `prompt` describes `source` and `target_prompt` what it should become. `source_words` and `target_words` are the words of
    the two prompts whose region changes. `references` show the subject, of `category`, that a swap or a generation is to show.
    `adds`: what the target's words say is to come where nothing of it was; `removes`: what the source's words show is to go,
    with nothing in its place. Of the answer, which methods see only if they say that they do (`mask_input`): `mask` (H, W)
    bool, where the edit belongs, and `truth`, the edited picture itself. `placed` says whether these are the only right place;
    where not (an object is added, no one said where), only a method that was given the mask is measured against them.
    `source_mask` and `reference_mask` (H, W) bool are the object in the source and the subject in the first reference. `facts`
    is what the suite itself needs to measure. A case without a source is one of generation.
    """

    id: str
    suite: str
    kind: str
    seed: int
    prompt: str
    target_prompt: str
    source: Image.Image | None = None
    source_words: tuple[Word, ...] = ()
    target_words: tuple[Word, ...] = ()
    references: tuple[Image.Image, ...] = ()
    category: str | None = None
    mask: np.ndarray | None = None
    truth: Image.Image | None = None
    placed: bool = True
    removes: bool = False
    adds: bool = False
    source_mask: np.ndarray | None = None
    reference_mask: np.ndarray | None = None
    facts: Any = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the source in pixels."""
        return None if self.source is None else self.source.size


@dataclass(frozen=True, eq=False)
class Edited:
    """What a method returns: the picture, of the source's size, and where it meant to edit (mode "L"; None: anywhere).

    `unpasted`, called after time and memory were taken, gives the picture before original pixels were put back into it; None:
    none were. `reach`: how far beyond the mask, in pixels, the picture may change (its feather). `trajectory` names the
    source's generation that was edited. `cost` replaces or adds to what is counted on the editor's U-Net
    (`benchmarks.meter`), for a method that runs networks of its own.
    """

    image: Image.Image
    mask: Image.Image | None = None
    unpasted: Callable[[], Image.Image] | None = None
    reach: float = 0.0
    trajectory: str | None = None
    cost: Mapping[str, float | None] = field(default_factory=dict)

    def decoded(self) -> Image.Image:
        """The picture before original pixels were put back, where they were."""
        return self.image if self.unpasted is None else self.unpasted()


@dataclass(frozen=True)
class Measure:
    """A measured value: its name in rows, title, which direction is better, and the factor and unit it is shown in.

    `higher` is None where neither is. `failed` is what a case that raised an error counts as; None leaves it out. `share`: of
    cases, each of which has 0 or 1. `about` says what the title cannot.
    """

    name: str
    title: str
    higher: bool | None = True
    unit: str = ""
    scale: float = 1.0
    failed: float | None = None
    share: bool = False
    about: str = ""


COSTS = (
    Measure("rows", "U-Net rows", False, about="of inversion and edit; a guided prediction has two"),
    Measure("nfe", "U-Net calls", False, about="whatever the rows of each"),
    Measure("backward_rows", "gradient rows", False, about="rows of the U-Net that a gradient came back through"),
    Measure("work", "work in rows", False, about="U-Net rows, and two more for each that a gradient came back through"),
    Measure("seconds", "time", False, "s", about="of inversion and edit, by the clock"),
    Measure("cpu_seconds", "CPU time", False, "s", about="of the process"),
    Measure("peak", "peak memory", False, "MiB", 2**-20, about="over what was held before the case"),
)
"""What every suite has of the cost of a case; see `benchmarks.meter`."""


@dataclass(frozen=True)
class Axes:
    """Names of the measures that reports plot: fidelity, preservation, cost, and preservation before original pixels were put
    back, which a suite may lack."""

    fidelity: str
    preservation: str
    cost: str = "work"
    unpasted: str | None = None

    @property
    def shown(self) -> list[str]:
        """Those that an overview has of every kind."""
        return [name for name in (self.fidelity, self.preservation, self.unpasted) if name is not None]


@dataclass(frozen=True)
class Options:
    """How a suite is opened: cases a kind (None: all), kinds (empty: all), seed, split, folder of data, networks by name.

    `split` is of the world. `clip` and `dino` are a name or a folder, `lpips` "squeeze", "alex" or "vgg"; None is the suite's
    own, "none" leaves out what needs it. `device` is where these run.
    """

    count: int | None = None
    kinds: tuple[str, ...] = ()
    seed: int = 0
    split: str = "test"
    data: Path | None = None
    clip: str | None = None
    dino: str | None = None
    lpips: str | None = None
    device: str = "cpu"


def data_folder(folder: Path | None, needed: Sequence[str], what: str, origin: str) -> Path:
    """The folder of a suite's data, if it holds what is needed; `SuiteError` says what is missing and where it comes from."""
    if folder is None:
        raise SuiteError(f"{what} is not shipped: pass --data FOLDER with {', '.join(needed)}, from {origin}")
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise SuiteError(f"{folder}: no {', '.join(missing)}; expected the public folder of {what}, from {origin}")
    return folder


def files_digest(text: bytes, folder: Path, pictures: Iterable[Path]) -> str:
    """Short hash of a data set's list and of the names, within `folder`, and sizes of its pictures."""
    digest = hashlib.sha256(text)
    for path in pictures:
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def occurrences(prompt: str, word: str) -> tuple[Word, ...]:
    """A word or phrase as it is named in `prompt`: once, at each of its places, or not at all where the prompt lacks it."""
    count = sum(1 for _ in phrase_pattern(word).finditer(prompt)) if word.strip() else 0
    return (word,) if count == 1 else tuple((word, index) for index in range(count))


class Suite(ABC):
    """Cases and how their edits are measured. Opening one checks its data and loads no network."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[Measure, ...]]
    axes: ClassVar[Axes]
    headline: ClassVar[tuple[str, ...]]
    """Names of the measures that a report shows first."""
    pooled: ClassVar[bool] = False
    """Whether the published figures are means over all kinds together."""
    needs_subjects: ClassVar[bool] = False
    """Whether every case shows a subject, so that a model that takes none has nothing to do."""
    of_photos: ClassVar[bool] = True
    """Whether the pictures are photographs, for which the miniature is no model."""
    takes: ClassVar[tuple[str, ...]] = ("data", "clip", "dino")
    """Those of the options `split`, `data`, `clip`, `dino`, `lpips` that the suite has."""
    networks: Networks | None = None
    """The feature networks that measure, if any do."""

    def __init__(self, options: Options) -> None:
        unknown = [kind for kind in options.kinds if kind not in self.kinds]
        if unknown:
            raise SuiteError(f"suite {self.name!r} has no cases {unknown}; its kinds are {', '.join(self.kinds)}")
        if options.count is not None and options.count < 1:
            raise SuiteError(f"count={options.count}; expected 1 or more cases a kind")
        if not is_whole(options.seed, 0, LAST_SEED // SEEDS - 1):
            raise SuiteError(f"seed={options.seed}; expected a whole number from 0 to {LAST_SEED // SEEDS - 1}")
        for name in {"split", "data", "clip", "dino", "lpips"} - set(self.takes):
            # What is not there can be left out.
            if (value := getattr(options, name)) not in (getattr(Options, name), "none"):
                raise SuiteError(f"{name}={str(value)!r} means nothing to the suite {self.name!r}; leave it out")
        self.options = options

    @classmethod
    def named(cls, *names: str) -> list[Measure]:
        """The measures of these names, in their order."""
        known = {measure.name: measure for measure in cls.measures}
        return [known[name] for name in names]

    @abstractmethod
    def all_ids(self) -> Mapping[str, Sequence[str]]:
        """The ids of every case by kind, in their order."""

    def ids(self) -> dict[str, list[str]]:
        """The ids of the cases that were asked for, by kind."""
        wanted = self.options.kinds or self.kinds
        return {kind: list(ids)[: self.options.count] for kind, ids in self.all_ids().items() if kind in wanted and ids}

    @abstractmethod
    def case(self, id: str) -> Case:
        """Make or read a case. Raises `SuiteError` for an id there is not."""

    def prepare(self) -> None:
        """Load the networks that measuring needs, so that one that is not there is refused before anything is edited."""
        if self.networks is not None:
            self.networks.load()

    @abstractmethod
    def measure(self, case: Case, edited: Edited, mask_input: bool) -> Values:
        """Values by the names of `measures`; None, or no entry, where the case has none."""

    def fingerprints(self) -> dict[str, str]:
        """Short hashes by name of the weights that measure, for every row; after `prepare`, which loads them."""
        return {} if self.networks is None else self.networks.fingerprints

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What makes two runs of the suite comparable: seed, split, data, networks."""

    @staticmethod
    def group(id: str) -> str:
        """What a case stands for in means and intervals: itself, or something that several cases are of."""
        return id
