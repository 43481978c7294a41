"""ControlNets (Zhang, Rao, Agrawala; ICCV 2023): from a name to the network, and what it adds to a call of a U-Net."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from p2p_subject.blip_diffusion.loading import LoadOptions, load_diffusers_model
from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.errors import ImageError, ModelError
from p2p_subject.structure import EDGES

_DOWNLOADED = ["config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors"]


def edges_folder() -> Path:
    """Folder of the ControlNet that comes with the library."""
    return Path(str(files("p2p_subject"))) / "data" / EDGES


def load_controlnet(name: Any, dtype: torch.dtype | None = None, **download: Any) -> ControlNetModel:
    """Load a ControlNet on the CPU, from safetensors only.

    `name`: "edges" for the miniature's own, a folder with the network's `config.json`, a hub name such as
    "lllyasviel/sd-controlnet-scribble", or a network, which is returned as it is. `download`: options of
    `huggingface_hub.snapshot_download`, such as `local_files_only`.

    Raises:
        ModelError: there is none of that name, its files are not those of a ControlNet, or a weight is missing or misshapen.
    """
    if not isinstance(name, str | Path):
        return name
    folder = edges_folder() if name == EDGES else Path(name)
    if name == EDGES and not (folder / "config.json").is_file():
        raise ModelError(
            f"controlnet={name!r}: this installation lacks the miniature's ControlNet ({folder}); reinstall it, or name "
            f"another. A folder of yours that has this name is './{name}'"
        )
    if not folder.is_dir():
        folder = _downloaded(str(name), download)
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise ModelError(
            f"controlnet={str(name)!r}: {folder / 'config.json'} is that of a {config.get('_class_name')!r}; expected "
            "'ControlNetModel'. Pass the folder of the ControlNet itself, such as the folder controlnet of a whole pipeline"
        )
    return load_diffusers_model(ControlNetModel, folder, LoadOptions(dtype)).eval()


def _downloaded(name: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED, **options))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"controlnet={name!r} is no folder and cannot be downloaded ({type(error).__name__}: {error}). Pass a folder, a "
            f"hub name such as 'lllyasviel/sd-controlnet-canny', or {EDGES!r} for the miniature"
        ) from error


def residuals(
    controlnet: ControlNetModel,
    latents: Tensor,
    timesteps: Tensor,
    contexts: Tensor,
    pictures: Tensor,
    strength: float | Tensor,
    **added: Any,
) -> dict[str, Any]:
    """What a ControlNet adds to the U-Net's call on the same R rows, as arguments of that call.

    `latents` (R, C, h, w) in the U-Net's dtype, `timesteps` () or (R,), `contexts` (R, L, D), `pictures` (R, 3, H, W) in
    [0, 1] at the size of the decoded latents; `strength`, a number or (R,), multiplies all that is added. `added` are further
    arguments of both networks. Each network works in its own precision. Raises `ImageError` for pictures of another size.
    """
    halvings = len(controlnet.config.conditioning_embedding_out_channels) - 1
    wanted = tuple(side << halvings for side in latents.shape[-2:])
    if pictures.shape[-2:] != wanted:
        (height, width), (down, across) = pictures.shape[-2:], latents.shape[-2:]
        raise ImageError(
            f"the control picture is {width}x{height} pixels; for latents of {across}x{down} expected {wanted[1]}x{wanted[0]}"
        )
    dtype = next(controlnet.parameters()).dtype
    if isinstance(strength, Tensor):
        strength = strength.to(dtype)[:, None, None, None]
    down, middle = controlnet(
        latents.to(dtype),
        timesteps,
        encoder_hidden_states=contexts.to(dtype),
        controlnet_cond=pictures.to(dtype),
        conditioning_scale=strength,
        return_dict=False,
        **added,
    )
    return {
        "down_block_additional_residuals": tuple(own.to(latents.dtype) for own in down),
        "mid_block_additional_residual": middle.to(latents.dtype),
    }
