"""The pictures and curves of what the paper shows."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import paper
from benchmarks.judge import Judge
from p2p_subject import Editor
from p2p_subject.errors import ArgumentError


def test_a_log_that_was_gone_on_with_is_read_once(tmp_path) -> None:
    """Steps that were run again after a kill count as they were run last; figures of a step may lie in two rows."""
    rows = [{"step": 50, "loss": 3.0}, {"step": 100, "loss": 2.0}, {"step": 50, "loss": 2.5}, {"step": 50, "recall": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert paper.read_log(tmp_path) == [{"step": 50, "loss": 2.5, "recall": 0.5}, {"step": 100, "loss": 2.0}]
    with pytest.raises(ArgumentError, match="holds no log.jsonl"):
        paper.read_log(tmp_path / "other")


def test_a_folder_without_a_log_is_said_before_anything_is_drawn(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        paper.main(["--out", str(tmp_path / "out"), "--curves", f"one={tmp_path}"])
    assert stopped.value.code == 2 and "holds no log.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_curves_are_drawn_of_losses_and_shares(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 50, "denoising": 0.2, "validation recall": 0.5}) + "\n")
    log = paper.read_log(tmp_path)
    paper.curves({"one": log, "two": log}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 800
    above, below = paper.drawn_curves({"one": log}).axes
    assert [[line.get_label() for line in axes.lines] for axes in (above, below)] == [["denoising"], ["validation recall"]]


def test_every_sheet_has_its_rows(monkeypatch) -> None:
    monkeypatch.setattr(paper, "STEPS", 2)
    monkeypatch.setattr(paper, "ROWS", 2)
    plain, shaped = Editor.from_pretrained(), Editor.from_pretrained(controlnet="edges")
    sheets = [paper.generation(plain), paper.style(shaped), paper.interpolation(plain), paper.control(shaped, plain)]
    assert [len(rows) for rows in sheets] == [2, 3, 2, 2]
    assert [{len(row) for row in rows} for rows in sheets] == [{7}, {4}, {7}, {6}]
    told = paper.positions(plain, Judge.load(), 1).splitlines()
    assert len(told) == 2 + len(paper.WAY)
