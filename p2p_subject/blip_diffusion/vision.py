"""The image encoder of the Q-Former: CLIP's ViT with every patch's output (BLIP-Diffusion, as BLIP-2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p2p_subject.blip_diffusion.config import VisionConfig
from p2p_subject.blip_diffusion.layers import PreNormLayer, attend
from p2p_subject.errors import ImageError

__all__ = ["Blip2VisionModel"]


class Blip2VisionModel(nn.Module):
    """Pictures to features of their patches; the first of the P features is the class token's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _PatchEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            PreNormLayer(
                _SelfAttention(config),
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalised pictures.

        Args:
            pixel_values: (B, 3, image_size, image_size) floats from `BlipImageProcessor`.

        Returns:
            (B, P, D) features after the last layer norm, P = 1 + number of patches, in the dtype of the
            weights.

        Raises:
            ImageError: the pictures have another size than the encoder's.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ImageError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this image encoder takes (B, 3, "
                f"{size}, {size}). "
                'Set the image processor\'s size to {"height": %d, "width": %d}.' % (size, size)
            )
        hidden = self.pre_layernorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        positions = 1 + (config.image_size // patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (B, P - 1, D)
        first = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class _SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.projection(attend(*self.qkv(x).chunk(3, dim=-1), self.heads, dropout=dropout))
