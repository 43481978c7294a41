"""Whether the components of a pipeline belong together: sizes that must agree are compared at the start."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel

from p2p_subject.errors import ModelError

__all__ = ["require_controlnet", "require_fit"]

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


_SHARED = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet and the U-Net that it was made for have in common: it is a copy of the U-Net's first half."""
_UNTOLD = {
    "class_embed_type": "a class label",
    "num_class_embeds": "a class label",
    "encoder_hid_dim_type": "another text encoder's width",
    "global_pool_conditions": "its text left out (guess mode)",
}


def require_controlnet(controlnet: Any, unet: Any, vae: Any) -> None:
    """Check that a ControlNet can be run beside a U-Net, whose latents are those of a VAE.

    Raises:
        ModelError: it is another network or several, is told what it is not told here, or was made for another U-Net or VAE.
    """
    network = getattr(controlnet, "_orig_mod", controlnet)  # of what torch.compile returns
    if not isinstance(network, ControlNetModel):
        given = "nothing" if network is None else type(network).__name__
        raise ModelError(f"controlnet: {given} given; expected one ControlNetModel of diffusers. Of several, pass one.")
    config = network.config
    for key, meaning in _UNTOLD.items():
        if config.get(key):
            raise ModelError(f"the ControlNet has {key}={config[key]!r}: it wants {meaning}, which is not there. Pass another.")
    if config.conditioning_channels != 3:
        raise ModelError(f"the ControlNet takes pictures of {config.conditioning_channels} channels; expected 3. Pass another.")
    for key in _SHARED:
        _equal(f"the ControlNet's {key}", _plain(config.get(key)), "the U-Net's", _plain(unet.config.get(key)))
    halved = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    _equal("the pixels a side of a ControlNet's cell", halved, "those of the VAE's latents", side)


def _plain(value: Any) -> Any:
    # From a file lists come, from code tuples.
    return tuple(value) if isinstance(value, list) else value


def _equal(left: str, a: Any, right: str, b: Any) -> None:
    if a != b:
        raise ModelError(f"{left} is {a}, {right} is {b}: these components do not belong together. {_CURE}")


def _at_most(left: str, a: int, right: str, b: int) -> None:
    if a > b:
        raise ModelError(f"{left} number {a}, {right} only {b}: these components do not belong together. {_CURE}")
