"""The command line: arguments become an `EditSpec` and calls of `Editor`; results become files and a few lines of text.

Nothing heavy is imported before the arguments are read, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from p2p_subject import __version__

PROGRAM = "p2p-subject"
METHODS = ("direct", "ddim", "fixed_point", "negative_prompt", "null_text", "edit_friendly")
"""Inversion methods, as in `p2p_subject.inverting.METHODS`, which imports torch."""

KINDS = ("canny", "scribble")
"""Control pictures made of a picture alone, as in `p2p_subject.control_images.DRAWN`, which imports numpy."""


class UsageError(Exception):
    """The arguments themselves are wrong; nothing was started."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The whole command line; nothing is imported for it."""
    top = _Parser(prog=PROGRAM, description="Put this dog in that photo: subject-driven image editing.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False)

    edit = command("edit", "put a subject in the place of a word of a picture, add or take out a word, or edit by prompt alone")
    _source_arguments(edit)
    edit.add_argument("--swap", type=_word, metavar="WORD", help="word of the prompt to replace; WORD#1 for its second place")
    about = "put what WORD of the target prompt says into the picture; needs --target-prompt, such as 'a cat on grass'"
    edit.add_argument("--add", type=_word, metavar="WORD", help=about)
    about = "take out what WORD of the prompt shows; needs --target-prompt, what is left, such as 'grass'"
    edit.add_argument("--remove", type=_word, metavar="WORD", help=about)
    _subject_arguments(edit)
    _control_arguments(edit, "the kind of it to be made of SOURCE")
    edit.add_argument("--target-prompt", metavar="TEXT", help="prompt of the result (follows from --swap and --category)")
    edit.add_argument("--weight", action="append", type=_weight, metavar="WORD=F", help="how much a word of the result counts")
    edit.add_argument("--out", required=True, metavar="FILE", help="the edited picture (.png, .jpg, .webp, .tif or .bmp)")
    edit.add_argument("--mask-out", metavar="FILE", help="write where the picture was allowed to change")
    edit.add_argument("--sheet", metavar="FILE", help="write source, subject, attention, mask and result on one sheet")
    edit.add_argument("--mask", metavar="PICTURE", help="change only what is white here, instead of where the attention is")
    about = "share of the steps in which words keep the source's layout, or START,STOP (0.8; subjects: 0.2; --remove: 0)"
    edit.add_argument("--cross-replace", type=_window, metavar="F", help=about)
    about = "the same, in which shapes are the source's (0.4; subjects: 0.2; --remove: 0)"
    edit.add_argument("--self-replace", type=_window, metavar="F", help=about)
    about = "share of the steps to leave out, from the noise (0; with --method edit_friendly 0.36 in its paper)"
    edit.add_argument("--skip", type=_skipped, metavar="F", help=about)
    edit.add_argument("--room", type=_share, metavar="F", help="share of steps with room around WORD (0; subjects: 0.5)")
    edit.add_argument("--threshold", type=float, metavar="F", help="0 to 1, higher: a smaller mask (default: the rule's)")
    edit.add_argument("--rule", choices=("share", "peak", "heat"), help="how attention becomes a mask (default share)")
    edit.add_argument("--no-paste", dest="paste", action="store_false", help="do not restore the pixels outside the mask")
    edit.add_argument("--save-source", metavar="FILE", help="keep the inverted picture (.safetensors) as SOURCE of later edits")
    _common_arguments(edit)
    _guidance_arguments(edit)

    generate = command("generate", "generate a picture, of a subject if one is given")
    generate.add_argument("prompt", metavar="PROMPT", help='such as "a dog on grass"; a subject stands behind its first word')
    _subject_arguments(generate)
    _control_arguments(generate, "KIND:FILE to make one of a picture")
    about = "the picture (.png, .jpg, .webp, .tif or .bmp); of several, NAME_1.png, NAME_2.png and so on"
    generate.add_argument("--out", required=True, metavar="FILE", help=about)
    generate.add_argument("--count", type=_count, default=1, metavar="N", help="pictures, each of the next seed (default 1)")
    generate.add_argument("--save-source", metavar="FILE", help="keep the generation (.safetensors) as SOURCE of later edits")
    _common_arguments(generate)
    _guidance_arguments(generate)

    interpolate = command("interpolate", "generate a strip of frames from one subject to another")
    interpolate.add_argument("prompt", metavar="PROMPT", help='such as "a dog on grass"; {category} is the nearer subject\'s')
    _subject_arguments(interpolate, required=True)
    interpolate.add_argument("--to", action="append", required=True, metavar="PICTURE", help="picture of the other subject")
    interpolate.add_argument("--to-category", metavar="WORD", help="what the other subject is (default: the same)")
    interpolate.add_argument("--frames", type=_count, default=7, metavar="N", help="pictures, ends included (default 7)")
    interpolate.add_argument("--spherical", action="store_true", help="turn from one embedding to the other, not straight")
    interpolate.add_argument("--out", required=True, metavar="FILE", help="the strip (.png, .jpg, .webp, .tif or .bmp)")
    _control_arguments(interpolate, "KIND:FILE to make one of a picture")
    _common_arguments(interpolate)
    _guidance_arguments(interpolate)

    stylize = command("stylize", "generate in the style of one picture along the structure of another")
    stylize.add_argument("structure", metavar="STRUCTURE", help="the picture whose structure is kept")
    stylize.add_argument("--style", dest="subject", action="append", required=True, metavar="PICTURE", help="of the style")
    stylize.add_argument("--category", required=True, metavar="WORD", help="what the style's picture shows, such as flower")
    stylize.add_argument("--prompt", required=True, metavar="TEXT", help='what to show, such as "a teapot on a marble table"')
    stylize.add_argument("--out", required=True, metavar="FILE", help="the picture (.png, .jpg, .webp, .tif or .bmp)")
    stylize.add_argument("--save-source", metavar="FILE", help="keep the generation (.safetensors) as SOURCE of later edits")
    _control_arguments(stylize, "the kind of it to be made of STRUCTURE (default canny)")
    stylize.set_defaults(control="canny")
    _common_arguments(stylize)
    _guidance_arguments(stylize)

    heatmap = command("heatmap", "show where the attention to words of a prompt lies in a picture")
    _source_arguments(heatmap)
    heatmap.add_argument("--words", nargs="+", required=True, type=_word, metavar="WORD", help="of the prompt, a panel each")
    heatmap.add_argument(
        "--rule",
        choices=("heat", "share", "peak"),
        help="the word's map, its share at each pixel, or its pooled map (default heat)",
    )
    heatmap.add_argument("--out", required=True, metavar="FILE", help="the panels on one sheet")
    _control_arguments(heatmap, "the kind of it to be made of SOURCE")
    _common_arguments(heatmap)

    finetune = command("finetune", "learn a subject from a few pictures; the result is a small folder for --model")
    finetune.add_argument("pictures", metavar="FOLDER", help="pictures of the subject; transparency is not learned")
    finetune.add_argument("--category", required=True, metavar="WORD", help="what the subject is, such as dog")
    finetune.add_argument("--out", required=True, metavar="FOLDER", help="the result; a run that was stopped there goes on")
    finetune.add_argument("--masks", metavar="FOLDER", help="where the subject is, in files of the same names")
    finetune.add_argument("--validation", metavar="FOLDER", help="held-out pictures of it, or their share of FOLDER, as 0.25")
    _finetuning_arguments(finetune)
    _model_arguments(finetune)

    demo = command("demo", "swap unseen subjects into unseen scenes, beside the true answers")
    demo.add_argument("--out", default="demo", metavar="FOLDER", help="where the pictures go (default %(default)s)")
    _common_arguments(demo)
    _guidance_arguments(demo, negative=False)

    _model_arguments(command("info", "say what is loaded, from where, and what runs on which device"))
    return top


def _source_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("source", metavar="SOURCE", help="a picture, or a *.safetensors file that --save-source wrote")
    own.add_argument("--prompt", metavar="TEXT", help="describes the picture; needed unless SOURCE is a saved one")
    own.add_argument("--method", choices=METHODS, help="how the picture's generation is recovered (default direct)")


def _subject_arguments(own: argparse.ArgumentParser, *, required: bool = False) -> None:
    otherwise = "" if required else " (default: what --model was fine-tuned on)"
    about = f"picture of the subject; give it again for more{otherwise}"
    own.add_argument("--subject", action="append", required=required, metavar="PICTURE", help=about)
    own.add_argument("--category", required=required, metavar="WORD", help="what the subject is, such as dog")


def _control_arguments(own: argparse.ArgumentParser, otherwise: str) -> None:
    kinds = f"a control picture, or {otherwise}: {' or '.join(KINDS)}"
    own.add_argument("--control", metavar="KIND|FILE", help=kinds)
    own.add_argument("--control-strength", type=_strength, metavar="F", help="how strongly the structure counts (default 1)")
    own.add_argument("--controlnet", metavar="NAME", help="folder or hub name (default: the model's own, or edges)")


def _finetuning_arguments(own: argparse.ArgumentParser) -> None:
    """Options that are fields of `p2p_subject.finetuning.Settings`, whose defaults hold where they are not given."""
    own.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default 80)")
    own.add_argument("--method", choices=("lora", "full"), help="low-rank additions, or all of the U-Net (default lora)")
    own.add_argument("--learning-rate", type=float, metavar="F", help="default 1e-3 for lora, 5e-5 for full")
    own.add_argument("--batch", type=int, metavar="N", help="pictures a step (default 3)")
    own.add_argument("--rank", type=int, metavar="N", help="rank of the additions (default 8)")
    own.add_argument("--alpha", type=float, metavar="F", help="they count alpha / rank (default: the rank)")
    own.add_argument("--train-embedding", action="store_true", default=None, help="train the subject's embedding as well")
    own.add_argument("--prompts", nargs="+", metavar="TEXT", help="what the pictures show (default 'a {category}')")
    own.add_argument("--prior-weight", type=float, metavar="F", help="learn pictures of the category too, to keep its word")
    own.add_argument("--prior", metavar="FOLDER", help="these pictures, or where generated ones are kept for further runs")
    own.add_argument("--prior-count", type=int, metavar="N", help="how many are generated (default 24)")
    own.add_argument("--validate-every", type=int, metavar="N", help="steps between measurements (default 10)")
    own.add_argument("--patience", type=int, metavar="N", help="end after so many without gain; 0: never (default 3)")
    own.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, a third more time")
    own.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (default 40)")
    own.add_argument("--seed", type=_seed, metavar="N", help="of all that is random (default 0)")


def _common_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--seed", type=_seed, metavar="N", help="of what is random: generated pictures, noise maps, scenes")
    own.add_argument("--steps", type=int, metavar="N", help="sampling steps (default 50; of a saved source its own)")
    _model_arguments(own)


def _guidance_arguments(own: argparse.ArgumentParser, *, negative: bool = True) -> None:
    own.add_argument("--guidance-scale", type=_scale, metavar="F", help="how strongly the prompt counts (default: the model's)")
    if negative:
        own.add_argument("--negative-prompt", metavar="TEXT", help="what the result should not show")


def _model_arguments(own: argparse.ArgumentParser) -> None:
    own.add_argument("--model", metavar="NAME", help="folder or hub name (default: the miniature that comes with the library)")
    own.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: the first accelerator, else cpu)")
    own.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default %(default)s")
    own.add_argument("--json", action="store_true", help="write one JSON object to stdout, for errors too")


def _word(text: str) -> str | tuple[str, int]:
    word, _, index = text.rpartition("#")
    return (word, int(index)) if word and index.isdecimal() else text


def _weight(text: str) -> tuple[str | tuple[str, int], float]:
    word, _, factor = text.rpartition("=")
    if not word.strip():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a word and its factor, such as snowy=2 or cat#1=-0.5")
    return _word(word), _number(factor, float, -sys.float_info.max, sys.float_info.max, "a factor, such as 2 or -0.5")


def _window(text: str) -> float | tuple[float, ...]:
    values = [_number(part, float, 0, 1, "a share of the steps, 0 to 1, or START,STOP") for part in text.split(",")]
    return values[0] if len(values) == 1 else tuple(values)


def _share(text: str) -> float:
    return _number(text, float, 0, 1, "a share of the steps, 0 to 1")


def _skipped(text: str) -> float:
    if (share := _share(text)) == 1:
        raise argparse.ArgumentTypeError("1 leaves no step; expected a share of the steps, 0 to below 1")
    return share


def _count(text: str) -> int:
    return _number(text, int, 1, 1000, "a whole number from 1 to 1000")


def _seed(text: str) -> int:
    return _number(text, int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")


def _scale(text: str) -> float:
    return _number(text, float, 0, sys.float_info.max, "a number of 0 or more, such as 7.5")


def _strength(text: str) -> float:
    return _number(text, float, 0, sys.float_info.max, "a number of 0 or more, such as 1")


def _number(text: str, kind: Callable[[str], Any], low: float, high: float, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    try:
        arguments = parser().parse_args(argv)
    except UsageError as error:
        return _fail(error, 2, as_json)
    # Read by these libraries when they are imported; a user who has set them keeps them.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|huggingface_hub)\b")
            from p2p_subject import commands, demo, generation_commands
            from p2p_subject.errors import P2PSubjectError

            found = {"demo": demo.command, **{name: getattr(commands, name) for name in ("edit", "heatmap", "info")}}
            run = found.get(arguments.command) or getattr(generation_commands, arguments.command)
            try:
                started = time.perf_counter()
                report, lines = run(arguments)
            except P2PSubjectError as error:
                return _fail(error, 2, as_json)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), 130, as_json)
    report = {"command": arguments.command, **report, "seconds": round(time.perf_counter() - started, 3)}
    print(json.dumps(report) if as_json else "\n".join(lines))
    return 0


def _fail(error: BaseException, code: int, as_json: bool) -> int:
    message = " ".join(str(error).split())
    if type(error).__name__ == "AmbiguousWordError":
        message += " Here it is written WORD#INDEX, such as cat#0."
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": message}))
    return code
