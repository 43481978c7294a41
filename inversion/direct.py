"""Direct inversion: the source is read from the stored latents, so it cannot drift (Ju et al. 2024, "PnP Inversion")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inversion.ddim import ddim
from inversion.schedule import Move, Schedule
from inversion.trajectory import Trajectory
from inversion.walk import Predict, walk


def direct(predict: Predict, latents: Tensor, schedule: Schedule, **record: Any) -> Trajectory:
    """The path of `ddim`, which takes the same arguments; sampling reads its latents instead of generating them again.

    The published method adds, after each step, the offset to the stored latents that the step missed; reading them is the same
    and needs no offset.
    """
    return replace(ddim(predict, latents, schedule, **record), method="direct", replay=False)


@torch.no_grad()
def direct_offsets(predict: Predict, trajectory: Trajectory) -> Tensor:
    """What each sampling step from the stored latents misses the next ones by, (N, C, h, w), noise first.

    With guided `predict`, these are the offsets that the published method stores.
    """
    offsets = []

    def put_back(x: Tensor, move: Move) -> Tensor:
        offsets.append(trajectory.after(move.index) - x)
        return trajectory.after(move.index)

    walk(predict, trajectory.noise, trajectory.schedule.sampling(), put_back)
    return torch.cat(offsets)
