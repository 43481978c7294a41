"""The U-Net that is trained, a copy of the model's whole or with low-rank additions, and its weights as a file has them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from p2p_subject.errors import ArgumentError, ModelError
from p2p_subject.models import Model
from p2p_subject.supported import bare

ADAPTER = "subject"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that get low-rank additions: the projections of every attention (Hu et al. 2021, section 4.2)."""
PREFIX = "unet."
"""Before the names of LoRA weights in a file, as diffusers and others write and read them."""


def require_peft(what: str) -> None:
    """Raise `ArgumentError` where peft, which LoRA needs, is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ArgumentError(f"{what} needs peft, which is not installed: pip install 'p2p_subject[finetune]'")


def require_trainable(model: Model) -> None:
    """Raise `ModelError` for a U-Net that cannot be copied as it is: with adapters, or offloaded."""
    unet = bare(model.unet)
    if getattr(unet, "peft_config", None):
        raise ModelError(
            f"the U-Net of {model.name} carries the adapter {', '.join(unet.peft_config)!r}; fine-tuning begins with a plain "
            "model: the one that it was made from, or one that was fine-tuned with method='full'"
        )
    if any(hasattr(module, "_hf_hook") for module in unet.modules()) or any(w.is_meta for w in unet.parameters()):
        raise ModelError(f"the U-Net of {model.name} is offloaded; fine-tuning needs it on one device: pipeline.to('cuda')")


def copy_of(model: Model, *, share: bool) -> UNet2DConditionModel:
    """A U-Net like the model's, without gradients. With `share` it is made of the same memory, which nothing may change in
    place: both take no more than one; without, it is a copy of its own."""
    with model.frozen():  # Waits for a job of another thread, whose attention processors would be copied too.
        unet = bare(model.unet)
        known = {}
        if share:
            weights = ((w, nn.Parameter(w.detach(), requires_grad=False)) for w in unet.parameters())
            known = {id(own): other for own, other in weights} | {id(buffer): buffer for buffer in unet.buffers()}
        return copy.deepcopy(unet, known).requires_grad_(False).eval()


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, seed: int = 0) -> dict[str, nn.Parameter]:
    """Put low-rank additions, of no effect yet, on the attention of a U-Net; returns their weights, float32, by name."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(config, ADAPTER)
    # Weights that are trained in half precision would lose most of their small steps.
    convert(trained_weights(unet).values(), torch.float32)
    return trained_weights(unet)


def unlock(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Make every weight of a U-Net one that is trained, in float32; returns them by name."""
    convert([*unet.parameters(), *unet.buffers()], torch.float32)
    return trained_weights(unet.requires_grad_(True))


def convert(tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Bring weights and buffers to a float type where they are."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def trained_weights(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def lora_of(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The weights of the low-rank additions as a file has them."""
    from peft import get_peft_model_state_dict

    return {PREFIX + name: weight for name, weight in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}


def put_lora(unet: UNet2DConditionModel, weights: dict[str, Tensor]) -> None:
    """Fill in low-rank additions from what `lora_of` gave; names and shapes must have been checked."""
    from peft import set_peft_model_state_dict

    given = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    set_peft_model_state_dict(unet, given, adapter_name=ADAPTER)
