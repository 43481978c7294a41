"""What is put into a picture: a subject given by pictures of it, learned before, or between two others."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from p2p_subject import checks
from p2p_subject.errors import SubjectError
from p2p_subject.images import load_image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AnySubject", "EmbeddedSubject", "MixedSubject", "Subject", "to_base64"]

Encode = Callable[[list[Image.Image], str], "Tensor"]
"""The multimodal encoder: pictures and their category to embeddings (1, Nq, D), the mean over the pictures."""


def to_base64(picture: Image.Image) -> str:
    """A picture as PNG in base64, for JSON."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _word(category: Any) -> str:
    if not isinstance(category, str) or not category.strip():
        raise SubjectError(f"category={category!r}; expected the word for what the picture shows, such as 'dog'")
    return " ".join(category.split())


class AnySubject(ABC):
    """What can stand behind a prompt's first word: a category, and what the model embeds."""

    category: str
    """The word for it in prompts, such as "dog"."""

    @abstractmethod
    def embedded(self, encode: Encode) -> Tensor:
        """Embeddings (1, Nq, D); `encode` is called once for each set of pictures."""

    @property
    @abstractmethod
    def encoded(self) -> tuple[str, ...]:
        """The categories that `encode` will be given, to be checked before a network runs."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, which `Subject.from_dict` reads."""


@dataclass(frozen=True)
class Subject(AnySubject):
    """A subject: one or more pictures of it and the category they show ("dog").

    `pictures` takes anything `load_image` takes, or a list of them, whose embeddings are averaged; pictures are read at
    once, so that a bad one is refused before any model runs. Raises `SubjectError`, `ImageError`.
    """

    pictures: Any = field(hash=False)
    category: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "category", _word(self.category))
        given = self.pictures if isinstance(self.pictures, list | tuple) else [self.pictures]
        if not given:
            raise SubjectError("a subject needs at least one picture, got an empty list")
        object.__setattr__(self, "pictures", tuple(load_image(picture, what="subject") for picture in given))

    @staticmethod
    def mix(
        first: AnySubject, second: AnySubject, amount: float, *, spherical: bool = False, category: str | None = None
    ) -> MixedSubject:
        """The subject `amount` of the way from `first` (0) to `second` (1); see `MixedSubject`."""
        return MixedSubject(first, second, amount, spherical=spherical, category=category)

    def embedded(self, encode: Encode) -> Tensor:
        return encode(list(self.pictures), self.category)

    @property
    def encoded(self) -> tuple[str, ...]:
        return (self.category,)

    def to_dict(self) -> dict[str, Any]:
        return {"category": self.category, "pictures": [to_base64(picture) for picture in self.pictures]}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> AnySubject:
        """Read what `to_dict` of any kind of subject wrote.

        Raises `SubjectError` for anything else, `ImageError` for a picture that cannot be read.
        """
        for fields, read in _KINDS.items():
            if isinstance(values, Mapping) and values.keys() == set(fields):
                return read(values)
        given = sorted(values) if isinstance(values, Mapping) else f"a {type(values).__name__}"
        raise SubjectError(f"subject: {given} given; expected an object with the fields 'category' and 'pictures'")


@dataclass(frozen=True, eq=False)
class EmbeddedSubject(AnySubject):
    """A subject whose embeddings are known, such as those that fine-tuning learned; no picture is encoded.

    `embedding` (1, Nq, D) float, in the space of the text encoder's tokens of the model that made it, copied as float32.
    Raises `SubjectError`.
    """

    embedding: Tensor = field(repr=False)
    category: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "category", _word(self.category))
        shape = getattr(self.embedding, "shape", None)
        if shape is None or len(shape) != 3 or shape[0] != 1 or not bool(self.embedding.isfinite().all()):
            given = type(self.embedding).__name__ if shape is None else f"{tuple(shape)}"
            raise SubjectError(f"embedding: {given} given; expected a tensor of finite numbers (1, number of queries, width)")
        object.__setattr__(self, "embedding", self.embedding.detach().float().cpu().clone())

    # Of a tensor, `==` is a tensor.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EmbeddedSubject):
            return NotImplemented
        return self.category == other.category and self.embedding.equal(other.embedding)

    def __hash__(self) -> int:
        return hash(self.category)

    def embedded(self, encode: Encode) -> Tensor:
        return self.embedding

    @property
    def encoded(self) -> tuple[str, ...]:
        return ()

    def to_dict(self) -> dict[str, Any]:
        values = base64.b64encode(self.embedding.numpy().astype("<f4").tobytes()).decode()
        return {"category": self.category, "embedding": values, "shape": list(self.embedding.shape)}

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> EmbeddedSubject:
        import numpy as np
        import torch

        try:
            flat = np.frombuffer(base64.b64decode(values["embedding"], validate=True), "<f4")
            return cls(torch.from_numpy(flat.reshape(values["shape"]).copy()), values["category"])
        except (TypeError, ValueError) as error:
            raise SubjectError(f"embedding: {error}; expected float32 in base64, and its shape as a list") from None


@dataclass(frozen=True)
class MixedSubject(AnySubject):
    """A subject between two others, along the line between their embeddings (Li et al. 2023, on interpolation).

    `amount` in [0, 1]: 0 is `first`, 1 is `second`. `spherical` turns each query's embedding from one direction to the other
    and changes its length linearly, instead of going straight. `category` is the word in prompts; None takes that of the
    nearer one. Mixtures can be mixed. Raises `SubjectError`.
    """

    first: AnySubject
    second: AnySubject
    amount: float
    spherical: bool = False
    category: str | None = None

    def __post_init__(self) -> None:
        for name, part in (("first", self.first), ("second", self.second)):
            if not isinstance(part, AnySubject):
                raise SubjectError(f"{name}={part!r}; expected Subject(picture, category)")
        if not checks.is_number(self.amount, 0, 1):
            raise SubjectError(f"amount={self.amount!r}; expected a number between 0 (the first subject) and 1 (the second)")
        object.__setattr__(self, "amount", float(self.amount))
        nearer = self.first if self.amount < 0.5 else self.second
        object.__setattr__(self, "category", nearer.category if self.category is None else _word(self.category))

    def embedded(self, encode: Encode) -> Tensor:
        first, second = self.first.embedded(encode), self.second.embedded(encode)
        if first.shape != second.shape:
            raise SubjectError(
                f"embeddings of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be mixed; they are of two models"
            )
        return (_turned if self.spherical else _straight)(first, second.to(first), self.amount)

    @property
    def encoded(self) -> tuple[str, ...]:
        return self.first.encoded + self.second.encoded

    def to_dict(self) -> dict[str, Any]:
        mixed = {"amount": self.amount, "spherical": self.spherical, "category": self.category}
        return mixed | {"first": self.first.to_dict(), "second": self.second.to_dict()}

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> MixedSubject:
        parts = {name: Subject.from_dict(values[name]) for name in ("first", "second")}
        return cls(**{**values, **parts})


def _straight(first: Tensor, second: Tensor, amount: float) -> Tensor:
    return (1 - amount) * first + amount * second


def _turned(first: Tensor, second: Tensor, amount: float) -> Tensor:
    """Spherical interpolation of each vector's direction, linear of its length."""
    lengths = first.norm(dim=-1, keepdim=True), second.norm(dim=-1, keepdim=True)
    ends = [part / length.clamp_min(1e-12) for part, length in zip((first, second), lengths)]
    angle = (ends[0] * ends[1]).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    # Where directions agree, or are opposite and name no plane to turn in, the straight way is taken.
    sine = angle.sin()
    shares = ((1 - amount) * angle).sin() / sine, (amount * angle).sin() / sine
    turned = (shares[0] * ends[0] + shares[1] * ends[1]) * _straight(*lengths, amount)
    return turned.where(sine > 1e-4, _straight(first, second, amount))


def _read_pictures(values: Mapping[str, Any]) -> Subject:
    pictures = values["pictures"]
    if not isinstance(pictures, list) or not pictures:
        raise SubjectError(f"pictures={pictures!r:.80}; expected a list of one or more pictures as PNG in base64")
    try:
        decoded = [base64.b64decode(text, validate=True) for text in pictures]
    except (TypeError, ValueError) as error:
        raise SubjectError(f"pictures: not base64 ({error}); expected pictures as PNG in base64") from None
    return Subject(decoded, values["category"])


_KINDS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], AnySubject]] = {
    ("category", "pictures"): _read_pictures,
    ("category", "embedding", "shape"): EmbeddedSubject._read,
    ("first", "second", "amount", "spherical", "category"): MixedSubject._read,
}
