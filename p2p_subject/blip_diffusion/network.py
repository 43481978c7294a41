"""Base of the library's own networks: read from and written to `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from p2p_subject.blip_diffusion.weights import (
    check_weights,
    read_json,
    read_tensors,
    require_safetensors,
    write_tensors,
)
from p2p_subject.errors import ModelError
from p2p_subject.outputs import atomic_write

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Network"]


class Network(nn.Module):
    """A network, built from a configuration or, by `from_pretrained`, from a folder."""

    config_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load from a folder that `save_pretrained`, of this library or of the official one, has written.

        Args:
            folder: holds `config.json` and `model.safetensors`.
            torch_dtype: float type of the weights; None is float32.
            variant: such as "fp16": reads `model.fp16.safetensors`.

        Returns:
            The network on the CPU, in evaluation mode.

        Raises:
            ModelError: a file is missing or damaged, or a weight is missing, misshapen or unknown (named one
                by one).
        """
        folder = Path(folder)
        try:
            config = cls.config_class.from_dict(read_json(folder / "config.json"))
            # Built without storage: the weights of the file become the network's, and memory is taken once.
            with torch.device("meta"):
                network = cls(config)
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(f"{folder / 'config.json'} does not describe a {cls.__name__}: {error}") from error
        path = require_safetensors(folder, "model", variant)
        state = {name: tensor for name, tensor in read_tensors(path).items() if not _is_counter(name)}
        expected = network.state_dict()
        check_weights(
            folder.name,
            {name: tensor for name, tensor in expected.items() if not _is_counter(name)},
            state,
            path,
        )
        dtype = torch_dtype or torch.float32
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        counters = {name: torch.arange(old.shape[1])[None] for name, old in expected.items() if _is_counter(name)}
        network.load_state_dict({**state, **counters}, assign=True)
        return network.eval()

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write `config.json` and `model.safetensors` (with `variant` "fp16": `model.fp16.safetensors`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "architectures": [type(self).__name__]}
        atomic_write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_tensors(folder / (f"model.{variant}.safetensors" if variant else "model.safetensors"), self.state_dict())


def _is_counter(name: str) -> bool:
    # Official files hold 0, 1, 2, ... under this name; some releases leave it out.
    return name.split(".")[-1] == "position_ids"
