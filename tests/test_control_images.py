"""Control pictures: what is drawn, at any size, the same every time, and what is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from p2p_subject import cli
from p2p_subject.control_images import DRAWN, KINDS, CannyDetector, HEDdetector, control_image
from p2p_subject.errors import ArgumentError, ImageError, ModelError


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large spots of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def halves(left: tuple[int, int, int], right: tuple[int, int, int], side: int = 20) -> Image.Image:
    """Two colours side by side."""
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:, : side // 2], pixels[:, side // 2 :] = left, right
    return Image.fromarray(pixels)


def drawn(picture: Image.Image) -> np.ndarray:
    """Where a control picture is not black, (H, W)."""
    return np.asarray(picture).any(axis=-1)


def test_the_command_line_names_the_kinds() -> None:
    assert cli.KINDS == DRAWN and set(DRAWN) < set(KINDS)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(8, 70), height=st.integers(8, 70), kind=st.sampled_from(["canny", "scribble"]))
def test_any_size_keeps_its_size_and_gives_the_same_grey_picture_every_time(width, height, kind) -> None:
    picture = smooth(width, height)
    made, again = control_image(picture, kind), control_image(np.asarray(picture), kind)
    assert made.size == (width, height) and made.mode == "RGB" and np.array_equal(made, again)
    values = np.asarray(made)
    assert (values == values[..., :1]).all()
    if kind == "canny":
        assert set(np.unique(values)) <= {0, 255}


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_where_nothing_changes_nothing_is_drawn(kind) -> None:
    assert not drawn(control_image(Image.new("RGB", (40, 30), (120, 30, 200)), kind)).any()


def test_an_edge_is_one_line_beside_it() -> None:
    line = drawn(control_image(halves((0, 0, 0), (255, 255, 255)), "canny"))
    # Lines end before the frame, where there is no neighbour to compare with.
    inner = line[2:-2]
    assert (inner.sum(axis=1) == 1).all() and set(np.flatnonzero(inner.any(axis=0))) <= {9, 10}


def test_edges_between_colours_of_one_brightness_count() -> None:
    red, green = (200, 0, 0), (0, 102, 0)
    grey = halves(red, green).convert("L").convert("RGB")
    assert not drawn(control_image(grey, "canny")).any()
    assert drawn(control_image(halves(red, green), "canny")).any()


@pytest.mark.parametrize(("low", "high", "found"), [(100, 200, False), (40, 79, True), (40, 81, False), (0, 0, True)])
def test_thresholds_are_levels_of_the_sobel_gradient(low, high, found) -> None:
    # A step of 20 levels: four times that by the Sobel filter.
    step = halves((100, 100, 100), (120, 120, 120))
    assert drawn(control_image(step, "canny", low=low, high=high)).any() == found


def test_blur_removes_what_is_small() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    counts = [drawn(control_image(noise, "canny", sigma=sigma)).sum() for sigma in (0, 1, 3)]
    assert counts[0] > counts[1] > counts[2] == 0


def test_a_scribble_is_thick_soft_and_leaves_specks_out() -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, 64:] = 255
    pixels[20:22, 20:22] = 255
    picture = Image.fromarray(pixels)
    thin, thick = (np.asarray(control_image(picture, "scribble", width=width)) for width in (2, 8))
    assert not thick[:, :50].any() and drawn(control_image(picture, "canny"))[:, :50].any()
    across = thick[64, :, 0]
    # As wide as asked, counted by weight: the rim is soft.
    assert across.max() == 255 and ((across > 0) & (across < 255)).any() and 5 <= across.sum() / 255 <= 10
    assert (thin[64, :, 0] > 0).sum() < (across > 0).sum()


def test_depth_from_a_file_is_brought_to_the_size(tmp_path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 30).astype(np.uint16), (20, 1))
    Image.fromarray(ramp).save(tmp_path / "depth.png")
    made = control_image(smooth(60, 40), "depth", file=tmp_path / "depth.png")
    values = np.asarray(made)[..., 0].astype(int)
    assert made.size == (60, 40) and made.mode == "RGB" and values[0, 0] < 5 and values[0, -1] > 250
    assert (np.diff(values[20]) >= 0).all()


def test_depth_by_a_model_of_transformers(tmp_path) -> None:
    import torch
    from transformers import GLPNConfig, GLPNForDepthEstimation, GLPNImageProcessor

    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GLPNForDepthEstimation(GLPNConfig(num_encoder_blocks=4, **sizes)).save_pretrained(tmp_path)
    GLPNImageProcessor().save_pretrained(tmp_path)
    picture = smooth(70, 50)
    made = control_image(picture, "depth", model=str(tmp_path))
    assert made.size == (70, 50) and made.mode == "RGB" and np.ptp(np.asarray(made)) > 100
    assert np.array_equal(made, control_image(picture, "depth", model=str(tmp_path)))
    with pytest.raises(ModelError, match="cannot be loaded for depth estimation"):
        control_image(picture, "depth", model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cany", {}, "kind='cany'; Did you mean 'canny'. expected one of"),
        (None, {}, "kind=None"),
        ("canny", {"lo": 3}, "canny takes no 'lo'; Did you mean 'low'. its options"),
        ("canny", {"low": 300}, "low=300 is above high=200"),
        ("canny", {"low": -1}, "low=-1; expected a number of 0 or more"),
        ("canny", {"high": float("nan")}, "high=nan; expected"),
        ("canny", {"sigma": "1"}, "sigma='1'; expected"),
        ("scribble", {"width": 0}, "width=0; expected a number above 0"),
        ("depth", {}, "neither of file and model"),
        ("depth", {"file": "a.png", "model": "b"}, "both of file and model"),
    ],
)
def test_what_is_refused_is_named(kind, options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        control_image(smooth(16, 16), kind, **options)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ImageError, match="no such file"):
        control_image("nowhere.png", "canny")
    with pytest.raises(ImageError, match="depth 'nowhere.png': there is no such file"):
        control_image(smooth(16, 16), "depth", file="nowhere.png")


def test_the_detector_of_edges_is_called_as_scripts_call_it() -> None:
    picture, detector = smooth(50, 30), CannyDetector()
    edges = detector(picture, 30, 70, output_type="pil")
    assert np.array_equal(edges, control_image(picture, "canny", low=30, high=70))
    as_array = detector(np.asarray(picture), low_threshold=30, high_threshold=70, output_type="np")
    assert isinstance(as_array, np.ndarray) and np.array_equal(as_array, edges)
    assert np.array_equal(detector(picture), control_image(picture, "canny"))
    with pytest.raises(ArgumentError, match="output_type='pt'; expected 'pil' or 'np'"):
        detector(picture, output_type="pt")


def test_the_detector_of_learned_edges_is_that_of_controlnet_aux_or_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(ModelError, match="pip install controlnet_aux.*'scribble'"):
        HEDdetector.from_pretrained("lllyasviel/Annotators")
    theirs = SimpleNamespace(HEDdetector=SimpleNamespace(from_pretrained=lambda name, **options: (name, options)))
    monkeypatch.setitem(sys.modules, "controlnet_aux", theirs)
    assert HEDdetector.from_pretrained("lllyasviel/Annotators", cache_dir="a") == ("lllyasviel/Annotators", {"cache_dir": "a"})
