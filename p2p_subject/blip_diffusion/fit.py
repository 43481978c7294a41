"""Whether the components of a pipeline belong together: sizes that must agree are compared at the start."""

from __future__ import annotations

from typing import Any

from p2p_subject.errors import ModelError

__all__ = ["require_fit"]

_CURE = "Take all of them from one checkpoint, or build them with matching sizes."


def require_fit(
    *,
    tokenizer: Any,
    text_encoder: Any,
    unet: Any,
    vae: Any,
    qformer: Any,
    qformer_tokenizer: Any,
    image_processor: Any,
    ctx_begin_pos: int,
) -> None:
    """Compare the components' sizes.

    Raises:
        ModelError: two of them disagree; the message names both numbers.
    """
    text, vision = text_encoder.config, qformer.config.vision_config
    words = qformer.config.qformer_config.vocab_size
    _equal(
        "the text encoder's width",
        text.hidden_size,
        "the subject embeddings' width",
        qformer.config.output_size,
    )
    _equal(
        "the text encoder's width",
        text.hidden_size,
        "the U-Net's context width",
        unet.config.cross_attention_dim,
    )
    _equal(
        "the VAE's latent channels",
        vae.config.latent_channels,
        "the U-Net's channels",
        unet.config.in_channels,
    )
    side = (vision.image_size, vision.image_size)
    _equal("the image processor's size", image_processor.output_size, "the image encoder's", side)
    _at_most("the prompt tokenizer's words", len(tokenizer), "the text encoder's", text.vocab_size)
    _at_most("the Q-Former tokenizer's words", len(qformer_tokenizer), "the Q-Former's", words)
    # The start token, what stands before the subject, and the end token share the window with it.
    needed = max(ctx_begin_pos, 1) + qformer.config.num_query_tokens + 1
    _at_most("the positions a subject needs", needed, "the text encoder's", text.max_position_embeddings)


def _equal(left: str, a: Any, right: str, b: Any) -> None:
    if a != b:
        raise ModelError(f"{left} is {a}, {right} is {b}: these components do not belong together. {_CURE}")


def _at_most(left: str, a: int, right: str, b: int) -> None:
    if a > b:
        raise ModelError(
            f"{left} number {a}, {right} only {b}: these components do not belong together. {_CURE}"
        )
