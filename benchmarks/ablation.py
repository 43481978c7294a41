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

from benchmarks.cost import environment
from benchmarks.judge import Judge, right_category, right_look
from benchmarks.statistics import interval
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.loading import miniature_folder
from p2p_subject.models import Model
from p2p_subject.outputs import atomic_write, save_image
from p2p_subject.training import miniature, world
from p2p_subject.training.grids import sample_batch, tiled
from p2p_subject.training.loop import RunConfig, train
from p2p_subject.training.multimodal import fresh
from p2p_subject.training.representation import PARTS, Shares, SubjectLearning, SubjectTrainer, start
from p2p_subject.training.scenes import Cache, normalised

LEARNING = SubjectLearning(max_snr=5.0, central=0.5, subject_weight=1.0)
"""The paper's recipe, with the weights of the loss that the miniature needs; neither auxiliary heads nor attention term."""
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
        save_file(fresh(pipeline.qformer, pipeline.qformer_tokenizer).state_dict(), path)
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
    found = list(zip(judge.verdicts(images), specs, strict=True))
    category = [right_category(verdict, spec.look) for verdict, spec in found]
    verdicts = {
        "category": category,
        "subject": [right and right_look(verdict, spec.look) for right, (verdict, spec) in zip(category, found)],
        "text": [verdict.background == spec.background for verdict, spec in found],
    }
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


def table(results: Mapping[str, Verdicts]) -> str:
    """Markdown: subject and text alignment on held-out looks, and generation from the caption alone.

    Shares in [0, 1], and in the lines below the first the difference to it, with its 95 % interval over the same pictures.
    """
    first = next(iter(results.values()))
    count = len(next(iter(first.values())))
    lines = [f"| variant (n = {count} each) | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, verdicts in results.items():
        cells = [cell(verdicts[key], None if verdicts is first else first[key]) for key in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: Sequence[bool], reference: Sequence[bool] | None) -> str:
    """A share, with its interval or with its difference to another's and the interval of that."""
    if reference is None:
        low, high = interval(values)
        return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"
    low, high = interval([float(a) - float(b) for a, b in zip(values, reference, strict=True)])
    return f"{np.mean(values):.2f} ({low:+.2f} to {high:+.2f})"


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
    arguments.out.mkdir(parents=True, exist_ok=True)
    cache, results = Cache(arguments.scenes), {}
    # Seed by seed, so that a run cut short has compared all variants.
    for seed in range(arguments.seeds):
        for name in arguments.variants:
            for key, values in trained(arguments, cache, name, seed).items():
                results.setdefault(name, {}).setdefault(key, []).extend(values)
        report = {"environment": environment(None), "settings": vars(arguments), "verdicts": results}
        atomic_write(arguments.out / "ablation.json", json.dumps(report, indent=1, default=str))
        print(table(results), flush=True)


def trained(arguments: argparse.Namespace, cache: Cache, name: str, seed: int) -> Verdicts:
    """Train a variant and measure it, or take what an earlier call has measured."""
    folder = arguments.out / f"{name.replace(' ', '_')}_seed{seed}"
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
    with_stage_one, learning = VARIANTS[name]
    sources = [arguments.base or miniature_folder(), arguments.stage_one if with_stage_one else untrained(arguments.out)]
    own = {"count": arguments.count, "sampling_steps": arguments.sampling_steps, "guidance": arguments.guidance}
    own |= {"sources": [str(source) for source in sources], "batch": arguments.batch}
    own |= {"steps": config.steps, "rate": config.learning_rate}
    path = folder / "figures.json"
    done = json.loads(path.read_text()) if path.exists() else None
    if done is not None and done["settings"] != own:
        raise SystemExit(f"{folder} holds figures of other settings, {done['settings']}; give another --out")
    if done is None:
        build = builder(learning, sources)
        train(config, build, cache.batches(arguments.batch, seed), learning=dataclasses.asdict(learning), sources=sources)
        trainer = build().eval()
        trainer.load_state_dict(load_file(folder / "ema.safetensors"))
        verdicts = measure(trainer, arguments.count, arguments.sampling_steps, arguments.guidance, folder)
        done = {"settings": own, "verdicts": verdicts}
        atomic_write(path, json.dumps(done))
    return done["verdicts"]


if __name__ == "__main__":
    main()
