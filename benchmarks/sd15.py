"""Stable Diffusion 1.5 with random weights, built in code: what a network costs does not depend on what it has learnt.

U-Net, text encoder and scheduler have the published configuration (512x512 pixels, latents of 64x64); the autoencoder has its
scale factor and channels alone, and the tokenizer the vocabulary of the miniature in a window of 77.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from p2p_subject.training.tokenizers import END, START, byte_pairs, save_clip_tokenizer

WINDOW = 77
PARAMETERS = 859_520_964
"""Weights of the published U-Net."""
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": WINDOW,
    "projection_dim": 768,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 512,
    "mid_block_add_attention": False,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FOCUS = 3.0
"""Factor of the queries' weights: random attention would be all but uniform, and a mask made from it all of the picture."""


def pipeline(device: str = "cpu", dtype: torch.dtype = torch.float32, **unet: Any) -> StableDiffusionPipeline:
    """The pipeline on `device`; weights are the same every time on one kind of device. `unet` changes its configuration."""
    vocabulary, _ = byte_pairs()
    special = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    with torch.device("meta"):
        network = UNet2DConditionModel(**UNET | unet)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), **TEXT, **special))
    vae = AutoencoderKL(**VAE)
    for seed, module in enumerate((network, encoder, vae)):
        randomise(module.to_empty(device=device) if module is network else module.to(device), seed)
        # Not the networks' own `to`, which warns of layers to be kept in float32 where there are none.
        nn.Module.to(module.eval().requires_grad_(False), dtype)
    return StableDiffusionPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder,
        unet=network,
        vae=vae,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Fill the weights so that outputs stay finite: matrices keep the variance of their inputs, the rest is neutral."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            factor = FOCUS if name.endswith("to_q.weight") else 1.0
            weight.normal_(std=factor / (weight.numel() / len(weight)) ** 0.5, generator=generator)
        else:
            weight.fill_(float(name.endswith("weight")))


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which the words of the miniature's scenes are one token each, as in the published vocabulary."""
    with TemporaryDirectory() as folder:
        save_clip_tokenizer(Path(folder), window=WINDOW)
        return CLIPTokenizer.from_pretrained(folder)
