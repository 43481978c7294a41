"""From a folder or a hub name to the components of a pipeline, or to an error that says what is wrong.

Only JSON, safetensors and tokenizer files are opened: nothing is unpickled and no code of a model repository
is run. The network classes are fixed; a `model_index.json` cannot name others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, SchedulerMixin, UNet2DConditionModel

from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.blip_diffusion.weights import read_json, require_safetensors, weights_error
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer, load_word_pieces
from p2p_subject.errors import ModelError

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import BertTokenizer

__all__ = [
    "OWN_LIBRARY",
    "TOKENIZER_FOLDER",
    "LoadOptions",
    "load_component",
    "load_diffusers_model",
    "model_folder",
]

TOKENIZER_FOLDER = "qformer_tokenizer"
# Components whose classes `model_index.json` files of the public checkpoint ascribe to "blip_diffusion".
OWN_LIBRARY = frozenset({"text_encoder", "qformer", "image_processor"})
_FILES = {
    "tokenizer": "tokenizer_config.json",
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
    "qformer": "config.json",
    "image_processor": "preprocessor_config.json",
    "controlnet": "config.json",
}
_STEMS = ("model", "diffusion_pytorch_model")
_DEFAULT_WORD_PIECES = "bert-base-uncased"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LoadOptions:
    """How components are read: float type, file variant such as "fp16", memory use, and the word pieces."""

    torch_dtype: torch.dtype | None = None
    variant: str | None = None
    low_cpu_mem_usage: bool | None = None
    local_files_only: bool = False
    qformer_tokenizer: str | Path | BertTokenizer | None = None


def model_folder(name: str | Path, needed: list[str], variant: str | None, **download: Any) -> Path:
    """Return the local folder of a model and check that it has the folders of the `needed` components.

    Args:
        name: a folder, or "owner/name" on the Hugging Face hub.
        needed: names of components.
        variant: such as "fp16": only these weights are downloaded.
        download: `revision`, `token`, `cache_dir`, `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        ModelError: there is no such folder or name, or it is not a complete model.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not _HUB_NAME.fullmatch(str(name)):
            raise ModelError(
                f"{str(name)!r} is no folder and no hub name; pass the folder of a saved "
                'model or a name such as "Salesforce/blipdiffusion".'
            )
        folder = _download(str(name), variant, download)
    expected = ["model_index.json", *(f"{part}/{_FILES.get(part, 'config.json')}" for part in needed)]
    missing = [path for path in expected if not (folder / path).is_file()]
    if missing:
        raise ModelError(
            f"{folder} is not a complete model: {', '.join(missing)} missing. Expected "
            f"{', '.join(expected)}. Pass the folder that holds model_index.json, or download the model again."
        )
    return folder


def _download(name: str, variant: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    infix = f".{variant}" if variant else ""
    weights = [f"*/{stem}{infix}{end}" for stem in _STEMS for end in (".safetensors", "-?????-of-?????.safetensors")]
    # Sharded files carry the variant before or after the number, depending on the release that wrote them.
    shards = [f"*/{stem}-?????-of-?????{infix}.safetensors" for stem in _STEMS]
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*/*.json", "*/*.txt", *weights, *shards], **options))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is no local folder and cannot be downloaded ({type(error).__name__}: {error}). Check "
            "the name and the connection, or pass the folder of a downloaded model."
        ) from error


def load_component(name: str, folder: Path, options: LoadOptions) -> Any:
    """Load one component, by its name in `model_index.json`, from a model's folder.

    Raises:
        ModelError: a file is missing or damaged, or a weight is missing, misshapen or unknown.
    """
    part = folder / name
    if name == "text_encoder":
        return ContextCLIPTextModel.from_pretrained(part, torch_dtype=options.torch_dtype, variant=options.variant)
    if name == "qformer":
        return Blip2QFormerModel.from_pretrained(part, torch_dtype=options.torch_dtype, variant=options.variant)
    if name == "unet":
        return load_diffusers_model(UNet2DConditionModel, part, options)
    if name == "vae":
        return load_diffusers_model(AutoencoderKL, part, options)
    if name == "controlnet":
        return load_diffusers_model(ControlNetModel, part, options)
    if name == "scheduler":
        return _load_scheduler(part)
    if name == "tokenizer":
        return load_prompt_tokenizer(part)
    if name == "image_processor":
        return BlipImageProcessor.from_pretrained(part)
    if name == "qformer_tokenizer":
        return _load_qformer_tokenizer(folder, options)
    raise ModelError(f"{name!r} is no component of BLIP-Diffusion; expected one of {', '.join(_FILES)}.")


def load_diffusers_model(cls: type[ModelMixin], folder: Path, options: LoadOptions) -> ModelMixin:
    """Load a network of diffusers, which itself only warns about weights that are missing or unknown.

    Raises:
        ModelError: as `load_component`.
    """
    path = require_safetensors(folder, "diffusion_pytorch_model", options.variant)
    arguments = {name: getattr(options, name) for name in ("torch_dtype", "variant", "low_cpu_mem_usage")}
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        network, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **given
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder.name} cannot be loaded from {path}: {error} Use the config.json the weights were saved "
            "with, or download both again."
        ) from error
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        raise weights_error(folder.name, path, missing=missing, unexpected=unexpected)
    return network


def _load_scheduler(folder: Path) -> SchedulerMixin:
    path = folder / "scheduler_config.json"
    name = read_json(path).get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        raise ModelError(
            f"{path} names the scheduler {name!r}; expected a scheduler of diffusers "
            f"{diffusers.__version__}, such as PNDMScheduler. Correct the name or pass scheduler=."
        )
    return cls.from_pretrained(folder)


def _load_qformer_tokenizer(folder: Path, options: LoadOptions) -> BertTokenizer:
    given = options.qformer_tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is None and (folder / TOKENIZER_FOLDER).is_dir():
        given = folder / TOKENIZER_FOLDER
    if given is None:
        given = read_json(folder / "qformer" / "config.json").get("tokenizer") or _DEFAULT_WORD_PIECES
    return load_word_pieces(given, local_files_only=options.local_files_only)
