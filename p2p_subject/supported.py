"""What a pipeline must be for its attention to be edited; anything else is refused by name, before a network runs."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPTokenizerFast

from p2p_subject.attention import require_plain
from p2p_subject.blip_diffusion.fit import require_controlnet
from p2p_subject.errors import HookError, ModelError

PIPELINES = ("BlipDiffusionPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
CONTROLLED = {
    "BlipDiffusionPipeline": "BlipDiffusionControlNetPipeline",
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
}
"""The same kinds with a ControlNet beside the U-Net."""
TIME_IDS = 6
"""Numbers that Stable Diffusion XL is told of a picture's size: original height and width, crop, target height and width."""
_INSTEAD = "Load a text-to-image model without it, such as the one that this was made from."
_UNTOLD = {
    "time_cond_proj_dim": "the guidance scale as an input, as latent consistency models do",
    "encoder_hid_dim_type": "another text encoder's width",
    "class_embed_type": "a class label",
    "num_class_embeds": "a class label",
}


def bare(network: Any) -> Any:
    """The network inside of what `torch.compile` returns, or the network itself."""
    return getattr(network, "_orig_mod", network)


def unsupported(found: object, where: str) -> ModelError:
    """The refusal of a pipeline class."""
    return ModelError(
        f"{where}: {found} given; expected {', '.join(PIPELINES[:-1])} (1.x and 2.x) or {PIPELINES[-1]}, or "
        "one of these with a ControlNet. Pass a text-to-image model of these families, such as the one that this was made "
        "from; for one of the same parts, such as image to image, wrap what StableDiffusionPipeline.from_pipe(pipeline), or "
        "that of XL, returns."
    )


def require_editable(pipeline: DiffusionPipeline, addition: str | None = None) -> None:
    """Check the networks of a pipeline and what is loaded on them.

    `addition` is what its U-Net is told beside timestep and text: None, or "text_time" for Stable Diffusion XL.

    Raises:
        HookError: adapters are loaded that attention control would drop.
        ModelError: a network is of another kind, or is told what this library does not tell it.
    """
    _require_class("unet", pipeline.unet, UNet2DConditionModel)
    _require_class("vae", pipeline.vae, AutoencoderKL)
    _require_conditioning(bare(pipeline.unet), addition)
    _require_latents(bare(pipeline.unet), bare(pipeline.vae))
    if getattr(pipeline, "controlnet", None) is not None:
        require_controlnet(pipeline.controlnet, bare(pipeline.unet), bare(pipeline.vae))
    require_plain(pipeline.unet)


def _require_conditioning(unet: UNet2DConditionModel, addition: str | None) -> None:
    config = unet.config
    # IP-Adapters also change the configuration; what the user can undo is named first.
    if type(unet.encoder_hid_proj).__name__ == "MultiIPAdapterImageProjection":
        raise HookError("an IP-Adapter is loaded, which attention control would drop. Call pipeline.unload_ip_adapter().")
    for key, meaning in _UNTOLD.items():
        if config.get(key) is not None:
            raise ModelError(f"the U-Net has {key}={config[key]!r}: it takes {meaning}, which it is not given here. {_INSTEAD}")
    if config.addition_embed_type != addition:
        raise ModelError(
            f"the U-Net has addition_embed_type={config.addition_embed_type!r}; this kind of pipeline gives it {addition!r}. "
            f"{_INSTEAD}"
        )
    if config.get("attention_type", "default") != "default":
        raise ModelError(f"the U-Net has attention_type={config.attention_type!r} (GLIGEN); expected 'default'. {_INSTEAD}")


def _require_latents(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    channels = vae.config.latent_channels
    if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
        raise ModelError(
            f"the U-Net takes {unet.config.in_channels} channels and returns {unet.config.out_channels}; expected the VAE's "
            f"{channels}. Inpainting models (9), pix2pix models (8) and upscalers (7) take a picture as well, which is "
            f"not given here. {_INSTEAD}"
        )
    if unet.config.sample_size is None:
        raise ModelError("unet/config.json states no sample_size, the latent's side; write it there, 64 for Stable Diffusion 1")
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise ModelError(f"the VAE normalises its latents by a mean for each channel, which is not supported. {_INSTEAD}")


def require_text(pipeline: DiffusionPipeline, encoders: tuple[tuple[str, str], ...]) -> None:
    """Check the text encoders of Stable Diffusion, named as (tokenizer, encoder), the one with pooled embeddings last.

    Raises:
        ModelError: one is missing or of another kind, or their sizes do not fit the U-Net's.
    """
    for tokenizer, encoder in encoders:
        _require_class(tokenizer, getattr(pipeline, tokenizer), CLIPTokenizer, CLIPTokenizerFast)
        pooled = encoder == "text_encoder_2"
        kinds = (CLIPTextModelWithProjection,) if pooled else (CLIPTextModel, CLIPTextModelWithProjection)
        _require_class(encoder, getattr(pipeline, encoder), *kinds)
    configs = [getattr(pipeline, encoder).config for _, encoder in encoders]
    unet, names = bare(pipeline.unet), " and ".join(encoder for _, encoder in encoders)
    # Of some encoders padding is hidden from the text, which the one call for all kinds does not do.
    if any(getattr(config, "use_attention_mask", False) for config in configs):
        raise ModelError(f"{names}: use_attention_mask=True is not supported; expected CLIP as Stable Diffusion has it")
    windows = {config.max_position_embeddings for config in configs}
    if len(windows) > 1:
        raise ModelError(f"{names} read {sorted(windows)} tokens; expected one length. Put back the published encoders.")
    width, wanted = sum(config.hidden_size for config in configs), unet.config.cross_attention_dim
    if isinstance(wanted, int) and width != wanted:
        raise ModelError(f"{names} are {width} wide, the U-Net takes {wanted}. Put back the published encoders.")
    if unet.config.addition_embed_type == "text_time":
        taken = unet.add_embedding.linear_1.in_features - configs[-1].projection_dim
        if taken != TIME_IDS * unet.config.addition_time_embed_dim:
            raise ModelError(
                f"the U-Net takes {taken / unet.config.addition_time_embed_dim:g} numbers on the picture's size; expected "
                f"{TIME_IDS}. A refiner takes 5, one of them an aesthetics score: load the base model."
            )


def _require_class(name: str, found: Any, *expected: type) -> None:
    found = bare(found)
    if isinstance(found, expected):
        return
    given = "nothing" if found is None else type(found).__name__
    kinds = " or ".join(dict.fromkeys(kind.__name__ for kind in expected))
    raise ModelError(f"{name}: {given} given; expected {kinds}. Put back the part that the model was published with.")
