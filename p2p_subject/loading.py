"""From a name to a pipeline whose every weight was read, or to an error that says what is wrong.

Which pipelines and networks there are is fixed here: a `model_index.json` chooses among them and cannot name others, nothing
is unpickled, and no code of a model repository is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from p2p_subject.blip_diffusion import BlipDiffusionControlNetPipeline, BlipDiffusionPipeline
from p2p_subject.blip_diffusion.loading import LoadOptions, load_component, model_folder
from p2p_subject.blip_diffusion.weights import read_json, require_safetensors, weights_error
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer
from p2p_subject.controlnets import load_controlnet
from p2p_subject.errors import ModelError, did_you_mean
from p2p_subject.supported import CONTROLLED, PIPELINES, unsupported

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
FILE_OPTIONS = (*HUB_OPTIONS, "variant", "low_cpu_mem_usage", "use_safetensors")
_NOT_NEEDED = ["safety_checker/*", "image_encoder/*", "vae_1_0/*"]
_PARTS = {
    "scheduler": (),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
}
_XL_PARTS = _PARTS | {"tokenizer_2": _PARTS["tokenizer"], "text_encoder_2": ("CLIPTextModelWithProjection",)}
_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
# Settings of a pipeline that its index holds beside the parts, and what is never used here.
_SETTINGS = ("force_zeros_for_empty_prompt",)
_UNUSED = {
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
_CONTROLNET = {"controlnet": ("ControlNetModel",)}


def miniature_folder() -> Path:
    """Folder of the model that comes with the library."""
    return Path(str(files("p2p_subject"))) / "data" / "miniature"


def find_model(name: str | Path | None, options: dict[str, Any]) -> Path:
    """The local folder of a model: the miniature (None), a folder, or a hub name that is downloaded.

    Raises `ModelError` when there is none, or its pipeline is of no supported class; then nothing large is downloaded.
    """
    folder = miniature_folder() if name is None else Path(name)
    if name is None and not folder.is_dir():
        raise ModelError("this installation lacks the miniature (p2p_subject/data); reinstall it, or name a model")
    if not folder.is_dir():
        folder = _download(name, options)
    _read_index(folder / "model_index.json")
    return folder


def _read_index(path: Path) -> dict[str, Any]:
    """Read a `model_index.json`; `ModelError` if it names a pipeline class that is not supported."""
    index = read_json(path)
    if index.get("_class_name") not in (*PIPELINES, *CONTROLLED.values()):
        raise unsupported(index.get("_class_name"), str(path.parent))
    return index


def _download(name: str | Path, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    try:
        index = hf_hub_download(str(name), "model_index.json", **hub)
    except (OSError, ValueError):
        index = None  # The download of the whole model says what is wrong.
    if index is not None:
        _read_index(Path(index))
    return model_folder(name, [], options.get("variant"), ignore_patterns=_NOT_NEEDED, **hub)


def load_pipeline(folder: Path, dtype: torch.dtype, **options: Any) -> DiffusionPipeline:
    """Load the pipeline of a folder on the CPU.

    `options` are those of `BlipDiffusionPipeline.from_pretrained`: hub options, `variant`, and parts to use in place of the
    folder's, such as `vae=`. `controlnet=`, a network or what `load_controlnet` takes, stands beside the U-Net.

    Raises:
        ModelError: an option is unknown; a file is missing, damaged or pickled; a weight is missing or misshapen.
    """
    index = _read_index(folder / "model_index.json")
    plain = next((own for own, controlled in CONTROLLED.items() if controlled == index["_class_name"]), index["_class_name"])
    if options.get("controlnet") is not None:
        download = {name: options[name] for name in ("cache_dir", "token", "local_files_only") if name in options}
        options["controlnet"] = load_controlnet(options["controlnet"], dtype, **download)
    else:
        options.pop("controlnet", None)
    controlled = "controlnet" in options or plain != index["_class_name"]
    kind = CONTROLLED[plain] if controlled else plain
    if plain == "BlipDiffusionPipeline":
        cls = BlipDiffusionControlNetPipeline if controlled else BlipDiffusionPipeline
        return cls.from_pretrained(folder, torch_dtype=dtype, **options)
    parts = (_XL_PARTS if plain == "StableDiffusionXLPipeline" else _PARTS) | (_CONTROLNET if controlled else {})
    _require_options(kind, parts, options)
    given = {name: part for name, part in options.items() if name in parts}
    needed = [name for name in parts if name not in given]
    for name in needed:
        _require_class(name, index.get(name), parts[name], folder)
    how = LoadOptions(dtype, options.get("variant"), options.get("low_cpu_mem_usage"))
    loaded = {name: _load_part(name, folder, how) for name in needed}
    settings = {name: index[name] for name in _SETTINGS if name in index}
    return getattr(diffusers, kind)(**loaded, **given, **settings, **_UNUSED[plain])


def _require_options(kind: str, parts: Iterable[str], options: dict[str, Any]) -> None:
    known = [*parts, *FILE_OPTIONS]
    for option in options.keys() - set(known):
        raise ModelError(
            f"loading a {kind} takes no {option!r}.{did_you_mean(option, [*known, 'dtype'])} Parts that can be replaced: "
            f"{', '.join(parts)}."
        )
    if options.get("use_safetensors") is False:
        raise ModelError("use_safetensors=False asks for pickled weights, which are never loaded; leave it out.")


def _require_class(name: str, entry: Any, expected: tuple[str, ...], folder: Path) -> None:
    """Check the [library, class] of a part in the index."""
    found = entry[-1] if isinstance(entry, list) and entry else None
    if found is None or (expected and found not in expected):
        raise ModelError(
            f"{folder / 'model_index.json'} names {name} {found!r}; expected "
            f"{' or '.join(expected) or 'a scheduler of diffusers'}. Take the folder of a complete model, or pass {name}=."
        )


def _load_part(name: str, folder: Path, options: LoadOptions) -> Any:
    if name in _ENCODERS:
        return load_encoder(_ENCODERS[name], folder / name, options)
    if name == "tokenizer_2":
        return load_prompt_tokenizer(folder / name)
    return load_component(name, folder, options)


def load_encoder(cls: type[CLIPTextModel], folder: Path, options: LoadOptions) -> CLIPTextModel:
    """Load a text encoder of transformers, whichever release wrote it. Raises `ModelError`."""
    path = require_safetensors(folder, "model", options.variant)
    try:
        encoder, report = cls.from_pretrained(
            folder, variant=options.variant, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        missing = report["missing_keys"]
        if missing and path.suffix == ".safetensors":
            missing = _load_unprefixed(encoder, path)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder.name} cannot be loaded from {path}: {error} Use the config.json the weights were saved with, or download "
            "both again."
        ) from error
    # Further weights are no fault: files with more layers than the configuration uses are published on purpose.
    if missing or report["mismatched_keys"]:
        mismatched = [str(entry) for entry in report["mismatched_keys"]]
        raise weights_error(folder.name, path, missing, mismatched)
    # The releases of transformers disagree on the type that weights have unless they are told, and on how to tell them.
    return encoder.to(options.torch_dtype).eval()


def _load_unprefixed(encoder: CLIPTextModel, path: Path) -> list[str]:
    """Load weights that transformers 5 wrote, without the prefix that transformers 4 reads; the names still missing."""
    weights = load_file(path)
    kept = ("text_model.", "text_projection.")
    renamed = {name if name.startswith(kept) else f"text_model.{name}": weight for name, weight in weights.items()}
    return list(encoder.load_state_dict(renamed, strict=False).missing_keys)
