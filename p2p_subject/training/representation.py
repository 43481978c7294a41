"""Subject representation learning, the second stage of BLIP-Diffusion, on the miniature world.

Prompted context generation (Li et al. 2023, section 3.2): the encoder sees the subject on a random background, the U-Net
has to draw the scene of the caption with that subject in it. All parts are trained together; subject or caption are left
out in fixed shares of every batch, which keeps generation from text alone and guidance alive.

Differences to the paper, measured to be better at this size: v-prediction with min-SNR weights (Hang et al. 2023), a loss
that counts the pixels of the subject twice, small auxiliary heads that ask the subject embeddings for category, source and
hue, and, in the last part of the run only, a term that asks the words' attention to cover the object.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig, ContextCLIPTextConfig
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.training import world
from p2p_subject.training.attention_loss import coverage_loss, explicit_attention
from p2p_subject.training.loop import RunConfig, run
from p2p_subject.training.scenes import Cache, Shares
from p2p_subject.training.tokenizers import QUERIES, WINDOW, byte_pairs, word_pieces

WIDTH, POSITION = 128, 2

UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH,
    attention_head_dim=(2, 4, 4),
    norm_num_groups=16,
)
TEXT = dict(
    vocab_size=len(byte_pairs()[0]),
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=WINDOW,
    hidden_act="quick_gelu",
    bos_token_id=len(byte_pairs()[0]) - 2,
    eos_token_id=len(byte_pairs()[0]) - 1,
)
QFORMER = dict(
    num_query_tokens=QUERIES,
    tokenizer="qformer_tokenizer",
    vision_config=dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=8,
        hidden_act="quick_gelu",
    ),
    qformer_config=dict(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=1,
        max_position_embeddings=16,
        vocab_size=len(word_pieces()),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class RepresentationTrainer(nn.Module):
    """U-Net, text encoder and subject encoder with the losses of the stage."""

    def __init__(self, attention_weight: float = 0.0, auxiliary_weight: float = 0.1) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = ContextCLIPTextModel(ContextCLIPTextConfig.from_dict(TEXT))
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig.from_dict(QFORMER))
        self.heads = nn.Linear(QUERIES * WIDTH, len(world.CATEGORIES) + len(world.SOURCES) + 3)
        self.attention_weight, self.auxiliary_weight = attention_weight, auxiliary_weight
        betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000).square()
        self.register_buffer("alphas", (1 - betas).cumprod(0), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def contexts(self, ids: Tensor, subject: Tensor, split: list[int]) -> Tensor:
        """Encode the three kinds of rows: with subject, caption only, neither; (B, L, D)."""
        with_subject, caption_only, neither = ids.split(split)
        first = self.text_encoder(with_subject, subject, POSITION)
        end = TEXT["eos_token_id"]
        longer = F.pad(caption_only, (0, QUERIES), value=end)
        empty = torch.full_like(longer[:1], end).expand(neither.shape[0], -1).clone()
        empty[:, 0] = TEXT["bos_token_id"]
        return torch.cat([first, self.text_encoder(torch.cat([longer, empty]))])

    def forward(
        self,
        latents: Tensor,
        mask: Tensor,
        references: Tensor,
        ids: Tensor,
        columns: Tensor,
        category_ids: Tensor,
        labels: Tensor,
        split: Tensor,
    ) -> dict[str, Tensor]:
        sizes = split.tolist()
        count = len(latents)
        pixels = (references[: sizes[0]].float() / 255 - self.mean) / self.std
        subject = self.qformer(pixels, category_ids[: sizes[0]], (category_ids[: sizes[0]] != 0).long())
        context = self.contexts(ids, subject, sizes)

        uniform = torch.rand(count, device=latents.device)
        normal = torch.sigmoid(torch.randn(count, device=latents.device))
        t = (torch.where(torch.arange(count, device=latents.device) % 2 == 0, uniform, normal) * 1000).long().clamp(0, 999)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

        rows = sizes[0] + sizes[1]
        with explicit_attention(self.unet, mask.shape[-1] if self.attention_weight else None) as maps:
            predicted = self.unet(noisy, t, context).sample.float()
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / (snr + 1) * (1 + mask[:, None])
        denoising = ((predicted - velocity).square() * weight).mean() / 0.6
        auxiliary, right = self.auxiliary(subject, labels[: sizes[0]])
        loss = denoising + self.auxiliary_weight * auxiliary
        losses = {"denoising": denoising, "auxiliary": auxiliary, "category": right}
        if self.attention_weight:
            coverage = coverage_loss(maps, columns[:rows], mask[:rows], sizes[0], POSITION, QUERIES)
            loss = loss + self.attention_weight * coverage
            losses["coverage"] = coverage
        return {"loss": loss, **losses}

    def auxiliary(self, subject: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the auxiliary heads on (B, Nq, D) embeddings, and the share of right categories."""
        out = self.heads(subject.flatten(1)).float()
        category, source, natural, hue = out.split([len(world.CATEGORIES), len(world.SOURCES), 1, 2], 1)
        tinted = 1 - labels[:, 2:3]
        loss = (
            F.cross_entropy(category, labels[:, 0].long())
            + F.cross_entropy(source, labels[:, 1].long())
            + F.binary_cross_entropy_with_logits(natural, labels[:, 2:3])
            + 2 * (tinted * (hue - labels[:, 3:5]).square()).mean()
        )
        return loss, (category.argmax(1) == labels[:, 0]).float().mean()


def start_from_model(trainer: RepresentationTrainer, folder: Path) -> None:
    """Fill a trainer with the weights of a model folder; the auxiliary heads, which no model has, begin anew."""
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "qformer": "model"}
    for name, stem in parts.items():
        getattr(trainer, name).load_state_dict(load_file(folder / name / f"{stem}.safetensors"))


def train(
    config: RunConfig,
    cache_folder: Path,
    batch: int,
    attention_weight: float = 0.0,
    shares: Shares | None = None,
    start_from: Path | None = None,
    evaluate=None,
) -> Path:
    """Run the stage; `start_from`, an `ema.safetensors` of an earlier run or a model folder, is what it begins with."""
    cache, shares = Cache(cache_folder), shares or Shares()

    def build() -> RepresentationTrainer:
        trainer = RepresentationTrainer(attention_weight)
        if start_from and start_from.is_dir():
            start_from_model(trainer, start_from)
        elif start_from:
            trainer.load_state_dict(load_file(start_from))
        return trainer

    def batches(step: int, rank: int, processes: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, step, rank))
        indices = np.sort(rng.integers(0, cache.count, batch // processes))
        return cache.batch(rng.permutation(indices), rng.random(len(indices)) < 0.5, shares)

    (config.out).mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"batch": batch, "attention_weight": attention_weight, "scenes": cache.count}
    (config.out / "settings.json").write_text(json.dumps(settings | {"out": str(config.out)}, indent=2, default=str))
    return run(config, build, batches, evaluate)
