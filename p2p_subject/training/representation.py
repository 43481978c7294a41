"""Subject representation learning, the second stage of BLIP-Diffusion's pre-training, of any model in its layout.

Prompted context generation (Li et al. 2023, section 3.2): the encoder sees the subject on a random background, the U-Net
has to draw the scene of the caption with that subject in it. All parts but the image encoder are trained together; subject
or caption are left out in fixed shares of the rows, which keeps generation from text alone and guidance alive.

The miniature is trained with more than the paper says, each measured to be better at its size: v-prediction with min-SNR
weights (Hang et al. 2023), a loss that counts the pixels of the subject twice, small auxiliary heads that ask the subject
embeddings for category, source and hue, and, in the last part of the run only, a term that asks the words' attention to
cover the object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from p2p_subject.blip_diffusion.pipeline import BlipDiffusionPipeline
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.errors import ArgumentError
from p2p_subject.training import world
from p2p_subject.training.attention_loss import coverage_loss, explicit_attention
from p2p_subject.training.denoising import Denoising

PARTS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "qformer": "model"}
"""What is trained, by its folder in a model, and the stem of the weights there."""


@dataclass(frozen=True)
class Shares:
    """Shares of the rows that get a caption without subject, and neither; the rest gets both.

    Rows without caption keep classifier-free guidance alive (Ho, Salimans 2022). The defaults suit the miniature.
    """

    caption_only: float = 0.2
    neither: float = 0.1

    @property
    def no_subject(self) -> bool:
        """Whether no row has its subject."""
        return self.caption_only + self.neither >= 1

    def split(self, count: int) -> list[int]:
        """Rows with subject, caption only, and neither; fractions of a row are drawn from torch's generator."""
        # One number for both edges, so that no row is counted twice however few there are.
        part = float(torch.rand(()))
        first = int(self.caption_only * count + part)
        both = min(int((self.caption_only + self.neither) * count + part), count)
        return [count - both, first, both - first]


PAPER_SHARES = Shares(0.1, 0.05)
"""The subject is left out of 15 % of the rows, as in the paper; a third of these, of which it says nothing, have no caption."""


@dataclass(frozen=True)
class SubjectLearning:
    """What of the stage is done how; the defaults are the paper's.

    `shares`: rows without subject or caption. `train_text_encoder`, `category_text` (the Q-Former reads the subject's
    category), and a subject that is left out in some rows are the paper's ablations (table 2). `max_snr`, `central`: see
    `Denoising`. `subject_weight`: added to the loss where the subject is. `auxiliary_weight` and `attention_weight`: of the
    auxiliary heads and of the coverage term, which need the labels of the miniature world. `train_image_encoder` is not
    done by the paper. `checkpointing` spends time to save memory. Raises
    `ArgumentError` for what cannot be had together.
    """

    shares: Shares = PAPER_SHARES
    train_text_encoder: bool = True
    train_image_encoder: bool = False
    category_text: bool = True
    max_snr: float | None = None
    central: float = 0.0
    subject_weight: float = 0.0
    auxiliary_weight: float = 0.0
    attention_weight: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.attention_weight and self.checkpointing:
            # What is computed again on the way back would run without what reads the maps.
            raise ArgumentError("attention_weight and checkpointing cannot be had together; leave one out")


class SubjectTrainer(nn.Module):
    """U-Net, text encoder and subject encoder with the losses of the stage.

    `scheduler`: the configuration of the model's scheduler. `empty`: token ids of no caption, padded to the window L. `vae`
    turns pictures into latents, frozen; None where batches hold latents. `position`: how many tokens stand before the subject,
    where a batch does not say it.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: ContextCLIPTextModel,
        qformer: Blip2QFormerModel,
        scheduler: Mapping[str, Any],
        empty: Sequence[int],
        learning: SubjectLearning | None = None,
        vae: AutoencoderKL | None = None,
        position: int = 2,
    ) -> None:
        super().__init__()
        self.learning = learning = learning or SubjectLearning()
        self.unet, self.text_encoder, self.qformer, self.vae = unet, text_encoder, qformer, vae
        self.position = position
        self.register_buffer("empty", torch.tensor(empty), persistent=False)
        self.denoising = Denoising(scheduler, learning.max_snr, learning.central)
        if learning.auxiliary_weight:
            width = qformer.config.num_query_tokens * qformer.config.output_size
            self.heads = nn.Linear(width, len(world.CATEGORIES) + len(world.SOURCES) + 3)
        qformer.requires_grad_(not learning.shares.no_subject)
        qformer.visual_encoder.requires_grad_(learning.train_image_encoder and not learning.shares.no_subject)
        text_encoder.requires_grad_(learning.train_text_encoder)
        if vae is not None:
            vae.requires_grad_(False).eval()
        if learning.checkpointing:
            unet.enable_gradient_checkpointing()

    def train(self, mode: bool = True) -> SubjectTrainer:
        """As of every module; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in (self.vae, None if self.learning.train_image_encoder else self.qformer.visual_encoder):
            if part is not None:
                part.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As of every module, without the frozen autoencoder, which checkpoints need not repeat."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("vae.")}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As of every module; the autoencoder's weights are not expected."""
        own = {} if self.vae is None else {f"vae.{name}": value for name, value in self.vae.state_dict().items()}
        return super().load_state_dict({**state_dict, **own}, strict, assign)

    def encoded(
        self,
        references: Tensor,
        ids: Tensor,
        category_ids: Tensor,
        category_mask: Tensor,
        split: list[int],
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Subject embeddings (N, Nq, D) of the rows that have their subject, the first N = split[0], and contexts of all."""
        first = slice(max(split[0], 1))
        subject = self.subjects(references[first], category_ids[first], category_mask[first])
        context = self.contexts(ids, subject, split, self.position if position is None else position[first])
        return subject[: split[0]], context

    def contexts(self, ids: Tensor, subject: Tensor, split: list[int], position: Tensor | int) -> Tensor:
        """Encode the three kinds of rows: with subject, caption only, neither; (B, L, D).

        `split` counts them. Where no row has its subject the first is encoded with one all the same, and where all have theirs
        the empty caption is, and dropped: fused kernels refuse a call without rows, and processes must agree on which weights
        have gradients. So `ids`, `subject` (N, Nq, D) and `position` hold a row at least, unless no row ever has its subject.
        """
        subjects, captions, _ = split
        longer = torch.cat([ids[subjects:], self.empty[ids.shape[1] :].expand(len(ids) - subjects, -1)], dim=1)
        longer[captions:] = self.empty
        told = self.text_encoder(longer if len(longer) else self.empty[None])[: len(longer)]
        if self.learning.shares.no_subject:
            return told
        return torch.cat([self.text_encoder(ids[: len(subject)], subject, position)[:subjects], told])

    def subjects(self, references: Tensor, category_ids: Tensor, category_mask: Tensor) -> Tensor:
        """Embeddings (B, Nq, D) of normalised pictures (B, 3, S, S) and word pieces (B, T) of their categories."""
        if self.learning.shares.no_subject:
            # Some fused kernels refuse a call without rows.
            return self.qformer.query_tokens[:0]
        if self.learning.category_text:
            return self.qformer(references, category_ids, category_mask)
        hidden = self.qformer.encode(self.qformer.visual_encoder(references))
        return self.qformer.proj_layer(hidden)

    def clean(self, pixels: Tensor | None, latents: Tensor | None) -> Tensor:
        """Latents (B, C, h, w) float32, given or of pictures (B, 3, H, W) in [-1, 1]."""
        if latents is not None:
            return latents
        config = self.vae.config
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            drawn = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.sample().float()
        return (drawn - (config.shift_factor or 0)) * config.scaling_factor

    def forward(
        self,
        references: Tensor,
        ids: Tensor,
        category_ids: Tensor,
        category_mask: Tensor,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        position: Tensor | None = None,
        columns: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch; what it holds is said in `p2p_subject.training.pictures` and `scenes`."""
        learning, count = self.learning, len(ids)
        split = learning.shares.split(count)
        subject, context = self.encoded(references, ids, category_ids, category_mask, split, position)
        clean = self.clean(pixels, latents)
        emphasis = 1 + learning.subject_weight * mask[:, None] if learning.subject_weight else None
        # At the few hundred pixels of the miniature the explicit form trains a fifth faster on a CPU than the fused kernel.
        small = clean.device.type == "cpu" and clean.shape[-1] <= 16 and not learning.checkpointing
        explicit = learning.attention_weight or small
        side = mask.shape[-1] if learning.attention_weight else None
        with explicit_attention(self.unet, side) if explicit else nullcontext() as maps:
            loss = self.denoising(lambda noisy, t: self.unet(noisy, t, context).sample, clean, emphasis)
        losses = {"denoising": loss}
        if learning.auxiliary_weight:
            auxiliary, losses["category"] = self.auxiliary(subject, labels[: split[0]])
            loss = loss + learning.auxiliary_weight * auxiliary
            losses["auxiliary"] = auxiliary
        if learning.attention_weight:
            rows, queries = split[0] + split[1], subject.shape[1]
            coverage = coverage_loss(maps, columns[:rows], mask[:rows], split[0], self.position, queries) if rows else 0 * loss
            loss = loss + learning.attention_weight * coverage
            losses["coverage"] = coverage
        return {"loss": loss, **losses}

    def auxiliary(self, subject: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the auxiliary heads on (B, Nq, D) embeddings, and the share of right categories."""
        if not len(subject):
            return 0 * (self.heads.weight.sum() + self.heads.bias.sum()), self.heads.weight.new_zeros(())
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


def empty_prompt(pipeline: BlipDiffusionPipeline) -> list[int]:
    """Token ids of no caption, padded to the text encoder's window."""
    window = pipeline.text_encoder.config.max_position_embeddings
    return pipeline.tokenizer("", padding="max_length", max_length=window).input_ids


def start(trainer: nn.Module, source: Path, parts: Mapping[str, str] = PARTS) -> None:
    """Fill the parts of a trainer from `source`: a model folder, or the `ema.safetensors` of a run of any stage.

    Of a run, the parts that it holds are taken (stage one trains the Q-Former alone), and the auxiliary heads where both have
    them. Raises `ArgumentError` where there is nothing to take.
    """
    if source.is_dir():
        for name, stem in parts.items():
            getattr(trainer, name).load_state_dict(load_file(source / name / f"{stem}.safetensors"))
        return
    saved, own = load_file(source), trainer.state_dict()
    held = {name for name in (*parts, "heads") if hasattr(trainer, name) and any(key.startswith(f"{name}.") for key in saved)}
    if not held:
        raise ArgumentError(f"{source} holds none of {', '.join(parts)}; expected the ema.safetensors of a run of these stages")
    kept = {key: value for key, value in saved.items() if key.split(".")[0] in held}
    trainer.load_state_dict({**own, **kept})
