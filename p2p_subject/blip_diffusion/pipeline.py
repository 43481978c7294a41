"""Zero-shot subject-driven generation: pictures of a subject, its category and a prompt to new pictures.

After BLIP-Diffusion (Li, Li, Hoi; NeurIPS 2023), zero-shot inference, with the prompt format of the released
model. The call signature and the folder layout are those of the public checkpoint.
"""

# No `from __future__ import annotations` here: diffusers reads the types of a pipeline's constructor, and 0.33 does not
# find them in annotations that are strings.
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

from p2p_subject.blip_diffusion import arguments as check
from p2p_subject.blip_diffusion.checkpoint import CheckpointMixin
from p2p_subject.blip_diffusion.encoding import EncodingMixin
from p2p_subject.blip_diffusion.fit import require_fit
from p2p_subject.blip_diffusion.generation import GenerationMixin
from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor, Picture
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel

__all__ = ["BlipDiffusionPipeline"]


class BlipDiffusionPipeline(CheckpointMixin, EncodingMixin, GenerationMixin, DiffusionPipeline):
    """Generates a subject, given by pictures, in a new context, given by a prompt; a pipeline of diffusers.

    Args:
        tokenizer: CLIP's, of the prompt.
        text_encoder: with room for the subject.
        vae: latents to pictures.
        unet: predicts noise from latents, timestep and text.
        scheduler: any of diffusers; the public checkpoint has PNDM.
        qformer: pictures and category to subject embeddings.
        image_processor: of the subject's pictures.
        qformer_tokenizer: BERT's word pieces, of the category.
        ctx_begin_pos: how many tokens stand before the subject; 2 is after the start token and "a".
        mean: three numbers used in place of the image processor's, as the public checkpoint has them; so is
            `std`.
        std: see `mean`.

    Raises:
        ModelError: the components' sizes do not fit together.
    """

    model_cpu_offload_seq = "qformer->text_encoder->unet->vae"

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: ContextCLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        qformer: Blip2QFormerModel,
        image_processor: BlipImageProcessor,
        qformer_tokenizer: BertTokenizer,
        ctx_begin_pos: int = 2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_fit(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            qformer=qformer,
            qformer_tokenizer=qformer_tokenizer,
            image_processor=image_processor,
            ctx_begin_pos=ctx_begin_pos,
        )
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            qformer=qformer,
            image_processor=image_processor,
            qformer_tokenizer=qformer_tokenizer,
        )
        self.register_to_config(ctx_begin_pos=ctx_begin_pos, mean=mean, std=std)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def __call__(
        self,
        prompt: str | Sequence[str],
        reference_image: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        source_subject_category: str | Sequence[str] | None = None,
        target_subject_category: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        guidance_scale: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        neg_prompt: str | Sequence[str] | None = "",
        prompt_strength: float = 1.0,
        prompt_reps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        subject_embeddings: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures of a subject.

        A list makes one row an entry, and all lists have one length B; a value that is not in a list serves
        every row.

        Args:
            prompt: what surrounds the subject, such as "swimming underwater"; may be empty.
            reference_image: pictures of the subject as `subject_embeddings` takes them: a list inside the
                list holds several pictures of one subject.
            source_subject_category: what the pictures show, such as "dog".
            target_subject_category: what to generate, such as "dog".
            latents: (B * num_images_per_prompt, C, h, w) Gaussian noise to start from, or None to draw it.
            guidance_scale: strength of classifier-free guidance; none at 1 or below.
            height: of the pictures in pixels, a multiple of `vae_scale_factor`; None takes the U-Net's own
                size.
            width: see `height`.
            num_inference_steps: steps of the scheduler.
            generator: one, or one a picture, to draw noise from.
            neg_prompt: what to avoid; encoded without a subject.
            prompt_strength: with `prompt_reps`: the prompt is repeated int(prompt_strength * prompt_reps)
                times, and cut where the text encoder's window ends, to strengthen it against the subject.
            prompt_reps: see `prompt_strength`.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or "latent".
            return_dict: False returns a tuple.
            negative_prompt: another spelling of `neg_prompt`.
            num_images_per_prompt: pictures a row; those of one row follow each other.
            subject_embeddings: (1 or B, Nq, D), in place of pictures and their category: embedded before,
                fine-tuned or interpolated. Several rows count as a list.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}); may return new
                latents in a dictionary.

        Returns:
            `ImagePipelineOutput` whose `images` hold B * num_images_per_prompt pictures.

        Raises:
            PromptError, PromptTooLongError, SubjectError, ImageError, StepsError, NonFiniteError,
                ArgumentError: an argument cannot be used; raised before a network runs.
            ArgumentError: the callback returned something else than it may.
            NonFiniteError: NaN or infinity appeared in the latents.
        """
        return self._generate(
            prompt,
            reference_image,
            source_subject_category,
            target_subject_category,
            latents=latents,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=generator,
            negative=check.negative(neg_prompt, negative_prompt),
            prompt_strength=prompt_strength,
            prompt_reps=prompt_reps,
            output_type=output_type,
            return_dict=return_dict,
            num_images_per_prompt=num_images_per_prompt,
            subject_embeddings=subject_embeddings,
            callback=callback_on_step_end,
        )
