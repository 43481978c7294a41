"""From a name to a model that can be edited with: one adapter around a pipeline, all that the editor knows of networks."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from inversion import Move, Schedule, ScheduleError, StepsError, require_finite, to_epsilon
from p2p_subject.attention import controlled_attention
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.blip_diffusion.loading import model_folder
from p2p_subject.blip_diffusion.weights import read_json
from p2p_subject.controller import StepControl
from p2p_subject.edits import Subject
from p2p_subject.errors import ModelError, SubjectError
from p2p_subject.images import to_tensor
from p2p_subject.outputs import to_pil
from p2p_subject.tokens import TokenLayout, layout

MINIATURE = "miniature"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
SETTINGS = "editing.json"
"""Optional file of a model folder: the guidance scale that suits it. Without it, the paper's 7.5."""


def miniature_folder() -> Path:
    """Folder of the model that comes with the library."""
    return Path(str(files("p2p_subject"))) / "data" / MINIATURE


class Model:
    """A BLIP-Diffusion pipeline as the editor sees it: layouts, contexts, noise, latents.

    Letters: B rows, L columns of the text encoder, D its width, Nq query embeddings of a subject, (C, h, w) a latent.
    """

    def __init__(self, pipeline: BlipDiffusionPipeline, name: str, guidance_scale: float) -> None:
        self.pipeline, self.name, self.guidance_scale = pipeline, name, guidance_scale
        self.fingerprint = fingerprint(pipeline)
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls, name: str | Path | None = None, *, dtype: torch.dtype | None = None, device: str | None = None, **options
    ) -> Model:
        """Load the miniature (None), a folder or a hub name; `options` go to `BlipDiffusionPipeline.from_pretrained`.

        Raises `ModelError` when the folder or name is not a model, or a weight of it is missing.
        """
        folder = miniature_folder() if name is None else Path(name)
        if name is None and not folder.is_dir():
            raise ModelError("this installation lacks the miniature (p2p_subject/data); reinstall it, or name a model")
        if not folder.is_dir():
            hub = {key: options[key] for key in HUB_OPTIONS if key in options}
            folder = model_folder(name, [], options.get("variant"), **hub)
        # The miniature is stored in half precision and computed in single: a CPU has no fast half arithmetic.
        pipeline = BlipDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype or torch.float32, **options)
        if device is not None:
            try:
                pipeline = pipeline.to(device)
            except (RuntimeError, AssertionError) as error:
                raise ModelError(f"device={device!r} is not to be had here ({error}); try 'cpu'") from error
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        return cls(pipeline, MINIATURE if name is None else str(name), float(settings.get("guidance_scale", 7.5)))

    @contextmanager
    def controlled(self) -> Iterator[None]:
        """Attention control for the duration of a `with` block; other threads that want it wait."""
        with self._lock, controlled_attention(self.unet):
            yield

    @property
    def unet(self):
        """The U-Net."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        """Where networks run."""
        return self.pipeline._execution_device

    @property
    def scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return self.pipeline.vae_scale_factor

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this: a latent that every level of the U-Net can halve."""
        return self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def area(self) -> int:
        """Number of pixels of the pictures that the model was trained on."""
        return (self.unet.config.sample_size * self.scale_factor) ** 2

    def schedule(self, steps: int) -> Schedule:
        """DDIM schedule of `steps` steps with the noise levels of the model's scheduler.

        Raises `StepsError` outside 1 to the number of training steps, `ScheduleError` for schedulers that are not of
        diffusion.
        """
        config = self.pipeline.scheduler.config
        train = config.get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= train // 2:
            raise StepsError(f"steps={steps!r}; expected a whole number between 1 and {train // 2}, such as 50")
        if "beta_schedule" not in config:
            raise ScheduleError(f"{self.pipeline.scheduler.__class__.__name__} has no betas; load a diffusion scheduler")
        ddim = DDIMScheduler.from_config(config)
        ddim.set_timesteps(steps)
        timesteps = tuple(int(t) for t in ddim.timesteps)
        # Steps that do not divide the training steps leave a gap at the noisy end; a wide one breaks generation and inversion.
        if timesteps[0] < 0.9 * (train - train / steps):
            raise StepsError(
                f"steps={steps} would begin at timestep {timesteps[0]} of {train}, far from noise; take a number that divides "
                f"{train} about evenly, such as {train // round(train / steps)}, 50 or 100"
            )
        alphas = tuple(float(ddim.alphas_cumprod[t]) for t in timesteps)
        return Schedule(timesteps, alphas, float(ddim.final_alpha_cumprod), ddim.config.prediction_type)

    def layout(self, prompt: str, *, subject: bool = False) -> TokenLayout:
        """What the text encoder sees for `prompt`, with room for a subject if asked."""
        return layout(
            self.pipeline.tokenizer,
            prompt,
            subject_queries=self.pipeline.qformer.config.num_query_tokens if subject else 0,
            subject_position=self.pipeline.config.ctx_begin_pos,
            max_length=self.pipeline.text_encoder.config.max_position_embeddings,
        )

    def require_subject(self, subject: Subject) -> None:
        """Raise `SubjectError` for a category that is too long for the Q-Former; runs no network."""
        pieces = len(self.pipeline.qformer_tokenizer(subject.category).input_ids)
        room = self.pipeline.qformer.config.qformer_config.max_position_embeddings
        if pieces > room:
            raise SubjectError(
                f"category {subject.category!r} takes {pieces} word pieces of this model's {room}; name it in a simpler word"
            )

    @torch.no_grad()
    def embed(self, subject: Subject) -> Tensor:
        """Embeddings of a subject, (1, Nq, D); the mean over its pictures."""
        embeddings = self.pipeline.subject_embeddings([list(subject.pictures)], [subject.category])
        if embeddings.shape[-1] != self.pipeline.text_encoder.config.hidden_size:
            raise SubjectError(f"subject embeddings of width {embeddings.shape[-1]} do not fit the text encoder")
        return embeddings

    @torch.no_grad()
    def encode(self, layout: TokenLayout, subject: Tensor | None = None) -> Tensor:
        """Context of a layout, (1, L, D) in the U-Net's dtype; `subject` (1, Nq, D) where the layout has one."""
        ids = torch.tensor([layout.prompt_ids], device=self.device)
        subject = None if subject is None else subject.to(self.device)
        position = layout.subject.start if subject is not None else self.pipeline.config.ctx_begin_pos
        return self.pipeline.text_encoder(ids, subject, position).to(self.unet.dtype)

    @torch.no_grad()
    def noise(self, latents: Tensor, move: Move, context: Tensor, control: StepControl | None = None) -> Tensor:
        """One U-Net call of R rows: float32 latents (R, C, h, w) and contexts (R, L, D) to float32 noise."""
        output = self.unet(
            latents.to(self.unet.dtype),
            move.t,
            encoder_hidden_states=context,
            cross_attention_kwargs=None if control is None else {"control": control},
        ).sample
        return to_epsilon(output.float(), latents, move.alpha_t, self.pipeline.scheduler.config.prediction_type)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Latents (B, C, h, w) float32 of pictures of one size; the mean of the posterior, so the same every time."""
        vae = self.pipeline.vae
        pixels = to_tensor(images).to(self.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mean.float()
        config = vae.config
        return require_finite((latents - (config.shift_factor or 0)) * config.scaling_factor, "latents of the picture")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, h, w)."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return to_pil(vae.decode(latents.to(vae.dtype)).sample.float())


def fingerprint(pipeline: BlipDiffusionPipeline) -> str:
    """Short hash of what makes latents: U-Net, VAE, text encoder and noise levels.

    Of each weight, name, shape and up to 4,096 signs: no precision changes a sign, so the same weights have the same
    fingerprint in any of them, and training changes many.
    """
    digest = hashlib.sha256()
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for name, weight in network.state_dict().items():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            if weight.is_floating_point():
                sample = weight.flatten()[:: max(1, weight.numel() // 4096)]
                digest.update(torch.signbit(sample).cpu().numpy().tobytes())
    config = pipeline.scheduler.config
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
    digest.update(repr([config.get(key) for key in keys]).encode())
    return digest.hexdigest()[:16]
