"""The recovered (or recorded) generation of a picture, as a value that can be kept, saved and used by many edits."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from inversion.errors import ModelMismatchError, OutputError, TrajectoryError
from inversion.guidance import require_quantile
from inversion.schedule import Schedule
from inversion.walk import require_finite

FORMAT = "p2p_subject.trajectory/1"
VALUES = ("prompt", "negative_prompt", "method", "guidance_scale", "fingerprint", "proximal", "replay")
TENSORS = ("latents", "null_embeddings", "null_pooled", "noises")


# Compared by identity: tensors have no single truth value to compare by.
@dataclass(frozen=True, eq=False)
class Trajectory:
    """Latents of every step of one picture's generation.

    `latents` (N + 1, C, h, w) float32, clean first: `latents[N]` is the noise, `latents[0]` the picture. `prompt` is the text
    it was made with, `method` how it was made, `guidance_scale` the scale it was made at, `fingerprint` names the model.
    `null_embeddings` (N, L, D), if any, are the unconditional contexts of the steps, noise first; (1, L, D) the same one for
    every step; `null_pooled` (1, P) goes with them where a model has pooled text. `noises` (N, C, h, w), if any, are the noise
    maps of DDPM steps, noise first. `proximal` is the quantile of proximal guidance. `replay`: edits generate the source again
    from its noise instead of reading the latents here. `negative_prompt` is the one it was generated with, if any.
    """

    latents: Tensor
    schedule: Schedule
    prompt: str
    method: str
    guidance_scale: float = 1.0
    fingerprint: str = ""
    null_embeddings: Tensor | None = None
    null_pooled: Tensor | None = None
    noises: Tensor | None = None
    proximal: float | None = None
    replay: bool = False
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        expected = self.schedule.steps + 1
        if self.latents.ndim != 4 or len(self.latents) != expected:
            raise TrajectoryError(
                f"latents of shape {tuple(self.latents.shape)}; a schedule of {self.schedule.steps} steps needs "
                f"({expected}, C, h, w)"
            )
        null = self.null_embeddings
        if null is not None and (null.ndim != 3 or len(null) not in (1, self.schedule.steps)):
            raise TrajectoryError(
                f"null embeddings of shape {tuple(null.shape)} for {self.schedule.steps} steps; expected (N, L, D), one for "
                "each, or (1, L, D)"
            )
        if self.noises is not None and self.noises.shape != self.latents[1:].shape:
            raise TrajectoryError(
                f"noise maps of shape {tuple(self.noises.shape)}; expected one for each step, {tuple(self.latents[1:].shape)}"
            )
        if self.proximal is not None:
            require_quantile(self.proximal)
        for name, tensor in self.tensors().items():
            if tensor is not None:
                require_finite(tensor, f"{name} of the trajectory")

    @property
    def noise(self) -> Tensor:
        """Latents at the start of sampling, (1, C, h, w)."""
        return self.latents[-1:]

    @property
    def clean(self) -> Tensor:
        """Latents of the picture, (1, C, h, w)."""
        return self.latents[:1]

    def before(self, index: int) -> Tensor:
        """Latents at the start of sampling step `index`, (1, C, h, w)."""
        position = self.schedule.steps - index
        return self.latents[position : position + 1]

    def after(self, index: int) -> Tensor:
        """Latents at the end of sampling step `index`, (1, C, h, w)."""
        return self.before(index + 1)

    def unconditional(self, index: int) -> Tensor | None:
        """The unconditional context of sampling step `index`, (1, L, D), if the inversion sets one."""
        if self.null_embeddings is None:
            return None
        position = index if len(self.null_embeddings) > 1 else 0
        return self.null_embeddings[position : position + 1]

    def require_model(self, fingerprint: str) -> None:
        """Raise `ModelMismatchError` unless this trajectory was made by the model with `fingerprint`."""
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise ModelMismatchError(
                f"this trajectory was made by model {self.fingerprint}, the one at hand is {fingerprint}; invert the picture "
                "again with this model, or load the model it was made with"
            )

    def to(self, device: torch.device | str) -> Trajectory:
        """The same trajectory with its tensors on `device`."""
        moved = {key: None if value is None else value.to(device) for key, value in self.tensors().items()}
        return Trajectory(**{**self.__dict__, **moved})

    def tensors(self) -> dict[str, Tensor | None]:
        """The fields that are tensors, by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata as a safetensors file holds them; `unpack` is the inverse."""
        values = {name: getattr(self, name) for name in VALUES}
        values["schedule"] = asdict(self.schedule)
        tensors = {key: value.cpu().contiguous() for key, value in self.tensors().items() if value is not None}
        return tensors, {"format": FORMAT, "trajectory": json.dumps(values)}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], metadata: dict[str, str], name: str = "trajectory") -> Trajectory:
        """Build a trajectory from what `pack` gave; `TrajectoryError` names `name` if it is anything else."""
        if metadata.get("format") != FORMAT or "latents" not in tensors:
            raise TrajectoryError(
                f"{name}: format {metadata.get('format')!r}, expected {FORMAT!r}; this is not a saved trajectory"
            )
        own = {key: tensors[key] for key in TENSORS if key in tensors}
        try:
            values = json.loads(metadata["trajectory"])
            for key in ("prompt", "method", "fingerprint"):
                if not isinstance(values[key], str):
                    raise TypeError(f"{key} is {values[key]!r}, expected a text")
            values["guidance_scale"] = float(values["guidance_scale"])
            if not isinstance(values.setdefault("negative_prompt", None), str | None):
                raise TypeError(f"negative_prompt is {values['negative_prompt']!r}, expected a text or null")
            # Files of before there was a choice lack it.
            if not isinstance(values.setdefault("replay", False), bool):
                raise TypeError(f"replay is {values['replay']!r}, expected true or false")
            schedule = values.pop("schedule")
            schedule |= {"timesteps": tuple(schedule["timesteps"]), "alphas": tuple(schedule["alphas"])}
            return cls(schedule=Schedule(**schedule), **values, **own)
        except KeyError as error:
            raise TrajectoryError(f"{name}: the entry {error} is missing; invert the picture again") from error
        # What a damaged header or a schedule of other values raises on the way.
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TrajectoryError(f"{name}: damaged ({error}); invert the picture again") from error

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; `OutputError` where that is not possible."""
        write_safetensors(path, *self.pack())

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote; `TrajectoryError` for any other file."""
        return cls.unpack(*read_safetensors(path), name=str(path))


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to `path`, whole or not at all; `OutputError` where that is not possible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: no folder {str(target.parent)!r}; create it first")
    if target.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a directory; give the name of a file")
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        # safetensors' own files can be read by their owner alone: as readable as any new file, or as the one that it replaces.
        temporary.touch()
        if target.exists():
            shutil.copymode(target, temporary)
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, target)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"cannot write {str(path)!r} ({error}); make room there or give another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; `TrajectoryError` if there is no such file or it is not of that kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: there is no such file; expected one that save() wrote") from None
    except (SafetensorError, OSError) as error:
        raise TrajectoryError(f"{path}: not a readable safetensors file ({error}); invert the picture again") from error
