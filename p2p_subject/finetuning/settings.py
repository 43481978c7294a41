"""How a fine-tuning is run, checked when it is stated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from p2p_subject import checks
from p2p_subject.errors import ArgumentError, did_you_mean

METHODS = ("lora", "full")
RATES = {"full": 5e-5, "lora": 1e-3}
"""Constant learning rates of the U-Net: the paper's, and what 80 steps of low-rank weights took on the miniature."""


@dataclass(frozen=True)
class Settings:
    """How a fine-tuning is run. The defaults are those of the paper (Li et al. 2023, on fine-tuning), where it states one.

    - `steps`: optimiser steps; the paper takes 40 to 120.
    - `method`: "lora" trains low-rank additions to the attention weights (a few MB), "full" every weight of the U-Net.
    - `learning_rate`: constant, of AdamW; None is 5e-5 for "full", as published, and 1e-3 for "lora".
    - `batch`: pictures a step; each counts equally often.
    - `rank`, `alpha`: of the LoRA, whose additions count alpha / rank; `alpha` None is the rank.
    - `train_embedding`: the subject's embedding is trained as well, at `embedding_rate`; published: only computed.
    - `weight_decay`: of AdamW.
    - `prompts`: what the pictures are called; {category} is filled in and the subject inserted behind the first word. With
      several, one is drawn for each picture of a step.
    - `prior_weight`: above 0, pictures of the category without the subject are learned as well, with this weight, so that
      the word keeps its meaning (Ruiz et al. 2023, "DreamBooth", eq. 2); `prior_count` of them are generated.
    - `validate_every`, `patience`: with held-out pictures, how often in steps their loss is measured, and after how many
      measurements without a better one the run ends (0: never).
    - `checkpoint_every`: with a folder, how often in steps the state and a grid of pictures are written; by LoRA also a
      folder that loads as the result does.
    - `grid_prompts`: what the pictures of the grids show.
    - `gradient_checkpointing`: less memory for activations, about a third more time.
    - `seed`: the same seed gives the same weights on the same machine.

    Raises `ArgumentError`.
    """

    steps: int = 80
    method: str = "lora"
    learning_rate: float | None = None
    batch: int = 3
    rank: int = 8
    alpha: float | None = None
    train_embedding: bool = False
    embedding_rate: float = 1e-3
    weight_decay: float = 0.01
    prompts: tuple[str, ...] = ("a {category}",)
    prior_weight: float = 0.0
    prior_count: int = 24
    validate_every: int = 10
    patience: int = 3
    checkpoint_every: int = 40
    grid_prompts: tuple[str, ...] = ("a {category}", "a {category} on grass", "a {category} on snow")
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            close = did_you_mean(self.method, METHODS) if isinstance(self.method, str) else ""
            raise ArgumentError(f"method={self.method!r};{close} expected 'lora' or 'full'")
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            _require(checks.is_whole(value, low), name, value, f"a whole number of {low} or more")
            _require(name != "seed" or value <= checks.LAST_SEED, name, value, checks.SEED)
            object.__setattr__(self, name, int(value))
        for name in ("learning_rate", "embedding_rate", "alpha"):
            value = getattr(self, name)
            optional = value is None and name != "embedding_rate"
            _require(optional or (checks.is_number(value, 0) and value > 0), name, value, "a number above 0")
            object.__setattr__(self, name, None if value is None else float(value))
        for name in ("weight_decay", "prior_weight"):
            value = getattr(self, name)
            _require(checks.is_number(value, 0), name, value, "a number of 0 or more")
            object.__setattr__(self, name, float(value))
        for name in ("train_embedding", "gradient_checkpointing"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "True or False")
        for name in ("prompts", "grid_prompts"):
            value = getattr(self, name)
            texts = isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value)
            named = texts and all("{category}" in text for text in value)
            _require(named, name, value, "a list of texts that each hold {category}, such as ['a {category}']")
            object.__setattr__(self, name, tuple(value))

    @property
    def rate(self) -> float:
        """The learning rate of the U-Net."""
        return RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def lora_alpha(self) -> float:
        """The LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Settings of named options; `ArgumentError` names one that there is not."""
        for name in options.keys() - cls.__dataclass_fields__.keys():
            known = sorted(cls.__dataclass_fields__)
            raise ArgumentError(f"fine-tuning takes no {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, which `of` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def filled(prompts: Sequence[str], category: str) -> tuple[str, ...]:
    """Prompts with the category in them, the article before it made to fit: "an owl"."""
    articles = re.compile(r"\b([aA])n?(?=\s+\{category\})")
    fitting = r"\1n" if category[0].lower() in "aeiou" else r"\1"
    return tuple(articles.sub(fitting, prompt).replace("{category}", category) for prompt in prompts)


_WHOLE = {
    "steps": 1, "batch": 1, "rank": 1, "prior_count": 1, "validate_every": 1, "patience": 0, "checkpoint_every": 1, "seed": 0,
}  # fmt: skip
"""The whole numbers among the settings, and the least that each may be."""


def _require(right: Any, name: str, value: Any, expected: str) -> None:
    if not right:
        raise ArgumentError(f"{name}={value!r}; expected {expected}")
