"""How a running job tells of itself: progress bars, and the user's callback after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from inversion import Move
from inversion.walk import After

T = TypeVar("T")
Callback = Callable[[int, Tensor], None]
"""`callback(step, latents)`; may raise to cancel."""


def reporting(callback: Callback | None, after: After = lambda latents, move: latents) -> After:
    """`after`, and then the user's callback."""

    def told(latents: Tensor, move: Move) -> Tensor:
        latents = after(latents, move)
        if callback is not None:
            callback(move.index, latents)
        return latents

    return told


def progress(what: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """A bar over the steps of a job, silent where stderr is no terminal and for jobs under two seconds."""
    return lambda items: tqdm(items, desc=what, disable=None, delay=2, leave=False)
