"""Pictures of the category without the subject, which keep its word's meaning (Ruiz et al. 2023, prior preservation)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from p2p_subject.drawing import sample_batch
from p2p_subject.errors import OutputError
from p2p_subject.finetuning.grids import GRID_STEPS
from p2p_subject.finetuning.pictures import Picture, digest, files_of, read_pictures
from p2p_subject.fingerprint import fingerprint
from p2p_subject.images import load_image
from p2p_subject.models import Model
from p2p_subject.outputs import save_image

_STEM = "prior-"


@dataclass(frozen=True, eq=False)
class Prior:
    """Given pictures, or `count` that are generated, in `folder` if one is named, and found there the next time."""

    given: list[Picture] | None
    count: int
    folder: Path | None = None

    @classmethod
    def of(cls, given: Any, count: int) -> Prior:
        """Read what a user gave: pictures, a folder with pictures, a folder to generate into, or None."""
        if given is None:
            return cls(None, count)
        if isinstance(given, str | Path) and not Path(given).is_file():
            folder = Path(given)
            if not folder.is_dir() or all(path.stem.startswith(_STEM) for path in files_of(folder)):
                return cls(None, count, folder)
        return cls(read_pictures(given, "prior"), count)

    @property
    def identity(self) -> str:
        """What tells one set of pictures from another."""
        return f"{self.count} generated" if self.given is None else digest(self.given)

    def pictures(self, model: Model, prompt: str, kept: Path | None) -> list[Picture]:
        """The pictures; those to be generated show `prompt`, from seeds 0 on, and are kept in `kept` unless `folder` is."""
        if self.given is not None:
            return self.given
        folder = self.folder or kept
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error
        seeds = tqdm(range(self.count), desc="pictures of the category", disable=None, delay=2, leave=False)
        return [Picture(self._drawn(model, prompt, seed, folder)) for seed in seeds]

    def _drawn(self, model: Model, prompt: str, seed: int, folder: Path | None) -> Image.Image:
        # Named after what drew them: a folder may serve several categories and models.
        drawn_by = f"{fingerprint(model.pipeline, controlnet=False)} {prompt} {GRID_STEPS} {model.guidance_scale}"
        tag = hashlib.sha256(drawn_by.encode()).hexdigest()[:8]
        path = None if folder is None else folder / f"{_STEM}{tag}-{seed:04d}.png"
        if path is not None and path.is_file():
            return load_image(path, what="prior")
        (image,) = sample_batch(model, [prompt], [None], [seed], GRID_STEPS, model.guidance_scale)
        if path is not None:
            save_image(image, path)
        return image
