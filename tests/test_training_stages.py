"""The stages of training through the command line, from a folder of pictures or from the world to a model that loads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPVisionModel

from p2p_subject import Editor, Subject
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.errors import ArgumentError, ModelError
from p2p_subject.training import __main__ as command
from p2p_subject.training import multimodal, scenes, stages, world
from p2p_subject.training.representation import Shares
from p2p_subject.training.tokenizers import save_word_piece_tokenizer
from tests.tiny_pipelines import stable_diffusion_1, stable_diffusion_xl

SHORT = ["--processes", "1", "--steps", "2", "--evaluate-every", "2", "--precision", "no"]


def call(*arguments: object) -> None:
    stages.run(command.parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture(autouse=True)
def few_sampling_steps(monkeypatch) -> None:
    """Two sampling steps for the grids."""
    sample = stages.drawing.sample_contexts
    few = lambda model, contexts, seeds, steps, scale: sample(model, contexts, seeds, 2, scale)  # noqa: E731
    monkeypatch.setattr(stages.drawing, "sample_contexts", few)


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
    told = pytest.warns(UserWarning, match="the pipelines insert") if template == "paper" else nullcontext()
    with told:
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
        (["multimodal", "--out", "x", "--batch", "1", "--processes", "1"], "a picture is told from those of other captions"),
        (["vae", "--out", "x", "--processes", "1", "--betas", "0.9", "1.5"], "betas=(0.9, 1.5); expected two numbers"),
        (["vae", "--out", "x", "--processes", "1", "--batch", "3", "--warmup", "-1"], "warmup must be 0 or more, got -1"),
        (["vae", "--out", "x", "--processes", "1", "--batch", "3", "--weight-decay", "-1"], "weight_decay must be 0 or more"),
        (["vae", "--out", "x", "--processes", "1", "--batch", "3", "--learning-rate", "0"], "learning_rate must be above 0"),
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


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (["multimodal"], {"steps": 1200, "learning_rate": 1e-3, "warmup": 200, "betas": (0.9, 0.99), "weight_decay": 0.01}),
        (["multimodal", "--data", "x"], {"steps": 250_000, "learning_rate": 1e-4, "warmup": 2000, "weight_decay": 0.05}),
        (["multimodal", "--data", "x", "--warmup", "5", "--betas", "0.8", "0.9"], {"warmup": 5, "betas": [0.8, 0.9]}),
        (["representation", "--data", "x"], {"learning_rate": 2e-6, "warmup": 0, "decay_from": 1.0, "betas": (0.9, 0.999)}),
        (["multimodal", "--data", "x", "--steps", "1000"], {"warmup": 100}),
        (["representation"], {"steps": 8000, "warmup": 200, "decay_from": 0.4}),
    ],
)
def test_pictures_are_trained_on_as_was_published(told, expected: dict) -> None:
    config = stages._config(command.parser().parse_args([*told, "--out", "x", "--processes", "1"]))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("changed", [["--batch", "4"], ["--text-length", "9"]])
def test_a_run_does_not_go_on_with_other_data(folder, miniature_folder, tmp_path, changed: list[str]) -> None:
    told = ["multimodal", "--data", folder, "--model", miniature_folder, "--batch", "2", "--text-length", "10"]
    told += ["--processes", "1", "--precision", "no", "--evaluate-every", "0", "--out", tmp_path / "run"]
    call(*told, "--steps", "1")
    with pytest.raises(ArgumentError, match="holds a run of other settings"):
        call(*told, "--steps", "2", *changed)
    call(*told, "--steps", "2", "--threads", "1", "--model", os.path.relpath(miniature_folder))
    # What is not on record may have been anything.
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"seed": settings["seed"]}))
    with pytest.raises(ArgumentError, match="batch None, now 2"):
        call(*told, "--steps", "3")


def test_stage_one_is_measured_on_splits_that_it_is_not_trained_on() -> None:
    assert set(multimodal.world_pairs(None)) == {"validation", "new_art"}


@pytest.fixture(scope="module")
def public_parts(tmp_path_factory) -> dict[str, Path]:
    """A Stable Diffusion 1.5, a CLIP and a BERT of a few thousand weights, in folders as the public ones are."""
    made = tmp_path_factory.mktemp("parts")
    parts = {name: made / name for name in ("stable-diffusion", "image-encoder", "bert")}
    stable_diffusion_1().save_pretrained(parts["stable-diffusion"])
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 50}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for weight in clip.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    clip.save_pretrained(parts["image-encoder"])
    save_word_piece_tokenizer(parts["bert"])
    words = len((parts["bert"] / "vocab.txt").read_text().splitlines())
    bert = BertConfig(vocab_size=words, num_hidden_layers=2, max_position_embeddings=32, **sizes)
    BertModel(bert).save_pretrained(parts["bert"])
    return parts


def assemble(parts: dict[str, Path], out: Path, *more: object) -> None:
    call("assemble", *(word for name, path in parts.items() for word in (f"--{name}", path)), "--out", out, *more)


def test_a_model_of_public_parts_is_assembled_trained_and_used(public_parts, folder, tmp_path) -> None:
    pytest.importorskip("pymatting")
    model = tmp_path / "model"
    assemble(public_parts, model, "--queries", "3")
    made = BlipDiffusionPipeline.from_pretrained(model)
    assert made.qformer.config.num_query_tokens == 3 and made.qformer.config.output_size == 24
    given = StableDiffusionPipeline.from_pretrained(public_parts["stable-diffusion"], safety_checker=None)
    for name in ("unet", "vae"):
        own, theirs = made.components[name].state_dict(), given.components[name].state_dict()
        assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    config = made.qformer.config.qformer_config
    # Every layer reads the picture, as in the public checkpoint.
    assert config.cross_attention_frequency == 1 and config.vocab_size == len(made.qformer_tokenizer)
    bert = BertModel.from_pretrained(public_parts["bert"])
    own, theirs = made.qformer.encoder.layer, bert.encoder.layer
    assert torch.equal(own[1].attention.attention.query.weight, theirs[1].attention.self.query.weight)
    assert torch.equal(own[0].intermediate_query.dense.weight, theirs[0].intermediate.dense.weight)
    ids = made.tokenizer("a dog on grass", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(made.text_encoder(ids), given.text_encoder(ids)[0], atol=1e-5)

    call("cutouts", folder, "--out", tmp_path / "cutouts")
    data = ["--data", folder, "--model", model, *SHORT, "--batch", "4", "--threads", "2"]
    call("multimodal", *data, "--bert", public_parts["bert"], "--text-length", "10", "--out", tmp_path / "one")
    start = ["--start-from", tmp_path / "one" / "ema.safetensors"]
    call("representation", *data, *start, "--cutouts", tmp_path / "cutouts", "--out", tmp_path / "two")
    call("export", "--run", tmp_path / "two", "--model", model, "--out", tmp_path / "trained")
    editor = Editor.from_pretrained(tmp_path / "trained")
    made = editor.generate("a dog on grass", subject=Subject(folder / "0.png", "dog"), seed=0, steps=2)
    assert made.image.size == (16, 16)


@pytest.mark.parametrize("left_out", [0, 1])
def test_the_image_encoder_is_that_of_clip(public_parts, tmp_path, left_out: int) -> None:
    """Up to the layers that are left out; then a norm of all patches."""
    assemble(public_parts, tmp_path / "model", "--left-out", left_out)
    encoder = BlipDiffusionPipeline.from_pretrained(tmp_path / "model").qformer.visual_encoder
    clip = CLIPVisionModel.from_pretrained(public_parts["image-encoder"]).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = clip(pixels, output_hidden_states=True).hidden_states[-1 - left_out]
        assert torch.allclose(encoder(pixels), torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]), atol=1e-5)


def test_half_precision_and_own_normalisation_are_read(public_parts, tmp_path) -> None:
    half, clip = tmp_path / "half", tmp_path / "clip"
    stable_diffusion_1().to(torch.float16).save_pretrained(half, variant="fp16")
    shutil.copytree(public_parts["image-encoder"], clip)
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "crop_size": 32}
    (clip / "preprocessor_config.json").write_text(json.dumps(told))
    parts = public_parts | {"stable-diffusion": half, "image-encoder": clip}
    assemble(parts, tmp_path / "model", "--variant", "fp16")
    made = BlipDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert {part.dtype for part in (made.unet, made.text_encoder, made.vae)} == {torch.float32}
    assert made.image_processor.config["image_mean"] == [0.1, 0.2, 0.3] and made.image_processor.output_size == (32, 32)


def without(folder: Path, name: str, copy: Path) -> Path:
    """A copy of a folder without one of its files."""
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    return copy


def test_parts_that_make_no_model_are_refused(public_parts, tmp_path, monkeypatch) -> None:
    """Before any weights are read."""

    def refused(message: str, *more: object, error: type = ModelError, **changed: Path) -> None:
        with pytest.raises(error, match=message):
            assemble(public_parts | {name.replace("_", "-"): path for name, path in changed.items()}, tmp_path / "model", *more)
        assert not (tmp_path / "model").exists()

    bert, clip = public_parts["bert"], public_parts["image-encoder"]
    for name in ("load_component", "_load_clip", "start_from_bert"):
        monkeypatch.setattr(stages.assembling, name, None)
    refused("left_out=3; expected 0 to 2 of the image encoder's 3 layers", "--left-out", 3, error=ArgumentError)
    refused("queries=0", "--queries", 0, error=ArgumentError)
    refused("queries=40; a prompt of 24 tokens", "--queries", 40, error=ArgumentError)
    (tmp_path / "config").mkdir()
    shutil.copytree(bert, tmp_path / "config", dirs_exist_ok=True)
    (tmp_path / "config" / "config.json").write_text('{"hidden_size": 32}')
    refused("config.json has no intermediate_size, num_attention_heads", bert=tmp_path / "config")
    refused("has no vocab.txt", bert=clip)
    refused("bert='bert-base-uncased' is no folder", bert=Path("bert-base-uncased"))
    refused("has no weights: expected model.safetensors", bert=without(bert, "model.safetensors", tmp_path / "weightless"))
    refused("holds a 'bert'; expected a CLIP", image_encoder=bert)
    stable_diffusion_xl().save_pretrained(tmp_path / "xl")
    refused("has two text encoders", stable_diffusion=tmp_path / "xl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    with pytest.raises(ArgumentError, match="is there already"):
        assemble(public_parts, tmp_path / "model")


def test_damaged_parts_are_named(public_parts, tmp_path) -> None:
    for name, part in (("bert", "bert"), ("image-encoder", "image-encoder")):
        shutil.copytree(public_parts[part], tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(ModelError, match=name):
            assemble(public_parts | {name: tmp_path / name}, tmp_path / "model")


def test_an_image_generator_is_trained_without_subjects(miniature_folder, tmp_path) -> None:
    """What the ablations begin with: no row has a subject, and what makes subjects gets no gradient."""
    scenes.make_cache(tmp_path / "scenes", miniature_folder / "vae", 8)
    given = ["--scenes", tmp_path / "scenes", "--vae", miniature_folder / "vae", "--captions-only", *SHORT, "--batch", "4"]
    call("representation", *given, "--start-from", miniature_folder, "--out", tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "settings.json").read_text())
    shares = Shares(**settings["learning"]["shares"])
    assert all(shares.split(count)[0] == 0 for count in (1, 3, 32, 64) for _ in range(50))
    trained = load_file(tmp_path / "base" / "checkpoint.safetensors")
    before = BlipDiffusionPipeline.from_pretrained(miniature_folder)
    for name, weight in before.qformer.state_dict().items():
        assert torch.equal(trained[f"model.qformer.{name}"], weight), name
    weight = "conv_in.weight"
    assert not torch.allclose(trained[f"model.unet.{weight}"], before.unet.state_dict()[weight], rtol=1e-4, atol=0)
    with pytest.raises(ArgumentError, match="--captions-only trains without subjects"):
        call("representation", *given, "--no-subject-drop", "--out", tmp_path / "other")
