"""The Q-Former: learned queries read a picture of the subject, guided by the name of its category.

After BLIP-Diffusion, multimodal representation learning (and BLIP-2): queries and text meet in
self-attention, queries alone read the image in cross-attention, and a feed-forward projection takes the query
outputs into the text encoder's embedding space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p2p_subject.blip_diffusion.config import Blip2QFormerConfig, QFormerConfig
from p2p_subject.blip_diffusion.layers import activation, attend, initialise, quick_gelu
from p2p_subject.blip_diffusion.network import Network
from p2p_subject.blip_diffusion.vision import Blip2VisionModel
from p2p_subject.errors import ModelError, SubjectError

__all__ = ["Blip2QFormerModel"]


class Blip2QFormerModel(Network):
    """The multimodal encoder of BLIP-Diffusion; state-dict keys are those of the public checkpoint."""

    config_class = Blip2QFormerConfig
    config: Blip2QFormerConfig

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__(config)
        qformer = config.qformer_config
        self.visual_encoder = Blip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
        self.embeddings = _Embeddings(qformer)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            _Layer(qformer, config.vision_config.hidden_size, index % qformer.cross_attention_frequency == 0)
            for index in range(qformer.num_hidden_layers)
        )
        self.proj_layer = _Projection(qformer.hidden_size, config.output_size, qformer.hidden_dropout_prob)
        initialise(self, config.initializer_range)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed subjects for the text encoder.

        Args:
            pixel_values: (B, 3, S, S) normalised pictures, S = `config.vision_config.image_size`.
            input_ids: (B, T) int64 word pieces of the subjects' categories.
            attention_mask: (B, T), 1 for a word piece and 0 for padding; None if nothing is padded.

        Returns:
            (B, Nq, D) subject embeddings, D = `config.output_size`.

        Raises:
            ImageError: the pictures have another size than S.
            SubjectError: the category is longer than the Q-Former's positions.
            ModelError: the mask does not fit the sequence.
        """
        if attention_mask is not None:
            queries = attention_mask.new_ones(len(attention_mask), self.query_tokens.shape[1])
            attention_mask = torch.cat([queries, attention_mask], dim=1)
        hidden = self.encode(self.visual_encoder(pixel_values), input_ids, attention_mask)
        return self.proj_layer(hidden[:, : self.query_tokens.shape[1]])

    def encode(self, image_features: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Run queries and text over an image that is already encoded; for pre-training.

        Args:
            image_features: (B, P, Dv) output of `visual_encoder`.
            input_ids: (B, T) int64 word pieces; None runs the queries alone (T = 0).
            attention_mask: over the whole sequence, queries first: (B, Nq + T), nonzero where a position may
                be read, or (B, Nq + T, Nq + T), nonzero where a row's position (dim 1) may read another (dim
                2). None lets everything read everything. Each position must be allowed to read at least one.

        Returns:
            (B, Nq + T, D) hidden states before the projection, queries first.

        Raises:
            SubjectError: the text is longer than the Q-Former's positions.
            ModelError: the mask does not fit the sequence.
        """
        queries = self.query_tokens.expand(len(image_features), -1, -1)
        hidden = self.embeddings(queries, input_ids)  # (B, Nq + T, D)
        mask = None if attention_mask is None else _per_head(attention_mask, *hidden.shape[:2])
        image_features = image_features.to(hidden.dtype)
        for layer in self.encoder.layer:
            hidden = layer(hidden, image_features, mask, queries.shape[1])
        return hidden


def _per_head(mask: Tensor, rows: int, length: int) -> Tensor:
    if tuple(mask.shape) not in {(rows, length), (rows, length, length)}:
        raise ModelError(
            f"attention_mask has shape {tuple(mask.shape)}; for {rows} rows of {length} positions (queries "
            f"first, then text) expected ({rows}, {length}) or ({rows}, {length}, {length})."
        )
    mask = mask.bool()
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


class _Embeddings(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        # Not read here; written because the official loader leaves a missing buffer uninitialised.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, queries: Tensor, input_ids: Tensor | None) -> Tensor:
        hidden = queries
        if input_ids is not None:
            length, positions = input_ids.shape[1], self.position_embeddings.num_embeddings
            if length > positions:
                raise SubjectError(
                    f"the subject's text has {length} word pieces; this Q-Former has {positions} positions. "
                    "Name the category in a few words."
                )
            at = torch.arange(length, device=input_ids.device)
            text = self.word_embeddings(input_ids) + self.position_embeddings(at)
            hidden = torch.cat([queries, text], dim=1)
        return self.dropout(self.LayerNorm(hidden))


class _Layer(nn.Module):
    """One layer; queries and text share self-attention and have their own feed-forward parts."""

    def __init__(self, config: QFormerConfig, image_width: int, reads_image: bool) -> None:
        super().__init__()
        self.attention = _Attention(config, config.hidden_size)
        self.crossattention = _Attention(config, image_width) if reads_image else None
        self.intermediate, self.intermediate_query = _Intermediate(config), _Intermediate(config)
        self.output, self.output_query = (_Output(config, config.intermediate_size) for _ in range(2))

    def forward(self, hidden: Tensor, image_features: Tensor, mask: Tensor | None, num_queries: int) -> Tensor:
        hidden = self.attention(hidden, hidden, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.crossattention is not None:
            queries = self.crossattention(queries, image_features)
        queries = self.output_query(self.intermediate_query(queries), queries)
        text = self.output(self.intermediate(text), text)
        return torch.cat([queries, text], dim=1)


class _Attention(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.attention = nn.Module()
        self.attention.query = nn.Linear(width, width)
        self.attention.key = nn.Linear(source_width, width)
        self.attention.value = nn.Linear(source_width, width)
        self.output = _Output(config, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = self.attention
        dropout = self.dropout if self.training else 0.0
        mixed = attend(maps.query(x), maps.key(source), maps.value(source), self.heads, mask=mask, dropout=dropout)
        return self.output(mixed, x)


class _Intermediate(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class _Output(nn.Module):
    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _Projection(nn.Module):
    """Norm, two linear layers, residual; the residual has a linear map where the widths differ."""

    def __init__(self, width: int, output_width: int, dropout: float) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, 4 * width)
        self.dense2 = nn.Linear(4 * width, output_width)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.residual = nn.Identity() if width == output_width else nn.Linear(width, output_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.dense2(quick_gelu(self.dense1(self.LayerNorm(x))))
        return self.dropout(projected) + self.residual(x)
