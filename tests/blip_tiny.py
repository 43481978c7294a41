"""A BLIP-Diffusion pipeline of a few thousand weights, built in code; no size is that of the public model."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image

from p2p_subject.blip_diffusion import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipDiffusionPipeline,
    BlipImageProcessor,
    ContextCLIPTextConfig,
    ContextCLIPTextModel,
    QFormerConfig,
    VisionConfig,
)
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer, load_word_pieces

TEXT = ContextCLIPTextConfig(
    vocab_size=80,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=24,
)
MULTIMODAL = Blip2QFormerConfig(
    vision_config=VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    ),
    qformer_config=QFormerConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        cross_attention_frequency=2,
    ),
    num_query_tokens=4,
    projection_size=24,
)


def prompt_tokenizer(folder: Path, positions: int = TEXT.max_position_embeddings):
    """Make a CLIP tokenizer that spells: one token a letter."""
    letters = list(string.ascii_lowercase + ",-")
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_prompt_tokenizer(folder)


def word_pieces(folder: Path):
    """Make the Q-Former's tokenizer over letters and a few categories."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "dog",
        "cat",
        "red",
        "panda",
        *string.ascii_lowercase,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_word_pieces(folder)


def tiny_pipeline(folder: Path, seed: int = 0, positions: int = TEXT.max_position_embeddings) -> BlipDiffusionPipeline:
    """Build the pipeline with random weights and room for `positions` letters; `folder` takes the vocabularies."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT.hidden_size,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    # Default weights of 0.02 would make every prompt and subject look nearly alike at these widths.
    text_encoder = _scaled(ContextCLIPTextModel(replace(TEXT, max_position_embeddings=positions)), 10)
    qformer = _scaled(Blip2QFormerModel(MULTIMODAL), 10)
    pipeline = BlipDiffusionPipeline(
        tokenizer=prompt_tokenizer(folder / "prompt_tokenizer", positions),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        unet=unet.eval(),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, skip_prk_steps=True
        ),
        qformer=qformer.eval(),
        image_processor=BlipImageProcessor(size=32),
        qformer_tokenizer=word_pieces(folder / "word_pieces"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int, width: int = 40, height: int = 28) -> Image.Image:
    """Return a random RGB picture, not square unless asked."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator that draws the same noise every time."""
    return torch.Generator().manual_seed(seed)


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@torch.no_grad()
def _scaled(network: torch.nn.Module, factor: float) -> torch.nn.Module:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)
    return network
