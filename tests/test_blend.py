"""Mask rules and blending: pure, bounded, never NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from p2p_subject.blend import (
    RULES,
    attended_pixels,
    binary_mask,
    blend,
    competitors,
    peak,
    region,
    rule_of,
    share,
    squares_around,
    subtracted_region,
)
from p2p_subject.errors import EditSpecError
from p2p_subject.tokens import layout
from p2p_subject.training.tokenizers import save_clip_tokenizer

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def attention(draw) -> torch.Tensor:
    """Maps (T, h, w) that sum to one over T, some of them exactly zero."""
    height, width = draw(sizes)
    tokens = draw(st.integers(3, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    maps = torch.rand(tokens, height, width, generator=generator) ** draw(st.integers(1, 8))
    if draw(st.booleans()):
        maps[: draw(st.integers(1, tokens))] = 0
    return maps / maps.sum(0).clamp_min(1e-30)


@given(maps=attention(), rule=st.sampled_from(sorted(RULES)), size=sizes)
@settings(deadline=None)
def test_scores_are_bounded_and_finite_whatever_the_maps(maps: torch.Tensor, rule: str, size: tuple[int, int]) -> None:
    score = region(maps, (0, 1), (2,), RULES[rule], size)
    assert score.shape == size and torch.isfinite(score).all()
    assert score.min() >= 0 and score.max() <= 1 + 1e-6


@given(maps=attention(), rule=st.sampled_from(sorted(RULES)), low=st.floats(0, 1), high=st.floats(0, 1), grow=st.integers(0, 2))
@settings(deadline=None)
def test_masks_shrink_with_the_threshold_and_grow_with_grow(maps, rule, low, high, grow) -> None:
    low, high = sorted((low, high))
    score = RULES[rule].score(maps, (0,), (2,))
    wide, narrow = binary_mask([score], low, grow), binary_mask([score], high, grow)
    assert (narrow <= wide).all() and set(wide.unique().tolist()) <= {0.0, 1.0}
    assert (binary_mask([score], high) <= narrow).all()


@given(first=attention(), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_mask_of_two_prompts_is_the_union_of_their_masks(first: torch.Tensor, seed: int) -> None:
    other = torch.rand(first.shape[1:], generator=torch.Generator().manual_seed(seed))
    both = binary_mask([first[0], other], 0.3)
    assert torch.equal(both.bool(), binary_mask([first[0]], 0.3).bool() | binary_mask([other], 0.3).bool())


@given(maps=attention(), rule=st.sampled_from(sorted(RULES)), size=sizes, threshold=st.floats(0, 1))
@settings(deadline=None)
def test_what_is_subtracted_is_not_in_the_mask(maps, rule, size, threshold) -> None:
    whole = [region(maps, (0,), (2,), RULES[rule], size)]
    out = subtracted_region(maps, (1,), (2,), RULES[rule], size)
    left = binary_mask(whole, threshold, 0, [out])
    assert not (left.bool() & (out > threshold)).any()
    assert torch.equal(left.bool() | ((out > threshold) & (whole[0] > threshold)), whole[0] > threshold)


def test_the_published_rule_enlarges_by_nearest_neighbour_and_subtracts_unpooled() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1] = maps[1, 2, 2] = 1.0
    score = region(maps, (0,), (), RULES["peak"], (8, 8))
    assert set(score.unique().tolist()) == {0.0, 1.0} and score.sum() == 9 * 4
    assert subtracted_region(maps, (1,), (), RULES["peak"], (8, 8)).sum() == 4


def test_share_covers_an_object_of_which_peak_sees_the_peak() -> None:
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    word = torch.where(inside, 0.02, 0.001)
    word[3, 3] = 0.5
    background = torch.where(inside, 0.002, 0.05)
    maps = torch.stack([1 - word - background, word, background])
    assert torch.equal(binary_mask([share(maps, (1,), (2,))], 0.3).bool(), inside)
    assert binary_mask([peak(maps, (1,), (2,))], 0.3).sum() == 9  # the peak, max-pooled 3x3


def test_a_word_list_for_one_prompt_only_gives_no_nan() -> None:
    """The published code divides the other prompt's empty map by its maximum: 0 / 0."""
    maps = torch.rand(4, 5, 5)
    assert torch.equal(share(maps, (), (2,)), torch.zeros(5, 5)) and torch.equal(peak(maps, (), ()), torch.zeros(5, 5))


@given(seed=st.integers(0, 99), height=st.integers(1, 5), width=st.integers(1, 5))
@settings(deadline=None)
def test_blend_selects_and_is_exact(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edited, source = torch.randn(2, 4, height, width, generator=generator)
    mask = (torch.rand(height, width, generator=generator) > 0.5).float()
    mixed = blend(edited, source, mask)
    assert torch.equal(mixed[:, mask == 1], edited[:, mask == 1]) and torch.equal(mixed[:, mask == 0], source[:, mask == 0])
    assert torch.equal(blend(torch.full_like(edited, np.inf), source, torch.zeros(height, width)), source)


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(EditSpecError, match=r"Did you mean 'share'.*\['heat', 'peak', 'share'\]"):
        rule_of("shar")


def test_competitors_are_the_other_content_words_or_the_end(tmp_path) -> None:
    save_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    seen = layout(tokenizer, "a cat on the grass", subject_queries=2, max_length=16)
    assert competitors(seen, seen.columns("cat")) == seen.columns("grass")
    assert not set(competitors(seen, seen.columns("grass"))) & set(seen.subject)
    alone = layout(tokenizer, "a cat", max_length=16)
    assert competitors(alone, alone.columns("cat")) == tuple(range(alone.end, alone.length))


def test_squares_are_as_large_as_their_parts_extend() -> None:
    mask = torch.zeros(9, 12)
    mask[2, 1:6] = 1  # five wide, one high
    mask[7, 11] = 1  # a part of its own, at the edge
    expected = torch.zeros(9, 12)
    expected[0:5, 1:6] = 1
    expected[7, 11] = 1
    assert torch.equal(squares_around(mask), expected)
    mask[2, 5] = 0
    mask[3, 5] = 1  # touching at a corner is one part, two high; a side that cannot be centred is one longer
    expected[0:6, 1:6] = 1
    assert torch.equal(squares_around(mask), expected)
    assert not squares_around(torch.zeros(4, 5)).any() and squares_around(torch.ones(4, 7)).all()


@given(mask=st.tuples(sizes, st.integers(0, 10_000), st.floats(0, 1)))
def test_squares_hold_their_mask_and_stay_near_it(mask) -> None:
    (height, width), seed, share_inside = mask
    inside = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share_inside).float()
    squares = squares_around(inside)
    assert squares.shape == inside.shape and set(squares.unique().tolist()) <= {0.0, 1.0}
    assert (squares >= inside).all() and bool(squares.any()) == bool(inside.any())
    # No further from the mask than half of the largest side.
    reach = (max(height, width) + 1) // 2
    assert (squares <= binary_mask([inside], 0.5, grow=reach)).all()


@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 999), share=st.sampled_from([0.1, 0.5, 1.1]))
@settings(deadline=None)
def test_what_is_hidden_is_hidden_at_every_resolution_and_something_is_always_seen(height, width, seed, share) -> None:
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    seen = attended_pixels(mask.float())
    sizes, side = [], (height, width)
    while True:
        sizes.append(side)
        if side == (1, 1):
            break
        side = tuple(-(-length // 2) for length in side)
    assert list(seen) == [h * w for h, w in sizes]
    for level, (h, w) in enumerate(sizes):
        # A pixel of this level covers 2 ** level of the mask's a side, as far as the mask goes.
        cells = [[mask[y << level : (y + 1) << level, x << level : (x + 1) << level] for x in range(w)] for y in range(h)]
        touched, filled = (torch.tensor([[bool(how(cell)) for cell in row] for row in cells]) for how in (torch.any, torch.all))
        expected = next((~hidden for hidden in (touched, filled) if not hidden.all()), torch.ones(h, w, dtype=torch.bool))
        assert torch.equal(seen[h * w], expected.flatten()) and seen[h * w].any()
