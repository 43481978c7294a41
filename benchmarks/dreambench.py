"""The suite "dreambench": subject-driven generation of 30 subjects by 25 prompts (Ruiz et al. 2023), 4 pictures each.

    FOLDER/prompts_and_classes.txt       classes of the subjects, prompts of objects and of live subjects
    FOLDER/<subject>/*.jpg               4 to 6 pictures of each

FOLDER is `dataset` of the public repository, or the repository itself. DINO and CLIP-I are the mean cosine of the generated
picture with every real one of its subject, CLIP-T its cosine with the prompt without the subject's token, by DINO ViT-S/16 and
CLIP ViT-B/32 as published. Photos are turned upright as their cameras say. Methods get every picture of the subject; each
picture they generate is a case with its own seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import features, metrics
from benchmarks.suite import (
    COSTS,
    SEEDS,
    Axes,
    Case,
    Edited,
    Measure,
    Options,
    Suite,
    SuiteError,
    Values,
    data_folder,
    files_digest,
)
from p2p_subject.images import load_image

ORIGIN = "https://github.com/google/dreambooth (the folder 'dataset')"
LIST = "prompts_and_classes.txt"
LIVE = ("dog", "cat")
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
SUBJECTS, PROMPTS = 30, 25
"""Subjects, and prompts of objects and of live subjects each, of the whole data set."""
PICTURES = 4
"""Pictures a prompt, as published: 30 x 25 x 4 = 3,000."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Subjects:
    """What DreamBooth's list says: the class of each subject, the prompts of objects and of live subjects, "{}" the class."""

    folder: Path
    classes: Mapping[str, str]
    prompts: Mapping[str, tuple[str, ...]]

    def pictures(self, subject: str) -> tuple[Path, ...]:
        """The files of a subject, in order."""
        return tuple(sorted(path for path in (self.folder / subject).glob("*") if path.suffix.lower() in SUFFIXES))

    def kind(self, subject: str) -> str:
        """Which prompts are the subject's."""
        return "live" if self.classes[subject] in LIVE else "object"

    def record(self) -> dict[str, str]:
        """Which subjects and prompts these are, and how many of the published ones."""
        prompts = "+".join(str(len(own)) for own in self.prompts.values())
        return {
            "list": list_digest(self),
            "subjects": f"{len(self.classes)} of {SUBJECTS}",
            "prompts": f"{prompts} of {PROMPTS}+{PROMPTS}",
        }


def read_subjects(folder: Path | None, what: str, origin: str = ORIGIN) -> Subjects:
    """Read DreamBooth's folder. Raises `SuiteError` that names the list, the part of it or the pictures that are missing."""
    if folder is not None and not (folder / LIST).exists() and (folder / "dataset" / LIST).exists():
        folder = folder / "dataset"
    folder = data_folder(folder, (LIST,), what, origin)
    text = (folder / LIST).read_text()
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    found = re.split(r"^(?:Object|Live Subject) Prompts\s*$", text, flags=re.MULTILINE)
    prompts = [tuple(re.findall(r"^\s*'(.*?)'\.format", part, re.MULTILINE)) for part in found[1:]]
    if not classes or len(prompts) != 2 or not all(prompts):
        raise SuiteError(f"{folder / LIST}: expected classes and two lists of prompts; get it again from {origin}")
    plain = {kind: tuple(p.replace("{0} {1}", "{}") for p in own) for kind, own in zip(("object", "live"), prompts)}
    subjects = Subjects(folder, classes, plain)
    missing = [subject for subject in classes if not subjects.pictures(subject)]
    if missing:
        raise SuiteError(f"{folder}: no pictures of {', '.join(missing)}; get them from {origin}")
    return subjects


def mean_cosine(vector: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Mean cosine of a feature vector (D,) with several others, -1 to 1; higher is closer.

    Of a generated picture with a subject's real ones: DINO and CLIP-I (Ruiz et al. 2023, section 4.2).
    """
    return float(np.mean([metrics.cosine(vector, other) for other in others]))


class DreamBench(Suite):
    """DreamBench from a local folder."""

    name = "dreambench"
    kinds = ("object", "live")
    needs_subjects = True
    axes = Axes("dino", "clip_t")
    headline = ("dino", "clip_i", "clip_t", "rows", "seconds")
    pooled = True
    measures = (
        Measure("dino", "DINO", failed=0.0, about="cosine with the real pictures of the subject"),
        Measure("clip_i", "CLIP-I", failed=0.0, about="cosine with the real pictures of the subject"),
        Measure("clip_t", "CLIP-T", failed=0.0, about="cosine with the prompt"),
        *COSTS,
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.subjects = read_subjects(options.data, "DreamBench")
        self.networks = features.Networks(options.clip or CLIP, options.dino or DINO, None, options.device)
        self._known: dict[str, dict[str, list[np.ndarray]]] = {}

    def all_ids(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {kind: [] for kind in self.kinds}
        for subject in self.subjects.classes:
            found[self.subjects.kind(subject)].append(subject)
        # The subjects in turn, so that the first cases are of all of them.
        return {
            kind: [
                f"{subject}-{prompt:02d}-{picture}"
                for picture in range(PICTURES)
                for prompt in range(len(self.subjects.prompts[kind]))
                for subject in own
            ]
            for kind, own in found.items()
        }

    @staticmethod
    def group(id: str) -> str:
        """The subject: intervals are over subjects, whose cases are alike."""
        return _parts(id)[0]

    def case(self, id: str) -> Case:
        subject, prompt, picture = _parts(id)
        if subject not in self.subjects.classes or prompt >= len(self.subjects.prompts[self.subjects.kind(subject)]):
            raise SuiteError(f"DreamBench has no case {id!r}; ids are such as 'backpack-00-0'")
        category, kind = self.subjects.classes[subject], self.subjects.kind(subject)
        text = self.subjects.prompts[kind][prompt].format(category)
        seed = SEEDS * self.options.seed + prompt * PICTURES + picture
        pictures = tuple(load_image(path) for path in self.subjects.pictures(subject))
        return Case(id, self.name, kind, seed, text, text, references=pictures, category=category, facts=subject)

    def measure(self, case: Case, edited: Edited, mask_input: bool) -> Values:
        values: Values = {}
        clip, dino = self.networks.clip, self.networks.dino
        known = self._features(case)
        if dino is not None:
            values["dino"] = mean_cosine(dino.image(edited.image), known["dino"])
        if clip is not None:
            shown = clip.image(edited.image)
            values |= {"clip_i": mean_cosine(shown, known["clip"]), "clip_t": metrics.cosine(shown, clip.text(case.prompt))}
        return values

    def _features(self, case: Case) -> dict[str, list[np.ndarray]]:
        """Features of the subject's real pictures, computed once in a process."""
        if case.facts not in self._known:
            self._known[case.facts] = real_features(self.networks, case.references)
        return self._known[case.facts]

    def record(self) -> dict[str, Any]:
        return self.subjects.record() | {"seed": self.options.seed, **self.networks.record()}


def real_features(networks: features.Networks, pictures: Sequence[Image.Image]) -> dict[str, list[np.ndarray]]:
    """Features of pictures by each of the networks that there are."""
    kinds = {"clip": networks.clip, "dino": networks.dino}
    return {name: [network.image(picture) for picture in pictures] for name, network in kinds.items() if network is not None}


def list_digest(subjects: Subjects) -> str:
    """Short hash of the subjects' list and of the names and sizes of their pictures."""
    pictures = [path for subject in subjects.classes for path in subjects.pictures(subject)]
    return files_digest((subjects.folder / LIST).read_bytes(), subjects.folder, pictures)


def _parts(id: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"(\w+)-(\d+)-(\d+)", id)
    if not found:
        raise SuiteError(f"DreamBench has no case {id!r}; ids are such as 'backpack-00-0'")
    return found[1], int(found[2]), int(found[3])
