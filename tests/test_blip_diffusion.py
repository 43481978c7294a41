"""The same numbers as the original implementation, from the pixels to the picture."""

from __future__ import annotations

import json

import pytest
import torch
from blip_tiny import deviation
from conftest import golden
from PIL import Image
from safetensors.torch import load_file

from p2p_subject.blip_diffusion import (
    Blip2QFormerModel,
    BlipDiffusionPipeline,
    BlipImageProcessor,
)
from p2p_subject.blip_diffusion.word_pieces import load_word_pieces

CASES = (0, 1, 2)


def case(index: int) -> dict:
    cases = json.loads(golden("blip_diffusion/cases.json").read_text())["cases"]
    return next(entry for entry in cases if entry["kind"] == "generate" and entry["index"] == index)


def values(index: int, *names: str) -> list[torch.Tensor]:
    stored = load_file(golden("blip_diffusion/golden.safetensors"))
    if not all(f"case{index}.{name}" in stored for name in names):
        pytest.skip(f"the golden values here lack {', '.join(names)} of case {index}")
    return [stored[f"case{index}.{name}"] for name in names]


def reference(index: int) -> Image.Image:
    return Image.open(golden(f"blip_diffusion/reference_{index}.png"))


@pytest.fixture(scope="module")
def official():
    golden("blip_diffusion/checkpoint/unet")
    pipeline = BlipDiffusionPipeline.from_pretrained(
        golden("blip_diffusion/checkpoint"), qformer_tokenizer=golden("blip_diffusion/qformer_tokenizer")
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("index", CASES)
def test_pixel_values_are_exactly_the_originals(index):
    processor = BlipImageProcessor.from_pretrained(golden("blip_diffusion/checkpoint/image_processor"))
    (expected,) = values(index, "pixel_values")
    assert deviation(processor.preprocess(reference(index)), expected) == 0


@pytest.mark.parametrize("index", CASES)
def test_subject_embeddings_match_the_original(index):
    processor = BlipImageProcessor.from_pretrained(golden("blip_diffusion/checkpoint/image_processor"))
    qformer = Blip2QFormerModel.from_pretrained(golden("blip_diffusion/checkpoint/qformer"))
    words = load_word_pieces(golden("blip_diffusion/qformer_tokenizer"))
    (expected,) = values(index, "subject_embeddings")
    text = words([case(index)["source_subject"]], return_tensors="pt")
    with torch.no_grad():
        actual = qformer(processor.preprocess(reference(index)), text.input_ids, text.attention_mask)
    assert deviation(actual, expected) < 5e-6


@pytest.mark.parametrize("index", CASES)
def test_text_embeddings_match_the_original(official, index):
    subject, expected = values(index, "subject_embeddings", "text_embeddings")
    told = case(index)
    prompt = ", ".join([f"a {told['target_subject']} {told['prompt']}"] * told["prompt_reps"])
    assert deviation(official.encode_prompt(prompt, subject, truncate=True), expected) < 5e-5


@pytest.mark.parametrize("index", CASES)
def test_images_match_the_original(official, index):
    latents, expected = values(index, "latents", "image")
    told = case(index)
    images = official(
        told["prompt"],
        reference(index),
        told["source_subject"],
        told["target_subject"],
        latents,
        told["guidance_scale"],
        told["height"],
        told["width"],
        told["steps"],
        None,
        told["negative_prompt"],
        told["prompt_strength"],
        told["prompt_reps"],
        output_type="pt",
    ).images
    assert deviation(images, expected) < 1e-4


def test_script_of_the_model_card_runs_with_the_import_changed():
    folder = golden("blip_diffusion/checkpoint/unet").parent
    words = golden("blip_diffusion/qformer_tokenizer")
    blip_diffusion_pipe = BlipDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float16, qformer_tokenizer=words
    ).to("cpu")
    negative_prompt = (
        "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality, "
        "low quality, jpeg artifacts, morbid, mutilated, out of frame, ugly, bad anatomy, bad proportions, "
        "deformed, blurry, duplicate"
    )
    output = blip_diffusion_pipe(
        "swimming underwater",
        reference(0),
        "dog",
        "dog",
        guidance_scale=7.5,
        num_inference_steps=3,
        neg_prompt=negative_prompt,
        height=64,
        width=64,
    ).images
    assert len(output) == 1 and output[0].size == (64, 64) and output[0].mode == "RGB"
