"""The only loop over steps in the project: sampling, inversion and editing are what is passed to `walk`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from inversion.errors import NonFiniteError
from inversion.schedule import Move, ddim_move

Predict = Callable[[Tensor, Move], Tensor]
"""`predict(latents (B, C, h, w), move) -> noise (B, C, h, w)`: all that this package knows of a network."""

After = Callable[[Tensor, Move], Tensor]
"""`after(latents, move) -> latents`: what happens to the latents of a step before the next one."""


def walk(predict: Predict, latents: Tensor, moves: Iterable[Move], after: After | None = None) -> Tensor:
    """Follow `moves` from `latents` (B, C, h, w) and return where they end, in the dtype of `latents`.

    Raises `NonFiniteError` at the first step whose prediction holds NaN or infinity, and names its timestep: further on, a
    blend could replace such values by the source's and hide them.
    """
    require_finite(latents, "latents")
    for move in moves:
        noise = require_finite(predict(latents, move), f"prediction at timestep {move.t}")
        latents = ddim_move(latents, noise, move.alpha_from, move.alpha_to)
        if after is not None:
            latents = after(latents, move)
    return latents


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """Return `tensor`, or raise `NonFiniteError` when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or infinite. Half precision overflows in some networks: load "
            "the model with dtype=torch.float32 (or bfloat16); if the input latents were given, check them."
        )
    return tensor
