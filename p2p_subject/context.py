"""What a U-Net is conditioned on, as one value whatever the model: rows of token contexts, what XL adds to them, structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


# Compared by identity: tensors have no single truth value to compare by.
@dataclass(frozen=True, eq=False)
class Context:
    """Conditioning of B rows.

    `tokens` (B, L, D): the text encoder's output, one column per token. `pooled` (B, P), Stable Diffusion XL only: the pooled
    text embedding of its second encoder. `structure` (B, 3, H, W) in [0, 1] and `strength` (B,), where a ControlNet runs: its
    control pictures, at the size of the pictures that are made, and the factor of what it adds.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    structure: Tensor | None = None
    strength: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def expand(self, rows: int) -> Context:
        """The one row of this context as `rows` equal ones."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return Context(**{name: own if own is None else own.expand(rows, *own.shape[1:]) for name, own in parts.items()})

    def with_tokens(self, tokens: Tensor, pooled: Tensor | None = None) -> Context:
        """The same context with other token embeddings (B, L, D), such as optimised ones, and pooled text (B, P) if given."""
        return replace(self, tokens=tokens.to(self.tokens), pooled=self.pooled if pooled is None else pooled.to(self.tokens))

    def with_structure(self, structure: Tensor, strength: float) -> Context:
        """The same context under a control picture (1, 3, H, W) in [0, 1]."""
        rows, device = len(self), self.tokens.device
        pictures = structure.to(device).expand(rows, *structure.shape[1:])
        return replace(self, structure=pictures, strength=torch.full((rows,), strength, device=device))


def stack(contexts: Sequence[Context]) -> Context:
    """The rows of several contexts, in order; all have the same parts."""
    parts = {part.name: [getattr(context, part.name) for context in contexts] for part in fields(Context)}
    return Context(**{name: None if all(part is None for part in own) else torch.cat(own) for name, own in parts.items()})
