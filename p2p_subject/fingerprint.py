"""A short name for the weights that made some latents, so that others are not mistaken for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel

from p2p_subject.supported import bare

_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet")
_NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")


def fingerprint(pipeline: DiffusionPipeline, *, controlnet: bool = True) -> str:
    """Short hash of what makes latents: U-Net, VAE, text encoders, ControlNet, the adapters on them, and noise levels.

    `controlnet` False leaves the ControlNet out, for what does not depend on it.

    Of each weight, name, shape and up to 4,096 signs: no precision changes a sign, so the same weights have the same
    fingerprint in any of them, and training changes many.
    """
    digest = hashlib.sha256()
    for name in _NETWORKS:
        network = getattr(pipeline, name, None)
        if network is None or (name == "controlnet" and not controlnet):
            continue
        network = bare(network)
        for name, weight in _weights(network):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            if weight.is_floating_point():
                sample = weight.flatten()[:: max(1, weight.numel() // 4096)]
                digest.update(torch.signbit(sample).cpu().numpy().tobytes())
        digest.update("".join(_strengths(network)).encode())
    digest.update(repr([pipeline.scheduler.config.get(key) for key in _NOISE]).encode())
    return digest.hexdigest()[:16]


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, without the marks of `torch.compile` on parts, wherever offloading has put them."""
    stores = {}
    for path, module in network.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "weights_map", None) is not None:
                stores[path] = part.weights_map
    # Releases of transformers differ in whether the names of its text encoders begin with this.
    prefix = "text_model." if isinstance(network, PreTrainedModel) else ""
    for name, weight in network.state_dict().items():
        path, _, own = name.rpartition(".")
        stored = stores[path][own] if weight.is_meta and path in stores else weight
        yield name.replace("_orig_mod.", "").removeprefix(prefix), stored


def _strengths(network: nn.Module) -> Iterator[str]:
    """Which LoRA adapters act and how strongly: no weight tells."""
    for name, module in network.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            acting = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.scaling]
            strengths = {adapter: round(module.scaling[adapter], 6) for adapter in acting}
            yield f"{name.replace('_orig_mod.', '')}{strengths}"
