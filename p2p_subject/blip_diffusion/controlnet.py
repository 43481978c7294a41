"""Structure control and style transfer: BLIP-Diffusion with a ControlNet beside its U-Net.

After BLIP-Diffusion (Li, Li, Hoi; NeurIPS 2023) on structure-controlled generation and subject-driven style transfer. The
call signature and the folder layout are those of the public checkpoint `Salesforce/blipdiffusion-controlnet`.
"""

# No `from __future__ import annotations` here, as in `pipeline.py`.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

from p2p_subject import checks
from p2p_subject.blip_diffusion import arguments as check
from p2p_subject.blip_diffusion.fit import require_controlnet
from p2p_subject.blip_diffusion.generation import Residuals
from p2p_subject.blip_diffusion.image_processor import BlipImageProcessor, Picture
from p2p_subject.blip_diffusion.pipeline import BlipDiffusionPipeline
from p2p_subject.blip_diffusion.qformer import Blip2QFormerModel
from p2p_subject.blip_diffusion.text_encoder import ContextCLIPTextModel
from p2p_subject.controlnets import residuals
from p2p_subject.errors import ArgumentError, ImageError

__all__ = ["BlipDiffusionControlNetPipeline"]


class BlipDiffusionControlNetPipeline(BlipDiffusionPipeline):
    """Generates a subject, or something else in a subject's style, along the structure of a control picture.

    Args as for `BlipDiffusionPipeline`, and:
        controlnet: any `ControlNetModel` for the U-Net; it can be replaced later (`pipeline.controlnet = ...`).

    Raises:
        ModelError: the components' sizes do not fit together.
    """

    component_names: ClassVar[tuple[str, ...]] = (*BlipDiffusionPipeline.component_names, "controlnet")

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: ContextCLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        qformer: Blip2QFormerModel,
        controlnet: ControlNetModel,
        image_processor: BlipImageProcessor,
        qformer_tokenizer: BertTokenizer,
        ctx_begin_pos: int = 2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            qformer=qformer,
            image_processor=image_processor,
            qformer_tokenizer=qformer_tokenizer,
            ctx_begin_pos=ctx_begin_pos,
            mean=mean,
            std=std,
        )
        require_controlnet(controlnet, unet, vae)
        self.register_modules(controlnet=controlnet)

    def __call__(
        self,
        prompt: str | Sequence[str],
        reference_image: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        condtioning_image: Picture | Sequence[Picture] | None = None,
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
        conditioning_image: Picture | Sequence[Picture] | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures along a control picture; returns and raises as `BlipDiffusionPipeline.__call__`.

        For style transfer, `reference_image` and `source_subject_category` are of the style ("flower"),
        `target_subject_category` is what to generate ("teapot").

        Args as for `BlipDiffusionPipeline.__call__`, and:
            condtioning_image: the control picture, drawn as the ControlNet was trained on, such as edges; its name is spelt
                as in the original. One for all rows, or a list of one a row; squeezed to `width` and `height`.
            conditioning_image: another spelling of `condtioning_image`.
            controlnet_conditioning_scale: strength of the structure: factor of what the ControlNet adds to the U-Net.
            control_guidance_start: share of the steps, from the noise, at which structure control begins.
            control_guidance_end: share of the steps at which it ends.
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
            structure=_Structure(
                _one_spelling(condtioning_image, conditioning_image),
                controlnet_conditioning_scale,
                control_guidance_start,
                control_guidance_end,
            ),
        )


@dataclass(frozen=True)
class _Structure:
    """The arguments of structure control; `StructureArguments` of `generation`."""

    pictures: Any
    scale: float
    start: float
    end: float

    def __post_init__(self) -> None:
        if not checks.is_number(self.scale):
            raise ArgumentError(f"controlnet_conditioning_scale is {self.scale!r}; expected a number, such as 1.0.")
        if not (checks.is_number(self.start, 0, 1) and checks.is_number(self.end, 0, 1) and self.start < self.end):
            raise ArgumentError(
                f"control_guidance_start is {self.start!r} and control_guidance_end {self.end!r}; expected shares of the steps "
                "between 0 and 1, the start below the end."
            )

    def on(self, pipeline: Any, pictures: list[Any], size: tuple[int, int], repeats: int) -> Residuals:
        network = pipeline.controlnet
        # Checked in every call: it may have been replaced.
        require_controlnet(network, pipeline.unet, pipeline.vae)
        pixels = _pixels(pipeline.image_processor, pictures, size).to(pipeline._execution_device)
        pixels = pixels.repeat_interleave(repeats, dim=0)

        def added(latents: Tensor, timestep: Tensor, contexts: Tensor, share: tuple[float, float]) -> dict[str, Any]:
            if share[0] < self.start or share[1] > self.end:
                return {}
            # Under guidance the rows come twice: without the subject, and with it.
            own = pixels.repeat(len(latents) // len(pixels), 1, 1, 1)
            return residuals(network, latents, timestep, contexts, own, self.scale)

        return added


def _pixels(processor: BlipImageProcessor, pictures: list[Any], size: tuple[int, int]) -> Tensor:
    """Control pictures as (B, 3, height, width) float32 in [0, 1], resized as the reference pictures are."""
    height, width = size
    own = {"size": {"height": height, "width": width}, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    plain = BlipImageProcessor(**{**processor.config, **own, "do_normalize": False, "do_center_crop": False})
    return plain.preprocess(pictures)


def _one_spelling(official: Any, corrected: Any) -> Any:
    if (official is None) == (corrected is None):
        given = "neither" if official is None else "both"
        raise ImageError(
            f"{given} of condtioning_image and conditioning_image are given, two spellings of one argument; pass the control "
            "picture, such as edges, by one of them."
        )
    return corrected if official is None else official
