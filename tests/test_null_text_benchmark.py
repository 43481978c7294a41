"""The null-text benchmark: what it counts, and that its published loop is the published one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import null_text as benchmark
from inversion import null_text
from p2p_subject.models import Model
from p2p_subject.training import world

STEPS = 2


@pytest.fixture(scope="module")
def model(miniature_folder) -> Model:
    return Model.load(miniature_folder)


def test_rows_are_counted_and_ratios_printed(model) -> None:
    published, frozen, ours, batched = benchmark.measure(model, pictures=2, steps=STEPS, scale=4.0)
    assert (frozen.forward, frozen.backward, frozen.error) == (published.forward, published.backward, published.error)
    assert all(weight.requires_grad and weight.grad is None for weight in model.unet.parameters())
    # Of each picture: the path, then a conditional row, 10 inner steps at most, and two rows in each step.
    assert published.forward == 2 * STEPS * (1 + 1 + 2) + published.backward
    assert 2 * STEPS <= published.backward <= 2 * STEPS * 10
    assert ours.forward == 2 * STEPS * (1 + 1 + 1) + ours.backward and 0 <= ours.backward <= 2 * STEPS * 3
    assert abs(batched.rows - ours.rows) <= 6
    assert ours.rows == ours.forward + 2 * ours.backward < published.rows
    assert all(cost.seconds > 0 and cost.error >= 0 and cost.psnr > 0 for cost in (published, ours))
    lines = benchmark.table([published, ours, batched])
    assert lines[1].startswith("published") and "1.00x" in lines[1]
    assert f"{published.rows / ours.rows:.2f}x" in lines[2] and len({len(line) for line in lines}) == 1


def test_the_published_loop_finds_what_the_published_descent_finds(model) -> None:
    scene = world.draw(world.sample("test", 0))
    caption, schedule = scene.spec.caption(), model.schedule(STEPS)
    latents = model.encode_images([scene.picture])
    network = benchmark.Network(model, model.unconditional())
    with torch.no_grad():
        null, context = (model.encode(model.layout(text)).tokens.float() for text in ("", caption))
    with model.frozen():
        (theirs,) = benchmark.published(network, latents, [caption], schedule, 4.0)
        made = null_text(network, latents, schedule, context, null, guidance_scale=4.0, optimiser="adam")
    assert torch.allclose(made.latents, theirs.latents, atol=1e-5)
    assert (made.null_embeddings - theirs.null_embeddings).abs().max() < 1e-3
    error, likeness = benchmark.errors(network, theirs, scene.image)
    assert error >= 0 and likeness > 0
