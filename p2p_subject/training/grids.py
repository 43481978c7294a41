"""Evaluation grids: what a run can draw at this step, beside what it was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from p2p_subject.drawing import sample_batch
from p2p_subject.models import Model
from p2p_subject.outputs import save_image, to_pil
from p2p_subject.training import world
from p2p_subject.training.export import assemble
from p2p_subject.training.vae import scene_batch


def tiled(rows: list[list[np.ndarray]], scale: int = 2) -> Image.Image:
    """Pictures (S, S, 3) uint8 in rows, enlarged `scale` times."""
    picture = Image.fromarray(np.vstack([np.hstack(row) for row in rows]))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


@torch.no_grad()
def reconstruction_grid(vae: AutoencoderKL, path: Path, count: int = 12) -> None:
    """Held-out scenes above their reconstructions."""
    images = scene_batch(np.arange(count), "validation")
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    save_image(tiled([[np.asarray(image) for image in to_pil(part)] for part in (images, decoded)]), path)


@torch.no_grad()
def generation_grid(weights: Path, vae_folder: Path, path: Path, count: int = 12, steps: int = 25, scale: float = 3.0) -> None:
    """Reference, generation with it, generation from the caption alone, and a true scene; unseen hues in the last half."""
    pipeline = assemble(weights, vae_folder, path.parent / "tokenizers")
    model = Model.of(pipeline, "run", scale)
    splits = ["validation"] * (count // 2) + ["new_hue"] * (count - count // 2)
    scenes = [world.draw(world.sample(split, index)) for index, split in enumerate(splits)]
    references = [world.reference(s.spec.look, split, i) for i, (s, split) in enumerate(zip(scenes, splits))]
    captions = [scene.spec.caption() for scene in scenes]
    subjects = pipeline.subject_embeddings(
        [Image.fromarray(reference) for reference in references], [scene.spec.look.category for scene in scenes]
    )
    with_subject = sample_batch(model, captions, subjects.split(1), range(count), steps, scale)
    from_text = sample_batch(model, captions, [None] * count, range(count), steps, scale)
    rows = [references, [np.asarray(i) for i in with_subject], [np.asarray(i) for i in from_text], [s.image for s in scenes]]
    save_image(tiled(rows), path)
