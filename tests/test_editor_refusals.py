"""Bad input to the editor gets a clear error, before any network runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from inversion import ModelMismatchError, NonFiniteError, StepsError, TrajectoryError
from inversion.trajectory import read_safetensors, write_safetensors
from p2p_subject import Editor, Source, Subject, reweight
from p2p_subject.errors import (
    ArgumentError,
    EditSpecError,
    HookError,
    ImageError,
    MaskError,
    ModelError,
    PromptError,
    PromptTooLongError,
    SubjectError,
    WordNotFoundError,
)
from tests.editing import forbid_networks, picture, swap_subject


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"recording.self_pixels": torch.tensor([1, 2])}, "maps of the recording in it are damaged"),
        (lambda r: {"recording.maps": r.maps[:1]}, "is damaged: queries"),
        (lambda r: {"recording.maps": None}, "is incomplete"),
        (lambda r: dict.fromkeys(list(r.tensors())[:1], torch.full((3, 2, 4, 4), torch.nan)), "is damaged: queries"),
        (lambda r: {"attention": torch.full((3, 2, 2), torch.nan)}, "its attention or its model_size is damaged"),
        (lambda r: {"model_size": torch.tensor([0, 0])}, "its attention or its model_size is damaged"),
        (lambda r: {"subject": torch.zeros(2, 3)}, r"subject is \(2, 3\); expected finite embeddings"),
    ],
)
def test_a_damaged_file_is_refused_when_it_is_loaded(editor, source, tmp_path, change, message) -> None:
    path, recorded = tmp_path / "r.safetensors", editor.record(source)
    recorded.save(path, recording=True)
    tensors, metadata = read_safetensors(path)
    tensors = {name: value for name, value in (tensors | change(recorded.recording)).items() if value is not None}
    write_safetensors(path, {name: value.contiguous() for name, value in tensors.items()}, metadata)
    with pytest.raises(TrajectoryError, match=message):
        Source.load(path)


def test_attention_of_another_length_is_refused_before_any_network(editor, source, dog, monkeypatch) -> None:
    forbid_networks(editor, monkeypatch)
    with pytest.raises(TrajectoryError, match="holds the attention of 3 tokens"):
        editor.edit(replace(source, attention=source.attention[:3]), swap_subject("cat", dog))


def test_weights_whose_steps_are_skipped_are_refused(editor, source) -> None:
    with pytest.raises(EditSpecError, match="of the 2 steps that are run"):
        editor.edit(source, reweight({"cat": 3.0}, cross_replace=0.25, blend=None), skip=0.5)


def test_a_job_started_by_a_callback_is_refused_by_name(editor, source, dog) -> None:
    with pytest.raises(HookError, match="in the middle of a job"):
        editor.edit(source, swap_subject("cat", dog), callback=lambda step, latents: editor.generate("a cat", steps=1))


def test_unknown_methods_and_options_are_refused_before_any_network(editor, monkeypatch) -> None:
    forbid_networks(editor, monkeypatch)
    with pytest.raises(ArgumentError, match="Did you mean 'null_text'"):
        editor.invert(picture(), "a cat", method="nulltext")
    with pytest.raises(ArgumentError, match=r"'null_text' has no option 'inner_step'; Did you mean 'inner_steps'"):
        editor.invert(picture(), "a cat", method="null_text", inner_step=3)
    with pytest.raises(ArgumentError, match="'direct' has no option 'seed'.* none"):
        editor.invert(picture(), "a cat", seed=3)
    with pytest.raises(ArgumentError, match="generated again by every edit"):
        editor.invert(picture(), "a cat", method="ddim", record=True)
    for method, bad in (
        ("null_text", {"guidance_scale": "high"}),
        ("null_text", {"inner_steps": -1}),
        ("null_text", {"optimiser": "sgd"}),
        ("edit_friendly", {"guidance_scale": None}),
        ("edit_friendly", {"seed": "x"}),
        ("edit_friendly", {"seed": 2**64}),
        ("null_text", {"guidance_scale": 1}),
        ("fixed_point", {"iterations": 0}),
        ("negative_prompt", {"proximal": 1}),
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(bad))}=.*; expected"):
            editor.invert(picture(), "a cat", method=method, **bad)


def test_a_negative_prompt_against_an_inversion_that_sets_it_is_refused(editor, dog) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=2, method="negative_prompt")
    with pytest.raises(ArgumentError, match="sets the unconditional embeddings itself"):
        editor.edit(source, swap_subject("cat", dog), negative_prompt="blurry")


@pytest.mark.parametrize("steps", [334, 400])
def test_step_counts_that_would_begin_far_from_noise_are_refused(editor, steps) -> None:
    with pytest.raises(StepsError, match="far from noise"):
        editor.model.schedule(steps)


def test_a_category_too_long_for_the_subject_encoder_is_refused_before_any_network(editor, source, monkeypatch) -> None:
    forbid_networks(editor, monkeypatch)
    long = Subject(picture(), "grand hippopotamus")
    with pytest.raises(SubjectError, match=r"19 word pieces of this model's 16"):
        editor.edit(source, swap_subject("cat", long))
    with pytest.raises(SubjectError):
        editor.generate("a hat", subject=long)


def test_a_subject_prompt_needs_its_article(editor, dog) -> None:
    with pytest.raises(PromptError, match="'a dog on grass'"):
        editor.generate("dog on grass", subject=dog)


@pytest.mark.parametrize("steps", [0, -3, 501, 2.5, True, None])
def test_bad_step_counts_are_refused(editor, monkeypatch, steps) -> None:
    forbid_networks(editor, monkeypatch)
    for call in (lambda: editor.invert(picture(), "a cat", steps=steps), lambda: editor.generate("a cat", steps=steps)):
        with pytest.raises(StepsError, match="expected a whole number between 1 and 500"):
            call()


def test_bad_input_is_refused_before_any_network_runs(editor, source, dog, monkeypatch) -> None:
    forbid_networks(editor, monkeypatch)
    with pytest.raises(WordNotFoundError, match="Did you mean 'cat'"):
        editor.edit(source, swap_subject("cta", dog))
    with pytest.raises(PromptTooLongError):
        editor.invert(picture(), "a cat " + "on grass and sand " * 9)
    with pytest.raises(ImageError):
        editor.invert("no/such/picture.png", "a cat")
    with pytest.raises(MaskError):
        editor.edit(source, swap_subject("cat", dog), mask=np.zeros((64, 64)))
    for bad in ("a dog", [], [3], None, 3):
        with pytest.raises(EditSpecError, match="expected an EditSpec"):
            editor.edit(source, bad)
    with pytest.raises(ArgumentError, match="output_type"):
        editor.edit(source, swap_subject("cat", dog), output_type="tensor")
    for scale in (-1, float("nan"), "high"):
        with pytest.raises(ArgumentError, match="guidance_scale"):
            editor.edit(source, swap_subject("cat", dog), guidance_scale=scale)
    for size in ((60, 64), 64, (64.0, 64.0), (64, 64, 64), (0, 64)):
        with pytest.raises(ArgumentError, match="multiples of 16"):
            editor.generate("a cat", size=size)
    with pytest.raises(EditSpecError, match="seed=1.5; expected a whole number"):
        editor.generate("a cat", seed=1.5)
    with pytest.raises(ArgumentError, match=r"expected a list of words, such as \['cat'\]"):
        editor.heatmaps(source, "cat")
    with pytest.raises(TrajectoryError, match=r"expected \(1, 4, h, w\)"):
        editor.generate("a cat", latents=torch.zeros(1, 3, 16, 16))


def test_a_trajectory_of_another_model_is_refused(editor, source, dog) -> None:
    other = replace(source, trajectory=replace(source.trajectory, fingerprint="0123456789abcdef"))
    with pytest.raises(ModelMismatchError, match="invert the picture again"):
        editor.edit(other, swap_subject("cat", dog))


def test_nan_in_the_latents_is_named(editor) -> None:
    with pytest.raises(NonFiniteError):
        editor.generate("a cat", latents=torch.full((1, 4, 16, 16), torch.nan), steps=2)


def test_a_folder_that_is_not_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="model_index.json"):
        Editor.from_pretrained(tmp_path)
    with pytest.raises(ModelError):
        Editor.from_pretrained(tmp_path / "nothing")


def test_a_foreign_processor_on_the_model_stops_the_edit(miniature_folder, dog) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Foreign(AttnProcessor2_0):
        pass

    editor = Editor.from_pretrained(miniature_folder)
    source = editor.invert(picture(), "a cat", steps=2)
    editor.model.unet.set_attn_processor(Foreign())
    with pytest.raises(HookError, match="Foreign"):
        editor.edit(source, swap_subject("cat", dog))
    assert all(type(p) is Foreign for p in editor.model.unet.attn_processors.values())


def test_an_unavailable_device_is_named(miniature_folder) -> None:
    with pytest.raises(ModelError, match="device='cuda:77' is not to be had here"):
        Editor.from_pretrained(miniature_folder, device="cuda:77")
