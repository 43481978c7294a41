"""Building blocks that the text encoder, the image encoder and the Q-Former share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2p_subject.errors import ModelError

__all__ = ["Mlp", "PreNormLayer", "activation", "attend", "initialise"]


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that a configuration's `hidden_act` names.

    Raises:
        ModelError: the name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise ModelError(f"hidden_act {name!r} is not known; the config may name one of {sorted(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention of `query` (B, Lq, D) on `key` and `value` (B, Lk, D); returns (B, Lq, D).

    `mask` is boolean, broadcastable to (B, heads, Lq, Lk), True where a position may be read.
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation(hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class PreNormLayer(nn.Module):
    """A layer of CLIP: attention and MLP, each on the normalised input and added to it; (B, L, D)."""

    def __init__(self, attention: nn.Module, width: int, hidden: int, hidden_act: str, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def initialise(network: nn.Module, std: float) -> None:
    """Fill a network for training from scratch: normal weights, zero biases, unit norms."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
