"""The folder of a run: what the run is, its last state, so that it can go on after a kill, and pictures of its progress."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from p2p_subject.blip_diffusion.weights import read_json, write_tensors
from p2p_subject.errors import OutputError
from p2p_subject.finetuning.stored import is_finetuned
from p2p_subject.outputs import atomic_write

State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class RunFolder:
    """A run in `path`, whose result is written there; its own files lie in `path/run`."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return is_finetuned(self.path)

    def begin(self, identity: dict[str, Any]) -> None:
        """Make the folder, or go on in it if it is of the same run. `identity` is JSON-able.

        Raises `OutputError` for a folder with anything else in it, and one that cannot be written.
        """
        stated = self.run / "settings.json"
        if stated.is_file():
            known = read_json(stated)
            changed = sorted(key for key in identity.keys() | known.keys() if identity.get(key) != known.get(key))
            if changed:
                told = "; ".join(f"{key}: {_short(known.get(key))} there, {_short(identity.get(key))} now" for key in changed)
                raise OutputError(f"the folder {str(self.path)!r} holds another run ({told}); give another folder")
            return
        # A run that was killed at its very start has left its folder, with nothing in it.
        if self.path.is_dir() and any(child != self.run for child in self.path.iterdir()):
            raise OutputError(f"the folder {str(self.path)!r} is not empty and holds no run; give a new folder")
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {str(self.run)!r}: {error.strerror or error}") from error
        atomic_write(stated, json.dumps(identity, indent=1) + "\n")

    def save(self, state: State) -> None:
        """Keep the state of a step, everything of it in one file, so that a kill never leaves parts of two."""
        tensors, values = state
        write_tensors(self.run / "checkpoint.safetensors", tensors, {"values": json.dumps(values)})

    def load(self) -> State | None:
        """The state that was kept last, if any."""
        path = self.run / "checkpoint.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["values"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}); remove it, and the run begins anew") from error

    def tidy(self) -> None:
        """Remove what only an unfinished run needs."""
        (self.run / "checkpoint.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.run / "prior", ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
