"""Pictures in and out: every kind gives the same input, what is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blip_tiny import deviation, picture
from PIL import Image

from p2p_subject.blip_diffusion import (
    BlipImageProcessor,
)
from p2p_subject.errors import ImageError, ModelError


def test_every_kind_of_picture_gives_the_same_input():
    image = picture(3)
    array = np.asarray(image)
    floats = array.astype(np.float32) / 255
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    processor = BlipImageProcessor(size=32)
    expected = processor.preprocess(image)
    assert expected.shape == (1, 3, 32, 32) and expected.dtype == torch.float32
    for kind in (
        array,
        floats,
        tensor,
        tensor / 255,
        array[None],
        tensor[None] / 255,
        [image],
        image.convert("RGBA"),
    ):
        assert torch.equal(processor.preprocess(kind), expected)


def test_a_batch_is_its_pictures():
    processor, first, second = BlipImageProcessor(size=32), picture(1), picture(2, 50, 50)
    together = processor.preprocess([first, second])
    assert torch.equal(together, torch.cat([processor.preprocess(first), processor.preprocess(second)]))


def test_switches_are_respected():
    image = picture(4, 32, 32)
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    raw = BlipImageProcessor(size=32, do_rescale=False, do_normalize=False)
    assert torch.equal(raw.preprocess(image), array)
    assert deviation(BlipImageProcessor(size=32, do_normalize=False).preprocess(image), array / 255) < 1e-7
    floats = BlipImageProcessor(size=32, do_rescale=False, do_normalize=False).preprocess(array[0] / 255)
    assert deviation(floats, array / 255) < 1e-7


@pytest.mark.parametrize(("have", "want"), [((10, 6), (4, 4)), ((4, 4), (7, 8)), ((10, 3), (5, 8))])
def test_cropping_alone_keeps_the_middle(have, want):
    image = picture(5, width=have[1], height=have[0])
    processor = BlipImageProcessor(
        size={"height": want[0], "width": want[1]}, do_resize=False, do_rescale=False, do_normalize=False
    )
    actual = processor.preprocess(image)[0]
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    for axis in (0, 1):
        margin = (have[axis] - want[axis]) // 2
        whole = whole.narrow(axis + 1, max(margin, 0), min(have[axis], want[axis]))
        pad = [0, 0, 0, 0]
        if margin < 0:
            pad[2 - 2 * axis : 4 - 2 * axis] = -margin, want[axis] - have[axis] + margin
        whole = torch.nn.functional.pad(whole, pad)
    assert torch.equal(actual, whole)


@pytest.mark.parametrize(
    "bad",
    [
        "dog.png",
        None,
        [],
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.full((4, 4, 3), 1.5, np.float32),
        np.full((4, 4, 3), np.nan, np.float32),
        np.zeros((4, 4, 3), np.int64),
        torch.zeros(4, 4, 3),
        torch.full((3, 4, 4), -0.1),
        Image.new("I;16", (4, 4)),
    ],
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ImageError):
        BlipImageProcessor(size=32).preprocess(bad)


@pytest.mark.parametrize("options", [{"size": {"shortest_edge": 3}}, {"image_mean": [1, 2]}, {"image_std": "x"}])
def test_impossible_processors_are_refused(options):
    with pytest.raises(ModelError, match=next(iter(options))):
        BlipImageProcessor(**options)


def test_samples_become_pictures():
    samples = torch.tensor([-1.5, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    expected = torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    assert torch.equal(BlipImageProcessor.postprocess(samples, "pt")[0, 0], expected)
    assert np.array_equal(BlipImageProcessor.postprocess(samples.bfloat16(), "np")[0, :, :, 0], expected.numpy())
    assert np.asarray(BlipImageProcessor.postprocess(samples)[0])[..., 0].tolist() == [[0, 0], [128, 255]]
