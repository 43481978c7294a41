"""Reports say all that the rows hold: means, intervals, paired differences, pictures, failures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import report
from benchmarks.report_page import sheet
from benchmarks.report_tables import FEWEST, grouped, leading, overview_of, sections, shared, standing, worst_first
from benchmarks.run_folder import read_rows, read_settings
from benchmarks.statistics import Mean
from benchmarks.world_suite import WorldSuite
from p2p_subject.errors import ArgumentError
from tests.benchmarking import Page, made_run

pytestmark = pytest.mark.usefixtures("own_threads")


def test_cases_of_one_subject_count_as_one() -> None:
    class BySubject(WorldSuite):
        @staticmethod
        def group(id: str) -> str:
            return id.split("-")[0]

    values = {"a-1": 1.0, "a-2": None, "a-3": 0.0, "b-1": 1.0, "c-1": None}
    assert grouped(values, BySubject) == {"a": 0.5, "b": 1.0, "c": None} and grouped(values, WorldSuite) == values
    ours, theirs = shared(values, {"a-1": 0.0, "a-2": 1.0, "b-1": None, "c-1": 1.0}, BySubject)
    assert ours == {"a": 1.0, "b": None, "c": None} and theirs == {"a": 0.0, "b": None, "c": None}


def test_tables_hold_mean_interval_n_and_paired_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report_tables.FEWEST", 5)
    rows = read_rows(made_run(tmp_path))
    (section,) = sections(rows, WorldSuite, ["good", "bad"], "good")
    (means, differences), rest = section.tables, section.rest
    cells = {line[0]: dict(zip(means.columns, line)) for line in means.lines}
    assert cells["good"]["edit achieved ↑"] == "1.000 (0.610 to 1.000; 6)" and cells["good"]["failed"] == "0"
    # The failed case counts as not achieved: 2 of 6. It has no PSNR, and what makes no masks has no IoU to fail in.
    assert cells["bad *"]["edit achieved ↑"].startswith("0.333 (") and cells["bad *"]["failed"] == "1"
    assert cells["bad *"]["PSNR outside, dB ↑"].startswith("22.00 (") and "5 of 6)" in cells["bad *"]["PSNR outside, dB ↑"]
    assert cells["bad *"]["mask IoU ↑"] == "- (0 of 6)" and cells["good"]["mask IoU ↑"].startswith("0.500")
    (line,) = differences.lines
    told = dict(zip(differences.columns, line))
    assert told["PSNR outside, dB ↑"] == "+10.00 (5 of 6) +"
    assert told["edit achieved ↑"].endswith("+") and told["work in rows ↓"].endswith("=") and told["mask IoU ↑"] == "- (0 of 6)"
    assert {c for t in (means, rest) for c in t.columns} > {"right look ↑", "peak memory, MiB ↓"}
    assert section.cases == 6


def test_few_cases_have_differences_and_no_verdict(tmp_path: Path) -> None:
    (section,) = sections(read_rows(made_run(tmp_path)), WorldSuite, ["good", "bad"], "good")
    assert "+10.00 (5 of 6)" in section.tables[1].lines[0]
    for count, verdict in ((FEWEST - 1, ""), (FEWEST, "+")):
        assert standing(Mean(1.0, 0.5, 1.5, count, count), WorldSuite.measures[0]) == verdict


def test_a_kind_that_the_leading_method_did_not_run_is_compared_all_the_same(tmp_path: Path) -> None:
    (section,) = sections(read_rows(made_run(tmp_path)), WorldSuite, ["other", "good", "bad"], "other")
    assert section.tables[1].title.startswith("good less the method") and section.tables[1].lines[0][0] == "bad *"


def test_methods_of_other_cases_are_compared_on_those_of_all(tmp_path: Path) -> None:
    rows = [row for row in read_rows(made_run(tmp_path)) if row["method"] == "good" or row["case"] < "swap-0002"]
    (section,) = sections(rows, WorldSuite, ["good", "bad"], "good")
    whole, alike, differences = section.tables
    assert alike.title == "the same over the 2 cases that every method has"
    values = {table.title: {line[0]: dict(zip(table.columns, line)) for line in table.lines} for table in (whole, alike)}
    assert values[whole.title]["good"]["PSNR outside, dB ↑"].startswith("32.50 (")
    assert values[alike.title]["good"]["PSNR outside, dB ↑"].startswith("30.50 (")
    assert values[alike.title]["bad *"] == values[whole.title]["bad *"]
    assert differences.title.startswith("good less") and section.rest.title == "the other measures"


def test_runs_of_more_than_one_kind_have_an_overview(tmp_path: Path) -> None:
    swaps = read_rows(made_run(tmp_path))
    assert overview_of(sections(swaps, WorldSuite, ["good", "bad"], "good"), WorldSuite, ["good", "bad"]) == []
    adds = [row | {"kind": "add", "case": row["case"].replace("swap", "add")} for row in swaps if row["method"] == "good"]
    adds = [row | {"metrics": row["metrics"] | {"success": 0.0, "outside_psnr": None}} for row in adds[:5]]
    found = sections(swaps + adds, WorldSuite, ["good", "bad", "absent"], "good")
    achieved, kept = overview_of(found, WorldSuite, ["good", "bad", "absent"])
    assert achieved.title.startswith("edit achieved ↑") and achieved.columns == ("method", "swap", "add")
    assert achieved.lines[0] == ("good", "1.000 (0.610 to 1.000; 6)", "0.000 (0.000 to 0.434; 5)")
    # What ran no additions has nothing to say of them; of a kind without values there is no column; the absent have no line.
    assert achieved.lines[1][0] == "bad *" and achieved.lines[1][2] == "" and len(achieved.lines) == 2
    assert kept.columns == ("method", "swap") and kept.lines[1][1].startswith("22.00 (") and "5 of 6)" in kept.lines[1][1]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swaps + adds))
    assert f"## Overview\n\n### {achieved.title}" in report.report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.count(achieved.title) == 1 and page.text.index("Overview") < page.text.index("swap (6 cases)")


def test_the_worst_cases_of_a_method_come_first(tmp_path: Path) -> None:
    (section,) = sections(read_rows(made_run(tmp_path)), WorldSuite, ["good", "bad"], "good")
    order = [int(case[-1]) for case in worst_first(section, WorldSuite, "bad")]
    # The one that failed, then those not achieved from the lowest PSNR on, then the rest.
    assert order == [5, 0, 2, 4, 1, 3]
    assert [int(case[-1]) for case in worst_first(section, WorldSuite, "good")] == list(range(6))
    # A method that ran none of these cases leads none of them, and nothing says that it does.
    assert leading(section.rows, "bad") == "bad" and leading(section.rows, "other") == "good"
    assert worst_first(section, WorldSuite, "other") == worst_first(section, WorldSuite, "good")


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    text = report.report(made_run(tmp_path), against="bad", shown=4)
    assert (tmp_path / "report.md").read_text() == text and "## swap (6 cases)" in text and "1 failed" in text
    assert "command: python -m x" in text
    brief = report.report(tmp_path, against="bad", shown=4, brief=True)
    assert "mask IoU" in brief and "### bad less the method" in brief and "SSIM outside" in text and "SSIM outside" not in brief
    assert (tmp_path / "report.md").read_text() == text
    html = (tmp_path / "report.html").read_text()
    found = Page(html)
    assert found.sources and all(source.startswith("data:image/") for source in found.sources)
    assert "http" not in html.lower().replace("<!doctype html>", "") and "script" not in found.tags and "link" not in found.tags
    # What comes from rows is shown as text, never as markup.
    assert "a <b>cat</b> on grass" in found.text and "ValueError: <oops>" in found.text
    assert found.text.count("swap-000") == 4 and found.text.index("swap-0005") < found.text.index("swap-0000")
    assert "swap-0003" not in found.text and "5 of 6)" in found.text
    assert Image.open(tmp_path / "plots" / "swap.png").width > 800
    assert Image.open(tmp_path / "sheets" / "swap.png").height > 6 * 112
    again = made_run(tmp_path / "again")
    report.report(again, against="bad", shown=4)
    assert (again / "report.html").read_text() == html


def test_a_method_has_its_column_on_the_sheet_where_it_has_no_picture(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    rows = read_rows(folder)
    (section,) = sections(rows, WorldSuite, ["good", "bad"], "good")
    whole = sheet(folder, WorldSuite, section, "good")
    kept = [row for row in rows if row["method"] == "bad" or row["case"] > "swap-0000"]
    (section,) = sections(kept, WorldSuite, ["good", "bad"], "bad")
    some = sheet(folder, WorldSuite, section, "bad")
    assert some.size == whole.size and not np.array_equal(some, whole)


def test_a_report_goes_without_pictures_that_are_gone(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    rows = read_rows(folder)
    rows[1]["pictures"]["source"] = rows[0]["pictures"]["source"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / rows[0]["pictures"]["source"]).unlink()
    (folder / "pictures" / "good-1-edited.png").unlink()
    assert "2 pictures are missing in the folder" in report.report(folder)
    assert Page((folder / "report.html").read_text()).text.count("missing in the folder") == 1


def test_a_report_of_real_rows_is_written(everything: Path) -> None:
    assert report.main([str(everything), "--shown", "1"]) == 0
    found = Page((everything / "report.html").read_text())
    assert "replace (1 cases)" in found.text and "null-text+p2p" in found.text and "paste *" in found.text
    assert sum(source.startswith("data:image/png") for source in found.sources) > 40


def test_a_report_names_a_method_that_is_not_there_and_mixed_code(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    with pytest.raises(ArgumentError, match="holds the methods good, bad"):
        report.report(folder, against="other")
    rows = read_rows(folder)
    rows[0]["code"] = "d"
    assert any("MIXED: 2" in line for line in report.facts(read_settings(folder), rows))
    for row, card in zip(rows, ("NVIDIA H100", "NVIDIA A100", None)):
        row["accelerator"] = card
    told = report.facts(read_settings(folder), rows[:2])
    assert "hardware: NVIDIA H100; NVIDIA A100 (MIXED: 2 in one run)" in told
    # A processor and a GPU; of a case that ended its process on a GPU the name is not known, and that is no other one.
    told = report.facts(read_settings(folder), [rows[1], {**rows[1], "device": "cuda:1"}, rows[2]])
    assert "hardware: NVIDIA A100; processor of here (MIXED: 2 in one run)" in told
    told = report.facts(read_settings(folder), [rows[1], {**rows[2], "device": "cuda:0"}])
    assert "hardware: NVIDIA A100" in told
