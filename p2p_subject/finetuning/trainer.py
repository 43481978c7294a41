"""The optimiser's loop over a few pictures: every step follows from its number and the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from p2p_subject.errors import NonFiniteError
from p2p_subject.finetuning.loss import row_losses, target
from p2p_subject.finetuning.pictures import View, Views

CLIP = 1.0
"""Norm that gradients are cut to, as in the training scripts of diffusers."""
CHECKED_TIMES = 8
"""Timesteps, evenly spread, at which a held-out picture is measured."""

Group = tuple[Mapping[str, nn.Parameter], float]
"""Weights by name, and their learning rate."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a U-Net call: a view, its noise (1, C, h, w), its timestep, what the U-Net is told (L, D), its factor."""

    view: View
    noise: Tensor
    time: int
    tokens: Tensor
    factor: float = 1.0


@dataclass(eq=False)
class Trainer:
    """What is trained, and on what.

    `groups` hold the float32 weights that change; `sets` the views of which each gives `batch` rows to a step; `half` is the
    type of mixed precision, None for single; `calls` counts the U-Net rows of all steps so far.
    """

    unet: UNet2DConditionModel
    groups: Sequence[Group]
    sets: Sequence[Views]
    scheduler: DDIMScheduler
    batch: int = 3
    weight_decay: float = 0.01
    seed: int = 0
    half: torch.dtype | None = None
    calls: int = 0
    optimiser: torch.optim.AdamW = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        groups = [{"params": list(weights.values()), "lr": rate} for weights, rate in self.groups]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        self.scaler = torch.amp.GradScaler(self.unet.device.type, enabled=self.half is torch.float16)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All weights that change, by name."""
        return {name: weight for weights, _ in self.groups for name, weight in weights.items()}

    def step(self, index: int) -> float:
        """Take optimiser step `index`, counted from 0; returns its loss. Raises `NonFiniteError`."""
        rows = self._rows(index)
        factors = torch.tensor([row.factor for row in rows], device=self.unet.device)
        loss = (self.losses(rows) * factors).sum() / self.batch
        value = loss.item()
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss is {value} at step {index + 1}; take a lower learning rate, or a model in float32")
        weights = list(self.weights.values())
        # Only these get gradients: the text encoder that the loss reaches through is not this run's.
        self.scaler.scale(loss).backward(inputs=weights)
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(weights, CLIP)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return value

    def losses(self, rows: Sequence[Row]) -> Tensor:
        """The denoising loss of each row, (B,) float32; rows of one shape share a U-Net call."""
        self.calls += len(rows)
        by_shape: dict[torch.Size, list[int]] = {}
        for at, row in enumerate(rows):
            by_shape.setdefault(row.view.latents.shape, []).append(at)
        found = [self._losses([rows[at] for at in places]) for places in by_shape.values()]
        order = [at for places in by_shape.values() for at in places]
        return torch.cat(found)[torch.tensor(order, device=self.unet.device).argsort()]

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        device = self.unet.device
        latents, weight = (torch.cat([getattr(row.view, name) for row in rows]).to(device) for name in ("latents", "weight"))
        noise = torch.cat([row.noise for row in rows]).to(device)
        times = torch.tensor([row.time for row in rows], device=device)
        tokens = torch.stack([row.tokens for row in rows])
        noisy = self.scheduler.add_noise(latents, noise, times)
        with self._autocast():
            predicted = self.unet(noisy, times, encoder_hidden_states=tokens).sample
        return row_losses(predicted, target(self.scheduler, latents, noise, times), weight)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.unet.device.type, self.half, enabled=self.half is not None)

    def _rows(self, index: int) -> list[Row]:
        return [row for number, views in enumerate(self.sets) for row in self._drawn(views, index, number)]

    def _drawn(self, views: Views, index: int, number: int) -> Iterator[Row]:
        """The rows that a set of views gives to a step: pictures in a new order each time round, timesteps uniform."""
        rng = np.random.default_rng((self.seed, index, number))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        places = range(index * self.batch, (index + 1) * self.batch)
        chosen = [views.views[at] for at in _order(len(views.views), places, self.seed)]
        prompts = [views.prompts[at] for at in rng.integers(len(views.prompts), size=self.batch)]
        times = rng.integers(self.scheduler.config.num_train_timesteps, size=self.batch).tolist()
        for view, time, tokens in zip(chosen, times, views.contexts(prompts)):
            # Drawn on the CPU, so that a seed means the same noise on every device.
            yield Row(view, torch.randn(view.latents.shape, generator=generator), time, tokens, views.factor)

    @torch.no_grad()
    def held_out_loss(self, views: Views) -> float:
        """Loss on pictures that are not learned, at noise and timesteps that are the same at every call."""
        generator, steps = torch.Generator().manual_seed(0), self.scheduler.config.num_train_timesteps
        times = [int((at + 0.5) / CHECKED_TIMES * steps) for at in range(CHECKED_TIMES)]
        (tokens,) = views.contexts(views.prompts[:1])
        rows = [
            Row(view, torch.randn(view.latents.shape, generator=generator), time, tokens)
            for view in views.views
            for time in times
        ]
        calls = self.calls
        parts = [self.losses(rows[start : start + self.batch]) for start in range(0, len(rows), self.batch)]
        self.calls = calls
        return torch.cat(parts).mean().item()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: weights and the optimiser's moments, and what is JSON-able."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        for at, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"moments.{at}.{name}": value for name, value in moments.items()}
        return tensors, {"scaler": self.scaler.state_dict(), "calls": self.calls}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("moments."):
                _, at, name = key.split(".", 2)
                moments.setdefault(int(at), {})[name] = value
        self.put({name: tensors[f"weights.{name}"] for name in self.weights})
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(values["scaler"])
        self.calls = values["calls"]

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights that change, by name."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])


def _order(count: int, places: range, seed: int) -> list[int]:
    """Which of `count` pictures stand at these places of an endless row in which each round is shuffled anew."""
    return [int(np.random.default_rng((seed, place // count)).permutation(count)[place % count]) for place in places]
