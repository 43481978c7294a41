"""The measures are right on known answers and keep what they promise: identity, symmetry, and no dependence on area."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import metrics
from benchmarks.statistics import interval, mean, paired, share_interval

SIDE = 16
PICTURES = arrays(np.uint8, (SIDE, SIDE, 3))
MASKS = arrays(bool, (SIDE, SIDE))
VECTORS = arrays(np.float64, (5,), elements=st.floats(-10, 10).map(lambda x: round(x, 3)))


def flat(level: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), level, np.uint8)


def square(low: int, high: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[low:high, low:high] = True
    return mask


@given(a=PICTURES, b=PICTURES)
@settings(deadline=None, max_examples=30)
def test_measures_of_pictures_are_symmetric_and_perfect_for_equals(a: np.ndarray, b: np.ndarray) -> None:
    whole = np.ones((SIDE, SIDE), bool)
    for measure in (metrics.mse, metrics.psnr, metrics.ssim):
        assert measure(a, b) == pytest.approx(measure(b, a), abs=1e-9)
        assert measure(a, b) == pytest.approx(measure(a, b, whole), abs=1e-9)
    assert metrics.mse(a, a) == 0 and metrics.psnr(a, a) == math.inf and metrics.ssim(a, a) == pytest.approx(1)
    assert 0 <= metrics.mse(a, b) <= 1 and -1 <= metrics.ssim(a, b) <= 1 + 1e-9
    assert metrics.exactness(a, a, whole) == 1
    assert not metrics.changed(a, a).any() and (metrics.changed(a, b) == metrics.changed(b, a)).all()


@given(mask=MASKS.filter(lambda mask: mask.any()), levels=st.tuples(st.integers(0, 255), st.integers(0, 255)))
@settings(deadline=None, max_examples=30)
def test_errors_in_a_mask_do_not_depend_on_its_area(mask: np.ndarray, levels: tuple[int, int]) -> None:
    a, b = flat(levels[0]), np.where(mask[..., None], flat(levels[1]), flat(levels[0]))
    error = (levels[0] / 255 - levels[1] / 255) ** 2
    assert metrics.mse(a, b, mask) == pytest.approx(error)
    assert metrics.psnr(a, b, mask) == pytest.approx(math.inf if error == 0 else -10 * math.log10(error))
    assert metrics.exactness(a, b, mask) == (levels[0] == levels[1])
    if not mask.all():
        assert metrics.psnr(a, b, ~mask) == math.inf


def test_the_published_background_errors_fall_with_the_area_of_the_edit() -> None:
    a, b = flat(0), flat(51)
    small, large = square(0, 4), square(0, 12)
    for edited, share in ((small, 240 / 256), (large, 112 / 256)):
        assert metrics.published_mse(a, b, edited) == pytest.approx(0.04 * share)
        assert metrics.published_psnr(a, b, edited) == pytest.approx(-10 * math.log10(0.04 * share))
        assert metrics.psnr(a, b, ~edited) == pytest.approx(-10 * math.log10(0.04))


def test_the_published_measures_are_those_of_torchmetrics_on_blackened_pictures() -> None:
    import torch
    import torchmetrics.image

    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    edited = np.zeros((32, 32), bool)
    edited[5:20, 8:30] = True
    kept = 1 - edited[..., None].astype(np.float32)
    pair = [torch.from_numpy(p.astype(np.float32) / 255 * kept).permute(2, 0, 1)[None] for p in (a, b)]
    psnr = torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0)(*pair).item()
    ssim = torchmetrics.image.StructuralSimilarityIndexMeasure(data_range=1.0)(*pair).item()
    assert metrics.published_psnr(a, b, edited) == pytest.approx(psnr, abs=1e-4)
    assert metrics.published_mse(a, b, edited) == pytest.approx(torch.nn.functional.mse_loss(*pair).item(), abs=1e-6)
    assert metrics.published_ssim(a, b, edited) == pytest.approx(ssim, abs=1e-4)
    # Over its own area, the background of two unlike noises is no better than they are; the published figure is.
    assert metrics.ssim(a, b, ~edited) < metrics.published_ssim(a, b, edited) - 0.2


def test_ssim_sees_structure_and_not_only_error() -> None:
    ramp = np.repeat(np.linspace(0, 200, SIDE, dtype=np.uint8)[None, :, None], SIDE, 0).repeat(3, 2)
    brighter, mirrored = ramp + 20, ramp[:, ::-1]
    assert metrics.ssim(ramp, brighter) > 0.85 > 0.2 > metrics.ssim(ramp, mirrored)


@given(a=MASKS, b=MASKS)
@settings(deadline=None, max_examples=40)
def test_measures_of_masks_are_symmetric_in_range_and_one_for_equals(a: np.ndarray, b: np.ndarray) -> None:
    for measure in (metrics.iou, metrics.boundary_f):
        assert 0 <= measure(a, b) <= 1 and measure(a, b) == pytest.approx(measure(b, a))
        assert measure(a, a) == 1
    if a.any():
        assert metrics.iou(a, a & b) == pytest.approx(np.count_nonzero(a & b) / np.count_nonzero(a))


def test_outlines_are_compared_within_a_tolerance() -> None:
    disc, moved, far = square(4, 9), square(5, 10), square(11, 15)
    assert metrics.boundary_f(disc, moved, tolerance=2) == 1
    assert 0 < metrics.boundary_f(disc, moved, tolerance=0) < metrics.boundary_f(disc, moved, tolerance=1) <= 1
    assert metrics.boundary_f(disc, far, tolerance=1) == 0
    assert metrics.boundary_f(disc, np.zeros_like(disc)) == 0 and metrics.boundary_f(~disc | disc, disc & ~disc) == 0
    # 0.8 % of a diagonal of 90 pixels is under one, and is one.
    large = np.zeros((64, 64), bool)
    large[20:40, 20:40] = True
    assert metrics.boundary_f(large, np.roll(large, 1, 0)) == 1 > metrics.boundary_f(large, np.roll(large, 2, 0))


def test_changed_pixels_and_nearness() -> None:
    a, b = flat(100), flat(100)
    b[2, 3, 1], b[5, 5] = 126, 125
    assert metrics.changed(a, b).sum() == 1 and metrics.changed(a, b)[2, 3]
    assert metrics.changed(a, b, levels=24).sum() == 2
    region = square(0, 8)
    assert metrics.remaining(flat(100), flat(100), flat(0), region) == 0
    assert 0 < metrics.remaining(flat(90), flat(100), flat(0), region) < 0.02
    assert metrics.remaining(flat(0), flat(100), flat(0), region) == 1
    assert metrics.remaining(flat(50), flat(100), flat(0), region) == pytest.approx(0.25, abs=0.01)
    assert metrics.remaining(flat(1), flat(0), flat(0), region) == np.inf and metrics.remaining(*[flat(0)] * 3, region) == 0
    assert metrics.exactness(a, b, region) == pytest.approx(62 / 64)
    assert metrics.capped(math.inf) == metrics.capped(120.0) == 100 and metrics.capped(30.0) == 30


@given(a=VECTORS, b=VECTORS, scale=st.floats(0.1, 10))
def test_cosines_are_symmetric_and_know_no_length(a: np.ndarray, b: np.ndarray, scale: float) -> None:
    if not a.any() or not b.any():
        with pytest.raises(ValueError, match="not 0"):
            metrics.cosine(a, b)
        return
    assert metrics.cosine(a, b) == pytest.approx(metrics.cosine(b, a))
    assert metrics.cosine(a, scale * a) == pytest.approx(1) and metrics.cosine(a, -a) == pytest.approx(-1)
    assert metrics.clip_score(a, b) == pytest.approx(100 * max(0, metrics.cosine(a, b)))


def test_structure_distance_compares_the_relations_of_tokens() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(6, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert metrics.structure_distance(keys, 3 * keys @ turn) == pytest.approx(0, abs=1e-12)
    first, second = np.eye(2), np.float64([[1, 0], [1, 0]])
    # Of the four cosines two differ, by one each.
    assert metrics.structure_distance(first, second) == pytest.approx(0.5) == metrics.structure_distance(second, first)
    assert metrics.structure_distance(second, np.float64([[1, 0], [-1, 0]])) == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, m: metrics.psnr(p, p.astype(float)), "uint8 of one shape"),
        (lambda p, m: metrics.ssim(p, p[:8]), "uint8 of one shape"),
        (lambda p, m: metrics.mse(p, p, m & ~m), "a pixel or more"),
        (lambda p, m: metrics.exactness(p, p, m[:8]), "expected bool"),
        (lambda p, m: metrics.iou(m, m.astype(int)), "bool of one shape"),
        (lambda p, m: metrics.boundary_f(m, m[:8]), "bool of one shape"),
        (lambda p, m: metrics.structure_distance(np.eye(2), np.eye(3)), "one shape"),
        (lambda p, m: interval([]), "one or more"),
        (lambda p, m: interval([1.0, math.nan]), "finite"),
        (lambda p, m: share_interval([]), "one or more values of 0 or 1"),
        (lambda p, m: share_interval([0.5]), "one or more values of 0 or 1"),
    ],
)
def test_measures_refuse_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(flat(0), square(2, 6))


def test_means_count_what_has_no_value_and_differences_are_of_pairs() -> None:
    found = mean([1.0, None, 3.0, 2.0])
    assert (found.value, found.count, found.total) == (2.0, 3, 4) and 1 <= found.low <= 2 <= found.high <= 3
    assert mean([None, None]) is None and mean([]) is None
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 50)
    ours, theirs = ({str(k): float(x) for k, x in enumerate(values)} for values in (hard + 1, hard + rng.normal(0, 0.1, 50)))
    difference = paired(ours | {"new": 5.0}, theirs | {"0": None})
    # Cases differ by ten, methods by one: only the differences of pairs show it.
    assert 0.9 < difference.low < 1 < difference.high < 1.1 and (difference.count, difference.total) == (49, 51)
    assert mean(list(ours.values())).low < mean(list(theirs.values())).high
    assert paired({"a": 1.0}, {"b": 1.0}) is None


def test_intervals_of_shares_have_a_width_where_all_cases_are_alike() -> None:
    # Of 106 cases none: by Wilson's formula z^2 / (n + z^2) at most.
    assert share_interval([0.0] * 106) == pytest.approx((0, 1.96**2 / (106 + 1.96**2)), abs=1e-4)
    one = mean([1.0, *[0.0] * 105, None], share=True)
    assert (one.low, one.value, one.high) == pytest.approx((0.0017, 1 / 106, 0.0516), abs=1e-4) and one.count == 106
    # A difference of shares is no share.
    ours, theirs = ({str(k): value for k in range(20)} for value in (1.0, 0.0))
    assert paired(ours, theirs).low == 1


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30))
@example(values=[0.19550764272105542] * 3)
@settings(deadline=None, max_examples=25)
def test_bootstrap_intervals_lie_within_the_values_and_repeat(values: list[float]) -> None:
    low, high = interval(values)
    assert min(values) <= low <= high <= max(values)
    assert (low, high) == interval(values)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = [low <= 0 <= high for low, high in (interval(rng.normal(size=40), draws=300, seed=k) for k in range(200))]
    assert 0.88 <= np.mean(held) <= 0.99
