"""What one call of `Editor.generate` makes: a picture a row, from arguments that may be one for all or a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from p2p_subject import checks
from p2p_subject.errors import ArgumentError, PromptError, SubjectError
from p2p_subject.subject import AnySubject


@dataclass(frozen=True)
class Request:
    """One picture that is wanted; `seed` None draws a random one."""

    prompt: str
    subject: AnySubject | None
    seed: int | None


def requests(prompt: Any, subject: Any, seed: Any) -> tuple[list[Request], bool]:
    """The pictures that are wanted, and whether a list of them was.

    Lists have one length, and a value that is not in a list serves every row. Raises `ArgumentError` where they do not fit,
    `PromptError` and `SubjectError` for what is no prompt or subject; runs no network.
    """
    given = {"prompt": prompt, "subject": subject, "seed": seed}
    lists = {name: len(value) for name, value in given.items() if isinstance(value, Sequence) and not isinstance(value, str)}
    if len(set(lists.values())) > 1 or 0 in lists.values():
        told = ", ".join(f"{name} has {length}" for name, length in lists.items())
        raise ArgumentError(f"{told}; expected lists of one length, 1 or more, and single values for what all rows share")
    count = next(iter(lists.values()), 1)
    rows = zip(*(value if name in lists else [value] * count for name, value in given.items()))
    return [_request(*row) for row in rows], bool(lists)


def _request(prompt: Any, subject: Any, seed: Any) -> Request:
    if not isinstance(prompt, str):
        raise PromptError(f"prompt={prompt!r}; expected a text, such as 'a dog on grass', or a list of texts")
    if subject is not None and not isinstance(subject, AnySubject):
        raise SubjectError(f"subject={subject!r}; expected Subject(picture, category), or a list with one a row")
    if seed is not None:
        seed = checks.whole(seed, "seed", 0, "a whole number of 0 or more, a list of them, or None for random ones")
    return Request(prompt, subject, seed)
