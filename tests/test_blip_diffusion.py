"""The same numbers as the original implementation, from the pixels to the picture."""

from __future__ import annotations

import json

import pytest
import torch
from blip_tiny import deviation, picture, tiny_pipeline
from conftest import golden, golden_dir
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image
from safetensors.torch import load_file

from benchmarks import parity
from p2p_subject import Blend, Editor, Subject, swap_subject
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


@pytest.fixture(scope="module")
def deviations():
    golden("blip_diffusion/checkpoint/unet")
    return parity.measure(golden("blip_diffusion").parent)


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("value", parity.TOLERANCES)
def test_every_value_of_the_pipeline_matches_the_original(deviations, index, value):
    (found,) = [row for row in deviations if (row.case, row.value) == (index, value)]
    assert found.within, found


def test_parity_tells_a_deviation_from_rounding_and_from_nothing_to_compare(monkeypatch, capsys, tmp_path):
    rows = [parity.Deviation(0, "image", 1e-5), parity.Deviation(1, "image", 1e-3)]
    monkeypatch.setattr(parity, "measure", lambda folder: rows[:1])
    assert parity.main([]) == 0 and "beyond" not in capsys.readouterr().out
    monkeypatch.setattr(parity, "measure", lambda folder: rows)
    assert parity.main([]) == 1 and capsys.readouterr().out.splitlines()[-1].endswith("beyond")
    assert not parity.Deviation(0, "image", float("nan")).within
    monkeypatch.undo()
    assert parity.main(["--golden", str(tmp_path)]) == 2 and "lacks cases.json" in capsys.readouterr().err


def test_golden_values_are_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("P2P_SUBJECT_GOLDEN", str(tmp_path))
    assert golden_dir() == tmp_path
    monkeypatch.setenv("P2P_SUBJECT_GOLDEN", str(tmp_path / "nowhere"))
    with pytest.raises(pytest.fail.Exception, match="no folder"):
        golden_dir()


@pytest.fixture(params=["golden", "tiny"])
def checkpoint(request, tmp_path):
    """A model folder in the public layout, and where the word pieces of its Q-Former are."""
    if request.param == "golden":
        return golden("blip_diffusion/checkpoint/unet").parent, golden("blip_diffusion/qformer_tokenizer")
    # The tiny tokenizer spells, so that the script's negative prompt takes a token a letter.
    tiny_pipeline(tmp_path / "parts", positions=300).save_pretrained(tmp_path / "model")
    return tmp_path / "model", tmp_path / "parts" / "word_pieces"


def test_script_of_the_model_card_runs_with_the_import_changed(checkpoint):
    folder, words = checkpoint
    blip_diffusion_pipe = BlipDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, qformer_tokenizer=words).to(
        "cpu"
    )
    cond_subject = "dog"
    tgt_subject = "dog"
    text_prompt_input = "swimming underwater"
    cond_image = picture(0)
    guidance_scale = 7.5
    num_inference_steps = 3
    negative_prompt = (
        "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality, "
        "low quality, jpeg artifacts, morbid, mutilated, out of frame, ugly, bad anatomy, bad proportions, "
        "deformed, blurry, duplicate"
    )
    output = blip_diffusion_pipe(
        text_prompt_input,
        cond_image,
        cond_subject,
        tgt_subject,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        neg_prompt=negative_prompt,
        height=64,
        width=64,
    ).images
    assert len(output) == 1 and output[0].size == (64, 64) and output[0].mode == "RGB"


def test_the_editor_edits_with_a_folder_in_the_public_layout(checkpoint):
    folder, words = checkpoint
    editor = Editor.from_pretrained(folder, qformer_tokenizer=words)
    # The public scheduler has no offset: by its settings the last step would end at the noise that it begins with.
    config = editor.model.pipeline.scheduler.config
    assert isinstance(editor.model.pipeline.scheduler, PNDMScheduler)
    assert (config.steps_offset, config.set_alpha_to_one) == (0, False)
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs.set_timesteps(4)
    schedule = editor.model.schedule(4)
    assert schedule.timesteps == tuple(theirs.timesteps.tolist()) == (750, 500, 250, 0) and schedule.final_alpha == 1
    subject = Subject(picture(1), "dog")
    made = editor.generate("a dog on grass", subject=subject, seed=0, steps=4, size=(64, 64))
    source = editor.record(editor.invert(made.image, "a cat on grass", steps=4))
    result = editor.edit(source, swap_subject("cat", subject, cross_replace=0.5, self_replace=0.5, blend=Blend(rule="peak")))
    assert result.image.size == (64, 64) and result.mask.size == (64, 64) and torch.isfinite(result.latents).all()
