"""Checks of the values that specifications are made of; each returns the value in its one form or raises `EditSpecError`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from p2p_subject.errors import EditSpecError, did_you_mean

Window = tuple[float, float]
"""Fractions of the sampling steps, from the noise: (0.0, 0.8) is the first 80 % of them."""
Word = str | tuple[str, int]
"""A word or phrase of a prompt, or (word, index) where it occurs more than once; the index counts from 0."""


LAST_SEED = 2**64 - 1
SEED = "a whole number from 0 to 2**64 - 1"
"""What torch's generators take."""


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number in a range; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # a whole number beyond any float
        return False


def is_whole(value: Any, low: int, high: float = math.inf) -> bool:
    """Whether this is a whole number in a range; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high


def window(value: Any, name: str) -> Window:
    """Read a fraction f as (0, f); check that a pair lies in [0, 1] and is ordered."""
    pair = tuple(value) if isinstance(value, list | tuple) else (0.0, value)
    if len(pair) != 2 or not all(is_number(v, 0, 1) for v in pair) or pair[0] > pair[1]:
        raise EditSpecError(
            f"{name}={value!r}; expected a fraction of the steps between 0 and 1, or (start, stop) with start <= stop"
        )
    return float(pair[0]), float(pair[1])


def windows(value: Any, name: str) -> Window | Mapping[Word | None, Window]:
    """One window for all words, or a mapping of words to windows, in which None stands for all the others."""
    if not isinstance(value, Mapping) or not value:
        return window(value, name)
    read = {
        None if key is None else word(key, f"a word of {name}"): window(own, f"{name}[{key!r}]") for key, own in value.items()
    }
    return MappingProxyType(read)


def fraction(value: Any, name: str) -> float:
    """A number from 0 to 1."""
    if not is_number(value, 0, 1):
        raise EditSpecError(f"{name}={value!r}; expected a number between 0 and 1")
    return float(value)


def whole(value: Any, name: str, low: int, expected: str, high: float = math.inf) -> int:
    """A whole number from `low` to `high`; `expected` says so in words."""
    if not is_whole(value, low, high):
        raise EditSpecError(f"{name}={value!r}; expected {expected}")
    return int(value)


def choice(value: Any, name: str, choices: Collection[str]) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        close = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise EditSpecError(f"{name}={value!r};{close} expected one of {sorted(choices)}")
    return value


def word(value: Any, name: str) -> Word:
    """A word of a prompt; a pair comes as a list from JSON."""
    text, index = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 0)
    if not isinstance(text, str) or not text.strip() or not is_whole(index, 0):
        raise EditSpecError(
            f"{name}={value!r}; expected a word or phrase of the prompt, such as 'cat', or where it occurs more than once a "
            "pair of it and its index from 0, such as ('cat', 1)"
        )
    return text if isinstance(value, str) else (text, int(index))


def words(value: Any, name: str) -> tuple[Word, ...]:
    """A list of words."""
    if not isinstance(value, list | tuple):
        raise EditSpecError(f"{name}={value!r}; expected a list of words, such as ['cat'] or [('cat', 1)], or None")
    return tuple(word(own, f"{name}[{at}]") for at, own in enumerate(value))


def weights(value: Any) -> Mapping[Word, float]:
    """Factors of words, as a copy that cannot be changed."""
    if not isinstance(value, Mapping):
        raise EditSpecError(f"weights={value!r}; expected a mapping of words to numbers, such as {{'cat': 2.0}}")
    for key, factor in value.items():
        if not is_number(factor):
            raise EditSpecError(f"weights[{key!r}]={factor!r}; expected a finite number")
    return MappingProxyType({word(key, "a word of weights"): float(factor) for key, factor in value.items()})
