"""Parity with the published prompt-to-prompt controllers, through the public API: every case of the golden values."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from p2p_subject import Blend, Editor, EditSpec
from tests.conftest import golden

NAMES = ["replace_word", "replace_longer_word", "refine_insert", "refine_blend", "replace_blend", "reweight", "reweight_blend"]


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(golden("prompt_to_prompt/checkpoint"))


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    return {case["name"]: case for case in json.loads(golden("prompt_to_prompt/cases.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    return load_file(golden("prompt_to_prompt/golden.safetensors"))


def spec_of(case: dict) -> EditSpec:
    """A case of the reference in the words of the library.

    The reference gates cross-attention in the steps i < int(f * (steps + 1)); self-attention is replaced up to 32x32, masks are
    read from the maps of all past steps, and padding is aligned by its column.
    """
    steps, blend = case["steps"], None
    if case["blend_words"]:
        ours, theirs = case["blend_words"]
        blend = Blend(
            tuple(ours),
            tuple(theirs),
            rule="peak",
            threshold=case["blend_threshold"],
            start=case["blend_start"],
            maps="running",
        )
    weights = case["equalizer"] and dict(zip(case["equalizer"]["words"], case["equalizer"]["values"]))
    return EditSpec(
        prompt=case["prompts"][1],
        alignment=case["kind"],
        padding="reference",
        cross_replace=int(case["cross_replace_steps"] * (steps + 1)) / steps,
        self_replace=case["self_replace_steps"],
        self_resolution=32,
        weights=weights or {},
        blend=blend,
    )


@pytest.mark.parametrize("recorded", [False, True], ids=["three rows", "recorded"])
@pytest.mark.parametrize("name", NAMES)
def test_edits_equal_the_published_controllers(editor, cases, values, name, recorded) -> None:
    case = cases[name]
    source = editor.generate(
        case["prompts"][0],
        latents=values[f"{name}.noise"],
        steps=case["steps"],
        guidance_scale=case["guidance_scale"],
    )
    if recorded:
        source = editor.record(source, cross_replace=1.0, self_replace=1.0, self_resolution=32)
    assert (source.trajectory.clean - values[f"{name}.latents"][:1]).abs().max() < 2e-3
    result = editor.edit(source, spec_of(case), output_type="latent")
    assert (result.latents - values[f"{name}.latents"][1:]).abs().max() < 2e-3
    # The edit is not the source: what is compared was changed.
    assert (result.latents - source.trajectory.clean).abs().max() > 0.1
    assert result.unet_rows <= (2 if recorded else 3) * case["steps"]


def test_every_case_is_compared(cases) -> None:
    assert sorted(cases) == sorted(NAMES)
