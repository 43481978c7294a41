"""The measures are right on known answers, the judge says what it was trained to say, every figure runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import figures, judge
from benchmarks.figures_table import LINES, Line, pivot, results, standing, summarise, table
from p2p_subject.editor import Editor
from p2p_subject.errors import ModelError
from p2p_subject.training import world
from p2p_subject.training.world import Look

pytestmark = pytest.mark.usefixtures("own_threads")


def test_a_case_with_an_error_counts_as_failed() -> None:
    rows = [{"group": "g", "x": True, "s": 3.0}, {"group": "g", "error": "E"}, {"group": "other", "x": True}]
    share = summarise(Line("share", "g", "x", 0.4, 0.6), rows)
    assert (share.value, share.count, share.errors) == (0.5, 2, 1) and standing(share) == "met"
    seconds = summarise(Line("seconds", "g", "s", 10, 5, failed=None), rows)
    assert (seconds.value, seconds.count, seconds.errors) == (3, 1, 1) and standing(seconds) == "goal"
    assert summarise(Line("nothing", "absent", "x"), rows) is None
    # All of ten cases are not every case: shares have an interval where the bootstrap's would have no width.
    right = summarise(Line("right", "g", "x"), [{"group": "g", "x": True}] * 10)
    assert right.value == right.high == 1 and 0.7 < right.low < 0.75
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
    marks = {"category": True, "look": right, "both": right, "background": True}
    assert judge.marks(verdict, Look("dog", "google", wanted), "grass") == marks
    other = {"category": False, "look": right, "both": False, "background": False}
    assert judge.marks(verdict, Look("cat", "google", wanted), "snow") == other


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
    assert softened.shape == images.shape and 0 < (softened - images).abs().mean() < 0.3


def test_training_goes_on_and_writes_weights_that_load(tmp_path: Path) -> None:
    judge.train(tmp_path, minutes=0.005, batch=4)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    # However long the first took, the second has half a second more.
    average = judge.train(tmp_path, minutes=(state["used"] + 0.5) / 60, batch=4)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > state["step"] > 0
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


def test_scenes_of_the_figures_are_not_those_of_training() -> None:
    trained = {world.sample(split, index) for split in ("train", "judge") for index in range(300)}
    assert not trained & {world.sample(split, index) for split in figures.HELD_OUT for index in range(300)}
