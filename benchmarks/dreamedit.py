"""The suite "dreamedit": subject swap of DreamEditBench (Li et al. 2023, DreamEdit): 30 subjects, 10 pictures to put each into.

    FOLDER/data/replacement_source/<object>/found0.jpg ... found9.jpg     the pictures that are edited, of 22 objects
    FOLDER/dataset/                                                       DreamBooth's folder: subjects and their classes

The first is the public data set, the second DreamBooth's (see `benchmarks.dreambench`), laid or linked beside it; the layout of
the authors' code (`ref_images`, `cvpr_dataset`) will do as well. As published, all pictures are squeezed to 512x512; the
subject's figures are mean cosines of the whole edited picture with every real picture of the subject, the background's its
cosine with the source, by DINO ViT-S/16 and CLIP ViT-B/32. No masks are known. Two things differ from the published code: it
takes the best of five iterations of each edit by these scores, where here an edit is one; and photos are turned upright here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import dreambench, features, metrics
from benchmarks.dreambench import CLIP, DINO, mean_cosine, read_subjects, real_features
from benchmarks.suite import COSTS, Axes, Case, Edited, Measure, Options, Suite, SuiteError, Values, files_digest
from p2p_subject.images import load_image

ORIGIN = "https://huggingface.co/datasets/tianleliphoebe/DreamEditBench"
SOURCES = ("data/replacement_source", "replacement_source", "ref_images")
SUBJECTS = ("dataset", "cvpr_dataset")
FOUND = 10
SIDE = 512
SHARED = {
    **dict.fromkeys(("dog2", "dog3", "dog5", "dog6", "dog7", "dog8"), "dog"),
    "cat2": "cat",
    "backpack_dog": "backpack",
}
"""Subjects that are put into the pictures of another one's object."""


class DreamEditBench(Suite):
    """Subject swap of DreamEditBench from a local folder."""

    name = "dreamedit"
    kinds = ("swap",)
    needs_subjects = True
    axes = Axes("dino_subject", "dino_background")
    headline = ("dino_subject", "dino_background", "clip_i_subject", "clip_i_background", "rows", "seconds")
    measures = (
        Measure("dino_subject", "DINO subject", failed=0.0, about="cosine with the real pictures of the subject"),
        Measure("dino_background", "DINO background", failed=0.0, about="cosine with the source"),
        Measure("clip_i_subject", "CLIP-I subject", failed=0.0, about="cosine with the real pictures of the subject"),
        Measure("clip_i_background", "CLIP-I background", failed=0.0, about="cosine with the source"),
        *COSTS,
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.data is None:
            raise SuiteError(f"DreamEditBench is not shipped: pass --data FOLDER with {SOURCES[0]}, from {ORIGIN}")
        self.folder = _first(options.data, SOURCES, ORIGIN)
        self.subjects = read_subjects(_first(options.data, SUBJECTS, dreambench.ORIGIN), "DreamBooth's subjects")
        missing = [path for subject in self.subjects.classes for path in self._sources(subject) if not path.is_file()]
        if missing:
            shown = ", ".join(str(path.relative_to(self.folder)) for path in missing[:3])
            raise SuiteError(f"{self.folder}: {len(missing)} pictures are missing, such as {shown}; get them from {ORIGIN}")
        self.networks = features.Networks(options.clip or CLIP, options.dino or DINO, None, options.device)
        self._known: dict[str, dict[str, list[np.ndarray]]] = {}

    def _sources(self, subject: str) -> list[Path]:
        return [self.folder / SHARED.get(subject, subject) / f"found{number}.jpg" for number in range(FOUND)]

    def all_ids(self) -> Mapping[str, Sequence[str]]:
        return {"swap": [f"{subject}-{number}" for number in range(FOUND) for subject in self.subjects.classes]}

    @staticmethod
    def group(id: str) -> str:
        """The subject: intervals are over subjects, whose cases are alike."""
        return id.rpartition("-")[0]

    def case(self, id: str) -> Case:
        subject, _, number = id.rpartition("-")
        if subject not in self.subjects.classes or not number.isdecimal() or int(number) >= FOUND:
            raise SuiteError(f"DreamEditBench has no case {id!r}; ids are such as 'teapot-0'")
        category = self.subjects.classes[subject]
        prompt = f"a {category}"
        return Case(
            id=id,
            suite=self.name,
            kind="swap",
            seed=self.options.seed,
            prompt=prompt,
            target_prompt=prompt,
            source=load_image(self._sources(subject)[int(number)]),
            source_words=(category,),
            target_words=(category,),
            references=tuple(load_image(path) for path in self.subjects.pictures(subject)),
            category=category,
            facts=subject,
        )

    def measure(self, case: Case, edited: Edited, mask_input: bool) -> Values:
        values: Values = {}
        known, source, shown = self._features(case), squeezed(case.source), squeezed(edited.image)
        for name, network in (("dino", self.networks.dino), ("clip_i", self.networks.clip)):
            if network is not None:
                vector = network.image(shown)
                values[f"{name}_subject"] = mean_cosine(vector, known[name.removesuffix("_i")])
                values[f"{name}_background"] = metrics.cosine(vector, network.image(source))
        return values

    def _features(self, case: Case) -> dict[str, list[np.ndarray]]:
        if case.facts not in self._known:
            self._known[case.facts] = real_features(self.networks, [squeezed(picture) for picture in case.references])
        return self._known[case.facts]

    def record(self) -> dict[str, Any]:
        pictures = [path for subject in self.subjects.classes for path in self._sources(subject)]
        sources = files_digest(b"", self.folder, pictures)
        return self.subjects.record() | {"sources": sources, "seed": self.options.seed, **self.networks.record()}


def squeezed(picture: Image.Image) -> Image.Image:
    """A picture at 512x512, whatever its shape, as the published figures are made."""
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _first(folder: Path, names: Sequence[str], origin: str) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise SuiteError(f"{folder}: no folder {' or '.join(names)}; it comes from {origin}")
