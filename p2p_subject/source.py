"""A picture together with its recovered (or recorded) generation: what edits start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inversion import Trajectory, TrajectoryError
from inversion.trajectory import read_safetensors, write_safetensors
from p2p_subject.images import Frame
from p2p_subject.recording import Recording
from p2p_subject.structure import Structure


# Compared by identity, as trajectories are.
@dataclass(frozen=True, eq=False)
class Source:
    """What an edit starts from.

    `trajectory` of the generation, the full-size picture `image` (RGB), `frame` how it was fitted to the model, `attention`
    (T, h, w) float32 the mean cross-attention of every column of its prompt, recorded on the way, `subject` (1, Nq, D), the
    embeddings of the subject it was generated with, if any, `recording`, if it was made, what lets edits run without it, and
    `structure`, if it was made under one, the control picture (of the model's size) and its strength, which edits keep to.
    """

    trajectory: Trajectory
    image: Image.Image
    frame: Frame
    attention: Tensor
    subject: Tensor | None = None
    recording: Recording | None = None
    structure: Structure | None = None

    @property
    def prompt(self) -> str:
        """The text that describes the picture."""
        return self.trajectory.prompt

    def save(self, path: str | Path, *, recording: bool = False) -> None:
        """Write trajectory and picture to one safetensors file, whole or not at all; `OutputError` where that fails.

        `recording` writes the recording as well, if there is one: about a gigabyte at 512x512 pixels in half precision.
        """
        tensors, metadata = self.trajectory.pack()
        tensors |= {
            "image": torch.from_numpy(np.array(self.image)),
            "model_size": torch.tensor(self.frame.model_size),
            "attention": self.attention.cpu().contiguous(),
        }
        if self.subject is not None:
            tensors["subject"] = self.subject.cpu().contiguous()
        if self.structure is not None:
            tensors |= self.structure.tensors()
        if recording and self.recording is not None:
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in self.recording.tensors().items()}
        write_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Source:
        """Read what `save` wrote; `TrajectoryError` for any other file."""
        tensors, metadata = read_safetensors(path)
        trajectory = Trajectory.unpack(tensors, metadata, str(path))
        missing = [name for name in _SHAPES if name not in tensors]
        if "image" in missing:
            lacking = ", ".join(missing)
            raise TrajectoryError(f"{path}: a trajectory without its picture ({lacking}); read it with Trajectory.load")
        if missing:
            raise TrajectoryError(
                f"{path}: {', '.join(missing)} missing; a saved source needs {', '.join(_SHAPES)}. Invert the picture again"
            )
        for name, (shape, kind) in _SHAPES.items():
            given = tensors[name]
            if given.dtype != kind or given.ndim != len(shape) or any(a not in (b, "any") for a, b in zip(shape, given.shape)):
                expected = ", ".join(map(str, shape))
                raise TrajectoryError(f"{path}: {name} is {tuple(given.shape)} {given.dtype}; expected ({expected}) {kind}")
        if not tensors["attention"].isfinite().all() or (tensors["model_size"] < 1).any():
            raise TrajectoryError(f"{path}: its attention or its model_size is damaged; invert the picture again")
        subject = tensors.get("subject")
        if subject is not None and (subject.ndim != 3 or len(subject) != 1 or not subject.isfinite().all()):
            raise TrajectoryError(f"{path}: subject is {tuple(subject.shape)}; expected finite embeddings (1, Nq, D)")
        image = Image.fromarray(tensors["image"].numpy())
        width, height = tensors["model_size"].tolist()
        frame = Frame(image.size, (width, height))
        recording = Recording.from_tensors(tensors, str(path))
        structure = Structure.from_tensors(tensors, frame.model_size, str(path))
        return cls(trajectory, image, frame, tensors["attention"], tensors.get("subject"), recording, structure)


_SHAPES = {
    "image": (("any", "any", 3), torch.uint8),
    "model_size": ((2,), torch.int64),
    "attention": (("any", "any", "any"), torch.float32),
}
"""Shape and type of the tensors that a saved source has beside its trajectory."""
