"""What is put into a picture: one or more pictures of it and the word for it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from p2p_subject.errors import SubjectError
from p2p_subject.images import load_image


def to_base64(picture: Image.Image) -> str:
    """A picture as PNG in base64, for JSON."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Subject:
    """A subject: one or more pictures of it and the category they show ("dog").

    `pictures` takes anything `load_image` takes, or a list of them, whose embeddings are averaged; pictures are read at
    once, so that a bad one is refused before any model runs. Raises `SubjectError`, `ImageError`.
    """

    pictures: Any = field(hash=False)
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
        return {"category": self.category, "pictures": [to_base64(picture) for picture in self.pictures]}

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
