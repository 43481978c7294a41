"""What an edit is: frozen, validated specifications and their builders. No tensors, no model.

Fractions are of the sampling steps, from the noise: `(0.0, 0.8)` is the first 80 % of them. Methods and defaults after
Prompt-to-Prompt (Hertz et al. 2022, section 3.3) and BLIP-Diffusion (Li et al. 2023, section 3.4 and released code).
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from PIL import Image

from p2p_subject.errors import EditSpecError, SubjectError, did_you_mean
from p2p_subject.images import load_image

__all__ = ["Blend", "EditSpec", "Subject", "Window", "swap_subject"]

Window = tuple[float, float]
Word = str | tuple[str, int]
"""A word or phrase of a prompt, or (word, index) where it occurs more than once; the index counts from 0."""


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number in a range; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # a whole number beyond any float
        return False


def _window(value: Any, name: str) -> Window:
    """Read a fraction f as (0, f); check that a pair lies in [0, 1] and is ordered."""
    pair = tuple(value) if isinstance(value, list | tuple) else (0.0, value)
    if len(pair) != 2 or not all(_is_number(v, 0, 1) for v in pair) or pair[0] > pair[1]:
        raise EditSpecError(
            f"{name}={value!r}; expected a fraction of the steps between 0 and 1, or (start, stop) with start <= stop"
        )
    return float(pair[0]), float(pair[1])


def _fraction(value: Any, name: str) -> float:
    if not _is_number(value, 0, 1):
        raise EditSpecError(f"{name}={value!r}; expected a number between 0 and 1")
    return float(value)


def _whole(value: Any, name: str, low: int, expected: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise EditSpecError(f"{name}={value!r}; expected {expected}")
    return int(value)


def _word(value: Any, name: str) -> Word:
    """Check a word of a prompt; a pair comes as a list from JSON."""
    text, index = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 0)
    whole = isinstance(index, Integral) and not isinstance(index, bool) and index >= 0
    if not isinstance(text, str) or not text.strip() or not whole:
        raise EditSpecError(
            f"{name}={value!r}; expected a word or phrase of the prompt, such as 'cat', or where it occurs more than once a "
            "pair of it and its index from 0, such as ('cat', 1)"
        )
    return text if isinstance(value, str) else (text, int(index))


def _words(value: Any, name: str) -> tuple[Word, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise EditSpecError(f"{name}={value!r}; expected a list of words, such as ['cat'] or [('cat', 1)], or None")
    return tuple(_word(word, f"{name}[{at}]") for at, word in enumerate(value))


def _weights(value: Any) -> Mapping[Word, float]:
    """A copy that cannot be changed."""
    if not isinstance(value, Mapping):
        raise EditSpecError(f"weights={value!r}; expected a mapping of words to numbers, such as {{'cat': 2.0}}")
    for word, factor in value.items():
        if not _is_number(factor):
            raise EditSpecError(f"weights[{word!r}]={factor!r}; expected a finite number")
    return MappingProxyType({_word(word, "a word of weights"): float(factor) for word, factor in value.items()})


@dataclass(frozen=True)
class Subject:
    """A subject: one or more pictures of it and the category they show ("dog").

    `pictures` takes anything `load_image` takes, or a list of them, whose embeddings are averaged; pictures are read at
    once, so that a bad one is refused before any model runs. Raises `SubjectError`, `ImageError`.
    """

    pictures: Any
    category: str

    def __post_init__(self) -> None:
        if not isinstance(self.category, str) or not self.category.strip():
            raise SubjectError(f"category={self.category!r}; expected the word for what the picture shows, such as 'dog'")
        given = self.pictures if isinstance(self.pictures, list | tuple) else [self.pictures]
        if not given:
            raise SubjectError("a subject needs at least one picture, got an empty list")
        object.__setattr__(self, "category", " ".join(self.category.split()))
        object.__setattr__(self, "pictures", tuple(load_image(picture, what="subject") for picture in given))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the pictures as PNG in base64."""

        def encoded(picture: Image.Image) -> str:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            return base64.b64encode(buffer.getvalue()).decode()

        return {"category": self.category, "pictures": [encoded(picture) for picture in self.pictures]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Subject:
        """Read what `to_dict` wrote; `SubjectError` for anything else, `ImageError` for a picture that cannot be read."""
        if not isinstance(values, Mapping) or values.keys() != {"category", "pictures"}:
            given = sorted(values) if isinstance(values, Mapping) else f"a {type(values).__name__}"
            raise SubjectError(f"subject: {given} given; expected an object with the fields 'category' and 'pictures'")
        pictures = values["pictures"]
        if not isinstance(pictures, list) or not pictures:
            raise SubjectError(f"pictures={pictures!r:.80}; expected a list of one or more pictures as PNG in base64")
        try:
            decoded = [base64.b64decode(text, validate=True) for text in pictures]
        except (TypeError, ValueError) as error:
            raise SubjectError(f"pictures: not base64 ({error}); expected pictures as PNG in base64") from None
        return cls(decoded, values["category"])


@dataclass(frozen=True)
class Blend:
    """Where the picture may change: a mask from the words' own cross-attention, applied to the latents at every step.

    `source_words` and `target_words` name the edited words of the two prompts; the mask is the union of both regions, so
    that a new subject larger than the old one is not clipped to its silhouette. None takes the word that is swapped, and
    for the target that word and the columns of the inserted subject. `rule` names a function of `p2p_subject.blend.RULES`:
    "share" is the word's share among the content words at each pixel, "peak" the published one, the word's map over its
    maximum. `threshold` (0 to 1, of the rule's maximum; None: the rule's own) and `start`, the fraction of steps that pass
    before the first blend (LAVIS 0, null-text 0.2). `grow` dilates the mask by so many latent pixels.
    """

    source_words: tuple[Word, ...] | None = None
    target_words: tuple[Word, ...] | None = None
    rule: str = "share"
    threshold: float | None = None
    start: float = 0.0
    grow: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            raise EditSpecError(f"rule={self.rule!r}; expected the name of a rule, such as 'share'")
        checked = {
            "source_words": _words(self.source_words, "source_words"),
            "target_words": _words(self.target_words, "target_words"),
            "threshold": None if self.threshold is None else _fraction(self.threshold, "threshold"),
            "start": _fraction(self.start, "start"),
            "grow": _whole(self.grow, "grow", 0, "a whole number of latent pixels, 0 or more"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class EditSpec:
    """One edit of a source.

    `prompt` describes the edited picture; None derives it from the source's by putting the subject's category in the place
    of the swapped word. `swap` names that word and `subject` what replaces it. `cross_replace` (0.8) and `self_replace`
    (0.4) are the windows in which cross- and self-attention follow the source, `self_resolution` the largest side of
    self-attention that does (None: half the latent's larger side). `weights` scales the attention of words of the target
    prompt, within the steps of `cross_replace`. `blend` says where the picture may change; None lets all of it change.

    Raises `EditSpecError` and `SubjectError` for anything that is not an edit.
    """

    prompt: str | None = None
    swap: Word | None = None
    subject: Subject | None = None
    cross_replace: float | Window = 0.8
    self_replace: float | Window = 0.4
    self_resolution: int | None = None
    weights: Mapping[Word, float] = field(default_factory=dict, hash=False)
    blend: Blend | None = field(default_factory=Blend)

    def __post_init__(self) -> None:
        checked = {
            "swap": None if self.swap is None else _word(self.swap, "swap"),
            "cross_replace": _window(self.cross_replace, "cross_replace"),
            "self_replace": _window(self.self_replace, "self_replace"),
            "weights": _weights(self.weights),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise EditSpecError(f"prompt={self.prompt!r}; expected a text, or None with a swap and a subject")
        if self.subject is not None and not isinstance(self.subject, Subject):
            raise SubjectError(f"subject={self.subject!r}; expected Subject(picture, category)")
        if self.blend is not None and not isinstance(self.blend, Blend):
            raise EditSpecError(f"blend={self.blend!r}; expected Blend(...), or None for an edit of all of the picture")
        if self.self_resolution is not None:
            side = _whole(self.self_resolution, "self_resolution", 1, "1 or more latent pixels, or None")
            object.__setattr__(self, "self_resolution", side)
        if self.prompt is None and (self.swap is None or self.subject is None):
            raise EditSpecError("an edit needs a prompt, or a swap and a subject from which the prompt follows")
        if self.subject is not None and self.swap is None:
            raise EditSpecError("a subject was given but no word for it to replace; pass swap='cat' or use swap_subject")
        if self.weights and self.cross_replace[0] == self.cross_replace[1]:
            raise EditSpecError(
                f"weights={dict(self.weights)} can have no effect: they act in the steps of cross_replace, and "
                f"cross_replace={self.cross_replace} holds none; widen it, such as to 0.8, or leave the weights out"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A view of a mapping can be neither copied nor pickled.
        return self.__dict__ | {"weights": dict(self.weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, weights=MappingProxyType(state["weights"]))

    def to_json(self) -> str:
        """Write the edit as JSON; `from_json` reads it back equal in effect."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["subject"] = self.subject and self.subject.to_dict()
        values["blend"] = self.blend and {f.name: getattr(self.blend, f.name) for f in fields(self.blend)}
        pairs = [((word, None) if isinstance(word, str) else word, factor) for word, factor in self.weights.items()]
        values["weights"] = [[*word, factor] for word, factor in pairs]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> EditSpec:
        """Read an edit; unknown or misspelt fields are refused by name.

        `weights` is a list of [word, index or null, factor], or an object of words and factors.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise EditSpecError(f"not JSON ({error}); expected what EditSpec.to_json writes") from None
        if not isinstance(values, dict):
            raise EditSpecError(f"a JSON {type(values).__name__}; expected an object with the fields of EditSpec")
        _require_fields(cls, values)
        if values.get("subject") is not None:
            values["subject"] = Subject.from_dict(values["subject"])
        if values.get("blend") is not None:
            _require_fields(Blend, values["blend"])
            values["blend"] = Blend(**values["blend"])
        if isinstance(values.get("weights"), list):
            values["weights"] = _weights_from_list(values["weights"])
        return cls(**values)


def _weights_from_list(triples: list[Any]) -> dict[Word, Any]:
    weights = {}
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3:
            raise EditSpecError(f"weights: {triple!r}; expected [word, index or null, factor], such as ['cat', null, 2.0]")
        text, index, factor = triple
        weights[_word(text if index is None else (text, index), "a word of weights")] = factor
    return weights


def _require_fields(kind: type, values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(kind)]
    if not isinstance(values, Mapping):
        raise EditSpecError(f"{kind.__name__.lower()}={values!r}; expected an object with the fields {names}")
    for name in values:
        if name not in names:
            raise EditSpecError(f"{kind.__name__} has no field {name!r}.{did_you_mean(name, names)} Fields: {names}")


def swap_subject(word: Word, subject: Subject, **changes: Any) -> EditSpec:
    """The edit that puts `subject` where `word` of the source prompt is; `changes` are other fields of `EditSpec`.

    `cross_replace` is 0.2 here, not the 0.8 of the published subject swap: cross-attention that follows the old object
    longer keeps its shape under the new look (validation: the right subject in .68 of 50 swaps, .60 at 0.4; in .79 of 14
    swaps at 0.2 and at 0.4, .50 at 0.8).
    """
    if not isinstance(subject, Subject):
        raise SubjectError(f"subject={subject!r}; expected Subject(picture, category)")
    return replace(EditSpec(swap=word, subject=subject, cross_replace=0.2), **changes)
