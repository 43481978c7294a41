"""The editor on every kind of Stable Diffusion, and with what users load onto a pipeline."""

from __future__ import annotations

from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from PIL import Image

from p2p_subject import Blend, Editor, EditSpec, Subject, remove, replace, reweight, swap_subject
from p2p_subject.errors import HookError, SubjectError
from tests import tiny_pipelines

KINDS = {
    "1.x": tiny_pipelines.stable_diffusion_1,
    "2.x": tiny_pipelines.stable_diffusion_2,
    "XL": tiny_pipelines.stable_diffusion_xl,
}
STEPS = 4


@pytest.fixture(scope="module", params=KINDS)
def editor(request) -> Editor:
    return Editor.from_pipeline(KINDS[request.param]())


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_plain_generation_is_the_pipelines_own(editor) -> None:
    """Guidance, contexts, sizes and schedule as diffusers has them, with its DDIM sampler."""
    pipeline = editor.model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    source = editor.generate("a cat on grass", latents=noise, steps=STEPS, guidance_scale=4.0)
    sampling = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 16, "width": 24}
    theirs = pipeline("a cat on grass", latents=noise, output_type="latent", **sampling).images
    # Random networks amplify rounding, those of XL most.
    assert (source.trajectory.clean - theirs).abs().max() < 1e-2 * theirs.abs().max()
    assert source.image.size == (24, 16)


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (18, 30)])
def test_pictures_of_any_shape_are_inverted_and_edited(editor, size) -> None:
    source = editor.invert(picture(*size), "a cat on grass", steps=STEPS)
    spec = replace("a dog on grass", swap="cat", blend=Blend(rule="peak"), cross_replace={"dog": 0.5})
    result = editor.edit(source, spec)
    assert result.image.size == result.mask.size == size and set(result.maps) == {"cat", "dog"}
    recorded = editor.edit(editor.record(source), spec)
    assert (recorded.latents - result.latents).abs().max() < 1e-2 * result.latents.abs().max()
    assert recorded.unet_rows == 2 * STEPS < result.unet_rows


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (18, 30)])
def test_a_removal_hides_its_region_in_pictures_of_any_shape(editor, size) -> None:
    source = editor.invert(picture(*size), "a cat on grass", steps=STEPS)
    mask = np.zeros(size[::-1], np.uint8)
    mask[:8, :8] = 255
    erased, plain = (
        editor.edit(source, changed(remove("cat", "grass"), erase=erase), mask=mask, paste=False) for erase in (True, False)
    )
    assert erased.image.size == size and erased.unet_rows == plain.unet_rows == 2 * STEPS
    assert torch.isfinite(erased.latents).all() and (erased.latents - plain.latents).abs().max() > 1e-3
    # Outside the mask the latents are the source's.
    assert torch.equal(erased.latents[..., 4:, 4:], source.trajectory.clean[..., 4:, 4:])


@pytest.mark.parametrize("method", ["direct", "fixed_point", "null_text", "negative_prompt", "edit_friendly", "ddim"])
def test_every_inversion_works_on_every_kind(editor, method) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=STEPS, method=method)
    # The mask keeps all but one corner: what lies outside is what the method takes for the source.
    mask = np.zeros((16, 16), np.uint8)
    mask[:2, :2] = 255
    result = editor.edit(source, reweight({"cat": 3.0}, cross_replace=1.0), mask=mask, paste=False)
    kept = torch.equal(result.latents[..., 1:, 1:], source.trajectory.clean[..., 1:, 1:])
    # Replayed with guidance, the source drifts away from the picture; it is what the other methods are for.
    assert torch.isfinite(result.latents).all() and kept is (method != "ddim")


def test_the_guided_reconstruction_of_a_negative_prompt_inversion_is_the_unguided_one(editor) -> None:
    """Pooled text included: guidance of a source against its own prompt cancels on every kind of model."""
    source = editor.invert(picture(), "a cat on grass", steps=STEPS, method="negative_prompt")
    spec = EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None)
    with pytest.warns(UserWarning, match="identity"):
        unguided, guided = (editor.edit(source, spec, guidance_scale=scale).latents for scale in (1, 6))
    # Rounding grows on the way; with the pooled text of another prompt they differ by more than the latents themselves.
    assert (guided - unguided).abs().mean() < 0.1 * unguided.abs().mean()


def test_null_text_brings_the_guided_reconstruction_nearer_to_the_picture(editor) -> None:
    spec = EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None)

    def error(method: str, **options: object) -> float:
        source = editor.invert(picture(), "a cat on grass", steps=STEPS, method=method, **options)
        with pytest.warns(UserWarning, match="identity"):
            result = editor.edit(source, spec, guidance_scale=3.0)
        return float((result.latents - source.trajectory.clean).square().mean())

    assert error("null_text", guidance_scale=3.0, inner_steps=8) < 0.95 * error("direct")


def test_subjects_are_refused_by_models_that_take_none(editor) -> None:
    source = editor.invert(picture(), "a cat on grass", steps=2)
    for job in (
        lambda: editor.edit(source, swap_subject("cat", Subject(picture(), "dog"))),
        lambda: editor.generate("a dog", subject=Subject(picture(), "dog"), steps=2),
    ):
        with pytest.raises(SubjectError, match="BLIP-Diffusion"):
            job()


def test_a_lora_takes_part_in_edits() -> None:
    peft = pytest.importorskip("peft")
    pipeline = tiny_pipelines.stable_diffusion_1()
    editor = Editor.from_pipeline(pipeline)
    plain = editor.generate("a cat on grass", seed=0, steps=2)
    torch.manual_seed(1)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted = Editor.from_pipeline(pipeline)
    source = adapted.generate("a cat on grass", seed=0, steps=2)
    assert not torch.allclose(source.trajectory.clean, plain.trajectory.clean, atol=1e-3)
    assert source.trajectory.fingerprint != plain.trajectory.fingerprint
    with pytest.warns(UserWarning, match="identity"):
        same = adapted.edit(source, EditSpec(prompt="a cat on grass", cross_replace=0, self_replace=0, blend=None))
    assert torch.equal(same.latents, source.trajectory.clean)
    assert adapted.edit(source, EditSpec(prompt="a dog on grass", blend=None)).unet_rows <= 6


def test_an_adapter_that_control_would_drop_is_refused_whenever_it_came() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipeline = tiny_pipelines.stable_diffusion_1()
    editor = Editor.from_pipeline(pipeline)
    source = editor.generate("a cat on grass", seed=0, steps=2)
    foreign = IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=24)
    plain = pipeline.unet.attn_processors
    pipeline.unet.set_attn_processor({name: foreign if "attn2" in name else own for name, own in plain.items()})
    for job in (
        lambda: editor.edit(source, EditSpec(prompt="a dog on grass")),
        lambda: editor.invert(picture(), "a cat", steps=2),
        lambda: editor.generate("a cat", steps=2),
        lambda: Editor.from_pipeline(pipeline),
    ):
        with pytest.raises(HookError, match="IPAdapterAttnProcessor2_0"):
            job()


class Compiler:
    """A backend of `torch.compile` that runs the graph as it is and counts how many it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1
        return graph.forward


def test_a_compiled_network_is_compiled_once_for_each_kind_of_step_not_for_each_step() -> None:
    torch._dynamo.reset()
    pipeline, plain = tiny_pipelines.stable_diffusion_1(), Editor.from_pipeline(tiny_pipelines.stable_diffusion_1())
    compiler = Compiler()
    pipeline.unet = torch.compile(pipeline.unet, backend=compiler)
    editor = Editor.from_pipeline(pipeline)
    assert editor.model.fingerprint == plain.model.fingerprint
    spec = replace("a dog on grass", swap="cat", cross_replace=0.5, self_replace=0.25, blend=Blend(rule="peak"))

    def run(editor: Editor, steps: int):
        source = editor.generate("a cat on grass", seed=0, steps=steps)
        return editor.edit(source, spec, output_type="latent").latents

    assert (run(editor, 4) - run(plain, 4)).abs().max() < 1e-4
    first = compiler.graphs
    assert (run(editor, 8) - run(plain, 8)).abs().max() < 1e-4
    # Twice the steps, the same kinds of them: outside the windows, in one, in both.
    assert compiler.graphs == first
    torch._dynamo.reset()
