"""The ablations of the paper's table 2 on the miniature: stage two, trained with and without what the paper holds to matter.

    python -m benchmarks.ablation --scenes runs/scenes --stage-one runs/multimodal/ema.safetensors --out runs/ablation

Every variant begins with the shipped U-Net, text encoder and image encoder, and a Q-Former that knows nothing of them: that of
stage one, or, without stage one, a random one. All have the same steps, batches and seeds. The shipped networks have met
subjects before, through another Q-Former, which the paper's base model has not: all variants alike.

Judged by the independent classifier on looks that no training saw (hues, art): subject alignment is the share of pictures that
show the subject's look, text alignment of those with the prompt's background. "caption only" is what generation from text alone
is worth afterwards. A run that was stopped goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.cost import environment
from benchmarks.judge import Judge, right_category, right_look
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
) -> tuple[list[dict[str, bool]], list[list[np.ndarray]]]:
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
    rows = []
    for verdict, look, spec in zip(judge.verdicts(images), looks, specs):
        alike = {"category": right_category(verdict, look), "look": right_look(verdict, look)}
        rows.append(alike | {"text": verdict.background == spec.background})
    drawn = [world.draw(spec).image for spec in specs[:SHOWN]]
    references = [world.reference(look, split, i) for i, look in enumerate(looks[:SHOWN])]
    return rows, [references, [np.asarray(image) for image in images[:SHOWN]], drawn]


def measure(trainer: SubjectTrainer, count: int, steps: int, scale: float, out: Path) -> dict[str, float]:
    """Shares in [0, 1] of each group; writes a grid of each."""
    judge, figures = Judge.load(), {}
    for group in GROUPS:
        rows, grid = judged(trainer, group, count, steps, scale, judge)
        save_image(tiled(grid), out / f"{group}.png")
        for name in ("category", "look", "text"):
            figures[f"{group} {name}"] = float(np.mean([row[name] for row in rows]))
        both = [row["category"] and row["look"] for row in rows]
        figures[f"{group} subject"] = float(np.mean(both))
    return figures


def table(results: dict[str, dict[str, float]], count: int) -> str:
    """Markdown: subject and text alignment on held-out looks, and generation from the caption alone."""
    columns = {
        "look, new hue": "new_hue subject",
        "category, new hue": "new_hue category",
        "text, new hue": "new_hue text",
        "category, new art": "new_art category",
        "look, new art": "new_art subject",
        "text, new art": "new_art text",
        "caption only, category": "caption only category",
    }
    lines = [f"| variant (n = {count} each) | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, figures in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[key]:.2f}" for key in columns.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--scenes", type=Path, required=True, help="folder written by `python -m p2p_subject.training scenes`")
    parser.add_argument("--stage-one", type=Path, required=True, help="ema.safetensors of a run of the stage `multimodal`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=600, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--count", type=int, default=128, help="pictures a group (default %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cache, results = Cache(arguments.scenes), {}
    for name in arguments.variants:
        folder = arguments.out / name.replace(" ", "_")
        config = RunConfig(
            folder,
            arguments.steps,
            learning_rate=arguments.learning_rate,
            warmup=30,
            decay_from=0.5,
            ema=0.99,
            processes=arguments.processes,
            checkpoint_every=100,
        )
        with_stage_one, learning = VARIANTS[name]
        source = arguments.stage_one if with_stage_one else untrained(arguments.out)
        build = builder(learning, [miniature_folder(), source])
        own = {"count": arguments.count, "sampling_steps": arguments.sampling_steps, "guidance": arguments.guidance}
        own |= {"source": str(source), "batch": arguments.batch, "steps": config.steps, "rate": config.learning_rate}
        done = json.loads((folder / "figures.json").read_text()) if (folder / "figures.json").exists() else None
        if done is not None and done["settings"] != own:
            raise SystemExit(f"{folder} holds figures of other settings, {done['settings']}; give another --out")
        if done is None:
            train(config, build, cache.batches(arguments.batch, 0), learning=dataclasses.asdict(learning), source=source)
            trainer = build().eval()
            trainer.load_state_dict(load_file(folder / "ema.safetensors"))
            figures = measure(trainer, arguments.count, arguments.sampling_steps, arguments.guidance, folder)
            done = {"settings": own, "figures": figures}
            atomic_write(folder / "figures.json", json.dumps(done, indent=2))
        results[name] = done["figures"]
        report = {"environment": environment(None), "settings": vars(arguments), "results": results}
        atomic_write(arguments.out / "ablation.json", json.dumps(report, indent=2, default=str))
        print(table(results, arguments.count), flush=True)


if __name__ == "__main__":
    main()
