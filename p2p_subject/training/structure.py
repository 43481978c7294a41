"""The miniature's ControlNet: the U-Net's copy that reads edges (Zhang et al. 2023), trained on edges of the world's scenes.

The model that it steers is frozen. Captions and subjects are left out more often than elsewhere, since what the words do not
say has to be read off the edges. Edges come at random thresholds and blurs, of whole scenes and of subjects alone on a plain
ground, some as scribbles, so that a user's edges, whatever made them, are of a kind that was seen.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from p2p_subject.blip_diffusion.pipeline import BlipDiffusionPipeline
from p2p_subject.control_images import control_image
from p2p_subject.training import world
from p2p_subject.training.loop import Batch, Batches, share
from p2p_subject.training.representation import Shares, SubjectLearning, SubjectTrainer, empty_prompt
from p2p_subject.training.scenes import Cache

EMBEDDING = (16, 32, 64)
"""Channels of the convolutions that bring edges to the latent's size; each but the first halves, as in the miniature's VAE."""
SHARES = Shares(caption_only=0.35, neither=0.3)
ALONE = 0.35
"""Share of the scenes whose edges are those of the subject without its ground."""
DRAWN = 0.15
"""Share of the scenes that are given as a scribble instead of thin edges."""


class StructureTrainer(nn.Module):
    """A ControlNet beside the frozen networks of a pipeline."""

    def __init__(self, pipeline: BlipDiffusionPipeline) -> None:
        super().__init__()
        self.controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=EMBEDDING)
        learning = SubjectLearning(shares=SHARES, max_snr=5.0, subject_weight=1.0)
        parts = (pipeline.unet, pipeline.text_encoder, pipeline.qformer, pipeline.scheduler.config, empty_prompt(pipeline))
        self.frozen = SubjectTrainer(*parts, learning).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> StructureTrainer:
        """As of every module; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Of the ControlNet alone."""
        return {f"controlnet.{name}": value for name, value in self.controlnet.state_dict().items()}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Of the ControlNet alone."""
        own = {name.removeprefix("controlnet."): value for name, value in state_dict.items()}
        return self.controlnet.load_state_dict(own, strict, assign)

    def forward(
        self,
        edges: Tensor,
        references: Tensor,
        ids: Tensor,
        category_ids: Tensor,
        category_mask: Tensor,
        latents: Tensor,
        mask: Tensor,
    ) -> dict[str, Tensor]:
        """The denoising loss under `edges` (B, 3, H, W) in [0, 1]; the rest as of `SubjectTrainer`."""
        frozen = self.frozen
        with torch.no_grad():
            _, context = frozen.encoded(references, ids, category_ids, category_mask, SHARES.split(len(ids)))

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            down, middle = self.controlnet(noisy, t, context, edges, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return frozen.unet(noisy, t, context, **residuals).sample

        return {"loss": frozen.denoising(predict, latents, 1 + mask[:, None])}


def drawn_edges(index: int, rng: np.random.Generator) -> np.ndarray:
    """Edges (3, S, S) float32 in [0, 1] of training scene `index`, at random thresholds, of all of it or its subject alone."""
    scene = world.draw(world.sample("train", index))
    picture = scene.image
    if rng.random() < ALONE:
        ground = np.float32(rng.choice((0.0, 128.0, 255.0)))
        picture = np.rint(ground + scene.alpha[..., None] * (picture - ground)).astype(np.uint8)
    if rng.random() < DRAWN:
        found = control_image(picture, "scribble")
    else:
        low = float(rng.uniform(60, 140))
        blur = float(rng.choice((0.0, 0.0, rng.uniform(0.5, 1.2))))
        found = control_image(picture, "canny", low=low, high=low + float(rng.uniform(40, 140)), sigma=blur)
    return np.asarray(found, np.float32).transpose(2, 0, 1) / 255


def batches(cache: Cache, size: int, seed: int) -> Batches:
    """Batches of `size` rows over all processes: those of stage two, with edges."""

    def batch(step: int, rank: int, processes: int) -> Batch:
        rng = np.random.default_rng((seed, step, rank))
        indices = rng.integers(0, cache.count, share(size, processes))
        rows = cache.batch(indices, rng.random(len(indices)) < 0.5)
        edges = np.stack([drawn_edges(int(index), rng) for index in indices])
        taken = ("references", "ids", "category_ids", "category_mask", "latents", "mask")
        return {"edges": torch.from_numpy(edges), **{name: rows[name] for name in taken}}

    return batch
