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
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig, ContextCLIPTextConfig
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.training import world
from p2p_subject.training.attention_loss import coverage_loss, explicit_attention
from p2p_subject.training.loop import RunConfig, run
from p2p_subject.training.tokenizers import (
    WINDOW,
    byte_pairs,
    save_clip_tokenizer,
    save_word_piece_tokenizer,
    word_pieces,
)

WIDTH, QUERIES, POSITION = 128, 4, 2

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


@dataclass(frozen=True)
class Shares:
    """Shares of a batch: subject and caption (the rest), caption only, neither. The paper drops the subject in 15 %."""

    caption_only: float = 0.2
    neither: float = 0.1


class Cache:
    """Latents, masks, references and labels of the training scenes, drawn and encoded once, memory-mapped."""

    ARRAYS = ("latents", "masks", "references", "ids", "category_ids", "labels", "columns")

    def __init__(self, folder: Path) -> None:
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.ARRAYS}
        self.count = len(self.arrays["latents"])

    def batch(self, indices: np.ndarray, tinted: np.ndarray, shares: Shares) -> dict[str, Tensor]:
        """Tensors of the scenes `indices`; `tinted` (B,) says whose caption names the tint."""
        pick = {name: np.asarray(array[indices]) for name, array in self.arrays.items()}
        rows = np.arange(len(indices))
        count = len(indices)
        neither, caption_only = round(shares.neither * count), round(shares.caption_only * count)
        return {
            "latents": torch.from_numpy(pick["latents"]).float(),
            "mask": torch.from_numpy(pick["masks"]).float(),
            "references": torch.from_numpy(pick["references"]),
            "ids": torch.from_numpy(pick["ids"][rows, tinted.astype(int)]).long(),
            "columns": torch.from_numpy(pick["columns"][rows, tinted.astype(int)]).long(),
            "category_ids": torch.from_numpy(pick["category_ids"]).long(),
            "labels": torch.from_numpy(pick["labels"]).float(),
            "split": torch.tensor([count - neither - caption_only, caption_only, neither]),
        }


def _caption_row(tokenizer, caption: str, category: str) -> tuple[list[int], tuple[int, int]]:
    """Ids of a caption, padded to the window less the queries, and the columns of its category and background words."""
    ids = tokenizer(caption, padding="max_length", max_length=WINDOW - QUERIES).input_ids
    words = caption.split()
    # Every word of the world is one token: word i stands in column i + 1, after the start token.
    return ids, (words.index(category) + 1, len(words))


def make_cache(folder: Path, vae_folder: Path, count: int, processes: int = 1, split: str = "train") -> None:
    """Draw and encode scenes 0 to `count` of a split into `folder`, in `processes` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_clip_tokenizer(folder / "tokenizer")
    save_word_piece_tokenizer(folder / "qformer_tokenizer")
    shapes = {
        "latents": ((4, 16, 16), np.float16),
        "masks": ((16, 16), np.float16),
        "references": ((3, world.SIZE, world.SIZE), np.uint8),
        "ids": ((2, WINDOW - QUERIES), np.int16),
        "columns": ((2, 2), np.int16),
        "category_ids": ((4,), np.int16),
        "labels": ((5,), np.float32),
    }
    for name, (shape, dtype) in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count, *shape)).flush()
    mp.start_processes(_fill_cache, (folder, vae_folder, count, processes, split), processes, start_method="fork")


@torch.no_grad()
def _fill_cache(rank: int, folder: Path, vae_folder: Path, count: int, processes: int, split: str) -> None:
    from transformers import BertTokenizer, CLIPTokenizer

    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pieces = BertTokenizer.from_pretrained(folder / "qformer_tokenizer")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in Cache.ARRAYS}
    caption_row = lru_cache(maxsize=None)(lambda caption, category: _caption_row(tokenizer, caption, category))
    starts = range(64 * rank, count, 64 * processes)
    for start in tqdm(starts, desc="drawing scenes", disable=None if rank == 0 else True):
        chosen = slice(start, min(start + 64, count))
        indices = range(chosen.start, chosen.stop)
        scenes = [world.draw(world.sample(split, index)) for index in indices]
        looks = [scene.spec.look for scene in scenes]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = [
            [caption_row(scene.spec.caption(tint=tint), scene.spec.look.category) for tint in (False, True)]
            for scene in scenes
        ]
        arrays["latents"][chosen] = vae.encode(images).latent_dist.mean.numpy()
        arrays["masks"][chosen] = [scene.alpha.reshape(16, 4, 16, 4).mean((1, 3)) for scene in scenes]
        arrays["references"][chosen] = [
            world.reference(look, split, index).transpose(2, 0, 1) for look, index in zip(looks, indices)
        ]
        arrays["ids"][chosen] = [[ids for ids, _ in pair] for pair in rows]
        arrays["columns"][chosen] = [[columns for _, columns in pair] for pair in rows]
        names = [look.category for look in looks]
        arrays["category_ids"][chosen] = pieces(names, padding="max_length", max_length=4).input_ids
        arrays["labels"][chosen] = [_labels(look) for look in looks]


def _labels(look: world.Look) -> tuple[float, ...]:
    """Category, source, natural or not, and the hue as a point on the circle (0, 0 for natural colours)."""
    angle = None if look.hue is None else np.deg2rad(look.hue)
    hue = (0.0, 0.0) if angle is None else (np.cos(angle), np.sin(angle))
    return (world.CATEGORIES.index(look.category), world.SOURCES.index(look.source), angle is None, *hue)


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


def train(
    config: RunConfig,
    cache_folder: Path,
    batch: int,
    attention_weight: float = 0.0,
    shares: Shares | None = None,
    start_from: Path | None = None,
    evaluate=None,
) -> Path:
    """Run the stage; `start_from` is an `ema.safetensors` of an earlier run to begin with."""
    cache, shares = Cache(cache_folder), shares or Shares()

    def build() -> RepresentationTrainer:
        trainer = RepresentationTrainer(attention_weight)
        if start_from:
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
