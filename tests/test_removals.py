"""Removals: what is taken out is hidden from the target, and goes with its word."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2p_subject import Blend, EditSpec, attention, remove
from p2p_subject.errors import EditSpecError, WordNotFoundError
from p2p_subject.outputs import feather
from p2p_subject.preparing import layout_of
from p2p_subject.prompts import describe
from tests.editing import STEPS, swap_subject


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
