"""What an edit is: frozen, validated specifications and their builders. No tensors, no model.

Fractions are of the sampling steps, from the noise: `(0.0, 0.8)` is the first 80 % of them. Methods and defaults after
Prompt-to-Prompt (Hertz et al. 2022, section 3.3) and BLIP-Diffusion (Li et al. 2023, section 3.4 and released code).
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from p2p_subject import checks
from p2p_subject.checks import Window, Word
from p2p_subject.errors import EditSpecError, SubjectError, did_you_mean
from p2p_subject.images import mask_values
from p2p_subject.subject import AnySubject, Subject, to_base64

__all__ = ["Blend", "EditSpec", "Subject", "Window", "Word"]
__all__ += ["add", "combine", "refine", "remove", "replace", "reweight", "swap_subject"]

ALIGNMENTS = ("words", "replace", "refine")
PADDINGS = ("shifted", "reference")
MAPS = ("recorded", "running")
REMOVAL_MARGIN = 1
"""Latent pixels by which the mask of a removal is wider than the words' region."""
ADDED_WEIGHT = 2.0
"""Of the attention of words that are added, as Ju et al. 2024 weight the edited word; without it often nothing comes."""


@dataclass(frozen=True)
class Blend:
    """Where the picture may change: a mask from the words' own cross-attention, applied to the latents at every step.

    The mask is the union of the regions of the edited words in both prompts, so that a new subject larger than the old one is
    not clipped to its silhouette.

    Attributes:
        source_words: edited words of the source's prompt; None: the word that is swapped.
        target_words: edited words of the target's prompt; None: the word that comes, with the columns of an inserted subject.
        subtract: words of either prompt whose regions are taken out.
        rule: name of a function of `p2p_subject.blend.RULES`: "share", the word's share among the content words at each pixel,
            or "peak", the published one, the word's map over its maximum.
        threshold: 0 to 1, of the rule's maximum; None: the rule's own.
        start: fraction of steps that pass before the first blend (LAVIS 0, null-text 0.2).
        grow: latent pixels by which the words' mask is dilated; None: one where the edit erases, so that no rim of what goes
            stays, else none.
        feather: pixels of the picture over which the edit fades into the original from the mask's edge on; None: over half a
            latent pixel's, from as far beyond the edge on.
        maps: "recorded" reads the source's region from the maps of its whole generation and the target's from the less noisy
            half of the steps; "running" sums the maps of all steps so far, as published.
        mask: anything `load_mask` takes; stands in place of the words' attention, as it is.

    Raises `EditSpecError` and `MaskError`.
    """

    source_words: tuple[Word, ...] | None = None
    target_words: tuple[Word, ...] | None = None
    subtract: tuple[Word, ...] = ()
    rule: str = "share"
    threshold: float | None = None
    start: float = 0.0
    grow: int | None = None
    feather: float | None = None
    maps: str = "recorded"
    mask: Any = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str):
            raise EditSpecError(f"rule={self.rule!r}; expected the name of a rule, such as 'share'")
        if self.feather is not None and not checks.is_number(self.feather, 0):
            raise EditSpecError(f"feather={self.feather!r}; expected 0 or more pixels of the picture, or None")
        checked = {
            "source_words": None if self.source_words is None else checks.words(self.source_words, "source_words"),
            "target_words": None if self.target_words is None else checks.words(self.target_words, "target_words"),
            "subtract": checks.words(self.subtract, "subtract"),
            "threshold": None if self.threshold is None else checks.fraction(self.threshold, "threshold"),
            "start": checks.fraction(self.start, "start"),
            "grow": None if self.grow is None else checks.whole(self.grow, "grow", 0, "0 or more latent pixels, or None"),
            "maps": checks.choice(self.maps, "maps", MAPS),
            "mask": None if self.mask is None else _gray(self.mask),
            "feather": None if self.feather is None else float(self.feather),
        }
        if self.mask is not None and self.subtract:
            raise EditSpecError("a mask and words to subtract were given; take their region out of the mask, or leave one out")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the mask as PNG in base64."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"mask": self.mask and to_base64(self.mask)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Blend:
        """Read what `to_dict` wrote."""
        _require_fields(cls, values)
        mask = values.get("mask")
        try:
            decoded = None if mask is None else base64.b64decode(mask, validate=True)
        except (TypeError, ValueError) as error:
            raise EditSpecError(f"mask: not base64 ({error}); expected a mask as PNG in base64, or null") from None
        return cls(**{**values, "mask": decoded})


def _gray(mask: Any) -> Image.Image:
    """A mask as a picture of mode "L"; `MaskError` for what is none."""
    return Image.fromarray(np.rint(mask_values(mask) * 255).astype(np.uint8))


@dataclass(frozen=True)
class EditSpec:
    """One edit of a source.

    Windows are shares of the steps, from the noise: a fraction, or (start, stop).

    Attributes:
        prompt: describes the edited picture; None puts the subject's category in the place of the swapped word of the source's
            prompt, and keeps that where only `weights` are given.
        swap: the word of the source's prompt that gives way.
        subject: what comes in its place.
        alignment: which words of the source a word of the target follows: "words" aligns any two prompts word by word,
            "replace" needs as many words in both, "refine" keeps new tokens free, as the two published controllers do.
        padding: "shifted" aligns the padding behind the prompts by its place after the end token, "reference" by its column,
            as published.
        cross_replace: window in which cross-attention follows the source; also {word of the target: window}, in which None
            stands for all the other words (0.8 if it is left out).
        self_replace: window in which self-attention follows the source.
        self_resolution: largest side of self-attention that follows, in latent pixels; None: half the latent's larger side, 32
            at 512x512 (LAVIS: 16).
        weights: factors of the attention of words of the target's prompt within their window; negative ones push away.
        blend: where the picture may change; None lets all of it change.
        room: share of the steps, from the noise, in which all of the square around what `swap` names may change, before the
            mask alone may. After that, what comes in its place can widen the mask only within the square, unless the blend
            names its words. So it is not held to the old outline, nor outgrows the place. 0 is as published: no square. Steps
            that `skip` or `Blend.start` leave out count. A mask of yours, an edit of all of the picture, and a word whose
            square would be all of it, such as a background's, take no room.
        erase: hide what the source's words of the mask (or a mask of yours) cover from the target's self-attention in the
            U-Net, in every step and layer: the region is continued from what is around it, where a model would else complete
            the object that it sees there (the attention of Attentive Eraser, Sun et al. 2025, without its guidance). The
            source's recorded maps say where it is, whatever `Blend.maps`. In a layer so coarse that the region touches every
            pixel, only pixels wholly inside it are hidden. A subject that the source was generated with goes with its word; a
            control picture that shows the object still asks for it.

    Raises `EditSpecError` and `SubjectError` for anything that is not an edit.
    """

    prompt: str | None = None
    swap: Word | None = None
    subject: AnySubject | None = None
    alignment: str = "words"
    padding: str = "shifted"
    cross_replace: float | Window | Mapping[Word | None, float | Window] = field(default=0.8, hash=False)
    self_replace: float | Window = 0.4
    self_resolution: int | None = None
    weights: Mapping[Word, float] = field(default_factory=dict, hash=False)
    blend: Blend | None = field(default_factory=Blend)
    room: float = 0.0
    erase: bool = False

    def __post_init__(self) -> None:
        checked = {
            "swap": None if self.swap is None else checks.word(self.swap, "swap"),
            "alignment": checks.choice(self.alignment, "alignment", ALIGNMENTS),
            "padding": checks.choice(self.padding, "padding", PADDINGS),
            "cross_replace": checks.windows(self.cross_replace, "cross_replace"),
            "self_replace": checks.window(self.self_replace, "self_replace"),
            "weights": checks.weights(self.weights),
            "room": checks.fraction(self.room, "room"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise EditSpecError(f"prompt={self.prompt!r}; expected a text, or None with a swap and a subject")
        if self.subject is not None and not isinstance(self.subject, AnySubject):
            raise SubjectError(f"subject={self.subject!r}; expected Subject(picture, category)")
        if self.blend is not None and not isinstance(self.blend, Blend):
            raise EditSpecError(f"blend={self.blend!r}; expected Blend(...), or None for an edit of all of the picture")
        if isinstance(self.blend, Blend) and self.blend.grow == 0 and self.erase is False:
            # One thing has one form, or a blend that says no more than the default would count as one that does.
            object.__setattr__(self, "blend", dataclasses.replace(self.blend, grow=None))
        if self.self_resolution is not None:
            side = checks.whole(self.self_resolution, "self_resolution", 1, "1 or more latent pixels, or None")
            object.__setattr__(self, "self_resolution", side)
        if self.prompt is None and self.subject is None and not self.weights:
            raise EditSpecError("an edit needs a prompt, or a swap and a subject from which the prompt follows, or weights")
        if self.subject is not None and self.swap is None:
            raise EditSpecError("a subject was given but no word for it to replace; pass swap='cat' or use swap_subject")
        if self.room and self.swap is None:
            raise EditSpecError(f"room={self.room} is for what comes in the place of a word; pass swap='cat', or leave it out")
        if not isinstance(self.erase, bool):
            raise EditSpecError(f"erase={self.erase!r}; expected True or False")
        if self.erase and (self.subject is not None or self.blend is None):
            given = "blend=None, which is all of the picture" if self.blend is None else "a subject to put there"
            raise EditSpecError(f"erase empties the region of the blend, and the edit has {given}; leave one out")
        if self.weights and all(start == stop for start, stop in self._all_windows()):
            raise EditSpecError(
                f"weights={dict(self.weights)} can have no effect: they act in the steps of cross_replace, and "
                f"cross_replace={self.cross_replace} holds none; widen it, such as to 0.8, or leave the weights out"
            )

    @property
    def grow(self) -> int:
        """Latent pixels by which the words' mask is dilated."""
        asked = None if self.blend is None else self.blend.grow
        return (REMOVAL_MARGIN if self.erase else 0) if asked is None else asked

    def cross_windows(self) -> tuple[Window, Mapping[Word, Window]]:
        """The window of cross-attention that holds for all words, and the words that have their own."""
        if not isinstance(self.cross_replace, Mapping):
            return self.cross_replace, {}
        own = {word: window for word, window in self.cross_replace.items() if word is not None}
        return self.cross_replace.get(None, (0.0, 0.8)), own

    def _all_windows(self) -> list[Window]:
        default, own = self.cross_windows()
        return [default, *own.values()]

    # A view of a mapping can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {name: dict(v) if isinstance(v, MappingProxyType) else v for name, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: MappingProxyType(v) if isinstance(v, dict) else v for name, v in state.items()})

    def to_json(self) -> str:
        """Write the edit as JSON; `from_json` reads it back equal in effect."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["subject"] = self.subject and self.subject.to_dict()
        values["blend"] = self.blend and self.blend.to_dict()
        for name in ("weights", "cross_replace"):
            if isinstance(values[name], Mapping):
                values[name] = [[*_text_and_index(word), value] for word, value in values[name].items()]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> EditSpec:
        """Read an edit; unknown or misspelt fields are refused by name.

        `weights` is a list of [word, index or null, factor], or an object of words and factors; `cross_replace` a fraction,
        [start, stop], or a list of [word or null, index or null, [start, stop]].
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise EditSpecError(f"not JSON ({error}); expected what EditSpec.to_json writes") from None
        if not isinstance(values, dict):
            raise EditSpecError(f"a JSON {type(values).__name__}; expected an object with the fields of EditSpec")
        _require_fields(cls, values)
        if values.get("subject") is not None:
            values["subject"] = Subject.from_dict(values["subject"])
        if values.get("blend") is not None:
            values["blend"] = Blend.from_dict(values["blend"])
        if isinstance(values.get("weights"), list):
            values["weights"] = _from_triples(values["weights"], "weights", "['cat', null, 2.0]")
        windows = values.get("cross_replace")
        if isinstance(windows, list) and any(isinstance(own, list) for own in windows):
            values["cross_replace"] = _from_triples(windows, "cross_replace", "['cat', null, [0.0, 0.4]]")
        return cls(**values)


def _text_and_index(word: Word | None) -> tuple[str | None, int | None]:
    return (word, None) if word is None or isinstance(word, str) else word


def _from_triples(triples: list[Any], name: str, example: str) -> dict[Word | None, Any]:
    values = {}
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3:
            raise EditSpecError(f"{name}: {triple!r}; expected [word, index or null, value], such as {example}")
        text, index, value = triple
        key = text if index is None else (text, index)
        values[None if key is None else checks.word(key, f"a word of {name}")] = value
    return values


def _require_fields(kind: type, values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(kind)]
    if not isinstance(values, Mapping):
        raise EditSpecError(f"{kind.__name__.lower()}={values!r}; expected an object with the fields {names}")
    for name in values:
        if name not in names:
            raise EditSpecError(f"{kind.__name__} has no field {name!r}.{did_you_mean(name, names)} Fields: {names}")


def replace(prompt: str, **changes: Any) -> EditSpec:
    """Word Swap: words of the source's prompt give way to others, one for one; `changes` are other fields of `EditSpec`."""
    return EditSpec(**{"prompt": prompt, "alignment": "replace", **changes})


def refine(prompt: str, **changes: Any) -> EditSpec:
    """Adding a New Phrase: what `prompt` says beyond the source's keeps its own attention; `changes` as in `replace`."""
    return EditSpec(**{"prompt": prompt, "alignment": "refine", **changes})


def reweight(weights: Mapping[Word, float], **changes: Any) -> EditSpec:
    """Attention Re-weighting: words of the prompt count more, less or against; `changes` as in `replace`."""
    return EditSpec(**{"weights": weights, **changes})


def add(word: Word | list[Word], prompt: str, *, blend: Blend = Blend(), **changes: Any) -> EditSpec:
    """The edit that adds what `word` of `prompt` says to the picture; `changes` are other fields of `EditSpec`.

    `prompt` describes the picture with it: "a cat on grass" for a source of "grass". A list adds several. Their attention
    counts twice in the steps of `cross_replace`, or as `weights` say of them; it makes the mask, so that the rest stays.
    `blend` may name other words, or hold a mask of yours, which also says where. How often it succeeds:
    benchmarks/RESULTS.md. Raises `EditSpecError`.
    """
    words = checks.words(word if isinstance(word, list) else [word], "word")
    if not words:
        raise EditSpecError("add([], ...): nothing to put in; name a word of the target's prompt")
    if isinstance(blend, Blend) and blend.target_words is None:
        source_words = () if blend.source_words is None else blend.source_words
        blend = dataclasses.replace(blend, source_words=source_words, target_words=words)
    weights = changes.pop("weights", {})
    if isinstance(weights, Mapping):
        # Those of other words leave the added ones theirs.
        weights = {**dict.fromkeys(words, ADDED_WEIGHT), **weights}
    return EditSpec(**{"prompt": prompt, "blend": blend, "weights": weights, **changes})


def remove(word: Word | list[Word], prompt: str, *, blend: Blend = Blend(), **changes: Any) -> EditSpec:
    """The edit that takes what `word` of the source prompt shows out of the picture; `changes` are other fields of `EditSpec`.

    `prompt` describes what is left. A list takes several out. Attention does not follow the source, which has the object. A
    `blend` with a larger `grow` or a lower threshold takes a shadow along; its words are those taken out, and a mask of yours
    gets no margin. Combined with weights, the edit needs a window for them to act in, such as `cross_replace=0.4`. How often
    it succeeds: benchmarks/RESULTS.md. Raises `EditSpecError`.
    """
    words = checks.words(word if isinstance(word, list) else [word], "word")
    if not words:
        raise EditSpecError("remove([], ...): nothing to take out; name a word of the source prompt")
    if isinstance(blend, Blend):
        if blend.source_words not in (None, words):
            raise EditSpecError(f"remove({word!r}, ...) with source_words={blend.source_words} in the blend; leave these out")
        target_words = () if blend.target_words is None else blend.target_words
        blend = dataclasses.replace(blend, source_words=words, target_words=target_words)
    own = {"cross_replace": 0.0, "self_replace": 0.0, "erase": True}
    return EditSpec(**{"prompt": prompt, "blend": blend, **own, **changes})


def swap_subject(word: Word, subject: AnySubject, **changes: Any) -> EditSpec:
    """The edit that puts `subject` where `word` of the source prompt is; `changes` are other fields of `EditSpec`.

    The subject takes a form of its own: attention follows the source for 0.2 of the steps (`cross_replace`, `self_replace`),
    where the published subject swap follows it for 0.8 and 0.4, and `room` is 0.5 (chosen in benchmarks/RESULTS.md). With
    fewer than 5 steps, or `skip` of 0.2 or more, the windows hold none; weights, which act within, need a wider one.
    """
    if not isinstance(subject, AnySubject):
        raise SubjectError(f"subject={subject!r}; expected Subject(picture, category)")
    own = {"cross_replace": 0.2, "self_replace": 0.2, "room": 0.5}
    return EditSpec(**{"swap": word, "subject": subject, **own, **changes})


def combine(*specs: EditSpec) -> EditSpec:
    """One edit that does what several do, such as a subject swap that also reweights a word.

    Weights are merged; of every other field, the value that is not the default holds. Raises `EditSpecError` where two specs
    give one field, or one word's weight, different values.
    """
    default = reweight({"x": 1.0})
    values: dict[str, Any] = {}
    weights: dict[Word, float] = {}
    for spec in specs:
        if not isinstance(spec, EditSpec):
            raise EditSpecError(f"{spec!r}; expected an EditSpec, such as reweight(...)")
        given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "weights"}
        own = {name: value for name, value in given.items() if value != getattr(default, name)}
        for seen, new in ((values, own), (weights, spec.weights)):
            for name, value in new.items():
                if name in seen and seen[name] != value:
                    raise EditSpecError(f"two edits give {name}: {seen[name]!r} and {value!r}; leave one of them out")
                seen[name] = value
    return EditSpec(**values, weights=weights)
