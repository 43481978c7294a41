"""Configurations of the networks: typed views of the `config.json` files of the public checkpoints.

Only the keys that change a network are fields, with the defaults of transformers' `CLIPTextConfig` and
`Blip2Config` (transformers leaves keys with default values out of its files). Everything else in a file is
kept in `stored` and written back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from p2p_subject.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

__all__ = ["Blip2QFormerConfig", "ContextCLIPTextConfig", "QFormerConfig", "VisionConfig"]


@dataclass(frozen=True)
class _FileConfig:
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the known keys of `values`; the others are kept for `to_dict`."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name != "stored" and f.name in values}
        return cls(**known, stored=dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file this came from, with the fields that differ from it on top."""
        known = {f.name: (f.default, getattr(self, f.name)) for f in fields(self) if f.name != "stored"}
        changed = {name: now for name, (default, now) in known.items() if self.stored.get(name, default) != now}
        return {**self.stored, **changed}

    def _require_heads(self, width: int, heads: int) -> None:
        if heads < 1 or width % heads:
            raise ModelError(
                f"{type(self).__name__}: hidden_size {width} cannot be divided among {heads} attention "
                "heads; choose num_attention_heads that divides hidden_size."
            )


@dataclass(frozen=True)
class ContextCLIPTextConfig(_FileConfig):
    """The text encoder; defaults are those of CLIP's text tower in transformers.

    Raises:
        ModelError: the heads do not divide the width.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        self._require_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class VisionConfig(_FileConfig):
    """The image encoder inside the Q-Former; defaults are those of `Blip2VisionConfig`.

    Raises:
        ModelError: the heads do not divide the width, or no patch fits the image.
    """

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        self._require_heads(self.hidden_size, self.num_attention_heads)
        if not 0 < self.patch_size <= self.image_size:
            raise ModelError(
                f"VisionConfig: patch_size {self.patch_size} does not fit image_size {self.image_size}; "
                "it must lie between 1 and image_size."
            )


@dataclass(frozen=True)
class QFormerConfig(_FileConfig):
    """The transformer of queries and text; defaults are those of transformers' `Blip2QFormerConfig`.

    `encoder_hidden_size` of the files is not read: as in the original it always is the width of the image
    encoder.

    Raises:
        ModelError: the heads do not divide the width, or `cross_attention_frequency` is below 1.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    cross_attention_frequency: int = 2

    def __post_init__(self) -> None:
        self._require_heads(self.hidden_size, self.num_attention_heads)
        if self.cross_attention_frequency < 1:
            raise ModelError(
                f"QFormerConfig: cross_attention_frequency is {self.cross_attention_frequency}; expected 1 "
                "(every layer reads the image) or more."
            )


@dataclass(frozen=True)
class Blip2QFormerConfig(_FileConfig):
    """The multimodal encoder of BLIP-Diffusion: image encoder, Q-Former and subject projection.

    `projection_size` is the width of the subject embeddings; None, as in the public checkpoint, means that of
    the Q-Former. `tokenizer` names the word pieces of the subject's category.
    """

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    qformer_config: QFormerConfig = field(default_factory=QFormerConfig)
    num_query_tokens: int = 32
    projection_size: int | None = None
    initializer_range: float = 0.02
    tokenizer: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the nested file of the public checkpoint; unknown keys are kept for `to_dict`."""
        parts = {
            "vision_config": VisionConfig.from_dict(values.get("vision_config") or {}),
            "qformer_config": QFormerConfig.from_dict(values.get("qformer_config") or {}),
        }
        plain = {f.name: values[f.name] for f in fields(cls) if f.name in values and f.name not in parts}
        return cls(**parts, **plain, stored=dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file this came from, with the fields that differ from it on top."""
        parts = {
            "vision_config": self.vision_config.to_dict(),
            "qformer_config": self.qformer_config.to_dict(),
        }
        return {**super().to_dict(), **parts}

    @property
    def output_size(self) -> int:
        """Width of the subject embeddings."""
        return self.projection_size or self.qformer_config.hidden_size
