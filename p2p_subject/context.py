"""What a U-Net is conditioned on, as one value whatever the model: rows of token contexts, and what XL adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# Compared by identity: tensors have no single truth value to compare by.
@dataclass(frozen=True, eq=False)
class Context:
    """Conditioning of B rows.

    `tokens` (B, L, D): the text encoder's output, one column per token. `pooled` (B, P), Stable Diffusion XL only: the pooled
    text embedding of its second encoder.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def expand(self, rows: int) -> Context:
        """The one row of this context as `rows` equal ones."""
        pooled = None if self.pooled is None else self.pooled.expand(rows, -1)
        return Context(self.tokens.expand(rows, -1, -1), pooled)

    def with_tokens(self, tokens: Tensor, pooled: Tensor | None = None) -> Context:
        """The same context with other token embeddings (B, L, D), such as optimised ones, and pooled text (B, P) if given."""
        return Context(tokens.to(self.tokens), self.pooled if pooled is None else pooled.to(self.tokens))


def stack(contexts: Sequence[Context]) -> Context:
    """The rows of several contexts, in order."""
    pooled = [context.pooled for context in contexts]
    return Context(
        torch.cat([context.tokens for context in contexts]),
        None if any(p is None for p in pooled) else torch.cat(pooled),
    )
