"""Sources as values and as files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from inversion import OutputError, Schedule, Trajectory, TrajectoryError
from inversion.trajectory import write_safetensors
from p2p_subject import Source
from p2p_subject.images import Frame


def made(seed: int = 0, subject: bool = False) -> Source:
    """A source of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = Trajectory(
        torch.randn(3, 4, 2, 2, generator=generator), Schedule((2, 1), (0.4, 0.5), 1.0), "a cat", "ddim", fingerprint="abc"
    )
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    embeddings = torch.randn(1, 4, 8, generator=generator) if subject else None
    attention = torch.rand(6, 2, 2, generator=generator)
    return Source(trajectory, Image.fromarray(pixels), Frame((12, 9), (16, 16)), attention, embeddings)


def test_sources_are_compared_by_identity() -> None:
    one, other = made(), made()
    assert one == one and one != other and other in [one, other] and len({one, other}) == 2


@pytest.mark.parametrize("subject", [False, True])
def test_sources_survive_saving(tmp_path, subject) -> None:
    source = made(subject=subject)
    source.save(tmp_path / "a.safetensors")
    read = Source.load(tmp_path / "a.safetensors")
    assert torch.equal(read.trajectory.latents, source.trajectory.latents) and read.prompt == "a cat"
    assert np.array_equal(read.image, source.image) and read.frame == source.frame
    assert torch.equal(read.attention, source.attention)
    assert torch.equal(read.subject, source.subject) if subject else read.subject is None


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(OutputError, match="create it first"):
        made().save(tmp_path / "missing" / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": None}, "attention missing; a saved source needs image, model_size, attention"),
        ({"attention": None, "model_size": None}, "model_size, attention missing"),
        ({"image": None}, r"without its picture \(image\); read it with Trajectory.load"),
        ({"image": torch.zeros(9, 12, 3)}, r"image is \(9, 12, 3\) torch.float32; expected \(any, any, 3\) torch.uint8"),
        ({"model_size": torch.tensor([1, 2, 3])}, r"model_size is \(3,\)"),
        ({"attention": torch.zeros(6, 4)}, r"attention is \(6, 4\)"),
    ],
)
def test_a_file_that_is_no_whole_source_is_refused_by_what_is_wrong(tmp_path, change, message) -> None:
    path = tmp_path / "a.safetensors"
    source = made()
    tensors, metadata = source.trajectory.pack()
    tensors |= {
        "image": torch.from_numpy(np.array(source.image)),
        "model_size": torch.tensor([16, 16]),
        "attention": source.attention,
    }
    write_safetensors(path, {name: value for name, value in (tensors | change).items() if value is not None}, metadata)
    with pytest.raises(TrajectoryError, match=message):
        Source.load(path)
