"""The main job: `Editor.generate`, `Editor.invert` and `Editor.edit`. State is returned, never kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from inversion import Move, Trajectory, TrajectoryError, ddim, require_finite, walk
from p2p_subject.alignment import align
from p2p_subject.attention import map_size
from p2p_subject.blend import competitors, region, rule_of
from p2p_subject.controller import compile_edits
from p2p_subject.edits import EditSpec, Word
from p2p_subject.errors import EditSpecError
from p2p_subject.images import Frame, fit, load_image, load_mask
from p2p_subject.models import Model
from p2p_subject.outputs import feather, paste_back, restore
from p2p_subject.prompts import describe, require_subject_first, word_and_index
from p2p_subject.sampling import MapMean, Target, controlled, guided
from p2p_subject.source import Source
from p2p_subject.visible import heat_maps, latent_mask, pixel_mask, to_gray

DEFAULT_STEPS = 50


@dataclass(frozen=True, eq=False)
class EditResult:
    """An edit. Pictures have the size of the source picture.

    `image` is the edited picture (None with output_type="latent"); `mask` what was edited (mode "L", 0 or 255; None for a
    global edit; up to one latent pixel around it, pixels fade into the original); `maps` a heat map (mode "L") for each word
    that made the mask; `source_image` the picture edited; `latents` (1, C, h, w) float32; `prompt` that of the target;
    `unet_rows` the rows that all U-Net calls of the edit had.
    """

    image: Image.Image | None
    mask: Image.Image | None
    maps: dict[str, Image.Image]
    source_image: Image.Image
    latents: Tensor
    prompt: str
    unet_rows: int
    spec: EditSpec = field(repr=False)


class Editor:
    """Edits pictures with a diffusion model. Holds the model and nothing else; any number of sources may be in flight."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        **options: Any,
    ) -> Editor:
        """Load a model: None for the miniature that comes with the library, or a folder or hub name of BLIP-Diffusion.

        Raises `ModelError` for anything that is not a complete model.
        """
        return cls(Model.load(name, dtype=dtype, device=device, **options))

    def generate(
        self,
        prompt: str,
        *,
        subject: Any = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        size: tuple[int, int] | None = None,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
    ) -> Source:
        """Generate a picture and return it with its trajectory, ready to be edited.

        `subject` puts a `Subject` behind the prompt's first word ("a dog on grass"). `latents` (1, C, h, w) is the noise to
        start from; otherwise `seed` draws it (None: a random one). `size` (width, height) in pixels; None is the model's own.
        """
        model = self.model
        schedule = model.schedule(steps)
        scale = self._scale(guidance_scale)
        target = model.layout(prompt, subject=subject is not None)
        if subject is not None:
            require_subject_first(target, subject.category)
            model.require_subject(subject)
        negative = model.layout(negative_prompt)
        noise = self._noise_latents(latents, seed, size)
        embedded = None if subject is None else model.embed(subject)
        kept = [noise]

        def keep(x: Tensor, move: Move) -> Tensor:
            kept.append(x)
            return x

        maps = MapMean(map_size(model.unet, tuple(noise.shape[-2:])), steps)
        predict = guided(model.noise, model.encode(negative), model.encode(target, embedded), scale, maps)
        with model.controlled():
            walk(predict, noise, _progress("generating")(schedule.sampling()), keep)
        trajectory = Trajectory(
            torch.cat(kept[::-1]), schedule, prompt, "generated", guidance_scale=scale, fingerprint=model.fingerprint
        )
        image = model.decode(trajectory.clean)[0]
        return Source(trajectory, image, Frame(image.size, image.size), maps.mean()[0].cpu(), embedded)

    def invert(self, image: Any, prompt: str, *, steps: int = DEFAULT_STEPS, max_pixels: int | None = None) -> Source:
        """Recover the generation of a picture (PIL, path, array or tensor) that `prompt` describes.

        The picture is brought to about the area the model was trained on (at most `max_pixels`), keeping its shape; results
        are brought back. One U-Net row a step.
        """
        model = self.model
        schedule = model.schedule(steps)
        words = model.layout(prompt)
        picture = load_image(image)
        fitted, frame = fit(picture, multiple=model.multiple, max_pixels=max_pixels, area=model.area)
        latents = model.encode_images([fitted])
        maps = MapMean(map_size(model.unet, tuple(latents.shape[-2:])), steps)
        context = model.encode(words)
        predict = guided(model.noise, context, context, 1.0, maps)
        with model.controlled():
            trajectory = ddim(
                predict, latents, schedule, prompt=prompt, fingerprint=model.fingerprint, progress=_progress("inverting")
            )
        return Source(trajectory, picture, frame, maps.mean()[0].cpu())

    def heatmaps(self, source: Source, words: Sequence[Word], *, rule: str = "heat") -> list[np.ndarray]:
        """Where the source's attention to words of its prompt lies: (H, W) float32 in [0, 1] each, at the picture's size."""
        source.trajectory.require_model(self.model.fingerprint)
        layout = self.model.layout(source.prompt, subject=source.subject is not None)
        columns = [layout.columns(*word_and_index(word)) for word in words]
        score, _ = rule_of(rule)
        width, height = source.image.size
        return [region(source.attention, own, competitors(layout, own), score, (height, width)).numpy() for own in columns]

    @overload
    def edit(self, source: Source, edits: EditSpec, **options: Any) -> EditResult: ...
    @overload
    def edit(self, source: Source, edits: Sequence[EditSpec], **options: Any) -> list[EditResult]: ...

    def edit(
        self,
        source: Source,
        edits: EditSpec | Sequence[EditSpec],
        *,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        mask: Any = None,
        paste: bool = True,
        output_type: str = "pil",
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> EditResult | list[EditResult]:
        """Edit a source; one spec gives one result, a list of specs a list, run in one batch.

        `mask` (picture or array of the source's size) says where the picture may change, instead of the words' attention.
        `paste` puts the original pixels back outside the feathered mask, so the background is bit-exact. `output_type="latent"`
        skips decoding. `callback(step, latents (K, C, h, w))` is called after every step and may raise to cancel.
        """
        specs = [edits] if isinstance(edits, EditSpec) else list(edits)
        if not specs or not all(isinstance(spec, EditSpec) for spec in specs):
            raise EditSpecError(f"edits={edits!r}; expected an EditSpec, such as swap_subject(...), or a list of them")
        if output_type not in ("pil", "latent"):
            raise EditSpecError(f"output_type={output_type!r}; expected 'pil' or 'latent'")
        results = self._edit(source, specs, self._scale(guidance_scale), negative_prompt, mask, paste, output_type, callback)
        return results[0] if isinstance(edits, EditSpec) else results

    def _edit(
        self,
        source: Source,
        specs: list[EditSpec],
        scale: float,
        negative_prompt: str,
        mask: Any,
        paste: bool,
        output_type: str,
        callback: Callable[[int, Tensor], None] | None,
    ) -> list[EditResult]:
        model, trajectory = self.model, source.trajectory
        trajectory.require_model(model.fingerprint)
        original = model.layout(trajectory.prompt, subject=source.subject is not None)
        # Every word, mask and prompt is checked here, before the first network runs.
        plans = [describe(original, spec, model.layout) for spec in specs]
        for spec in specs:
            if spec.subject is not None:
                model.require_subject(spec.subject)
        given = None if mask is None else load_mask(mask, source.image.size)
        negative = model.layout(negative_prompt)
        size = tuple(trajectory.latents.shape[-2:])
        layouts = [plan.layout for plan in plans]
        alignments = [align(original, layout, replaced="map") for layout in layouts]
        controller = compile_edits(specs, alignments, layouts, trajectory.schedule.steps, size, model.device)

        fixed = None if given is None else latent_mask(given, size).to(model.device)
        targets = [
            Target(
                model.encode(plan.layout, source.subject if spec.subject is None else model.embed(spec.subject)),
                spec.blend,
                plan.source_words,
                plan.target_words,
                fixed,
            )
            for plan, spec in zip(plans, specs)
        ]
        maps = MapMean(map_size(model.unet, size), trajectory.schedule.steps)
        calls: list[int] = []

        def noise(latents: Tensor, *arguments: Any) -> Tensor:
            calls.append(len(latents))
            return model.noise(latents, *arguments)

        trajectory = trajectory.to(model.device)
        contexts = model.encode(original, source.subject), model.encode(negative)
        seen = source.attention.to(model.device)
        predict, blended = controlled(noise, trajectory, seen, *contexts, targets, controller, scale, maps)

        def after(latents: Tensor, move: Move) -> Tensor:
            latents = blended(latents, move)
            if callback is not None:
                callback(move.index, latents)
            return latents

        with model.controlled():
            start = trajectory.noise.expand(len(specs), -1, -1, -1)
            latents = walk(predict, start, _progress("editing")(trajectory.schedule.sampling()), after)

        # Pixels a side of one latent pixel: edits reach half a one beyond their mask and fade over another half.
        cell = model.scale_factor * max(source.image.size) / max(source.frame.model_size)
        images = [None] * len(specs) if output_type == "latent" else model.decode(latents)
        results = []
        for k, (spec, plan) in enumerate(zip(specs, plans)):
            attention = torch.stack([source.attention, maps.mean()[k].cpu()])
            pixels = given if given is not None else pixel_mask(targets[k], attention, source.frame, cell)
            if pixels is not None and not pixels.any():
                given_prompt = plan.layout.prompt
                warnings.warn(f"the mask of {given_prompt!r} is empty: nothing changed; lower its threshold", stacklevel=3)
            image = images[k] and restore(images[k], source.frame)
            if image is not None and paste and pixels is not None:
                image = paste_back(source.image, image, feather(pixels, round(cell / 2), cell / 2))
            results.append(
                EditResult(
                    image=image,
                    mask=None if pixels is None else to_gray(pixels),
                    maps=heat_maps(attention, plan, source.image.size),
                    source_image=source.image,
                    latents=latents[k : k + 1],
                    prompt=plan.layout.prompt,
                    unet_rows=sum(calls),
                    spec=spec,
                )
            )
        return results

    def _scale(self, guidance_scale: float | None) -> float:
        scale = self.model.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float) or not np.isfinite(scale) or scale < 0:
            raise EditSpecError(f"guidance_scale={guidance_scale!r}; expected a number of 0 or more, such as 7.5")
        return float(scale)

    def _noise_latents(self, latents: Tensor | None, seed: int | None, size: tuple[int, int] | None) -> Tensor:
        model = self.model
        channels, factor = model.unet.config.in_channels, model.scale_factor
        if latents is not None:
            if latents.ndim != 4 or latents.shape[:2] != (1, channels):
                raise TrajectoryError(f"latents of shape {tuple(latents.shape)}; expected (1, {channels}, h, w)")
            return require_finite(latents, "latents").to(model.device, torch.float32)
        width, height = size or (round(model.area**0.5),) * 2
        if width % model.multiple or height % model.multiple or min(width, height) <= 0:
            raise EditSpecError(f"size=({width}, {height}); expected positive multiples of {model.multiple}")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        # Drawn on the CPU, so that a seed means the same noise on every device.
        return torch.randn(1, channels, height // factor, width // factor, generator=generator).to(model.device)


def _progress(what: str) -> Callable[[Iterable[Move]], Iterable[Move]]:
    # disable=None: silent where stderr is not a terminal; delay: runs under two seconds show nothing.
    return lambda moves: tqdm(moves, desc=what, disable=None, delay=2, leave=False)
