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
def sample_contexts(model: Model, contexts: Context, seeds: Sequence[int], steps: int, scale: float) -> list[Image.Image]:
    """As `sample_batch`, for contexts of B rows that are encoded already."""
    width, height = (side // model.scale_factor for side in model.size)
    shape = (1, model.unet.config.in_channels, height, width)
    # Drawn on the CPU, so that a seed means the same noise on every device.
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(model.device)
    unconditional = model.unconditional(None)
    predict = guided(model.noise, lambda index: unconditional, contexts, scale)
    return model.decode(walk(predict, noise, model.schedule(steps).sampling()))
