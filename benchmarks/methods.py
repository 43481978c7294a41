"""The methods that are compared, by name: an inversion and an edit each, as data; and any function of a user.

A method is called as `method(editor, case)` and returns `Edited`. A user's own is named "module:function":

    def mine(editor: Editor, case: Case) -> Edited: ...
    mine.mask_input = True                               # only if it looks at case.mask, case.truth or the rest of the answer
    mine.applies = lambda case: bool(case.references)    # only if it is not for every case

The ancestors run with the settings that they were published with, over this library's attention control, which gives the
same latents as the published loops: their rows and seconds are this library's, fewer than published where the source is read
from the inversion, as many or more where it is generated again, which goes before the edit here (DDIM: 300 rows of 50 steps
for 250). Guidance is the model's own scale: 7.5 on public models, as published, and 3 on the miniature. No ancestor puts
original pixels back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.suite import Case, Edited
from inversion import Trajectory, reconstruct
from inversion.trajectory import TENSORS
from p2p_subject.blip_diffusion.presets import PAPER
from p2p_subject.editor import Editor
from p2p_subject.edits import Blend, EditSpec, Subject, add, remove, swap_subject
from p2p_subject.images import fit
from p2p_subject.outputs import restore
from p2p_subject.preparing import context_of
from p2p_subject.results import EditResult, rim
from p2p_subject.source import Source

MethodFunction = Callable[[Editor, Case], Edited]
PIE_BENCH = "pie"
SOURCES = ("stored", "unguided", "guided")


@dataclass(frozen=True)
class Method:
    """An inversion and an edit through the public editor.

    `inversion` with its `options`, `steps`, `guidance_scale` (None: the model's own), `skip` and `paste` are those of
    `Editor.invert` and `Editor.edit`. `edit` are fields of `EditSpec`, `blend` fields of `Blend` (None: all of the picture may
    change), whose words are the case's. `by_words` are further fields of edits by words that put something in, `pie` of those
    on PIE-Bench; `weight` among these is that of the target's words. `self_share` is the largest side of self-attention that
    follows the source, as a share of the latent's (None: as in `edit`); published sides are of latents of 64. `published`
    aligns prompts as the published controllers do: "replace" for prompts of as many words, "refine" for others and for
    subjects, unless the fields say; what it does not set is as in `EditSpec`, not as in `swap_subject`. `source` is what the
    edit follows and blends with: "stored", the latents of the inversion (of "ddim" those that it replays), or the source's
    generation from its noise, "unguided" or "guided" as the edit is. `subjects`: for swaps alone. `mask_input`: given the true
    mask.
    """

    paper: str
    inversion: str = "direct"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 50
    guidance_scale: float | None = None
    skip: float = 0.0
    paste: bool = False
    edit: Mapping[str, Any] = field(default_factory=dict)
    blend: Mapping[str, Any] | None = field(default_factory=dict)
    by_words: Mapping[str, Any] = field(default_factory=dict)
    pie: Mapping[str, Any] = field(default_factory=dict)
    self_share: float | None = None
    published: bool = False
    source: str = "stored"
    subjects: bool = False
    mask_input: bool = False

    def applies(self, case: Case) -> bool:
        """Whether the method can be asked for the case: there is something to edit, and what the method needs."""
        known = (not self.subjects or bool(case.references)) and (not self.mask_input or case.mask is not None)
        return case.source is not None and known

    def spec(self, case: Case, takes_subjects: bool) -> EditSpec:
        """The edit of a case; a model that takes no subjects gets a swap as the word alone."""
        with_subject = takes_subjects and bool(case.references)
        given = dict(self.edit) if with_subject else dict(self.edit) | dict(self.by_words)
        if case.suite == PIE_BENCH:
            given |= self.pie
        weight = given.pop("weight", None)
        if weight is not None and case.target_words:
            given["weights"] = dict.fromkeys(case.target_words, weight)
        given["blend"] = self._blend(case, with_subject)
        if self.published:
            refines = with_subject or len(case.prompt.split()) != len(case.target_prompt.split())
            given = {"alignment": "refine" if refines else "replace", "padding": "reference"} | given
        if with_subject:
            subject = Subject(list(case.references), case.category)
            if self.published:
                return EditSpec(swap=case.source_words[0], subject=subject, **given)
            return swap_subject(case.source_words[0], subject, **given)
        # Room is for what is swapped for a word.
        given.pop("room", None)
        if not self.published and given["blend"] is not None:
            # Windows are these edits' own, unless they are set for all edits; a removal has none for weights to act in.
            if case.adds:
                asked = {name: value for name, value in self.edit.items() if name != "room"}
                return add(list(case.target_words), case.target_prompt, **asked, blend=given["blend"])
            if case.removes:
                asked = {name: value for name, value in self.edit.items() if name not in ("room", "weights")}
                return remove(list(case.source_words), case.target_prompt, **asked, blend=given["blend"])
        return EditSpec(prompt=case.target_prompt, **given)

    def _blend(self, case: Case, with_subject: bool) -> Blend | None:
        if self.mask_input:
            return Blend(mask=case.mask, **dict(self.blend or {}))
        if self.blend is None:
            return None
        # With a subject, the target's words are its category and its own columns, which the editor knows.
        words = {"source_words": case.source_words, "target_words": None if with_subject else case.target_words}
        blend = Blend(**words | dict(self.blend))
        return blend if blend.source_words or blend.target_words or with_subject else None

    def __call__(self, editor: Editor, case: Case) -> Edited:
        # Of the methods, edit-friendly inversion alone draws noise.
        drawn = {"seed": case.seed} if self.inversion == "edit_friendly" else {}
        source = editor.invert(case.source, case.prompt, method=self.inversion, steps=self.steps, **drawn | dict(self.options))
        if self.source == "guided":
            source = replace(source, trajectory=replace(source.trajectory, replay=True))
        elif self.source == "unguided":
            source = reconstructed(editor, source)
        spec = self.spec(case, editor.model.queries > 0)
        if self.self_share is not None:
            side = max(source.trajectory.latents.shape[-2:])
            spec = replace(spec, self_resolution=max(1, round(self.self_share * side)))
        result = editor.edit(source, spec, guidance_scale=self.guidance_scale, skip=self.skip, paste=self.paste)
        return Edited(
            result.image,
            result.mask,
            unpasted=(lambda: unpasted(editor, source, result)) if self.paste and result.mask is not None else None,
            reach=reach(editor, source, spec) if self.paste else 0.0,
            trajectory=fingerprint(source.trajectory),
        )


def reach(editor: Editor, source: Source, spec: EditSpec) -> float:
    """Pixels beyond the mask that a pasted edit may change: its feather."""
    return 0.0 if spec.blend is None else sum(rim(spec.blend, source.frame, editor.model.scale_factor))


def unpasted(editor: Editor, source: Source, result: EditResult) -> Image.Image:
    """The edited picture as it was decoded, at the source's size."""
    return restore(editor.model.decode(result.latents)[0], source.frame)


@torch.no_grad()
def reconstructed(editor: Editor, source: Source) -> Source:
    """The source with the latents of its generation from the noise, without guidance; a U-Net row a step."""
    model, context = editor.model, context_of(editor.model, source)
    path = reconstruct(lambda latents, move: model.noise(latents, move, context), source.trajectory.to(model.device))
    return replace(source, trajectory=path)


def fingerprint(trajectory: Trajectory) -> str:
    """Short hash of all the tensors of a trajectory, bit for bit: two machines that agree on it edited the same generation."""
    digest = hashlib.sha256()
    for name in TENSORS:
        if (values := getattr(trajectory, name)) is not None:
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Generation:
    """Generation of the target's prompt, with the subject if there is one, from noise of the case's seed; no source is seen."""

    steps: int = 50
    guidance_scale: float | None = None
    paper: str = "Li et al. 2023, generation alone"
    mask_input: bool = False

    def applies(self, case: Case) -> bool:
        """Every case has a prompt."""
        return True

    def __call__(self, editor: Editor, case: Case) -> Edited:
        model = editor.model
        subject = Subject(list(case.references), case.category) if case.references and model.queries else None
        frame = None if case.source is None else fit(case.source, multiple=model.multiple, area=model.area)[1]
        made = editor.generate(
            case.target_prompt,
            subject=subject,
            seed=case.seed,
            size=None if frame is None else frame.model_size,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
        )
        image = made.image if case.size in (None, made.image.size) else made.image.resize(case.size, Image.Resampling.LANCZOS)
        return Edited(image, trajectory=fingerprint(made.trajectory))


@dataclass(frozen=True)
class BlipDiffusion:
    """Generation of a subject by BLIP-Diffusion's own pipeline, with the settings of its paper's figures on DreamBench."""

    paper: str = "Li et al. 2023, section 4"
    mask_input: bool = False

    def applies(self, case: Case) -> bool:
        """Generations of a subject that the prompt names."""
        return case.source is None and bool(case.references)

    def __call__(self, editor: Editor, case: Case) -> Edited:
        pipeline = editor.model.pipeline
        # A run has a bar of its own.
        pipeline.set_progress_bar_config(disable=True)
        # "a red dog in the snow": the pipeline is told "red dog" and "in the snow", and says "a" itself.
        before, category, after = case.prompt.partition(case.category)
        made = pipeline(
            after.strip(),
            [list(case.references)],
            case.category,
            before.removeprefix("a ") + category,
            generator=torch.Generator().manual_seed(case.seed),
            **PAPER,
        )
        return Edited(made.images[0])


@dataclass(frozen=True)
class Paste:
    """Cut and paste: the reference's subject, cut out by its true mask, over the true place of the old object.

    As large as that object's box allows. The trivial bound: the right subject, whatever shows from behind it.
    """

    paper: str = "the copy-and-paste baseline of Li et al. 2023 (DreamEdit)"
    mask_input: bool = True

    def applies(self, case: Case) -> bool:
        """Swaps whose masks are known."""
        return bool(case.references) and case.source_mask is not None and case.reference_mask is not None

    def __call__(self, editor: Editor, case: Case) -> Edited:
        left, top, right, bottom = Image.fromarray(case.source_mask).getbbox()
        alpha = Image.fromarray(case.reference_mask).convert("L")
        cut = case.references[0].crop(alpha.getbbox()), alpha.crop(alpha.getbbox())
        scale = max(right - left, bottom - top) / max(cut[1].size)
        size = tuple(max(1, round(side * scale)) for side in cut[1].size)
        subject, silhouette = (part.resize(size, Image.Resampling.LANCZOS) for part in cut)
        corner = round((left + right - size[0]) / 2), round((top + bottom - size[1]) / 2)
        image, mask = case.source.copy(), Image.new("L", case.size)
        image.paste(subject, corner, silhouette)
        mask.paste(silhouette, corner)
        # All that was touched, the soft edge of the silhouette included.
        return Edited(image, Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255))


OURS = "this library"
PUBLISHED_BLEND = {"rule": "peak", "threshold": 0.3, "maps": "running"}


MOKADY = {"cross_replace": 0.8, "self_replace": 0.5}
MOKADY_BY_WORDS = {**MOKADY, "weight": 2.0}
"""How the released code of null-text inversion edits, on which that of negative-prompt inversion is built."""

JU = {"cross_replace": 0.4, "self_replace": 0.6}
JU_BY_WORDS = {**JU, "weight": 2.0, "alignment": "refine"}
"""How Ju et al. 2024 edit, and ran the other inversions on PIE-Bench."""


def prompt_to_prompt(paper: str, inversion: str, **changes: Any) -> Method:
    """Prompt-to-Prompt on a real picture: the windows of Hertz et al. 2022 unless told otherwise, self-attention up to 32 of
    64, and Mokady et al. 2023's blend after 20 % of the steps; on PIE-Bench as Ju et al. 2024 ran it."""
    own = {"edit": {"cross_replace": 0.8, "self_replace": 0.4}, "blend": {**PUBLISHED_BLEND, "start": 0.2}, "pie": JU_BY_WORDS}
    return Method(f"{paper}; Hertz et al. 2022", inversion, published=True, self_share=0.5, **own | changes)


METHODS: dict[str, MethodFunction] = {
    "ours": Method(OURS, paste=True),
    "ours-fast": Method(OURS, paste=True, steps=20),
    # Attention follows the source for half as long in edits by words that neither add nor remove. Of 64 edits on validation
    # scenes (16 each of replace, background, add, recolour) 58 were achieved so and 51 at the editor's 0.8, which
    # keeps more of the background. At 0.2, 60, with worse masks.
    "ours-best": Method(OURS, paste=True, by_words={"cross_replace": 0.4}),
    "ours+mask": Method(OURS, paste=True, mask_input=True),
    "ddim+p2p": prompt_to_prompt("Song et al. 2021", "ddim"),
    "null-text+p2p": prompt_to_prompt(
        "Mokady et al. 2023",
        "null_text",
        options={"optimiser": "adam", "inner_steps": 10},
        source="guided",
        edit=MOKADY,
        by_words=MOKADY_BY_WORDS,
    ),
    # Guided against its own prompt, the source is generated as without guidance.
    "negative-prompt+p2p": prompt_to_prompt(
        "Miyake et al. 2023", "negative_prompt", source="unguided", edit=MOKADY, by_words=MOKADY_BY_WORDS
    ),
    "direct+p2p": prompt_to_prompt("Ju et al. 2024", "direct", edit=JU, by_words=JU_BY_WORDS),
    # The same inversion with the windows of the other ancestors, which keep more of the source.
    "direct+p2p-2022": prompt_to_prompt("Ju et al. 2024, inversion alone", "direct"),
    # As Ju et al. ran it for their comparison: 12 of 50 steps left out, the source without guidance, no blend. Their windows of
    # .4 and .6 of 50 steps are counted from the first step that is run.
    "edit-friendly+p2p": Method(
        "Huberman-Spiegelglas et al. 2024; Hertz et al. 2022",
        "edit_friendly",
        options={"guidance_scale": 1.0},
        skip=0.24,
        published=True,
        edit={"cross_replace": 0.64, "self_replace": 0.84},
        self_share=0.25,
        blend=None,
    ),
    # BLIP-Diffusion's editing: the mask is read from the source's word alone, from the first step on.
    "lavis": Method(
        "Li et al. 2023, released code",
        published=True,
        source="unguided",
        subjects=True,
        edit={"cross_replace": 0.8, "self_replace": 0.4},
        self_share=0.25,
        blend={**PUBLISHED_BLEND, "start": 0.0, "target_words": ()},
    ),
    "generate-only": Generation(),
    "blip-diffusion": BlipDiffusion(),
    "paste": Paste(),
}
"""Methods by name."""
