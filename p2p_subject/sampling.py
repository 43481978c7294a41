"""Builds what `inversion.walk` walks with: a network's noise under guidance and control, and the blend after each step.

Rows of a controlled call: `[source | unconditional targets ... | conditional targets ...]`. The source row has no
unconditional half and no scale, because its latents are read from the stored trajectory: of its output nothing is used but
the queries and keys that the targets borrow on the way. An edit of K targets costs 1 + 2 K rows a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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


def guided(noise: Noise, unconditional: Tensor, context: Tensor, scale: float, maps: MapMean | None = None) -> Predict:
    """Prediction with guidance; contexts (1 or B, L, D). Two rows a latent, or one at scale 1, where nothing is guided.

    `maps` receives the attention of the conditional rows; the network must then be under control.
    """

    def predict(latents: Tensor, move: Move) -> Tensor:
        contexts = [context] if scale == 1 else [unconditional, context]
        rows = torch.cat([c.expand(len(latents), -1, -1) for c in contexts])
        sink = None if maps is None else maps.sink(range(len(rows) - len(latents), len(rows)))
        control = None if sink is None else StepControl(rows=len(rows), sink=sink)
        predicted = noise(latents.repeat(len(contexts), 1, 1, 1), move, rows, control)
        if sink is not None:
            maps.add(sink, move.index)
        return predicted if scale == 1 else guide(*predicted.chunk(2), scale)

    return predict


@dataclass
class MapMean:
    """Mean of attention maps over the steps of one run of `steps` steps, (rows, T, h, w).

    From the middle of the run on, the mean is over the second half alone: maps of noisy steps are blurred (the masks of
    unsupervised maps rise from .80 to .83 IoU without them).
    """

    size: tuple[int, int]
    steps: int
    halves: dict[bool, tuple[Tensor, int]] = field(default_factory=dict)

    def sink(self, rows: Iterable[int]) -> MapSink:
        """What a network call of this run should read: the maps of `rows` at this size."""
        return MapSink(tuple(rows), self.size[0] * self.size[1])

    def add(self, sink: MapSink, index: int) -> None:
        """Take in what `sink` received in sampling step `index`."""
        maps = sink.mean().transpose(1, 2).unflatten(-1, self.size)
        late = index >= self.steps // 2
        total, count = self.halves.get(late, (0, 0))
        self.halves[late] = (total + maps, count + 1)

    def mean(self) -> Tensor:
        """Mean so far, (rows, T, h, w)."""
        total, count = self.halves.get(True) or self.halves[False]
        return total / count


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


def threshold_of(blend_spec: Blend) -> float:
    """The threshold of a blend: its own, or that of its rule."""
    return rule_of(blend_spec.rule)[1] if blend_spec.threshold is None else blend_spec.threshold


def controlled(
    noise: Noise,
    source: Trajectory,
    source_maps: Tensor,
    source_context: Tensor,
    unconditional: Tensor,
    targets: list[Target],
    controller: Controller,
    scale: float,
    maps: MapMean,
) -> tuple[Predict, After]:
    """The pair that edits: `predict` for the targets beside the source's stored latents, and the blend `after` a step.

    `source_maps` (T, h, w) were recorded when the source was made, so its region is known from the first step; `maps` receives
    those of the conditional targets, after the edit.
    """
    count = len(targets)
    context = torch.cat([source_context, unconditional.expand(count, -1, -1), *[target.context for target in targets]])

    def predict(latents: Tensor, move: Move) -> Tensor:
        sink = maps.sink(controller.targets())
        stacked = torch.cat([source.before(move.index), latents, latents])
        predicted = noise(stacked, move, context, controller.at(move.index, sink))
        maps.add(sink, move.index)
        return guide(*predicted[1:].chunk(2), scale)

    def mask_of(target: Target, own: Tensor, index: int, size: tuple[int, int]) -> Tensor | None:
        if target.fixed_mask is not None:
            return target.fixed_mask
        if target.blend is None or index < int(target.blend.start * controller.steps):
            return None
        found = scores(target, source_maps, own, size)
        return binary_mask(found, threshold_of(target.blend), target.blend.grow) if found else None

    def after(latents: Tensor, move: Move) -> Tensor:
        kept = source.after(move.index)[0]
        masks = [mask_of(target, own, move.index, latents.shape[-2:]) for target, own in zip(targets, maps.mean())]
        return torch.stack([x if mask is None else blend(x, kept, mask) for x, mask in zip(latents, masks)])

    return predict, after
