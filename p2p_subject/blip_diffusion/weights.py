"""Reading and writing the files of one network; nothing but JSON and safetensors is ever opened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2p_subject.errors import ModelError, OutputError
from p2p_subject.outputs import atomic_path

__all__ = [
    "check_weights",
    "read_json",
    "read_tensors",
    "require_safetensors",
    "weights_error",
    "write_tensors",
]

_PICKLED = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
_SHOWN = 8


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; a saved model has it. Check the folder or download it again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def require_safetensors(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Return the weight file of a component's folder (for sharded weights: their index).

    Args:
        folder: the component's folder.
        stem: file name without suffixes: "model" or "diffusion_pytorch_model".
        variant: such as "fp16", a part of the file name.

    Raises:
        ModelError: there is no such file; pickled weights beside it are named and refused.
    """
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    for path in (folder / name, folder / index):
        if path.is_file():
            return path
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({', '.join(pickled)}) and no {name}. Pickles can run code and "
            "are never loaded; convert them to safetensors where you trust them, as the README shows, or use a "
            "revision of the model that has them."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    again = "download the model again; if its repository has pickled weights alone, the README says how to convert them"
    found = f"it has {', '.join(others)}: pass the matching variant=" if others else again
    raise ModelError(f"{folder} has no weights: expected {name}; {found}.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of all the files that an index of shards names.

    Raises:
        ModelError: a file is missing or damaged.
    """
    if path.suffix == ".json":
        shards = {path.parent / Path(name).name for name in read_json(path).get("weight_map", {}).values()}
        return {key: tensor for shard in sorted(shards) for key, tensor in read_tensors(shard).items()}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); download it again.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; `OutputError` where that is not possible.

    The tensors may be mapped from the very file that is replaced.
    """
    with atomic_path(path) as temporary:
        try:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(kept, temporary, metadata or {"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"cannot write {str(path)!r} ({error}); make room there or give another place") from error


def check_weights(component: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path) -> None:
    """Compare a file's tensors with a network's by name and shape.

    Raises:
        ModelError: names what is missing, misshapen or unknown.
    """
    mismatched = [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or mismatched or unexpected:
        raise weights_error(component, source, missing, mismatched, unexpected)


def weights_error(
    component: str,
    source: Path,
    missing: Iterable[str] = (),
    mismatched: Iterable[str] = (),
    unexpected: Iterable[str] = (),
) -> ModelError:
    """Describe weights that do not fit their network."""
    problems = {"missing": missing, "of another shape": mismatched, "unknown to the network": unexpected}
    listed = "; ".join(f"{what}: {_shorten(sorted(names))}" for what, names in problems.items() if names)
    return ModelError(
        f"the weights of {component} in {source} do not fit its config.json. Weights {listed}. Loading them "
        "would leave a random or crippled network; use the config.json the weights were saved with, or "
        "download both again."
    )


def _shorten(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
