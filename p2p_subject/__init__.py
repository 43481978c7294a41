"""Put this dog in that photo: subject-driven image editing by attention control, on diffusers.

editor = Editor.from_pretrained()
source = editor.invert("photo.png", "a cat on grass")
result = editor.edit(source, swap_subject("cat", Subject("dog.png", "dog")))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Blend": "edits",
    "BlipDiffusionControlNetPipeline": "blip_diffusion",
    "BlipDiffusionPipeline": "blip_diffusion",
    "CannyDetector": "control_images",
    "EditResult": "results",
    "EditSpec": "edits",
    "Editor": "editor",
    "EmbeddedSubject": "subject",
    "Finetuned": "finetuning",
    "MixedSubject": "subject",
    "P2PSubjectError": "errors",
    "Source": "source",
    "Subject": "subject",
    "add": "edits",
    "combine": "edits",
    "control_image": "control_images",
    "refine": "edits",
    "remove": "edits",
    "replace": "edits",
    "reweight": "edits",
    "swap_subject": "edits",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use: `p2p-subject --help` needs neither torch nor diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
