"""Runs resume with nothing lost or doubled, failures are rows that count, other settings are refused."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import report, run
from benchmarks.method_names import names_of
from benchmarks.methods import METHODS
from benchmarks.report_tables import sections
from benchmarks.run_folder import RunError, RunFolder, file_name, held_settings, read_rows, read_settings
from benchmarks.suite import Case, Options
from benchmarks.world_suite import WorldSuite
from p2p_subject.errors import ModelError
from tests.benchmarking import MINE, settings_of
from tests.tiny_pipelines import stable_diffusion_1

pytestmark = pytest.mark.usefixtures("own_threads")


def test_every_method_runs_and_its_rows_say_what_made_them(everything: Path) -> None:
    rows = {(row["method"], row["kind"]): row for row in read_rows(everything)}
    assert not [row["error"] for row in rows.values() if "error" in row]
    only_swaps = {"lavis", "paste"}
    asked = METHODS.keys() - {"blip-diffusion"}  # which generates without a source
    assert rows.keys() == {(n, k) for n in asked for k in ("swap", "replace") if k == "swap" or n not in only_swaps}
    assert {name for (name, _), row in rows.items() if row["pasted"]} == {n for n in asked if n.startswith("ours")}
    assert {name for (name, _), row in rows.items() if row["mask_input"]} == {"ours+mask", "paste"}
    for (name, _), row in rows.items():
        values = row["metrics"]
        assert values.keys() == {measure.name for measure in WorldSuite.measures}
        assert row["device"] == "cpu" and row["versions"]["torch"] and row["code"] and row["model"] and row["seed"] is not None
        assert (everything / row["pictures"]["edited"]).is_file() and (everything / row["pictures"]["truth"]).is_file()
        assert (row["trajectory"] is None) == (name == "paste") and (values["nfe"] == 0) == (name == "paste")
        assert values["backward_rows"] > 0 or name != "null-text+p2p"
        assert values["work"] == values["rows"] + 2 * values["backward_rows"]
    swaps = {name: row["metrics"] for (name, kind), row in rows.items() if kind == "swap"}
    # The published windows follow the source for longer than ours; LAVIS generates it again, and DDIM with guidance.
    assert swaps["ours"]["rows"] < swaps["direct+p2p"]["rows"] < swaps["lavis"]["rows"] < swaps["ddim+p2p"]["rows"]
    assert swaps["generate-only"]["rows"] == 6 and swaps["null-text+p2p"]["rows"] > 20
    assert swaps["ours+mask"]["exact_outside_mask"] == swaps["ours+mask"]["mask_iou"] == 1
    assert swaps["direct+p2p"]["exact_outside_truth"] < 0.5 < swaps["ours+mask"]["exact_outside_truth"]
    assert swaps["ours+mask"]["unpasted_psnr"] < swaps["ours+mask"]["outside_psnr"]
    assert swaps["direct+p2p"]["unpasted_psnr"] == swaps["direct+p2p"]["outside_psnr"]
    assert swaps["generate-only"]["mask_iou"] is None and swaps["edit-friendly+p2p"]["exact_outside_mask"] is None
    kept = read_settings(everything)
    assert kept["methods"]["lavis"]["blend"]["target_words"] == [] and kept["settings"]["steps"] == 3


def test_a_run_that_is_there_already_runs_nothing_and_adds_what_is_new(
    everything: Path, miniature_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = (everything / "rows.jsonl").read_bytes()
    monkeypatch.setattr(run, "rows_of", lambda *given: pytest.fail("nothing is missing"))
    settings = settings_of(miniature_folder, everything, "paste,ours", count=1)
    assert [row["method"] for row in run.measure(settings)] == ["paste", "ours"]
    assert (everything / "rows.jsonl").read_bytes() == before
    options = ["--suite", "world", "--model", str(miniature_folder), "--steps", "3", "--out", str(everything), "--dry-run"]
    monkeypatch.setattr(run.Editor, "from_pretrained", lambda *given: pytest.fail("a dry run loads no model"))
    assert run.main([*options, "--cases", "swap,add", "--count", "2", "--methods", "ours,lavis,paste"]) == 0
    said = capsys.readouterr().out
    assert "swap: 2 cases by ours, lavis, paste" in said and "add: 2 cases by ours\n" in said
    assert "8 rows in" in said and "3 of them done, 5 to run" in said
    # What the run would refuse, its preview does.
    assert run.main([*options, "--seed", "1"]) == 1 and "seed: 0 there, 1 now" in capsys.readouterr().err
    assert run.main([*options, "--devices", "cuda:99"]) == 1 and "not to be had here" in capsys.readouterr().err


def test_other_settings_are_refused(everything: Path, miniature_folder: Path, mine: Path) -> None:
    before = (everything / "rows.jsonl").read_bytes()
    same = settings_of(miniature_folder, everything, "paste", count=1)
    for changed, message in (
        (replace(same, steps=4), "steps: 3 there, 4 now"),
        (replace(same, guidance_scale=2.0), "guidance_scale"),
        (replace(same, options=replace(same.options, seed=1)), "seed: 0 there, 1 now"),
        (replace(same, options=replace(same.options, split="validation")), "split"),
    ):
        with pytest.raises(RunError, match=message):
            run.measure(changed)
    out = mine / "out"
    run.measure(replace(same, out=out, methods=("my_methods:copied",)))
    (mine / "my_methods.py").write_text(MINE + "\n# changed\n")
    with pytest.raises(RunError, match="my_methods:copied with other settings"):
        run.measure(replace(same, out=out, methods=("my_methods:copied",)))
    assert (everything / "rows.jsonl").read_bytes() == before


def test_a_run_stopped_before_its_first_row_leaves_nothing_to_other_settings(
    miniature_folder: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settings_of(miniature_folder, mine / "out", "my_methods:copied", count=1)
    with monkeypatch.context() as stopped:
        stopped.setattr("benchmarks.worker.require_fitting", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.measure(first)
    (row,) = run.measure(replace(first, options=replace(first.options, seed=1)))
    shown = Image.open(mine / "out" / row["pictures"]["source"])
    assert np.array_equal(shown, WorldSuite(Options(seed=1)).case("swap-0000").source)
    # Half a row, as a killed run leaves, is none.
    (mine / "out" / "rows.jsonl").write_bytes(b'{"method":')
    assert held_settings(mine / "out") is None


def test_users_functions_run_and_failures_are_rows_that_count(miniature_folder: Path, mine: Path) -> None:
    names = "my_methods:answer,my_methods:picky,my_methods:wrong"
    rows = run.measure(settings_of(miniature_folder, mine / "out", names))
    by = {(row["method"].removeprefix("my_methods:"), row["case"]): row for row in rows}
    assert by["answer", "swap-0000"]["mask_input"] and by["answer", "swap-0000"]["metrics"]["mask_iou"] == 1
    assert by["answer", "swap-0000"]["metrics"]["rows"] == by["answer", "swap-0000"]["metrics"]["work"] == 7
    assert "error" not in by["picky", "swap-0000"] and by["picky", "swap-0001"]["error"] == "RuntimeError: not this one"
    assert "line" in by["picky", "swap-0001"]["traceback"]
    assert set(by["picky", "swap-0001"]["metrics"].values()) == {None}
    assert "returned Image; expected" in by["wrong", "swap-0000"]["error"]
    wrong = "picture of method 'my_methods:wrong': Image of mode 'RGB' and size (32, 32); expected mode 'RGB', size (64, 64)"
    assert wrong in by["wrong", "swap-0001"]["error"]
    found = {s.kind: s for s in sections(rows, WorldSuite, names_of(names), "my_methods:answer")}["swap"]
    line = next(line for line in found.tables[0].lines if line[0] == "my_methods:picky")
    assert line[-1] == "1" and line[1].startswith("0.000 (") and "; 2)" in line[1]
    # Failed cases are run again where that is asked for, and only they: those of other methods stay.
    failed = settings_of(miniature_folder, mine / "out", "my_methods:picky")
    assert "2 of them done, 0 to run" in run.preview(failed) and "1 of them done, 1 to run" in run.preview(failed, retry=True)
    before = {key: row for key, row in by.items() if "error" not in row or key[0] == "wrong"}
    again = run.measure(failed, retry=True)
    assert len(again) == 2 and sum("error" in row for row in again) == 1
    kept = read_rows(mine / "out")
    assert len(kept) == 6 and all(row in kept for row in before.values())


def test_a_retry_that_is_stopped_keeps_the_failures_that_it_did_not_come_to(
    miniature_folder: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:picky", count=2)
    before = run.measure(settings)
    assert ["error" in row for row in before] == [False, True]
    written = (mine / "out" / "rows.jsonl").read_bytes()

    def stopped(*given: object) -> Iterator[dict]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "rows_of", stopped)
        run.measure(settings, retry=True)
    assert (mine / "out" / "rows.jsonl").read_bytes() == written
    done = {**before[1], "began": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(run, "rows_of", lambda *given: iter([{k: done[k] for k in done if k not in ("error", "traceback")}]))
        assert ["error" in row for row in run.measure(settings, retry=True)] == [False, False]
    assert [row["case"] for row in read_rows(mine / "out")] == ["swap-0000", "swap-0001"]


def test_what_a_method_paints_into_is_its_own(miniature_folder: Path, mine: Path) -> None:
    (row,) = run.measure(settings_of(miniature_folder, mine / "out", "my_methods:painting", count=1))
    assert row["metrics"]["outside_psnr"] < 20
    with Image.open(mine / "out" / row["pictures"]["source"]) as kept:
        assert np.array_equal(kept, WorldSuite(Options()).case("swap-0000").source)


def test_a_users_method_is_asked_for_the_cases_that_it_says_it_is_for(miniature_folder: Path, mine: Path) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:choosy,paste", count=4)
    rows = run.measure(settings)
    assert [row["case"] for row in rows if row["method"] == "my_methods:choosy"] == ["swap-0001"] and len(rows) == 5
    assert "5 rows" in run.preview(settings) and "asked for none" not in run.preview(settings)


def test_a_method_sees_the_answer_only_if_it_says_so(miniature_folder: Path, mine: Path) -> None:
    names = "my_methods:bare,my_methods:dear,my_methods:traced,my_methods:leaving"
    rows = run.measure(settings_of(miniature_folder, mine / "out", names, count=1))
    errors = {row["method"].removeprefix("my_methods:"): row.get("error") for row in rows}
    assert errors["bare"] is None and rows[0]["metrics"]["outside_psnr"] == 100
    assert "cost of method 'my_methods:dear': {'rows': '7'}; expected numbers" in errors["dear"]
    assert "trajectory of method 'my_methods:traced': Image; expected a string" in errors["traced"]
    assert errors["leaving"] == "SystemExit: 3"


def test_a_first_case_that_cannot_be_read_is_a_row(miniature_folder: Path, tmp_path: Path, monkeypatch) -> None:
    case = WorldSuite.case

    def broken(self: WorldSuite, id: str) -> Case:
        if id == "swap-0000":
            raise OSError("cannot identify image file")
        return case(self, id)

    monkeypatch.setattr(WorldSuite, "case", broken)
    rows = run.measure(settings_of(miniature_folder, tmp_path, "paste,lavis", count=2))
    assert [(row["method"], row["case"], "error" in row) for row in rows] == [
        ("paste", "swap-0000", True),
        ("lavis", "swap-0000", True),
        ("paste", "swap-0001", False),
        ("lavis", "swap-0001", False),
    ]
    assert "2 failed" in report.report(tmp_path)


def test_a_torn_line_is_dropped_and_its_case_run_again(miniature_folder: Path, tmp_path: Path) -> None:
    settings = settings_of(miniature_folder, tmp_path, "paste", count=3)
    whole = run.measure(settings)
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert len(read_rows(tmp_path)) == 2
    again = run.measure(settings)
    assert path.read_bytes().splitlines(keepends=True)[:2] == lines[:2] and len(read_rows(tmp_path)) == 3
    assert [row["case"] for row in again] == [row["case"] for row in whole]
    path.write_bytes(lines[0] + lines[0])
    with pytest.raises(RunError, match="line 2: a second row"):
        run.measure(settings)
    path.write_bytes(b"{}\n" + lines[0])
    with pytest.raises(RunError, match="line 1: no row"):
        run.measure(settings)


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(miniature_folder: Path, mine: Path) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:killed", count=4)
    process = multiprocessing.get_context("spawn").Process(target=run.measure, args=(settings,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = (mine / "out" / "rows.jsonl").read_bytes()
    assert [row["case"] for row in read_rows(mine / "out")] == ["swap-0000", "swap-0001"]
    (mine / "lives").touch()
    rows = run.measure(settings)
    assert [row["case"] for row in rows] == [f"swap-000{n}" for n in range(4)] and not any("error" in row for row in rows)
    after = (mine / "out" / "rows.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 4


def test_a_folder_that_cannot_be_a_runs_is_refused_before_a_model_is_loaded(
    miniature_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Editor, "from_pretrained", lambda *given: pytest.fail("no model is needed to refuse this"))
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(RunError, match=r"file is a file; expected a folder"):
            run.measure(settings_of(miniature_folder, out, "paste"))
    for device, message in (("cuda:99", "is not to be had here"), ("gpu", "is none")):
        with pytest.raises(ModelError, match=f"device '{device}' {message}"):
            run.measure(settings_of(miniature_folder, tmp_path / "out", "paste"), devices=("cpu", device))
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_rows_without_their_settings_are_not_added_to(tmp_path: Path) -> None:
    with RunFolder(tmp_path).opened({"steps": 50}, {}) as folder:
        folder.add({"method": "m", "case": "c"})
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"holds rows but no run.json"), RunFolder(tmp_path).opened({"steps": 3}, {}):
        pass
    assert not (tmp_path / "run.json").exists() and len(read_rows(tmp_path)) == 1


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RunFolder(tmp_path).opened({}, {}) as folder:
        with pytest.raises(RunError, match="in use"), RunFolder(tmp_path).opened({}, {}):
            pass
        folder.add({"method": "m", "case": "c"})
        with pytest.raises(RunError, match="there already"):
            folder.add({"method": "m", "case": "c"})
    with RunFolder(tmp_path).opened({}, {}) as folder:
        assert list(folder.rows) == [("m", "c")]


def test_what_needs_subjects_is_refused_for_a_model_without(tmp_path: Path) -> None:
    stable_diffusion_1().save_pretrained(tmp_path / "sd")
    settings = settings_of(tmp_path / "sd", tmp_path / "out", "lavis")
    with pytest.raises(ModelError, match="which method lavis needs"):
        run.measure(settings)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        (["--suite", "wrld"], "Did you mean 'world'"),
        (["--suite", "pie"], "--data FOLDER"),
        (["--suite", "world", "--methods", "ourss"], "Did you mean 'ours'"),
        (["--suite", "world", "--cases", "swop"], "has no cases"),
        (["--suite", "world", "--processes", "0"], "one or more each"),
    ):
        assert run.main([*options, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 1 and "no folder of a run" in capsys.readouterr().err


def test_file_names_stay_apart() -> None:
    names = ["ours", "ours[a=1]", "ours[a=2]", "m:f", "m_f", "ddim+p2p"]
    assert len({file_name(name) for name in names}) == len(names) and file_name("ddim+p2p") == "ddim+p2p"
