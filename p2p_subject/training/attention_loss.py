"""The attention term of training: the words of a caption should cover their regions, not concentrate on a peak of them.

Only the miniature is trained with it. Real checkpoints never had such a teacher; mask rules are chosen on a twin without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor


class _ExplicitAttention:
    """Attention with explicit maps; keeps them, averaged over heads, for cross-attention over `pixels` queries."""

    def __init__(self, pixels: int | None, maps: list[Tensor]) -> None:
        self.pixels, self.maps = pixels, maps

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        attention = scores.softmax(-1, dtype=scores.dtype)
        if encoder_hidden_states is not None and query.shape[2] == self.pixels:
            self.maps.append(attention.float().mean(1))  # (B, Q, T)
        return attn.to_out[0]((attention @ value).transpose(1, 2).flatten(2))


@contextmanager
def explicit_attention(unet: UNet2DConditionModel, record_side: int | None) -> Iterator[list[Tensor]]:
    """Run attention with explicit maps; yields a list that receives those of cross-attention, (B, Q, T) each.

    Layers of `record_side` x `record_side` pixels are kept (None: none). At the few hundred pixels of the miniature the
    explicit form trains a fifth faster on a CPU than the fused kernel, whose backward pass is slow there.
    """
    maps: list[Tensor] = []
    before = dict(unet.attn_processors)
    unet.set_attn_processor(_ExplicitAttention(record_side and record_side**2, maps))
    try:
        yield maps
    finally:
        unet.set_attn_processor(before)


def coverage_loss(maps: list[Tensor], columns: Tensor, mask: Tensor, with_subject: int, position: int, queries: int) -> Tensor:
    """Cross-entropy of the word's share with the object's mask, plus the shortfall of the word's map inside it.

    `maps` (B', Q, T) each, B' >= B; `columns` (B, 2): category and background columns in the caption alone; `mask`
    (B, side, side) in [0, 1]. The first `with_subject` rows carry `queries` columns inserted at `position`; those columns
    belong to the subject as its word does.
    """
    attention = torch.stack([m[: len(mask)] for m in maps]).mean(0)  # (B, Q, T)
    rows = torch.arange(len(mask), device=mask.device)
    inserted = (rows < with_subject).long()
    shifted = columns + inserted[:, None] * queries * (columns >= position).long()
    word = attention[rows, :, shifted[:, 0]]
    background = attention[rows, :, shifted[:, 1]]
    subject = attention[:, :, position : position + queries].sum(-1) * inserted[:, None]
    inside, total = mask.flatten(1), word + subject + background + 1e-6
    # The word must find its region on its own, because a source picture has no subject columns; so must the sum.
    entropy = _entropy(word / (word + background + 1e-6), inside) + _entropy((word + subject) / total, inside)
    mapped = word + subject
    shortfall = (inside * (1 - mapped / mapped.amax(1, keepdim=True).detach().clamp_min(1e-6))).sum(1) / (inside.sum(1) + 1)
    return entropy / 2 + shortfall.mean()


def _entropy(share: Tensor, inside: Tensor) -> Tensor:
    """Mean binary cross-entropy; written out because the fused one refuses to run under autocast."""
    share = share.clamp(1e-4, 1 - 1e-4)
    return -(inside * share.log() + (1 - inside) * (1 - share).log()).mean()
