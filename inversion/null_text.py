"""Null-text inversion: unconditional contexts with which guided sampling follows the picture (Mokady et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from inversion.descent import Adam, ConjugateGradient
from inversion.errors import StepsError, TrajectoryError
from inversion.guidance import guide
from inversion.schedule import Move, Schedule, ddim_move
from inversion.trajectory import Trajectory
from inversion.walk import Predict, trace, walk

Noise = Callable[[Tensor, Move, Tensor], Tensor]
"""`noise(latents (B, C, h, w), move, context (B, L, D)) -> noise (B, C, h, w)`, differentiable in the context."""

OPTIMISERS = {"conjugate": (ConjugateGradient, 3), "adam": (Adam, 10)}
"""Optimisers by name, with the most gradients that each computes in a sampling step unless told otherwise."""


def null_text(
    noise: Noise, latents: Tensor, schedule: Schedule, context: Tensor, null: Tensor, *, prompt: str = "", **options: Any
) -> Trajectory:
    """Invert one picture: clean `latents` (1, C, h, w) and `context` (1, L, D) of its prompt; see `null_text_batch`."""
    return null_text_batch(noise, latents, schedule, context, null, prompts=[prompt], **options)[0]


@torch.no_grad()
def null_text_batch(
    noise: Noise,
    latents: Tensor,
    schedule: Schedule,
    context: Tensor,
    null: Tensor,
    *,
    guidance_scale: float = 7.5,
    inner_steps: int | None = None,
    optimiser: str = "conjugate",
    conditional: Predict | None = None,
    prompts: Sequence[str] | None = None,
    fingerprint: str = "",
    progress: Callable[[Iterable[Move]], Iterable[Move]] = iter,
) -> list[Trajectory]:
    """Invert P pictures at once: clean `latents` (P, C, h, w), `context` (P, L, D) of their prompts, `null` (1, L, D) of none.

    DDIM inversion without guidance gives the latents. Then, from the noise on, the unconditional context of each sampling step
    is optimised, from that of the step before, until the step at `guidance_scale` ends at the stored latents: to the published
    tolerance, or with at most `inner_steps` gradients. "adam" is the published rule, of 10; "conjugate" misses by less with 3.
    A step costs a conditional and an unconditional prediction of each picture, and a prediction and its way back for each
    gradient; pictures that are done wait for none.

    `conditional` predicts in place of `noise` at `context`, for a network that is told more of a prompt than its context.
    Contexts and optimiser are float32; `noise` casts to what its network computes in. Freeze the network's weights, or memory
    is kept for gradients that nobody asks for.

    Raises `TrajectoryError` for contexts that do not fit, and at scale 1, where the unconditional context has no effect.
    """
    if optimiser not in OPTIMISERS:
        raise TrajectoryError(f"optimiser={optimiser!r}; expected one of {list(OPTIMISERS)}")
    make, most = OPTIMISERS[optimiser]
    most = most if inner_steps is None else inner_steps
    if most < 0:
        raise StepsError(f"inner_steps={inner_steps!r}; expected 0 or more, or None for {OPTIMISERS[optimiser][1]}")
    if guidance_scale == 1:
        raise TrajectoryError("guidance_scale=1 leaves nothing to optimise; take the scale of the edits, or method 'direct'")
    prompts = [""] * len(latents) if prompts is None else prompts
    _require_fitting(latents, context, null, prompts)

    if conditional is None:

        def conditional(x: Tensor, move: Move) -> Tensor:
            return noise(x, move, context)

    path = trace(conditional, latents.float(), progress(schedule.inverting()))
    solve = make(most)
    found = [null.float().expand(len(latents), -1, -1)]

    def predict(x: Tensor, move: Move) -> Tensor:
        wanted, towards = path[schedule.steps - 1 - move.index], conditional(x, move)

        def miss(contexts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            predicted = noise(x[rows], move, contexts)
            guided = guide(predicted, towards[rows], guidance_scale)
            return predicted, ddim_move(x[rows], guided, move.alpha_from, move.alpha_to) - wanted[rows]

        contexts, predicted = solve(miss, found[-1], published_tolerance(move.index), move.index)
        found.append(contexts)
        return guide(predicted, towards, guidance_scale)

    walk(predict, path[-1], progress(schedule.sampling()))
    latents, embeddings = torch.stack(path, 1), torch.stack(found[1:], 1)
    return [
        Trajectory(one, schedule, prompt, "null_text", guidance_scale, fingerprint, null_embeddings=own)
        for one, prompt, own in zip(latents, prompts, embeddings)
    ]


def published_tolerance(index: int) -> float:
    """Mean squared error of the latents that the published loop is content with after sampling step `index`."""
    return 1e-5 + 2e-5 * index


def _require_fitting(latents: Tensor, context: Tensor, null: Tensor, prompts: Sequence[str]) -> None:
    if latents.ndim != 4 or context.ndim != 3 or len(context) != len(latents) or len(prompts) != len(latents):
        raise TrajectoryError(
            f"latents of shape {tuple(latents.shape)}, contexts of shape {tuple(context.shape)} and {len(prompts)} prompts; "
            "expected (P, C, h, w), (P, L, D) and P for P pictures"
        )
    if null.shape != context[:1].shape:
        raise TrajectoryError(f"null context of shape {tuple(null.shape)}; expected {tuple(context[:1].shape)}")
