"""What a caller passes to the pipeline, checked and brought into rows before any network runs.

Each function returns what it has checked. Written to be used as `check.prompts(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Generator, Tensor

from p2p_subject import checks
from p2p_subject.blip_diffusion.image_processor import is_batch
from p2p_subject.errors import (
    ArgumentError,
    ImageError,
    NonFiniteError,
    PromptError,
    StepsError,
    SubjectError,
)

__all__ = [
    "batch_of",
    "callback",
    "callback_latents",
    "count",
    "embeddings",
    "generators",
    "guidance",
    "latents",
    "negative",
    "one_of",
    "prompts",
    "rows",
    "size",
    "steps",
    "subject_prompt",
    "subjects",
]


def rows(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Bring arguments to one number of rows: lists must agree in length, single values are repeated.

    Raises:
        PromptError: a list is empty, or lists differ in length.
    """
    lengths = {name: len(value) for name, value in given.items() if is_batch(value)}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise PromptError(
            f"the lists differ in length or are empty: {listed}. Pass lists of one length above zero; a "
            "value that is not in a list serves every row."
        )
    number = next(iter(lengths.values()), 1)
    return {name: list(value) if name in lengths else [value] * number for name, value in given.items()}


def prompts(values: list[Any], name: str) -> list[str]:
    """Require texts; empty ones are allowed.

    Raises:
        PromptError: one is no text.
    """
    for value in values:
        if not isinstance(value, str):
            raise PromptError(f"{name} is {value!r}, a {type(value).__name__}; expected a text or a list of texts.")
    return values


def subjects(values: list[Any], name: str) -> list[str]:
    """Require the name of a category in every row.

    Raises:
        SubjectError: one is missing or blank.
    """
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise SubjectError(f'{name} is {value!r}; expected the name of a category, such as "dog".')
    return values


def negative(neg_prompt: Any, negative_prompt: Any) -> Any:
    """Return the negative prompt from its two spellings; None means "".

    Raises:
        PromptError: both are given and differ.
    """
    if negative_prompt is None:
        return "" if neg_prompt is None else neg_prompt
    if neg_prompt and neg_prompt != negative_prompt:
        raise PromptError(
            f"neg_prompt {neg_prompt!r} and negative_prompt {negative_prompt!r} are two spellings of one "
            "argument and differ; pass one of them."
        )
    return negative_prompt


def subject_prompt(target: str, prompt: str, strength: float = 1.0, repeats: int = 20) -> str:
    """Build the prompt of the released model: "a [target] [prompt]", int(strength * repeats) times, joined by
    ", ".

    Repetition strengthens the words against the subject; the text encoder's window cuts the end off.

    Raises:
        PromptError: the number of repetitions is below 1.
    """
    times = int(strength * repeats) if _is_finite(strength) and _is_finite(repeats) else 0
    if times < 1:
        raise PromptError(
            f"prompt_strength {strength!r} times prompt_reps {repeats!r} leaves no repetition of the prompt; "
            "their product must be 1 or more (1.0 and 20 by default)."
        )
    return ", ".join([f"a {target.strip()} {prompt.strip()}"] * times)


def guidance(scale: Any) -> float:
    """Require a finite number.

    Raises:
        NonFiniteError: it is NaN or infinite.
        ArgumentError: it is no number.
    """
    if not isinstance(scale, Real):
        raise ArgumentError(f"guidance_scale is {scale!r}; expected a number, such as 7.5.")
    if not math.isfinite(scale):
        raise NonFiniteError(f"guidance_scale is {scale}; expected a finite number, such as 7.5.")
    return scale


def steps(value: Any, most: int) -> int:
    """Require a whole number from 1 to `most`, the steps the model was trained with.

    Raises:
        StepsError: it is none.
    """
    if not checks.is_whole(value, 1, most):
        raise StepsError(f"num_inference_steps is {value!r}; expected a whole number from 1 to {most}, such as 50.")
    return value


def size(value: Any, name: str, factor: int) -> int:
    """Require pixels that make whole latents.

    Raises:
        ImageError: the value is no positive multiple of `factor`.
    """
    if not checks.is_whole(value, 1) or value % factor:
        raise ImageError(f"{name} is {value!r}; expected a positive multiple of {factor} pixels.")
    return value


def count(value: Any, name: str) -> int:
    """Require a whole number of 1 or more.

    Raises:
        ArgumentError: it is none.
    """
    if not checks.is_whole(value, 1):
        raise ArgumentError(f"{name} is {value!r}; expected a whole number of 1 or more.")
    return value


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """Require one of several words.

    Raises:
        ArgumentError: it is none of them.
    """
    if value not in choices:
        raise ArgumentError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
    return value


def callback(value: Any) -> Callable[..., Any] | None:
    """Require something that can be called, or None.

    Raises:
        ArgumentError: it is neither.
    """
    if value is not None and not callable(value):
        raise ArgumentError(f"callback_on_step_end is {value!r}; expected a function of (pipeline, step, timestep, tensors).")
    return value


def callback_latents(returned: Any, latents: Tensor) -> Tensor:
    """Return the latents that a callback gave back, or `latents` where it gave none.

    Raises:
        ArgumentError: it returned no dictionary, or latents of another shape.
    """
    given = {} if returned is None else returned
    changed = given.get("latents", latents) if isinstance(given, Mapping) else None
    if not isinstance(changed, Tensor) or changed.shape != latents.shape:
        raise ArgumentError(
            f"callback_on_step_end returned a {type(returned).__name__}; expected None or a dictionary whose "
            f'"latents", if any, are a tensor of shape {tuple(latents.shape)}.'
        )
    return changed


def embeddings(value: Any, number: int, width: int) -> Tensor:
    """Require subject embeddings (1 or `number`, Nq, `width`) and return them as (`number`, Nq, `width`).

    Raises:
        SubjectError: they have another shape.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.ndim != 3 or shape[0] not in {1, number} or shape[2] != width:
        raise SubjectError(
            f"subject_embeddings are {shape}; for {number} prompts expected a tensor ({number} or 1, "
            f"queries, {width}), such as the pipeline's subject_embeddings() returns."
        )
    return value.expand(number, -1, -1)


def batch_of(value: Any) -> Any:
    """Return a tensor of several rows as a list, for `rows`; anything else as it is."""
    return list(value) if isinstance(value, Tensor) and value.ndim == 3 and len(value) > 1 else value


def latents(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Require noise of a shape.

    Raises:
        ImageError: it has another shape.
        NonFiniteError: it holds NaN or infinity.
    """
    if tuple(value.shape) != shape:
        raise ImageError(
            f"latents have shape {tuple(value.shape)}; for this number of pictures, height and width expected {shape}."
        )
    if not value.isfinite().all():
        raise NonFiniteError("latents hold NaN or infinity; expected Gaussian noise.")
    return value


def generators(value: Any, number: int) -> Generator | list[Generator] | None:
    """Require one random generator, or one a picture.

    Raises:
        PromptError: a list has another length.
    """
    if isinstance(value, list | tuple) and len(value) != number:
        raise PromptError(f"{len(value)} generators are given for {number} pictures; pass one a picture, or just one.")
    # diffusers takes lists alone.
    return list(value) if isinstance(value, tuple) else value


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
