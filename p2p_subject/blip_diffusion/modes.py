"""Running networks for their output only, whatever state a training loop has left them in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["evaluating", "inference"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Switch dropout off in every module of `networks` inside the block, and back to what it was after it."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def inference(method: _Method) -> _Method:
    """Run a pipeline's method without gradients and with its networks in evaluation mode."""

    @functools.wraps(method)
    def run(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        with torch.no_grad(), evaluating(networks):
            return method(pipeline, *args, **kwargs)

    return run  # type: ignore[return-value]
