"""Inversion methods by name, with the options of each: what `Editor.invert` offers of the package `inversion`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import inversion
from inversion import Move, Predict, Schedule, Trajectory
from p2p_subject import checks
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
    told: list[Move] = field(default_factory=list)

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
        """Call the user's callback, once a move: some methods predict more often."""
        if self.callback is not None and self.told[-1:] != [move]:
            self.told.append(move)
            self.callback(move.index, latents)


def _direct(run: Inversion) -> Trajectory:
    return inversion.direct(run.predict(), run.latents, run.schedule, **run.record)


def _ddim(run: Inversion) -> Trajectory:
    return inversion.ddim(run.predict(), run.latents, run.schedule, **run.record)


def _fixed_point(run: Inversion, *, iterations: int = 5) -> Trajectory:
    return inversion.fixed_point(run.predict(), run.latents, run.schedule, iterations=iterations, **run.record)


def _negative_prompt(run: Inversion, *, proximal: float | None = None) -> Trajectory:
    return inversion.negative_prompt(
        run.predict(),
        run.latents,
        run.schedule,
        run.context.tokens,
        pooled=run.context.pooled,
        proximal=proximal,
        **run.record,
    )


def _null_text(
    run: Inversion, *, guidance_scale: float | None = None, inner_steps: int | None = None, optimiser: str = "conjugate"
) -> Trajectory:
    def noise(latents: Tensor, move: Move, context: Tensor) -> Tensor:
        return run.noise(latents, move, run.unconditional.expand(len(context)).with_tokens(context), None)

    return inversion.null_text(
        noise,
        run.latents,
        run.schedule,
        run.context.tokens.float(),
        run.unconditional.tokens.float(),
        conditional=run.predict(),
        guidance_scale=run.scale if guidance_scale is None else float(guidance_scale),
        inner_steps=inner_steps,
        optimiser=optimiser,
        **run.record,
    )


def _edit_friendly(run: Inversion, *, guidance_scale: float = 3.5, seed: int = 0) -> Trajectory:
    predict = run.predict(guidance_scale)
    return inversion.edit_friendly(
        predict, run.latents, run.schedule, guidance_scale=float(guidance_scale), seed=seed, **run.record
    )


METHODS: dict[str, Callable[..., Trajectory]] = {
    "direct": _direct,
    "ddim": _ddim,
    "fixed_point": _fixed_point,
    "negative_prompt": _negative_prompt,
    "null_text": _null_text,
    "edit_friendly": _edit_friendly,
}


def _number(low: float, high: float = math.inf) -> Check:
    return lambda value: checks.is_number(value, low, high)


def _whole(low: int, high: float = math.inf) -> Check:
    return lambda value: checks.is_whole(value, low, high)


Check = Callable[[Any], bool]
OPTIONS: dict[str, tuple[Check, str, bool]] = {
    "guidance_scale": (_number(0), "a number of 0 or more, such as 7.5", False),
    "seed": (_whole(0, checks.LAST_SEED), checks.SEED, False),
    "iterations": (_whole(1), "a whole number of 1 or more, such as 5", False),
    "inner_steps": (_whole(0), "a whole number of 0 or more, such as 10, or None", True),
    "optimiser": (lambda value: value in ("conjugate", "adam"), "'conjugate' or 'adam'", False),
    "proximal": (lambda value: checks.is_number(value, 0, 1) and 0 < value < 1, "a quantile such as 0.7, or None", True),
}
"""Of each option: whether a value will do, what is expected in words, and whether it may be None."""


def check(method: str, options: dict[str, Any], *, scale: float | None = None, record: bool = False) -> None:
    """Raise `ArgumentError` for a method there is not, or an option or value that it does not take; runs nothing.

    `scale` is the guidance scale that holds where the options have none.
    """
    if method not in METHODS:
        raise ArgumentError(f"method={method!r};{did_you_mean(str(method), METHODS)} expected one of {list(METHODS)}")
    if record:
        require_recordable(method)
    known = {name: own for name, own in inspect.signature(METHODS[method]).parameters.items() if name != "run"}
    for name, value in options.items():
        if name not in known:
            close = did_you_mean(name, known)
            choices = list(known) or "none"
            raise ArgumentError(f"inversion method {method!r} has no option {name!r};{close} its options: {choices}")
        fits, expected, optional = OPTIONS[name]
        if value is None and (optional or known[name].default is None):
            continue
        if not fits(value):
            raise ArgumentError(f"{name}={value!r}; expected {expected}")
    guidance = options.get("guidance_scale")
    if method == "null_text" and (scale if guidance is None else guidance) == 1:
        raise ArgumentError("guidance_scale=1 is no guidance, which null-text inversion is for; expected another, such as 7.5")


def require_recordable(method: str) -> None:
    """Raise `ArgumentError` for a method whose sources have no stored generation to record."""
    if method == "ddim":
        raise ArgumentError("a source inverted by 'ddim' is generated again by every edit; record one inverted by 'direct'")
