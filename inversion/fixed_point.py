"""Fixed-point inversion: each step is iterated until it is the inverse of the sampling step (Pan et al. 2023, "AIDI")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from inversion.ddim import ddim
from inversion.errors import StepsError
from inversion.schedule import Move, Schedule, ddim_move
from inversion.trajectory import Trajectory
from inversion.walk import Predict


def fixed_point(
    predict: Predict, latents: Tensor, schedule: Schedule, *, iterations: int = 5, tolerance: float = 1e-4, **record: Any
) -> Trajectory:
    """Invert as `ddim` does, with the noise predicted at the latents that a step leads to, not at those it comes from.

    Sampling moves from x' to x along the noise at x'. DDIM inversion takes the noise at x in its place; here x' is found by
    iterating x' = move(x, noise(x')) at most `iterations` times, until the mean change falls under `tolerance` or grows.
    `record` is what `ddim` takes: prompt, fingerprint, progress.
    """
    if iterations < 1:
        raise StepsError(f"iterations={iterations!r}; expected 1 or more, such as 5")
    iterated = _iterated(predict, iterations, tolerance)
    return replace(ddim(iterated, latents, schedule, **record), method="fixed_point", replay=False)


def _iterated(predict: Predict, iterations: int, tolerance: float) -> Predict:
    def solved(x: Tensor, move: Move) -> Tensor:
        noise = predict(x, move)
        reached, last = ddim_move(x, noise, move.alpha_from, move.alpha_to), float("inf")
        for _ in range(iterations):
            better = predict(reached, move)
            next_reached = ddim_move(x, better, move.alpha_from, move.alpha_to)
            change = float((next_reached - reached).abs().mean())
            # Where the network is no contraction, iterating further leads away.
            if change > last:
                break
            noise, reached, last = better, next_reached, change
            if change < tolerance:
                break
        return noise

    return solved
