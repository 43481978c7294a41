"""The ablations of the paper's table 2 on the miniature: stage two, trained with and without what the paper holds to matter.

    python -m p2p_subject.training representation --captions-only --scenes runs/scenes --vae runs/vae/vae --out runs/base
    python -m benchmarks.ablation --base runs/base/ema.safetensors --scenes runs/scenes \\
        --stage-one runs/multimodal/ema.safetensors --out runs/ablation

Every variant begins with the U-Net and the text encoder of `--base`, which draws from captions and has met no subject, as the
paper's Stable Diffusion; and with a Q-Former over the shipped image encoder: that of stage one, or, without stage one, a random
one. All have the same steps, batches and seeds. Without `--base`, U-Net and text encoder are the shipped ones, which have met
subjects, through another Q-Former.

Judged by the independent classifier on looks that no training saw (hues, art): subject alignment is the share of pictures that
show the subject's look, text alignment of those with the prompt's background. "caption only" is what generation from text alone
is worth afterwards. A run that was stopped goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.features import weights_digest
from benchmarks.judge import Judge, marks
from benchmarks.statistics import interval
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.errors import ArgumentError, P2PSubjectError
from p2p_subject.loading import miniature_folder
from p2p_subject.models import Model
from p2p_subject.outputs import atomic_path, atomic_write, save_image
from p2p_subject.training import miniature, world
from p2p_subject.training.grids import sample_batch, tiled
from p2p_subject.training.loop import RunConfig, changed_settings, train
from p2p_subject.training.multimodal import fresh
from p2p_subject.training.representation import PARTS, Shares, SubjectLearning, SubjectTrainer, start
from p2p_subject.training.scenes import Cache, normalised

LEARNING = SubjectLearning(Shares(0.15, 0.1), max_snr=5.0, central=0.5, subject_weight=1.0)
"""The paper's recipe with the weights of the loss that the miniature needs, neither auxiliary heads nor attention term; a tenth
of the rows beside the paper's share has neither subject nor caption."""
VARIANTS: dict[str, tuple[bool, SubjectLearning]] = {
    "full": (True, LEARNING),
    "no stage one": (False, LEARNING),
    "frozen text encoder": (True, dataclasses.replace(LEARNING, train_text_encoder=False)),
    "no subject text": (True, dataclasses.replace(LEARNING, category_text=False)),
    "no subject drop": (True, dataclasses.replace(LEARNING, shares=Shares(0.0, LEARNING.shares.neither))),
}
"""By name: whether stage one came before, and how stage two is done."""
GROUPS = ("new_hue", "new_art", "caption only")
COLUMNS = {
    "look, new hue": "new_hue subject",
    "category, new hue": "new_hue category",
    "text, new hue": "new_hue text",
    "category, new art": "new_art category",
    "look, new art": "new_art subject",
    "text, new art": "new_art text",
    "caption only, category": "caption only category",
}
"""Columns of the table, and whose verdicts they are of."""
Verdicts = dict[str, list[bool]]
"""Whether each picture is right, by what is asked."""
AT_ONCE, SHOWN = 32, 12


def shipped() -> BlipDiffusionPipeline:
    """The shipped miniature, in single precision."""
    return BlipDiffusionPipeline.from_pretrained(miniature_folder())


def builder(learning: SubjectLearning, starts: Sequence[Path]) -> Callable[[], SubjectTrainer]:
    """What makes a trainer whose parts come from `starts`, in order."""

    def build() -> SubjectTrainer:
        trainer = SubjectTrainer(**miniature.networks(), **miniature.SETTINGS, learning=learning)
        for path in starts:
            start(trainer, path)
        return trainer

    return build


def untrained(folder: Path) -> Path:
    """A Q-Former that nothing was taught, over the shipped image encoder, written as a run of stage one writes its own."""
    pipeline, path = shipped(), folder / "untrained.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        with atomic_path(path) as temporary:
            save_file(fresh(pipeline.qformer, pipeline.qformer_tokenizer).state_dict(), temporary)
    return path


def embeddings(trainer: SubjectTrainer, pipeline: BlipDiffusionPipeline, looks: Sequence[world.Look], split: str) -> Tensor:
    """Subject embeddings (B, Nq, D) as the variant makes them: with or without the category's word."""
    references = np.stack([world.reference(look, split, i).transpose(2, 0, 1) for i, look in enumerate(looks)])
    words = pipeline.qformer_tokenizer([look.category for look in looks], padding=True, return_tensors="pt")
    with torch.no_grad():
        return trainer.subjects(normalised(references), words.input_ids, words.attention_mask)


def judged(
    trainer: SubjectTrainer, group: str, count: int, steps: int, scale: float, judge: Judge
) -> tuple[Verdicts, list[list[np.ndarray]]]:
    """Verdicts on `count` pictures of a group, and rows of reference, generated and true picture."""
    pipeline = shipped()
    pipeline.register_modules(**{name: getattr(trainer, name).eval() for name in PARTS})
    model, split = Model.of(pipeline), "test" if group == "caption only" else group
    specs = [world.sample(split, index) for index in range(count)]
    looks, prompts = [spec.look for spec in specs], [spec.caption() for spec in specs]
    subjects: list[Tensor | None] = [None] * count
    if group != "caption only":
        subjects = list(embeddings(trainer, pipeline, looks, split).split(1))
    images: list[Image.Image] = []
    for first in tqdm(range(0, count, AT_ONCE), desc=group, disable=None):
        part = slice(first, min(first + AT_ONCE, count))
        images += sample_batch(model, prompts[part], subjects[part], range(part.start, part.stop), steps, scale)
    each = [marks(verdict, spec.look, spec.background) for verdict, spec in zip(judge.verdicts(images), specs, strict=True)]
    names = {"category": "category", "subject": "both", "text": "background"}
    verdicts = {name: [one[mark] for one in each] for name, mark in names.items()}
    drawn = [world.draw(spec).image for spec in specs[:SHOWN]]
    references = [world.reference(look, split, i) for i, look in enumerate(looks[:SHOWN])]
    return verdicts, [references, [np.asarray(image) for image in images[:SHOWN]], drawn]


def measure(trainer: SubjectTrainer, count: int, steps: int, scale: float, out: Path) -> Verdicts:
    """Verdicts on each picture of each group, by "group name"; writes a grid of each group."""
    judge, found = Judge.load(), {}
    for group in GROUPS:
        verdicts, grid = judged(trainer, group, count, steps, scale, judge)
        save_image(tiled(grid), out / f"{group}.png")
        found |= {f"{group} {name}": [bool(value) for value in values] for name, values in verdicts.items()}
    return found


def table(results: Mapping[str, Sequence[Verdicts]]) -> str:
    """Markdown: subject and text alignment on held-out looks, and generation from the caption alone.

    `results` hold the verdicts of each variant's trainings, on the same pictures. Shares in [0, 1]; below the first line also
    the difference to it. In brackets 95 % intervals over pictures, each the mean of its trainings: what another choice of
    pictures could give, not what other trainings could.
    """
    first = next(iter(results.values()))
    size = f"{len(next(iter(first[0].values())))} pictures x {len(first)} training{'s' * (len(first) > 1)}"
    lines = [f"| variant ({size}) | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, trainings in results.items():
        cells = [cell(per_picture(trainings, key), per_picture(first, key), trainings is first) for key in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def per_picture(trainings: Sequence[Verdicts], key: str) -> np.ndarray:
    """Share of a variant's trainings in which each picture is right, (N,)."""
    return np.mean([verdicts[key] for verdicts in trainings], 0)


def cell(values: np.ndarray, first: np.ndarray, is_first: bool) -> str:
    """A share with its interval, or with its difference to the first line's and the interval of that."""
    if is_first:
        low, high = interval(values)
        return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"
    low, high = interval(values - first)
    return f"{values.mean():.2f}; {(values - first).mean():+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--scenes", type=Path, required=True, help="folder written by `python -m p2p_subject.training scenes`")
    parser.add_argument("--stage-one", type=Path, required=True, help="ema.safetensors of a run of the stage `multimodal`")
    base = "ema.safetensors of a run without subjects, or a model folder (default: the miniature)"
    parser.add_argument("--base", type=Path, help=base)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each variant (default %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--count", type=int, default=128, help="pictures a group and training (default %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except P2PSubjectError as error:
        parser.exit(2, f"error: {error}\n")


def compare(arguments: argparse.Namespace) -> None:
    """Train and measure all variants, seed by seed, so that a run cut short has compared them; prints the table of each."""
    cache = Cache(arguments.scenes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    for case in cases:
        require_settings(arguments, cache, *case)
    results: dict[str, list[Verdicts]] = {name: [] for name in arguments.variants}
    for name, seed in cases:
        results[name].append(trained(arguments, cache, name, seed))
        if name == arguments.variants[-1]:
            report = {"environment": environment(None), "settings": vars(arguments), "verdicts": results}
            atomic_write(arguments.out / "ablation.json", json.dumps(report, indent=1, default=str))
            print(table(results), flush=True)


def sources_of(arguments: argparse.Namespace, name: str) -> list[Path]:
    """What a variant begins with."""
    one = arguments.stage_one if VARIANTS[name][0] else untrained(arguments.out)
    return [arguments.base or miniature_folder(), one]


def folder_of(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a training of a variant is kept."""
    return arguments.out / f"{name.replace(' ', '_')}_seed{seed}"


def require_settings(arguments: argparse.Namespace, cache: Cache, name: str, seed: int) -> None:
    """Note down what a training is of before it begins; raises `ArgumentError` where its folder is of other settings."""
    names = ("steps", "batch", "learning_rate", "processes", "count", "sampling_steps", "guidance")
    stated = {name: getattr(arguments, name) for name in names} | {"scenes": cache.count}
    stated |= {f"start {at}": identity(source) for at, source in enumerate(sources_of(arguments, name))}
    path = folder_of(arguments, name, seed) / "ablation.json"
    known = json.loads(path.read_text()) if path.exists() else stated
    if told := changed_settings(known, stated):
        raise ArgumentError(f"{path.parent} is of other settings ({told}); go on with those, or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(stated, indent=2))


def identity(source: Path) -> str:
    """Digest of the weights that a training begins with."""
    if not source.is_file() and not any(source.glob("*/*.safetensors")):
        raise ArgumentError(f"{source} holds no weights; expected the ema.safetensors of a run, or a model folder")
    return weights_digest(source)


def trained(arguments: argparse.Namespace, cache: Cache, name: str, seed: int) -> Verdicts:
    """Train a variant and measure it, or take what an earlier call has measured."""
    folder = folder_of(arguments, name, seed)
    path = folder / "figures.json"
    if path.exists():
        return json.loads(path.read_text())
    config = RunConfig(
        folder,
        arguments.steps,
        learning_rate=arguments.learning_rate,
        warmup=30,
        decay_from=0.5,
        ema=0.99,
        seed=seed,
        processes=arguments.processes,
        checkpoint_every=100,
    )
    learning, sources = VARIANTS[name][1], sources_of(arguments, name)
    build = builder(learning, sources)
    train(config, build, cache.batches(arguments.batch, seed), learning=dataclasses.asdict(learning), sources=sources)
    trainer = build().eval()
    trainer.load_state_dict(load_file(folder / "ema.safetensors"))
    verdicts = measure(trainer, arguments.count, arguments.sampling_steps, arguments.guidance, folder)
    atomic_write(path, json.dumps(verdicts))
    return verdicts


if __name__ == "__main__":
    main()
