"""Sampling a trajectory again from its noise: what an inversion is worth, and the source of edits that replay it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from inversion.schedule import Move
from inversion.trajectory import Trajectory
from inversion.walk import Predict, trace


@torch.no_grad()
def reconstruct(
    predict: Predict, trajectory: Trajectory, progress: Callable[[Iterable[Move]], Iterable[Move]] = iter
) -> Trajectory:
    """Sample from the noise of `trajectory`, with its noise maps if it has any, and keep every step."""
    path = trace(predict, trajectory.noise, progress(trajectory.schedule.sampling()), noises=trajectory.noises)
    return replace(trajectory, latents=torch.cat(path[::-1]), replay=False)
