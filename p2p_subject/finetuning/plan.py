"""What a fine-tuning is asked for, read and checked before a network runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2p_subject.errors import ArgumentError
from p2p_subject.finetuning import network
from p2p_subject.finetuning.grids import GRID_STEPS
from p2p_subject.finetuning.pictures import Picture, digest, read_pictures, split
from p2p_subject.finetuning.prior import Prior
from p2p_subject.finetuning.result import base_of
from p2p_subject.finetuning.settings import Settings, filled
from p2p_subject.models import Model
from p2p_subject.prompts import require_subject_first
from p2p_subject.subject import Subject

PLAIN = ("a {category}",)
"""What pictures of the category without the subject are called."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a fine-tuning was asked for, read and checked."""

    settings: Settings
    subject: Subject
    learned: list[Picture]
    held_out: list[Picture]
    prior: Prior | None
    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    grid: tuple[str, ...]
    base: tuple[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run this run: nothing else may be found in its folder."""
        own = {"category": self.subject.category, "model": self.base[1]}
        pictures = {"pictures": digest(self.learned), "validation": digest(self.held_out)}
        return {**self.settings.to_dict(), **own, **pictures, "prior": None if self.prior is None else self.prior.identity}


def plan(model: Model, pictures: Any, category: str, masks: Any, validation: Any, prior: Any, settings: Settings) -> Plan:
    """Read and check what was given, without running a network; for the errors see `Editor.finetune`."""
    if settings.method == "lora":
        network.require_peft("method='lora'")
    if prior is not None and not settings.prior_weight:
        raise ArgumentError("prior pictures are given, but prior_weight is 0; give a weight such as 1.0, or no pictures")
    model.require_controllable()
    network.require_trainable(model)
    learned, held_out = split(read_pictures(pictures, "pictures", masks), validation, settings.seed)
    subject = Subject([picture.image for picture in learned], category)
    model.require_subject(subject)
    prompts, plain, grid = (filled(given, subject.category) for given in (settings.prompts, PLAIN, settings.grid_prompts))
    for prompt in (*prompts, *grid):
        require_subject_first(model.layout(prompt, subject=True), subject.category)
    model.layout(*plain)
    model.schedule(GRID_STEPS)
    own = Prior.of(prior, settings.prior_count) if settings.prior_weight else None
    return Plan(settings, subject, learned, held_out, own, prompts, plain, grid, base_of(model))
