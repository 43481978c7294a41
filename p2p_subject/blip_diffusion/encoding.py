"""From pictures, categories and prompts to what conditions the U-Net (BLIP-Diffusion, "Method")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2p_subject.blip_diffusion import arguments as check
from p2p_subject.blip_diffusion.image_processor import as_pictures
from p2p_subject.blip_diffusion.modes import inference
from p2p_subject.tokens import layout

if TYPE_CHECKING:
    from p2p_subject.blip_diffusion.image_processor import Picture

__all__ = ["EncodingMixin"]


class EncodingMixin:
    """The encoders of a pipeline with `qformer`, `text_encoder`, their tokenizers and an image processor."""

    @inference
    def subject_embeddings(
        self,
        reference_images: Picture | Sequence[Picture | Sequence[Picture]],
        categories: str | Sequence[str],
    ) -> Tensor:
        """Embed subjects once, for any number of later calls.

        Args:
            reference_images: a picture (one row) or a list with one entry a row; an entry that is itself a
                list holds several pictures of one subject. Kinds and ranges as in
                `BlipImageProcessor.preprocess`.
            categories: what the subjects are, such as "dog"; one for all rows or one a row.

        Returns:
            (B, Nq, D) embeddings in the space of the text encoder's tokens, on its execution device. A row of
            several pictures is the mean of theirs (the paper, on fine-tuning: what it starts from).

        Raises:
            SubjectError: a category is missing or too long.
            PromptError: the lists differ in length.
            ImageError: a picture cannot be used.
        """
        rows = check.rows({"reference_image": reference_images, "source_subject_category": categories})
        subjects = [as_pictures(entry) for entry in rows["reference_image"]]
        named = check.subjects(rows["source_subject_category"], "source_subject_category")
        counts = [len(pictures) for pictures in subjects]
        pixels = self.image_processor.preprocess(
            [picture for pictures in subjects for picture in pictures],
            image_mean=self.config.mean,
            image_std=self.config.std,
        )
        words = self.qformer_tokenizer(
            [name for name, count in zip(named, counts, strict=True) for _ in range(count)],
            padding=True,
            return_tensors="pt",
        ).to(self._execution_device)
        embeddings = self.qformer(pixels.to(self._execution_device), words.input_ids, words.attention_mask)
        return torch.stack([row.mean(dim=0) for row in embeddings.split(counts)])

    @inference
    def encode_prompt(
        self, prompt: str | Sequence[str], subject_embeddings: Tensor | None = None, *, truncate: bool = False
    ) -> Tensor:
        """Encode prompts, with a subject spliced in at position `ctx_begin_pos` where embeddings are given.

        Args:
            prompt: one text or B, encoded as they are: with a subject they should begin with "a".
            subject_embeddings: (1 or B, Nq, D), or None for plain prompts. One text serves several rows.
            truncate: cut what does not fit instead of raising.

        Returns:
            (B, L, D) hidden states, L = the positions of the text encoder, Nq of them the subject's.

        Raises:
            PromptError: a prompt is no text, or prompts and embeddings have different numbers of rows.
            PromptTooLongError: a prompt and the subject do not fit into L positions and `truncate` is False.
            SubjectError: the embeddings have another shape.
        """
        rows = check.rows({"prompt": prompt, "subject_embeddings": check.batch_of(subject_embeddings)})
        prompts = check.prompts(rows["prompt"], "prompt")
        queries, device = 0, self._execution_device
        if subject_embeddings is not None:
            width = self.text_encoder.config.hidden_size
            subject_embeddings = check.embeddings(subject_embeddings, len(prompts), width).to(device)
            queries = subject_embeddings.shape[1]
        ids = self._token_ids(prompts, queries, truncate).to(device)
        return self.text_encoder(ids, subject_embeddings, self.config.ctx_begin_pos)

    def _token_ids(self, prompts: list[str], queries: int, truncate: bool = False) -> Tensor:
        room = self.text_encoder.config.max_position_embeddings - queries
        ids = self.tokenizer(prompts, padding="max_length", max_length=room, truncation=truncate).input_ids
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > room:
                # Raises, and names the words that do not fit.
                layout(
                    self.tokenizer,
                    prompt,
                    subject_queries=queries,
                    subject_position=self.config.ctx_begin_pos,
                    max_length=room + queries,
                )
        return torch.tensor(ids)
