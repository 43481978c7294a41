"""What `benchmarks.speed` measures: plain generation, edits, and the published way, as pieces of work with a name.

The edit is a word swap by the conventions of the published code, so that its output can be compared with the published loop's.
Plain generation runs with diffusers' own attention processors and can carry extra rows, to have as many as an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import sd15
from benchmarks.explicit import KEPT_PIXELS, explicit_attention, published_loop, published_run
from inversion import Move, Predict, guide, walk
from p2p_subject.context import stack
from p2p_subject.editor import Editor
from p2p_subject.edits import Blend, EditSpec, replace
from p2p_subject.preparing import plan, prepare
from p2p_subject.source import Source

WORD, OTHERS = "cat", ("dog", "fox", "owl", "bear")
CROSS, OWN = 0.8, 0.4
SEED = 0
BOUND = 2e-3
"""Largest difference between latents of the published loop and ours that counts as rounding, in single precision."""
BUDGET = 64 << 30
"""Bytes that a recording may take here: all of it is kept, and its size is told."""


def prompt(word: str) -> str:
    """The prompt of a picture of `word`."""
    return f"a {word} on grass"


def word_swaps(steps: int, threshold: float) -> list[EditSpec]:
    """The edit of the benchmark, and three more of the same kind."""
    # The published code gates cross-attention in the steps i < int(f * (steps + 1)).
    changes = {"padding": "reference", "cross_replace": int(CROSS * (steps + 1)) / steps, "self_replace": OWN}
    blend = {"rule": "peak", "threshold": threshold, "start": 0.2, "maps": "running"}
    return [replace(prompt(word), **changes, blend=Blend((WORD,), (word,), **blend)) for word in OTHERS]


@dataclass(frozen=True)
class Work:
    """Something to measure: `call()`, within `around()`."""

    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Bench:
    """A model, and sources to edit: made when they are first asked for, or read from `folder` if `save` wrote them there."""

    def __init__(self, editor: Editor, steps: int, folder: Path | None = None, threshold: float = 0.3) -> None:
        self.editor, self.model, self.steps, self.folder = editor, editor.model, steps, folder
        self.swaps = word_swaps(steps, threshold)
        self.scale, self.schedule = self.model.guidance_scale, self.model.schedule(steps)
        if self.scale == 1:
            raise ValueError("a model of guidance scale 1 has no unconditional rows; this benchmark counts on them")

    @classmethod
    def open(cls, model: str, device: str, dtype: torch.dtype, steps: int, folder: Path | None = None) -> Bench:
        """The bench of "miniature", of "sd15", or of a model folder."""
        if model == "sd15":
            # Maps of random weights are flat: at the published 0.3, the mask would be all of the picture.
            return cls(Editor.from_pipeline(sd15.pipeline(device, dtype)), steps, folder, threshold=0.8)
        editor = Editor.from_pretrained(None if model == "miniature" else model, device=device, dtype=dtype)
        return cls(editor, steps, folder)

    @cached_property
    def generated(self) -> Source:
        """A source that was generated."""
        return self._source("generated", lambda: self.editor.generate(prompt(WORD), seed=SEED, steps=self.steps))

    @cached_property
    def inverted(self) -> Source:
        """The inversion of its picture."""
        return self.editor.invert(self.generated.image, prompt(WORD), steps=self.steps)

    @cached_property
    def recorded(self) -> Source:
        """The generated source with a recording of all that the edits borrow."""
        return self._source("recorded", self.record)

    def _source(self, name: str, make: Callable[[], Source]) -> Source:
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        return Source.load(file) if file is not None and file.is_file() else make()

    def save(self, folder: Path) -> None:
        """Write the generated and the recorded source."""
        self.generated.save(folder / "generated.safetensors")
        self.recorded.save(folder / "recorded.safetensors", recording=True)

    @property
    def has_large_layers(self) -> bool:
        """Whether there is self-attention whose maps the published way neither edits nor keeps."""
        unet = self.model.unet
        first = "CrossAttn" in unet.config.down_block_types[0]
        return first and self.generated.trajectory.clean[0, 0].numel() > KEPT_PIXELS

    def noise(self, pictures: int) -> Tensor:
        """Noise to start from, (pictures, C, h, w); the first is the generated source's."""
        start = self.generated.trajectory.noise.to(self.model.device)
        more = torch.randn(pictures - 1, *start.shape[1:], generator=torch.Generator().manual_seed(SEED + 1))
        return torch.cat([start, more.to(start)])

    def plain(self, pictures: int, extra: int = 0) -> Predict:
        """Guided prediction of plain generation, two rows a picture and `extra` rows whose output is not used."""
        contexts = [self.model.encode(self.model.layout(prompt(word))) for word in (WORD, *OTHERS)[:pictures]]
        rows = stack([*contexts[:1] * extra, self.model.unconditional().expand(pictures), *contexts])

        def predict(latents: Tensor, move: Move) -> Tensor:
            stacked = torch.cat([*[latents[:1]] * extra, latents, latents])
            return guide(*self.model.noise(stacked, move, rows)[extra:].chunk(2), self.scale)

        return predict

    def generate(self, noise: Tensor, extra: int = 0) -> Tensor:
        """Latents of plain generation from `noise`, text encoding included."""
        return walk(self.plain(len(noise), extra), noise, self.schedule.sampling())

    def edit(self, source: Source, count: int = 1) -> Tensor:
        """Latents of the first `count` edits, in one batch."""
        made = self.editor.edit(source, self.swaps[:count], output_type="latent")
        return torch.cat([result.latents for result in made])

    def record(self) -> Source:
        """The generated source, recorded."""
        return self.editor.record(self.generated, cross_replace=1.0, self_replace=OWN, budget=BUDGET)

    def published(self, noise: Tensor, fused: bool = False) -> Tensor:
        """Latents of source and edit by the published loop, text encoding included."""
        return published_loop(self.model, prompt(WORD), self.swaps[0], noise, self.schedule, self.scale, fused)

    def plain_step(self, pictures: int, extra: int = 0) -> Work:
        """One U-Net call of plain generation."""
        predict, noise = self.plain(pictures, extra), self.noise(pictures)
        return Work(lambda: predict(noise, self.schedule.sampling()[0]))

    def edit_step(self, source: Source) -> Work:
        """One controlled call: the first, which is inside both windows; the maps that a mask is made of are read."""
        specs = self.swaps[:1]
        plans = plan(self.model, source, specs)
        run = prepare(self.model, source, specs, plans, self.scale, negative_prompt=None, first=0, progress=iter)
        noise = self.noise(1)
        return Work(lambda: run.predict(noise, self.schedule.sampling()[0]), self.model.controlled)

    def explicit_step(self) -> Work:
        """One call of the published loop."""
        noise = self.noise(1).expand(2, -1, -1, -1)
        size = tuple(noise.shape[-2:])
        run = published_run(self.model, prompt(WORD), self.swaps[0], self.steps, size, self.scale)
        return Work(
            lambda: run.predict(noise, self.schedule.sampling()[0]), lambda: explicit_attention(self.model.unet, run.editor)
        )


def _generation(pictures: int, extra: int = 0) -> Callable[[Bench], Work]:
    def work(bench: Bench) -> Work:
        noise = bench.noise(pictures)
        return Work(lambda: bench.generate(noise, extra))

    return work


def _edit(kind: str, count: int = 1) -> Callable[[Bench], Work]:
    def work(bench: Bench) -> Work:
        source = getattr(bench, kind)  # made or read now, not while the edit is measured
        return Work(lambda: bench.edit(source, count))

    return work


def _published(fused: bool = False) -> Callable[[Bench], Work]:
    def work(bench: Bench) -> Work:
        noise = bench.noise(1)
        return Work(lambda: bench.published(noise, fused))

    return work


def _record(bench: Bench) -> Work:
    bench.noise(1)  # makes the source
    return Work(bench.record)


STEPS: dict[str, Callable[[Bench], Work]] = {
    "step plain-2": lambda bench: bench.plain_step(1),
    "step recorded-2": lambda bench: bench.edit_step(bench.recorded),
    "step plain-3": lambda bench: bench.plain_step(1, 1),
    "step edit-3": lambda bench: bench.edit_step(bench.generated),
    "step plain-4": lambda bench: bench.plain_step(2),
    "step explicit-4": Bench.explicit_step,
}
RUNS: dict[str, Callable[[Bench], Work]] = {
    "run generate": _generation(1),
    "run edit-recorded": _edit("recorded"),
    "run edit-generated": _edit("generated"),
    "run edit-inverted": _edit("inverted"),
    "run published": _published(),
    "run published-fused": _published(fused=True),
    "run generate-4": _generation(4),
    "run edit-recorded-4": _edit("recorded", 4),
    "run record": _record,
}
# A peak is warmed up by the step of the same name.
PEAKS: dict[str, Callable[[Bench], Work]] = {
    "peak plain-2": _generation(1),
    "peak recorded-2": _edit("recorded"),
    "peak plain-3": _generation(1, 1),
    "peak edit-3": _edit("generated"),
    "peak plain-4": _generation(2),
    "peak explicit-4": _published(),
}
EQUALITY = "equality"


@contextmanager
def counted_rows(unet: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of every call of `unet` in a `with` block."""
    rows: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    try:
        yield rows
    finally:
        handle.remove()


def equality(bench: Bench) -> dict[str, Any]:
    """How far our edits lie from the published loop's; to be run in single precision.

    `equal` needs as well that the edit changes the source, by much more than rounding.
    """
    noise = bench.noise(1)
    truth = bench.published(noise)
    ours = bench.editor.edit(bench.generated, bench.swaps[0], output_type="latent")
    others = {
        "source": (truth[:1], bench.generated.trajectory.clean),
        "unrecorded": (truth[1:], ours.latents),
        "recorded": (truth[1:], bench.edit(bench.recorded)),
    }
    if bench.has_large_layers:
        others["fused"] = (truth, bench.published(noise, fused=True))
    deviations = {name: _furthest(*pair) for name, pair in others.items()}
    worst, changed = max(deviations.values()), _furthest(*truth.split(1))
    return {
        "deviation": worst,
        "deviations": deviations,
        "changed": changed,
        "mask": float(np.asarray(ours.mask).mean() / 255),
        "bound": BOUND,
        "equal": worst <= BOUND < changed / 10,
    }


def _furthest(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() - b.cpu()).abs().max())
