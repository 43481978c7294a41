"""Named errors of the library; those shared with `inversion` are defined there and exported here."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from inversion.errors import (
    ModelMismatchError,
    NonFiniteError,
    OutputError,
    P2PSubjectError,
    ScheduleError,
    StepsError,
    TrajectoryError,
)

__all__ = [
    "AmbiguousWordError",
    "ArgumentError",
    "DatasetError",
    "EditSpecError",
    "HookError",
    "ImageError",
    "MaskError",
    "MissingPackageError",
    "ModelError",
    "ModelMismatchError",
    "NonFiniteError",
    "OutputError",
    "P2PSubjectError",
    "PromptError",
    "PromptTooLongError",
    "ScheduleError",
    "StepsError",
    "SubjectError",
    "TrajectoryError",
    "WordNotFoundError",
    "did_you_mean",
]


class ArgumentError(P2PSubjectError, ValueError):
    """An option of a call is none of those there are, or a callback is not what is called for."""


class DatasetError(P2PSubjectError, ValueError):
    """A folder of training pictures, or what was made from it before, lacks something or holds something unusable."""


class ImageError(P2PSubjectError, ValueError):
    """A picture cannot be read or is of a kind that is refused."""


class MaskError(P2PSubjectError, ValueError):
    """A mask given by the user has the wrong shape, range or content."""


class MissingPackageError(P2PSubjectError, ImportError):
    """An optional package is not installed and what was asked for needs it."""


class PromptError(P2PSubjectError, ValueError):
    """A prompt is not a usable text."""


class WordNotFoundError(PromptError):
    """A word named for an edit, a mask or a heat map is not in the prompt."""


class AmbiguousWordError(PromptError):
    """A word occurs more than once in the prompt and no index picks one."""


class PromptTooLongError(PromptError):
    """A prompt does not fit the window of the text encoder."""


class SubjectError(P2PSubjectError, ValueError):
    """A subject lacks its category or its picture, or the model cannot take subjects."""


class EditSpecError(P2PSubjectError, ValueError):
    """An edit specification contradicts itself or the source it is applied to."""


class HookError(P2PSubjectError, RuntimeError):
    """Attention control could not be installed where it is needed, or saw rows it was not compiled for."""


class ModelError(P2PSubjectError, ValueError):
    """A folder or name is not a model this library can load, or a weight of it is missing or misshapen."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `choices`, or an empty string."""
    by_folded = {choice.lower(): choice for choice in choices}
    close = get_close_matches(word.lower(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""
