"""What the commands of the command line do: each takes the parsed arguments and returns a report and lines of text.

Everything that can be wrong is checked before a network runs, and files are written once all results are there.
"""

from __future__ import annotations

import platform
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from p2p_subject import __version__
from p2p_subject.control_images import KINDS
from p2p_subject.edits import Blend, EditSpec, Subject, Word, add, remove, swap_subject
from p2p_subject.errors import ArgumentError, EditSpecError, ModelError, OutputError, PromptError, StepsError, SubjectError
from p2p_subject.finetuning.stored import base_name, is_finetuned, stored_subject
from p2p_subject.images import load_image, load_mask
from p2p_subject.outputs import IMAGE_FORMATS, check_target, save_image
from p2p_subject.prompts import describe
from p2p_subject.source import Source
from p2p_subject.structure import EDGES, Structure
from p2p_subject.subject import AnySubject
from p2p_subject.viz import contact_sheet, edit_sheet, mask_area, overlay, panel_for

if TYPE_CHECKING:
    from p2p_subject.editor import Editor

Report = tuple[dict[str, Any], list[str]]
"""What a program reads (JSON-able), and what a person reads."""

SAVED_SOURCE = (".safetensors",)


def edit(arguments: Namespace) -> Report:
    """Edit a picture or a saved source."""
    targets = output_files(
        arguments, image=arguments.out, mask=arguments.mask_out, sheet=arguments.sheet, source=arguments.save_source
    )
    spec = _spec(arguments)
    if "mask" in targets and spec.blend is None and arguments.mask is None:
        raise OutputError("--mask-out: without a word to swap, add or remove and without --mask there is no mask")
    opened, prompt = _open(arguments)
    if arguments.mask is not None:
        load_mask(arguments.mask, getattr(opened, "image", opened).size)
    control = control_of(arguments, opened)
    editor = load_editor(arguments)
    source = _invert(editor, arguments, opened, prompt, control, spec)
    result = editor.edit(
        source,
        spec,
        guidance_scale=arguments.guidance_scale,
        negative_prompt=arguments.negative_prompt,
        mask=arguments.mask,
        paste=arguments.paste,
        **given(arguments, "skip"),
    )
    pictures = {"image": result.image, "mask": result.mask}
    if "sheet" in targets:
        pictures["sheet"] = edit_sheet(result, source.prompt)
    outputs = write_outputs(targets, pictures, source)
    area = None if result.mask is None else mask_area(result.mask)
    report = {
        "outputs": outputs,
        "prompt": result.prompt,
        "source_prompt": source.prompt,
        **run_report(editor, arguments, source),
        "unet_rows": result.unet_rows,
        "mask_area": area,
    }
    where = "all of the picture" if area is None else f"{area:.0%} of the picture"
    return report, [f"{source.prompt!r} -> {result.prompt!r}; {where} was allowed to change", *listed(outputs)]


def heatmap(arguments: Namespace) -> Report:
    """Show the attention to words of a picture's prompt."""
    targets = output_files(arguments, image=arguments.out)
    opened, prompt = _open(arguments)
    control = control_of(arguments, opened)
    editor = load_editor(arguments)
    source = _invert(editor, arguments, opened, prompt, control, words=arguments.words)
    names = [word if isinstance(word, str) else f"{word[0]}#{word[1]}" for word in arguments.words]
    panels = [(f"“{prompt}”", source.image)]
    heats = editor.heatmaps(source, arguments.words, **given(arguments, "rule"))
    panels += [(f"“{name}”", overlay(source.image, heat)) for name, heat in zip(names, heats)]
    outputs = write_outputs(targets, {"image": contact_sheet([panels], panel=panel_for(source.image))}, source)
    report = {"outputs": outputs, "prompt": prompt, "words": names, **run_report(editor, arguments, source)}
    return report, [f"{prompt!r}: attention to {', '.join(names)}", *listed(outputs)]


def info(arguments: Namespace) -> Report:
    """Describe the model and what it runs on."""
    editor = load_editor(arguments)
    model = editor.model
    pipeline, unet = model.pipeline, model.unet
    networks = {
        name: {
            "class": type(part).__name__,
            "parameters": sum(weight.numel() for weight in part.parameters()),
            "dtype": str(next(part.parameters()).dtype).removeprefix("torch."),
            "device": str(next(part.parameters()).device),
        }
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    side, cells = round(model.area**0.5), unet.config.sample_size
    report = {
        "model": model.name,
        "folder": _folder(arguments.model),
        "subject": None if editor.subject is None else editor.subject.category,
        "fingerprint": model.fingerprint,
        "device": str(model.device),
        "devices": devices(),
        "picture": [side, side],
        "latent": [unet.config.in_channels, cells, cells],
        "prompt_tokens": model.window,
        "subject_tokens": model.queries,
        "scheduler": type(pipeline.scheduler).__name__,
        "prediction": pipeline.scheduler.config.prediction_type,
        "guidance_scale": model.guidance_scale,
        "parameters": sum(network["parameters"] for network in networks.values()),
        "networks": networks,
        "versions": {
            "p2p_subject": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    }
    return report, _table(report)


def _table(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in report.items():
        if name == "networks":
            lines += [
                f"  {part:<14}{about['class']}, {about['parameters']:,} parameters, {about['dtype']} on {about['device']}"
                for part, about in value.items()
            ]
            continue
        if name == "versions":
            value = ", ".join(f"{part} {about}" for part, about in value.items())
        elif name in ("picture", "latent"):
            value = "x".join(map(str, value))
        elif name == "devices":
            value = ", ".join(value)
        elif name == "parameters":
            value = f"{value:,}"
        lines.append(f"{name.replace('_', ' '):<16}{value}")
    return lines


def _folder(name: str | None) -> str | None:
    """The local folder that is loaded; None for a name on the hub."""
    from p2p_subject.models import miniature_folder

    folder = miniature_folder() if name is None else Path(name)
    return str(folder.resolve()) if folder.is_dir() else None


def given(arguments: Namespace, *names: str) -> dict[str, Any]:
    """The named arguments that were given; for the others the library's own defaults hold."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def listed(outputs: dict[str, str]) -> list[str]:
    """The paths of the outputs as lines of text."""
    return [f"{name}: {path}" for name, path in outputs.items()]


def run_report(editor: Editor, arguments: Namespace, source: Source) -> dict[str, Any]:
    """What every command that runs the model reports."""
    model = editor.model
    report = {"model": model.name, "device": str(model.device), "seed": arguments.seed}
    report["steps"] = source.trajectory.schedule.steps
    if "guidance_scale" in arguments:
        report["guidance_scale"] = editor.guidance_scale(arguments.guidance_scale, source)
    if source.structure is not None:
        report["control_strength"] = source.structure.strength
    return report


def load_editor(arguments: Namespace) -> Editor:
    """Load the model that the arguments name onto the device that they name."""
    # diffusers takes seconds to import; what can be checked before has been.
    from p2p_subject.editor import Editor
    from p2p_subject.models import MINIATURE

    name, available = arguments.device, devices()
    if name is not None and name not in available and f"{name}:0" not in available:
        raise ModelError(f"--device {name!r} is not here; available: {', '.join(available)}")
    tuned = arguments.model is not None and is_finetuned(arguments.model)
    if arguments.model is None or (tuned and base_name(Path(arguments.model)) == MINIATURE):
        # The miniature's layers are too small to share among threads: where a core is busy, waiting for it takes minutes.
        torch.set_num_threads(1)
    options = given(arguments, "controlnet") if "controlnet" in arguments else {}
    place = available[0] if name is None else name
    return Editor.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype), device=place, **options)


def devices() -> list[str]:
    """Names of the devices that networks can run on, the best first."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def output_files(arguments: Namespace, **paths: str | None) -> dict[str, Path]:
    """The files to write, by name of the output; `OutputError` for one that cannot be, or that the command reads."""
    targets = {
        name: check_target(path, SAVED_SOURCE if name == "source" else IMAGE_FORMATS)
        for name, path in paths.items()
        if path is not None
    }
    if len(set(targets.values())) < len(targets):
        raise OutputError(f"one file is named for several outputs ({', '.join(map(str, targets.values()))}); name one for each")
    read = read_files(arguments)
    for target in targets.values():
        # Not by name: file systems may ignore case.
        if target.exists() and any(target.samefile(path) for path in read):
            raise OutputError(
                f"{str(target)!r} is read by the same command, which would replace it; give another name to write"
            )
    require_writable(*{path.parent for path in targets.values()})
    return targets


def read_files(arguments: Namespace) -> set[Path]:
    """The files that a command reads, those that exist: its source, masks, and pictures of subjects and structure."""
    named = [getattr(arguments, name, None) for name in ("source", "structure", "mask", "control")]
    named += [*(getattr(arguments, "subject", None) or ()), *(getattr(arguments, "to", None) or ())]
    # A control picture may stand behind its kind: canny:photo.png.
    named.append((getattr(arguments, "control", None) or "").partition(":")[2])
    return {path for path in map(Path, filter(None, named)) if path.exists()}


def require_writable(*folders: Path) -> None:
    """Raise `OutputError` for a folder that takes no file, by trying: permissions do not tell of all that can be wrong."""
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OutputError(f"cannot write into {str(folder)!r} ({error.strerror or error}); give another folder") from error


def subject_of(arguments: Namespace) -> AnySubject | None:
    """The subject that is given, or that the model was fine-tuned on; that one only where it has a place."""
    if arguments.subject is not None:
        return Subject(arguments.subject, arguments.category or "")
    if arguments.category is not None:
        raise SubjectError(f"--category {arguments.category!r} was given without a picture of it; add --subject PICTURE")
    placed = arguments.command == "generate" or arguments.swap is not None
    known = placed and arguments.model is not None and is_finetuned(arguments.model)
    return stored_subject(Path(arguments.model)) if known else None


def control_of(arguments: Namespace, opened: Image.Image | Source | None = None) -> Any:
    """`control` of a call, for the control picture that the arguments name or the kind of it, to be made of `opened`; checked.

    Where a ControlNet will be needed and none is named, that of the miniature is, on the miniature.
    """
    names = ("control", "control_strength") if isinstance(opened, Source) else ("control_strength", "controlnet")
    left = " and ".join(f"--{name.replace('_', '-')}" for name in given(arguments, *names))
    if left and isinstance(opened, Source):
        raise ArgumentError(f"a saved source keeps to the structure that it was made with; leave {left} out")
    if left and arguments.control is None:
        raise ArgumentError(f"{left} without a control picture; add --control KIND|FILE, or leave out")
    needed = arguments.control is not None or getattr(opened, "structure", None) is not None
    if needed and arguments.model is None and arguments.controlnet is None:
        arguments.controlnet = EDGES
    kind, _, file = (arguments.control or "").partition(":")
    control = (kind, load_image(file, what="control")) if file and kind in KINDS else arguments.control
    Structure.read(control, 1, of=None if isinstance(opened, Source) else opened)
    return control


ALONE = {
    "add": (add, "the picture with it, such as 'a cat on grass'"),
    "remove": (remove, "what is left, such as 'grass'"),
}
"""Edits that put nothing in the place of a word, by option: their builders, and what their prompt says."""


def _spec(arguments: Namespace) -> EditSpec:
    """The edit that the arguments ask for."""
    word, blend = arguments.swap, _blend(arguments)
    changes = given(arguments, "cross_replace", "self_replace", "room")
    changes |= {"prompt": arguments.target_prompt, "blend": blend}
    if arguments.weight:
        changes["weights"] = dict(arguments.weight)
    for name, (builder, described) in ALONE.items():
        if getattr(arguments, name) is not None:
            others = [f"--{n}" for n in given(arguments, *ALONE, "swap", "subject", "category", "room") if n != name]
            if others:
                raise EditSpecError(f"--{name} puts nothing in the place of a word; leave {' and '.join(others)} out")
            if arguments.target_prompt is None:
                raise PromptError(f"--{name} needs --target-prompt, a text that describes {described}")
            return builder(getattr(arguments, name), **changes)
    subject = subject_of(arguments)
    return EditSpec(swap=word, **changes) if subject is None else swap_subject(word, subject, **changes)


def _blend(arguments: Namespace) -> Blend | None:
    """How attention makes the mask; None where no word is named whose attention could."""
    options = given(arguments, "rule", "threshold")
    shaping = given(arguments, "rule", "threshold", "room")
    unnamed = all(getattr(arguments, name) is None for name in ("swap", *ALONE))
    if shaping and (unnamed or arguments.mask is not None):
        names = " and ".join(f"--{name}" for name in shaping)
        raise EditSpecError(f"{names} shape the mask of a word to swap, add or remove; give one and no --mask, or leave out")
    if unnamed:
        return None
    return Blend(**options)


def _open(arguments: Namespace) -> tuple[Image.Image | Source, str]:
    """The picture to invert, or the saved source, and its prompt."""
    if Path(arguments.source).suffix.lower() not in SAVED_SOURCE:
        picture = load_image(arguments.source, what="source")
        if not (arguments.prompt or "").strip():
            raise PromptError("a picture needs --prompt, a text that describes it, such as 'a cat on grass'")
        return picture, arguments.prompt
    source = Source.load(arguments.source)
    if arguments.prompt not in (None, source.prompt):
        raise PromptError(f"{arguments.source} was saved with the prompt {source.prompt!r}; leave --prompt out")
    steps = source.trajectory.schedule.steps
    if arguments.steps not in (None, steps):
        raise StepsError(f"{arguments.source} has {steps} steps, not {arguments.steps}; leave --steps out")
    method = source.trajectory.method
    if arguments.method not in (None, method):
        raise ArgumentError(f"{arguments.source} was made by {method!r}, not {arguments.method!r}; leave --method out")
    return source, source.prompt


OF_METHOD = {"null_text": ("guidance_scale",), "edit_friendly": ("seed",)}
"""What an inversion method goes by besides its picture, by option: null-text serves one scale alone, noise maps are drawn."""


def _invert(
    editor: Editor,
    arguments: Namespace,
    opened: Image.Image | Source,
    prompt: str,
    control: Any = None,
    spec: EditSpec | None = None,
    words: Sequence[Word] = (),
) -> Source:
    """The source to work on, once all that will be asked of it has been checked against its prompt."""
    model, saved = editor.model, isinstance(opened, Source)
    layout = model.layout(prompt, subject=saved and opened.subject is not None)
    for word in words:
        layout.columns(*([word] if isinstance(word, str) else word))
    if spec is not None:
        describe(layout, spec, model.layout)
        model.layout(arguments.negative_prompt or "")
        if arguments.negative_prompt is not None and arguments.method in ("null_text", "negative_prompt"):
            raise ArgumentError(f"--method {arguments.method} sets what guidance leads away from; leave --negative-prompt out")
    if saved:
        return opened
    own = [name for name in OF_METHOD.get(arguments.method, ()) if name in arguments]
    return editor.invert(opened, prompt, control=control, **given(arguments, "steps", "method", "control_strength", *own))


def write_outputs(targets: dict[str, Path], pictures: dict[str, Image.Image], source: Source) -> dict[str, str]:
    """Write every output that was asked for; returns the paths by name."""
    for name, path in targets.items():
        if name == "source":
            source.save(path)
        else:
            save_image(pictures[name], path)
    return {name: str(path) for name, path in targets.items()}
