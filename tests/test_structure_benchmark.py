"""The benchmarks of structure control and of the ablations: what they measure, and that they run."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks import ablation, structure
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.training import multimodal, scenes


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


@pytest.fixture
def ablate(miniature_folder, tmp_path, monkeypatch, capsys):
    """Runs two ablations on eight scenes, with more options; the last lines printed and the trainings that there were."""
    scenes.make_cache(tmp_path / "scenes", miniature_folder / "vae", 8)
    pipeline = BlipDiffusionPipeline.from_pretrained(miniature_folder)
    torch.manual_seed(1)
    one = multimodal.fresh(pipeline.qformer, pipeline.qformer_tokenizer)
    save_file(one.state_dict(), tmp_path / "one.safetensors")
    given = ["--scenes", tmp_path / "scenes", "--stage-one", tmp_path / "one.safetensors", "--out", tmp_path / "out"]
    given += ["--processes", "1", "--variants", "full", "no stage one", "--batch", "4", "--count", "2", "--sampling-steps", "2"]
    train = ablation.train

    def run(*more: object):
        trainings = []

        def spy(config, build, *rest, **said):
            trainings.append((config, build()))
            return train(config, build, *rest, **said)

        monkeypatch.setattr(ablation, "train", spy)
        monkeypatch.setattr(sys, "argv", ["x", *map(str, [*given, *more])])
        ablation.main()
        return capsys.readouterr().out.splitlines()[-4:], trainings

    return run


def test_the_ablations_run_and_resume(ablate, tmp_path) -> None:
    first, trainings = ablate("--steps", "1", "--seeds", "2")
    again, none = ablate("--steps", "1", "--seeds", "2")
    fewer, _ = ablate("--steps", "1")
    assert first == again and not none and [config.seed for config, _ in trainings] == [0, 0, 1, 1]
    assert first[-2].startswith("| full |") and first[-1].startswith("| no stage one |")
    assert "2 pictures x 2 trainings" in first[0] and "2 pictures x 1 training)" in fewer[0]
    assert (tmp_path / "out" / "full_seed1" / "new_art.png").is_file()


def test_ablations_begin_with_the_base_and_with_stage_one(ablate, miniature_folder, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(miniature_folder, base)
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    unet["conv_in.bias"] = unet["conv_in.bias"] + 1
    save_file(unet, base / "unet" / "diffusion_pytorch_model.safetensors")
    _, trainings = ablate("--steps", "1", "--base", base)
    one = load_file(tmp_path / "one.safetensors")["qformer.query_tokens"]
    (full, without) = [trainer for _, trainer in trainings]
    for trainer in (full, without):
        assert torch.allclose(trainer.unet.conv_in.bias, unet["conv_in.bias"].float())
    assert torch.equal(full.qformer.query_tokens, one) and not torch.equal(without.qformer.query_tokens, one)


@pytest.mark.parametrize("changed", [("--count", "3"), ("--steps", "1"), ("--batch", "2"), ("--base", "other")])
def test_ablations_of_other_settings_are_refused_before_any_training(ablate, tmp_path, monkeypatch, changed, capsys) -> None:
    """Even where a killed run has measured nothing yet."""

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        ablate("--steps", "2")
    save_file({"unet.x": torch.zeros(1)}, tmp_path / "other")
    if changed[0] == "--base":
        changed = ("--base", tmp_path / "other")
    monkeypatch.setattr(ablation, "trained", killed)
    with pytest.raises(SystemExit):
        ablate("--steps", "2", *changed)
    assert "is of other settings" in capsys.readouterr().err


def test_a_table_of_ablations_gives_differences_over_the_same_pictures() -> None:
    verdicts = {key: [True] * 6 + [False] * 2 for key in ablation.COLUMNS.values()}
    worse = {key: [True] * 2 + [False] * 6 for key in verdicts}
    lines = ablation.table({"full": [verdicts], "other": [worse], "same": [dict(verdicts)]}).splitlines()
    assert "(8 pictures x 1 training)" in lines[0]
    assert lines[2].startswith("| full | 0.75 (0.") and lines[3].startswith("| other | 0.25; -0.50 (-0.")
    assert "0.75; +0.00 (+0.00 to +0.00)" in lines[4]
    # Trainings on the same pictures are not more pictures.
    thrice = ablation.table({"full": [verdicts] * 3, "other": [worse] * 3}).splitlines()
    assert thrice[2:] == lines[2:4]
