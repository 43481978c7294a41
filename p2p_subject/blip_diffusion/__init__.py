"""BLIP-Diffusion: the text encoder with room for a subject, the Q-Former, and the generation pipeline.

After BLIP-Diffusion (Li, Li, Hoi; NeurIPS 2023, arXiv 2305.14720). Built on torch alone, so that the networks
do not depend on the release of transformers; they read and write the public checkpoint's files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2p_subject.blip_diffusion.config import (
        Blip2QFormerConfig,
        ContextCLIPTextConfig,
        QFormerConfig,
        VisionConfig,
    )
    from p2p_subject.blip_diffusion.controlnet import BlipDiffusionControlNetPipeline
    from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor
    from p2p_subject.blip_diffusion.pipeline import BlipDiffusionPipeline
    from p2p_subject.blip_diffusion.presets import PAPER, RELEASED
    from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
    from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel

__all__ = [
    "PAPER",
    "RELEASED",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "BlipDiffusionControlNetPipeline",
    "BlipDiffusionPipeline",
    "BlipImageProcessor",
    "ContextCLIPTextConfig",
    "ContextCLIPTextModel",
    "QFormerConfig",
    "VisionConfig",
]

_HOMES = {
    "PAPER": "presets",
    "RELEASED": "presets",
    "Blip2QFormerConfig": "config",
    "Blip2QFormerModel": "qformer",
    "BlipDiffusionControlNetPipeline": "controlnet",
    "BlipDiffusionPipeline": "pipeline",
    "BlipImageProcessor": "image_processor",
    "ContextCLIPTextConfig": "config",
    "ContextCLIPTextModel": "text_encoder",
    "QFormerConfig": "config",
    "VisionConfig": "config",
}


def __getattr__(name: str) -> Any:
    # The networks can be had without importing diffusers, which takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
