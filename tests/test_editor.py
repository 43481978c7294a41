"""The main job on a tiny model with random weights: what is exact must be exact whatever the weights are."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inversion import ModelMismatchError, NonFiniteError, StepsError, TrajectoryError
from inversion.trajectory import read_safetensors, write_safetensors
from p2p_subject import Blend, Editor, EditSpec, Source, Subject, attention, combine, edits, remove, reweight
from p2p_subject.blend import RULES, binary_mask, competitors, region, squares_around
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
from p2p_subject.models import fingerprint
from p2p_subject.outputs import feather
from p2p_subject.preparing import layout_of
from p2p_subject.prompts import describe

STEPS = 4


def swap_subject(word, subject, **changes) -> EditSpec:
    """A swap that follows the source in one step at least: of four, the windows of the default hold none."""
    return edits.swap_subject(word, subject, **{"cross_replace": 0.4, "self_replace": 0.4, **changes})


@pytest.fixture(scope="module")
def editor(miniature_folder) -> Editor:
    return Editor.from_pretrained(miniature_folder)


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth noise of any size."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def source(editor) -> Source:
    return editor.invert(picture(), "a cat on grass", steps=STEPS)


@pytest.fixture(scope="module")
def dog() -> Subject:
    return Subject(picture(seed=1), "dog")


def same(a, b) -> bool:
    return torch.equal(a.latents, b.latents) and np.array_equal(a.image, b.image)


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


def square_around(editor, source, threshold, size=(16, 16)) -> torch.Tensor:
    """The square around "cat" in the source, at the size of its latents."""
    layout = layout_of(editor.model, source)
    columns = layout.columns("cat")
    score = region(source.attention, columns, competitors(layout, columns), RULES["share"], size)
    return squares_around(binary_mask([score], threshold)).bool()


def enlarged(square: torch.Tensor, width: int, height: int) -> np.ndarray:
    """A square of latents at the size of the picture."""
    return torch.nn.functional.interpolate(square[None, None].float(), (height, width), mode="nearest-exact")[0, 0].numpy() > 0


def changes_of(editor, source, spec) -> list[torch.Tensor]:
    """Where the latents differ from the source's after each step of an edit."""
    seen = []
    editor.edit(source, spec, callback=lambda step, latents: seen.append(latents[0]))
    return [(own != source.trajectory.after(step)[0]).any(0) for step, own in enumerate(seen)]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
def test_room_opens_the_square_around_the_word_at_first_and_holds_the_mask_within(editor, dog, width, height) -> None:
    source = editor.invert(picture(width, height), "a cat on grass", steps=STEPS)
    size = tuple(source.trajectory.latents.shape[-2:])
    square = square_around(editor, source, 0.9, size)
    assert 0 < square.sum() < square.numel()
    # The mask is the new subject's alone: that of the old word is no reason for one to stay within.
    wide = swap_subject("cat", dog, room=0.5, blend=Blend(threshold=0.9, source_words=()))
    first, second, *later = changes_of(editor, source, wide)
    assert torch.equal(first, square) and torch.equal(second, square)
    assert all((own <= square).all() and own.any() and own.sum() < square.sum() for own in later)
    outside = ~enlarged(square, width, height)
    narrow = editor.edit(source, replace(wide, room=0.0))
    assert (np.asarray(narrow.mask)[outside] > 0).any()
    assert not (np.asarray(editor.edit(source, wide).mask)[outside] > 0).any()


def test_a_square_that_never_closes_is_the_mask(editor, source, dog) -> None:
    square = square_around(editor, source, 0.9)
    spec = swap_subject("cat", dog, room=1.0, blend=Blend(threshold=0.9, source_words=()))
    assert all(torch.equal(own, square) for own in changes_of(editor, source, spec))
    assert np.array_equal(np.asarray(editor.edit(source, spec).mask) > 0, enlarged(square, 64, 64))


def test_what_is_subtracted_is_taken_out_of_the_open_square_too(editor, source, dog) -> None:
    spec = swap_subject("cat", dog, room=0.5, blend=Blend(threshold=0.5))
    without = replace(spec, blend=replace(spec.blend, subtract=("grass",)))
    layout = layout_of(editor.model, source)
    columns = layout.columns("grass")
    score = region(source.attention, columns, competitors(layout, columns), RULES["share"], (16, 16))
    grass, square = score > 0.5, square_around(editor, source, 0.5)
    assert (grass & square).any()
    assert torch.equal(changes_of(editor, source, spec)[0], square)
    with pytest.warns(UserWarning, match="is empty"):
        assert not (changes_of(editor, source, without)[0] & grass).any()


def test_words_of_the_target_that_are_named_may_be_outside_the_square(editor, source, dog) -> None:
    named = Blend(threshold=0.9, target_words=("grass",), source_words=("cat",))
    spec = swap_subject("cat", dog, room=0.5, blend=named)
    plain = editor.edit(source, replace(spec, room=0.0))
    outside = ~enlarged(square_around(editor, source, 0.9), 64, 64)
    assert (np.asarray(plain.mask)[outside] > 0).any()
    assert (np.asarray(editor.edit(source, spec).mask)[outside] > 0).any()


def test_room_is_each_edits_own_and_recorded_sources_give_it(editor, source, dog) -> None:
    spec = swap_subject("cat", dog, room=0.5, blend=Blend(threshold=0.9), cross_replace=0.5)
    specs = [
        spec,
        replace(spec, room=0.0),
        EditSpec(prompt="a bus on grass", swap="cat", room=0.75, blend=Blend(maps="running", rule="peak", grow=1)),
    ]
    for own in (source, editor.record(source)):
        for together, alone in zip(editor.edit(own, specs), specs):
            assert (together.latents - editor.edit(source, alone).latents).abs().max() < 1e-4


@pytest.mark.parametrize("blend", [None, Blend(mask=np.eye(64, dtype=np.uint8) * 255)])
def test_a_mask_of_ones_own_and_an_edit_of_everything_take_no_room(editor, source, dog, blend) -> None:
    spec = swap_subject("cat", dog, blend=blend)
    assert same(editor.edit(source, spec), editor.edit(source, replace(spec, room=0.0)))


def test_a_word_without_a_region_makes_no_room_and_takes_none(editor, source, dog) -> None:
    attention = source.attention.clone()
    attention[list(layout_of(editor.model, source).columns("cat"))] = 0
    unseen = replace(source, attention=attention)
    spec = swap_subject("cat", dog)
    result = editor.edit(unseen, spec)
    assert same(result, editor.edit(unseen, replace(spec, room=0.0))) and np.asarray(result.mask).any()


def test_the_swap_that_comes_by_default_follows_a_fifth_of_the_steps(editor, dog) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=5)
    assert editor.edit(source, edits.swap_subject("cat", dog)).unet_rows == 3 + 4 * 2


@pytest.mark.parametrize("device", [None, "cpu"])
def test_edits_of_a_recorded_source_equal_the_others(editor, source, dog, device) -> None:
    recorded = editor.record(source, cross_replace=0.5, self_replace=0.5, device=device)
    specs = [
        swap_subject("cat", dog, cross_replace=0.5, self_replace=0.5),
        # Wider than what was recorded: the steps beyond run with the source.
        EditSpec(prompt="a cat on sand", cross_replace=1.0, self_replace=0.75, blend=None),
        EditSpec(prompt="a bus on grass", swap="cat", blend=Blend(maps="running", rule="peak"), self_resolution=4),
    ]
    for spec in specs:
        ours, theirs = editor.edit(recorded, spec), editor.edit(source, spec)
        assert (ours.latents - theirs.latents).abs().max() < 1e-4
        assert ours.unet_rows < theirs.unet_rows
    batched = editor.edit(recorded, specs)
    for together, spec in zip(batched, specs):
        assert (together.latents - editor.edit(source, spec).latents).abs().max() < 1e-4


def test_a_recording_survives_saving_if_asked(editor, source, dog, tmp_path) -> None:
    recorded = editor.record(source)
    recorded.save(tmp_path / "r.safetensors", recording=True)
    recorded.save(tmp_path / "s.safetensors")
    read = Source.load(tmp_path / "r.safetensors")
    spec = swap_subject("cat", dog)
    assert same(editor.edit(read, spec), editor.edit(recorded, spec)) and read.recording.bytes == recorded.recording.bytes
    assert editor.edit(read, spec).unet_rows == 2 * STEPS
    assert Source.load(tmp_path / "s.safetensors").recording is None


def test_a_recording_keeps_within_its_budget(editor, source, dog) -> None:
    whole = editor.record(source, cross_replace=1.0, self_replace=1.0).recording
    assert whole.cross_steps == whole.self_steps == STEPS
    budget = int(0.6 * whole.bytes)
    with pytest.warns(UserWarning, match="cross-attention of 2 of 4 steps and self-attention of 2 of 4"):
        part = editor.record(source, cross_replace=1.0, self_replace=1.0, budget=budget).recording
    # All that is counted but the number of pixels itself.
    assert part.cross_steps == 2 and part.bytes <= budget + 8
    with pytest.warns(UserWarning):
        part = editor.record(source, cross_replace=1.0, self_replace=1.0, budget=budget)
    assert editor.edit(part, swap_subject("cat", dog, cross_replace=1.0)).unet_rows == 2 * 2 + 3 * 2
    for windows in ({"cross_replace": 1.0}, {"cross_replace": 0.0, "self_replace": 1.0}):
        with pytest.warns(UserWarning, match="holds cross-attention of 0 of"):
            none = editor.record(source, **windows, budget=10)
        assert none.recording is None
    for bad in ({"cross_replace": {"cat": 0.5}}, {"budget": "2GB"}, {"self_replace": 2}, {"self_resolution": 0}):
        with pytest.raises(EditSpecError, match="expected"):
            editor.record(source, **bad)


def test_a_recording_serves_a_model_of_another_precision(editor, source, dog, miniature_folder, tmp_path) -> None:
    editor.record(source).save(tmp_path / "r.safetensors", recording=True)
    half = Editor.from_pretrained(miniature_folder, dtype=torch.bfloat16)
    read = Source.load(tmp_path / "r.safetensors")
    assert half.edit(read, swap_subject("cat", dog)).unet_rows == 2 * STEPS
    back = half.record(source)
    assert editor.edit(back, swap_subject("cat", dog)).latents.dtype == torch.float32


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
    Counted(editor, monkeypatch)
    with pytest.raises(TrajectoryError, match="holds the attention of 3 tokens"):
        editor.edit(replace(source, attention=source.attention[:3]), swap_subject("cat", dog))


def test_inverting_with_record_records(editor) -> None:
    assert editor.invert(picture(), "a cat", steps=2, record=True).recording is not None


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


def test_weights_whose_steps_are_skipped_are_refused(editor, source) -> None:
    with pytest.raises(EditSpecError, match="of the 2 steps that are run"):
        editor.edit(source, reweight({"cat": 3.0}, cross_replace=0.25, blend=None), skip=0.5)


def test_two_editors_may_share_a_pipeline_among_threads(editor, source, dog) -> None:
    editors = [Editor.from_pipeline(editor.model.pipeline) for _ in range(3)]
    alone = editor.edit(source, swap_subject("cat", dog), guidance_scale=2.0)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda own: own.edit(source, swap_subject("cat", dog), guidance_scale=2.0), editors))
    assert all(same(alone, other) for other in together)


def test_a_job_started_by_a_callback_is_refused_by_name(editor, source, dog) -> None:
    with pytest.raises(HookError, match="in the middle of a job"):
        editor.edit(source, swap_subject("cat", dog), callback=lambda step, latents: editor.generate("a cat", steps=1))


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


def test_a_recording_tells_its_callback_every_step_it_reads_and_may_be_cancelled(editor, source) -> None:
    told = {}
    whole = editor.record(source, cross_replace=0.8, callback=told.__setitem__)
    assert [*told] == [*range(whole.recording.cross_steps)]
    assert all(torch.equal(latents, source.trajectory.before(step)) for step, latents in told.items())

    def cancel(step: int, latents: torch.Tensor) -> None:
        raise KeyboardInterrupt

    before = editor.model.unet.attn_processors
    with pytest.raises(KeyboardInterrupt):
        editor.record(source, callback=cancel)
    assert editor.model.unet.attn_processors == before


def test_unknown_methods_and_options_are_refused_before_any_network(editor, monkeypatch) -> None:
    Counted(editor, monkeypatch)
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
        ("fixed_point", {"iterations": 0}),
        ("negative_prompt", {"proximal": 1}),
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(bad))}=.*; expected"):
            editor.invert(picture(), "a cat", method=method, **bad)


def test_a_negative_prompt_against_an_inversion_that_sets_it_is_refused(editor, dog) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=2, method="negative_prompt")
    with pytest.raises(ArgumentError, match="sets the unconditional embeddings itself"):
        editor.edit(source, swap_subject("cat", dog), negative_prompt="blurry")


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
    expected = editor.generate(
        "a dog on sand", subject=dog, latents=source.trajectory.noise, steps=STEPS, guidance_scale=2.0
    )
    assert (editor.edit(source, text, guidance_scale=2.0).latents - expected.trajectory.clean).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [334, 400])
def test_step_counts_that_would_begin_far_from_noise_are_refused(editor, steps) -> None:
    with pytest.raises(StepsError, match="far from noise"):
        editor.model.schedule(steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 333, 500])
def test_schedules_stay_within_the_training_steps(editor, steps) -> None:
    schedule = editor.model.schedule(steps)
    assert schedule.steps == steps and schedule.timesteps[0] < 1000 and schedule.timesteps[-1] >= 0


def test_a_category_too_long_for_the_subject_encoder_is_refused_before_any_network(editor, source, monkeypatch) -> None:
    Counted(editor, monkeypatch)
    long = Subject(picture(), "grand hippopotamus")
    with pytest.raises(SubjectError, match=r"19 word pieces of this model's 16"):
        editor.edit(source, swap_subject("cat", long))
    with pytest.raises(SubjectError):
        editor.generate("a hat", subject=long)


def test_a_subject_prompt_needs_its_article(editor, dog) -> None:
    with pytest.raises(PromptError, match="'a dog on grass'"):
        editor.generate("dog on grass", subject=dog)


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


def test_a_removal_sees_nothing_of_what_it_takes_out(editor, source) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:32, :24] = 255
    made = editor.edit(source, remove("cat", "grass"), mask=mask)
    # Two rows a step: nothing follows the source.
    assert made.prompt == "grass" and set(made.maps) == {"cat"} and made.unet_rows == 2 * STEPS
    plain = editor.edit(source, replace(remove("cat", "grass"), erase=False), mask=mask)
    assert (made.latents - plain.latents).abs().max() > 1e-3 and np.array_equal(made.mask, plain.mask)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        attend = attention.F.scaled_dot_product_attention
        patch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, **k: (seen.append(a[3:]), attend(*a, **k))[1])
        editor.edit(source, remove("cat", "grass"), mask=mask)
    finest = max((own[0] for own in seen if own and own[0] is not None), key=lambda own: own.shape[-1])
    side = round(finest.shape[-1] ** 0.5)
    hidden = ~finest.reshape(2, side, side)
    assert hidden[:, : side // 2, : 3 * side // 8].all() and hidden.sum() == 2 * (side // 2) * (3 * side // 8)
    outside = feather(np.asarray(made.mask) / 255.0, 3, 2) == 0
    assert np.array_equal(np.asarray(made.image)[outside], np.asarray(source.image)[outside])


@pytest.mark.parametrize("masked", [False, True])
def test_a_subject_that_is_taken_out_is_not_in_the_prompt_either(editor, dog, masked) -> None:
    source = editor.generate("a dog on grass", subject=dog, steps=STEPS, seed=0)
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    changes = {"blend": Blend(mask=mask)} if masked else {}
    # "some grass" holds no place for a subject, and needs none.
    result = editor.edit(source, remove("dog", "some grass", **changes))
    assert result.prompt == "some grass" and torch.isfinite(result.latents).all()
    made = describe(layout_of(editor.model, source), remove("dog", "a field of grass", **changes), editor.model.layout)
    assert not made.layout.subject
    kept = describe(layout_of(editor.model, source), remove("grass", "a dog", **changes), editor.model.layout)
    assert len(kept.layout.subject) == len(layout_of(editor.model, source).subject) > 0


def test_removals_go_with_other_edits_masks_recordings_and_words_alone(editor, source, dog) -> None:
    spec = remove("cat", "grass")
    swap, erased = editor.edit(source, [swap_subject("cat", dog), spec])
    for together, single in ((erased, spec), (swap, swap_subject("cat", dog))):
        torch.testing.assert_close(together.latents, editor.edit(source, single).latents, atol=1e-4, rtol=0)
    recorded = editor.edit(editor.record(source), spec)
    torch.testing.assert_close(recorded.latents, erased.latents, atol=1e-4, rtol=0)
    unguided = editor.edit(source, [swap_subject("cat", dog), spec], guidance_scale=1)[1]
    torch.testing.assert_close(unguided.latents, editor.edit(source, spec, guidance_scale=1).latents, atol=1e-4, rtol=0)
    mask = np.zeros((64, 64), np.uint8)
    mask[:16, :16] = 255
    own = editor.edit(source, spec, mask=mask)
    assert np.array_equal(np.asarray(own.mask), mask)
    everything = editor.edit(source, spec, mask=np.full((64, 64), 255, np.uint8))
    assert torch.isfinite(everything.latents).all()
    # The same prompt is no identity where something is taken out.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.edit(source, remove("cat", source.prompt))
    with pytest.raises(EditSpecError, match=r"name it as remove\('cat', prompt\) does"):
        editor.edit(source, EditSpec(prompt="grass", erase=True))
    with pytest.raises(WordNotFoundError, match="Did you mean 'cat'"):
        editor.edit(source, remove("cta", "grass"))


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


class Counted:
    """Fails the test if the U-Net runs: bad input has to be refused before."""

    def __init__(self, editor: Editor, monkeypatch) -> None:
        def forward(*_, **__):
            raise AssertionError("a network ran")

        monkeypatch.setattr(editor.model.unet, "forward", forward)
        monkeypatch.setattr(editor.model.pipeline.vae, "encode", forward)


@pytest.mark.parametrize("steps", [0, -3, 501, 2.5, True, None])
def test_bad_step_counts_are_refused(editor, monkeypatch, steps) -> None:
    Counted(editor, monkeypatch)
    for call in (lambda: editor.invert(picture(), "a cat", steps=steps), lambda: editor.generate("a cat", steps=steps)):
        with pytest.raises(StepsError, match="expected a whole number between 1 and 500"):
            call()


def test_bad_input_is_refused_before_any_network_runs(editor, source, dog, monkeypatch) -> None:
    Counted(editor, monkeypatch)
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


def test_an_unavailable_device_is_named(miniature_folder) -> None:
    with pytest.raises(ModelError, match="device='cuda:77' is not to be had here"):
        Editor.from_pretrained(miniature_folder, device="cuda:77")
