"""The published way to edit by attention, as the peer that speed is measured against: explicit maps, four rows a step.

Written from the formulas of Prompt-to-Prompt (Hertz et al. 2022, section 3.3; for re-weighting as in its code) and not for
speed alone: what the published loop does is done. Source and target are sampled together, both with guidance, in the rows
`[source uncond, target uncond, source cond, target cond]`. Every map is materialised and the target's are overwritten. Those of
the conditional rows of up to 32x32 pixels are kept at every step and summed over the steps, and the mask comes from the sums.
What the edit does not change in a step is left alone, so the peer is no slower than it has to be.

Letters: H heads, Q pixels, S and T source and target tokens, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from inversion import Move, Schedule, guide, walk
from p2p_subject.attention import map_size
from p2p_subject.context import Context, stack
from p2p_subject.controller import self_pixels, steps_of
from p2p_subject.edits import EditSpec
from p2p_subject.models import Model
from p2p_subject.prompts import Plan, describe, word_and_index

KEPT_PIXELS = 32 * 32
"""Maps of layers of more pixels are not kept: the published guard against running out of memory."""


@dataclass
class MapEditor:
    """Edits the maps of one step and keeps sums of them over the steps, as the published `AttentionStore` does.

    `matrix` (S, T), `covered` (T,) and `weights` (T,) are the edit, `cross_steps` and `own_steps` the steps in which cross- and
    self-attention follow the source, the latter up to `own_pixels`. `index` is the step under way.
    """

    matrix: Tensor
    covered: Tensor
    weights: Tensor
    cross_steps: range
    own_steps: range
    own_pixels: int
    index: int = 0
    step: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def edit(self, layer: str, maps: Tensor, cross: bool) -> None:
        """Change the target's of the conditional maps (2, H, Q, T), in place, and keep both."""
        source, target = maps
        if cross and self.index in self.cross_steps:
            matrix, covered, weights = (x.to(maps.dtype) for x in (self.matrix, self.covered, self.weights))
            target.copy_((source @ matrix + target * (1 - covered)) * weights)
        elif not cross and self.index in self.own_steps and maps.shape[2] <= self.own_pixels:
            target.copy_(source)
        if maps.shape[2] <= KEPT_PIXELS:
            self.step[layer] = maps

    def end_step(self) -> None:
        """Add the maps of the step to the sums."""
        for layer, maps in self.step.items():
            if layer in self.sums:
                self.sums[layer] += maps
            else:
                self.sums[layer] = maps
        self.step = {}

    def heat(self, columns: tuple[int, ...], row: int, size: tuple[int, int]) -> Tensor:
        """Sum of the words' maps of all steps so far, averaged over layers and heads of `size` (h, w); row 0 is the source."""
        pixels = size[0] * size[1]
        read = [maps[row] for layer, maps in self.sums.items() if ".attn2" in layer and maps.shape[2] == pixels]
        return torch.cat([maps[..., list(columns)].float().sum(-1) for maps in read]).mean(0).unflatten(0, size)


class ExplicitAttention:
    """Attention of one layer with its maps in memory; `fused` spares those that are neither edited nor kept."""

    def __init__(self, layer: str, editor: MapEditor, fused: bool = False) -> None:
        self.layer, self.editor, self.fused = layer, editor, fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        query, key, value = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )  # (4, H, Q or T, d)
        if self.fused and not cross and query.shape[2] > max(KEPT_PIXELS, self.editor.own_pixels):
            out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        else:
            maps = (query * attn.scale @ key.transpose(-1, -2)).softmax(-1)  # (4, H, Q, T)
            self.editor.edit(self.layer, maps[2:], cross)
            out = maps @ value
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


@contextmanager
def explicit_attention(unet: UNet2DConditionModel, editor: MapEditor, fused: bool = False) -> Iterator[None]:
    """Install `ExplicitAttention` in every layer of `unet` and restore what was there."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: ExplicitAttention(name.removesuffix(".processor"), editor, fused) for name in before})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@dataclass(frozen=True)
class PublishedRun:
    """Source and target under way: `predict` and `after` are what `walk` takes, within `explicit_attention`."""

    model: Model
    context: Context
    scale: float
    spec: EditSpec
    plan: Plan
    editor: MapEditor
    steps: int

    def predict(self, latents: Tensor, move: Move) -> Tensor:
        """Guided noise of source and target, (2, C, h, w), in a call of four rows."""
        self.editor.index = move.index
        predicted = self.model.noise(latents.repeat(2, 1, 1, 1), move, self.context)
        self.editor.end_step()
        return guide(*predicted.chunk(2), self.scale)

    def after(self, latents: Tensor, move: Move) -> Tensor:
        """The target's latents inside the mask, the source's outside."""
        if self.spec.blend is None or move.index in steps_of((0.0, self.spec.blend.start), self.steps):
            return latents
        source, target = latents
        return torch.stack([source, torch.where(self._mask(tuple(latents.shape[-2:])), target, source)])

    def _mask(self, size: tuple[int, int]) -> Tensor:
        regions, read = [], map_size(self.model.unet, size)
        for row, words in enumerate((self.plan.source_words, self.plan.target_words)):
            heat = self.editor.heat(words.columns, row, read)
            enlarged = F.interpolate(F.max_pool2d(heat[None, None], 3, 1, 1), size)[0, 0]
            regions.append(enlarged / enlarged.max() > self.spec.blend.threshold)
        return regions[0] | regions[1]


def published_run(model: Model, prompt: str, spec: EditSpec, steps: int, size: tuple[int, int], scale: float) -> PublishedRun:
    """Encode the texts and compile the edit for latents of `size` (h, w).

    Raises `ValueError` for an edit that the published code does not have.
    """
    blend = spec.blend
    if spec.subject is not None or spec.erase or spec.room or spec.padding != "reference" or spec.cross_windows()[1]:
        raise ValueError(f"{spec}: expected a text edit with padding='reference' and one window for all words")
    if blend is not None and (
        (blend.rule, blend.maps, blend.subtract, spec.grow, blend.mask) != ("peak", "running", (), 0, None)
        or None in (blend.source_words, blend.target_words, blend.threshold)
    ):
        raise ValueError(f"{blend}: expected rule='peak', maps='running', words, a threshold, and nothing beyond")
    plan = describe(model.layout(prompt), spec, model.layout)
    weights = torch.ones(plan.layout.length)
    for word, factor in spec.weights.items():
        weights[list(plan.layout.columns(*word_and_index(word)))] = factor
    editor = MapEditor(
        matrix=plan.alignment.matrix.to(model.device),
        covered=plan.alignment.covered.to(model.device),
        weights=weights.to(model.device),
        cross_steps=steps_of(spec.cross_windows()[0], steps),
        own_steps=steps_of(spec.self_replace, steps),
        own_pixels=self_pixels(spec.self_resolution, size),
    )
    contexts = [model.unconditional().expand(2), model.encode(model.layout(prompt)), model.encode(plan.layout)]
    return PublishedRun(model, stack(contexts), scale, spec, plan, editor, steps)


@torch.no_grad()
def published_loop(
    model: Model, prompt: str, spec: EditSpec, noise: Tensor, schedule: Schedule, scale: float, fused: bool = False
) -> Tensor:
    """Latents (2, C, h, w) of the source and of its edit, both sampled from `noise` (1, C, h, w) at guidance `scale`."""
    run = published_run(model, prompt, spec, schedule.steps, tuple(noise.shape[-2:]), scale)
    with explicit_attention(model.unet, run.editor, fused):
        return walk(run.predict, noise.expand(2, -1, -1, -1), schedule.sampling(), run.after)
