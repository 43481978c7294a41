"""Builds what `inversion.walk` walks with: a network's noise under guidance and control, and the blend after each step.

Rows of a controlled call: `[source | unconditional targets ... | conditional targets ...]`. The source row has no
unconditional half and no scale, because its latents are read from the stored trajectory: of its output nothing is used but
the queries and keys that the targets borrow on the way. So it is left out where they were recorded, and in the steps in which
nothing is borrowed: K targets cost 1 + 2 K rows in the windows of the edit, and 2 K beyond them or with a recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion import Move, Trajectory, guide
from inversion.walk import Predict
from p2p_subject.blend import binary_mask, blend, region, rule_and_threshold, subtracted_region
from p2p_subject.context import Context, stack
from p2p_subject.controller import Controller, StepControl, steps_of
from p2p_subject.edits import Blend
from p2p_subject.maps import MapMean
from p2p_subject.prompts import Words
from p2p_subject.recording import Recording

Noise = Callable[[Tensor, Move, Context, StepControl | None], Tensor]
"""`noise(latents (R, C, h, w), move, context of R rows, control) -> (R, C, h, w)`: one network call of R rows."""


def guided(
    noise: Noise, unconditional: Callable[[int], Context], context: Context, scale: float, maps: MapMean | None = None
) -> Predict:
    """Prediction with guidance; `context` of one row, `unconditional(index)` that of a sampling step.

    Two rows a latent, or one at scale 1, where nothing is guided. `maps` receives the attention of the conditional rows; the
    network must then be under control.
    """

    def predict(latents: Tensor, move: Move) -> Tensor:
        count = len(latents)
        contexts = [context] if scale == 1 else [unconditional(move.index), context]
        rows = stack([c.expand(count) for c in contexts])
        sink = None if maps is None else maps.sink(range(len(rows) - count, len(rows)))
        control = None if sink is None else StepControl(rows=len(rows), sink=sink)
        predicted = noise(latents.repeat(len(contexts), 1, 1, 1), move, rows, control)
        if sink is not None:
            maps.add(sink.mean(), move.index)
        return predicted if scale == 1 else guide(*predicted.chunk(2), scale)

    return predict


@dataclass(frozen=True)
class Target:
    """What sampling needs to know of one edit: its context of one row and how its mask is made.

    `fixed_mask` (h, w), if the user gave one, stands in place of the words' attention. `square` (h, w), if any, is what lies
    around the swapped word's region: in the first `room` of the steps all of it may change. `grow` dilates the words' mask by
    so many latent pixels. `attended`, if anything is hidden from self-attention, is what is not, by the number Q of pixels
    of a resolution: (Q,) bool.
    """

    context: Context
    blend: Blend | None
    source_words: Words
    target_words: Words
    fixed_mask: Tensor | None = None
    square: Tensor | None = None
    room: float = 0.0
    grow: int = 0
    attended: Mapping[int, Tensor] | None = None

    @property
    def reads_maps(self) -> bool:
        """Whether words' attention is asked for, be it for the mask or for its heat maps."""
        return any(words.columns or words.subtract for words in (self.source_words, self.target_words))

    @property
    def follows_running_maps(self) -> bool:
        """Whether the mask is made from maps of the edit's own steps alone, the source's included."""
        return self.reads_maps and self.blend.maps == "running" and self.fixed_mask is None


def edit_mask(
    target: Target, source_maps: Tensor, target_maps: Tensor, size: tuple[int, int], grow: int, open_square: bool = False
) -> Tensor | None:
    """The mask (H, W) of an edit at `size`, float32 of 0 and 1, from maps (T, h, w); None where no words make one.

    Words to subtract are taken out of the regions of the edited words, or of all of the picture where none are named. What
    comes for the swapped word counts within the target's square alone, all of which is in the mask with `open_square`.
    """
    rule, threshold = rule_and_threshold(target.blend.rule, target.blend.threshold)
    square = None if target.square is None else _enlarged(target.square, size).to(source_maps.device)
    # Words of the target that the user named may be anywhere.
    limit = square if target.blend.target_words is None else None
    found, taken_out = [], []
    for maps, words, within in ((source_maps, target.source_words, None), (target_maps, target.target_words, limit)):
        if words.columns:
            score = region(maps, words.columns, words.others, rule, size)
            found.append(score if within is None else score * within)
        if words.subtract is not None:
            taken_out.append(subtracted_region(maps, words.subtract.columns, words.subtract.others, rule, size))
    if taken_out and not found:
        found = [torch.full_like(taken_out[0], math.inf)]
    if open_square and square is not None:
        # Beyond any score, so that it is above every threshold.
        found.append(2 * square)
    return binary_mask(found, threshold, grow, taken_out) if found else None


def _enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (h, w) at `size`, cell by cell."""
    return mask if tuple(mask.shape) == tuple(size) else F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


@dataclass(frozen=True)
class EditRun:
    """Edits of one source under way: `predict` and `after` are what `walk` takes.

    `source_maps` (T, h, w) were recorded when the source was made, so its region is known from the first step; `maps` receives
    those of the conditional targets, after the edit, and `running_maps` those of the source, where a target asks for them.
    `unconditional(index)` is the unconditional context of a step; `calls` the rows of every network call so far.
    """

    noise: Noise
    calls: list[int]
    source: Trajectory
    source_maps: Tensor
    source_context: Context
    unconditional: Callable[[int], Context]
    targets: list[Target]
    controller: Controller
    scale: float
    maps: MapMean
    running_maps: MapMean
    recording: Recording | None = None

    def predict(self, latents: Tensor, move: Move) -> Tensor:
        """Guided noise of the targets, (K, C, h, w), beside the source's stored latents."""
        count, index, controller = len(self.targets), move.index, self.controller
        running = any(target.follows_running_maps for target in self.targets)
        recorded = self._recorded(index, running)
        replays = recorded is None and (running or controller.crosses(index) or controller.borrows(index) > 0)
        contexts = [self.source_context] if replays else []
        if self.scale != 1:
            contexts.append(self.unconditional(index).expand(count))
        context = stack([*contexts, *[target.context for target in self.targets]])

        rows = len(context)
        read = range(rows - count, rows)
        reads = any(target.reads_maps for target in self.targets)
        sink = self.maps.sink([0, *read] if running and replays else read) if reads else None
        stacked = torch.cat([*[self.source.before(index)] * replays, *[latents] * (1 if self.scale == 1 else 2)])
        control = controller.at(index, rows, sink, recorded, self._attended(replays))
        predicted = self.noise(stacked, move, context, control)

        if sink is not None:
            maps = sink.mean()
            self.maps.add(maps[-count:], index)
        if running:
            own = maps[:1] if replays else self.recording.maps_at(index, maps.device)
            self.running_maps.add(own, index)
        predicted = predicted[int(replays) :]
        return predicted if self.scale == 1 else guide(*predicted.chunk(2), self.scale, self.source.proximal)

    def _attended(self, replays: bool) -> dict[int, Tensor] | None:
        """What each row of a call may see of its own pixels, (R, 1, 1, Q) bool by their number; None where all see all."""
        seen = [target.attended for target in self.targets]
        if not any(seen):
            return None
        found = {}
        for pixels, like in next(filter(None, seen)).items():
            everything = torch.ones_like(like)
            own = [everything if one is None else one[pixels] for one in seen]
            rows = [everything] * replays + own * (1 if self.scale == 1 else 2)
            found[pixels] = torch.stack(rows)[:, None, None]
        return found

    def _recorded(self, index: int, running: bool) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The source's queries and keys of a step, if the recording holds all that the step borrows."""
        if self.recording is None:
            return None
        controller = self.controller
        crosses, pixels = controller.crosses(index), controller.borrows(index)
        if not self.recording.holds(index, crosses or running, pixels):
            return None
        return self.recording.at(index, crosses, pixels, self.source_context.tokens)

    def after(self, latents: Tensor, move: Move) -> Tensor:
        """Edited latents inside each target's mask, the source's outside."""
        kept = self.source.after(move.index)[0]
        size = tuple(latents.shape[-2:])
        blended = []
        for k, (x, target) in enumerate(zip(latents, self.targets)):
            steps = self.controller.steps
            waits = target.blend is None or move.index in steps_of((0.0, target.blend.start), steps)
            mask = None if waits else target.fixed_mask
            if mask is None and not waits:
                open_square = move.index in steps_of((0.0, target.room), steps)
                mask = edit_mask(target, *self.seen(k), size, target.grow, open_square)
            blended.append(x if mask is None else blend(x, kept, mask))
        return torch.stack(blended)

    def seen(self, k: int) -> tuple[Tensor, Tensor]:
        """Maps (T, h, w) of source and target so far, for the mask of target `k`; without words, the source's twice."""
        if not self.targets[k].reads_maps:
            return self.source_maps, self.source_maps
        if self.targets[k].follows_running_maps:
            return self.running_maps.running()[0], self.maps.running()[k]
        return self.source_maps, self.maps.mean()[k]
