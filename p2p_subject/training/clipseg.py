"""Where a picture shows what a word names: CLIPSeg (Lüddecke and Ecker 2022), loaded from safetensors only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor
from p2p_subject.blip_diffusion.weights import require_safetensors, weights_error
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer
from p2p_subject.errors import ModelError, NonFiniteError, SubjectError

if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizerFast

DEFAULT_CLIPSEG = "CIDAS/clipseg-rd64-refined"
"""The published model with the finer decoder."""


class ClipSeg:
    """A picture and a category to the confidence, pixel by pixel, that the category is there.

    `fingerprint` is a hash of the weights' files: what was computed with others is not mistaken for theirs.
    """

    def __init__(
        self,
        model: CLIPSegForImageSegmentation,
        tokenizer: CLIPTokenizerFast,
        image_processor: BlipImageProcessor,
        fingerprint: str,
    ) -> None:
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, name: str | Path = DEFAULT_CLIPSEG, *, revision: str | None = None, device: str = "cpu") -> ClipSeg:
        """Load a local folder or a hub name, of which `revision` names a branch, tag or commit.

        Raises `ModelError` if there is no such model, it has no safetensors, or a weight is missing or misshapen.
        """
        from transformers import CLIPSegForImageSegmentation

        folder = _folder(str(name), revision)
        path = require_safetensors(folder, "model")
        try:
            model, report = CLIPSegForImageSegmentation.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded as CLIPSeg ({error}); download it again") from error
        if report["missing_keys"] or report["mismatched_keys"]:
            raise weights_error("CLIPSeg", path, report["missing_keys"], map(str, report["mismatched_keys"]))
        # Their own processor does the same, but differs from release to release in what it needs to be installed.
        processor = BlipImageProcessor.from_pretrained(folder)
        try:
            model = model.float().eval().to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device={device!r} is not to be had here ({error}); try 'cpu'") from error
        return cls(model, load_prompt_tokenizer(folder), processor, _digest(folder))

    def require(self, categories: Iterable[str]) -> None:
        """Raise `SubjectError` if a category does not fit the text encoder; runs no network."""
        most = self.model.config.text_config.max_position_embeddings
        for category in dict.fromkeys(categories):
            length = len(self.tokenizer(category).input_ids)
            if length > most:
                raise SubjectError(
                    f"the subject {category!r:.60} has {length} tokens, CLIPSeg reads {most}; name it in a few words"
                )

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, category: str) -> np.ndarray:
        """Confidence (H, W) float32 in [0, 1] for an RGB picture of H x W; raises `NonFiniteError`."""
        device = self.model.device
        words = self.tokenizer([category], return_tensors="pt").to(device)
        pixels = self.image_processor.preprocess(picture).to(device)
        logits = self.model(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels).logits
        if not logits.isfinite().all():
            raise NonFiniteError("CLIPSeg returned NaN or infinite values; its weights are damaged, download it again")
        # Some releases drop the axis of a single row.
        confidence = logits.float().sigmoid().reshape(1, 1, *logits.shape[-2:])
        confidence = F.interpolate(confidence, (picture.height, picture.width), mode="bilinear", align_corners=False)
        return confidence[0, 0].clamp(0, 1).cpu().numpy()


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"CLIPSeg {name!r} is no folder and cannot be downloaded ({type(error).__name__}). Give the folder of a "
            f"downloaded model, or a hub name such as {DEFAULT_CLIPSEG!r}."
        ) from error


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
