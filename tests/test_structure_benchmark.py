"""The benchmarks of structure control and of the ablations: what they measure, and that they run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ablation, structure
from p2p_subject.training import scenes


@given(data=st.data())
def test_edges_are_compared_within_a_pixel(data) -> None:
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=64, max_size=64))).reshape(8, 8)
    assert structure.edge_f1(wanted, wanted) == 1
    moved = np.zeros_like(wanted)
    moved[1:] = wanted[:-1]
    if wanted[:-1].any() and not wanted[-1].any():
        assert structure.edge_f1(moved, wanted) == 1
    other = np.array(data.draw(st.lists(st.booleans(), min_size=64, max_size=64))).reshape(8, 8)
    found = structure.edge_f1(other, wanted)
    assert found == pytest.approx(structure.edge_f1(wanted, other)) and 0 <= found <= 1


def test_edges_far_apart_have_nothing_in_common() -> None:
    one, other = np.zeros((2, 9, 9), bool)
    one[:, 1] = other[:, 7] = True
    assert structure.edge_f1(one, other) == 0
    assert structure.edge_f1(one, np.zeros_like(one)) == 0
    half = one.copy()
    half[:3] = False
    # All that is found is right, and two thirds of what was wanted, with the one pixel at the break, are found.
    assert structure.edge_f1(half, one) == pytest.approx(2 * 7 / 9 / (1 + 7 / 9))
    with pytest.raises(ValueError, match="expected bool of one shape"):
        structure.edge_f1(one, one[:3])


def test_structure_control_is_measured_and_drawn(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--count", "1", "--steps", "2", "--out", str(tmp_path)])
    structure.main()
    report = json.loads((tmp_path / "structure.json").read_text())
    assert {"control edges", "no control edges", "style both", "vae edges"} <= report["rows"][0].keys()
    assert "| control edges |" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()


def test_the_ablations_run_resume_and_refuse_other_settings(miniature_folder, tmp_path, monkeypatch, capsys) -> None:
    scenes.make_cache(tmp_path / "scenes", miniature_folder / "vae", 8)
    monkeypatch.setattr(ablation, "VARIANTS", {name: (False, replace(own)) for name, (_, own) in ablation.VARIANTS.items()})
    given = ["--scenes", tmp_path / "scenes", "--stage-one", "none", "--out", tmp_path / "out", "--processes", "1"]
    given += ["--variants", "full", "no subject text", "--steps", "1", "--batch", "4", "--count", "2", "--sampling-steps", "2"]
    trainings, train = [], ablation.train
    spy = lambda config, *rest, **more: trainings.append(config) or train(config, *rest, **more)  # noqa: E731
    monkeypatch.setattr(ablation, "train", spy)
    tables = []
    for seeds in (2, 2, 1):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, given), "--seeds", str(seeds)])
        ablation.main()
        tables.append(capsys.readouterr().out.splitlines()[-4:])
    assert len(trainings) == 4 and tables[0] == tables[1]
    assert [config.seed for config in trainings] == [0, 0, 1, 1]
    assert tables[0][-1].startswith("| no subject text |") and tables[0][-2].startswith("| full |")
    assert "n = 4 each" in tables[0][0] and "n = 2 each" in tables[2][0]
    assert (tmp_path / "out" / "full_seed1" / "new_art.png").is_file()
    monkeypatch.setattr(sys, "argv", ["x", *map(str, given[:-1]), "3"])
    with pytest.raises(SystemExit, match="holds figures of other settings"):
        ablation.main()


def test_a_table_of_ablations_gives_differences_over_the_same_pictures() -> None:
    verdicts = {key: [True] * 6 + [False] * 2 for key in ablation.COLUMNS.values()}
    worse = {key: [True] * 2 + [False] * 6 for key in verdicts}
    lines = ablation.table({"full": verdicts, "other": worse, "same": verdicts | {}}).splitlines()
    assert lines[2].startswith("| full | 0.75 (0.") and lines[3].startswith("| other | 0.25 (-0.")
    assert "0.75 (+0.00 to +0.00)" in lines[4]
