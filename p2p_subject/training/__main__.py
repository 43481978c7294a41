"""`python -m p2p_subject.training STAGE ...`: train the miniature from nothing, or BLIP-Diffusion of any size from its parts.

Of the miniature alone: `vae`, `scenes` (draw and encode the training set), `structure` (its ControlNet). The two stages of
pre-training: `multimodal` (a Q-Former on a frozen image encoder) and `representation` (subject representation learning).
`export` writes a run as a model folder. A run that was interrupted goes on when the same command is given again. On several
GPUs: `accelerate launch -m p2p_subject.training STAGE ... --device cuda`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_subject.training.loop import RunConfig

if TYPE_CHECKING:
    from p2p_subject.training.representation import SubjectLearning


def _run_arguments(parser: argparse.ArgumentParser, steps: int, batch: int, rate: float, decay_from: float = 0.4) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an interrupted run there goes on")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures a step, over all processes (default %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches whose gradients make one step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=rate, help="default %(default)s")
    parser.add_argument(
        "--decay-from", type=float, default=decay_from, help="share of the steps at full rate (default %(default)s)"
    )
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each, on a CPU (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16", help="arithmetic (default %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=1000, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)


def parser() -> argparse.ArgumentParser:
    """The command line of the stages."""
    top = argparse.ArgumentParser(prog="python -m p2p_subject.training", description=__doc__)
    stages = top.add_subparsers(dest="stage", required=True)

    vae = stages.add_parser("vae", help="train the miniature's autoencoder on scenes")
    _run_arguments(vae, steps=5000, batch=12, rate=1.5e-3)
    scenes = stages.add_parser("scenes", help="draw the training scenes and encode them once")
    scenes.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--count", type=int, default=60_000)
    scenes.add_argument("--processes", type=int, default=2)

    multimodal = stages.add_parser("multimodal", help="stage one: a Q-Former learns to read pictures for their captions")
    _run_arguments(multimodal, steps=1200, batch=64, rate=1e-3)
    multimodal.add_argument(
        "--model", type=Path, help="model folder of the image encoder and of all sizes (default: the miniature)"
    )
    multimodal.add_argument(
        "--bert", type=Path, help="folder of a BERT whose weights the Q-Former begins with (default: random)"
    )

    representation = stages.add_parser("representation", help="stage two: subject representation learning")
    _run_arguments(representation, steps=8000, batch=64, rate=1e-3)
    representation.add_argument("--scenes", type=Path, required=True, help="folder written by the stage `scenes`")
    representation.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder, for the grids")
    _start_arguments(representation)
    _learning_arguments(representation)

    structure = stages.add_parser("structure", help="train the miniature's ControlNet on edges")
    _run_arguments(structure, steps=1600, batch=32, rate=5e-4, decay_from=0.5)
    structure.add_argument("--scenes", type=Path, required=True, help="folder written by the stage `scenes`")
    structure.add_argument("--model", type=Path, help="model folder that it shall steer (default: the miniature)")

    export = stages.add_parser("export", help="write a run as a model folder in the official layout")
    export.add_argument("--run", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    rest = export.add_mutually_exclusive_group(required=True)
    rest.add_argument("--vae", type=Path, help="of a run of the miniature: folder of the autoencoder")
    rest.add_argument("--model", type=Path, help="of any other run: the model folder that it began with")
    rest.add_argument("--structure", type=Path, help="of a run of `structure`: the model folder that it steers")
    return top


def _start_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument(
        "--start-from",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="model folder, or ema.safetensors of a run of any stage, to begin with; of several, each fills in what it holds",
    )


def _learning_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--recipe", choices=("miniature", "paper"), default="miniature", help="default %(default)s")
    own.add_argument("--attention-weight", type=float, default=0.0, help="weight of the coverage term (default 0)")
    own.add_argument("--freeze-text-encoder", action="store_true", help="ablation: the text encoder stays as it is")
    own.add_argument("--no-category-text", action="store_true", help="ablation: the Q-Former does not read the category")
    own.add_argument("--no-subject-drop", action="store_true", help="ablation: every caption has its subject")


def learning_of(arguments: dict) -> SubjectLearning:
    """What of stage two is done how, as the arguments say."""
    from p2p_subject.training import miniature
    from p2p_subject.training.representation import Shares, SubjectLearning

    recipe = miniature.LEARNING if arguments["recipe"] == "miniature" else SubjectLearning()
    return dataclasses.replace(
        recipe,
        attention_weight=arguments["attention_weight"],
        train_text_encoder=not arguments["freeze_text_encoder"],
        category_text=not arguments["no_category_text"],
        shares=Shares(0.0, recipe.shares.neither) if arguments["no_subject_drop"] else recipe.shares,
    )


def main() -> None:
    arguments = vars(parser().parse_args())
    names = RunConfig.__dataclass_fields__
    config = None
    if "steps" in arguments:
        config = RunConfig(**{name: value for name, value in arguments.items() if name in names})
    globals()[f"_{arguments['stage']}"](config, arguments)


def _vae(config: RunConfig, arguments: dict) -> None:
    from p2p_subject.training import vae
    from p2p_subject.training.grids import reconstruction_grid

    reconstruction_grid(vae.train(config, arguments["batch"]), config.out / "reconstructions.png")


def _scenes(config: None, arguments: dict) -> None:
    from p2p_subject.training.scenes import make_cache

    make_cache(arguments["out"], arguments["vae"], arguments["count"], arguments["processes"])


def _multimodal(config: RunConfig, arguments: dict) -> None:
    from p2p_subject.blip_diffusion import BlipDiffusionPipeline
    from p2p_subject.loading import miniature_folder
    from p2p_subject.training import multimodal
    from p2p_subject.training.representation import train
    from p2p_subject.training.scenes import caption_batches

    folder = arguments["model"] or miniature_folder()
    pipeline = BlipDiffusionPipeline.from_pretrained(folder)
    pieces = pipeline.qformer_tokenizer

    def build() -> multimodal.MultimodalTrainer:
        return multimodal.fresh(pipeline.qformer, pieces, arguments["bert"])

    evaluate = multimodal.evaluation(build, pieces)
    train(config, build, caption_batches(pieces, arguments["batch"], config.seed), evaluate, model=folder)


def _representation(config: RunConfig, arguments: dict) -> None:
    from p2p_subject.training import miniature
    from p2p_subject.training.grids import generation_grid
    from p2p_subject.training.representation import SubjectTrainer, start, train
    from p2p_subject.training.scenes import Cache

    learning, cache = learning_of(arguments), Cache(arguments["scenes"])

    def build() -> SubjectTrainer:
        trainer = SubjectTrainer(**miniature.networks(), **miniature.SETTINGS, learning=learning)
        for path in arguments["start_from"]:
            start(trainer, path)
        return trainer

    def evaluate(step: int, folder: Path) -> dict[str, float]:
        generation_grid(folder / "ema.safetensors", arguments["vae"], folder / f"grid-{step:06d}.png")
        return {}

    record = {"learning": dataclasses.asdict(learning), "start_from": arguments["start_from"], "scenes": cache.count}
    train(config, build, cache.batches(arguments["batch"], config.seed), evaluate, **record)


def _structure(config: RunConfig, arguments: dict) -> None:
    from p2p_subject.blip_diffusion import BlipDiffusionPipeline
    from p2p_subject.loading import miniature_folder
    from p2p_subject.training import structure
    from p2p_subject.training.representation import train
    from p2p_subject.training.scenes import Cache

    folder = arguments["model"] or miniature_folder()
    pipeline = BlipDiffusionPipeline.from_pretrained(folder)
    batches = structure.batches(Cache(arguments["scenes"]), arguments["batch"], config.seed)
    train(config, lambda: structure.StructureTrainer(pipeline), batches, model=folder)


def _export(config: None, arguments: dict) -> None:
    from p2p_subject.training import export

    run, out = arguments["run"], arguments["out"]
    if arguments["vae"]:
        export.export(run, arguments["vae"], out)
    elif arguments["model"]:
        export.export_onto(run, arguments["model"], out)
    else:
        export.export_controlnet(run, arguments["structure"], out)


if __name__ == "__main__":
    main()
