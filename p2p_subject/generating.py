"""What one call of `Editor.generate` makes: a picture a row, from arguments that may be one for all or a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inversion import Trajectory, TrajectoryError, require_finite
from inversion.walk import trace
from p2p_subject import checks
from p2p_subject.attention import map_size
from p2p_subject.context import stack
from p2p_subject.drawing import seeded_noise
from p2p_subject.errors import ArgumentError, PromptError, SubjectError
from p2p_subject.images import Frame, fit
from p2p_subject.maps import MapMean
from p2p_subject.models import Model
from p2p_subject.progress import Callback, progress, reporting
from p2p_subject.prompts import require_subject_first
from p2p_subject.sampling import guided
from p2p_subject.source import Source
from p2p_subject.structure import Structure
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
        seed = checks.whole(seed, "seed", 0, f"{checks.SEED}, a list of them, or None for random ones", checks.LAST_SEED)
    return Request(prompt, subject, seed)


def generate(
    model: Model,
    wanted: Sequence[Request],
    *,
    latents: Tensor | None,
    size: tuple[int, int] | None,
    steps: int,
    guidance_scale: float,
    negative_prompt: str | None,
    structure: Structure | None,
    callback: Callback | None,
) -> list[Source]:
    """Generate the pictures in one batch; see `Editor.generate`."""
    model.require_structure(structure)
    if structure is not None and size is None and latents is None:
        size = fit(structure.picture, multiple=model.multiple, area=model.area)[1].model_size
    schedule = model.schedule(steps)
    layouts = [model.layout(row.prompt, subject=row.subject is not None) for row in wanted]
    for row, target in zip(wanted, layouts):
        if row.subject is not None:
            require_subject_first(target, row.subject.category)
            model.require_subject(row.subject)
    noise = _noise(model, latents, [row.seed for row in wanted], size)
    if structure is not None:
        structure = structure.drawn(tuple(side * model.scale_factor for side in reversed(noise.shape[-2:])))
    maps = MapMean(map_size(model.unet, tuple(noise.shape[-2:])), steps)
    with model.controlled():
        negative = model.structured(model.unconditional(negative_prompt), structure)
        embedded = [None if row.subject is None else model.embed(row.subject) for row in wanted]
        context = model.structured(stack([model.encode(*pair) for pair in zip(layouts, embedded)]), structure)
        predict = guided(model.noise, lambda index: negative, context, guidance_scale, maps)
        kept = trace(predict, noise, progress("generating")(schedule.sampling()), reporting(callback))
        images = model.decode(kept[-1])
    path, attention = torch.stack(kept[::-1], 1), maps.mean().cpu()
    made = {"guidance_scale": guidance_scale, "fingerprint": model.fingerprint, "negative_prompt": negative_prompt}
    return [
        Source(
            Trajectory(path[k], schedule, row.prompt, "generated", **made),
            images[k],
            Frame(images[k].size, images[k].size),
            attention[k],
            embedded[k],
            structure=structure,
        )
        for k, row in enumerate(wanted)
    ]


def sides(model: Model, size: Any) -> tuple[int, int]:
    """Check a size in pixels, (width, height); `ArgumentError` for what the model cannot make."""
    own = tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else ("", "")
    if any(not isinstance(side, int) or side <= 0 or side % model.multiple for side in own):
        raise ArgumentError(f"size={size!r}; expected (width, height), positive multiples of {model.multiple}")
    return own


def _noise(model: Model, latents: Tensor | None, seeds: Sequence[int | None], size: tuple[int, int] | None) -> Tensor:
    rows, channels, factor = len(seeds), model.unet.config.in_channels, model.scale_factor
    if latents is not None:
        if latents.ndim != 4 or latents.shape[1] != channels or len(latents) not in (1, rows):
            counts = "1" if rows == 1 else f"1 or {rows}"
            raise TrajectoryError(f"latents of shape {tuple(latents.shape)}; expected ({counts}, {channels}, h, w)")
        made = tuple(side * factor for side in reversed(latents.shape[-2:]))
        if size is not None and sides(model, size) != made:
            raise ArgumentError(f"size={size!r} with latents of pictures of {made}; leave one of them out")
        latents = require_finite(latents, "latents").to(model.device, torch.float32)
        return latents.expand(rows, -1, -1, -1)
    width, height = sides(model, model.size if size is None else size)
    shape = (1, channels, height // factor, width // factor)
    return seeded_noise(shape, seeds).to(model.device)
