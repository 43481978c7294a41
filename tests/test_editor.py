"""The main job on a tiny model with random weights: what is exact must be exact whatever the weights are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inversion import TrajectoryError
from p2p_subject import Blend, Editor, EditSpec, Source, Subject, attention, combine, reweight
from p2p_subject.errors import ArgumentError, EditSpecError
from p2p_subject.models import fingerprint
from p2p_subject.outputs import feather
from p2p_subject.prompts import describe
from tests.editing import STEPS, picture, same, swap_subject


def test_a_swap_returns_pictures_of_the_inputs_size(editor, dog) -> None:
    for size in ((64, 64), (90, 61), (40, 130)):
        source = editor.invert(picture(*size), "a cat on grass", steps=2)
        result = editor.edit(source, swap_subject("cat", dog))
        assert result.image.size == result.mask.size == result.source_image.size == size
        assert set(result.maps) == {"cat", "dog"} and all(heat.size == size for heat in result.maps.values())
        assert result.prompt == "a dog on grass" and torch.isfinite(result.latents).all()


def test_an_edit_runs_three_rows_in_its_windows_and_two_beyond_or_with_a_recording(editor, source, dog) -> None:
    whole = swap_subject("cat", dog, cross_replace=1.0)
    assert editor.edit(source, whole).unet_rows == 3 * STEPS
    assert [r.unet_rows for r in editor.edit(source, [whole, whole])] == [5 * STEPS] * 2
    half = swap_subject("cat", dog, cross_replace=0.5, self_replace=0.25)
    assert editor.edit(source, half).unet_rows == 3 * 2 + 2 * 2
    assert editor.edit(editor.record(source, cross_replace=1.0), whole).unet_rows == 2 * STEPS
    assert editor.edit(source, whole, guidance_scale=1).unet_rows == 2 * STEPS


def test_latents_outside_the_mask_are_the_sources_at_every_step(editor, source, dog) -> None:
    mask = np.zeros((64, 64), bool)
    mask[16:40, 20:44] = True
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[4:10, 5:11] = False
    seen = []

    def check(step: int, latents: torch.Tensor) -> None:
        seen.append(step)
        assert torch.equal(latents[0][:, outside], source.trajectory.after(step)[0][:, outside])

    result = editor.edit(source, swap_subject("cat", dog), mask=mask, callback=check)
    assert seen == list(range(STEPS)) and not torch.equal(result.latents, source.trajectory.clean)
    assert np.array_equal(np.asarray(result.mask) > 0, mask)


@pytest.mark.parametrize("given", [True, False])
def test_the_background_is_bit_exact_outside_the_feathered_mask(editor, source, dog, given) -> None:
    mask = None
    if given:
        mask = np.zeros((64, 64), np.uint8)
        mask[10:30, 30:60] = 255
    # Random weights spread attention almost evenly; this threshold leaves a fifth of the picture.
    threshold = float(np.quantile(editor.heatmaps(source, ["cat"], rule="share")[0], 0.8))
    spec = swap_subject("cat", dog, blend=Blend(threshold=threshold, target_words=()))
    result = editor.edit(source, spec, mask=mask)
    inside = feather(np.asarray(result.mask) > 0, 2, 2.0) > 0
    assert 0 < inside.mean() < 1
    assert np.array_equal(np.asarray(result.image)[~inside], np.asarray(source.image)[~inside])
    pasted_off = editor.edit(source, spec, mask=mask, paste=False)
    assert not np.array_equal(np.asarray(pasted_off.image)[~inside], np.asarray(source.image)[~inside])


def test_the_mask_of_a_result_is_what_a_soft_mask_allows(editor, source, dog) -> None:
    soft = np.full((64, 64), 0.4, np.float32)
    soft[10:30, 30:60] = 0.6
    hard = np.asarray(editor.edit(source, swap_subject("cat", dog), mask=soft).mask)
    assert np.array_equal(hard, np.where(soft > 0.5, 255, 0))


def test_a_no_op_edit_equals_the_plain_run_exactly(editor) -> None:
    source = editor.generate("a cat on grass", seed=3, steps=STEPS, guidance_scale=2.5)
    with pytest.warns(UserWarning, match="is the identity"):
        result = editor.edit(source, EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None))
    assert torch.equal(result.latents, source.trajectory.clean)


def test_following_the_source_in_everything_reproduces_it(editor) -> None:
    """Same prompt, everything replaced: the target's rows compute what the source's do, up to the order of rows."""
    source = editor.generate("a cat on grass", seed=3, steps=STEPS)
    spec = EditSpec(prompt="a cat on grass", cross_replace=1.0, self_replace=1.0, self_resolution=16, blend=None)
    with pytest.warns(UserWarning, match="is the identity"):
        result = editor.edit(source, spec)
    assert (result.latents - source.trajectory.clean).abs().max() < 1e-4


def test_a_source_keeps_its_negative_prompt(editor, tmp_path) -> None:
    source = editor.generate("a cat on grass", seed=3, steps=STEPS, guidance_scale=3, negative_prompt="a fox")
    source.save(tmp_path / "s.safetensors")
    spec = EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None)
    with pytest.warns(UserWarning, match="is the identity"):
        result = editor.edit(Source.load(tmp_path / "s.safetensors"), spec)
    assert torch.equal(result.latents, source.trajectory.clean)


def test_subtracting_alone_keeps_those_words_and_changes_the_rest(editor, source) -> None:
    threshold = float(np.quantile(editor.heatmaps(source, ["cat"], rule="share")[0], 0.5))
    spec = EditSpec(prompt="a cat on sand", blend=Blend(subtract=["cat"], threshold=threshold))
    result = editor.edit(source, spec, paste=False)
    kept = editor.heatmaps(source, ["cat"], rule="share")[0] > threshold
    assert not (np.asarray(result.mask)[kept] > 0).any() and (np.asarray(result.mask) > 0).any()
    with pytest.raises(EditSpecError, match="a mask and words to subtract"):
        Blend(subtract=["cat"], mask=np.ones((4, 4), bool))
    with pytest.raises(EditSpecError, match="nothing says which words make it"):
        editor.edit(source, EditSpec(prompt="a cat on sand", blend=Blend(threshold=0.5)))


def test_an_edit_fades_over_its_feather_and_no_further(editor, source, dog) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, 24:40] = True
    image = editor.edit(source, swap_subject("cat", dog, blend=Blend(mask=mask, feather=4))).image
    changed = (np.asarray(image) != np.asarray(source.image)).any((0, 2))
    assert changed[24:40].all() and not changed[:21].any() and not changed[43:].any()


def test_two_editors_may_share_a_pipeline_among_threads(editor, source, dog) -> None:
    editors = [Editor.from_pipeline(editor.model.pipeline) for _ in range(3)]
    alone = editor.edit(source, swap_subject("cat", dog), guidance_scale=2.0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda own: own.edit(source, swap_subject("cat", dog), guidance_scale=2.0), editors))
    assert all(same(alone, other) for other in together)


def test_maps_are_built_only_where_they_are_read(editor, source, monkeypatch) -> None:
    built = []
    monkeypatch.setattr(attention, "_maps", lambda *given: built.append(given))
    editor.edit(source, EditSpec(prompt="a cat on sand", blend=None))
    assert not built


def test_the_mask_of_a_source_with_a_subject_is_read_from_its_columns_too(editor, dog) -> None:
    source = editor.generate("a dog on grass", subject=dog, seed=0, steps=2)
    original = editor.model.layout("a dog on grass", subject=True)
    made = describe(original, swap_subject("dog", Subject(picture(seed=2), "cat")), editor.model.layout)
    assert set(made.source_words.columns) == {*original.subject, *original.columns("dog")} and source.subject is not None


def test_weights_alone_are_an_edit(editor, source) -> None:
    plain = EditSpec(prompt="a cat on grass", blend=None, cross_replace=1.0)
    with pytest.warns(UserWarning, match="identity"):
        unweighted = editor.edit(source, plain)
    weighted = editor.edit(source, reweight({"cat": -2.0}, blend=None, cross_replace=1.0))
    assert weighted.prompt == "a cat on grass"
    assert not torch.equal(weighted.latents, unweighted.latents)
    assert same(weighted, editor.edit(source, combine(plain, reweight({"cat": -2.0}))))


def test_each_spec_may_bring_its_own_mask(editor, source, dog) -> None:
    masks = np.zeros((2, 64, 64), bool)
    masks[0, :32], masks[1, 32:] = True, True
    results = editor.edit(source, [swap_subject("cat", dog, blend=Blend(mask=mask)) for mask in masks])
    assert all(np.array_equal(np.asarray(result.mask) > 0, mask) for result, mask in zip(results, masks))
    shared = editor.edit(source, swap_subject("cat", dog), mask=masks[0])
    assert np.array_equal(shared.mask, results[0].mask)
    hard = editor.edit(source, swap_subject("cat", dog, blend=Blend(mask=masks[0], feather=0)))
    assert np.array_equal(np.asarray(hard.image)[32:], np.asarray(source.image)[32:])


def test_skipped_steps_are_the_sources(editor, source, dog) -> None:
    seen = []
    spec = swap_subject("cat", dog, blend=None, cross_replace=1.0)
    result = editor.edit(source, spec, skip=0.5, callback=lambda step, latents: seen.append(step))
    assert seen == [2, 3] and result.unet_rows == 3 * 2
    for bad in (1, 1 - 1e-12, -0.1, "half", True):
        with pytest.raises(ArgumentError, match="skip="):
            editor.edit(source, spec, skip=bad)


def test_a_generated_source_is_edited_at_its_own_guidance(editor, dog) -> None:
    source = editor.generate("a cat on grass", seed=3, steps=2, guidance_scale=5.0)
    spec = swap_subject("cat", dog)
    assert same(editor.edit(source, spec), editor.edit(source, spec, guidance_scale=5.0))


METHODS = {
    "direct": {},
    "ddim": {},
    "fixed_point": {"iterations": 3},
    "negative_prompt": {"proximal": 0.7},
    "null_text": {"inner_steps": 2},
    "edit_friendly": {"seed": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_inversion_can_be_edited_and_saved(editor, dog, tmp_path, method) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=STEPS, method=method, **METHODS[method])
    assert source.trajectory.method == method and torch.isfinite(source.attention).all()
    result = editor.edit(source, swap_subject("cat", dog))
    assert torch.isfinite(result.latents).all() and not torch.equal(result.latents, source.trajectory.clean)
    source.save(tmp_path / "s.safetensors")
    assert same(editor.edit(Source.load(tmp_path / "s.safetensors"), swap_subject("cat", dog)), result)
    # Only the published DDIM edit generates the source again.
    assert result.unet_rows == (3 + 2 * (method == "ddim")) * 1 + (2 + 2 * (method == "ddim")) * (STEPS - 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_is_told_every_step_once_and_may_cancel(editor, method) -> None:
    seen = []
    editor.invert(picture(), "a cat", steps=STEPS, method=method, callback=lambda step, x: seen.append((step, tuple(x.shape))))
    # Null-text passes over the steps twice: it inverts, then it optimises.
    times = 2 if method == "null_text" else 1
    assert sorted(step for step, _ in seen) == sorted([*range(STEPS)] * times) and {s for _, s in seen} == {(1, 4, 16, 16)}
    told = []
    source = editor.generate("a cat", seed=0, steps=STEPS, callback=lambda step, latents: told.append(latents))
    assert all(torch.equal(x, source.trajectory.after(step)) for step, x in enumerate(told)) and len(told) == STEPS

    def cancel(step: int, latents: torch.Tensor) -> None:
        raise KeyboardInterrupt

    before = editor.model.unet.attn_processors
    with pytest.raises(KeyboardInterrupt):
        editor.invert(picture(), "a cat", steps=STEPS, method=method, callback=cancel)
    assert editor.model.unet.attn_processors == before
    assert all(weight.requires_grad for weight in editor.model.unet.parameters())


def test_same_seed_same_pixels_and_edits_leave_no_trace(editor, source, dog) -> None:
    swap = swap_subject("cat", dog)
    fresh_image = editor.generate("a cat on grass", seed=5, steps=STEPS)
    first = editor.edit(source, swap)

    def stop(step: int, latents: torch.Tensor) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.edit(source, swap, callback=stop)
    assert same(editor.edit(source, swap), first)
    again = editor.generate("a cat on grass", seed=5, steps=STEPS)
    assert torch.equal(again.trajectory.latents, fresh_image.trajectory.latents)
    assert not torch.equal(editor.generate("a cat on grass", seed=6, steps=STEPS).trajectory.clean, again.trajectory.clean)


def test_several_edits_in_one_call_equal_the_single_ones(editor, source, dog) -> None:
    specs = [
        swap_subject("cat", dog),
        swap_subject("cat", dog, cross_replace=0.5, self_replace=0.0),
        EditSpec(prompt="a cat on sand", cross_replace=(0.0, 0.5), self_replace=0.75, blend=None),
    ]
    for together, alone in zip(editor.edit(source, specs), [editor.edit(source, spec) for spec in specs]):
        assert (together.latents - alone.latents).abs().max() < 1e-4


def test_sources_survive_saving(editor, source, dog, tmp_path) -> None:
    source.save(tmp_path / "s.safetensors")
    read = Source.load(tmp_path / "s.safetensors")
    assert same(editor.edit(read, swap_subject("cat", dog)), editor.edit(source, swap_subject("cat", dog)))
    generated = editor.generate("a dog on grass", subject=dog, seed=0, steps=2)
    generated.save(tmp_path / "g.safetensors")
    assert torch.equal(Source.load(tmp_path / "g.safetensors").subject, generated.subject)
    source.trajectory.save(tmp_path / "t.safetensors")
    with pytest.raises(TrajectoryError, match="without its picture"):
        Source.load(tmp_path / "t.safetensors")


def test_a_generated_source_can_be_edited_and_its_subject_swapped(editor, dog) -> None:
    source = editor.generate("a dog on grass", subject=dog, seed=0, steps=STEPS)
    result = editor.edit(source, swap_subject("dog", Subject(picture(seed=2), "cat")))
    assert result.prompt == "a cat on grass" and 2 * STEPS < result.unet_rows < 3 * STEPS


def test_a_subject_the_source_was_generated_with_stays_in_a_text_edit(editor, dog) -> None:
    source = editor.generate("a dog on grass", subject=dog, seed=0, steps=STEPS)
    text = EditSpec(prompt="a dog on sand", cross_replace=0, self_replace=0, blend=None)
    expected = editor.generate("a dog on sand", subject=dog, latents=source.trajectory.noise, steps=STEPS, guidance_scale=2.0)
    assert (editor.edit(source, text, guidance_scale=2.0).latents - expected.trajectory.clean).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 333, 500])
def test_schedules_stay_within_the_training_steps(editor, steps) -> None:
    schedule = editor.model.schedule(steps)
    assert schedule.steps == steps and schedule.timesteps[0] < 1000 and schedule.timesteps[-1] >= 0


def test_drawing_a_random_seed_leaves_the_callers_generator_alone(editor) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    editor.generate("a cat", steps=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_text_swap_reads_its_mask_from_the_word_that_follows(editor, source) -> None:
    result = editor.edit(source, EditSpec(prompt="a bus on grass", swap="cat"))
    assert set(result.maps) == {"cat", "bus"} and result.mask is not None


def test_an_empty_mask_is_said(editor, source, dog) -> None:
    with pytest.warns(UserWarning, match="nothing changed"):
        editor.edit(source, swap_subject("cat", dog, blend=Blend(threshold=1.0)))


def test_a_text_edit_that_names_no_words_is_global(editor, source) -> None:
    result = editor.edit(source, EditSpec(prompt="a cat on sand"))
    assert result.mask is None and result.maps == {}


def test_two_threads_with_two_sources_do_not_meet(editor, source, dog) -> None:
    other = editor.invert(picture(80, 48, seed=4), "a fox on snow", steps=STEPS)
    jobs = [(source, swap_subject("cat", dog)), (other, swap_subject("fox", dog))] * 2
    alone = [editor.edit(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: editor.edit(*job), jobs))
    assert all(same(a, b) for a, b in zip(alone, together))


def test_several_pictures_of_a_subject_are_averaged(editor) -> None:
    pictures = [picture(seed=1), picture(seed=2)]
    mean = torch.stack([editor.model.embed(Subject(p, "dog")) for p in pictures]).mean(0)
    assert torch.allclose(editor.model.embed(Subject(pictures, "dog")), mean, atol=1e-6)


def test_heat_maps_are_of_the_pictures_size_and_bounded(editor, source) -> None:
    for rule in ("peak", "share"):
        heat = editor.heatmaps(source, ["cat"], rule=rule)[0]
        assert heat.shape == (64, 64) and heat.min() >= 0 and heat.max() <= 1 + 1e-6
    assert source.attention.shape == (editor.model.layout("a").length, 16, 16)
    assert torch.allclose(source.attention.sum(0), torch.ones(16, 16), atol=1e-5)


def test_latent_output_skips_decoding(editor, source, dog) -> None:
    result = editor.edit(source, swap_subject("cat", dog), output_type="latent")
    assert result.image is None and torch.equal(result.latents, editor.edit(source, swap_subject("cat", dog)).latents)


@given(steps=st.integers(1, 3), width=st.integers(30, 90), height=st.integers(30, 90))
@settings(deadline=None, max_examples=8)
def test_any_picture_shape_and_step_count(editor, dog, steps, width, height) -> None:
    result = editor.edit(editor.invert(picture(width, height), "a cat", steps=steps), swap_subject("cat", dog))
    assert result.image.size == (width, height)


def test_half_precision_networks_keep_latents_in_single(miniature_folder, dog) -> None:
    editor = Editor.from_pretrained(miniature_folder, dtype=torch.bfloat16)
    source = editor.invert(picture(), "a cat on grass", steps=2)
    assert source.trajectory.latents.dtype == torch.float32
    assert editor.edit(source, swap_subject("cat", dog)).latents.dtype == torch.float32


def test_precision_does_not_change_the_fingerprint(editor, miniature_folder) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert Editor.from_pretrained(miniature_folder, dtype=dtype).model.fingerprint == editor.model.fingerprint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_training_any_part_changes_the_fingerprint(miniature_folder, editor, part) -> None:
    other = Editor.from_pretrained(miniature_folder)
    with torch.no_grad():
        for weight in getattr(other.model.pipeline, part).parameters():
            weight += 0.1 * weight.std().nan_to_num() * torch.randn_like(weight)
    assert fingerprint(other.model.pipeline) != editor.model.fingerprint
