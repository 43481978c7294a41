"""Calling the pipeline: rows, subjects, schedulers, callbacks, precision, offloading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blip_tiny import picture, seeded, tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from p2p_subject.blip_diffusion import PAPER, RELEASED, BlipDiffusionPipeline
from p2p_subject.errors import (
    PromptTooLongError,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> BlipDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


def generate(pipeline, prompt="sea", reference=None, source="dog", target="dog", **changes) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", "generator": seeded(), **changes}
    reference = picture(0) if reference is None else reference
    return pipeline(prompt, reference, source, target, **arguments).images


# What comes out


def test_sizes_come_from_the_model(pipeline):
    assert generate(pipeline).shape == (1, 3, 16, 16)
    assert generate(pipeline, height=32, width=24).shape == (1, 3, 32, 24)


def test_every_output_type_is_the_same_picture(pipeline):
    tensor = generate(pipeline)
    array = generate(pipeline, output_type="np")
    image = generate(pipeline, output_type="pil")[0]
    latents = generate(pipeline, output_type="latent")
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    assert latents.shape == (1, 4, 8, 8)
    as_tuple = pipeline("sea", picture(0), "dog", "dog", num_inference_steps=3, generator=seeded(), return_dict=False)
    assert np.array_equal(np.asarray(as_tuple[0][0]), np.asarray(image))


def test_what_is_asked_for_matters(pipeline):
    base = generate(pipeline)
    assert torch.equal(base, generate(pipeline))
    for changes in (
        {"prompt": "sun"},
        {"reference": picture(1)},
        {"source": "cat"},
        {"target": "cat"},
        {"generator": seeded(1)},
        {"guidance_scale": 1.0},
        {"neg_prompt": "blur"},
        {"num_inference_steps": 4},
    ):
        assert not torch.equal(base, generate(pipeline, **changes)), changes


def test_given_latents_are_the_drawn_ones(pipeline):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))
    drawn = generate(pipeline, generator=seeded(5))
    assert torch.equal(generate(pipeline, latents=noise, generator=None), drawn)


def test_published_settings_are_those_of_their_names(pipeline):
    short = {"num_inference_steps": 2}
    paper, released = (generate(pipeline, "x", **(settings | short)) for settings in (PAPER, RELEASED))
    assert torch.equal(paper, generate(pipeline, "x", **short, guidance_scale=7.5, prompt_reps=1))
    assert torch.equal(released, generate(pipeline, "x", **short, guidance_scale=7.5, prompt_reps=20))
    assert (PAPER["num_inference_steps"], RELEASED["num_inference_steps"]) == (100, 25)


def test_repetition_strengthens_up_to_the_window(pipeline):
    once, twice, often = (generate(pipeline, "x", prompt_reps=reps) for reps in (1, 2, 20))
    assert not torch.equal(once, twice)
    assert torch.equal(often, generate(pipeline, "x", prompt_reps=40, prompt_strength=0.5))


def test_both_spellings_of_the_negative_prompt_agree(pipeline):
    assert torch.equal(generate(pipeline, neg_prompt="blur"), generate(pipeline, negative_prompt="blur"))
    assert torch.equal(generate(pipeline, neg_prompt=None), generate(pipeline, negative_prompt=""))


# Rows


def test_a_batch_equals_its_rows(pipeline):
    prompts, pictures, sources = ["sea", "sun"], [picture(0), picture(1, 30, 60)], ["dog", "red panda"]
    targets, negatives = ["cat", "dog"], ["blur", ""]
    together = generate(pipeline, prompts, pictures, sources, targets, neg_prompt=negatives, generator=(seeded(0), seeded(1)))
    alone = [
        generate(pipeline, *row[:4], neg_prompt=row[4], generator=seeded(index))
        for index, row in enumerate(zip(prompts, pictures, sources, targets, negatives, strict=True))
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_a_value_outside_a_list_serves_every_row(pipeline):
    spelled = generate(pipeline, ["sea", "sun"], [picture(0)] * 2, ["dog"] * 2, ["dog"] * 2)
    assert torch.allclose(generate(pipeline, ["sea", "sun"]), spelled, atol=1e-5)


def test_pictures_of_one_row_follow_each_other(pipeline):
    four = [seeded(index) for index in range(4)]
    images = generate(pipeline, ["sea", "sun"], num_images_per_prompt=2, generator=four)
    assert torch.allclose(images[1:2], generate(pipeline, "sea", generator=seeded(1)), atol=1e-5)
    assert torch.allclose(images[2:3], generate(pipeline, "sun", generator=seeded(2)), atol=1e-5)


def test_several_pictures_of_a_subject_are_averaged(pipeline):
    pictures = [picture(0), picture(1), picture(2)]
    alone = torch.cat([pipeline.subject_embeddings(one, "dog") for one in pictures])
    together = pipeline.subject_embeddings([pictures], "dog")
    assert together.shape == (1, 4, 24)
    assert torch.allclose(together, alone.mean(dim=0, keepdim=True), atol=1e-5)
    uneven = pipeline.subject_embeddings([pictures, pictures[0], pictures[1:]], ["dog", "dog", "dog"])
    assert torch.allclose(uneven[1], alone[0], atol=1e-5)
    assert torch.allclose(uneven[2], alone[1:].mean(dim=0), atol=1e-5)


def test_embeddings_stand_for_the_pictures(pipeline):
    first, second = (pipeline.subject_embeddings(picture(seed), "dog") for seed in (0, 1))
    expected = generate(pipeline)
    direct = {"num_inference_steps": 3, "output_type": "pt", "target_subject_category": "dog"}
    assert torch.equal(pipeline("sea", subject_embeddings=first, generator=seeded(), **direct).images, expected)
    line = torch.lerp(first, second, torch.linspace(0, 1, 3)[:, None, None])
    images = pipeline("sea", subject_embeddings=line, generator=[seeded() for _ in range(3)], **direct).images
    assert torch.allclose(images[:1], expected, atol=1e-5)
    assert torch.allclose(images[2:], generate(pipeline, reference=picture(1)), atol=1e-5)


# Prompts


def test_a_prompt_fills_the_window_with_and_without_a_subject(pipeline):
    subject = pipeline.subject_embeddings(picture(0), "dog")
    assert pipeline.encode_prompt("a dog").shape == (1, 24, 24)
    assert pipeline.encode_prompt(["a dog", "a cat"], subject).shape == (2, 24, 24)
    assert torch.equal(pipeline.encode_prompt("a dog")[:, :2], pipeline.encode_prompt("a dog", subject)[:, :2])


def test_a_prompt_that_does_not_fit_is_refused_or_cut_on_request(pipeline):
    subject = pipeline.subject_embeddings(picture(0), "dog")
    fits, too_long = " ".join("a" * 18), " ".join("a" * 19)
    assert pipeline.encode_prompt(fits, subject).shape == (1, 24, 24)
    with pytest.raises(PromptTooLongError, match=r"19 tokens and 18 .*do not fit: \['a'\]"):
        pipeline.encode_prompt(too_long, subject)
    cut = pipeline.encode_prompt(too_long, subject, truncate=True)
    assert torch.equal(cut, pipeline.encode_prompt(fits, subject))


# Schedulers, steps, callbacks, precision, modes


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_any_scheduler_of_diffusers_serves(tmp_path, scheduler):
    pipeline = tiny_pipeline(tmp_path)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    images = generate(pipeline)
    assert images.isfinite().all() and torch.equal(images, generate(pipeline))


def test_the_callback_sees_every_step_and_may_change_it(pipeline):
    seen = []

    def zero_last(pipe, step, timestep, values):
        seen.append(step)
        return {"latents": torch.zeros_like(values["latents"])} if step == len(pipe.scheduler.timesteps) - 1 else {}

    latents = generate(pipeline, callback_on_step_end=zero_last, output_type="latent")
    assert seen == list(range(len(pipeline.scheduler.timesteps))) and not latents.any()
    watched = generate(pipeline, callback_on_step_end=lambda *_: None)
    assert torch.equal(watched, generate(pipeline))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_from_end_to_end(tmp_path, dtype):
    pipeline = tiny_pipeline(tmp_path).to(dtype)
    assert pipeline.dtype == pipeline.subject_embeddings(picture(0), "dog").dtype == dtype
    assert pipeline.encode_prompt("a dog").dtype == generate(pipeline, output_type="latent").dtype == dtype
    assert generate(pipeline).dtype == dtype
    assert generate(pipeline, output_type="np").dtype == np.float32


def test_networks_left_in_training_mode_generate_without_dropout_and_stay_in_it(tmp_path):
    pipeline = tiny_pipeline(tmp_path)
    expected = generate(pipeline)
    pipeline.qformer.train()
    pipeline.qformer.visual_encoder.eval()
    assert torch.equal(generate(pipeline), expected)
    assert pipeline.qformer.proj_layer.training and not pipeline.qformer.visual_encoder.training


def test_it_is_a_pipeline_of_diffusers(pipeline):
    expected = generate(pipeline)
    for again in (BlipDiffusionPipeline(**pipeline.components), BlipDiffusionPipeline.from_pipe(pipeline)):
        again.set_progress_bar_config(disable=True)
        assert again.unet is pipeline.unet and torch.equal(generate(again), expected)
    assert pipeline.device == torch.device("cpu") and pipeline.dtype == torch.float32
    assert set(pipeline.model_cpu_offload_seq.split("->")) == {"qformer", "text_encoder", "unet", "vae"}


def test_offloaded_models_give_the_same_picture(tmp_path):
    pytest.importorskip("accelerate")
    pipeline = tiny_pipeline(tmp_path)
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipeline), expected)
    assert torch.equal(generate(pipeline), expected)


def test_networks_work_with_weights_that_are_fetched_layer_by_layer(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pipeline = tiny_pipeline(tmp_path)
    expected = pipeline.encode_prompt("a dog", pipeline.subject_embeddings(picture(0), "dog"))
    for network in (pipeline.text_encoder, pipeline.qformer):
        accelerate.cpu_offload(network, torch.device("cpu"), offload_buffers=True)
    assert pipeline.qformer.query_tokens.device.type == "meta"
    assert torch.equal(pipeline.encode_prompt("a dog", pipeline.subject_embeddings(picture(0), "dog")), expected)
