"""The suite "world": held-out scenes of the miniature world, with the true answer of every edit, drawn on the spot.

Six kinds of edit, any number of cases each, fixed by split, seed and number: `swap` (the subject of a reference picture, in a
hue held out of training, in the place of the object), `replace` (another object, by its word), `background`, `add` and `remove`
(the object), `recolour`. The independent judge (`benchmarks.judge`) says what the edited picture shows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import metrics
from benchmarks.judge import WEIGHTS, Judge, Verdict, right_category, right_look
from benchmarks.suite import COSTS, SEEDS, Axes, Case, Edited, Measure, Options, Suite, SuiteError, Values
from p2p_subject.outputs import feather
from p2p_subject.training import world

COUNT = 200
"""Cases a kind, unless told otherwise."""

SCENES = 10_000
"""Scenes that a kind of a seed has."""

LOOKS = {"test": 0, "validation": SCENES}
"""Splits, and what is added to the number of a swap's new look, so that settings are not chosen on the looks of the test."""

STREAM = 0xED17
"""Keeps what is drawn for an edit apart from what `world.sample` draws for the scene of the same number."""

REMAINS = 0.25
"""Squared error to the true background, of that of the object that stood there, up to which an object counts as removed. Of
other objects drawn in its place, one in fifteen is as near."""

MANY_ANSWERS = ("replace", "background")
"""Kinds whose true picture is one of many: nothing asks for its drawing of the new category, or of the new background."""

OTHER = "of replace, another right drawing has {} on average"
"""174 others of the first hundred true answers of seed 0: what is asked for is any drawing of a category, what is compared with
one of them. Half of them have less than 40 dB."""

KEPT = f"of what is to stay the source; {metrics.CEILING:.0f} dB at most, which equal pictures count as"

APART = 50.0
"""Degrees that the two colours of a `recolour` lie apart at least."""


@dataclass(frozen=True)
class Facts:
    """What the edited picture should show: the subject's look, and on which background."""

    look: world.Look
    background: str


class WorldSuite(Suite):
    """Scenes of the miniature world; no data is needed."""

    name = "world"
    of_photos = False
    takes = ("split",)
    kinds = ("swap", "replace", "background", "add", "remove", "recolour")
    axes = Axes("success", "outside_psnr", unpasted="unpasted_psnr")
    headline = ("success", "mask_iou", "outside_psnr", "unpasted_psnr", "exact_outside_mask", "work")
    measures = (
        Measure("success", "edit achieved", failed=0.0, share=True, about="by the judge; `judged` in world_suite.py"),
        Measure("category", "right category", failed=0.0, share=True),
        Measure("look", "right look", failed=0.0, share=True, about="source of art, hue within 25 degrees; of recolour, tint"),
        Measure("background", "right background", failed=0.0, share=True),
        Measure("mask_iou", "mask IoU", failed=0.0, about=f"with the true region, old and new object; {OTHER.format('.91')}"),
        Measure("boundary_f", "outline F", failed=0.0, about="of the two masks' outlines, one pixel apart at most"),
        Measure("changed_iou", "changed IoU", failed=0.0, about=f"of pixels, with those to change; {OTHER.format('.82')}"),
        Measure("outside_psnr", "PSNR outside", unit="dB", about=f"{KEPT}; {OTHER.format('46 dB')}"),
        Measure("outside_ssim", "SSIM outside"),
        Measure("outside_mse", "MSE outside x 10^4", False, scale=1e4),
        Measure("unpasted_psnr", "unpasted PSNR outside", unit="dB", about="the same before original pixels were put back"),
        Measure("unpasted_ssim", "unpasted SSIM outside"),
        Measure("unpasted_mse", "unpasted MSE outside x 10^4", False, scale=1e4),
        Measure(
            "exact_outside_mask",
            "exact outside mask",
            failed=0.0,
            about="share of pixels kept bit for bit outside the method's own feathered mask",
        ),
        Measure("exact_outside_truth", "exact outside region", failed=0.0, about="where the true answer is the source"),
        Measure(
            "own_outside_psnr",
            "PSNR outside own mask",
            unit="dB",
            about="to the source, outside the method's own feathered mask; of the whole picture where it has none",
        ),
        Measure("truth_psnr", "PSNR to truth", unit="dB", about="to the true answer, inside the true region, where it is one"),
        Measure("truth_ssim", "SSIM to truth"),
        *COSTS,
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.split not in LOOKS:
            raise SuiteError(f"split={options.split!r}; the suite 'world' has {', '.join(LOOKS)}")
        if (options.count or COUNT) > SCENES:
            raise SuiteError(f"count={options.count}; the suite 'world' has {SCENES} cases a kind, and more of another seed")

    def all_ids(self) -> Mapping[str, Sequence[str]]:
        count = self.options.count or COUNT
        return {kind: [f"{kind}-{number:04d}" for number in range(count)] for kind in self.kinds}

    def case(self, id: str) -> Case:
        kind, _, number = id.rpartition("-")
        if kind not in self.kinds or not number.isdecimal() or int(number) >= SCENES:
            raise SuiteError(f"the suite 'world' has no case {id!r}; ids are such as 'swap-0007'")
        # Scenes differ between kinds and between seeds; those of seed 0's swaps are the ones of benchmarks.figures.
        index = SEEDS * self.options.seed + SCENES * self.kinds.index(kind) + int(number)
        scene = world.sample(self.options.split, index)
        rng = np.random.default_rng((world.SPLITS.index(self.options.split), index, STREAM))
        return replace(_KINDS[kind](scene, rng, index, self.options.split), id=id, seed=index)

    def prepare(self) -> None:
        _ = self.judge

    def measure(self, case: Case, edited: Edited, mask_input: bool) -> Values:
        picture = np.asarray(edited.image)
        values = judged(case, picture, self.judge.verdicts([edited.image])[0]) | outside_own_mask(case, edited)
        if case.placed or mask_input:
            values |= regions(case, picture, np.asarray(edited.decoded())) | masks(case, edited)
        return values

    @cached_property
    def judge(self) -> Judge:
        """The classifier, loaded when it is first needed."""
        return Judge.load()

    def record(self) -> dict[str, Any]:
        judge = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]
        return {"split": self.options.split, "seed": self.options.seed, "judge": judge}


def _scene_case(kind: str, before: world.Scene, after: world.Scene, mask: np.ndarray, **fields: Any) -> Case:
    """A case of two drawn scenes, captions and words for a change of the object unless `fields` say otherwise."""
    values = {
        "prompt": before.spec.caption(),
        "target_prompt": after.spec.caption(),
        "source": before.picture,
        "source_words": (before.spec.look.category,),
        "target_words": (after.spec.look.category,),
        "mask": mask,
        "truth": after.picture,
        "facts": Facts(after.spec.look, after.spec.background),
    }
    return Case(id="", suite="world", kind=kind, seed=0, **values | fields)


def _swap(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    number = LOOKS[split] + index
    look = world.sample("new_hue", number).look
    before, after = world.draw(spec), world.draw(spec.with_look(look))
    reference = world.reference_scene(look, "new_hue", number)
    subject = {"references": (reference.picture,), "category": look.category}
    subject |= {"source_mask": before.mask, "reference_mask": reference.mask}
    return _scene_case("swap", before, after, before.mask | after.mask, **subject)


def _replace(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    others = [category for category in world.CATEGORIES if category != spec.look.category]
    drawn = world.sample_look(split, rng, category=str(rng.choice(others)))
    # The word asks for no colour, so the old one is kept.
    after = world.draw(spec.with_look(replace(drawn, hue=spec.look.hue)))
    before = world.draw(spec)
    return _scene_case("replace", before, after, before.mask | after.mask)


def _background(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    other = str(rng.choice([name for name in world.BACKGROUNDS if name != spec.background]))
    before, after = world.draw(spec), world.draw(spec.with_background(other, int(rng.integers(2**31))))
    words = {"source_words": (spec.background,), "target_words": (other,)}
    return _scene_case("background", before, after, ~before.mask, **words)


def _remove(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    before = world.draw(spec)
    caption, truth = world.empty_caption(spec.background), Image.fromarray(world.draw_empty(spec))
    return _scene_case("remove", before, before, before.mask, target_prompt=caption, target_words=(), removes=True, truth=truth)


def _add(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    after = world.draw(spec)
    caption, source = world.empty_caption(spec.background), Image.fromarray(world.draw_empty(spec))
    return _scene_case("add", after, after, after.mask, prompt=caption, source_words=(), adds=True, source=source, placed=False)


def _recolour(spec: world.SceneSpec, rng: np.random.Generator, index: int, split: str) -> Case:
    old = str(rng.choice(list(world.HUES)))
    new = str(rng.choice([name for name, hue in world.HUES.items() if world.hue_distance(hue, world.HUES[old]) >= APART]))
    before, after = world.draw(spec.with_hue(world.HUES[old])), world.draw(spec.with_hue(world.HUES[new]))
    prompts = {"prompt": before.spec.caption(tint=True), "target_prompt": after.spec.caption(tint=True)}
    return _scene_case("recolour", before, after, before.mask, **prompts)


_KINDS = {
    "swap": _swap,
    "replace": _replace,
    "background": _background,
    "add": _add,
    "remove": _remove,
    "recolour": _recolour,
}


def judged(case: Case, picture: np.ndarray, verdict: Verdict) -> Values:
    """What the judge says of an edited picture, 0 or 1 each, and whether the edit is achieved.

    That is, of a swap: right category and look; replace: right category; background: the new one, category and look kept; add:
    right category and background; recolour: right category and the new tint. Of remove, where the judge, which always sees a
    subject, cannot tell: right background, and in the region at most `REMAINS` of the squared error that what stood there had.
    """
    facts: Facts = case.facts
    category, look = right_category(verdict, facts.look), right_look(verdict, facts.look)
    ground = verdict.background == facts.background
    if case.kind == "recolour":
        look = world.Look("", "", verdict.hue).tint == facts.look.tint
    shown = {
        "swap": (category and look, category, look),
        "replace": (category, category, None),
        "background": (ground and category and look, category, look),
        "add": (ground and category, category, None),
        "recolour": (category and look, category, look),
    }
    if case.kind == "remove":
        gone = metrics.remaining(picture, np.asarray(case.truth), np.asarray(case.source), case.mask) <= REMAINS
        shown["remove"] = (ground and gone, None, None)
    values = dict(zip(("success", "category", "look"), shown[case.kind])) | {"background": ground}
    return {name: None if value is None else float(value) for name, value in values.items()}


def regions(case: Case, picture: np.ndarray, unpasted: np.ndarray) -> Values:
    """How much of the source is kept where the true answer keeps it, and how near the region is to the true answer.

    The soft edge of an object is neither in its region nor kept by the true answer.
    """
    source, truth = np.asarray(case.source), np.asarray(case.truth)
    outside = ~case.mask & (source == truth).all(-1)
    values: Values = {"changed_iou": metrics.iou(metrics.changed(picture, source), metrics.changed(truth, source))}
    if case.kind not in MANY_ANSWERS:
        values["truth_psnr"] = metrics.capped(metrics.psnr(picture, truth, case.mask))
        values["truth_ssim"] = metrics.ssim(picture, truth, case.mask)
    if not outside.any():
        return values
    for name, shown in (("outside", picture), ("unpasted", unpasted)):
        values[f"{name}_psnr"] = metrics.capped(metrics.psnr(shown, source, outside))
        values[f"{name}_ssim"] = metrics.ssim(shown, source, outside)
        values[f"{name}_mse"] = metrics.mse(shown, source, outside)
    values["exact_outside_truth"] = metrics.exactness(picture, source, outside)
    return values


def masks(case: Case, edited: Edited) -> Values:
    """The method's mask against the true region; nothing where it has none."""
    if edited.mask is None:
        return {}
    mask = np.asarray(edited.mask) > 127
    return {"mask_iou": metrics.iou(mask, case.mask), "boundary_f": metrics.boundary_f(mask, case.mask)}


def outside_own_mask(case: Case, edited: Edited) -> Values:
    """How much of the source is kept where the method's own mask and its feather do not reach; without one, everywhere."""
    picture, source = np.asarray(edited.image), np.asarray(case.source)
    if edited.mask is None:
        return {"own_outside_psnr": metrics.capped(metrics.psnr(picture, source))}
    mask = (np.asarray(edited.mask) > 127).astype(np.float32)
    outside = feather(mask, math.ceil(edited.reach), 0) == 0
    if not outside.any():
        return {}
    kept = metrics.capped(metrics.psnr(picture, source, outside))
    return {"exact_outside_mask": metrics.exactness(picture, source, outside), "own_outside_psnr": kept}
