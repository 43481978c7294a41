"""Fidelity of a model in one table, on scenes and subjects that it was not trained on.

    python -m benchmarks.figures --count 200 --out runs/figures

Every figure stands beside its ceiling (the judge on real scenes and on the autoencoder's reconstructions), its floor (the
untouched source) and the plain alternative (generation from the caption alone). `--sweep` compares settings of the edit on
the validation split instead, from which the defaults are chosen. A case that raises an error is a row that counts as failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.figures_table import results
from benchmarks.judge import Judge, marks, scene_batch
from benchmarks.metrics import iou, psnr
from p2p_subject.blend import RULES, binary_mask, competitors, region
from p2p_subject.editor import Editor
from p2p_subject.edits import Blend, Subject, swap_subject
from p2p_subject.outputs import atomic_write, feather, save_image
from p2p_subject.results import EditResult
from p2p_subject.training import world
from p2p_subject.training.grids import sample_batch
from p2p_subject.viz import contact_sheet

Row = dict[str, Any]
SHOWN = 12
"""Cases of a group that are drawn on its sheet."""
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 19))
SHIFT = 10_000
"""Added to the index of a new look in the sweep, so that the table's looks are not those the defaults were chosen on."""


@dataclass(frozen=True)
class Settings:
    """What is measured: models (None: the miniature; no twin), cases a group, steps, guidance (None: the model's), seed."""

    model: str | None = None
    twin: str | None = None
    count: int = 200
    steps: int = 50
    guidance: float | None = None
    seed: int = 0


class Bench:
    """The models and the judge of one process."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self.settings, self.judge = settings, Judge.load()
        self.editor = Editor.from_pretrained(settings.model)
        self.guidance = self.editor.model.guidance_scale if settings.guidance is None else settings.guidance
        self.twin = settings.twin and Editor.from_pretrained(settings.twin)

    def generate(self, prompts: Sequence[str], subjects: Sequence[Subject | None], indices: Sequence[int]) -> list[Image.Image]:
        """Pictures of prompts, each from the noise of its own seed, in one batch."""
        model, settings = self.editor.model, self.settings
        embedded = [subject and model.embed(subject) for subject in subjects]
        return sample_batch(model, prompts, embedded, [settings.seed + i for i in indices], settings.steps, self.guidance)

    def judged(
        self, images: Sequence, looks: Sequence[world.Look], specs: Sequence[world.SceneSpec], prefix: str = ""
    ) -> list[Row]:
        """Right category, look, both at once, and background, as booleans for each picture."""
        found = zip(self.judge.verdicts(images), looks, specs, strict=True)
        each = [marks(verdict, look, spec.background) for verdict, look, spec in found]
        return [{prefix + name: value for name, value in one.items()} for one in each]


bench_of = cache(Bench)
"""The bench of this process, loaded once."""


def subject_of(look: world.Look, split: str, index: int) -> Subject:
    """A subject with its one reference picture."""
    return Subject(Image.fromarray(world.reference(look, split, index)), look.category)


def real(bench: Bench, indices: Sequence[int], split: str) -> list[Row]:
    """The ceiling: the judge on real scenes and on the autoencoder's reconstructions, PSNR of these in dB."""
    pictures, specs = scene_batch(split, indices)
    images, looks = [Image.fromarray(picture) for picture in pictures], [spec.look for spec in specs]
    rebuilt = bench.editor.model.decode(bench.editor.model.encode_images(images))
    parts = bench.judged(images, looks, specs), bench.judged(rebuilt, looks, specs, "rebuilt_")
    return [
        a | b | {"psnr": psnr(np.asarray(image), np.asarray(again)), "panels": [("drawn", image), ("reconstructed", again)]}
        for a, b, image, again in zip(*parts, images, rebuilt)
    ]


def generated(bench: Bench, indices: Sequence[int], split: str | None, edited: bool = False) -> list[Row]:
    """Scenes generated from captions: of `split` with their subject given, or of "test" alone (None).

    With `edited`, the captions, tint included, are those that the swaps ask for.
    """
    specs = [world.sample(split or "test", index) for index in indices]
    if edited:
        specs = [spec.with_look(world.sample("new_hue", index).look) for spec, index in zip(specs, indices)]
    prompts, looks = [spec.caption(tint=edited) for spec in specs], [spec.look for spec in specs]
    subjects = [split and subject_of(look, split, index) for look, index in zip(looks, indices)]
    images = bench.generate(prompts, subjects, indices)
    rows = bench.judged(images, looks, specs)
    for row, subject, prompt, image, spec in zip(rows, subjects, prompts, images, specs):
        given = [("subject", subject.pictures[0])] if subject else []
        row["panels"] = [*given, (prompt, image), ("drawn", world.draw(spec).picture)]
    return rows


def masks(bench: Bench, indices: Sequence[int], split: str, twin: bool = False) -> list[Row]:
    """IoU with the truth of the source word's mask at the picture's size: by default ("iou"), by every rule and threshold."""
    rows, editor = [], bench.twin if twin else bench.editor
    for spec in (world.sample(split, index) for index in indices):
        scene, prompt = world.draw(spec), spec.caption()
        attention = editor.invert(scene.picture, prompt, steps=bench.settings.steps).attention
        words = editor.model.layout(prompt)
        columns = words.columns(spec.look.category)
        others, size = competitors(words, columns), scene.mask.shape
        scores = {name: region(attention, columns, others, rule, size) for name, rule in RULES.items()}
        default = binary_mask([scores[Blend().rule]], RULES[Blend().rule].threshold).numpy() > 0.5
        each = {name: {f"{t:g}": iou(score.numpy() > t, scene.mask) for t in THRESHOLDS} for name, score in scores.items()}
        panels = [(prompt, scene.picture), ("mask", Image.fromarray(default)), ("true mask", Image.fromarray(scene.mask))]
        rows.append({"iou": iou(default, scene.mask), **each, "panels": panels})
    return rows


def measured(bench: Bench, result: EditResult, spec: world.SceneSpec, look: world.Look) -> Row:
    """What one swap is worth: the judge's view, mask against the true old and new subject, background kept or not."""
    model, source = bench.editor.model, np.asarray(result.source_image)
    union = world.draw(spec).mask | world.draw(spec.with_look(look)).mask
    unpasted = np.asarray(model.decode(result.latents)[0])
    mask = np.asarray(result.mask) > 127
    # Farther from the mask than a latent pixel nothing may have changed, whatever the feathering.
    outside = feather(mask.astype(np.float32), model.scale_factor, 0) == 0
    row = bench.judged([result.image], [look], [spec])[0] | bench.judged([unpasted], [look], [spec], "unpasted_")[0]
    return row | {
        "iou": iou(mask, union),
        "psnr": psnr(unpasted, source, ~union),
        "exact": bool((np.asarray(result.image) == source)[outside].all()),
        "rows": result.unet_rows / bench.settings.steps,
    }


def swaps(bench: Bench, indices: Sequence[int]) -> list[Row]:
    """Subjects in held-out hues put into test scenes through the public editor, with floor and ceiling of each case."""
    rows, editor = [], bench.editor
    for index in indices:
        spec, look = world.sample("test", index), world.sample("new_hue", index).look
        scene, truth, subject = world.draw(spec), world.draw(spec.with_look(look)), subject_of(look, "new_hue", index)
        began = time.perf_counter()
        source = editor.invert(scene.picture, spec.caption(), steps=bench.settings.steps)
        inverted = time.perf_counter()
        result = editor.edit(source, swap_subject(spec.look.category, subject), guidance_scale=bench.guidance)
        seconds = {"invert_seconds": inverted - began, "seconds": time.perf_counter() - began}
        row = measured(bench, result, spec, look) | seconds
        for name, picture in (("copy_", scene.picture), ("truth_", truth.picture)):
            row |= bench.judged([picture], [look], [spec], name)[0]
        rebuilt = np.asarray(editor.model.decode(source.trajectory.clean)[0])
        row["rebuilt_psnr"] = psnr(rebuilt, scene.image, ~(scene.mask | truth.mask))
        pictures = (scene.picture, subject.pictures[0], result.mask, result.image, truth.picture)
        rows.append(row | {"panels": list(zip(("source", "subject", "mask", "edited", "drawn"), pictures))})
    return rows


def variants() -> dict[str, tuple[dict[str, Any], float | None]]:
    """Settings of the sweep by name: changed fields of the edit, and the guidance scale where it is changed."""
    windows = [{"cross_replace": cross, "self_replace": own} for cross in (0.2, 0.4, 0.6, 0.8) for own in (0.0, 0.2, 0.4, 0.6)]
    blends = [{"rule": rule, "threshold": threshold} for rule in RULES for threshold in THRESHOLDS[1::2]]
    rooms = [{"room": share} for share in (0.0, 0.25, 0.5, 0.75)]
    named = [(fields, fields) for fields in windows + rooms] + [(fields, {"blend": Blend(**fields)}) for fields in blends]
    settings = {" ".join(f"{k}={v}" for k, v in fields.items()): (changes, None) for fields, changes in named}
    return settings | {f"guidance={scale:g}": ({}, scale) for scale in (1.5, 2.0, 3.0, 4.0, 5.0)}


def sweep(bench: Bench, indices: Sequence[int]) -> list[Row]:
    """Swaps of validation scenes at every setting; one row a setting, edits of one scale in one batch."""
    rows: list[Row] = []
    for index in indices:
        spec, look = world.sample("validation", index), world.sample("new_hue", SHIFT + index).look
        subject = subject_of(look, "new_hue", SHIFT + index)
        source = bench.editor.invert(world.draw(spec).picture, spec.caption(), steps=bench.settings.steps)
        for scale in dict.fromkeys(scale for _, scale in variants().values()):
            chosen = {name: changes for name, (changes, own) in variants().items() if own == scale}
            edits = [swap_subject(spec.look.category, subject, **changes) for changes in chosen.values()]
            edited = bench.editor.edit(source, edits, guidance_scale=scale or bench.guidance)
            rows += [measured(bench, result, spec, look) | {"setting": name} for name, result in zip(chosen, edited)]
    return rows


HELD_OUT = ("test", "new_hue", "new_art")
GROUPS: dict[str, tuple[Callable[[Bench, Sequence[int]], list[Row]], int]] = {
    **{f"real {split}": (partial(real, split=split), 32) for split in HELD_OUT},
    "caption": (partial(generated, split=None), 32),
    **{f"subject {split}": (partial(generated, split=split), 32) for split in HELD_OUT},
    **{f"mask {split}": (partial(masks, split=split), 8) for split in ("test", "new_art", "validation")},
    **{f"mask twin {split}": (partial(masks, split=split, twin=True), 8) for split in ("test", "validation")},
    "swap": (swaps, 8),
    "swap by caption": (partial(generated, split=None, edited=True), 32),
    "sweep": (sweep, 1),
}
"""Groups of cases by name: the function that makes their rows, and how many cases it is given at once."""


def attempt(settings: Settings, group: str, indices: Sequence[int]) -> list[Row]:
    """Rows of some cases of a group; a batch that fails is repeated one by one, a case that fails is a row with "error"."""
    bench = bench_of(settings)
    try:
        rows = GROUPS[group][0](bench, indices)
    except Exception as error:
        if len(indices) > 1:
            return [row for index in indices for row in attempt(settings, group, [index])]
        return [{"group": group, "index": indices[0], "error": f"{type(error).__name__}: {error}"}]
    owners = indices if len(indices) > 1 else list(indices) * len(rows)
    return [{"group": group, "index": index} | row for index, row in zip(owners, rows)]


def run(settings: Settings, groups: Sequence[str], processes: int) -> Iterator[list[Row]]:
    """Rows of all cases, as they are done, in `processes` processes of one thread (1: in this one)."""
    tasks = [
        (settings, group, range(start, min(start + GROUPS[group][1], settings.count)))
        for group in groups
        for start in range(0, settings.count, GROUPS[group][1])
    ]
    if processes == 1:
        yield from (attempt(*task) for task in tqdm(tasks, disable=None))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(attempt, *task) for task in tasks]
        yield from (done.result() for done in tqdm(as_completed(pending), total=len(tasks), disable=None))


def measure(settings: Settings, groups: Sequence[str], out: Path, processes: int) -> str:
    """Run the groups; write `cases.jsonl`, `figures.json` and a sheet of pictures a group to `out`; return the tables."""
    record = environment(settings.model)  # first, so that a folder that is no model is refused at once
    out.mkdir(parents=True, exist_ok=True)
    rows, sheets = [], {}
    with (out / "cases.jsonl").open("w") as file:
        for row in (row for part in run(settings, groups, processes) for row in part):
            panels = row.pop("panels", None)
            if panels and row["index"] < SHOWN:
                sheets.setdefault(row["group"], {})[row["index"]] = panels
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    for group, cases in sheets.items():
        save_image(contact_sheet([cases[index] for index in sorted(cases)], panel=128, title=group), out / f"{group}.png")
    rows.sort(key=lambda row: (groups.index(row["group"]), row["index"]))
    figures, texts = results(rows)
    report = {"settings": asdict(settings), "environment": record, "figures": [asdict(figure) for figure in figures]}
    atomic_write(out / "figures.json", json.dumps(report | {"tables": texts}, indent=2))
    return "\n\n".join(texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model folder or hub name (default: the miniature)")
    parser.add_argument("--twin", help="model trained without attention supervision; without it its lines are left out")
    parser.add_argument("--count", type=int, help="cases a group (default 200; 12 with --sweep)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="sampling steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of the first case's noise (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder of the results (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups that start so, of: " + ", ".join(GROUPS))
    parser.add_argument("--sweep", action="store_true", help="compare settings of the edit on the validation split instead")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default %(default)s)")
    given = parser.parse_args()
    wanted = ["sweep"] if given.sweep else given.only or [group for group in GROUPS if group != "sweep"]
    groups = [g for g in GROUPS if g.startswith(tuple(wanted)) and (given.twin or "twin" not in g)]
    if not groups:
        parser.error(f"--only {' '.join(wanted)} names no group; groups: {', '.join(GROUPS)}")
    count = given.count or (12 if given.sweep else Settings.count)
    settings = Settings(given.model, given.twin, count, given.steps, given.guidance, given.seed)
    print(measure(settings, groups, given.out, given.processes))


if __name__ == "__main__":
    main()
