"""Few-step fine-tuning on one subject: its embedding is the start, so tens of steps do (BLIP-Diffusion, Li et al. 2023)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"Finetuned": "result", "Settings": "settings", "finetune": "run"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use: what a folder holds can be read without waiting for diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
