"""The main job: `Editor.generate`, `Editor.invert` and `Editor.edit`. State is returned, never kept."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from inversion import walk
from p2p_subject import checks, inverting
from p2p_subject.attention import map_size
from p2p_subject.blend import competitors, region, rule_of
from p2p_subject.controller import steps_of
from p2p_subject.edits import Blend, EditSpec, Word
from p2p_subject.errors import ArgumentError, EditSpecError, SubjectError
from p2p_subject.gathering import gather
from p2p_subject.generating import generate, requests
from p2p_subject.images import fit, load_image
from p2p_subject.maps import MapMean
from p2p_subject.models import Model
from p2p_subject.preparing import identities, layout_of, plan, prepare
from p2p_subject.progress import Callback, progress, reporting
from p2p_subject.prompts import word_and_index
from p2p_subject.results import EditResult, result_of
from p2p_subject.source import Source
from p2p_subject.structure import Structure
from p2p_subject.subject import AnySubject, EmbeddedSubject

if TYPE_CHECKING:
    from p2p_subject.finetuning import Finetuned

DEFAULT_STEPS = 50
BUDGET = 2 << 30
"""Bytes a recording may take by default: 2 GiB; at 512x512 pixels in half precision, 50 steps need about 1.4."""


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
        """Load a model: None for the miniature that comes with the library, or a folder or hub name.

        BLIP-Diffusion, Stable Diffusion 1.x, 2.x and XL, and folders of models that were fine-tuned (`base=` names the model
        they were made from where it is not found). `controlnet=` puts a ControlNet beside the U-Net, for `control=` of the
        calls below: a folder, a hub name, a `ControlNetModel`, or "edges", that of the miniature. Raises `ModelError` for
        anything that is not a complete model.
        """
        return cls(Model.load(name, dtype=dtype, device=device, **options))

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> Editor:
        """Edit with a pipeline that is loaded already: moved, offloaded, compiled, with a LoRA. Its scheduler's noise levels
        are used, its sampling is not. Raises `ModelError` for one that cannot be edited with."""
        return cls(Model.of(pipeline))

    @overload
    def generate(
        self, prompt: str, *, subject: AnySubject | None = None, seed: int | None = None, **options: Any
    ) -> Source: ...
    @overload
    def generate(self, prompt: str | Sequence[str], **options: Any) -> list[Source]: ...

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        subject: AnySubject | Sequence[AnySubject | None] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        size: tuple[int, int] | None = None,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        callback: Callback | None = None,
        control: Any = None,
        control_strength: float = 1.0,
    ) -> Source | list[Source]:
        """Generate a picture and return it with its trajectory, ready to be edited.

        `prompt`, `subject` and `seed` may be lists: B pictures, a list of sources, in one batch; a value that is not in a list
        serves every row. `subject` puts a `Subject` behind the prompt's first word ("a dog on grass"). `latents` (1 or B, C, h,
        w) is the noise to start from; otherwise `seed` draws it (None: a random one). `size` (width, height) in pixels; None is
        the model's own, or of the shape of `control`. `callback` as in `edit`. `control` is what the model's ControlNet keeps
        the structure to, as strongly as `control_strength`: a control picture (see `control_image`), or its kind and a picture
        to make it of, such as ("canny", "photo.png"). Edits of the result keep to it too.

        The steps are DDIM's, which edits need. To sample by another scheduler, with the prompt's strength of BLIP-Diffusion and
        its repetition, call the pipeline, `editor.model.pipeline`.
        """
        self.model.require_controllable()
        wanted, several = requests(prompt, subject, seed)
        sources = generate(
            self.model,
            wanted,
            latents=latents,
            size=size,
            steps=steps,
            guidance_scale=self.guidance_scale(guidance_scale),
            negative_prompt=negative_prompt,
            structure=Structure.read(control, control_strength),
            callback=callback,
        )
        return sources if several else sources[0]

    def stylize(
        self,
        structure: Any,
        *,
        style: AnySubject,
        prompt: str,
        control: Any = "canny",
        control_strength: float = 1.0,
        **options: Any,
    ) -> Source:
        """Subject-driven style transfer (Li et al. 2023): the style of one picture, the structure of another.

        `style`, such as `Subject("flower.png", "flower")`, is the subject of a generation that keeps to the structure of the
        picture `structure`; `prompt` says what it shows, beginning with an article, behind which the style is inserted: "a
        teapot on a marble table". `control` is the kind of control picture that is made of `structure`, or one that is drawn
        already. `options` are those of `generate`; without a `size`, the picture has the shape of `structure`. Raises
        `ArgumentError` where the model carries no ControlNet.
        """
        if not isinstance(style, AnySubject):
            raise SubjectError(f"style={style!r}; expected Subject(picture, category)")
        if control is None or isinstance(control, tuple):
            given = "None" if control is None else "(kind, picture)"
            raise ArgumentError(f"control={given}; expected a kind of control picture, such as 'canny', or one that is drawn")
        kept = Structure.read(control, control_strength, of=load_image(structure, what="structure"))
        given = kept.picture if kept.kind is None else (kept.kind, kept.picture)
        return self.generate(prompt, subject=style, control=given, control_strength=control_strength, **options)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str,
        *,
        method: str = "direct",
        steps: int = DEFAULT_STEPS,
        max_pixels: int | None = None,
        record: bool = False,
        callback: Callback | None = None,
        control: Any = None,
        control_strength: float = 1.0,
        **options: Any,
    ) -> Source:
        """Recover the generation of a picture (PIL, path, array or tensor) that `prompt` describes.

        The picture is brought to about the area the model was trained on (at most `max_pixels`), keeping its shape; results
        are brought back. `record` makes later edits cheaper, see `Editor.record`; `callback(step, latents)` is called when a
        step begins, and again when it is recorded. With a ControlNet, `control` is the control picture, or the kind of it to be
        made from the picture, such as "canny", and `control_strength` how much it counts; edits of the source keep to it too.
        `method` and its `options`:

        - "direct" (Ju et al. 2024): DDIM inversion, the source read from the stored latents. One U-Net row a step.
        - "ddim" (Song et al. 2021): the source is generated again with guidance, as first published; it drifts.
        - "fixed_point" (Pan et al. 2023): each step iterated `iterations` times until it is the inverse of sampling.
        - "negative_prompt" (Miyake et al. 2023): guidance against the source's own prompt; `proximal` (Han et al. 2023), a
          quantile such as 0.7, drops the guidance that is smaller.
        - "null_text" (Mokady et al. 2023): unconditional embeddings optimised, step by step, so that sampling with
          `guidance_scale` gives the picture; at most `inner_steps` gradients each, `optimiser` "conjugate" or, as published,
          "adam".
        - "edit_friendly" (Huberman-Spiegelglas et al. 2024): DDPM noise maps of noise drawn with `seed`, found at
          `guidance_scale` (3.5); edit with `skip`, 0.36 in the paper.

        Raises `ArgumentError` for another method or option.
        """
        model = self.model
        inverting.check(method, options, scale=model.guidance_scale, record=record)
        model.require_controllable()
        schedule = model.schedule(steps)
        words = model.layout(prompt)
        picture = load_image(image)
        fitted, frame = fit(picture, multiple=model.multiple, max_pixels=max_pixels, area=model.area)
        structure = Structure.read(control, control_strength, of=picture)
        model.require_structure(structure)
        structure = None if structure is None else structure.drawn(frame.model_size)
        with model.controlled(), model.frozen():
            latents = model.encode_images([fitted])
            run = inverting.Inversion(
                noise=model.noise,
                latents=latents,
                schedule=schedule,
                context=model.structured(model.encode(words), structure),
                unconditional=model.structured(model.unconditional(None), structure),
                scale=model.guidance_scale,
                maps=MapMean(map_size(model.unet, tuple(latents.shape[-2:])), steps),
                prompt=prompt,
                fingerprint=model.fingerprint,
                progress=progress("inverting"),
                callback=callback,
            )
            trajectory = inverting.METHODS[method](run, **options)
        source = Source(trajectory, picture, frame, run.maps.mean()[0].cpu(), structure=structure)
        return self.record(source, callback=callback) if record else source

    @torch.no_grad()
    def record(
        self,
        source: Source,
        *,
        cross_replace: float = 0.8,
        self_replace: float = 0.4,
        self_resolution: int | None = None,
        budget: int = BUDGET,
        device: torch.device | str | None = None,
        callback: Callback | None = None,
    ) -> Source:
        """Gather, in one pass over a source's stored steps, what its edits borrow; they then run two U-Net rows a step.

        Kept are the queries of cross-attention in the first `cross_replace` of the steps and the queries and keys of
        self-attention of at most `self_resolution` in the first `self_replace`: edits with wider windows run a third row in the
        steps beyond. `budget` bytes are not exceeded: later steps are left out, with a warning. `device`: where it is kept
        (None: with the model; "cpu" to spare a GPU's memory). `callback(step, latents)` is called when a step begins.
        """
        return gather(
            self.model,
            source,
            checks.window(cross_replace, "cross_replace"),
            checks.window(self_replace, "self_replace"),
            self_resolution,
            checks.whole(budget, "budget", 0, "a whole number of bytes, such as 2 << 30"),
            device,
            callback,
        )

    def heatmaps(self, source: Source, words: Sequence[Word], *, rule: str = "heat") -> list[np.ndarray]:
        """Where the source's attention to words of its prompt lies: (H, W) float32 in [0, 1] each, at the picture's size."""
        if isinstance(words, str):
            raise ArgumentError(f"words={words!r}; expected a list of words, such as [{words!r}]")
        source.trajectory.require_model(self.model.fingerprint)
        layout = layout_of(self.model, source)
        columns = [layout.columns(*word_and_index(word)) for word in words]
        score = rule_of(rule)
        width, height = source.image.size
        return [region(source.attention, own, competitors(layout, own), score, (height, width)).numpy() for own in columns]

    @overload
    def edit(self, source: Source, edits: EditSpec, **options: Any) -> EditResult: ...
    @overload
    def edit(self, source: Source, edits: Sequence[EditSpec], **options: Any) -> list[EditResult]: ...

    @torch.no_grad()
    def edit(
        self,
        source: Source,
        edits: EditSpec | Sequence[EditSpec],
        *,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        mask: Any = None,
        skip: float = 0.0,
        paste: bool = True,
        output_type: str = "pil",
        callback: Callback | None = None,
    ) -> EditResult | list[EditResult]:
        """Edit a source; one spec gives one result, a list of specs a list, run in one batch.

        `guidance_scale` None is that of the source, if it was made with guidance, else the model's. `mask` (picture or array
        of the source's size) says where the picture may change, instead of the words' attention; `Blend(mask=...)` says it for
        one spec of several. `skip` leaves out that fraction of the steps, from the noise: the edit begins at the source's own
        latents there. `paste` puts the original pixels back outside the feathered mask, so the background is bit-exact.
        `output_type="latent"` skips decoding. `callback(step, latents (K, C, h, w))` is called after every step; it may raise
        to cancel, and `editor.model.decode(latents)` is a preview.
        """
        specs = [edits] if isinstance(edits, EditSpec) else edits
        if not isinstance(specs, Sequence) or not specs or not all(isinstance(spec, EditSpec) for spec in specs):
            raise EditSpecError(f"edits={edits!r}; expected an EditSpec, such as swap_subject(...), or a list of them")
        if output_type not in ("pil", "latent"):
            raise ArgumentError(f"output_type={output_type!r}; expected 'pil' or 'latent'")
        model, schedule = self.model, source.trajectory.schedule
        first = len(steps_of((0.0, skip), schedule.steps)) if checks.is_number(skip, 0, 1) else None
        if first in (None, schedule.steps):
            raise ArgumentError(f"skip={skip!r}; expected the fraction of steps to leave out, from 0 to below 1")
        if mask is not None:
            specs = [dataclasses.replace(s, blend=dataclasses.replace(s.blend or Blend(), mask=mask)) for s in specs]
        scale = self.guidance_scale(guidance_scale, source)
        plans = plan(model, source, specs)
        if source.trajectory.method == "null_text" and scale != (served := source.trajectory.guidance_scale):
            told = f"the source's null-text inversion serves guidance_scale={served:g}, which this edit's {scale:g} is not"
            warnings.warn(f"{told}: the source will not be found again; invert the picture with that scale", stacklevel=3)
        for prompt in identities(model, source, specs, plans):
            warnings.warn(f"the edit {prompt!r} is the identity: prompt and weights are the source's own", stacklevel=3)
        with model.controlled():
            run = prepare(model, source, specs, plans, scale, negative_prompt, first, progress("replaying the source"))
            start = run.source.before(first).expand(len(specs), -1, -1, -1)
            moves = progress("editing")(schedule.sampling()[first:])
            latents = walk(run.predict, start, moves, reporting(callback, run.after), noises=run.source.noises)
            images = [None] * len(specs) if output_type == "latent" else model.decode(latents)
        results = [
            result_of(k, run, source, spec, plans[k], latents[k : k + 1], images[k], model.scale_factor, paste)
            for k, spec in enumerate(specs)
        ]
        for result in results:
            if result.mask is not None and result.mask.getbbox() is None:
                warnings.warn(f"the mask of {result.prompt!r} is empty: nothing changed; lower its threshold", stacklevel=3)
        return results[0] if isinstance(edits, EditSpec) else results

    def finetune(
        self,
        pictures: Any,
        category: str,
        *,
        steps: int = 80,
        masks: Any = None,
        validation: Any = None,
        prior: Any = None,
        out: str | Path | None = None,
        callback: Callable[[int, float], None] | None = None,
        **options: Any,
    ) -> Finetuned:
        """Learn a subject from a few pictures of it; returns a new model, this one stays as it is, bit for bit.

        The mean embedding of the pictures, computed once, stands in the prompt from the first step on, so that 40 to 120 steps
        do (Li et al. 2023, on fine-tuning). `tuned.editor` edits with the result, `tuned.subject` is what its `generate` and
        `swap_subject` take, `tuned.save(folder)` keeps both without the pictures.

        `pictures`: a folder, or a list of anything that an image can be given as, of any shapes. `masks`: where the subject is,
        one for each picture or a folder with files of the same names; what lies outside does not count in the loss (the encoder
        sees all of a picture). Without, a picture's transparency is its mask. `validation`: other pictures of the subject, or
        the share of `pictures` that is held out; the weights that do best on them are kept, and the run ends when they stop to
        gain. `prior`: pictures of the category, or the folder to generate them into once, for `prior_weight=`; None generates
        them for this run. `out`: a folder for the result, with grids of pictures on the way and, by LoRA, the model as it
        is beside each (`run/step-00040`, loaded as the result is); a run that was killed goes on when it is asked for again.
        `callback(step, loss)` is called after every step and may raise to cancel.
        `options`: the fields of `p2p_subject.finetuning.Settings`, such as `method="full"`, `rank=16` or `learning_rate=1e-4`.

        Memory beside the model: with "lora" (the default; needs peft) the additions alone, which share the U-Net's weights;
        with "full" four times the U-Net in float32 while it trains (weights, gradients, two moments; 14 GB for Stable
        Diffusion 1.5), and one U-Net afterwards; with both, the activations of `batch` rows.

        Raises `ArgumentError`, `SubjectError`, `PromptError`, `ImageError`, `MaskError`, `ModelError`, `OutputError` before a
        network runs; `NonFiniteError` where the loss diverges.
        """
        from p2p_subject import finetuning

        given = {"masks": masks, "validation": validation, "prior": prior, "out": out, "callback": callback}
        return finetuning.finetune(self.model, pictures, category, steps=steps, **given, **options)

    @property
    def subject(self) -> EmbeddedSubject | None:
        """The subject that the model was fine-tuned on, for `generate` and `swap_subject`; None for any other model."""
        return self.model.subject

    def guidance_scale(self, guidance_scale: float | None = None, source: Source | None = None) -> float:
        """The scale that a call uses: for None that of the source, if it was made with guidance, else the model's."""
        if guidance_scale is None:
            made = 1.0 if source is None else source.trajectory.guidance_scale
            return self.model.guidance_scale if made == 1 else made
        if not checks.is_number(guidance_scale, 0):
            raise ArgumentError(f"guidance_scale={guidance_scale!r}; expected a number of 0 or more, such as 7.5")
        return float(guidance_scale)
