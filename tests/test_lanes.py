"""Several processes give what one does, and one that dies fails its case alone."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Barrier

import pytest

from benchmarks import lanes, report, run
from benchmarks.run_folder import RunError, read_rows
from tests.benchmarking import Page, settings_of

pytestmark = [pytest.mark.usefixtures("own_threads"), pytest.mark.once]


def test_several_processes_give_the_same_rows_and_pictures(miniature_folder: Path, tmp_path: Path) -> None:
    kept = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        rows = run.measure(settings_of(miniature_folder, out, "ours,generate-only"), processes=processes)
        costs = {"seconds", "cpu_seconds", "peak"}
        values = [{k: v for k, v in row["metrics"].items() if k not in costs} | {"t": row["trajectory"]} for row in rows]
        pictures = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.png"))}
        kept.append((values, pictures))
    assert kept[0] == kept[1] and len(kept[0][0]) == 4


def test_a_case_that_ends_its_process_is_a_failure_and_the_others_run(miniature_folder: Path, mine: Path) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:killed,paste", count=4)
    rows = run.measure(settings, processes=2)
    died = [row for row in rows if "error" in row]
    whole, (dead,) = rows[0], died
    assert (dead["method"], dead["case"], dead["error"][:12]) == ("my_methods:killed", "swap-0002", "ProcessDied:")
    assert len(rows) == 8 and set(dead) == set(whole) - {"networks", "prompt", "target_prompt"} | {"error", "traceback"}
    assert set(dead["metrics"]) == set(whole["metrics"]) and set(dead["metrics"].values()) == {None}
    # Its row does not say what was asked; the others of the case do.
    assert report.main([str(mine / "out")]) == 0
    text = Page((mine / "out" / "report.html").read_text()).text
    assert f"“{rows[5]['prompt']}”" in text and rows[5]["case"] == "swap-0002"


def test_processes_that_die_time_after_time_end_the_run(miniature_folder: Path, mine: Path, monkeypatch) -> None:
    monkeypatch.setattr(lanes, "MOST_DEATHS", 2)
    settings = settings_of(miniature_folder, mine / "out", "my_methods:deadly", count=4)
    with pytest.raises(RunError, match="died in 2 cases in a row.*--processes.*goes on"):
        run.measure(settings, processes=2)
    assert all(row["error"].startswith("ProcessDied") for row in read_rows(mine / "out"))


def test_a_failure_that_leaves_the_device_unusable_counts_as_a_death(miniature_folder: Path, mine: Path, monkeypatch) -> None:
    rows = {"swap-0000": {"case": "swap-0000"}, "swap-0001": {"case": "swap-0001", "error": "illegal memory access"}}

    class Pool:
        """Runs nothing: has rows, and says, or dies of saying, whether the device takes more work."""

        def __init__(self, lost: bool | Exception) -> None:
            self.lost = lost

        def submit(self, function, *given: str) -> Future:
            future: Future = Future()
            if function is lanes.work:
                future.set_result(rows[given[2]])
            elif isinstance(self.lost, Exception):
                future.set_exception(self.lost)
            else:
                future.set_result(self.lost)
            return future

        def shutdown(self) -> None:
            pass

    settings = settings_of(miniature_folder, mine / "out", "my_methods:picky", count=4)
    for answer, deaths in ((False, 0), (True, 1), (BrokenProcessPool("killed"), 1)):
        lane = lanes.Lane(settings, "cpu", "")
        lane.pool = Pool(answer)
        assert [lane.row(("my_methods:picky", "swap", case)) for case in rows] == list(rows.values())
        assert lane.deaths == deaths and (lane.pool is None) == (deaths == 1)
    # In one process, the run ends before the next case.
    monkeypatch.setattr(run, "lost", lambda device: True)
    with pytest.raises(RunError, match="cpu takes no more work after swap-0001 by my_methods:picky; the same command goes on"):
        run.measure(settings)
    assert [row["case"] for row in read_rows(mine / "out")] == ["swap-0000", "swap-0001"]


def test_what_other_lanes_are_at_is_kept_when_one_ends_the_run(miniature_folder: Path, mine: Path, monkeypatch) -> None:
    both = Barrier(2, timeout=60)

    def row(self: lanes.Lane, task: lanes.Task) -> dict:
        both.wait()
        if task[2] == "swap-0000":
            raise RunError("no more")
        # Until the other has ended the run.
        time.sleep(0.5)
        return {"case": task[2]}

    monkeypatch.setattr(lanes.Lane, "row", row)
    settings, found = settings_of(miniature_folder, mine / "out", "my_methods:copied"), []
    tasks = [("my_methods:copied", "swap", f"swap-000{number}") for number in range(9)]
    with pytest.raises(RunError, match="no more"):
        for done in lanes.in_lanes(settings, tasks, ["cpu"], 2, ""):
            found.append(done["case"])
    assert found == ["swap-0001"]


def test_a_process_that_died_between_two_cases_fails_neither(miniature_folder: Path, mine: Path) -> None:
    class Broken:
        def submit(self, *task: object) -> None:
            raise BrokenProcessPool("killed while it waited")

        def shutdown(self) -> None:
            pass

    lane = lanes.Lane(settings_of(miniature_folder, mine / "out", "my_methods:copied"), "cpu", "")
    lane.pool = Broken()
    try:
        assert "error" not in lane.row(("my_methods:copied", "swap", "swap-0001")) and lane.deaths == 0
    finally:
        lane.close()


def test_a_process_that_cannot_begin_ends_the_run_with_a_word_on_how_to_go_on(
    everything: Path, miniature_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Called with settings and a device it raises, as a model that is not there does.
    monkeypatch.setattr(lanes, "begin", os.getpid)
    with pytest.raises(RunError, match="the same command goes on"):
        run.measure(settings_of(miniature_folder, everything, "ours", count=2), processes=2)
    assert ("ours", "swap-0001") not in {(row["method"], row["case"]) for row in read_rows(everything)}
