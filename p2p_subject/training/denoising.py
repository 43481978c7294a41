"""The denoising loss of every stage that trains on latents: noise levels, targets, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from inversion.schedule import PREDICTION_TYPES
from p2p_subject.errors import ArgumentError
from p2p_subject.finetuning.loss import target


class Denoising(nn.Module):
    """What a network that predicts in the way of `scheduler` is asked for at each noise level.

    `scheduler`: configuration of a diffusers scheduler with betas. `max_snr`: weights are those of min-SNR (Hang et al. 2023)
    with this bound, in terms of the error of the noise; None weighs every noise level alike in the network's own terms, as
    Stable Diffusion and BLIP-Diffusion were trained. `central`: share of the timesteps drawn around the middle (logit-normal)
    instead of evenly.
    """

    def __init__(self, scheduler: Mapping[str, Any], max_snr: float | None = None, central: float = 0.0) -> None:
        super().__init__()
        self.scheduler = DDPMScheduler.from_config(dict(scheduler))
        self.prediction = self.scheduler.config.prediction_type
        if self.prediction not in PREDICTION_TYPES:
            raise ArgumentError(f"prediction_type={self.prediction!r}; expected one of {PREDICTION_TYPES}")
        self.max_snr, self.central = max_snr, central
        self.register_buffer("alphas", self.scheduler.alphas_cumprod.float(), persistent=False)

    def timesteps(self, count: int) -> Tensor:
        """Draw (count,) int64 timesteps."""
        device, levels = self.alphas.device, len(self.alphas)
        uniform, normal = torch.rand(count, device=device), torch.randn(count, device=device).sigmoid()
        # In random places: where a row stands says whether it has subject and caption.
        middle = torch.randperm(count, device=device) >= round((1 - self.central) * count)
        return (torch.where(middle, normal, uniform) * levels).long().clamp(0, levels - 1)

    def forward(self, predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, emphasis: Tensor | None = None) -> Tensor:
        """The loss of one drawing of timesteps and noise.

        `predict(noisy (B, C, h, w), timesteps (B,))` is the network; `latents` (B, C, h, w) float32 are clean; `emphasis`,
        (B, 1, h, w) or None, multiplies the loss of each place.
        """
        t = self.timesteps(len(latents))
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, t)
        error = (predict(noisy, t).float() - target(self.scheduler, latents, noise, t)).square()
        if self.max_snr is not None:
            alpha = self.alphas[t].view(-1, 1, 1, 1)
            error = error * self._weight(alpha / (1 - alpha))
        return (error if emphasis is None else error * emphasis).mean()

    def _weight(self, snr: Tensor) -> Tensor:
        bounded = snr.clamp(max=self.max_snr)
        return {"epsilon": bounded / snr, "sample": bounded, "v_prediction": bounded / (snr + 1)}[self.prediction]
