"""Stable Diffusion 1.x, 2.x and XL as the editor sees them, from their published folders or diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from p2p_subject.context import Context
from p2p_subject.errors import PromptError
from p2p_subject.models import Model, lock_of
from p2p_subject.supported import require_text
from p2p_subject.tokens import TokenLayout, layout


class StableDiffusionModel(Model):
    """A `StableDiffusionPipeline`: 1.x, or 2.x with its wider text encoder and v-prediction."""

    pipeline_class = (StableDiffusionPipeline, StableDiffusionControlNetPipeline)
    encoders: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer", "text_encoder"),)

    def require_controllable(self) -> None:
        super().require_controllable()
        require_text(self.pipeline, self.encoders)

    def layout(self, prompt: str, *, subject: bool = False) -> TokenLayout:
        words = super().layout(prompt, subject=subject)
        if self.pipeline.maybe_convert_prompt(words.prompt, self.pipeline.tokenizer) != words.prompt:
            raise PromptError(
                f"{prompt!r} names a textual inversion of several vectors, of which a word would be the first alone. Load one "
                "of a single vector"
            )
        return words

    @torch.no_grad()
    def encode(self, layout: TokenLayout, subject: Tensor | None = None) -> Context:
        self._require_none(subject)
        tokens = self._encoded(self.pipeline.text_encoder, layout).last_hidden_state
        return Context(tokens.to(self.unet.dtype))

    def _encoded(self, encoder: Any, words: TokenLayout) -> Any:
        """All outputs of a text encoder for the ids of a layout."""
        return encoder(torch.tensor([words.ids], device=self.device), output_hidden_states=True)

    def _require_none(self, subject: Tensor | None) -> None:
        if subject is not None:
            raise self._no_subjects()


class StableDiffusionXLModel(StableDiffusionModel):
    """A `StableDiffusionXLPipeline`: two text encoders side by side, a pooled embedding, and the picture's size."""

    pipeline_class = (StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline)
    default_guidance = 5.0
    addition = "text_time"
    encoders = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    def layout(self, prompt: str, *, subject: bool = False) -> TokenLayout:
        words = super().layout(prompt, subject=subject)
        # They share a vocabulary, but a character that one of them pads with is another token to it.
        if self._second(words).spans != words.spans:
            raise PromptError(f"the two tokenizers of this model split {prompt!r} differently; leave out unusual punctuation")
        return words

    def _second(self, words: TokenLayout) -> TokenLayout:
        """The layout that the second text encoder sees: the same columns, padded with another token."""
        return layout(self.pipeline.tokenizer_2, words.prompt, max_length=self.window)

    @torch.no_grad()
    def encode(self, layout: TokenLayout, subject: Tensor | None = None) -> Context:
        self._require_none(subject)
        first = self._encoded(self.pipeline.text_encoder, layout)
        second = self._encoded(self.pipeline.text_encoder_2, self._second(layout))
        # The layer before the last, without the final norm, is what the U-Net was trained on.
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Context(tokens.to(self.unet.dtype), second.text_embeds.to(self.unet.dtype))

    def unconditional(self, negative_prompt: str | None = None) -> Context:
        """As for every model; without a negative prompt, zeros where the pipeline's configuration says so."""
        context = super().unconditional(negative_prompt)
        if negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return Context(torch.zeros_like(context.tokens), torch.zeros_like(context.pooled))
        return context

    def _added(self, latents: Tensor, context: Context) -> dict[str, Any]:
        """Pooled text (R, P) and size (R, 6): that of the picture before and after cropping, of which there is none."""
        height, width = (side * self.scale_factor for side in latents.shape[-2:])
        size = context.tokens.new_tensor([height, width, 0, 0, height, width])
        return {"added_cond_kwargs": {"text_embeds": context.pooled, "time_ids": size.expand(len(latents), -1)}}

    @contextmanager
    def _autoencoder(self) -> Iterator[AutoencoderKL]:
        """The VAE, in single precision where half would overflow, as its configuration says of Stable Diffusion XL's."""
        vae = self.pipeline.vae
        # Locked before it is looked at: another thread may have it in single precision for the moment.
        with lock_of(vae):
            if vae.dtype != torch.float16 or not vae.config.force_upcast:
                yield vae
                return
            vae.to(torch.float32)
            try:
                yield vae
            finally:
                vae.to(torch.float16)
