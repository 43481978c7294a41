"""Edit-friendly DDPM inversion: noise maps of independently noised latents (Huberman-Spiegelglas et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from inversion.ddim import require_one
from inversion.schedule import Move, Schedule, ddpm_sigma
from inversion.trajectory import Trajectory
from inversion.walk import Predict, walk


@torch.no_grad()
def edit_friendly(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    prompt: str = "",
    fingerprint: str = "",
    progress: Callable[[Iterable[Move]], Iterable[Move]] = iter,
) -> Trajectory:
    """Noise clean `latents` (1, C, h, w) to every level with noise of its own, and keep what each DDPM step needs to follow.

    The noise map of a step is what takes the mean of the DDPM move to the next stored latents; sampling with the maps and the
    same `predict` gives the picture back from any step. `predict` may be guided, at `guidance_scale`, which is recorded. `seed`
    draws the noise.
    """
    require_one(latents)
    clean = latents.float()
    generator = torch.Generator().manual_seed(seed)
    kept = [clean]
    for move in schedule.inverting():
        own = torch.randn(clean.shape, generator=generator).to(clean.device)
        kept.append(move.alpha_to**0.5 * clean + (1 - move.alpha_to) ** 0.5 * own)
    noises: list[Tensor] = []

    def solve(mean: Tensor, move: Move) -> Tensor:
        wanted, sigma = kept[schedule.steps - 1 - move.index], ddpm_sigma(move.alpha_from, move.alpha_to)
        # A last step to no noise at all is deterministic: there is no map, and its mean is where it ends.
        noises.append((wanted - mean) / sigma if sigma else torch.zeros_like(mean))
        # Stored as it will be computed, so that rounding does not add up.
        kept[schedule.steps - 1 - move.index] = mean + sigma * noises[-1]
        return kept[schedule.steps - 1 - move.index]

    without = torch.zeros_like(clean).expand(schedule.steps, -1, -1, -1)
    walk(predict, kept[-1], progress(schedule.sampling()), solve, noises=without)
    return Trajectory(
        torch.cat(kept),
        schedule,
        prompt,
        "edit_friendly",
        guidance_scale=guidance_scale,
        fingerprint=fingerprint,
        noises=torch.cat(noises),
    )
