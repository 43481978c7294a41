"""Room: the square around the swapped word is open at first, and holds the mask when it closes in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from p2p_subject import Blend, EditSpec, edits
from p2p_subject.blend import RULES, binary_mask, competitors, region, squares_around
from p2p_subject.preparing import layout_of
from tests.editing import STEPS, picture, same, swap_subject


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


def test_a_word_whose_square_is_all_of_the_picture_takes_no_room(editor, source) -> None:
    spec = EditSpec(prompt="a bus on grass", swap="cat", room=0.5, blend=Blend(threshold=0.05))
    assert square_around(editor, source, 0.05).all() and not square_around(editor, source, 0.9).all()
    assert same(editor.edit(source, spec), editor.edit(source, replace(spec, room=0.0)))
    narrow = replace(spec, blend=Blend(threshold=0.9))
    assert not same(editor.edit(source, narrow), editor.edit(source, replace(narrow, room=0.0)))


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
