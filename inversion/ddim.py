"""DDIM inversion: the deterministic sampler run backwards (Song et al. 2021, section 4.3; Dhariwal and Nichol 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from inversion.errors import TrajectoryError
from inversion.schedule import Move, Schedule
from inversion.trajectory import Trajectory
from inversion.walk import Predict, trace


@torch.no_grad()
def ddim(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    *,
    prompt: str = "",
    fingerprint: str = "",
    progress: Callable[[Iterable[Move]], Iterable[Move]] = iter,
) -> Trajectory:
    """Carry clean `latents` (1, C, h, w) to noise and keep every step.

    `predict` should run without guidance (scale 1): guidance amplifies the error of every step. Edits generate the source again
    from its noise (`replay`), as first published, and it drifts with their guidance; `direct` reads it from the trajectory.
    """
    require_one(latents)
    path = trace(predict, latents.float(), progress(schedule.inverting()))
    return Trajectory(torch.cat(path), schedule, prompt, "ddim", fingerprint=fingerprint, replay=True)


def require_one(latents: Tensor) -> None:
    """Raise `TrajectoryError` unless these are the latents of one picture."""
    if latents.ndim != 4 or len(latents) != 1:
        raise TrajectoryError(f"latents of shape {tuple(latents.shape)}; expected those of one picture, (1, C, h, w)")
