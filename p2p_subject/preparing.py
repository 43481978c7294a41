"""From a source and its edits to a run that can be walked: everything is checked first, then texts are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inversion import Move, Trajectory, TrajectoryError, reconstruct
from p2p_subject.attention import map_size
from p2p_subject.blend import attended_pixels, binary_mask, region, rule_and_threshold, squares_around
from p2p_subject.context import Context
from p2p_subject.controller import StepControl, compile_edits
from p2p_subject.edits import EditSpec
from p2p_subject.errors import ArgumentError
from p2p_subject.images import load_mask
from p2p_subject.maps import MapMean
from p2p_subject.models import Model
from p2p_subject.prompts import Plan, Words, changes_nothing, describe
from p2p_subject.sampling import EditRun, Target, edit_mask, guided
from p2p_subject.source import Source
from p2p_subject.tokens import TokenLayout
from p2p_subject.visible import latent_mask

Read = Callable[[range, StepControl], None]
"""`read(steps, control)` runs the network once under `control`, with a row for each of those steps of a source."""


def layout_of(model: Model, source: Source) -> TokenLayout:
    """What the text encoder sees for a source's prompt, its subject included."""
    return model.layout(source.prompt, subject=source.subject is not None)


def context_of(model: Model, source: Source) -> Context:
    """The context that a source's prompt, subject and structure make."""
    return model.structured(model.encode(layout_of(model, source), source.subject), source.structure)


def reader(
    model: Model, trajectory: Trajectory, context: Context, callback: Callable[[int, Tensor], None] | None = None
) -> Read:
    """What reads the attention of a stored generation: its steps are independent, so one call takes several.

    `callback(step, latents (1, C, h, w))` is called for each before the network is.
    """
    latents = trajectory.to(model.device)

    def read(steps: range, control: StepControl) -> None:
        for index in steps if callback is not None else ():
            callback(index, latents.before(index))
        rows = torch.cat([latents.before(index) for index in steps])
        timesteps = torch.tensor([trajectory.schedule.timesteps[index] for index in steps])
        model.read(rows, timesteps, context.expand(len(steps)), control)

    return read


def plan(model: Model, source: Source, specs: Sequence[EditSpec]) -> list[Plan]:
    """Work out what each edit means for the source, and refuse what can be refused without running a network."""
    model.require_controllable()
    source.trajectory.require_model(model.fingerprint)
    model.require_structure(source.structure)
    original = layout_of(model, source)
    if len(source.attention) != original.length:
        raise TrajectoryError(
            f"the source holds the attention of {len(source.attention)} tokens, its prompt has {original.length} with this "
            "model; invert the picture again"
        )
    plans = [describe(original, spec, model.layout) for spec in specs]
    for spec in specs:
        if spec.subject is not None:
            model.require_subject(spec.subject)
        if spec.blend is not None and spec.blend.mask is not None:
            load_mask(spec.blend.mask, source.image.size)
    return plans


def identities(model: Model, source: Source, specs: Sequence[EditSpec], plans: Sequence[Plan]) -> list[str]:
    """Prompts of the edits that change nothing."""
    original = layout_of(model, source)
    return [made.layout.prompt for spec, made in zip(specs, plans) if changes_nothing(original, made, spec)]


def prepare(
    model: Model,
    source: Source,
    specs: Sequence[EditSpec],
    plans: Sequence[Plan],
    scale: float,
    negative_prompt: str | None,
    first: int,
    progress: Callable[[Iterable[Move]], Iterable[Move]],
) -> EditRun:
    """Compile the edits from sampling step `first` on, encode their texts and subjects; replay a source that is to be."""
    trajectory = source.trajectory.to(model.device)
    if negative_prompt is not None and trajectory.null_embeddings is not None:
        raise ArgumentError(
            f"negative_prompt={negative_prompt!r}, but the source was inverted by {trajectory.method!r}, which sets the "
            "unconditional embeddings itself; leave it out, or invert by 'direct'"
        )
    size, steps = tuple(trajectory.latents.shape[-2:]), trajectory.schedule.steps
    layouts = [made.layout for made in plans]
    controller = compile_edits(specs, [made.alignment for made in plans], layouts, steps, size, model.device, first)
    negative = model.unconditional(trajectory.negative_prompt if negative_prompt is None else negative_prompt)
    negative = model.structured(negative, source.structure)
    original = context_of(model, source)
    targets = [_target(model, source, spec, made, size) for spec, made in zip(specs, plans)]
    calls: list[int] = []

    def unconditional(index: int) -> Context:
        null = trajectory.unconditional(index)
        return negative if null is None else negative.with_tokens(null, trajectory.null_pooled)

    def noise(latents: Tensor, move: Move, context: Context, control: StepControl | None = None) -> Tensor:
        calls.append(len(latents))
        return model.noise(latents, move, context, control)

    followed = trajectory
    if trajectory.replay:
        followed = reconstruct(guided(noise, unconditional, original, scale), trajectory, progress=progress)
    return EditRun(
        noise=noise,
        calls=calls,
        source=followed,
        source_maps=source.attention.to(model.device),
        source_context=original,
        unconditional=unconditional,
        targets=targets,
        controller=controller,
        scale=scale,
        maps=MapMean(map_size(model.unet, size), steps),
        running_maps=MapMean(map_size(model.unet, size), steps),
        recording=source.recording,
    )


def _target(model: Model, source: Source, spec: EditSpec, made: Plan, size: tuple[int, int]) -> Target:
    # The source's own stays, unless it is taken out: then the target's layout has no place for it.
    kept = source.subject if made.layout.subject else None
    subject = kept if spec.subject is None else model.embed(spec.subject)
    fixed = None
    if spec.blend is not None and spec.blend.mask is not None:
        fixed = latent_mask(load_mask(spec.blend.mask, source.image.size), size).to(model.device)
    context = model.structured(model.encode(made.layout, subject), source.structure)
    has_room = spec.room and made.swapped.columns and fixed is None
    square = _square(source, spec, made.swapped, size, model.device) if has_room else None
    target = Target(context, spec.blend, made.source_words, made.target_words, fixed, square, spec.room, spec.grow)
    return replace(target, attended=_attended(source, target, size, model.device)) if spec.erase else target


def _attended(source: Source, target: Target, size: tuple[int, int], device: torch.device) -> dict[int, Tensor]:
    """What is left to see, by resolution, without the region of the source's words, or of the user's mask."""
    hidden = target.fixed_mask
    if hidden is None:
        of_source = replace(target, target_words=Words())
        hidden = edit_mask(of_source, source.attention, source.attention, size, target.grow)
    return {pixels: seen.to(device) for pixels, seen in attended_pixels(hidden).items()}


def _square(source: Source, spec: EditSpec, swapped: Words, size: tuple[int, int], device: torch.device) -> Tensor | None:
    """The square (h, w), on `device`, around what the source shows of the swapped word; None where it shows nothing of it, and
    where the square would be all of the picture, as a background's: then room would keep nothing."""
    rule, threshold = rule_and_threshold(spec.blend.rule, spec.blend.threshold)
    shown = binary_mask([region(source.attention, swapped.columns, swapped.others, rule, size)], threshold)
    around = squares_around(shown)
    return around.to(device) if around.any() and not around.all() else None
