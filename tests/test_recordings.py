"""Recordings: what an edit reads of its source is kept, with the edits' numbers and fewer rows."""

from __future__ import annotations

import pytest
import torch

from p2p_subject import Blend, Editor, EditSpec, Source
from p2p_subject.errors import EditSpecError
from tests.editing import STEPS, picture, same, swap_subject


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


def test_inverting_with_record_records(editor) -> None:
    assert editor.invert(picture(), "a cat", steps=2, record=True).recording is not None


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
