"""From the arguments of a pipeline's call to pictures: checks, embeddings, the loop over the scheduler's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from inversion import guide
from p2p_subject.blip_diffusion import arguments as check
from p2p_subject.blip_diffusion.image_processor import is_batch
from p2p_subject.blip_diffusion.modes import inference
from p2p_subject.errors import NonFiniteError, SubjectError

__all__ = ["GenerationMixin", "Residuals", "StructureArguments"]

Residuals = Callable[[Tensor, Tensor, Tensor, tuple[float, float]], dict[str, Any]]
"""`residuals(latents (R, C, h, w), timestep, contexts (R, L, D), (begin, end))`: further arguments of a U-Net call, in a step
that covers that share of all steps, counted from the noise."""


class StructureArguments(Protocol):
    """What a call says of structure: control pictures, and how they become `Residuals` once the other arguments are known."""

    pictures: Any

    def on(self, pipeline: Any, pictures: list[Any], size: tuple[int, int], repeats: int) -> Residuals:
        """Check one picture a row and bring them to `size` (height, width); `repeats` generations a row follow each other."""


class GenerationMixin:
    """What the pipelines' calls share; they differ in their arguments alone."""

    def predict_noise(self, latents: Tensor, timestep: Tensor, contexts: Tensor, **added: Any) -> Tensor:
        """Call the U-Net on latents (R, C, h, w), contexts (R, L, D); `added` are arguments that structure control adds."""
        return self.unet(latents, timestep, encoder_hidden_states=contexts, **added).sample

    @inference
    def _generate(
        self,
        prompt: Any,
        reference_image: Any,
        source_subject_category: Any,
        target_subject_category: Any,
        *,
        latents: Tensor | None,
        guidance_scale: float,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        generator: Any,
        negative: Any,
        prompt_strength: float,
        prompt_reps: int,
        output_type: str,
        return_dict: bool,
        num_images_per_prompt: int,
        subject_embeddings: Tensor | None,
        callback: Callable[..., dict[str, Tensor]] | None,
        structure: StructureArguments | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures; arguments as in `BlipDiffusionPipeline.__call__`, checked here before any network runs."""
        rows = check.rows(
            {
                "prompt": prompt,
                "reference_image": reference_image,
                "source_subject_category": source_subject_category,
                "target_subject_category": target_subject_category,
                "neg_prompt": negative,
                "subject_embeddings": check.batch_of(subject_embeddings),
                "conditioning_image": None if structure is None else structure.pictures,
            }
        )
        prompts = check.prompts(rows["prompt"], "prompt")
        negatives = check.prompts(rows["neg_prompt"], "neg_prompt")
        targets = check.subjects(rows["target_subject_category"], "target_subject_category")
        check.guidance(guidance_scale)
        check.steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        check.callback(callback)
        check.one_of(output_type, "output_type", ("pil", "np", "pt", "latent"))
        number = len(prompts) * check.count(num_images_per_prompt, "num_images_per_prompt")
        queries = self._queries(len(prompts), subject_embeddings, reference_image, source_subject_category)
        self._token_ids([check.subject_prompt(*row, repeats=1) for row in zip(targets, prompts, strict=True)], queries)
        self._token_ids(negatives, 0)
        repeated = [check.subject_prompt(*row, prompt_strength, prompt_reps) for row in zip(targets, prompts, strict=True)]
        latents = self._initial_latents(latents, number, height, width, generator)
        residuals = None
        if structure is not None:
            size = tuple(side * self.vae_scale_factor for side in latents.shape[-2:])
            residuals = structure.on(self, rows["conditioning_image"], size, num_images_per_prompt)

        if subject_embeddings is None:
            subject_embeddings = self.subject_embeddings(reference_image, source_subject_category)
        contexts = self.encode_prompt(repeated, subject_embeddings, truncate=True)
        if guidance_scale > 1:
            contexts = torch.cat([self.encode_prompt(negatives), contexts])
        contexts = contexts.to(self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0)
        latents = self._denoise(latents, contexts, guidance_scale, num_inference_steps, generator, callback, residuals)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _queries(self, rows: int, embeddings: Tensor | None, reference_image: Any, category: Any) -> int:
        """Return how many positions the subject takes, after checking that it is given, and given once."""
        if (embeddings is None) == (reference_image is None):
            given = "neither" if embeddings is None else "both"
            raise SubjectError(
                f"{given} of reference_image and subject_embeddings are given; pass one: a picture of the "
                "subject with its source_subject_category, or its embeddings."
            )
        if embeddings is not None:
            return check.embeddings(embeddings, rows, self.text_encoder.config.hidden_size).shape[1]
        check.subjects(category if is_batch(category) else [category], "source_subject_category")
        return self.qformer.config.num_query_tokens

    def _initial_latents(
        self, latents: Tensor | None, number: int, height: int | None, width: int | None, generator: Any
    ) -> Tensor:
        factor, own = self.vae_scale_factor, self.unet.config.sample_size
        own_height, own_width = own if isinstance(own, Sequence) else (own, own)
        height = check.size(own_height and own_height * factor if height is None else height, "height", factor)
        width = check.size(own_width and own_width * factor if width is None else width, "width", factor)
        shape = (number, self.unet.config.in_channels, height // factor, width // factor)
        device, dtype = self._execution_device, self.unet.dtype
        generator = check.generators(generator, number)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return check.latents(latents, shape).to(device, dtype)

    def _denoise(
        self,
        latents: Tensor,
        contexts: Tensor,
        guidance_scale: float,
        steps: int,
        generator: Any,
        callback: Callable[..., dict[str, Tensor]] | None,
        residuals: Residuals | None,
    ) -> Tensor:
        scheduler, guided, dtype = self.scheduler, len(contexts) > len(latents), latents.dtype
        scheduler.set_timesteps(steps, device=latents.device)
        # Schedulers that draw noise take the generator; the others have no such argument.
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = latents * scheduler.init_noise_sigma
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            scaled = scheduler.scale_model_input(latents, timestep).to(dtype)
            given = torch.cat([scaled, scaled]) if guided else scaled
            share = step / len(scheduler.timesteps), (step + 1) / len(scheduler.timesteps)
            added = {} if residuals is None else residuals(given, timestep, contexts, share)
            noise = self.predict_noise(given, timestep, contexts, **added)
            if guided:
                noise = guide(*noise.chunk(2), guidance_scale)
            latents = scheduler.step(noise, timestep, latents, **random).prev_sample
            if callback is not None:
                returned = callback(self, step, timestep, {"latents": latents})
                latents = check.callback_latents(returned, latents)
        if not latents.isfinite().all():
            raise NonFiniteError(
                f"NaN or infinity appeared in the latents in {dtype}; load the model with "
                "torch_dtype=torch.float32 or torch.bfloat16, or lower guidance_scale."
            )
        return latents.to(dtype)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        samples = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(samples, output_type)
