"""Pictures of several prompts in one batch, without the state that `Editor.generate` keeps of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from inversion import walk
from p2p_subject.context import Context, stack
from p2p_subject.models import Model
from p2p_subject.sampling import guided


@torch.no_grad()
def sample_batch(
    model: Model, prompts: Sequence[str], subjects: Sequence[Tensor | None], seeds: Sequence[int], steps: int, scale: float
) -> list[Image.Image]:
    """Pictures of B prompts in one batch, each with its subject (1, Nq, D) or without, from the noise of its own seed."""
    contexts = [
        model.encode(model.layout(prompt, subject=subject is not None), subject) for prompt, subject in zip(prompts, subjects)
    ]
    return sample_contexts(model, stack(contexts), seeds, steps, scale)


@torch.no_grad()
def sample_contexts(
    model: Model, contexts: Context, seeds: Sequence[int], steps: int, scale: float, unconditional: Context | None = None
) -> list[Image.Image]:
    """As `sample_batch`, for contexts of B rows that are encoded already; `unconditional` (None: the model's) is one row."""
    width, height = (side // model.scale_factor for side in model.size)
    shape = (1, model.unet.config.in_channels, height, width)
    noise = seeded_noise(shape, seeds).to(model.device)
    away = model.unconditional() if unconditional is None else unconditional
    predict = guided(model.noise, lambda index: away, contexts, scale)
    return model.decode(walk(predict, noise, model.schedule(steps).sampling()))


def seeded_noise(shape: tuple[int, ...], seeds: Sequence[int | None]) -> Tensor:
    """Gaussian noise of `shape` (1, C, h, w) for each seed, (B, C, h, w); None draws at random."""
    # On the CPU, so that a seed means the same noise on every device, alone or among others.
    return torch.cat([torch.randn(shape, generator=_generator(seed)) for seed in seeds])


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator
