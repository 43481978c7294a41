"""Saving and loading: the official layout, bit for bit; every defect of a folder is named."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from blip_tiny import MULTIMODAL, picture, seeded, tiny_pipeline, word_pieces
from conftest import golden
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p2p_subject.blip_diffusion import Blip2QFormerModel, BlipDiffusionPipeline
from p2p_subject.blip_diffusion.word_pieces import load_prompt_tokenizer, load_word_pieces, save_word_pieces
from p2p_subject.errors import ModelError, OutputError

NETWORKS = {
    "text_encoder": "model.safetensors",
    "qformer": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of the saved model for a test to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def generate(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("sea", picture(0), "red panda", "dog", num_inference_steps=3, output_type="pt", generator=seeded()).images


def change_weights(folder, component, change):
    path = folder / component / NETWORKS[component]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Round trips


def test_a_saved_model_is_the_same_model(pipeline, saved):
    loaded = BlipDiffusionPipeline.from_pretrained(saved)
    for name in NETWORKS:
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not getattr(loaded, name).training
    assert torch.equal(generate(loaded), generate(pipeline))


def test_saving_over_the_folder_a_model_came_from_keeps_it(broken):
    loaded = BlipDiffusionPipeline.from_pretrained(broken)
    expected = generate(loaded)
    loaded.save_pretrained(broken)
    assert torch.equal(generate(loaded), expected)
    assert torch.equal(generate(BlipDiffusionPipeline.from_pretrained(broken)), expected)


def test_a_model_that_cannot_be_written_leaves_no_parts(pipeline, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("No space left")

    monkeypatch.setattr("p2p_subject.blip_diffusion.weights.save_file", full)
    with pytest.raises(OutputError, match="model.safetensors.*No space left"):
        pipeline.qformer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_official_layout_comes_back_unchanged(tmp_path):
    source = golden("blip_diffusion/checkpoint/unet").parent
    words = golden("blip_diffusion/qformer_tokenizer")
    BlipDiffusionPipeline.from_pretrained(source, qformer_tokenizer=words).save_pretrained(tmp_path)
    for path in source.rglob("*"):
        copy = tmp_path / path.relative_to(source)
        if path.suffix == ".safetensors":
            before, after = load_file(path), load_file(copy)
            assert before.keys() == after.keys(), path
            assert all(torch.equal(before[key], after[key]) for key in before), path
        elif path.name in {"config.json", "model_index.json", "preprocessor_config.json"}:
            before, after = json.loads(path.read_text()), json.loads(copy.read_text())
            for content in (before, after):
                content.pop("_diffusers_version", None)
            # Newer releases of diffusers write further keys, all with their defaults.
            assert before == {key: after[key] for key in before}, path
            if path.parent.name not in {"unet", "vae"}:
                assert before == after, path
        elif path.is_file() and path.parent.name == "tokenizer" and path.name in {"vocab.json", "merges.txt"}:
            assert copy.is_file()
    assert (tmp_path / "qformer_tokenizer" / "vocab.txt").read_text() == (words / "vocab.txt").read_text()


def test_the_library_names_of_the_official_index_are_written(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "BlipDiffusionPipeline"
    assert index["qformer"] == ["blip_diffusion", "Blip2QFormerModel"]
    assert index["text_encoder"] == ["blip_diffusion", "ContextCLIPTextModel"]
    assert index["image_processor"] == ["blip_diffusion", "BlipImageProcessor"]
    assert "qformer_tokenizer" not in index


def test_settings_of_the_index_are_kept(pipeline, tmp_path):
    changed = BlipDiffusionPipeline(**pipeline.components, ctx_begin_pos=3, mean=[0.5] * 3, std=[0.5] * 3)
    changed.save_pretrained(tmp_path)
    loaded = BlipDiffusionPipeline.from_pretrained(tmp_path)
    assert (loaded.config.ctx_begin_pos, loaded.config.mean, loaded.config.std) == (3, [0.5] * 3, [0.5] * 3)
    assert torch.equal(generate(loaded), generate(changed))
    assert not torch.equal(generate(loaded), generate(pipeline))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_float_type_asked_for_is_that_of_every_network(saved, dtype):
    loaded = BlipDiffusionPipeline.from_pretrained(saved, torch_dtype=dtype)
    assert {getattr(loaded, name).dtype for name in NETWORKS} == {dtype}
    assert BlipDiffusionPipeline.from_pretrained(saved, dtype=dtype).dtype == dtype


def test_variants_are_written_and_read_by_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "qformer" / "model.fp16.safetensors").is_file()
    assert torch.equal(generate(BlipDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")), generate(pipeline))
    with pytest.raises(ModelError, match=r"has model\.fp16\.safetensors: pass the matching variant"):
        BlipDiffusionPipeline.from_pretrained(tmp_path)


def test_components_can_be_replaced(saved, broken):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    shutil.rmtree(broken / "scheduler")
    assert BlipDiffusionPipeline.from_pretrained(broken, scheduler=scheduler).scheduler is scheduler
    with pytest.raises(ModelError, match="'schedular'.* Did you mean 'scheduler'"):
        BlipDiffusionPipeline.from_pretrained(saved, schedular=scheduler)


def test_a_network_loads_from_the_shards_an_index_names(tmp_path):
    network = Blip2QFormerModel(MULTIMODAL)
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = Blip2QFormerModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


# Word pieces


def test_word_pieces_lower_case_and_know_the_start_token(tmp_path):
    words = word_pieces(tmp_path)
    assert words("A Red PANDA").input_ids == words("a red panda").input_ids
    assert words.bos_token == "[DEC]" and words.bos_token_id == len(words) - 1
    save_word_pieces(words, tmp_path / "again")
    again = load_word_pieces(tmp_path / "again")
    assert again.get_vocab() == words.get_vocab()


def test_word_pieces_are_taken_from_where_the_caller_says(broken, tmp_path):
    shutil.move(broken / "qformer_tokenizer", tmp_path / "elsewhere")
    loaded = BlipDiffusionPipeline.from_pretrained(broken, qformer_tokenizer=tmp_path / "elsewhere")
    again = BlipDiffusionPipeline.from_pretrained(broken, qformer_tokenizer=loaded.qformer_tokenizer)
    assert torch.equal(generate(loaded), generate(again))


def test_missing_word_pieces_are_reported_with_the_way_to_pass_them(broken, tmp_path):
    shutil.rmtree(broken / "qformer_tokenizer")
    with pytest.raises(ModelError, match=r"'bert-base-uncased'.*qformer_tokenizer="):
        BlipDiffusionPipeline.from_pretrained(broken, local_files_only=True, cache_dir=tmp_path / "empty")
    with pytest.raises(ModelError, match=r"no vocab\.txt.*qformer_tokenizer="):
        BlipDiffusionPipeline.from_pretrained(broken, qformer_tokenizer=tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("text_encoder", "text_model.final_layer_norm.weight"),
        ("qformer", "query_tokens"),
        ("unet", "conv_in.weight"),
        ("vae", "decoder.conv_out.bias"),
    ],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [None, False])
class TestWeights:
    def test_a_missing_weight_is_refused_by_name(self, broken, component, weight, low_cpu_mem_usage):
        change_weights(broken, component, lambda tensors: tensors.pop(weight))
        with pytest.raises(ModelError, match=f"{component}.*missing: {weight}"):
            BlipDiffusionPipeline.from_pretrained(broken, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_a_misshapen_weight_is_refused_by_name(self, broken, component, weight, low_cpu_mem_usage):
        change_weights(broken, component, lambda tensors: tensors.update({weight: torch.zeros(7)}))
        with pytest.raises(ModelError, match=rf"(?s){component}.*{weight}.*7"):
            BlipDiffusionPipeline.from_pretrained(broken, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_an_unknown_weight_is_refused_by_name(self, broken, component, weight, low_cpu_mem_usage):
        change_weights(broken, component, lambda tensors: tensors.update({"surplus": torch.zeros(7)}))
        with pytest.raises(ModelError, match=f"{component}.*unknown to the network: surplus"):
            BlipDiffusionPipeline.from_pretrained(broken, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("component", NETWORKS)
def test_pickled_weights_are_refused_and_never_opened(broken, component):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)

    path = broken / component / NETWORKS[component]
    path.unlink()
    name = "pytorch_model.bin" if path.name.startswith("model") else "diffusion_pytorch_model.bin"
    (path.parent / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match=f"{component}.*pickled weights \\({name}\\)"):
        BlipDiffusionPipeline.from_pretrained(broken)


@pytest.mark.parametrize("component", NETWORKS)
def test_damaged_and_absent_weights_are_refused(broken, component):
    path = broken / component / NETWORKS[component]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=component):
        BlipDiffusionPipeline.from_pretrained(broken)
    path.unlink()
    with pytest.raises(ModelError, match=f"{component} has no weights: expected {path.name}"):
        BlipDiffusionPipeline.from_pretrained(broken)


def test_position_counters_may_be_there_or_not(broken, pipeline):
    change_weights(broken, "text_encoder", lambda tensors: tensors.pop("text_model.embeddings.position_ids"))
    change_weights(broken, "qformer", lambda tensors: tensors.pop("embeddings.position_ids"))
    assert torch.equal(generate(BlipDiffusionPipeline.from_pretrained(broken)), generate(pipeline))


def test_pickles_cannot_be_asked_for(saved, pipeline, tmp_path):
    with pytest.raises(ModelError, match="use_safetensors"):
        BlipDiffusionPipeline.from_pretrained(saved, use_safetensors=False)
    with pytest.raises(ModelError, match="safe_serialization"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)


def test_pickled_weights_are_converted_as_the_readme_says(broken, pipeline, monkeypatch):
    for part, name in NETWORKS.items():
        path = broken / part / name
        weights = {key: weight.t().clone().t() if weight.ndim == 2 else weight for key, weight in load_file(path).items()}
        torch.save(weights, path.with_name("pytorch_model.bin" if name == "model.safetensors" else f"{path.stem}.bin"))
        path.unlink()
    with pytest.raises(ModelError, match=r"holds pickled weights.*as the README shows"):
        BlipDiffusionPipeline.from_pretrained(broken)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", readme, re.DOTALL) if "weights_only" in block)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_dir: broken)
    exec(compile(code, "README.md", "exec"), {})
    assert torch.equal(generate(BlipDiffusionPipeline.from_pretrained(broken)), generate(pipeline))


def test_what_is_no_model_is_refused_with_what_was_expected(tmp_path, broken):
    with pytest.raises(ModelError, match=r"model_index\.json, .*unet/config\.json"):
        BlipDiffusionPipeline.from_pretrained(tmp_path)
    (broken / "qformer" / "config.json").unlink()
    with pytest.raises(ModelError, match=r": qformer/config\.json missing\. Expected"):
        BlipDiffusionPipeline.from_pretrained(broken)
    with pytest.raises(ModelError, match="no folder and no hub name"):
        BlipDiffusionPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no folder and no hub name"):
        BlipDiffusionPipeline.from_pretrained(broken / "model_index.json")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        BlipDiffusionPipeline.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model_index.json", "{", "cannot be read as JSON"),
        ("qformer/config.json", "[]", "expected a JSON object"),
        ("text_encoder/config.json", '{"hidden_size": "wide"}', "does not describe a ContextCLIPTextModel"),
        (
            "scheduler/scheduler_config.json",
            '{"_class_name": "AutoencoderKL"}',
            "names the scheduler 'AutoencoderKL'",
        ),
        ("scheduler/scheduler_config.json", "{}", "names the scheduler None"),
    ],
)
def test_damaged_configurations_are_refused(broken, file, content, says):
    (broken / file).write_text(content)
    with pytest.raises(ModelError, match=says):
        BlipDiffusionPipeline.from_pretrained(broken)


def test_a_missing_prompt_vocabulary_is_refused(broken):
    for name in ("vocab.json", "tokenizer.json"):
        (broken / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"vocab\.json and merges\.txt"):
        BlipDiffusionPipeline.from_pretrained(broken)


@pytest.mark.parametrize("kept", [{"vocab.json", "merges.txt"}, {"tokenizer.json"}], ids=["vocabulary", "tokenizer"])
def test_either_form_of_a_prompt_vocabulary_gives_the_same_tokens(pipeline, broken, kept):
    # Releases of transformers before and after 5 write different ones of these files.
    for name in {"vocab.json", "merges.txt", "tokenizer.json"} - kept:
        (broken / "tokenizer" / name).unlink()
    loaded = load_prompt_tokenizer(broken / "tokenizer")
    assert loaded("a dog, red-panda").input_ids == pipeline.tokenizer("a dog, red-panda").input_ids
    assert loaded.model_max_length == pipeline.tokenizer.model_max_length


def test_a_file_is_no_place_to_save(pipeline, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        pipeline.save_pretrained(tmp_path / "file")
