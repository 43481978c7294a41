"""The small folder of a fine-tuned model: what was learned, and the name of the model that it was learned on.

    finetune.json         the base model's name and fingerprint, category, settings, losses, versions; written last
    subject.safetensors   the subject's embedding, (1, Nq, D) float32
    lora.safetensors      low-rank additions to the U-Net, in the names of diffusers and peft; or, trained in full,
    unet.safetensors      all of its weights

Light, so that what a folder holds is known before diffusers is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2p_subject.blip_diffusion.weights import read_json, read_tensors
from p2p_subject.errors import ModelError, SubjectError
from p2p_subject.subject import EmbeddedSubject

FINETUNED = "finetune.json"
FORMAT = "p2p_subject.finetuned/1"
SUBJECT = "subject.safetensors"
WEIGHTS = {"lora": "lora.safetensors", "full": "unet.safetensors"}
"""File of the weights of each method."""


def is_finetuned(folder: str | Path) -> bool:
    """Whether this is the folder of a fine-tuned model."""
    return (Path(folder) / FINETUNED).is_file()


def read_finetuned(folder: Path) -> dict[str, Any]:
    """What `finetune.json` says. Raises `ModelError` for another file."""
    values = read_json(folder / FINETUNED)
    if values.get("format") != FORMAT:
        raise ModelError(f"{folder / FINETUNED}: format {values.get('format')!r}, expected {FORMAT!r}; update p2p_subject")
    return values


def base_name(folder: Path) -> str:
    """The name of the model that this one was made from. Raises `ModelError`."""
    base = read_finetuned(folder).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("name"), str):
        raise ModelError(f"{folder / FINETUNED} names no base model; save the fine-tuned model again")
    return base["name"]


def stored_subject(folder: Path) -> EmbeddedSubject:
    """The subject of a fine-tuned folder, without its model. Raises `ModelError`."""
    values = read_finetuned(folder)
    tensors = read_tensors(folder / SUBJECT)
    try:
        return EmbeddedSubject(tensors["embedding"], values["category"])
    except (KeyError, SubjectError) as error:
        raise ModelError(f"{folder / SUBJECT} is damaged ({error}); save the fine-tuned model again") from error
