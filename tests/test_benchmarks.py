"""The measures are right on known answers, the judge says what it was trained to say, every figure runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from benchmarks import cost, figures, judge
from benchmarks.figures_table import LINES, Line, pivot, results, standing, summarise, table
from benchmarks.metrics import iou, psnr
from benchmarks.statistics import interval
from p2p_subject.editor import Editor
from p2p_subject.errors import ModelError
from p2p_subject.training import world
from p2p_subject.training.world import Look

MASKS = arrays(bool, (5, 6))
PICTURES = arrays(np.uint8, (5, 6, 3))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The benchmarks set the number of threads of their processes; give it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@given(a=PICTURES, b=PICTURES)
def test_psnr_is_symmetric_and_that_of_the_mean_squared_error(a: np.ndarray, b: np.ndarray) -> None:
    error = np.square(a / 255 - b / 255).mean()
    assert psnr(a, b) == psnr(b, a) == pytest.approx(np.inf if error == 0 else -10 * np.log10(error))
    assert psnr(a, a) == np.inf


def test_psnr_in_a_mask_does_not_depend_on_the_area() -> None:
    a, b = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    b[:4] = 51  # a fifth of the range: 20 log10(5) dB where it differs
    small, large = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    small[0, :3], large[:4] = True, True
    assert psnr(a, b, small) == psnr(a, b, large) == pytest.approx(13.979, abs=1e-3)
    assert psnr(a, b) == pytest.approx(13.979 + 3.010, abs=1e-3)
    assert psnr(a, b, ~large) == np.inf


def test_measures_refuse_what_does_not_fit() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="uint8 of one shape"):
        psnr(picture, picture.astype(float))
    with pytest.raises(ValueError, match="a pixel or more"):
        psnr(picture, picture, np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="bool of one shape"):
        iou(np.ones((4, 4), bool), np.ones((4, 5), bool))
    with pytest.raises(ValueError, match="one or more"):
        interval([])


@given(a=MASKS, b=MASKS)
def test_iou_is_symmetric_in_range_and_one_for_equals(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= iou(a, b) == iou(b, a) <= 1
    assert iou(a, a) == 1
    assert (iou(a, b) == 1) == np.array_equal(a, b)
    if a.any():
        assert iou(a, a & b) == np.count_nonzero(a & b) / np.count_nonzero(a)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None, max_examples=25)
def test_bootstrap_intervals_lie_within_the_values_and_repeat(values: list[float]) -> None:
    low, high = interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == interval(values)


def test_a_case_with_an_error_counts_as_failed() -> None:
    rows = [{"group": "g", "x": True, "s": 3.0}, {"group": "g", "error": "E"}, {"group": "other", "x": True}]
    share = summarise(Line("share", "g", "x", 0.4, 0.6), rows)
    assert (share.value, share.count, share.errors) == (0.5, 2, 1) and standing(share) == "met"
    seconds = summarise(Line("seconds", "g", "s", 10, 5, failed=None), rows)
    assert (seconds.value, seconds.count, seconds.errors) == (3, 1, 1) and standing(seconds) == "goal"
    assert summarise(Line("nothing", "absent", "x"), rows) is None
    assert "NOT MET" in table([summarise(Line("share", "g", "x", 0.9), rows)])
    swept = [{"setting": "a", "x": 1.0}, {"setting": "a", "x": 0.0}, {"error": "E"}, {"error": "E"}]
    assert "0.250" in pivot(swept, "setting", ["x"]) and "error: 2" in pivot(swept, "setting", ["x"])


@pytest.mark.parametrize(
    ("hue", "wanted", "right"),
    [
        (None, None, True),
        (None, 10.0, False),
        (10.0, None, False),
        (10.0, 35.0, True),
        (10.0, 36.0, False),
        (350.0, 10.0, True),
        (180.0, 0.0, False),
    ],
)
def test_a_look_is_right_in_source_and_colours(hue: float | None, wanted: float | None, right: bool) -> None:
    verdict = judge.Verdict("dog", "google", hue, "grass")
    assert judge.right_look(verdict, Look("dog", "google", wanted)) is right
    assert not judge.right_look(verdict, Look("dog", "fluent", wanted))
    assert judge.right_category(verdict, Look("dog", "fluent")) and not judge.right_category(verdict, Look("cat", "google"))


def test_the_shipped_judge_knows_real_scenes() -> None:
    assert judge.WEIGHTS.stat().st_size <= 2_500_000
    known = judge.Judge.load()
    for split in ("test", "new_hue", "new_art"):
        pictures, specs = judge.scene_batch(split, range(50_000, 50_100))
        verdicts = known.verdicts(pictures)
        shares = judge.accuracy(verdicts, specs)
        assert shares["both"] >= 0.93 and shares["background"] >= 0.98, (split, shares)
    again = known.verdicts([Image.fromarray(picture) for picture in pictures[:5]], batch=5)
    assert [v.category for v in again] == [v.category for v in verdicts[:5]]
    for verdict in verdicts:
        assert verdict.hue is None or 0 <= verdict.hue < 360
        assert all(0 <= value <= 1 for value in verdict.confidences.values())


def test_the_judge_refuses_pictures_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"expected \(64, 64, 3\)"):
        judge.Judge(judge.JudgeNet()).verdicts([Image.new("RGB", (32, 32))])


def test_softened_pictures_stay_pictures() -> None:
    images = judge.to_batch(judge.scene_batch("judge", range(4))[0])
    softened = judge.soften(images)
    assert softened.shape == images.shape and (softened - images).abs().mean() < 0.3


def test_training_goes_on_and_writes_weights_that_load(tmp_path: Path) -> None:
    judge.train(tmp_path, minutes=0.005, batch=4)
    steps = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    average = judge.train(tmp_path, minutes=0.015, batch=4)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > steps > 0
    judge.ship(average, tmp_path / "shipped.safetensors")
    assert len(judge.Judge.load(tmp_path / "shipped.safetensors").verdicts(np.zeros((3, 64, 64, 3), np.uint8))) == 3


def test_every_figure_runs_and_is_recorded(miniature_folder: Path, tmp_path: Path) -> None:
    chosen = figures.Settings(str(miniature_folder), str(miniature_folder), count=2, steps=2)
    groups = [group for group in figures.GROUPS if group != "sweep"]
    text = figures.measure(chosen, groups, tmp_path, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert {(row["group"], row["index"]) for row in rows} == {(group, index) for group in groups for index in (0, 1)}
    swaps = [row for row in rows if row["group"] == "swap"]
    assert all(row["exact"] and 2 <= row["rows"] < 3 for row in swaps)
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["environment"]["fingerprint"] and report["settings"]["count"] == 2
    assert [figure["title"] for figure in report["figures"]] == [line.title for line in LINES]
    assert "swap: right category and look" in text and "mask validation: IoU by threshold" in text
    assert Image.open(tmp_path / "swap.png").width > 400


def test_the_sweep_has_a_row_for_each_setting(miniature_folder: Path, tmp_path: Path) -> None:
    text = figures.measure(figures.Settings(str(miniature_folder), count=1, steps=1), ["sweep"], tmp_path, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in rows if "setting" in row] and all(name in text for name in figures.variants())
    assert {row.get("setting") for row in rows} == set(figures.variants())


def test_the_same_seed_gives_the_same_pictures(miniature_folder: Path) -> None:
    bench = figures.bench_of(figures.Settings(str(miniature_folder), count=1, steps=2))
    prompt, alone = "a dog on grass", Editor.from_pretrained(miniature_folder)
    first, second = bench.generate([prompt, prompt], [None, None], [3, 4])
    expected = alone.generate(prompt, seed=3, steps=2, guidance_scale=bench.guidance).image
    assert np.abs(np.int16(first) - np.int16(expected)).max() <= 1
    assert not np.array_equal(np.asarray(first), np.asarray(second))


def test_a_failing_case_is_a_row_and_leaves_the_others(miniature_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(bench: figures.Bench, indices: list[int]) -> list[dict]:
        if 1 in indices:
            raise RuntimeError("not this one")
        return [{"x": index} for index in indices]

    monkeypatch.setitem(figures.GROUPS, "picky", (picky, 3))
    rows = figures.attempt(figures.Settings(str(miniature_folder), count=1, steps=2), "picky", [0, 1, 2])
    assert rows == [
        {"group": "picky", "index": 0, "x": 0},
        {"group": "picky", "index": 1, "error": "RuntimeError: not this one"},
        {"group": "picky", "index": 2, "x": 2},
    ]
    assert results(rows) == ([], [])


def test_a_folder_that_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        figures.measure(figures.Settings(str(tmp_path), count=1), ["caption"], tmp_path / "out", processes=1)
    assert not (tmp_path / "out").exists()


def test_an_edit_costs_three_rows_in_its_windows_and_two_beyond(miniature_folder: Path) -> None:
    torch.set_num_threads(1)
    timed = cost.timed(Editor.from_pretrained(miniature_folder), steps=5, repeats=1)
    assert {name: rows for name, (_, rows) in timed.items()} == {"generation": 2, "inversion": 1, "edit": 2.2}
    assert all(seconds > 0 for seconds, _ in timed.values())
    assert cost.resident_peak() > 10 * 2**20
    text = cost.table([cost.Cost("generation", 1.0, 2, 2**20), cost.Cost("edit", 1.5, 3, 2**21)])
    assert text.splitlines()[2].split() == ["edit", "1.500", "3.00", "2.0", "1.50", "1.00", "2.00"]


def test_scenes_of_the_figures_are_not_those_of_training() -> None:
    trained = {world.sample(split, index) for split in ("train", "judge") for index in range(300)}
    assert not trained & {world.sample(split, index) for split in figures.HELD_OUT for index in range(300)}
