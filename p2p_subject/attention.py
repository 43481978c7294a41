"""Attention control: a processor that changes values instead of maps, and the `with` block that installs it.

The step's control arrives as the keyword `control` of `cross_attention_kwargs`; the processor keeps no state and counts
nothing. Without a control, or outside its windows, it is plain fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from p2p_subject.controller import MapSink, StepControl
from p2p_subject.errors import HookError

PLAIN = (AttnProcessor, AttnProcessor2_0)


class ControlledAttention:
    """Attention of one layer under a `StepControl` (B rows, H heads, Q pixels, S source and T target tokens)."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        control: StepControl | None = None,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3 or attn.spatial_norm or attn.group_norm:
            raise HookError("attention control supports the transformer blocks of diffusion U-Nets: (B, Q, D), no mask")
        if control is not None and len(hidden_states) != control.rows:
            raise HookError(
                f"the U-Net was called with {len(hidden_states)} rows, the control was compiled for {control.rows}; pass the "
                "source, the unconditional and the conditional targets, in this order"
            )
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        if cross and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )  # (B, H, Q or S, d)
        if control is None:
            out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        elif cross:
            if control.sink is not None and query.shape[2] == control.sink.pixels:
                control.sink.maps.append(_maps(query, key, attn.scale, control, control.sink))
            out = _cross(query, key, value, attn.scale, control)
        else:
            out = _own(query, key, value, attn.scale, control)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _own(query: Tensor, key: Tensor, value: Tensor, scale: float, control: StepControl) -> Tensor:
    """Self-attention; where it follows the source, target rows use the source row's queries and keys."""
    rows = list(range(len(query)))
    for target, source, pixels in zip(control.targets, control.sources, control.self_pixels):
        if query.shape[2] <= pixels:
            rows[target] = source
    if rows != list(range(len(query))):
        query, key = query[rows], key[rows]
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _cross(query: Tensor, key: Tensor, value: Tensor, scale: float, control: StepControl) -> Tensor:
    """Cross-attention; the edited rows are A (from_source V) + B (from_target V), two fused calls."""
    if control.from_source is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    sources, targets = list(control.sources), list(control.targets)
    values = value[targets]  # (K, H, T, d)
    borrowed = control.from_source.to(values.dtype)[:, None] @ values  # (K, H, S, d)
    value = value.clone()
    value[targets] = values * control.from_target.to(values.dtype)[:, None, :, None]
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    followed = F.scaled_dot_product_attention(query[sources], key[sources], borrowed, scale=scale)
    out[targets] = out[targets] + followed
    return out


def _maps(query: Tensor, key: Tensor, scale: float, control: StepControl, sink: MapSink) -> Tensor:
    """Edited maps of the rows of `sink`, averaged over heads, (rows, Q, T) float32."""

    def probabilities(rows: list[int]) -> Tensor:
        scores = query[rows].float() @ key[rows].float().transpose(-1, -2) * scale
        return scores.softmax(-1).mean(1)

    maps = probabilities(list(sink.rows))
    if control.from_source is None:
        return maps
    for k, (source, target) in enumerate(zip(control.sources, control.targets)):
        if target in sink.rows:
            at = sink.rows.index(target)
            followed = probabilities([source])[0] @ control.from_source[k].to(maps.dtype)
            maps[at] = followed + maps[at] * control.from_target[k].to(maps.dtype)
    return maps


@contextmanager
def controlled_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """Install `ControlledAttention` in every transformer block of `unet` and restore what was there, whatever happens.

    Raises `HookError` if a layer carries a processor that is not diffusers' plain one (an IP-Adapter, say), which would be
    silently dropped, or if nothing could be hooked.
    """
    before = dict(unet.attn_processors)
    foreign = {name: type(p).__name__ for name, p in before.items() if type(p) not in PLAIN}
    if foreign:
        name, kind = next(iter(foreign.items()))
        raise HookError(
            f"{len(foreign)} attention layers carry {kind} (first: {name}); control would drop it. Unload the adapter, or call "
            "unet.set_default_attn_processor()"
        )
    if not any(".attn2." in name for name in before):
        raise HookError("this network has no cross-attention layers (attn2), so there is nothing to control")
    processor = ControlledAttention()
    unet.set_attn_processor(dict.fromkeys(before, processor))
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def map_size(unet: UNet2DConditionModel, latent_size: tuple[int, int], wanted: int = 16) -> tuple[int, int]:
    """Size (h, w) of the cross-attention maps that masks are read from, for latents of `latent_size`.

    Of the resolutions that have cross-attention, the one whose area is nearest to `wanted` squared (16x16, where the published
    code reads its maps at 512x512 pixels: finer layers follow texture, coarser ones lose the outline).
    """
    height, width = latent_size
    sizes = []
    for kind in unet.config.down_block_types:
        if "CrossAttn" in kind:
            sizes.append((height, width))
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return min(sizes, key=lambda size: abs(math.log(size[0] * size[1] / wanted**2)))
