"""The denoising loss of a network, whatever it predicts: pure functions of tensors."""

from __future__ import annotations

from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from inversion import ScheduleError
from inversion.schedule import PREDICTION_TYPES


def target(scheduler: DDIMScheduler | DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a network should answer for noised latents, in its own prediction type.

    `latents` and `noise` (B, C, h, w), `timesteps` (B,): the noise ("epsilon"), sqrt(a) noise - sqrt(1 - a) latents
    ("v_prediction", Salimans and Ho 2022) or the latents ("sample"), a being the cumulative alpha of the timestep.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ScheduleError(f"prediction_type {kind!r}; expected one of {PREDICTION_TYPES}")


def row_losses(predicted: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each row, (B,) float32: of (B, C, h, w), averaged over channels and by `weight` (B, 1, h, w)."""
    squared = (predicted.float() - wanted.float()).square().mean(1, keepdim=True)
    return (squared * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
