"""BLIP-Diffusion as the editor sees it: prompts may hold a subject, given by pictures (Li et al. 2023, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.context import Context
from p2p_subject.errors import SubjectError
from p2p_subject.models import Model
from p2p_subject.subject import AnySubject
from p2p_subject.tokens import TokenLayout, layout


class BlipDiffusionModel(Model):
    """A `BlipDiffusionPipeline`, the one kind that takes subjects."""

    pipeline_class = BlipDiffusionPipeline

    @property
    def queries(self) -> int:
        return self.pipeline.qformer.config.num_query_tokens

    def layout(self, prompt: str, *, subject: bool = False) -> TokenLayout:
        return layout(
            self.pipeline.tokenizer,
            prompt,
            subject_queries=self.queries if subject else 0,
            subject_position=self.pipeline.config.ctx_begin_pos,
            max_length=self.window,
        )

    def require_subject(self, subject: AnySubject) -> None:
        room = self.pipeline.qformer.config.qformer_config.max_position_embeddings
        for category in subject.encoded:
            pieces = len(self.pipeline.qformer_tokenizer(category).input_ids)
            if pieces > room:
                raise SubjectError(
                    f"category {category!r} takes {pieces} word pieces of this model's {room}; name it in a simpler word"
                )

    @torch.no_grad()
    def embed(self, subject: AnySubject) -> Tensor:
        embeddings = subject.embedded(lambda pictures, name: self.pipeline.subject_embeddings([pictures], [name]))
        wanted = (1, self.queries, self.pipeline.text_encoder.config.hidden_size)
        if embeddings.shape != wanted:
            raise SubjectError(
                f"subject embeddings of shape {tuple(embeddings.shape)} given; this model takes {wanted}. Learn the subject "
                "with this model, or pass its pictures"
            )
        return embeddings.to(self.device)

    def encode(self, layout: TokenLayout, subject: Tensor | None = None) -> Context:
        ids = torch.tensor([layout.prompt_ids], device=self.device)
        subject = None if subject is None else subject.to(self.device)
        position = layout.subject.start if subject is not None else self.pipeline.config.ctx_begin_pos
        # With gradients for a subject that is being learned alone.
        with torch.set_grad_enabled(torch.is_grad_enabled() and subject is not None and subject.requires_grad):
            return Context(self.pipeline.text_encoder(ids, subject, position).to(self.unet.dtype))
