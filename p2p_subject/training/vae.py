"""The miniature's autoencoder: 64x64 pixels to a 4x16x16 latent of unit deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from p2p_subject.training.loop import RunConfig, run
from p2p_subject.training.world import SIZE, draw, sample

CONFIG = dict(
    block_out_channels=(16, 32, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=SIZE,
    scaling_factor=1.0,
    mid_block_add_attention=False,
)


class VAETrainer(nn.Module):
    """Reconstruction and a small KL term; the loss is read at the sampled latent."""

    def __init__(self, kl_weight: float = 5e-4) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**CONFIG)
        self.kl_weight = kl_weight

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`images` (B, 3, S, S) in [-1, 1]."""
        posterior = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error, shift = decoded - images, posterior.mean.float()
        squared = error.square().mean()
        kl = 0.5 * (shift.square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        edges = F.l1_loss(decoded.diff(dim=-1), images.diff(dim=-1)) + F.l1_loss(decoded.diff(dim=-2), images.diff(dim=-2))
        loss = squared + 0.1 * error.abs().mean() + 0.1 * edges + self.kl_weight * kl
        return {"loss": loss, "mse": squared, "kl": kl}


def scene_batch(indices: np.ndarray, split: str = "train") -> Tensor:
    """Draw scenes; (B, 3, S, S) float32 in [-1, 1]."""
    images = np.stack([draw(sample(split, int(index))).image for index in indices])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Give every latent channel zero mean and unit deviation by folding both into the two quant convolutions.

    Encoder and decoder compute the same pictures as before; only the coordinates between them change.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    post.weight *= deviation.view(1, -1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    quant.bias[channels:] -= 2 * deviation.log()


@torch.no_grad()
def psnr(vae: AutoencoderKL, split: str = "test", count: int = 128) -> float:
    """Mean PSNR in dB of reconstructed scenes, from the latents' mean."""
    images = scene_batch(np.arange(count), split)
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(32)])
    error = ((decoded.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def train(config: RunConfig, batch: int) -> AutoencoderKL:
    """Train, fold the statistics, save to `out/vae` and return the autoencoder."""

    def batches(step: int, rank: int, world: int) -> dict[str, Tensor]:
        share = batch // world
        start = step * batch + rank * share
        return {"images": scene_batch(np.arange(start, start + share))}

    def evaluate(step: int, folder: Path) -> dict[str, float]:
        return {"psnr": psnr(averaged(folder), "validation")}

    run(config, VAETrainer, batches, evaluate)
    return finish(config.out)


def averaged(out: Path) -> AutoencoderKL:
    """The autoencoder with the averaged weights of a run, as trained."""
    trainer = VAETrainer()
    trainer.load_state_dict(load_file(out / "ema.safetensors"))
    return trainer.vae.eval()


def finish(out: Path) -> AutoencoderKL:
    """Turn the averaged weights of a run into `out/vae`, with latents of unit deviation."""
    vae = averaged(out)
    fold_statistics(vae, scene_batch(np.arange(512), "validation"))
    vae.save_pretrained(out / "vae")
    return vae
