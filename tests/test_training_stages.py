"""The stages of training through the command line, from a folder of pictures or from the world to a model that loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from p2p_subject import Editor, Subject
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.training import __main__ as command
from p2p_subject.training import multimodal, stages, world

SHORT = ["--processes", "1", "--steps", "2", "--evaluate-every", "2", "--precision", "no"]


def call(*arguments: object) -> None:
    stages.run(command.parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture(autouse=True)
def few_sampling_steps(monkeypatch) -> None:
    """Two sampling steps for the grids."""
    sample = stages.grids.sample_batch
    few = lambda model, prompts, subjects, seeds, steps, scale: sample(model, prompts, subjects, seeds, 2, scale)  # noqa: E731
    monkeypatch.setattr(stages.grids, "sample_batch", few)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six scenes with captions and masks."""
    made = tmp_path_factory.mktemp("pictures")
    lines = []
    for index in range(6):
        scene = world.draw(world.sample("train", index))
        scene.picture.save(made / f"{index}.png")
        Image.fromarray(np.rint(scene.alpha * 255).astype(np.uint8)).save(made / f"{index}_mask.png")
        line = {"file_name": f"{index}.png", "text": scene.spec.caption(), "subject": scene.spec.look.category}
        lines.append(json.dumps(line | {"mask": f"{index}_mask.png"}))
    (made / "metadata.jsonl").write_text("\n".join(lines))
    return made


@pytest.mark.parametrize("template", ["released", "paper"])
def test_both_stages_from_a_folder_of_pictures_make_a_model(folder, miniature_folder, tmp_path, template: str) -> None:
    pytest.importorskip("pymatting")
    call("cutouts", folder, "--out", tmp_path / "cutouts")
    data = ["--data", folder, "--model", miniature_folder, *SHORT, "--batch", "4", "--threads", "2"]
    one = tmp_path / "one"
    call("multimodal", *data, "--validation", folder, "--text-length", "10", "--out", one)
    two = tmp_path / "two"
    extra = ["--cutouts", tmp_path / "cutouts", "--template", template, "--accumulate", "2", "--learning-rate", "1e-3"]
    call("representation", *data, *extra, "--start-from", one / "ema.safetensors", "--checkpointing", "--out", two)
    call("export", "--run", two, "--model", miniature_folder, "--out", tmp_path / "model")

    log = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()]
    assert {"validation recall", "validation matched", "validation told"} <= log[-1].keys()
    assert Image.open(two / "grid-000002.png").size == (6 * 64, 2 * 64)
    settings = json.loads((two / "settings.json").read_text())
    assert settings["template"] == template and settings["decay_from"] == 1.0 and settings["pictures"] == 6
    trained, before = load_file(two / "ema.safetensors"), BlipDiffusionPipeline.from_pretrained(miniature_folder)
    first = load_file(one / "ema.safetensors")
    for part, moved in {"unet": True, "text_encoder": True, "qformer.visual_encoder": False}.items():
        weights = before.components[part.split(".")[0]].state_dict()
        names = [name for name in trained if name.startswith(part) and trained[name].is_floating_point()]
        changed = [name for name in names if not torch.equal(trained[name], weights[name.split(".", 1)[1]])]
        assert bool(changed) == moved, part
    queries = trained["qformer.query_tokens"]
    assert torch.allclose(queries, first["qformer.query_tokens"], atol=0.01)
    assert not torch.allclose(queries, before.qformer.query_tokens, atol=0.01)
    editor = Editor.from_pretrained(tmp_path / "model")
    subject = Subject(folder / "0.png", "dog")
    assert editor.generate("a dog on grass", subject=subject, seed=0, steps=2).image.size == (64, 64)


def test_the_miniatures_stages_and_its_controlnet_from_scenes(miniature_folder, tmp_path) -> None:
    call("scenes", "--vae", miniature_folder / "vae", "--count", "12", "--processes", "1", "--out", tmp_path / "scenes")
    scenes = ["--scenes", tmp_path / "scenes", *SHORT, "--batch", "4"]
    run = tmp_path / "run"
    call("representation", *scenes, "--vae", miniature_folder / "vae", "--attention-weight", "0.03", "--out", run)
    call("export", "--run", run, "--vae", miniature_folder / "vae", "--out", tmp_path / "model")
    assert (run / "grid-000002.png").is_file() and Editor.from_pretrained(tmp_path / "model").model.guidance_scale == 3.0

    edges = tmp_path / "edges"
    call("structure", *scenes, "--model", miniature_folder, "--out", edges)
    call("export", "--run", edges, "--structure", miniature_folder, "--out", tmp_path / "controlnet")
    assert "_name_or_path" not in json.loads((tmp_path / "controlnet" / "config.json").read_text())
    editor = Editor.from_pretrained(miniature_folder, controlnet=tmp_path / "controlnet")
    drawn = editor.generate("a dog", control=Image.new("RGB", (64, 64)), seed=0, steps=2)
    assert drawn.structure is not None
    moved = load_file(edges / "ema.safetensors")["controlnet.controlnet_cond_embedding.conv_in.weight"]
    assert moved.isfinite().all() and not any(key.startswith("frozen") for key in load_file(edges / "ema.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["representation", "--out", "x"], "give --scenes"),
        (["representation", "--out", "x", "--data", "a", "--scenes", "b"], "give --scenes"),
        (["representation", "--out", "x", "--data", "a"], "--data was given without --cutouts"),
        (["representation", "--out", "x", "--scenes", "a"], "--scenes was given without --vae"),
        (["multimodal", "--out", "x", "--batch", "5", "--processes", "2"], "a batch of 5 cannot be shared by 2 processes"),
        (["cutouts", "no/such/folder", "--out", "x"], "no/such/folder"),
    ],
)
def test_arguments_that_do_not_fit_are_said_in_a_line(monkeypatch, tmp_path, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "environment", "expected"),
    [([], {}, 2), (["--device", "cuda"], {}, 1), ([], {"WORLD_SIZE": "4"}, 1), (["--processes", "4"], {}, 4)],
)
def test_processes_are_started_where_nobody_else_does(monkeypatch, told, environment, expected: int) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = command.parser().parse_args(["multimodal", "--out", "x", *told])
    assert stages._config(arguments).processes == expected


def test_stage_one_is_measured_on_splits_that_it_is_not_trained_on() -> None:
    assert set(multimodal.world_pairs(None)) == {"validation", "new_art"}
