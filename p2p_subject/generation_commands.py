"""The commands that make pictures or models of a subject: generate, interpolate, stylize, finetune."""

from __future__ import annotations

import secrets
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_subject.commands import (
    Report,
    control_of,
    given,
    listed,
    load_editor,
    output_files,
    run_report,
    subject_of,
    write_outputs,
)
from p2p_subject.edits import Subject
from p2p_subject.errors import ArgumentError
from p2p_subject.images import load_image
from p2p_subject.source import Source
from p2p_subject.viz import contact_sheet, panel_for

if TYPE_CHECKING:
    from p2p_subject.editor import Editor


FINETUNING = (
    "steps", "method", "learning_rate", "batch", "rank", "alpha", "train_embedding", "prompts", "prior_weight", "prior",
    "prior_count", "validate_every", "patience", "gradient_checkpointing", "checkpoint_every", "seed", "masks",
)  # fmt: skip
"""Arguments of `finetune` that `Editor.finetune` takes by the same name."""


def generate(arguments: Namespace) -> Report:
    """Generate a picture, of a subject if one is given, or several."""
    numbered = _numbered(arguments.out, arguments.count)
    if arguments.count > 1 and arguments.save_source:
        raise ArgumentError(f"--save-source keeps one generation, --count {arguments.count} was given; leave one out")
    targets = output_files(arguments, source=arguments.save_source, **numbered)
    subject = subject_of(arguments)
    _choose_seed(arguments)
    control = control_of(arguments)
    editor = load_editor(arguments)
    sources = _in_batches(
        editor,
        [{"prompt": arguments.prompt, "subject": subject, "seed": arguments.seed + k} for k in range(arguments.count)],
        negative_prompt=arguments.negative_prompt,
        control=control,
        **given(arguments, "steps", "guidance_scale", "control_strength"),
    )
    return _generated(editor, arguments, sources, targets)


def interpolate(arguments: Namespace) -> Report:
    """Generate a strip of frames from one subject to another, from the same noise."""
    targets = output_files(arguments, image=arguments.out)
    first, second = subject_of(arguments), Subject(arguments.to, arguments.to_category or arguments.category)
    _choose_seed(arguments)
    amounts = [k / max(arguments.frames - 1, 1) for k in range(arguments.frames)]
    mixed = [Subject.mix(first, second, amount, spherical=arguments.spherical) for amount in amounts]
    control = control_of(arguments)
    editor = load_editor(arguments)
    prompts = [arguments.prompt.replace("{category}", own.category) for own in mixed]
    rows = [{"prompt": prompt, "subject": own, "seed": arguments.seed} for prompt, own in zip(prompts, mixed)]
    options = {"negative_prompt": arguments.negative_prompt, "control": control}
    options |= given(arguments, "steps", "guidance_scale", "control_strength")
    sources = _in_batches(editor, rows, **options)
    panels = [(first.category, first.pictures[0])]
    panels += [(f"{amount:.2f}", source.image) for amount, source in zip(amounts, sources)]
    panels += [(second.category, second.pictures[0])]
    sheet = contact_sheet([panels], panel=panel_for(sources[0].image))
    outputs = write_outputs(targets, {"image": sheet}, None)
    told = {"outputs": outputs, "prompts": [source.prompt for source in sources], "amounts": amounts}
    report = told | run_report(editor, arguments, sources[0])
    return report, [f"{arguments.prompt!r}, seed {arguments.seed}, {len(sources)} frames", *listed(outputs)]


def stylize(arguments: Namespace) -> Report:
    """Generate in the style of one picture along the structure of another."""
    targets = output_files(arguments, image=arguments.out, source=arguments.save_source)
    style, structure = subject_of(arguments), load_image(arguments.structure, what="structure")
    _choose_seed(arguments)
    control = control_of(arguments, structure)
    editor = load_editor(arguments)
    source = editor.stylize(
        structure,
        style=style,
        prompt=arguments.prompt,
        control=control,
        negative_prompt=arguments.negative_prompt,
        **given(arguments, "seed", "steps", "guidance_scale", "control_strength"),
    )
    return _generated(editor, arguments, [source], targets)


def _generated(editor: Editor, arguments: Namespace, sources: Sequence[Source], targets: dict[str, Path]) -> Report:
    outputs = write_outputs(targets, dict(zip(_numbered("", len(sources)), (source.image for source in sources))), sources[0])
    report = {"outputs": outputs, "prompt": sources[0].prompt, **run_report(editor, arguments, sources[0])}
    seeds = f"seed {arguments.seed}" + (f" to {arguments.seed + len(sources) - 1}" if len(sources) > 1 else "")
    return report, [f"{sources[0].prompt!r}, {seeds}", *listed(outputs)]


def _numbered(out: str, count: int) -> dict[str, str]:
    """Names of the pictures of a command, and the files they go to."""
    if count == 1:
        return {"image": out}
    path = Path(out)
    return {f"image_{k}": str(path.with_name(f"{path.stem}_{k}{path.suffix}")) if out else "" for k in range(1, count + 1)}


def _choose_seed(arguments: Namespace) -> None:
    """Choose a seed where none was given, here, so that it can be told: any picture can be made again."""
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(2**32)


AT_ONCE = 4
"""Pictures of one U-Net call at most, so that memory does not grow with their number."""


def _in_batches(editor: Editor, rows: Sequence[dict[str, Any]], **options: Any) -> list[Source]:
    sources: list[Source] = []
    for first in range(0, len(rows), AT_ONCE):
        part = rows[first : first + AT_ONCE]
        sources += editor.generate(**{name: [row[name] for row in part] for name in part[0]}, **options)
    return sources


def finetune(arguments: Namespace) -> Report:
    """Learn a subject from the pictures of a folder."""
    options = given(arguments, *FINETUNING)
    if not Path(arguments.pictures).is_dir():
        raise ArgumentError(f"{arguments.pictures!r} is no folder; expected the one that holds the pictures of the subject")
    validation = arguments.validation
    if validation is not None and not Path(validation).is_dir():
        validation = _share(validation)
    editor = load_editor(arguments)
    result = editor.finetune(arguments.pictures, arguments.category, validation=validation, out=arguments.out, **options)
    folder = Path(arguments.out).resolve()
    measured = [row["validation"] for row in result.history if row["step"] == result.step and "validation" in row]
    report = {
        "outputs": {"folder": str(folder)},
        "category": result.subject.category,
        "model": editor.model.name,
        "device": str(editor.model.device),
        "method": result.settings.method,
        "steps": result.settings.steps,
        "kept_step": result.step,
        "loss": result.history[-1]["loss"],
        "validation": measured[0] if measured else None,
        "seed": result.settings.seed,
    }
    told = f"learned a {result.subject.category} in {result.step} steps ({result.settings.method}); use it as --model {folder}"
    return report, [told, *listed(report["outputs"])]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"--validation {text!r} is no folder and no share of the pictures, such as 0.25") from None
