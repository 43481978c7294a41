"""The methods that `benchmarks.finetuning` compares: what each trains, and what it tells the U-Net of a picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from p2p_subject.finetuning import network
from p2p_subject.finetuning.pictures import Contexts
from p2p_subject.finetuning.trainer import Group
from p2p_subject.models import Model
from p2p_subject.subject import Subject
from p2p_subject.tokens import layout
from p2p_subject.training import world

RARE = "big"
"""The word that DreamBooth binds to the subject: one token of the vocabulary that no caption of the training had."""


@dataclass(eq=False)
class Learner:
    """What a method trains, and what it tells the U-Net of a background ("on grass", or "" for the views themselves).

    `encoder` is the text encoder, which tells what guidance leads away from; `prior` what the U-Net is told of pictures of the
    category, where the method learns those as well.
    """

    unet: UNet2DConditionModel
    groups: list[Group]
    contexts: Contexts
    encoder: nn.Module
    prior: Contexts | None = None


def _with_unet(model: Model, lora: bool, rate: float, rank: int, seed: int) -> tuple[UNet2DConditionModel, list[Group]]:
    unet = network.copy_of(model, share=lora)
    weights = network.add_lora(unet, rank, rank, seed) if lora else network.unlock(unet)
    return unet, [(weights, rate)]


def ours(
    model: Model, look: world.Look, views: Sequence[Image.Image], rate: float, rank: int, seed: int, lora: bool
) -> Learner:
    """The mean embedding of the views stands in the prompt, the U-Net is trained (Li et al. 2023, on fine-tuning)."""
    embedding = model.embed(Subject(list(views), look.category))

    @cache
    def tokens(phrase: str) -> Tensor:
        return model.encode(model.layout(_prompt(look.category, phrase), subject=True), embedding).tokens

    unet, groups = _with_unet(model, lora, rate, rank, seed)
    encoder = model.pipeline.text_encoder
    return Learner(unet, groups, lambda phrases: torch.cat([tokens(phrase) for phrase in phrases]), encoder)


def dreambooth(
    model: Model,
    look: world.Look,
    views: Sequence[Image.Image],
    rate: float,
    rank: int,
    seed: int,
    lora: bool,
    text: bool = False,
    prior: bool = False,
) -> Learner:
    """A rare word before the category (Ruiz et al. 2023): the U-Net is trained, and if asked for the text encoder, and the
    category's own pictures beside the subject's with equal weight ("prior preservation", their section 3.3)."""
    unet, groups = _with_unet(model, lora, rate, rank, seed)
    encoder = model.pipeline.text_encoder
    if text:
        encoder = copy.deepcopy(encoder).requires_grad_(True)
        groups.append(({f"text.{name}": weight for name, weight in encoder.named_parameters()}, rate))

    def contexts(noun: str, phrases: Sequence[str]) -> Tensor:
        with torch.set_grad_enabled(text and torch.is_grad_enabled()):
            return encoded(model, encoder, [_prompt(noun, phrase) for phrase in phrases])

    own, kept = (partial(contexts, noun) for noun in (f"{RARE} {look.category}", look.category))
    return Learner(unet, groups, own, encoder, kept if prior else None)


def textual_inversion(
    model: Model, look: world.Look, views: Sequence[Image.Image], rate: float, rank: int, seed: int
) -> Learner:
    """One new word in the category's place is trained alone, from the category's embedding on (Gal et al. 2023)."""
    encoder = model.pipeline.text_encoder
    table = encoder.text_model.embeddings.token_embedding.weight
    (column,) = model.layout(look.category).content
    token = nn.Parameter(table[model.layout(look.category).ids[column]].detach().clone()[None, None])

    def contexts(phrases: Sequence[str]) -> Tensor:
        rows = [
            layout(model.pipeline.tokenizer, f"a {phrase}".strip(), subject_queries=1, max_length=model.window).prompt_ids
            for phrase in phrases
        ]
        return encoder(torch.tensor(rows, device=model.device), token.expand(len(rows), -1, -1), 2)

    return Learner(network.copy_of(model, share=True), [({"token": token}, rate)], contexts, encoder)


def encoded(model: Model, encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """What a text encoder makes of prompts, (B, L, D)."""
    return encoder(torch.tensor([model.layout(prompt).ids for prompt in prompts], device=model.device))


def _prompt(noun: str, phrase: str) -> str:
    return world.with_article(f"{noun} {phrase}".strip())


METHODS: dict[str, tuple[Callable[..., Learner], dict[str, bool], float]] = {
    "ours lora": (ours, {"lora": True}, 3e-3),
    "ours full": (ours, {"lora": False}, 3e-4),
    "dreambooth lora": (dreambooth, {"lora": True}, 3e-3),
    "dreambooth full": (dreambooth, {"lora": False}, 3e-4),
    "dreambooth text": (dreambooth, {"lora": False, "text": True}, 3e-4),
    "dreambooth prior": (dreambooth, {"lora": False, "text": True, "prior": True}, 3e-4),
    "textual inversion": (textual_inversion, {}, 1e-2),
}
"""Methods by name: what builds the learner, its options, and its learning rate.

Chosen for ours on tuning drawing 1, in 80 steps: of 1e-3, 3e-3, 1e-2 for low-rank weights, of 1e-4, 3e-4, 1e-3 for all weights;
and of 1e-2, 5e-2 for a new word. DreamBooth takes those of ours, for its text encoder too; `--tune` compares others: of all its
weights 1e-4, 3e-4, 1e-3 reach .62, .50, .50 at best, on tuning drawings 0 and 1.
"""
