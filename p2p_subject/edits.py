"""What an edit is: frozen, validated specifications and their builders. No tensors, no model.

Fractions are of the sampling steps, from the noise: `(0.0, 0.8)` is the first 80 % of them. Methods and defaults after
Prompt-to-Prompt (Hertz et al. 2022, section 3.3) and BLIP-Diffusion (Li et al. 2023, section 3.4 and released code).
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from PIL import Image

from p2p_subject.errors import EditSpecError, SubjectError, did_you_mean
from p2p_subject.images import load_image

__all__ = ["Blend", "EditSpec", "Subject", "Window", "swap_subject"]

Window = tuple[float, float]
Word = str | tuple[str, int]
"""A word or phrase of a prompt, or (word, index) where it occurs more than once; the index counts from 0."""


def _window(value: float | Sequence[float], name: str) -> Window:
    """Read a fraction f as (0, f); check that a pair lies in [0, 1] and is ordered."""
    pair = (0.0, value) if isinstance(value, int | float) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in pair) or pair[0] > pair[1]:
        raise EditSpecError(
            f"{name}={value!r}; expected a fraction of the steps between 0 and 1, or (start, stop) with start <= stop"
        )
    return float(pair[0]), float(pair[1])


def _fraction(value: float, name: str) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise EditSpecError(f"{name}={value!r}; expected a number between 0 and 1")


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
        """Read what `to_dict` wrote."""
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in values["pictures"]]
        return cls(pictures, values["category"])


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
        if self.threshold is not None:
            _fraction(self.threshold, "threshold")
        _fraction(self.start, "start")
        if not isinstance(self.grow, int) or self.grow < 0:
            raise EditSpecError(f"grow={self.grow!r}; expected a whole number of latent pixels, 0 or more")
        for name in ("source_words", "target_words"):
            words = getattr(self, name)
            if words is not None:
                object.__setattr__(self, name, tuple(w if isinstance(w, str) else tuple(w) for w in words))


@dataclass(frozen=True)
class EditSpec:
    """One edit of a source.

    `prompt` describes the edited picture; None derives it from the source's by putting the subject's category in the place
    of the swapped word. `swap` names that word and `subject` what replaces it. `cross_replace` (0.8) and `self_replace`
    (0.4) are the windows in which cross- and self-attention follow the source, `self_resolution` the largest side of
    self-attention that does (None: half the latent's larger side). `weights` scales the attention of words of the target
    prompt. `blend` says where the picture may change; None lets all of it change.
    """

    prompt: str | None = None
    swap: Word | None = None
    subject: Subject | None = None
    cross_replace: float | Window = 0.8
    self_replace: float | Window = 0.4
    self_resolution: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: Blend | None = field(default_factory=Blend)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cross_replace", _window(self.cross_replace, "cross_replace"))
        object.__setattr__(self, "self_replace", _window(self.self_replace, "self_replace"))
        if isinstance(self.swap, list):
            object.__setattr__(self, "swap", tuple(self.swap))
        if self.prompt is None and (self.swap is None or self.subject is None):
            raise EditSpecError("an edit needs a prompt, or a swap and a subject from which the prompt follows")
        if self.subject is not None and self.swap is None:
            raise EditSpecError("a subject was given but no word for it to replace; pass swap='cat' or use swap_subject")
        if self.self_resolution is not None and self.self_resolution < 1:
            raise EditSpecError(f"self_resolution={self.self_resolution}; expected 1 or more latent pixels, or None")
        for word, factor in self.weights.items():
            if not isinstance(factor, int | float) or not math.isfinite(factor):
                raise EditSpecError(f"weights[{word!r}]={factor!r}; expected a finite number")

    def to_json(self) -> str:
        """Write the edit as JSON; `from_json` reads it back equal in effect."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["subject"] = self.subject and self.subject.to_dict()
        values["blend"] = self.blend and {f.name: getattr(self.blend, f.name) for f in fields(self.blend)}
        values["weights"] = dict(self.weights)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> EditSpec:
        """Read an edit; unknown or misspelt fields are refused by name."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise EditSpecError(f"not JSON ({error}); expected what EditSpec.to_json writes") from None
        if not isinstance(values, dict):
            raise EditSpecError(f"a JSON {type(values).__name__}; expected an object with the fields of EditSpec")
        _require_fields(cls, values)
        if values.get("subject"):
            values["subject"] = Subject.from_dict(values["subject"])
        if values.get("blend"):
            _require_fields(Blend, values["blend"])
            values["blend"] = Blend(**values["blend"])
        return cls(**values)


def _require_fields(kind: type, values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            raise EditSpecError(f"{kind.__name__} has no field {name!r}.{did_you_mean(name, names)} Fields: {names}")


def swap_subject(word: Word, subject: Subject, **changes: Any) -> EditSpec:
    """The edit that puts `subject` where `word` of the source prompt is; `changes` are other fields of `EditSpec`."""
    if not isinstance(subject, Subject):
        raise SubjectError(f"subject={subject!r}; expected Subject(picture, category)")
    return replace(EditSpec(swap=word, subject=subject), **changes)
