"""`python -m p2p_subject.training STAGE ...`: train the miniature from nothing, or a model of any size in its layout.

Of the miniature alone: `vae`, `scenes` (draw and encode the training set), `structure` (its ControlNet). The two stages of
pre-training: `multimodal` (a Q-Former on a frozen image encoder) and `representation` (subject representation learning).
`assemble` makes the model folder that they begin with of Stable Diffusion, CLIP and BERT, `cutouts` prepares a folder of
pictures for them, `export` writes a run as a model folder. A run that was interrupted goes on
when the same command is given again. On several GPUs: `accelerate launch -m p2p_subject.training STAGE ... --device cuda`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from p2p_subject.errors import P2PSubjectError
from p2p_subject.training import cutout_stage


def _run_arguments(
    parser: argparse.ArgumentParser,
    steps: int | None,
    batch: int | None,
    rate: float | None,
    decay_from: float | None = 0.4,
    otherwise: str = "default %(default)s",
) -> None:
    """Arguments of every run; `otherwise` says what stands in for the first four where they are None."""
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an interrupted run there goes on")
    parser.add_argument("--steps", default=steps, help=f"optimiser steps ({otherwise})", **number)
    parser.add_argument("--batch", default=batch, help=f"pictures a batch, over all processes ({otherwise})", **number)
    parser.add_argument("--accumulate", default=1, help="batches whose gradients make one step (default 1)", **number)
    parser.add_argument("--learning-rate", type=float, default=rate, metavar="F", help=otherwise)
    share = f"share of the steps at full rate; 1: constant ({otherwise})"
    parser.add_argument("--decay-from", type=float, default=decay_from, metavar="F", help=share)
    preset = "default: what suited the miniature; of pictures, what was published"
    parser.add_argument("--warmup", help=f"steps until the full rate ({preset}, or a tenth of the steps)", **number)
    parser.add_argument("--weight-decay", type=float, metavar="F", help=preset)
    parser.add_argument("--betas", type=float, nargs=2, metavar="F", help=f"of AdamW's moments ({preset})")
    parser.add_argument("--ema", type=float, default=0.999, metavar="F", help="decay of the averaged weights (default 0.999)")
    about = "processes of one thread each, on a CPU (default 2; 1 on a GPU and where another program starts them)"
    parser.add_argument("--processes", help=about, **number)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16", help="arithmetic (default %(default)s)")
    parser.add_argument("--evaluate-every", default=1000, help="default 1000", **number)
    parser.add_argument("--checkpoint-every", default=500, help="default 500", **number)
    parser.add_argument("--seed", default=0, **number)


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
    _run_arguments(multimodal, None, None, None, None, "default: what suited the miniature; with --data BLIP-2's")
    model = "model folder of the image encoder and of all sizes (default: the miniature)"
    multimodal.add_argument("--model", type=Path, help=model)
    multimodal.add_argument(
        "--bert", type=Path, help="folder of a BERT that the Q-Former begins with (default: random weights)"
    )
    _data_arguments(multimodal)
    multimodal.add_argument("--validation", type=Path, help="another such folder, to measure on (default: none)")
    multimodal.add_argument("--text-length", type=int, default=32, metavar="T", help="word pieces of a caption (default 32)")

    representation = stages.add_parser("representation", help="stage two: subject representation learning")
    told = "default: what suited the miniature; with --data the paper's"
    _run_arguments(representation, None, None, None, None, told)
    representation.add_argument("--scenes", type=Path, help="of the miniature: folder written by the stage `scenes`")
    representation.add_argument("--vae", type=Path, help="of the miniature: folder of the autoencoder, for the grids")
    representation.add_argument("--model", type=Path, help="with --data: the model folder to begin with")
    _data_arguments(representation)
    _picture_arguments(representation)
    _start_arguments(representation)
    _learning_arguments(representation)

    structure = stages.add_parser("structure", help="train the miniature's ControlNet on edges")
    _run_arguments(structure, steps=1600, batch=32, rate=5e-4, decay_from=0.5)
    structure.add_argument("--scenes", type=Path, required=True, help="folder written by the stage `scenes`")
    structure.add_argument("--model", type=Path, help="model folder that it shall steer (default: the miniature)")
    about = "ema.safetensors of a run of this stage to begin with"
    structure.add_argument("--start-from", type=Path, action="append", default=[], metavar="PATH", help=about)

    export = stages.add_parser("export", help="write a run as a model folder in the official layout")
    export.add_argument("--run", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    rest = export.add_mutually_exclusive_group(required=True)
    rest.add_argument("--vae", type=Path, help="of a run of the miniature: folder of the autoencoder")
    rest.add_argument("--model", type=Path, help="of any other run: the model folder that it began with")
    rest.add_argument("--structure", type=Path, help="of a run of `structure`: the model folder that it steers")
    _assemble_arguments(stages.add_parser("assemble", help="a model folder of Stable Diffusion, CLIP and BERT, to be trained"))
    cutout_stage.add_arguments(stages.add_parser("cutouts", help="cut the subjects out of a folder of pictures"))
    return top


def _assemble_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--stable-diffusion", required=True, metavar="MODEL", help="its folder or hub name; one text encoder")
    own.add_argument("--image-encoder", type=Path, required=True, metavar="FOLDER", help="of a CLIP; the paper: ViT-L/14")
    own.add_argument("--bert", type=Path, required=True, metavar="FOLDER", help="with vocab.txt; the paper: base, uncased")
    own.add_argument("--out", type=Path, required=True, help="the new model folder")
    own.add_argument("--queries", type=int, default=16, metavar="N", help="tokens of a subject (default %(default)s)")
    about = "last layers of the image encoder that are not run (default %(default)s)"
    own.add_argument("--left-out", type=int, default=1, metavar="N", help=about)
    own.add_argument("--variant", help="of Stable Diffusion's files, such as fp16")


def _data_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--data", type=Path, help="folder of pictures with captions (default: the miniature world)")
    own.add_argument("--threads", type=int, default=4, help="that read pictures ahead (default %(default)s)")


def _picture_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--cutouts", type=Path, help="with --data: folder written by the stage `cutouts`")
    own.add_argument("--backgrounds", type=Path, help="folder of pictures without subjects (default: painted ones)")
    own.add_argument("--subject", default="", metavar="WORD", help="category of pictures that do not name theirs")
    told = "of captions (default released, as the pipelines insert a subject; paper is for comparing trainings)"
    own.add_argument("--template", choices=("released", "paper"), default="released", help=told)
    own.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the pictures (default: the model's own)")


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
    own.add_argument("--attention-weight", type=float, default=0.0, help="weight of the coverage term (default 0)")
    own.add_argument("--freeze-text-encoder", action="store_true", help="ablation: the text encoder stays as it is")
    own.add_argument("--no-category-text", action="store_true", help="ablation: the Q-Former does not read the category")
    about = "no subjects at all: an image generator, such as the ablations begin with"
    own.add_argument("--captions-only", action="store_true", help=about)
    own.add_argument("--no-subject-drop", action="store_true", help="ablation: every caption has its subject")
    own.add_argument("--checkpointing", action="store_true", help="less memory for activations, a third more time")


def main() -> None:
    arguments = parser().parse_args()
    # torch and diffusers take seconds to import; usage errors come before.
    from p2p_subject.training import stages

    try:
        stages.run(arguments)
    except P2PSubjectError as error:
        parser().exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
