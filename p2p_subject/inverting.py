"""Inversion methods by name, with the options of each: what `Editor.invert` offers of the package `inversion`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import inversion
from inversion import Move, Predict, Schedule, Trajectory
from p2p_subject.context import Context
from p2p_subject.errors import ArgumentError, did_you_mean
from p2p_subject.maps import MapMean
from p2p_subject.sampling import Noise, guided


@dataclass(frozen=True)
class Inversion:
    """An inversion about to run: the network, the clean latents (1, C, h, w), and the contexts of the prompt and of none.

    `maps` receives the attention of the source on the way; `scale` is the guidance scale that edits will use by default;
    `callback(step, latents)` is called when a step begins.
    """

    noise: Noise
    latents: Tensor
    schedule: Schedule
    context: Context
    unconditional: Context
    scale: float
    maps: MapMean
    prompt: str
    fingerprint: str
    progress: Callable[[Iterable[Move]], Iterable[Move]]
    callback: Callable[[int, Tensor], None] | None = None
    told: set[int] = field(default_factory=set)

    @property
    def record(self) -> dict[str, Any]:
        """What every method writes into its trajectory, and the progress bar."""
        return {"prompt": self.prompt, "fingerprint": self.fingerprint, "progress": self.progress}

    def predict(self, scale: float = 1.0) -> Predict:
        """Noise of the prompt, guided at `scale`; says when a step begins."""
        predict = guided(self.noise, lambda index: self.unconditional, self.context, scale, self.maps)

        def reported(latents: Tensor, move: Move) -> Tensor:
            self.tell(latents, move)
            return predict(latents, move)

        return reported

    def tell(self, latents: Tensor, move: Move) -> None:
        """Call the user's callback, once a step: some methods predict more often."""
        if self.callback is not None and move.index not in self.told:
            self.told.add(move.index)
            self.callback(move.index, latents)


def _direct(run: Inversion) -> Trajectory:
    return inversion.direct(run.predict(), run.latents, run.schedule, **run.record)


def _ddim(run: Inversion) -> Trajectory:
    return inversion.ddim(run.predict(), run.latents, run.schedule, **run.record)


def _fixed_point(run: Inversion, *, iterations: int = 5) -> Trajectory:
    return inversion.fixed_point(run.predict(), run.latents, run.schedule, iterations=iterations, **run.record)


def _negative_prompt(run: Inversion, *, proximal: float | None = None) -> Trajectory:
    context = run.context.tokens.float()
    return inversion.negative_prompt(run.predict(), run.latents, run.schedule, context, proximal=proximal, **run.record)


def _null_text(
    run: Inversion, *, guidance_scale: float | None = None, inner_steps: int | None = None, optimiser: str = "conjugate"
) -> Trajectory:
    def noise(latents: Tensor, move: Move, context: Tensor) -> Tensor:
        run.tell(latents, move)
        return run.noise(latents, move, run.unconditional.expand(len(context)).with_tokens(context), None)

    return inversion.null_text(
        noise,
        run.latents,
        run.schedule,
        run.context.tokens.float(),
        run.unconditional.tokens.float(),
        guidance_scale=run.scale if guidance_scale is None else guidance_scale,
        inner_steps=inner_steps,
        optimiser=optimiser,
        **run.record,
    )


def _edit_friendly(run: Inversion, *, guidance_scale: float = 3.5, seed: int = 0) -> Trajectory:
    predict = run.predict(guidance_scale)
    return inversion.edit_friendly(
        predict, run.latents, run.schedule, guidance_scale=guidance_scale, seed=seed, **run.record
    )


METHODS: dict[str, Callable[..., Trajectory]] = {
    "direct": _direct,
    "ddim": _ddim,
    "fixed_point": _fixed_point,
    "negative_prompt": _negative_prompt,
    "null_text": _null_text,
    "edit_friendly": _edit_friendly,
}


def check(method: str, options: dict[str, Any]) -> None:
    """Raise `ArgumentError` for a method there is not, or an option that it does not have; runs nothing."""
    if method not in METHODS:
        raise ArgumentError(f"method={method!r};{did_you_mean(str(method), METHODS)} expected one of {list(METHODS)}")
    known = [name for name in inspect.signature(METHODS[method]).parameters if name != "run"]
    for name in options:
        if name not in known:
            close = did_you_mean(name, known)
            raise ArgumentError(f"inversion method {method!r} has no option {name!r};{close} its options: {known or 'none'}")
