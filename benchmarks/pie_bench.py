"""The suite "pie": PIE-Bench (Ju et al. 2024, PnP Inversion), 700 pictures with prompts, words and masks, in its public folder.

    FOLDER/mapping_file.json                  entries by key: image_path, original_prompt, editing_prompt,
                                              editing_type_id ("0" to "9"), blended_word ("cat dog"), mask (run lengths)
    FOLDER/annotation_images/<image_path>

Brackets in the prompts mark the difference and are no part of them. The mask is a flat list of starts and lengths over the
rows of the picture, 512x512 always. The seven published metrics are measured as the published code measures them, with the
outermost pixels counted as edited, and beside them normalised by area. A picture whose mask is all of it has no background:
the published code writes "nan" there, here it is a case without a value, and n says so. Colour profiles in the files are
applied on reading, as everywhere in the library; the published code does not look at them.

The published comparison tells a method prompts and words. `ours` takes the type of an entry as well, which says what an edit
with a word of one prompt alone is: an addition ("2") or a removal ("3").
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import features, metrics
from benchmarks.suite import (
    COSTS,
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
    occurrences,
)
from p2p_subject.checks import is_whole
from p2p_subject.images import load_image

ORIGIN = "https://github.com/cure-lab/PnPInversion (Benchmark Download; a form asks for an address)"
MAPPING, PICTURES = "mapping_file.json", "annotation_images"
KINDS = {
    "0": "random",
    "1": "change-object",
    "2": "add-object",
    "3": "delete-object",
    "4": "change-content",
    "5": "change-pose",
    "6": "change-colour",
    "7": "change-material",
    "8": "change-background",
    "9": "change-style",
}
"""Editing types by `editing_type_id`."""
ADDITION, REMOVAL = "add-object", "delete-object"
ENTRIES, SIDE = 700, 512
"""Pictures of the whole data set, and pixels a side of each."""
FIELDS = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "blended_word", "mask")
CLIP, DINO, LPIPS = "openai/clip-vit-large-patch14", "facebook/dino-vitb8", "squeeze"
"""The networks of the published code."""


def decoded(lengths: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """The mask of run lengths [start, length, start, length, ...] over a picture's rows: (H, W) bool.

    Runs beyond the picture are cut, as published. Raises `SuiteError` for a list that is not one of pairs.
    """
    if not isinstance(lengths, list | tuple) or len(lengths) % 2 or not all(is_whole(number, 0) for number in lengths):
        shown = f"of {len(lengths)} values" if isinstance(lengths, list | tuple) else reprlib.repr(lengths)
        raise SuiteError(f"a mask {shown}; expected a list of pairs of a start and a length, whole numbers of 0 or more")
    flat = np.zeros(shape[0] * shape[1], bool)
    for start, length in zip(lengths[::2], lengths[1::2]):
        flat[start : start + length] = True
    return flat.reshape(shape)


def bordered(mask: np.ndarray) -> np.ndarray:
    """The mask with the picture's outermost pixels, as the published code compares with: annotations may miss the rim."""
    rimmed = mask.copy()
    rimmed[[0, -1], :] = rimmed[:, [0, -1]] = True
    return rimmed


def plain(prompt: str) -> str:
    """A prompt without the brackets that mark what changes."""
    return prompt.replace("[", "").replace("]", "")


class PieBench(Suite):
    """PIE-Bench from a local folder."""

    name = "pie"
    kinds = tuple(KINDS.values())
    axes = Axes("clip_whole", "published_psnr", unpasted="unpasted_psnr")
    headline = (
        "published_structure",
        "published_psnr",
        "unpasted_psnr",
        "published_lpips",
        "published_mse",
        "published_ssim",
        "clip_whole",
        "published_clip_edited",
    )
    pooled = True
    takes = ("data", "clip", "dino", "lpips")
    measures = (
        Measure("published_structure", "published structure x 10^3", False, scale=1e3, about="of pixels up to 255"),
        Measure(
            "published_psnr",
            "published PSNR",
            unit="dB",
            about="of the background; the edited region counts as no error; 100 at most",
        ),
        Measure(
            "published_lpips", "published LPIPS x 10^3", False, scale=1e3, about="of the background; published with SqueezeNet"
        ),
        Measure("published_mse", "published MSE x 10^4", False, scale=1e4, about="as PSNR"),
        Measure("published_ssim", "published SSIM x 10^2", scale=100, about="of the background over the whole frame"),
        Measure("clip_whole", "CLIP whole", failed=0.0, about="score of picture and target prompt; published with ViT-L/14"),
        Measure("published_clip_edited", "published CLIP edited", failed=0.0, about="all but the edited region black"),
        Measure("structure", "structure x 10^3", False, scale=1e3, about="pixels in [0, 1]"),
        Measure("psnr", "PSNR", unit="dB", about="over the background's own area, as the next three"),
        Measure("lpips", "LPIPS x 10^3", False, scale=1e3),
        Measure("mse", "MSE x 10^4", False, scale=1e4),
        Measure("ssim", "SSIM x 10^2", scale=100),
        Measure("unpasted_psnr", "unpasted PSNR", unit="dB", about="before original pixels were put back, as the next"),
        Measure("unpasted_ssim", "unpasted SSIM x 10^2", scale=100),
        Measure("clip_edited", "CLIP edited", failed=0.0, about="of a square around the edited region, nothing black"),
        Measure("mask_iou", "mask IoU", failed=0.0, about="with the annotated region"),
        *COSTS,
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.folder = data_folder(options.data, (MAPPING, PICTURES), "PIE-Bench", ORIGIN)
        text = (self.folder / MAPPING).read_bytes()
        try:
            self.entries: dict[str, dict[str, Any]] = json.loads(text)
        except ValueError as error:
            raise SuiteError(f"{self.folder / MAPPING} is not JSON ({error}); get it again from {ORIGIN}") from None
        self._check()
        pictures = [self.folder / PICTURES / entry["image_path"] for entry in self.entries.values()]
        self.digest = files_digest(text, self.folder, pictures)
        names = options.clip or CLIP, options.dino or DINO, options.lpips or LPIPS
        self.networks = features.Networks(*names, options.device)

    def _check(self) -> None:
        """Refuse entries that lack fields or pictures, and name them."""
        if not isinstance(self.entries, dict) or not self.entries:
            raise SuiteError(f"{self.folder / MAPPING}: expected an object with an entry for each picture; see {ORIGIN}")
        for key, entry in self.entries.items():
            lacking = [name for name in FIELDS if not isinstance(entry, dict) or name not in entry]
            if lacking:
                raise SuiteError(f"{self.folder / MAPPING}: entry {key!r} lacks {', '.join(lacking)}; see {ORIGIN}")
            if entry["editing_type_id"] not in KINDS:
                raise SuiteError(f"entry {key!r}: editing_type_id {entry['editing_type_id']!r}; expected '0' to '9'")
        missing = [e["image_path"] for e in self.entries.values() if not (self.folder / PICTURES / e["image_path"]).is_file()]
        if missing:
            raise SuiteError(
                f"{len(missing)} of {len(self.entries)} pictures are missing in {self.folder / PICTURES}, such as "
                f"{', '.join(missing[:3])}; get them from {ORIGIN}"
            )
        for key, entry in self.entries.items():
            try:
                decoded(entry["mask"], (SIDE, SIDE))
                with Image.open(self.folder / PICTURES / entry["image_path"]) as picture:
                    size = picture.size
            except (SuiteError, OSError) as error:
                raise SuiteError(f"entry {key!r}: {error}; get it again from {ORIGIN}") from None
            if size != (SIDE, SIDE):
                # Masks count pixels of this size: on another they would mark another region.
                raise SuiteError(f"entry {key!r}: a picture of {size[0]}x{size[1]}; expected {SIDE}x{SIDE}, as from {ORIGIN}")

    def all_ids(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {kind: [] for kind in self.kinds}
        for key, entry in self.entries.items():
            found[KINDS[entry["editing_type_id"]]].append(key)
        return found

    def case(self, id: str) -> Case:
        if id not in self.entries:
            raise SuiteError(f"PIE-Bench has no entry {id!r}")
        entry = self.entries[id]
        picture = load_image(self.folder / PICTURES / entry["image_path"])
        prompts = plain(entry["original_prompt"]), plain(entry["editing_prompt"])
        # One word of each prompt, the first two as published; an entry without names none, and all of its picture may change.
        pair = entry["blended_word"].split(" ")[:2]
        words = [occurrences(prompt, word) for prompt, word in zip(prompts, pair)] if len(pair) == 2 else [(), ()]
        kind = KINDS[entry["editing_type_id"]]
        return Case(
            id=id,
            suite=self.name,
            kind=kind,
            seed=self.options.seed,
            prompt=prompts[0],
            target_prompt=prompts[1],
            source=picture,
            source_words=words[0],
            target_words=words[1],
            mask=decoded(entry["mask"], (SIDE, SIDE)),
            # Where a word of the one prompt is named alone; with one of the other as well, something gives way to something.
            adds=kind == ADDITION and bool(words[1]) and not words[0],
            removes=kind == REMOVAL and bool(words[0]) and not words[1],
        )

    def prepare(self) -> None:
        metrics.require_torchmetrics()
        super().prepare()

    def measure(self, case: Case, edited: Edited, mask_input: bool) -> Values:
        source, picture, edge = np.asarray(case.source), np.asarray(edited.image), bordered(case.mask)
        values: Values = {}
        if (background := ~edge).any():
            values |= {
                "published_psnr": metrics.capped(metrics.published_psnr(picture, source, edge)),
                "published_mse": metrics.published_mse(picture, source, edge),
                "published_ssim": metrics.published_ssim(picture, source, edge),
                "psnr": metrics.capped(metrics.psnr(picture, source, background)),
                "mse": metrics.mse(picture, source, background),
                "ssim": metrics.ssim(picture, source, background),
            }
            values |= self._lpips_values(picture, source, edge)
            unpasted = np.asarray(edited.decoded())
            values["unpasted_psnr"] = metrics.capped(metrics.psnr(unpasted, source, background))
            values["unpasted_ssim"] = metrics.ssim(unpasted, source, background)
        if edited.mask is not None:
            values["mask_iou"] = metrics.iou(np.asarray(edited.mask) > 127, case.mask)
        return values | self._clip_values(case, edited.image) | self._dino_values(case, edited.image)

    def _lpips_values(self, picture: np.ndarray, source: np.ndarray, mask: np.ndarray) -> Values:
        lpips = self.networks.lpips
        if lpips is None:
            return {}
        pair = metrics.without(picture, mask), metrics.without(source, mask)
        return {"published_lpips": lpips.distance(*pair), "lpips": float(lpips.map(*pair)[~mask].mean())}

    def _clip_values(self, case: Case, image: Image.Image) -> Values:
        clip = self.networks.clip
        if clip is None:
            return {}
        text = clip.text(case.target_prompt)
        black = Image.fromarray(metrics.without(np.asarray(image), ~bordered(case.mask)))
        shown = {"clip_whole": image, "published_clip_edited": black, "clip_edited": image.crop(square_around(case.mask))}
        return {name: metrics.clip_score(clip.image(picture), text) for name, picture in shown.items()}

    def _dino_values(self, case: Case, image: Image.Image) -> Values:
        dino = self.networks.dino
        if dino is None:
            return {}
        return {
            "published_structure": metrics.structure_distance(dino.published_keys(image), dino.published_keys(case.source)),
            "structure": metrics.structure_distance(dino.keys(image), dino.keys(case.source)),
        }

    def record(self) -> dict[str, Any]:
        entries = f"{len(self.entries)} of {ENTRIES}"
        return {"data": self.digest, "entries": entries, "seed": self.options.seed, **self.networks.record()}


def square_around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the smallest square around a mask (S, S), moved into the picture; all of it where the mask
    is empty. CLIP sees the middle square of a picture alone, so a box of another shape would lose its ends."""
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, mask.shape[1], mask.shape[0])
    side = max(right - left, bottom - top)
    corner = [min(max(0, (low + high - side) // 2), mask.shape[0] - side) for low, high in ((left, right), (top, bottom))]
    return corner[0], corner[1], corner[0] + side, corner[1] + side
