"""Models of every kind on tiny networks: contexts and noise as diffusers has them, and refusals before anything runs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import WINDOW, stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl, tokenizer

from p2p_subject.blip import BlipDiffusionModel
from p2p_subject.context import Context, stack
from p2p_subject.controller import StepControl
from p2p_subject.errors import HookError, ModelError, PromptError, PromptTooLongError, SubjectError
from p2p_subject.models import Model
from p2p_subject.stable_diffusion import StableDiffusionModel, StableDiffusionXLModel
from p2p_subject.subject import Subject

MAKERS = {"1": stable_diffusion_1, "2": stable_diffusion_2, "xl": stable_diffusion_xl}
PROMPT = "a cat on grass, no dogs"


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """A wrapped pipeline of each kind; tests that change one make their own."""
    return {kind: Model.of(make()) for kind, make in MAKERS.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of each kind."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind, make in MAKERS.items():
        make().save_pretrained(root / kind)
    return {kind: root / kind for kind in MAKERS}


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A copy of a saved Stable Diffusion 1 to be damaged."""
    return shutil.copytree(folders["1"], tmp_path / "model")


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


SAMPLERS = ["PNDM", "DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "LCM"]
PUBLISHED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_any_scheduler_gives_noise_levels_that_rise_to_the_picture(tmp_path, kind: str, offset: int) -> None:
    """With the settings of the public Stable Diffusion (offset 1) and BLIP-Diffusion (0), in memory as from a folder."""
    published = diffusers.PNDMScheduler(**PUBLISHED, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=offset)
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(published.config)
    pipeline = stable_diffusion_1()
    pipeline.scheduler = scheduler
    model = Model.of(pipeline)
    schedule = model.schedule(10)
    levels = (*schedule.alphas, schedule.final_alpha)
    assert list(levels) == sorted(set(levels)) and levels[-1] > 0.999
    assert schedule.timesteps == tuple(range(900 + offset, -1, -100))
    trailing = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler = trailing
    assert kind == "LCM" or model.schedule(10).timesteps == tuple(range(999, 0, -100))
    # By rounding, diffusers adds a timestep of -1 to these.
    assert kind == "LCM" or all(model.schedule(steps).timesteps[-1] >= 0 for steps in (61, 103, 121))
    scheduler.save_pretrained(tmp_path)
    pipeline.scheduler = type(scheduler).from_pretrained(tmp_path)
    assert model.schedule(10) == schedule


def noisy(rows: int, side: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(rows, 4, *side, generator=torch.Generator().manual_seed(1))


def picture(size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


# Loading


@pytest.mark.parametrize(
    ("kind", "adapter", "guidance"),
    [("1", StableDiffusionModel, 7.5), ("2", StableDiffusionModel, 7.5), ("xl", StableDiffusionXLModel, 5.0)],
)
def test_a_standard_folder_becomes_its_adapter(folders, models, kind, adapter, guidance, recwarn) -> None:
    model = Model.load(folders[kind])
    assert type(model) is adapter and model.guidance_scale == guidance and model.name == str(folders[kind])
    assert model.fingerprint == models[kind].fingerprint
    assert (model.area, model.scale_factor, model.multiple, model.window, model.queries) == (16**2, 2, 4, WINDOW, 0)
    assert not [w for w in recwarn if "safety" in str(w.message)]
    assert torch.equal(model.encode(model.layout(PROMPT)).tokens, models[kind].encode(models[kind].layout(PROMPT)).tokens)
    assert not model.pipeline.text_encoder.training and not model.unet.training


def test_the_miniature_is_blip_diffusion(miniature_folder) -> None:
    model = Model.load(miniature_folder)
    assert type(model) is BlipDiffusionModel and model.queries == 4
    assert isinstance(model.encode(model.layout("a cat")), Context)
    assert len(model.unconditional("a dog")) == 1


def test_a_folder_states_its_guidance_scale(folder) -> None:
    (folder / "editing.json").write_text('{"guidance_scale": 4}')
    assert Model.load(folder).guidance_scale == 4.0


def test_parts_can_be_replaced_and_unknown_options_are_named(folders) -> None:
    other = stable_diffusion_1(seed=1).vae
    assert Model.load(folders["1"], vae=other).pipeline.vae is other
    with pytest.raises(ModelError, match="takes no 'va'. Did you mean 'vae'"):
        Model.load(folders["1"], va=other)
    with pytest.raises(ModelError, match="pickled"):
        Model.load(folders["1"], use_safetensors=False)


@pytest.mark.parametrize(
    "found",
    ["StableDiffusionInpaintPipeline", "StableDiffusionControlNetImg2ImgPipeline", "FluxPipeline", ["mine", "Own"], None],
)
def test_other_pipelines_are_refused_by_name(folder, found) -> None:
    change_json(folder / "model_index.json", _class_name=found)
    name = "Own" if isinstance(found, list) else str(found)
    with pytest.raises(ModelError, match=f"{name}.*StableDiffusionPipeline.*StableDiffusionXLPipeline"):
        Model.load(folder)


def test_a_hub_name_is_refused_before_it_is_downloaded(folder, monkeypatch) -> None:
    downloaded = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **hub: str(folder / file))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **given: downloaded.append((name, given)) or str(folder)
    )
    assert type(Model.load("owner/name", revision="main")) is StableDiffusionModel
    (name, given), *_ = downloaded
    assert name == "owner/name" and given["revision"] == "main" and "safety_checker/*" in given["ignore_patterns"]
    change_json(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ModelError, match="FluxPipeline"):
        Model.load("owner/name")
    assert len(downloaded) == 1


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer"])
def test_a_part_of_another_class_is_refused(folder, part) -> None:
    change_json(folder / "model_index.json", **{part: ["elsewhere", "Strange"]})
    with pytest.raises(ModelError, match=f"names {part} 'Strange'; expected"):
        Model.load(folder)
    change_json(folder / "model_index.json", **{part: [None, None]})
    with pytest.raises(ModelError, match=f"names {part} None; expected"):
        Model.load(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_weight_is_refused_by_name(folder, part) -> None:
    path = next((folder / part).glob("*.safetensors"))
    lost = sorted(load_file(path))[3]
    change_weights(path, lambda weights: {name: w for name, w in weights.items() if name != lost})
    # Releases of transformers differ in the names that they give, not in their ends.
    with pytest.raises(ModelError, match=lost.removeprefix("text_model.").replace(".", r"\.")):
        Model.load(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_other_shapes_pickles_and_empty_folders_are_refused(folder, part) -> None:
    path = next((folder / part).glob("*.safetensors"))
    change_weights(path, lambda weights: {name: torch.cat([w, w]) for name, w in weights.items()})
    with pytest.raises(ModelError, match=part):
        Model.load(folder)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match=rf"pickled weights \({path.stem}.bin\)"):
        Model.load(folder)
    path.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match=f"expected {path.name}"):
        Model.load(folder)
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=f"{part} has no weights"):
        Model.load(folder)


def test_a_damaged_file_is_refused(folder) -> None:
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(ModelError, match="text_encoder cannot be loaded"):
        Model.load(folder)


def test_old_names_of_the_vaes_attention_are_read(folder, models) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict) -> dict:
        for new, old in names.items():
            weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): w for name, w in weights.items()}
        return weights

    change_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert torch.equal(Model.load(folder).encode_images([picture()]), models["1"].encode_images([picture()]))


def test_position_counters_of_published_text_encoders_are_no_fault(folder, models) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    counter = {"text_model.embeddings.position_ids": torch.arange(WINDOW)[None]}
    change_weights(path, lambda weights: weights | counter)
    assert Model.load(folder).fingerprint == models["1"].fingerprint


# Contexts


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("negative", ["a blur", "", None])
def test_contexts_are_those_of_diffusers(models, kind, negative) -> None:
    model = models[kind]
    own = model.encode(model.layout(PROMPT)), model.unconditional(negative)
    counts = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        encoded = model.pipeline.encode_prompt(PROMPT, device="cpu", negative_prompt=negative, **counts)
    if kind == "xl":
        assert torch.equal(own[0].pooled, encoded[2]) and torch.equal(own[1].pooled, encoded[3])
    for context, expected in zip(own, encoded):
        assert context.tokens.shape == (1, WINDOW, model.unet.config.cross_attention_dim)
        assert torch.equal(context.tokens, expected)


def test_only_xl_takes_nothing_as_zeros(models) -> None:
    assert not models["xl"].unconditional().tokens.any() and not models["xl"].unconditional().pooled.any()
    assert models["xl"].unconditional("").tokens.any()
    assert torch.equal(models["2"].unconditional().tokens, models["2"].unconditional("").tokens)
    own = stable_diffusion_xl()
    own.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(Model.of(own).unconditional().tokens, models["xl"].unconditional("").tokens)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_does_not_fit_is_refused_and_never_cut(models, kind) -> None:
    long = " ".join(["cat"] * (WINDOW - 1))
    for call in (models[kind].layout, models[kind].unconditional):
        with pytest.raises(PromptTooLongError, match="do not fit"):
            call(long)
        with pytest.raises(PromptError):
            call(5)


@pytest.mark.parametrize("kind", MAKERS)
def test_subjects_are_refused_by_models_without(models, kind) -> None:
    model, subject = models[kind], Subject(picture(), "dog")
    for call in (
        lambda: model.layout("a dog", subject=True),
        lambda: model.require_subject(subject),
        lambda: model.embed(subject),
        lambda: model.encode(model.layout("a dog"), torch.zeros(1, 4, 24)),
    ):
        with pytest.raises(SubjectError, match="BLIP-Diffusion does"):
            call()


def test_a_textual_inversion_of_several_vectors_is_refused() -> None:
    pipeline = stable_diffusion_1()
    pipeline.tokenizer = tokenizer.__wrapped__()
    pipeline.tokenizer.add_tokens(["<toy>", "<toy>_1", "<one>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    model = Model.of(pipeline)
    assert len(model.layout("a <one> on grass").content) == 4
    with pytest.raises(PromptError, match="several vectors"):
        model.layout("a <toy> on grass")


# Noise


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_noise_is_one_call_of_the_unet(models, kind) -> None:
    model = models[kind]
    latents, move = noisy(2, (8, 4)), model.schedule(10).sampling()[3]
    context = stack([model.unconditional(), model.encode(model.layout(PROMPT))])
    added = {}
    if kind == "xl":
        ids = torch.tensor([[16, 8, 0, 0, 16, 8]], dtype=torch.float32).expand(2, -1)
        assert torch.equal(ids[:1], model.pipeline._get_add_time_ids((16, 8), (0, 0), (16, 8), torch.float32, 12))
        added = {"added_cond_kwargs": {"text_embeds": context.pooled, "time_ids": ids}}
    output = model.unet(latents, move.t, context.tokens, **added).sample
    if kind == "2":
        output = move.alpha_t**0.5 * output + (1 - move.alpha_t) ** 0.5 * latents
    assert torch.equal(model.noise(latents, move, context), output)
    with model.controlled():
        assert torch.allclose(model.noise(latents, move, context, StepControl(rows=2)), output, atol=1e-5)


def test_noise_can_be_differentiated_and_the_rest_is_not(models) -> None:
    model = models["xl"]
    context = model.encode(model.layout(PROMPT))
    assert not context.tokens.requires_grad
    tokens = context.tokens.clone().requires_grad_()
    model.noise(noisy(1), model.schedule(4).sampling()[0], context.with_tokens(tokens)).sum().backward()
    assert tokens.grad.abs().sum() > 0
    model.unet.zero_grad()


def test_a_trace_takes_rows_of_several_timesteps(models) -> None:
    model, seen = models["1"], []
    context = model.encode(model.layout(PROMPT)).expand(2)
    hook = model.unet.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    with model.controlled():
        assert model.read(noisy(2), torch.tensor([7, 3]), context, StepControl(rows=2)) is None
    hook.remove()
    assert seen[0].tolist() == [7, 3]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_latents_and_noise_stay_in_single_precision(folders, models, kind, dtype) -> None:
    model = Model.load(folders[kind], dtype=dtype)
    context = model.encode(model.layout(PROMPT))
    assert context.tokens.dtype == dtype == model.unet.dtype == model.pipeline.text_encoder.dtype
    latents = model.encode_images([picture()])
    noise = model.noise(latents, model.schedule(4).sampling()[2], context)
    assert latents.dtype == noise.dtype == torch.float32
    assert model.decode(latents)[0].size == (16, 16)
    assert model.fingerprint == models[kind].fingerprint
    assert model.pipeline.vae.dtype == dtype


def test_xl_decodes_and_encodes_in_single_precision_where_half_overflows(folders, monkeypatch) -> None:
    model = Model.load(folders["xl"], dtype=torch.float16)
    vae, seen = model.pipeline.vae, []
    for name in ("encode", "decode"):
        real = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda x, real=real: seen.append(vae.dtype) or real(x))
    model.decode(model.encode_images([picture()]))
    assert seen == [torch.float32] * 2 and vae.dtype == torch.float16
    monkeypatch.setattr(vae, "decode", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.decode(noisy(1))
    assert vae.dtype == torch.float16
    vae.register_to_config(force_upcast=False)
    model.encode_images([picture()])
    assert seen[2:] == [torch.float16]


def test_two_pipelines_of_one_autoencoder_wait_for_each_other(folders) -> None:
    one = Model.load(folders["xl"], dtype=torch.float16)
    other = Model.of(type(one.pipeline)(**one.pipeline.components | {"unet": stable_diffusion_xl().unet.half()}))
    inside, done = threading.Event(), threading.Event()

    def decode() -> None:
        inside.wait(10)
        other.decode(noisy(1))
        done.set()

    thread = threading.Thread(target=decode)
    thread.start()
    with one._autoencoder() as vae:
        inside.set()
        assert not done.wait(1) and vae.dtype == torch.float32
    thread.join()
    assert done.is_set() and vae.dtype == torch.float16


def test_a_compiled_unet_is_compiled_once_for_all_steps() -> None:
    graphs = []

    def counter(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    pipeline = stable_diffusion_1()
    plain, name = Model.of(pipeline), Model.of(pipeline).fingerprint
    context, moves = plain.encode(plain.layout(PROMPT)), plain.schedule(5).sampling()
    with torch.no_grad():
        expected = [plain.noise(noisy(1), move, context) for move in moves]
        pipeline.unet = torch.compile(pipeline.unet, backend=counter)
        model = Model.of(pipeline)
        assert model.fingerprint == name and model.area == plain.area
        counts = []
        for move, noise in zip(moves, expected):
            assert torch.allclose(model.noise(noisy(1), move, context), noise, atol=1e-5)
            counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] > 0 and len(set(counts)) == 1


# What is loaded on a pipeline


@pytest.fixture
def adapted():
    """A pipeline with a LoRA on its U-Net and its text encoder."""
    peft = pytest.importorskip("peft")
    pipeline = stable_diffusion_1()
    layers = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj"]}
    configs = {name: peft.LoraConfig(r=2, init_lora_weights=False, target_modules=own) for name, own in layers.items()}
    torch.manual_seed(0)
    pipeline.unet.add_adapter(configs["unet"], "own")
    # By peft itself: the method of transformers' networks may ask for a release of peft that is not out yet.
    torch.manual_seed(0)
    peft.inject_adapter_in_model(configs["text_encoder"], pipeline.text_encoder, "own")
    return pipeline


@torch.no_grad()
def test_a_lora_acts_and_has_its_own_fingerprint(adapted, models) -> None:
    model, plain = Model.of(adapted), models["1"]
    move, context = model.schedule(4).sampling()[0], plain.encode(plain.layout(PROMPT))
    with_lora = model.noise(noisy(1), move, context)
    assert not torch.allclose(with_lora, plain.noise(noisy(1), move, context))
    assert not torch.equal(model.encode(model.layout(PROMPT)).tokens, context.tokens)
    with model.controlled():
        assert torch.allclose(model.noise(noisy(1), move, context, StepControl(rows=1)), with_lora, atol=1e-5)
    names = [plain.fingerprint, model.fingerprint]
    model.unet.set_adapters(["own"], [0.5])
    names.append(model.fingerprint)
    for name, weight in model.unet.named_parameters():
        if "lora_B" in name:
            weight.neg_()
    names.append(model.fingerprint)
    model.unet.disable_lora()
    names.append(model.fingerprint)
    assert len(set(names)) == 5
    assert torch.equal(model.noise(noisy(1), move, context), plain.noise(noisy(1), move, context))


def test_weights_offloaded_one_by_one_have_the_same_fingerprint(models) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipeline = stable_diffusion_1()
    for name in ("unet", "vae", "text_encoder"):
        accelerate.cpu_offload(getattr(pipeline, name), torch.device("cpu"))
    assert next(pipeline.unet.parameters()).is_meta
    model = Model.of(pipeline)
    assert model.fingerprint == models["1"].fingerprint
    assert torch.equal(model.encode_images([picture()]), models["1"].encode_images([picture()]))
    assert torch.equal(model.encode(model.layout(PROMPT)).tokens, models["1"].encode(model.layout(PROMPT)).tokens)


def test_objects_that_are_no_pipeline_of_these_kinds_are_refused() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = stable_diffusion_1()
    with pytest.raises(ModelError, match="StableDiffusionImg2ImgPipeline.*from_pipe"):
        Model.of(StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False))
    for other in ("folder", None, pipeline.unet):
        with pytest.raises(ModelError, match=f"pipeline: {type(other).__name__} given; expected"):
            Model.of(other)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (stable_diffusion_1, {"in_channels": 9}, "takes 9 channels.*Inpainting"),
        (stable_diffusion_1, {"in_channels": 8}, "takes 8 channels.*pix2pix"),
        (stable_diffusion_1, {"out_channels": 8}, "returns 8"),
        (stable_diffusion_1, {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8.*latent consistency"),
        (stable_diffusion_1, {"num_class_embeds": 3}, "num_class_embeds=3.*class label"),
        (stable_diffusion_1, {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        (stable_diffusion_1, {"encoder_hid_dim": 24}, "encoder_hid_dim_type='text_proj'"),
        (stable_diffusion_1, {"addition_embed_type": "text"}, "addition_embed_type='text'.*None"),
        (stable_diffusion_1, {"attention_type": "gated"}, "GLIGEN"),
        (stable_diffusion_1, {"cross_attention_dim": 32}, "24 wide, the U-Net takes 32"),
        (stable_diffusion_1, {"sample_size": None}, "no sample_size"),
        (stable_diffusion_xl, {"projection_class_embeddings_input_dim": 12 + 5 * 8}, "takes 5 numbers.*refiner"),
        (stable_diffusion_xl, {"addition_embed_type": None}, "addition_embed_type=None.*'text_time'"),
    ],
)
def test_unets_that_are_told_more_are_refused(make, config, message) -> None:
    with pytest.raises(ModelError, match=message):
        Model.of(make(**config))


def test_other_networks_and_missing_ones_are_refused() -> None:
    from diffusers import AutoencoderTiny

    for part, value, message in (
        ("vae", AutoencoderTiny(), "vae: AutoencoderTiny given; expected AutoencoderKL"),
        ("text_encoder", None, "text_encoder: nothing given; expected CLIPTextModel"),
        ("tokenizer", None, "tokenizer: nothing given; expected CLIPTokenizer"),
        ("unet", stable_diffusion_1().vae, "unet: AutoencoderKL given; expected UNet2DConditionModel"),
        ("controlnet", object(), "controlnet: object given; expected one ControlNetModel"),
    ):
        pipeline = stable_diffusion_1()
        setattr(pipeline, part, value)
        with pytest.raises(ModelError, match=message):
            Model.of(pipeline)


def test_settings_that_would_be_lost_are_refused() -> None:
    for part, config, message in (
        ("vae", {"latents_mean": [0.0] * 4}, "normalises its latents"),
        ("text_encoder", {"use_attention_mask": True}, "use_attention_mask"),
        ("text_encoder_2", {"max_position_embeddings": WINDOW + 1}, "one length"),
    ):
        pipeline = stable_diffusion_xl()
        network = getattr(pipeline, part)
        if part == "vae":
            network.register_to_config(**config)
        else:
            network.config.update(config)
        with pytest.raises(ModelError, match=message):
            Model.of(pipeline)


def test_adapters_that_come_later_are_refused_at_the_next_job() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model = Model.of(stable_diffusion_1())
    model.require_controllable()
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=24, num_image_text_embeds=4)
    model.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(HookError, match=r"unload_ip_adapter\(\)"):
        model.require_controllable()
    model.unet.encoder_hid_proj = None
    model.unet.register_to_config(encoder_hid_dim_type=None)
    plain = dict(model.unet.attn_processors)
    attended = {name: IPAdapterAttnProcessor2_0(8, 24) if ".attn2." in name else AttnProcessor2_0() for name in plain}
    model.unet.set_attn_processor(attended)
    with pytest.raises(HookError, match="IPAdapterAttnProcessor2_0"):
        model.require_controllable()
    with pytest.raises(HookError, match="IPAdapterAttnProcessor2_0"):
        Model.of(model.pipeline)
    model.unet.set_attn_processor(plain)
    model.require_controllable()


def test_the_check_waits_for_a_job_of_another_thread(models) -> None:
    from threading import Event, Thread

    model, entered, checked = models["1"], Event(), Event()

    def check() -> None:
        entered.set()
        model.require_controllable()
        checked.set()

    with model.controlled():
        thread = Thread(target=check)
        thread.start()
        assert entered.wait(5) and not checked.wait(0.2)
    thread.join(5)
    assert checked.is_set()
