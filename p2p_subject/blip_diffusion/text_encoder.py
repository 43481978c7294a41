"""CLIP's causal text encoder with room for a subject, whose embeddings stand between the prompt's tokens.

After BLIP-Diffusion, subject representation learning: the mixed sequence of word and subject embeddings runs
through the whole encoder, so that later words read the subject.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p2p_subject.blip_diffusion.config import ContextCLIPTextConfig
from p2p_subject.blip_diffusion.layers import PreNormLayer, attend, initialise
from p2p_subject.blip_diffusion.network import Network
from p2p_subject.errors import ModelError, PromptTooLongError

__all__ = ["ContextCLIPTextModel"]


class ContextCLIPTextModel(Network):
    """The text encoder of BLIP-Diffusion; state-dict keys are those of the public checkpoint."""

    config_class = ContextCLIPTextConfig
    config: ContextCLIPTextConfig

    def __init__(self, config: ContextCLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = _TextTransformer(config)
        initialise(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, context_embeddings: Tensor | None = None, context_position: int | Tensor = 2
    ) -> Tensor:
        """Encode prompts, with a subject in them where one is given.

        Args:
            input_ids: (B, L) int64, padded, start token first.
            context_embeddings: (B, Nq, D) subject embeddings, or None for a plain prompt.
            context_position: how many tokens stand before the subject; 2 is after the start token and "a". Or
                (B,) int64, where it differs from prompt to prompt.

        Returns:
            (B, L + Nq, D) hidden states after the final layer norm, in the dtype of the weights.

        Raises:
            PromptTooLongError: L + Nq exceeds the positions of the encoder.
            ModelError: the context has another number of rows or another width than the encoder, or its
                position lies outside the prompt.
        """
        embedded = self.text_model.embeddings.token_embedding(input_ids)
        if context_embeddings is not None:
            rows, _, width = embedded.shape
            if context_embeddings.ndim != 3 or context_embeddings.shape[::2] != (rows, width):
                raise ModelError(
                    f"context_embeddings have shape {tuple(context_embeddings.shape)}; for {rows} prompts "
                    f"this text encoder takes ({rows}, number of queries, {width})."
                )
            embedded = _spliced(embedded, context_embeddings.to(embedded.dtype), context_position)
        return self.text_model(embedded)  # (B, L + Nq, D)


def _spliced(prompts: Tensor, context: Tensor, position: int | Tensor) -> Tensor:
    """Put context (B, Nq, D) between the tokens of prompts (B, L, D), behind the first `position` of them."""
    (rows, length, _), queries = prompts.shape, context.shape[1]
    each = isinstance(position, Tensor)
    if each and (position.is_floating_point() or position.shape != (rows,)):
        raise ModelError(
            f"context_position is {position.dtype} of shape {tuple(position.shape)}; expected a whole number, or "
            f"int64 of shape ({rows},): one for each prompt."
        )
    if not (position.ge(0) & position.le(length)).all() if each else not 0 <= position <= length:
        raise ModelError(
            f"context_position {position.tolist() if each else position} lies outside the prompt of {length} "
            f"tokens; choose one from 0 to {length}."
        )
    if not each:
        before, after = prompts.split([position, length - position], dim=1)
        return torch.cat([before, context, after], dim=1)
    at = torch.arange(length + queries, device=prompts.device)
    behind = at - position[:, None].to(at)  # (B, L + Nq): how far each column lies behind the subject's first
    taken = torch.where(behind < 0, at, torch.where(behind < queries, length + behind, at - queries))
    return torch.cat([prompts, context], dim=1).take_along_dim(taken[..., None], dim=1)


class _TextTransformer(nn.Module):
    def __init__(self, config: ContextCLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            PreNormLayer(
                _CausalSelfAttention(config),
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, embedded: Tensor) -> Tensor:
        hidden = self.embeddings(embedded)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return self.final_layer_norm(hidden)


class _TextEmbeddings(nn.Module):
    def __init__(self, config: ContextCLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # Not read here; written because the official loader leaves a missing buffer uninitialised.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, embedded: Tensor) -> Tensor:
        length, positions = embedded.shape[1], self.position_embedding.num_embeddings
        if length > positions:
            raise PromptTooLongError(
                f"prompt and subject together take {length} positions; this text encoder has {positions}. Shorten the prompt."
            )
        return embedded + self.position_embedding(torch.arange(length, device=embedded.device))


class _CausalSelfAttention(nn.Module):
    def __init__(self, config: ContextCLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        mixed = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True, dropout=dropout)
        return self.out_proj(mixed)
