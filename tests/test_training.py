"""The world is reproducible and its splits are apart; training resumes to the same weights; tokenizers know the world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import BertTokenizer, CLIPTokenizer

from p2p_subject.training import world
from p2p_subject.training.attention_loss import coverage_loss, explicit_attention
from p2p_subject.training.backgrounds import PAINTERS, PHRASES, paint
from p2p_subject.training.loop import RunConfig, learning_rate, run
from p2p_subject.training.representation import RepresentationTrainer, start_from_model
from p2p_subject.training.scenes import Cache, Shares, make_cache
from p2p_subject.training.tokenizers import WORDS, save_clip_tokenizer, save_word_piece_tokenizer
from p2p_subject.training.vae import VAETrainer, fold_statistics, scene_batch


@given(split=st.sampled_from(world.SPLITS), index=st.integers(0, 10**9))
@settings(deadline=None, max_examples=40)
def test_scenes_are_a_function_of_split_and_index(split: str, index: int) -> None:
    scene, again = world.draw(world.sample(split, index)), world.draw(world.sample(split, index))
    assert np.array_equal(scene.image, again.image) and np.array_equal(scene.alpha, again.alpha)
    assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
    assert 0.01 < scene.mask.mean() < 0.5
    words = scene.spec.caption(tint=True).split()
    assert scene.spec.look.category in words and words[0] == ("an" if words[1][0] in "aeiou" else "a")


@given(index=st.integers(0, 10**9))
@settings(deadline=None, max_examples=100)
def test_held_out_looks_never_occur_in_training(index: int) -> None:
    def held_out_hue(look: world.Look) -> bool:
        return look.hue is not None and any(low <= look.hue <= high for low, high in world.HELD_OUT_HUES)

    def held_out_art(look: world.Look) -> bool:
        return (look.category, look.source) in world.HELD_OUT_ART

    for split in ("train", "validation", "test"):
        look = world.sample(split, index).look
        assert not held_out_hue(look) and not held_out_art(look)
    new_hue, new_art = world.sample("new_hue", index).look, world.sample("new_art", index).look
    assert held_out_hue(new_hue) and not held_out_art(new_hue) and held_out_art(new_art)


@given(index=st.integers(0, 10**6), other=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_the_true_answer_of_a_swap_differs_in_the_subject_only(index: int, other: int) -> None:
    before = world.draw(world.sample("test", index))
    after = world.draw(before.spec.with_look(world.sample("new_hue", other).look))
    outside = (before.alpha == 0) & (after.alpha == 0)
    assert outside.any() and np.array_equal(before.image[outside], after.image[outside])


def test_every_category_has_art_of_every_source_and_every_background_a_phrase() -> None:
    for category in world.CATEGORIES:
        for source in world.SOURCES:
            cut = world.cut_out(world.Look(category, source, 200.0), 32)
            assert max(cut.shape[:2]) == 32 and cut[..., 3].max() > 0.9 and cut.min() >= 0 and cut.max() <= 1
    assert set(PHRASES) == set(PAINTERS) and len(PAINTERS) == 12 and len(world.HELD_OUT_ART) == 12
    for name in PAINTERS:
        picture = paint(name, 1, 64)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.float32 and 0 <= picture.min() <= picture.max() <= 1


@given(a=st.floats(0, 360), b=st.floats(0, 360))
def test_hue_distance_is_a_distance_on_the_circle(a: float, b: float) -> None:
    assert 0 <= world.hue_distance(a, b) <= 180 and world.hue_distance(a, a) == 0
    assert world.hue_distance(a, b) == pytest.approx(world.hue_distance(b, a), abs=1e-6)
    assert world.hue_distance(a + 360, b) == pytest.approx(world.hue_distance(a, b), abs=1e-6)


def test_every_word_of_the_world_is_one_token_and_others_fall_apart(tmp_path) -> None:
    save_clip_tokenizer(tmp_path / "clip")
    save_word_piece_tokenizer(tmp_path / "bert")
    clip, bert = CLIPTokenizer.from_pretrained(tmp_path / "clip"), BertTokenizer.from_pretrained(tmp_path / "bert")
    assert all(len(clip.tokenize(word)) == 1 for word in WORDS) and len(clip.tokenize("zeppelin")) > 3
    assert all(len(bert.tokenize(word)) == 1 for word in WORDS) and bert.tokenize("Dog") == ["dog"]
    assert clip("a dog").input_ids[0] == clip.bos_token_id != clip.eos_token_id and clip.model_max_length == 24


class Line(nn.Module):
    """The smallest thing to train: y = a x + noise drawn from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        target = x.sum(-1, keepdim=True) + 0.1 * torch.randn(len(x), 1)
        return {"loss": (self.layer(x) - target).square().mean()}


def line_batches(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 3, generator=torch.Generator().manual_seed(step * world_size + rank))}


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path) -> None:
    def config(name: str, steps: int = 20) -> RunConfig:
        return RunConfig(tmp_path / name, steps, 0.05, warmup=2, decay_from=1.0, log_every=5, checkpoint_every=5)

    def killed(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        if step == 13:
            raise KeyboardInterrupt
        return line_batches(step, rank, world_size)

    run(config("whole"), Line, line_batches)
    with pytest.raises(KeyboardInterrupt):
        run(config("killed"), Line, killed)
    run(config("killed"), Line, line_batches)
    whole, resumed = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path) -> None:
    def broken(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        batch = line_batches(step, rank, world_size)
        return {"x": batch["x"] * (float("nan") if step == 6 else 1)}

    with pytest.raises(FloatingPointError, match="step 6"):
        run(RunConfig(tmp_path / "r", 10, 0.05, checkpoint_every=5), Line, broken)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "r" / "checkpoint.safetensors").values())


@given(step=st.integers(0, 999), decay_from=st.floats(0, 1))
def test_the_learning_rate_rises_stays_and_falls(step: int, decay_from: float) -> None:
    config = RunConfig("x", 1000, 1.0, warmup=100, decay_from=max(decay_from, 0.1))
    rate = learning_rate(config, step)
    assert 0 < rate <= 1
    assert rate == (step + 1) / 100 if step < 100 else rate <= learning_rate(config, step - 1) or step == 100


def test_folding_gives_unit_latents_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = VAETrainer().vae.eval()
    images = scene_batch(np.arange(16))
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        fold_statistics(vae, images)
        latents = vae.encode(images).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3)


def test_representation_learning_takes_a_step_with_every_part_in_it(tmp_path) -> None:
    torch.manual_seed(0)
    VAETrainer().vae.save_pretrained(tmp_path / "vae")
    make_cache(tmp_path / "scenes", tmp_path / "vae", 70)
    batch = Cache(tmp_path / "scenes").batch(np.arange(58, 70), np.arange(12) % 2 == 0, Shares(0.25, 0.25))
    assert batch["split"].tolist() == [6, 3, 3] and batch["latents"].shape == (12, 4, 16, 16)
    clip = CLIPTokenizer.from_pretrained(tmp_path / "scenes" / "tokenizer")
    for row, index in enumerate(range(58, 70)):
        spec = world.sample("train", index)
        category, background = (clip.decode([int(batch["ids"][row, c])]).strip() for c in batch["columns"][row])
        assert category == spec.look.category and background == PHRASES[spec.background].split()[-1]
    trainer = RepresentationTrainer(attention_weight=0.05)
    losses = trainer(**batch)
    losses["loss"].backward()
    assert set(losses) == {"loss", "denoising", "auxiliary", "category", "coverage"}
    for part in (trainer.unet, trainer.text_encoder, trainer.qformer.visual_encoder, trainer.qformer.proj_layer):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_explicit_attention_computes_what_the_network_does() -> None:
    torch.manual_seed(0)
    unet = RepresentationTrainer().unet.eval()
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 128)
    with torch.no_grad():
        plain = unet(latents, 100, context).sample
        with explicit_attention(unet, 16) as maps:
            explicit = unet(latents, 100, context).sample
    assert torch.allclose(plain, explicit, atol=1e-4) and len(maps) == 3
    assert all(m.shape == (2, 256, 24) and torch.allclose(m.sum(-1), torch.ones(2, 256), atol=1e-5) for m in maps)


def test_coverage_is_best_where_the_word_covers_the_object() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:3, 1:3] = 1
    inside = mask.flatten(1)
    columns = torch.tensor([[2, 4]])

    def loss(word: torch.Tensor) -> float:
        maps = torch.full((1, 16, 6), 1e-3)
        maps[..., 2], maps[..., 4] = word, 0.4 * (1 - word / 0.4)
        return float(coverage_loss([maps], columns, mask, 0, 2, 4))

    peaked = 0.4 * inside * torch.tensor([1.0 if i == 5 else 0.05 for i in range(16)])
    assert loss(0.4 * inside) < loss(peaked) < loss(0.4 * (1 - inside))


def test_training_can_go_on_from_a_model_folder(miniature_folder) -> None:
    trainer, other = RepresentationTrainer(), RepresentationTrainer()
    start_from_model(trainer, miniature_folder)
    start_from_model(other, miniature_folder)
    assert all(torch.equal(a, b) for a, b in zip(trainer.unet.state_dict().values(), other.unet.state_dict().values()))
    stored = load_file(miniature_folder / "qformer" / "model.safetensors")["query_tokens"]
    assert torch.equal(trainer.qformer.query_tokens, stored)
