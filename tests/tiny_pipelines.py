"""Stable Diffusion pipelines of a few thousand weights, built in code: real networks and tokenizers, of no published size."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from p2p_subject.training.tokenizers import END, START, byte_pairs, save_clip_tokenizer

WINDOW = 24
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
LEVELS = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
}


def stable_diffusion_1(seed: int = 0, **unet: object) -> StableDiffusionPipeline:
    """As Stable Diffusion 1.5, with random weights; `unet` changes the U-Net's configuration."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(24),
        unet=UNet2DConditionModel(**LEVELS | {"cross_attention_dim": 24, "attention_head_dim": 2} | unet).eval(),
        vae=autoencoder(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2(seed: int = 0, **unet: object) -> StableDiffusionPipeline:
    """As Stable Diffusion 2.1: a wider text, linear projections, heads counted for each level, v-prediction, "!" as padding."""
    own = {"cross_attention_dim": 32, "attention_head_dim": [2, 4], "use_linear_projection": True}
    pipeline = stable_diffusion_1(seed, **own | unet)
    pipeline.tokenizer, pipeline.text_encoder = tokenizer("!"), text_encoder(32, hidden_act="gelu")
    pipeline.scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    return pipeline


def stable_diffusion_xl(seed: int = 0, **unet: object) -> StableDiffusionXLPipeline:
    """As Stable Diffusion XL: two text encoders, a pooled text of width 12, six numbers on the picture's size."""
    torch.manual_seed(seed)
    own = {
        "cross_attention_dim": 24 + 32,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    }
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        text_encoder=text_encoder(24),
        text_encoder_2=text_encoder(32, CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=12),
        unet=UNet2DConditionModel(**LEVELS | own | unet).eval(),
        vae=autoencoder(),
        scheduler=DDIMScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def controlnet(unet: UNet2DConditionModel, seed: int = 0, halvings: int = 1, strength: float = 0.3) -> ControlNetModel:
    """A ControlNet for a U-Net whose autoencoder halves so often; what is zero before training is random."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8)[: halvings + 1])
    zeros = [network.controlnet_cond_embedding.conv_out, network.controlnet_mid_block, *network.controlnet_down_blocks]
    with torch.no_grad():
        for layer in zeros:
            layer.weight.normal_(std=strength)
    return network.eval()


@cache
def tokenizer(padding: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the scenes and one for each other character."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_clip_tokenizer(folder, window=WINDOW)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(settings | {"pad_token": padding}))
        return CLIPTokenizer.from_pretrained(folder)


def text_encoder(width: int, kind: type[CLIPTextModel] = CLIPTextModel, **config: object) -> CLIPTextModel:
    """A text encoder `width` wide over the vocabulary of `tokenizer`."""
    vocabulary, _ = byte_pairs()
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": WINDOW}
    special = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    encoder = kind(
        CLIPTextConfig(vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, **sizes, **special, **config)
    )
    # Default weights of 0.02 would make every prompt look nearly alike at these widths.
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
    return encoder.eval()


def autoencoder() -> AutoencoderKL:
    """An autoencoder of 2 x 2 pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
