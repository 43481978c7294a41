"""A fine-tuned model as a value, written to its small folder and loaded from it; see `p2p_subject.finetuning.stored`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel

from p2p_subject import __version__
from p2p_subject.blip_diffusion.weights import check_weights, read_tensors, write_tensors
from p2p_subject.errors import ArgumentError, ModelError, ModelMismatchError, OutputError
from p2p_subject.finetuning import network
from p2p_subject.finetuning.settings import Settings
from p2p_subject.finetuning.stored import FINETUNED, FORMAT, SUBJECT, WEIGHTS, read_finetuned, stored_subject
from p2p_subject.fingerprint import fingerprint
from p2p_subject.models import MINIATURE, Model
from p2p_subject.outputs import atomic_write
from p2p_subject.subject import EmbeddedSubject

if TYPE_CHECKING:
    from p2p_subject.editor import Editor

_PACKAGES = ("torch", "diffusers", "transformers", "peft")

Row = dict[str, float]
"""Figures of a step: "step", its "loss" in training, and where it was measured the "validation" loss."""


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What a fine-tuning gives.

    `model` is the tuned one, `settings` how it was made, `base` the name and fingerprint of the model it was made from, `step`
    the optimiser step whose weights were kept, `history` the losses of all steps.
    """

    model: Model
    settings: Settings
    base: tuple[str, str]
    step: int
    history: tuple[Row, ...] = ()

    @property
    def editor(self) -> Editor:
        """An editor with the tuned model; its `subject` is the learned one."""
        from p2p_subject.editor import Editor

        return Editor(self.model)

    @property
    def subject(self) -> EmbeddedSubject:
        """The learned subject: its mean embedding over the pictures, trained on or not, and its category."""
        return self.model.subject

    def save(self, folder: str | Path) -> None:
        """Write the result to a folder that is new or empty, for `Editor.from_pretrained(folder)`.

        Only what was learned is written: the base model must be where it was, or be named as `base=` when it is loaded.
        Raises `OutputError`.
        """
        path = Path(folder)
        if path.is_dir() and any(path.iterdir()):
            raise OutputError(f"the folder {str(folder)!r} is not empty; give a new one, or empty it")
        self.write(path)

    def write(self, folder: Path) -> None:
        """Write the files into a folder, whatever is in it; the one that makes it a fine-tuned model comes last."""
        unet = self.model.unet
        lora = self.settings.method == "lora"
        weights = network.lora_of(unet) if lora else unet.state_dict()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error
        name, origin = self.base
        values = {
            "format": FORMAT,
            "base": {"name": name, "fingerprint": origin},
            "fingerprint": identity(self.model),
            "category": self.subject.category,
            "step": self.step,
            "settings": self.settings.to_dict(),
            "versions": {"p2p_subject": __version__, **_versions()},
            "history": list(self.history),
        }
        text = json.dumps(values, indent=1) + "\n"
        write_tensors(folder / WEIGHTS[self.settings.method], weights)
        write_tensors(folder / SUBJECT, {"embedding": self.subject.embedding})
        atomic_write(folder / FINETUNED, text)


def base_of(model: Model) -> tuple[str, str]:
    """The name under which a model is found again, and its fingerprint."""
    folder = Path(model.name)
    named = model.name if model.name == MINIATURE or not folder.is_dir() else str(folder.resolve())
    return named, identity(model)


def identity(model: Model) -> str:
    """Fingerprint of what fine-tuning starts from and makes; a ControlNet beside it is no part of either."""
    return fingerprint(model.pipeline, controlnet=False)


def with_unet(model: Model, unet: UNet2DConditionModel, subject: EmbeddedSubject | None = None, name: str = "") -> Model:
    """The same model with another U-Net; all its other parts are shared."""
    pipeline = model.pipeline
    parts = pipeline.components
    taken = inspect.signature(type(pipeline).__init__).parameters
    settings = {key: pipeline.config[key] for key in taken if key in pipeline.config and key not in parts}
    own = Model.of(type(pipeline)(**{**parts, "unet": unet}, **settings), name or model.name, model.guidance_scale)
    own.subject = subject
    return own


def load_finetuned(folder: Path, *, base: Any = None, **options: Any) -> Finetuned:
    """Read a fine-tuned folder and load the model it was made from, or take `base`: a name, a folder, a `Model` or `Editor`.

    One that is loaded already is not changed, and its memory is shared. `options` are those of `Model.load`. Raises
    `ModelError` for an incomplete folder or a base that cannot be loaded, `ModelMismatchError` for a base of other weights.
    """
    values, subject = read_finetuned(folder), stored_subject(folder)
    try:
        settings = Settings.of(**values["settings"])
        stored, wanted = str(values["base"]["name"]), values["base"]["fingerprint"]
        made, step, history = values["fingerprint"], values["step"], tuple(values["history"])
    except (KeyError, TypeError, ArgumentError) as error:
        raise ModelError(f"{folder / FINETUNED} is damaged ({error!r}); save the fine-tuned model again") from error
    model = _base(base, stored, options)
    if identity(model) != wanted:
        raise ModelMismatchError(
            f"{folder} was fine-tuned on the model {stored!r} of fingerprint {wanted}; the one at hand ({model.name}) is "
            f"{identity(model)}. Name the model it was made from as base="
        )
    path = folder / WEIGHTS[settings.method]
    tuned = with_unet(model, _unet(model, settings, path), subject, str(folder))
    if identity(tuned) != made:
        raise ModelMismatchError(f"{path} and {folder / FINETUNED} are not of one run; save the fine-tuned model again")
    return Finetuned(tuned, settings, (stored, wanted), step, history)


def _base(base: Any, stored: str, options: Mapping[str, Any]) -> Model:
    found = getattr(base, "model", base)
    if isinstance(found, Model):
        if given := [name for name, value in options.items() if value is not None]:
            raise ModelError(f"base={found.name!r} is loaded already, so {', '.join(given)} can have no effect; leave that out")
        return found
    name = stored if found is None else found
    try:
        return Model.load(None if name == MINIATURE else name, **options)
    except ModelError as error:
        raise ModelError(f"the base model {str(name)!r} cannot be loaded; name it as base=. {error}") from error


def _unet(model: Model, settings: Settings, path: Path) -> UNet2DConditionModel:
    """The tuned U-Net: the model's own memory with additions, or with the weights of the file in its place."""
    weights = read_tensors(path)
    unet = network.copy_of(model, share=True)
    if settings.method == "lora":
        network.require_peft(str(path))
        network.add_lora(unet, settings.rank, settings.lora_alpha)
        check_weights("the LoRA", network.lora_of(unet), weights, path)
        network.put_lora(unet, weights)
    else:
        check_weights("the U-Net", unet.state_dict(), weights, path)
        weights = {name: weight.to(model.device, model.unet.dtype) for name, weight in weights.items()}
        unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
