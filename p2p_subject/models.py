"""From a name or a pipeline to a model that can be edited with: an adapter around it, all that the editor knows of networks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from inversion import Move, Schedule, ScheduleError, StepsError, require_finite, to_epsilon
from p2p_subject import checks
from p2p_subject.attention import controlled_attention
from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.context import Context
from p2p_subject.controller import StepControl
from p2p_subject.controlnets import residuals
from p2p_subject.errors import ArgumentError, ModelError, SubjectError
from p2p_subject.finetuning.stored import is_finetuned
from p2p_subject.fingerprint import fingerprint
from p2p_subject.images import to_tensor
from p2p_subject.loading import find_model, load_pipeline, miniature_folder
from p2p_subject.outputs import to_pil
from p2p_subject.structure import EDGES, Structure
from p2p_subject.subject import AnySubject, EmbeddedSubject
from p2p_subject.supported import bare, require_editable, unsupported
from p2p_subject.tokens import TokenLayout, layout

__all__ = ["MINIATURE", "SETTINGS", "Model", "fingerprint", "miniature_folder"]

MINIATURE = "miniature"
SETTINGS = "editing.json"
"""Optional file of a model folder: the guidance scale that suits it. Without it, that of its kind."""


_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


def lock_of(network: torch.nn.Module) -> threading.RLock:
    """The lock of a network, not of what wraps it: two editors may share one."""
    return _LOCKS.setdefault(bare(network), threading.RLock())


class Model:
    """A pipeline as the editor sees it: layouts, contexts, noise, latents. `load` and `of` choose the subclass for its kind.

    Letters: B rows, L columns of the text encoder, D its width, Nq query embeddings of a subject, R rows of a U-Net call,
    (C, h, w) a latent. Tensors are on `device`.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline] | tuple[type[DiffusionPipeline], ...]]
    default_guidance: ClassVar[float] = 7.5
    addition: ClassVar[str | None] = None
    """What the U-Net is told beside timestep and text, in the words of its configuration."""

    def __init__(self, pipeline: DiffusionPipeline, name: str, guidance_scale: float | None = None) -> None:
        self.pipeline, self.name = pipeline, name
        self.subject: EmbeddedSubject | None = None
        """The subject that the model was fine-tuned on, if any."""
        self.guidance_scale = self.default_guidance if guidance_scale is None else float(guidance_scale)
        self._lock = lock_of(pipeline.unet)
        self.require_controllable()

    @staticmethod
    def load(
        name: str | Path | None = None, *, dtype: torch.dtype | None = None, device: str | None = None, **options: Any
    ) -> Model:
        """Load the miniature (None), a folder or a hub name, of BLIP-Diffusion or Stable Diffusion 1.x, 2.x or XL.

        The folder of a fine-tuned model loads what it was made from as well, or takes `base=`. Other `options` are those of
        `BlipDiffusionPipeline.from_pretrained`: hub options, `variant`, parts to replace, and `controlnet=`, see
        `load_pipeline`. Raises `ModelError` when the folder or name is no such model, or a weight of it is missing.
        """
        if name is not None and is_finetuned(name):
            from p2p_subject.finetuning.result import load_finetuned

            return load_finetuned(Path(name), dtype=dtype, device=device, **options).model
        folder = find_model(name, options)
        # The miniature is stored in half precision and computed in single: a CPU has no fast half arithmetic.
        pipeline = load_pipeline(folder, dtype or torch.float32, **options)
        if device is not None:
            try:
                pipeline = pipeline.to(device)
            except (RuntimeError, AssertionError) as error:
                raise ModelError(f"device={device!r} is not to be had here ({error}); try 'cpu'") from error
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        return Model.of(pipeline, MINIATURE if name is None else str(name), settings.get("guidance_scale"))

    @staticmethod
    def of(pipeline: DiffusionPipeline, name: str | None = None, guidance_scale: float | None = None) -> Model:
        """Wrap a pipeline that is loaded, as it is: moved, offloaded, compiled, with LoRA adapters.

        Raises `ModelError` for a pipeline of another kind, `HookError` for one with adapters that control would drop.
        """
        for kind in _kinds():
            if isinstance(pipeline, kind.pipeline_class):
                known = getattr(pipeline.config, "_name_or_path", None)
                return kind(pipeline, name or known or type(pipeline).__name__, guidance_scale)
        raise unsupported(type(pipeline).__name__, "pipeline")

    def require_controllable(self) -> None:
        """Raise `HookError` or `ModelError` unless the pipeline, as it is now, can be edited with; runs no network.

        Adapters may have come since it was wrapped, so every job begins with this. Waits for a job of another thread.
        """
        with self._lock:
            require_editable(self.pipeline, self.addition)

    @property
    def controlnet(self):
        """The ControlNet beside the U-Net, or None."""
        return getattr(self.pipeline, "controlnet", None)

    def require_structure(self, structure: Structure | None) -> None:
        """Raise `ArgumentError` for a control picture without a ControlNet, or the reverse; runs no network."""
        if structure is not None and self.controlnet is None:
            raise ArgumentError(
                f"a control picture was given, but {self.name} carries no ControlNet. Load the model with one: "
                f'Editor.from_pretrained(..., controlnet=NAME), for the miniature "{EDGES}"'
            )
        if structure is None and self.controlnet is not None:
            raise ArgumentError(
                f"{self.name} carries a ControlNet, which needs a control picture: pass control=, or load the model without "
                "controlnet="
            )

    @contextmanager
    def controlled(self) -> Iterator[None]:
        """Attention control for the duration of a `with` block; other threads that want it wait."""
        with self._lock, controlled_attention(self.unet):
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The networks' weights without gradients for the duration of a `with` block: what is optimised is a text embedding."""
        with self._lock:
            networks = [self.unet] if self.controlnet is None else [self.unet, self.controlnet]
            weights = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
            for weight in weights:
                weight.requires_grad_(False)
            try:
                yield
            finally:
                for weight in weights:
                    weight.requires_grad_(True)

    @property
    def unet(self):
        """The U-Net."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where networks run."""
        return self.pipeline._execution_device

    @property
    def fingerprint(self) -> str:
        """Short hash of the weights and adapters as they are now."""
        return fingerprint(self.pipeline)

    @property
    def scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return self.pipeline.vae_scale_factor

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this: a latent that every level of the U-Net can halve."""
        return self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the pictures that the model was trained on."""
        cells = self.unet.config.sample_size
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return width * self.scale_factor, height * self.scale_factor

    @property
    def area(self) -> int:
        """Number of pixels of the pictures that the model was trained on."""
        width, height = self.size
        return width * height

    @property
    def window(self) -> int:
        """Columns L of the text encoder."""
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def queries(self) -> int:
        """Columns Nq of the window that a subject takes; 0 where the model takes no subjects."""
        return 0

    def schedule(self, steps: int) -> Schedule:
        """DDIM schedule of `steps` steps with the noise levels of the model's scheduler.

        A last step at timestep 0 ends at the clean picture: by the settings of some schedulers, that of the public
        BLIP-Diffusion among them, it would end at the noise that it begins with.

        Raises `StepsError` outside 1 to the number of training steps, `ScheduleError` for schedulers that are not of
        diffusion.
        """
        train = self.pipeline.scheduler.config.get("num_train_timesteps", 1000)
        if not checks.is_whole(steps, 1, train // 2):
            raise StepsError(f"steps={steps!r}; expected a whole number between 1 and {train // 2}, such as 50")
        ddim = self.noise_levels()
        ddim.set_timesteps(int(steps))
        # Spaced "trailing", some numbers of steps get one more in diffusers, by rounding: at -1, which is none.
        timesteps = tuple(int(t) for t in ddim.timesteps[: int(steps)])
        # Steps that do not divide the training steps leave a gap at the noisy end; a wide one breaks generation and inversion.
        if timesteps[0] < 0.9 * (train - train / steps):
            raise StepsError(
                f"steps={steps} would begin at timestep {timesteps[0]} of {train}, far from noise; take a number that divides "
                f"{train} about evenly, such as {train // round(train / steps)}, 50 or 100"
            )
        alphas = tuple(float(ddim.alphas_cumprod[t]) for t in timesteps)
        final = 1.0 if timesteps[-1] == 0 else float(ddim.final_alpha_cumprod)
        return Schedule(timesteps, alphas, final, ddim.config.prediction_type)

    def noise_levels(self) -> DDIMScheduler:
        """The model's scheduler as DDIM: its noise levels, and its spacing of timesteps unless that is a sampler's own.

        Raises `ScheduleError` for schedulers that are not of diffusion.
        """
        scheduler = self.pipeline.scheduler
        if "beta_schedule" not in scheduler.config:
            raise ScheduleError(f"{type(scheduler).__name__} has no betas; load a diffusion scheduler")
        # Without diffusers' note on which values were defaults, or a pipeline and its saved folder would differ.
        config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
        if config.get("timestep_spacing") == "linspace":
            # What samplers space by unless told otherwise; no model is trained for it.
            config["timestep_spacing"] = "leading"
        return DDIMScheduler.from_config(config)

    def layout(self, prompt: str, *, subject: bool = False) -> TokenLayout:
        """What the text encoder sees for `prompt`, with room for a subject if asked.

        Raises `PromptError`, `PromptTooLongError`; `SubjectError` where the model takes no subjects.
        """
        if subject:
            raise self._no_subjects()
        return layout(self.pipeline.tokenizer, prompt, max_length=self.window)

    def require_subject(self, subject: AnySubject) -> None:
        """Raise `SubjectError` for a subject that the model cannot take; runs no network."""
        raise self._no_subjects()

    def embed(self, subject: AnySubject) -> Tensor:
        """Embeddings of a subject, (1, Nq, D); the mean over its pictures."""
        raise self._no_subjects()

    def _no_subjects(self) -> SubjectError:
        return SubjectError(
            f"{self.name} ({type(self.pipeline).__name__}) takes no pictures of a subject; BLIP-Diffusion does. Load the "
            'miniature (no name) or "Salesforce/blipdiffusion", or edit by words alone'
        )

    def encode(self, layout: TokenLayout, subject: Tensor | None = None) -> Context:
        """Context of a layout, one row in the U-Net's dtype; `subject` (1, Nq, D) where the layout has one."""
        raise NotImplementedError

    def unconditional(self, negative_prompt: str | None = None) -> Context:
        """Context of what guidance leads away from, one row: a negative prompt, or nothing.

        Raises `PromptError`, `PromptTooLongError`.
        """
        return self.encode(self.layout("" if negative_prompt is None else negative_prompt))

    def structured(self, context: Context, structure: Structure | None) -> Context:
        """A context under the control picture of a structure, which has the size of the pictures to be made."""
        return context if structure is None else context.with_structure(structure.tensor(), structure.strength)

    def noise(self, latents: Tensor, move: Move, context: Context, control: StepControl | None = None) -> Tensor:
        """One U-Net call of R rows: float32 latents (R, C, h, w) and a context of R rows to float32 noise (R, C, h, w)."""
        # A tensor, since a compiled U-Net would be compiled anew for every number.
        timesteps = torch.full((len(latents),), move.t, device=latents.device)
        output = self._call(latents, timesteps, context, control)
        return to_epsilon(output.float(), latents, move.alpha_t, self.pipeline.scheduler.config.prediction_type)

    @torch.no_grad()
    def read(self, latents: Tensor, timesteps: Tensor, context: Context, control: StepControl) -> None:
        """One U-Net call for what `control` reads of its attention alone; rows (R, C, h, w) may differ in timestep (R,)."""
        self._call(latents, timesteps.to(latents.device), context, control)

    def _call(self, latents: Tensor, timesteps: Tensor, context: Context, control: StepControl | None) -> Tensor:
        """The U-Net's output (R, C, h, w) in its own dtype."""
        rows, added = latents.to(self.unet.dtype), self._added(latents, context)
        if context.structure is not None:
            # Attention control is the U-Net's alone: the ControlNet attends as it was trained to.
            given = context.tokens, context.structure, context.strength
            added |= residuals(self.controlnet, rows, timesteps, *given, **added)
        return self.unet(
            rows,
            timesteps,
            encoder_hidden_states=context.tokens,
            cross_attention_kwargs=None if control is None else {"control": control},
            **added,
        ).sample

    def _added(self, latents: Tensor, context: Context) -> dict[str, Any]:
        """Arguments of the U-Net that only this kind has."""
        return {}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Latents (B, C, h, w) float32 of pictures of one size; the mean of the posterior, so the same every time."""
        with self._autoencoder() as vae:
            pixels = to_tensor(images).to(self.device, vae.dtype)
            latents = vae.encode(pixels).latent_dist.mean.float()
        config = vae.config
        return require_finite((latents - (config.shift_factor or 0)) * config.scaling_factor, "latents of the picture")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, h, w)."""
        with self._autoencoder() as vae:
            latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            return to_pil(vae.decode(latents.to(vae.dtype)).sample.float())

    @contextmanager
    def _autoencoder(self) -> Iterator[AutoencoderKL]:
        """The VAE in the precision that it needs."""
        yield self.pipeline.vae


def _kinds() -> Iterator[type[Model]]:
    from p2p_subject.blip import BlipDiffusionModel

    yield BlipDiffusionModel
    # Only where it is needed: diffusers' own pipelines import much that BLIP-Diffusion does without.
    from p2p_subject.stable_diffusion import StableDiffusionModel, StableDiffusionXLModel

    yield from (StableDiffusionModel, StableDiffusionXLModel)
