"""What the pipeline refuses, before a network runs and with a message to act on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blip_tiny import MULTIMODAL, picture, seeded, tiny_pipeline

from p2p_subject.blip_diffusion import Blip2QFormerModel, BlipDiffusionPipeline, BlipImageProcessor
from p2p_subject.errors import (
    ArgumentError,
    ImageError,
    ModelError,
    NonFiniteError,
    PromptError,
    PromptTooLongError,
    StepsError,
    SubjectError,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> BlipDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


def generate(pipeline, prompt="sea", reference=None, source="dog", target="dog", **changes) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", "generator": seeded(), **changes}
    reference = picture(0) if reference is None else reference
    return pipeline(prompt, reference, source, target, **arguments).images


@pytest.mark.parametrize(
    ("error", "says", "changes"),
    [
        (PromptError, "expected a text", {"prompt": 3}),
        (PromptError, "expected a text", {"prompt": ["sea", None]}),
        (
            PromptError,
            "prompt has 2, reference_image has 3",
            {"prompt": ["a", "b"], "reference": [picture(0)] * 3},
        ),
        (
            PromptError,
            "prompt has 2, reference_image has 1",
            {"prompt": ["a", "b"], "reference": [picture(0)]},
        ),
        (PromptError, "prompt has 0", {"prompt": []}),
        (PromptTooLongError, "Shorten", {"prompt": "a" * 30}),
        (PromptTooLongError, r"do not fit: \['snow'\]", {"prompt": "grass sand and snow"}),
        (PromptTooLongError, "Shorten", {"neg_prompt": "a" * 30}),
        (PromptError, "two spellings", {"neg_prompt": "a", "negative_prompt": "b"}),
        (PromptError, "no repetition", {"prompt_reps": 0}),
        (PromptError, "no repetition", {"prompt_strength": 0.01}),
        (PromptError, "no repetition", {"prompt_strength": float("nan")}),
        (ArgumentError, "num_images_per_prompt", {"num_images_per_prompt": 0}),
        (PromptError, "2 generators are given for 1", {"generator": [seeded(), seeded()]}),
        (SubjectError, "source_subject_category", {"source": " "}),
        (SubjectError, "source_subject_category", {"source": None}),
        (SubjectError, "target_subject_category", {"target": None}),
        (SubjectError, "both", {"subject_embeddings": torch.zeros(1, 4, 24)}),
        (ImageError, "PIL.Image.open", {"reference": "dog.png"}),
        (ImageError, "list is empty", {"reference": [[]]}),
        (ImageError, "multiple of 2", {"height": 33}),
        (ImageError, "multiple of 2", {"width": -2}),
        (ArgumentError, "output_type", {"output_type": "jpeg"}),
        (ImageError, "latents have shape", {"latents": torch.zeros(1, 4, 4, 4)}),
        (NonFiniteError, "latents hold", {"latents": torch.full((1, 4, 8, 8), torch.nan)}),
        (NonFiniteError, "guidance_scale", {"guidance_scale": float("inf")}),
        (ArgumentError, "guidance_scale", {"guidance_scale": "7"}),
        (ArgumentError, "callback_on_step_end", {"callback_on_step_end": "print"}),
        (StepsError, "1 to 1000", {"num_inference_steps": 0}),
        (StepsError, "1 to 1000", {"num_inference_steps": 1001}),
        (StepsError, "1 to 1000", {"num_inference_steps": 2.5}),
    ],
)
def test_unusable_arguments_are_refused_before_a_network_runs(pipeline, monkeypatch, error, says, changes):
    def run(*args, **kwargs):
        raise AssertionError("a network ran")

    for network in (pipeline.qformer, pipeline.text_encoder, pipeline.unet, pipeline.vae):
        monkeypatch.setattr(network, "forward", run)
    with pytest.raises(error, match=says):
        generate(pipeline, **changes)


@pytest.mark.parametrize("embeddings", [None, torch.zeros(4, 24), torch.zeros(1, 4, 25), "dog"])
def test_a_missing_or_misshapen_subject_is_refused(pipeline, embeddings):
    with pytest.raises(SubjectError, match="subject_embeddings"):
        pipeline("sea", target_subject_category="dog", subject_embeddings=embeddings)


def test_nan_in_the_latents_is_reported(tmp_path):
    pipeline = tiny_pipeline(tmp_path)
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    with pytest.raises(NonFiniteError, match="float32"):
        generate(pipeline)


def test_components_that_do_not_fit_are_refused(pipeline):
    parts = pipeline.components
    wide = Blip2QFormerModel(replace(MULTIMODAL, projection_size=None))
    with pytest.raises(ModelError, match="width is 24, the subject embeddings' width is 32"):
        BlipDiffusionPipeline(**{**parts, "qformer": wide})
    with pytest.raises(ModelError, match=r"size is \(64, 64\)"):
        BlipDiffusionPipeline(**{**parts, "image_processor": BlipImageProcessor(size=64)})
    with pytest.raises(ModelError, match="positions a subject needs"):
        BlipDiffusionPipeline(**parts, ctx_begin_pos=20)


@pytest.mark.parametrize("returned", [torch.zeros(1, 4, 8, 8), {"latents": None}, {"latents": torch.zeros(1, 4, 4, 4)}])
def test_a_callback_that_returns_something_else_is_refused(pipeline, returned):
    with pytest.raises(ArgumentError, match=r"expected None or a dictionary whose .*\(1, 4, 8, 8\)"):
        generate(pipeline, callback_on_step_end=lambda *_: returned)


def test_an_unknown_kind_of_picture_is_refused():
    with pytest.raises(ArgumentError, match="output_type is 'jpeg'"):
        BlipImageProcessor.postprocess(torch.zeros(1, 3, 2, 2), "jpeg")
