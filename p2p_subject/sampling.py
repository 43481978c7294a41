"""Builds what `inversion.walk` walks with: a network's noise under guidance and control, and the blend after each step.

Rows of a controlled call: `[source | unconditional targets ... | conditional targets ...]`. The source row has no
unconditional half and no scale, because its latents are read from the stored trajectory: of its output nothing is used but
the queries and keys that the targets borrow on the way. An edit of K targets costs 1 + 2 K rows a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion import Move, Trajectory
from inversion.walk import After, Predict
from p2p_subject.blend import binary_mask, blend, region, rule_of
from p2p_subject.controller import Controller, MapSink, StepControl
from p2p_subject.edits import Blend
from p2p_subject.prompts import Words

Noise = Callable[[Tensor, Move, Tensor, StepControl | None], Tensor]
"""`noise(latents (R, C, h, w), move, context (R, L, D), control) -> (R, C, h, w)`: one network call of R rows."""


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, eq. 6): 1 is the conditional prediction itself."""
    return unconditional + scale * (conditional - unconditional)


def conditional(noise: Noise, context: Tensor) -> Predict:
    """Prediction without guidance, one row a latent: what inversion needs. `context` (B, L, D)."""
    return lambda latents, move: noise(latents, move, context.expand(len(latents), -1, -1), None)


def guided(noise: Noise, unconditional: Tensor, context: Tensor, scale: float) -> Predict:
    """Prediction with guidance, two rows a latent; contexts (1 or B, L, D). At scale 1 the unconditional row is not run."""
    if scale == 1:
        return conditional(noise, context)

    def predict(latents: Tensor, move: Move) -> Tensor:
        rows = [c.expand(len(latents), -1, -1) for c in (unconditional, context)]
        pair = noise(torch.cat([latents, latents]), move, torch.cat(rows), None)
        return guide(*pair.chunk(2), scale)

    return predict


@dataclass
class MapMean:
    """Running mean of attention maps over the steps of one edit, (rows, T, h, w)."""

    size: tuple[int, int]
    total: Tensor | None = None
    count: int = 0

    def add(self, maps: Tensor) -> None:
        """Add maps (rows, Q, T) of one step."""
        maps = maps.transpose(1, 2).unflatten(-1, self.size)
        self.total = maps if self.total is None else self.total + maps
        self.count += 1

    def mean(self) -> Tensor:
        """Mean so far, (rows, T, h, w)."""
        return self.total / self.count


@dataclass(frozen=True)
class Target:
    """What sampling needs to know of one edit: its context (1, L, D) and how its mask is made.

    `fixed_mask` (h, w), if the user gave one, stands in place of the words' attention.
    """

    context: Tensor
    blend: Blend | None
    source_words: Words
    target_words: Words
    fixed_mask: Tensor | None = None


def scores(target: Target, source_maps: Tensor, target_maps: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Scores (H, W) of the source's and the target's words at `size`, from maps (T, h, w)."""
    rule, _ = rule_of(target.blend.rule)
    return [
        region(maps, words.columns, words.others, rule, size)
        for maps, words in ((source_maps, target.source_words), (target_maps, target.target_words))
        if words.columns
    ]


def trajectory_maps(
    maps_of: Callable[[Tensor, Tensor, Tensor, StepControl], None],
    source: Trajectory,
    context: Tensor,
    size: tuple[int, int],
    batch: int = 16,
) -> Tensor:
    """Mean cross-attention maps (T, h, w) over the whole stored trajectory; its steps are independent, so they are batched.

    `maps_of(latents, timesteps, context, control)` runs the network for its attention alone.
    """
    timesteps = torch.tensor(source.schedule.timesteps, device=context.device)
    latents = source.latents[1:].flip(0)  # noise first, as the timesteps
    total = torch.zeros(context.shape[1], *size, device=context.device)
    for x, t in zip(latents.split(batch), timesteps.split(batch)):
        sink = MapSink(tuple(range(len(x))), size[0] * size[1])
        maps_of(x, t, context.expand(len(x), -1, -1), StepControl(rows=len(x), sink=sink))
        total += sink.mean().sum(0).T.unflatten(-1, size)
    return total / len(timesteps)


def threshold_of(blend_spec: Blend) -> float:
    """The threshold of a blend: its own, or that of its rule."""
    return rule_of(blend_spec.rule)[1] if blend_spec.threshold is None else blend_spec.threshold


def controlled(
    noise: Noise,
    source: Trajectory,
    source_context: Tensor,
    unconditional: Tensor,
    targets: list[Target],
    controller: Controller,
    scale: float,
    maps: MapMean,
) -> tuple[Predict, After]:
    """The pair that edits: `predict` for the targets beside the source's stored latents, and the blend `after` a step.

    `maps` receives the maps of row 0 (source) and of the conditional targets, in this order.
    """
    count = len(targets)
    context = torch.cat([source_context, unconditional.expand(count, -1, -1), *[target.context for target in targets]])
    rows = (0, *controller.targets())

    def predict(latents: Tensor, move: Move) -> Tensor:
        sink = MapSink(rows, maps.size[0] * maps.size[1])
        stacked = torch.cat([source.before(move.index), latents, latents])
        predicted = noise(stacked, move, context, controller.at(move.index, sink))
        maps.add(sink.mean())
        return guide(*predicted[1:].chunk(2), scale)

    def mask_of(target: Target, own: Tensor, index: int, size: tuple[int, int]) -> Tensor | None:
        if target.fixed_mask is not None:
            return target.fixed_mask
        if target.blend is None or index < int(target.blend.start * controller.steps):
            return None
        found = scores(target, maps.mean()[0], own, size)
        return binary_mask(found, threshold_of(target.blend), target.blend.grow) if found else None

    def after(latents: Tensor, move: Move) -> Tensor:
        kept, seen = source.after(move.index)[0], maps.mean()[1:]
        masks = [mask_of(target, own, move.index, latents.shape[-2:]) for target, own in zip(targets, seen)]
        return torch.stack([x if mask is None else blend(x, kept, mask) for x, mask in zip(latents, masks)])

    return predict, after
