"""Structure control: the pipeline as the original has it, ControlNets of any source, and the editor on every kind of model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_tiny import deviation, picture, seeded, tiny_pipeline
from conftest import golden
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import controlnet, stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl

from inversion import ModelMismatchError, TrajectoryError
from inversion.trajectory import read_safetensors, write_safetensors
from p2p_subject import (
    Blend,
    BlipDiffusionControlNetPipeline,
    BlipDiffusionPipeline,
    CannyDetector,
    Editor,
    EditSpec,
    Source,
    Subject,
    control_image,
    replace,
    swap_subject,
)
from p2p_subject.context import Context, stack
from p2p_subject.errors import ArgumentError, ImageError, ModelError, PromptError, SubjectError
from p2p_subject.structure import Structure

STEPS = 4


# The pipeline


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> BlipDiffusionPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipeline(plain) -> BlipDiffusionControlNetPipeline:
    return beside(plain, controlnet(plain.unet))


def beside(plain: BlipDiffusionPipeline, network: ControlNetModel) -> BlipDiffusionControlNetPipeline:
    made = BlipDiffusionControlNetPipeline(**plain.components, controlnet=network)
    made.set_progress_bar_config(disable=True)
    return made


def drawing(seed: int = 5, width: int = 40, height: int = 28) -> Image.Image:
    """A control picture: white lines on black."""
    return control_image(picture(seed, width, height), "canny")


def generate(pipeline, prompt="sea", reference=None, control=None, **changes) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", "generator": seeded(), **changes}
    given = [] if type(pipeline) is BlipDiffusionPipeline else [drawing() if control is None else control]
    return pipeline(prompt, picture(0) if reference is None else reference, *given, "dog", "cat", **arguments).images


def test_the_pictures_are_those_of_the_original() -> None:
    folder = golden("blip_diffusion/controlnet").parent
    pipeline = BlipDiffusionControlNetPipeline.from_pretrained(
        folder / "checkpoint",
        qformer_tokenizer=folder / "qformer_tokenizer",
        controlnet=ControlNetModel.from_pretrained(folder / "controlnet"),
    )
    pipeline.set_progress_bar_config(disable=True)
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    case, stored = next(own for own in cases if own["kind"] == "control"), load_file(folder / "golden.safetensors")

    def run(control: Image.Image, **changes: object) -> torch.Tensor:
        return pipeline(
            case["prompt"],
            Image.open(folder / "reference_1.png"),
            control,
            case["style_subject"],
            case["target_subject"],
            stored["control.latents"],
            case["guidance_scale"],
            case["height"],
            case["width"],
            case["steps"],
            None,
            case["negative_prompt"],
            output_type="pt",
            **changes,
        ).images

    control = Image.open(folder / "control.png")
    assert deviation(run(control), stored["control.image"]) < 1e-5
    # Without the ControlNet, or with the picture mirrored, it is another picture: the test can tell.
    assert deviation(run(control, controlnet_conditioning_scale=0), stored["control.image"]) > 0.1
    assert deviation(run(control.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), stored["control.image"]) > 1e-4


def test_the_control_picture_is_squeezed_and_scaled_as_in_the_original(pipeline) -> None:
    seen = []
    hook = pipeline.controlnet.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["controlnet_cond"]), with_kwargs=True
    )
    control = drawing(width=50, height=30)
    with hook:
        generate(pipeline, control=control, height=32, width=24)
    resized = np.asarray(control.resize((24, 32), Image.Resampling.BICUBIC))
    expected = torch.from_numpy(resized / 255).permute(2, 0, 1).float()
    # The row without the subject sees it too.
    assert seen[0].shape == (2, 3, 32, 24) and all(torch.allclose(row, expected, atol=1e-7) for row in seen[0])


def test_strength_runs_from_none_to_much(pipeline, plain) -> None:
    free, half, whole = (generate(pipeline, controlnet_conditioning_scale=scale) for scale in (0.0, 0.5, 1.0))
    assert torch.equal(free, generate(plain)) and torch.equal(whole, generate(pipeline))
    assert len({tensor.sum().item() for tensor in (free, half, whole)}) == 3


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 1.0)])
def test_control_lasts_from_its_start_to_its_end(pipeline, plain, start, end) -> None:
    def latents(pipeline, **changes) -> list[torch.Tensor]:
        kept = []
        changes["callback_on_step_end"] = lambda pipe, step, timestep, values: kept.append(values["latents"])
        generate(pipeline, num_inference_steps=4, **changes)
        return kept

    part = latents(pipeline, control_guidance_start=start, control_guidance_end=end)
    free, whole = latents(plain), latents(pipeline)
    # PNDM takes one step more than asked for; the first two of five end by half, the middle one by neither.
    assert torch.equal(part[1], (whole if start == 0 else free)[1])
    assert not torch.equal(part[-2], free[-2]) and not torch.equal(part[-2], whole[-2])


def test_a_list_of_control_pictures_is_one_a_row(pipeline) -> None:
    controls, seeds = [drawing(5), drawing(6, 30, 60)], [seeded(index) for index in range(4)]
    rows = generate(pipeline, ["sea", "sun"], control=controls, num_images_per_prompt=2, generator=seeds)
    alone = [
        generate(pipeline, prompt, control=control, generator=seeded(index))
        for index, (prompt, control) in enumerate([("sea", controls[0])] * 2 + [("sun", controls[1])] * 2)
    ]
    assert torch.allclose(rows, torch.cat(alone), atol=1e-5)
    shared, spelled = (
        generate(pipeline, ["sea", "sun"], control=control, generator=(seeded(0), seeded(1)))
        for control in (controls[0], [controls[0]] * 2)
    )
    assert torch.equal(shared, spelled)


def test_both_spellings_of_the_control_picture_are_one(pipeline) -> None:
    arguments = {"num_inference_steps": 3, "output_type": "pt", "reference_image": picture(0)}
    categories = {"source_subject_category": "dog", "target_subject_category": "cat"}
    for name in ("condtioning_image", "conditioning_image"):
        images = pipeline("sea", generator=seeded(), **{name: drawing()}, **arguments, **categories).images
        assert torch.equal(images, generate(pipeline)), name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"conditioning_image": drawing()}, ImageError, "both of condtioning_image and conditioning_image"),
        ({"control": "edges.png"}, ImageError, "expected a PIL image"),
        ({"control": [drawing(), drawing()], "prompt": ["a", "b", "c"]}, ValueError, "lists differ in length"),
        ({"controlnet_conditioning_scale": "much"}, ArgumentError, "controlnet_conditioning_scale is 'much'"),
        ({"controlnet_conditioning_scale": float("inf")}, ArgumentError, "controlnet_conditioning_scale is inf"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, ArgumentError, "the start below the end"),
        ({"control_guidance_end": 1.5}, ArgumentError, "between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused_before_a_network_runs(pipeline, monkeypatch, changes, error, message) -> None:
    monkeypatch.setattr(type(pipeline.qformer), "forward", lambda *_, **__: pytest.fail("a network ran"))
    with pytest.raises(error, match=message):
        generate(pipeline, **changes)


def test_a_control_picture_is_needed(pipeline) -> None:
    with pytest.raises(ImageError, match="neither of condtioning_image and conditioning_image"):
        pipeline("sea", picture(0), source_subject_category="dog", target_subject_category="cat")


def test_it_survives_saving_in_the_layout_of_the_public_checkpoint(pipeline, plain, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "BlipDiffusionControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "ControlNetModel"] and index["unet"] == ["diffusers", "UNet2DConditionModel"]
    read = BlipDiffusionControlNetPipeline.from_pretrained(tmp_path / "model")
    read.set_progress_bar_config(disable=True)
    assert torch.equal(generate(read), generate(pipeline)) and not read.controlnet.training
    other = controlnet(plain.unet, seed=1)
    replaced = BlipDiffusionControlNetPipeline.from_pretrained(tmp_path / "model", controlnet=other)
    assert replaced.controlnet is other
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="controlnet/config.json missing"):
        BlipDiffusionControlNetPipeline.from_pretrained(tmp_path / "plain")
    for put in (
        BlipDiffusionControlNetPipeline.from_pretrained(tmp_path / "plain", controlnet=pipeline.controlnet),
        BlipDiffusionControlNetPipeline.from_pipe(plain, controlnet=pipeline.controlnet),
    ):
        put.set_progress_bar_config(disable=True)
        assert torch.equal(generate(put), generate(pipeline))
    (tmp_path / "model" / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="controlnet has no weights"):
        BlipDiffusionControlNetPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (8, 8)}, r"block_out_channels is \(8, 8\), the U-Net's is \(8, 16\)"),
        ({"cross_attention_dim": 16}, "cross_attention_dim is 16, the U-Net's is 24"),
        ({"in_channels": 8}, "in_channels is 8"),
        ({"layers_per_block": 2}, "layers_per_block is 2"),
        ({"conditioning_channels": 1}, "pictures of 1 channels; expected 3"),
        ({"conditioning_embedding_out_channels": (4, 8, 8)}, "ControlNet's cell is 4, those of the VAE's latents is 2"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True.*guess mode"),
        ({"num_class_embeds": 3}, "num_class_embeds=3: it wants a class label"),
    ],
)
def test_a_controlnet_for_another_model_is_refused(plain, config, message) -> None:
    fitting = {name: value for name, value in controlnet(plain.unet).config.items() if not name.startswith("_")}
    network = ControlNetModel(**fitting | config)
    with pytest.raises(ModelError, match=message):
        beside(plain, network)
    pipeline = beside(plain, controlnet(plain.unet))
    pipeline.controlnet = network
    with pytest.raises(ModelError, match=message):
        generate(pipeline)


def test_what_is_no_controlnet_and_several_are_refused(plain) -> None:
    own = controlnet(plain.unet)
    for given, name in ((MultiControlNetModel([own, own]), "MultiControlNetModel"), (plain.unet, "UNet2DConditionModel")):
        with pytest.raises(ModelError, match=f"controlnet: {name} given; expected one ControlNetModel"):
            beside(plain, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_controlnet_of_another_precision_works(tmp_path, dtype) -> None:
    pipeline = beside(tiny_pipeline(tmp_path), controlnet(tiny_pipeline(tmp_path).unet))
    network = pipeline.controlnet
    pipeline.to(dtype)
    network.to(torch.float32)
    images = generate(pipeline)
    assert images.dtype == dtype and images.isfinite().all()


def test_offloaded_networks_give_the_same_picture(tmp_path) -> None:
    pytest.importorskip("accelerate")
    plain = tiny_pipeline(tmp_path)
    pipeline = beside(plain, controlnet(plain.unet))
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipeline), expected) and torch.equal(generate(pipeline), expected)


# The scripts of the public model card, their imports changed; smaller, and with fewer steps


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder in the layout of `Salesforce/blipdiffusion-controlnet`."""
    # The tiny tokenizer spells, so that the scripts' negative prompts take a token a letter.
    plain = tiny_pipeline(tmp_path / "parts", positions=300)
    beside(plain, controlnet(plain.unet)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


NEGATIVE = (
    "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality, low quality, jpeg "
    "artifacts, morbid, mutilated, out of frame, ugly, bad anatomy, bad proportions, deformed, blurry, duplicate"
)


def test_the_canny_script_runs(checkpoint) -> None:
    blip_diffusion_pipe = BlipDiffusionControlNetPipeline.from_pretrained(checkpoint, torch_dtype=torch.float16).to("cpu")

    style_subject = "flower"
    tgt_subject = "teapot"
    text_prompt = "on a marble table"
    cldm_cond_image = picture(1).resize((64, 64))
    canny = CannyDetector()
    cldm_cond_image = canny(cldm_cond_image, 30, 70, output_type="pil")
    style_image = picture(2)
    output = blip_diffusion_pipe(
        text_prompt,
        style_image,
        cldm_cond_image,
        style_subject,
        tgt_subject,
        guidance_scale=7.5,
        num_inference_steps=3,
        neg_prompt=NEGATIVE,
        height=64,
        width=64,
    ).images
    assert len(output) == 1 and output[0].size == (64, 64) and output[0].mode == "RGB"


def test_the_scribble_script_runs_with_another_controlnet_in_place(checkpoint, tmp_path) -> None:
    blip_diffusion_pipe = BlipDiffusionControlNetPipeline.from_pretrained(checkpoint)
    controlnet(blip_diffusion_pipe.unet, seed=3).save_pretrained(tmp_path / "scribble")
    before = blip_diffusion_pipe.controlnet
    network = ControlNetModel.from_pretrained(tmp_path / "scribble")
    blip_diffusion_pipe.controlnet = network
    blip_diffusion_pipe.to("cpu")
    assert blip_diffusion_pipe.components["controlnet"] is network is not before

    cldm_cond_image = control_image(picture(1).resize((64, 64)), "scribble")
    output = blip_diffusion_pipe(
        "on a table",
        picture(2),
        cldm_cond_image,
        "flower",
        "bag",
        guidance_scale=7.5,
        num_inference_steps=3,
        neg_prompt=NEGATIVE,
        height=64,
        width=64,
    ).images
    assert len(output) == 1 and output[0].size == (64, 64)


# Loading


KINDS = {
    "1.x": (stable_diffusion_1, StableDiffusionControlNetPipeline),
    "2.x": (stable_diffusion_2, StableDiffusionControlNetPipeline),
    "XL": (stable_diffusion_xl, StableDiffusionXLControlNetPipeline),
}


def with_controlnet(kind: str, network: ControlNetModel | None = None):
    """A tiny pipeline of a kind as diffusers has it, with a ControlNet."""
    make, cls = KINDS[kind]
    pipeline = make()
    unused = {"XL": {"add_watermarker": False}}.get(
        kind, {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    parts = {name: part for name, part in pipeline.components.items() if name not in unused}
    made = cls(**parts, controlnet=controlnet(pipeline.unet) if network is None else network, **unused)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_is_put_beside_a_folder_or_comes_with_it(kind, tmp_path) -> None:
    make, cls = KINDS[kind]
    plain, whole = make(), with_controlnet(kind)
    plain.save_pretrained(tmp_path / "plain")
    whole.save_pretrained(tmp_path / "whole")
    whole.controlnet.save_pretrained(tmp_path / "controlnet")
    editors = [
        Editor.from_pipeline(whole),
        Editor.from_pretrained(tmp_path / "whole"),
        Editor.from_pretrained(tmp_path / "plain", controlnet=tmp_path / "controlnet"),
        Editor.from_pretrained(tmp_path / "plain", controlnet=whole.controlnet),
    ]
    assert {type(editor.model.pipeline) for editor in editors} == {cls}
    assert len({editor.model.fingerprint for editor in editors}) == 1
    other = controlnet(plain.unet, seed=1)
    names = {editors[0].model.fingerprint, Editor.from_pretrained(tmp_path / "whole", controlnet=other).model.fingerprint}
    assert len(names | {Editor.from_pretrained(tmp_path / "plain", controlnet=None).model.fingerprint}) == 3


def test_names_that_lead_to_no_controlnet_are_refused(tmp_path, monkeypatch) -> None:
    stable_diffusion_1().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: (_ for _ in ()).throw(OSError("offline")))
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("owner/name", "controlnet='owner/name' is no folder and cannot be downloaded.*offline"),
        (tmp_path / "empty", "config.json does not exist"),
        (tmp_path / "model" / "unet", "that of a 'UNet2DConditionModel'; expected 'ControlNetModel'"),
        (stable_diffusion_1().unet, "controlnet: UNet2DConditionModel given"),
        ([], "controlnet: MultiControlNetModel given"),
    ):
        with pytest.raises(ModelError, match=message):
            Editor.from_pretrained(tmp_path / "model", controlnet=given)


def test_a_hub_name_downloads_the_networks_files_alone(tmp_path, monkeypatch) -> None:
    pipeline, asked = stable_diffusion_1(), []
    pipeline.save_pretrained(tmp_path / "model")
    controlnet(pipeline.unet).save_pretrained(tmp_path / "controlnet")

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "controlnet")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    editor = Editor.from_pretrained(tmp_path / "model", controlnet="owner/name", token="t", revision="of the model")
    assert type(editor.model.controlnet) is ControlNetModel
    ((name, options),) = asked
    assert name == "owner/name" and options.keys() == {"allow_patterns", "token"} and "config.json" in options["allow_patterns"]


def test_the_controlnet_that_is_shipped_belongs_to_the_miniature() -> None:
    editor = Editor.from_pretrained(controlnet="edges")
    assert editor.model.controlnet.config.conditioning_embedding_out_channels == [16, 32, 64]
    assert editor.model.controlnet.dtype == torch.float32


def test_edges_is_the_controlnet_that_comes_with_the_library(miniature_folder, edges_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("p2p_subject.loading.miniature_folder", lambda: miniature_folder)
    monkeypatch.setattr("p2p_subject.controlnets.edges_folder", lambda: edges_folder)
    editor = Editor.from_pretrained(controlnet="edges")
    assert type(editor.model.pipeline) is BlipDiffusionControlNetPipeline
    # Stored in half precision, computed in single.
    assert editor.model.controlnet.dtype == torch.float32
    monkeypatch.setattr("p2p_subject.controlnets.edges_folder", lambda: tmp_path / "nowhere")
    with pytest.raises(ModelError, match="lacks the miniature's ControlNet.*reinstall it"):
        Editor.from_pretrained(controlnet="edges")


# The editor


@pytest.fixture(scope="module", params=KINDS)
def editor(request) -> Editor:
    return Editor.from_pipeline(with_controlnet(request.param))


@pytest.fixture(scope="module")
def first() -> Editor:
    return Editor.from_pipeline(with_controlnet("1.x"))


@pytest.fixture(scope="module")
def blip(miniature_folder, edges_folder) -> Editor:
    return Editor.from_pretrained(miniature_folder, controlnet=edges_folder)


def photo(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


SPEC = replace("a dog on grass", swap="cat", blend=Blend(rule="peak"))


def test_generation_is_that_of_the_pipeline_of_diffusers(editor) -> None:
    pipeline, control = editor.model.pipeline, control_image(photo(24, 16, 3), "canny", low=20, high=40)
    noise = torch.randn(1, 4, 8, 12, generator=seeded())
    own = {"latents": noise, "guidance_scale": 4.0}
    # Two steps: random networks amplify rounding in each more, and how much of it there is depends on the processor.
    source = editor.generate("a cat on grass", steps=2, control=control, control_strength=0.7, **own)
    sampling = {"num_inference_steps": 2, "height": 16, "width": 24, "controlnet_conditioning_scale": 0.7}
    theirs = pipeline("a cat on grass", image=control, output_type="latent", **sampling, **own).images
    assert (source.trajectory.clean - theirs).abs().max() < 1e-5 * theirs.abs().max()
    free = editor.generate("a cat on grass", steps=2, control=control, control_strength=0, **own)
    assert (free.trajectory.clean - theirs).abs().max() > 0.1 * theirs.abs().max()


def test_given_latents_say_the_size_whatever_the_control_pictures_is(first) -> None:
    source = first.generate("a cat", steps=2, latents=torch.zeros(1, 4, 8, 8), control=control_image(photo(40, 24), "canny"))
    assert source.image.size == (16, 16)


def test_without_strength_it_is_the_model_without_a_controlnet(first) -> None:
    plain = Editor.from_pipeline(stable_diffusion_1())
    expected = plain.generate("a cat", seed=0, steps=STEPS)
    free = first.generate("a cat", seed=0, steps=STEPS, control=control_image(photo(), "canny"), control_strength=0)
    assert torch.equal(free.trajectory.latents, expected.trajectory.latents)


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (18, 30)])
def test_edits_keep_to_the_structure_of_the_source_recorded_or_not(editor, size) -> None:
    source = editor.invert(photo(*size), "a cat on grass", steps=STEPS, control="canny")
    assert source.structure.picture.size == source.frame.model_size and source.structure.strength == 1.0
    result, recorded = editor.edit(source, SPEC), editor.edit(editor.record(source), SPEC)
    assert (recorded.latents - result.latents).abs().max() < 1e-2 * result.latents.abs().max()
    assert recorded.unet_rows == 2 * STEPS < result.unet_rows and result.image.size == size
    # Were the structure lost on the way, the edit would be that of no structure.
    free = editor.edit(changed(source, structure=Structure(source.structure.picture, 0.0)), SPEC)
    assert not torch.allclose(free.latents, result.latents, atol=1e-2)


def test_the_identity_edit_of_a_generation_under_control_is_the_generation(editor) -> None:
    control = control_image(photo(), "canny")
    source = editor.generate("a cat on grass", seed=0, steps=STEPS, control=control, guidance_scale=3.0)
    with pytest.warns(UserWarning, match="identity"):
        result = editor.edit(source, EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None))
    assert (result.latents - source.trajectory.clean).abs().max() < 1e-3 * result.latents.abs().max()


@pytest.mark.parametrize("method", ["direct", "fixed_point", "null_text", "negative_prompt", "edit_friendly", "ddim"])
def test_every_inversion_works_under_control(first, method) -> None:
    source = first.invert(photo(), "a cat on grass", steps=STEPS, method=method, control="canny", control_strength=0.5)
    result = first.edit(source, SPEC)
    assert torch.isfinite(result.latents).all() and source.structure.strength == 0.5
    assert not any(weight.grad is not None for weight in first.model.controlnet.parameters())
    assert all(weight.requires_grad for weight in first.model.controlnet.parameters())


def test_a_batch_of_edits_equals_them_one_by_one_and_threads_do_not_meet(first) -> None:
    sources = [
        first.invert(photo(seed=seed), "a cat on grass", steps=STEPS, control=drawing(seed, 16, 16), control_strength=1 + seed)
        for seed in range(2)
    ]
    specs = [SPEC, EditSpec(prompt="a bus on sand", blend=None)]
    alone = [[first.edit(source, spec).latents for spec in specs] for source in sources]
    for source, expected in zip(sources, alone):
        for result, own in zip(first.edit(source, specs), expected):
            assert (result.latents - own).abs().max() < 1e-4
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda source: [first.edit(source, spec).latents for spec in specs], sources))
    assert all(torch.equal(a, b) for one, other in zip(alone, again) for a, b in zip(one, other))


def test_the_attention_of_the_controlnet_is_left_alone(first) -> None:
    processors, seen = dict(first.model.controlnet.attn_processors), []

    def look(module, given, named) -> None:
        seen.append((named.get("cross_attention_kwargs"), module.attn_processors))

    source = first.invert(photo(), "a cat on grass", steps=2, control="canny")
    with first.model.controlnet.register_forward_pre_hook(look, with_kwargs=True):
        first.edit(source, SPEC)
    assert len(seen) == 2 and all(kwargs is None and own == processors for kwargs, own in seen)


def test_a_source_under_control_survives_saving(first, tmp_path) -> None:
    source = first.invert(photo(18, 30), "a cat on grass", steps=STEPS, control="canny", control_strength=0.3)
    source.save(tmp_path / "a.safetensors")
    read = Source.load(tmp_path / "a.safetensors")
    assert np.array_equal(read.structure.picture, source.structure.picture) and read.structure.strength == 0.3
    assert torch.equal(first.edit(read, SPEC).latents, first.edit(source, SPEC).latents)


@pytest.mark.parametrize(
    "change",
    [
        {"control": None},
        {"control_strength": None},
        {"control": torch.zeros(8, 8, 3, dtype=torch.uint8)},
        {"control": torch.zeros(16, 16, 3)},
        {"control_strength": torch.tensor(float("nan"))},
        {"control_strength": torch.tensor([1.0, 2.0])},
    ],
)
def test_a_damaged_control_picture_is_refused_when_it_is_loaded(first, tmp_path, change) -> None:
    path = tmp_path / "a.safetensors"
    first.generate("a cat", seed=0, steps=2, control=drawing(width=16, height=16)).save(path)
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, {name: value for name, value in (tensors | change).items() if value is not None}, metadata)
    with pytest.raises(TrajectoryError, match=r"control picture in it is damaged; expected control \(16, 16, 3\)"):
        Source.load(path)


def test_the_size_follows_the_shape_of_the_control_picture_unless_told(first) -> None:
    sizes = [
        first.generate("a cat", seed=0, steps=1, control=drawing(width=80, height=20), **given).image.size
        for given in ({}, {"size": (16, 8)}, {"latents": torch.randn(1, 4, 8, 12)})
    ]
    assert sizes[0][0] > 2 * sizes[0][1] and sizes[1:] == [(16, 8), (24, 16)]


def test_control_and_controlnet_come_together_or_are_refused_before_a_network_runs(first, monkeypatch) -> None:
    plain = Editor.from_pipeline(stable_diffusion_1())
    under = first.generate("a cat on grass", seed=0, steps=2, control=drawing())
    free = plain.generate("a cat on grass", seed=0, steps=2)
    for editor in (plain, first):
        monkeypatch.setattr(editor.model.unet, "forward", lambda *_, **__: pytest.fail("a network ran"))
    for job in (
        lambda: plain.generate("a cat", control=drawing()),
        lambda: plain.invert(photo(), "a cat", control="canny"),
    ):
        with pytest.raises(ArgumentError, match="carries no ControlNet. Load the model with one"):
            job()
    for job in (
        lambda: first.generate("a cat"),
        lambda: first.invert(photo(), "a cat"),
        lambda: first.edit(changed(under, structure=None), SPEC),
        lambda: first.record(changed(under, structure=None)),
    ):
        with pytest.raises(ArgumentError, match="carries a ControlNet, which needs a control picture: pass control="):
            job()
    with pytest.raises(ModelMismatchError):
        plain.edit(under, SPEC)
    with pytest.raises(ModelMismatchError):
        first.edit(free, SPEC)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"control": "cany"}, ArgumentError, "'cany': there is no such file, nor such a kind.*Did you mean 'canny'"),
        ({"control": 3}, ImageError, "control is a int"),
        ({"control": "depth"}, ArgumentError, r"takes more than a picture; pass control_image\(picture, 'depth', ...\)"),
        ({"control": ("cany", photo())}, ArgumentError, "Did you mean 'canny'"),
        ({"control": ("canny", "nowhere.png")}, ImageError, "no such file"),
        ({"control": "canny", "control_strength": -1}, ArgumentError, "control_strength=-1; expected a number of 0 or more"),
        ({"control": None, "control_strength": "x"}, ArgumentError, "control_strength='x'"),
        ({"control": Image.new("RGB", (32, 16))}, ImageError, "control is 32x16 pixels, the picture it belongs to 16x16"),
        ({"control": ("canny", Image.new("RGB", (32, 16)))}, ImageError, "control is 32x16 pixels, the picture it belongs to"),
    ],
)
def test_wrong_controls_are_refused(first, given, error, message) -> None:
    with pytest.raises(error, match=message):
        first.invert(photo(), "a cat", **given)


def test_a_kind_of_control_picture_needs_a_picture_to_be_made_from(first) -> None:
    with pytest.raises(ArgumentError, match=r"no picture to make it of; pass both, \('canny', picture\)"):
        first.generate("a cat", control="canny")


def test_a_control_picture_is_made_at_the_size_that_is_generated(first) -> None:
    large = photo(640, 320)
    source = first.generate("a cat", seed=0, steps=1, control=("canny", large), size=(16, 8))
    assert np.array_equal(source.structure.picture, control_image(large.resize((16, 8), Image.Resampling.LANCZOS), "canny"))
    assert source.structure.kind is None


def test_a_control_picture_of_another_size_than_the_latents_is_named(first) -> None:
    source = first.invert(photo(), "a cat on grass", steps=2, control="canny")
    small = Structure(source.structure.picture.resize((8, 12)), 1.0)
    with pytest.raises(ImageError, match="control picture is 8x12 pixels; for latents of 8x8 expected 16x16"):
        first.edit(changed(source, structure=small), SPEC)


def test_contexts_under_control_keep_it_in_every_row() -> None:
    tokens, control = torch.randn(1, 3, 4), torch.rand(1, 3, 6, 8)
    context = Context(tokens).with_structure(control, 0.5)
    rows = stack([context.expand(2), context.with_tokens(torch.zeros(1, 3, 4))])
    assert rows.structure.shape == (3, 3, 6, 8) and torch.equal(rows.structure[2], control[0])
    assert rows.strength.tolist() == [0.5] * 3
    with pytest.raises(TypeError):
        stack([context, Context(tokens)])


# Subjects and style, on BLIP-Diffusion


@pytest.fixture(scope="module")
def flower() -> Subject:
    return Subject(photo(40, 30, seed=4), "flower")


def test_a_subject_is_swapped_under_the_structure_of_the_source(blip) -> None:
    source = blip.invert(photo(64, 64), "a cat on grass", steps=2, control="canny")
    spec = swap_subject("cat", Subject(photo(40, 40, seed=1), "dog"), cross_replace=0.5, self_replace=0.5)
    result, recorded = blip.edit(source, spec), blip.edit(blip.record(source), spec)
    assert (result.latents - recorded.latents).abs().max() < 1e-4 and result.prompt == "a dog on grass"


def test_style_transfer_is_generation_of_the_style_under_the_structure(blip, flower) -> None:
    kettle = photo(90, 60, seed=2)
    source = blip.stylize(kettle, style=flower, prompt="a bell on sand", steps=2, seed=0, control_strength=0.8)
    width, height = source.image.size
    assert width > height and source.prompt == "a bell on sand" and source.subject is not None
    control = control_image(kettle.resize((width, height), Image.Resampling.LANCZOS), "canny")
    assert np.array_equal(source.structure.picture, control) and source.structure.strength == 0.8
    by_hand = blip.generate("a bell on sand", subject=flower, control=control, control_strength=0.8, steps=2, seed=0)
    assert torch.equal(by_hand.trajectory.latents, source.trajectory.latents)
    other = blip.stylize(kettle, style=Subject(photo(30, 30, seed=9), "flower"), prompt="a bell on sand", steps=2, seed=0)
    assert not torch.equal(other.trajectory.latents, source.trajectory.latents)
    edited = blip.edit(source, EditSpec(prompt="a bell on snow", blend=None))
    assert edited.image.size == source.image.size


def test_style_transfer_takes_a_size_and_a_drawing(blip, flower) -> None:
    given = {"style": flower, "prompt": "a bell", "steps": 1, "seed": 0}
    assert blip.stylize(photo(90, 60), size=(64, 32), **given).image.size == (64, 32)
    drawn = drawing(width=60, height=60)
    source = blip.stylize(drawn, control=drawn, **given)
    assert np.array_equal(source.structure.picture, drawn.resize((64, 64), Image.Resampling.BICUBIC))


def test_wrong_styles_are_refused(blip, first, flower) -> None:
    for given, error, message in (
        ({"style": photo()}, SubjectError, r"expected Subject\(picture, category\)"),
        ({"control": None}, ArgumentError, "control=None; expected a kind of control picture"),
        ({"control": ("canny", photo())}, ArgumentError, r"control=\(kind, picture\); expected a kind of control picture"),
        ({"size": (10, 10)}, ArgumentError, "positive multiples of 16"),
        ({"size": 64}, ArgumentError, "positive multiples of 16"),
        ({"control": "cany"}, ArgumentError, "Did you mean 'canny'"),
        ({"prompt": ""}, PromptError, "prompt"),
    ):
        with pytest.raises(error, match=message):
            blip.stylize(photo(64, 64), **{"style": flower, "prompt": "a bell"} | given)
    with pytest.raises(SubjectError, match="BLIP-Diffusion does"):
        first.stylize(photo(), style=flower, prompt="a bell")
