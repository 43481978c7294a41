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


def walk(
    predict: Predict,
    latents: Tensor,
    moves: Iterable[Move],
    after: After | None = None,
    noises: Tensor | None = None,
) -> Tensor:
    """Follow `moves` from `latents` (B, C, h, w) and return where they end, in the dtype of `latents`.

    `noises` (N, C, h, w), one for each sampling step from the noise on, makes the moves those of DDPM.

    Raises `NonFiniteError` at the first step whose prediction holds NaN or infinity, and names its timestep: further on, a
    blend could replace such values by the source's and hide them.
    """
    require_finite(latents, "latents")
    for move in moves:
        noise = require_finite(predict(latents, move), f"prediction at timestep {move.t}")
        added = None if noises is None else noises[move.index]
        latents = ddim_move(latents, noise, move.alpha_from, move.alpha_to, added)
        if after is not None:
            latents = after(latents, move)
    return latents


def trace(
    predict: Predict,
    latents: Tensor,
    moves: Iterable[Move],
    after: After | None = None,
    noises: Tensor | None = None,
) -> list[Tensor]:
    """Walk and keep what is passed: the latents (B, C, h, w) before the first move and after each."""
    kept = [latents]

    def keep(x: Tensor, move: Move) -> Tensor:
        kept.append(x if after is None else after(x, move))
        return kept[-1]

    walk(predict, latents, moves, keep, noises)
    return kept


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """Return `tensor`, or raise `NonFiniteError` when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{what}: {bad} of {tensor.numel()} values are NaN or infinite. Half precision overflows in some networks: load "
            "the model with dtype=torch.float32 (or bfloat16); if the input latents were given, check them."
        )
    return tensor
