"""Attention control: a processor that changes values instead of maps, and the `with` block that installs it.

The step's control arrives as the keyword `control` of `cross_attention_kwargs`; the processor keeps no state and counts
nothing. Without a control, or outside its windows, it is plain fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from p2p_subject.controller import StepControl
from p2p_subject.errors import HookError

PLAIN = (AttnProcessor, AttnProcessor2_0)


class ControlledAttention:
    """Attention of the layer named `layer` under a `StepControl` (B rows, H heads, Q pixels, S source and T target tokens)."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

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
        else:
            out = self._controlled(query, key, value, attn.scale, control, cross)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def _controlled(self, query: Tensor, key: Tensor, value: Tensor, scale: float, control: StepControl, cross: bool) -> Tensor:
        tap, sink = control.tap, control.sink
        if tap is not None and (cross or query.shape[2] <= tap.self_pixels):
            tap.taken[self.layer] = query, key
        # What the targets follow: (1, H, Q, d) and (1, H, Q or S, d).
        source = (query[:1], key[:1]) if control.recorded is None else control.recorded.get(self.layer, (None, None))
        if not cross:
            return _own(query, key, value, scale, control, *source)
        if sink is not None and query.shape[2] == sink.pixels:
            sink.maps.append(_maps(query, key, scale, control, *source))
        return _cross(query, key, value, scale, control, *source)


def _own(
    query: Tensor, key: Tensor, value: Tensor, scale: float, control: StepControl, source_query: Tensor, source_key: Tensor
) -> Tensor:
    """Self-attention of what may be seen; where it follows the source, target rows use the source's queries and keys."""
    first = control.rows - len(control.self_pixels)
    follow = [first + k for k, pixels in enumerate(control.self_pixels) if query.shape[2] <= pixels]
    if follow:
        query, key = query.clone(), key.clone()
    # Row by row: an index that is a list would be copied to the GPU, and waited for, in every layer.
    for row in follow:
        query[row], key[row] = source_query[0], source_key[0]
    attended = None if control.attended is None else control.attended[query.shape[2]]
    return F.scaled_dot_product_attention(query, key, value, attended, scale=scale)


def _cross(
    query: Tensor, key: Tensor, value: Tensor, scale: float, control: StepControl, source_query: Tensor, source_key: Tensor
) -> Tensor:
    """Cross-attention; the edited rows are A (from_source V) + B (from_target V), two fused calls."""
    if control.from_source is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    count = len(control.from_source)
    first = len(value) - count
    values = value[first:]  # (K, H, T, d)
    borrowed = control.from_source.to(values.dtype)[:, None] @ values  # (K, H, S, d)
    value = value.clone()
    value[first:] = values * control.from_target.to(values.dtype)[:, None, :, None]
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    followed = F.scaled_dot_product_attention(
        source_query.expand(count, -1, -1, -1), source_key.expand(count, -1, -1, -1), borrowed, scale=scale
    )
    out[first:] += followed
    return out


def _maps(query: Tensor, key: Tensor, scale: float, control: StepControl, source_query: Tensor, source_key: Tensor) -> Tensor:
    """Edited maps of the rows of the control's sink, averaged over heads, (rows, Q, T) float32."""

    def probabilities(query: Tensor, key: Tensor) -> Tensor:
        return (query.float() @ key.float().transpose(-1, -2) * scale).softmax(-1).mean(1)

    maps = torch.cat([probabilities(query[row : row + 1], key[row : row + 1]) for row in control.sink.rows])
    if control.from_source is None:
        return maps
    first = control.rows - len(control.from_source)
    followed = probabilities(source_query, source_key)[0]  # (Q, S)
    for at, k in enumerate(row - first for row in control.sink.rows):
        if k >= 0:
            own = maps[at] * control.from_target[k].to(maps.dtype)
            maps[at] = followed @ control.from_source[k].to(maps.dtype) + own
    return maps


@cache
def _processor(layer: str) -> ControlledAttention:
    # One for ever: a compiled U-Net would be compiled anew for processors it has not met.
    return ControlledAttention(layer)


def require_plain(unet: UNet2DConditionModel) -> None:
    """Raise `HookError` unless attention control can stand in for every attention processor of `unet`.

    A processor that is not diffusers' plain one (an IP-Adapter's, say) would be silently dropped; without cross-attention there
    is nothing to control.
    """
    if any(type(p) is ControlledAttention for p in unet.attn_processors.values()):
        raise HookError("this network is in the middle of a job; a callback cannot start another one with it. Wait for its end")
    foreign = {name: type(p).__name__ for name, p in unet.attn_processors.items() if type(p) not in PLAIN}
    if foreign:
        name, kind = next(iter(foreign.items()))
        raise HookError(
            f"{len(foreign)} attention layers carry {kind} (first: {name}); control would drop it. Unload the adapter, or call "
            "unet.set_default_attn_processor()"
        )
    if not any(".attn2." in name for name in unet.attn_processors):
        raise HookError("this network has no cross-attention layers (attn2), so there is nothing to control")


@contextmanager
def controlled_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """Install `ControlledAttention` in every transformer block of `unet` and restore what was there, whatever happens.

    Raises `HookError` where `require_plain` does.
    """
    require_plain(unet)
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: _processor(name.removesuffix(".processor")) for name in before})
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
    if not sizes:
        raise HookError("this network has cross-attention in its middle block alone; masks are read from the finer ones")
    return min(sizes, key=lambda size: abs(math.log(size[0] * size[1] / wanted**2)))
