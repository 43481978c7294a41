"""`python -m p2p_subject.training STAGE ...`: train the miniature model from nothing.

Stages, in order: `vae`, `scenes` (draw and encode the training set), `representation`, `export` (write the model folder).
For a model of the real size, `cutouts` prepares a folder of pictures.
A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from p2p_subject.errors import P2PSubjectError
from p2p_subject.training import cutout_stage
from p2p_subject.training.loop import RunConfig


def _run_arguments(parser: argparse.ArgumentParser, steps: int, batch: int, rate: float) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an interrupted run there goes on")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures a step, over all processes (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=rate, help="default %(default)s")
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the steps at full rate (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def parser() -> argparse.ArgumentParser:
    """The command line of the stages."""
    top = argparse.ArgumentParser(prog="python -m p2p_subject.training", description=__doc__)
    stages = top.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="train the autoencoder on scenes")
    _run_arguments(vae, steps=5000, batch=12, rate=1.5e-3)
    scenes = stages.add_parser("scenes", help="draw the training scenes and encode them once")
    scenes.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--count", type=int, default=60_000)
    scenes.add_argument("--processes", type=int, default=2)
    representation = stages.add_parser("representation", help="subject representation learning")
    _run_arguments(representation, steps=8000, batch=64, rate=1e-3)
    representation.add_argument("--scenes", type=Path, required=True, help="folder written by the stage `scenes`")
    representation.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder, for the grids")
    representation.add_argument("--start-from", type=Path, help="ema.safetensors of a run, or a model folder, to begin with")
    representation.add_argument("--attention-weight", type=float, default=0.0, help="weight of the coverage term (default 0)")
    export = stages.add_parser("export", help="write a run as a model folder in the official layout")
    export.add_argument("--run", type=Path, required=True)
    export.add_argument("--vae", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    cutout_stage.add_arguments(stages.add_parser("cutouts", help="cut the subjects out of a folder of pictures"))
    return top


def main() -> None:
    arguments = vars(parser().parse_args())
    stage = arguments.pop("stage")
    names = RunConfig.__dataclass_fields__
    if stage == "vae":
        from p2p_subject.training import vae
        from p2p_subject.training.grids import reconstruction_grid

        config = RunConfig(**{k: v for k, v in arguments.items() if k in names}, evaluate_every=1000, ema=0.998)
        reconstruction_grid(vae.train(config, arguments["batch"]), config.out / "reconstructions.png")
    elif stage == "scenes":
        from p2p_subject.training.scenes import make_cache

        make_cache(arguments["out"], arguments["vae"], arguments["count"], arguments["processes"])
    elif stage == "representation":
        from p2p_subject.training import representation
        from p2p_subject.training.grids import generation_grid

        config = RunConfig(**{k: v for k, v in arguments.items() if k in names}, evaluate_every=1000)

        def evaluate(step: int, folder: Path) -> dict[str, float]:
            generation_grid(folder / "ema.safetensors", arguments["vae"], folder / f"grid-{step:06d}.png")
            return {}

        representation.train(
            config,
            arguments["scenes"],
            arguments["batch"],
            arguments["attention_weight"],
            start_from=arguments["start_from"],
            evaluate=evaluate,
        )
    elif stage == "export":
        from p2p_subject.training.export import export

        export(arguments["run"], arguments["vae"], arguments["out"])
    elif stage == "cutouts":
        try:
            cutout_stage.command(argparse.Namespace(**arguments))
        except P2PSubjectError as error:
            parser().exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
