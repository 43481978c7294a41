"""What a model can draw at a step of its fine-tuning, beside the pictures that it learns from."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from p2p_subject.drawing import sample_batch
from p2p_subject.finetuning.pictures import Picture
from p2p_subject.models import Model
from p2p_subject.viz import contact_sheet

GRID_STEPS = 25
"""Sampling steps of the pictures of grids, and of those that are generated to preserve the prior."""
SEEDS = 2


def progress_grid(model: Model, pictures: Sequence[Picture], prompts: Sequence[str], seed: int, title: str) -> Image.Image:
    """A sheet: the first pictures of the subject, then the prompts with the subject in them, each from the same seeds."""
    embedding = model.embed(model.subject)
    rows = [[("given", picture.image) for picture in pictures[: len(prompts)]]]
    for number in range(seed, seed + SEEDS):
        count = len(prompts)
        drawn = sample_batch(model, prompts, [embedding] * count, [number] * count, GRID_STEPS, model.guidance_scale)
        rows.append([(f"{prompt}, seed {number}", image) for prompt, image in zip(prompts, drawn)])
    return contact_sheet(rows, title=title)
