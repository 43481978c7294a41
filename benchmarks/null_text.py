"""Cost of null-text inversion against the published loop, and at what error, on the same pictures and model in one run.

    python -m benchmarks.null_text --pictures 4

Both are given clean latents and captions, and a network without gradients of weights. Counted are U-Net rows, forward and
backward; a backward row is taken as two forward ones, though without gradients of weights it takes the time of one. The error is
that of guided sampling with the embeddings found: mean square against the inverted latents over all steps, and PSNR of the picture.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics import psnr
from inversion import Move, Schedule, Trajectory, ddim, ddim_move, guide, null_text, null_text_batch, reconstruct
from p2p_subject.context import Context, stack
from p2p_subject.models import Model
from p2p_subject.training import world


@dataclass
class Network:
    """A model's noise for token contexts (B, L, D) that counts its rows; `null` is the context of no prompt."""

    model: Model
    null: Context
    forward: int = 0
    backward: int = 0

    def __call__(self, latents: Tensor, move: Move, tokens: Tensor) -> Tensor:
        self.forward += len(latents)
        predicted = self.model.noise(latents, move, self.null.expand(len(tokens)).with_tokens(tokens))
        if predicted.requires_grad:
            predicted.register_hook(self._returned)
        return predicted

    def _returned(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


@dataclass(frozen=True)
class Cost:
    """Rows and seconds of all pictures together; mean squared error of their latents, and mean PSNR in dB."""

    method: str
    forward: int
    backward: int
    seconds: float
    error: float
    psnr: float

    @property
    def rows(self) -> int:
        """What it costs in forward rows."""
        return self.forward + 2 * self.backward


Method = Callable[[Network, Tensor, Sequence[str], Schedule, float], list[Trajectory]]
"""`method(network, clean latents (P, C, h, w), captions, schedule, guidance scale) -> trajectories`, texts encoded within."""


def published(network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float) -> list[Trajectory]:
    """The loop of Mokady et al. 2023 as its authors' code runs it, picture by picture.

    At each step: the conditional prediction; up to 10 times an unconditional prediction, its way back and a step of Adam, which
    is new at each step and ends after a loss under 1e-5 + 2e-5 i; then both predictions again, for the step that is taken.
    """
    return [_published(network, x[None], caption, schedule, scale) for x, caption in zip(latents, captions)]


def _published(
    network: Network, latents: Tensor, caption: str, schedule: Schedule, scale: float, inner_steps: int = 10
) -> Trajectory:
    model = network.model
    with torch.no_grad():
        null, context = (model.encode(model.layout(text)).tokens.float() for text in ("", caption))
        path = ddim(lambda x, move: network(x, move, context), latents, schedule)
    x, found = path.noise, []
    for move in schedule.sampling():
        null = null.clone().detach().requires_grad_()
        optimiser = torch.optim.Adam([null], lr=1e-2 * max(1 - move.index / 100, 0))
        with torch.no_grad():
            conditional = network(x, move, context)
        for _ in range(inner_steps):
            predicted = guide(network(x, move, null), conditional, scale)
            moved = ddim_move(x, predicted, move.alpha_from, move.alpha_to)
            loss = F.mse_loss(moved, path.after(move.index))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss.item() < 1e-5 + 2e-5 * move.index:
                break
        found.append(null.detach())
        with torch.no_grad():
            predicted = guide(*network(x.repeat(2, 1, 1, 1), move, torch.cat([found[-1], context])).chunk(2), scale)
            x = ddim_move(x, predicted, move.alpha_from, move.alpha_to)
    return Trajectory(path.latents, schedule, caption, "published", scale, null_embeddings=torch.cat(found))


def ours(network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float) -> list[Trajectory]:
    """This library's, picture by picture."""
    return [in_one_batch(network, x[None], [text], schedule, scale)[0] for x, text in zip(latents, captions)]


def in_one_batch(
    network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float
) -> list[Trajectory]:
    """This library's, all pictures at once."""
    model = network.model
    with torch.no_grad():
        null, *contexts = (model.encode(model.layout(text)).tokens.float() for text in ("", *captions))
    return null_text_batch(
        network, latents, schedule, torch.cat(contexts), null, guidance_scale=scale, prompts=captions
    )


METHODS: dict[str, Method] = {"published": published, "ours": ours, "ours, one batch": in_one_batch}
