"""The world is reproducible and its splits are apart; training resumes to the same weights; tokenizers know the world."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertTokenizer, CLIPTokenizer

from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.errors import ArgumentError
from p2p_subject.models import Model
from p2p_subject.training import world
from p2p_subject.training.attention_loss import coverage_loss, explicit_attention
from p2p_subject.training.backgrounds import PAINTERS, PHRASES, paint
from p2p_subject.training.denoising import Denoising
from p2p_subject.training.loop import RunConfig, learning_rate, run, train
from p2p_subject.training.miniature import LEARNING, SETTINGS, networks
from p2p_subject.training.multimodal import MultimodalTrainer
from p2p_subject.training.representation import Shares, SubjectLearning, SubjectTrainer, empty_prompt, start
from p2p_subject.training.scenes import Cache, caption_batches, make_cache
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
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


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


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp("scenes")
    torch.manual_seed(0)
    VAETrainer().vae.save_pretrained(folder / "vae")
    make_cache(folder / "scenes", folder / "vae", 70)
    return Cache(folder / "scenes")


def miniature_trainer(learning: SubjectLearning = LEARNING) -> SubjectTrainer:
    return SubjectTrainer(**networks(), **SETTINGS, learning=learning)


def test_a_batch_says_where_its_words_stand(cache, tmp_path) -> None:
    batch = cache.batch(np.arange(58, 70), np.arange(12) % 2 == 0)
    assert batch["latents"].shape == (12, 4, 16, 16)
    save_clip_tokenizer(tmp_path)
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    for row, index in enumerate(range(58, 70)):
        spec = world.sample("train", index)
        category, background = (clip.decode([int(batch["ids"][row, c])]).strip() for c in batch["columns"][row])
        assert category == spec.look.category and background == PHRASES[spec.background].split()[-1]


def test_representation_learning_takes_a_step_with_every_part_in_it(cache) -> None:
    torch.manual_seed(0)
    trainer = miniature_trainer(replace(LEARNING, attention_weight=0.05)).train()
    losses = trainer(**cache.batch(np.arange(12), np.arange(12) % 2 == 0))
    losses["loss"].backward()
    assert set(losses) == {"loss", "denoising", "auxiliary", "category", "coverage"}
    for part in (trainer.unet, trainer.text_encoder, trainer.qformer.visual_encoder, trainer.qformer.proj_layer):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, {"qformer.visual_encoder"}),
        ({"train_text_encoder": False}, {"qformer.visual_encoder", "text_encoder"}),
        ({"category_text": False}, {"qformer.visual_encoder"}),
        ({"shares": Shares(0.0, 0.0)}, {"qformer.visual_encoder"}),
    ],
)
def test_the_papers_recipe_and_its_ablations_train_what_they_say(cache, changes: dict, frozen: set[str]) -> None:
    torch.manual_seed(0)
    trainer = miniature_trainer(SubjectLearning(**changes)).train()
    batch = cache.batch(np.arange(8), np.zeros(8))
    trainer(**batch)["loss"].backward()
    for name in ("unet", "text_encoder", "qformer.encoder", "qformer.visual_encoder"):
        moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.get_submodule(name).parameters())
        assert moved == (name not in frozen), name
    words = trainer.qformer.embeddings.word_embeddings.weight.grad
    assert (words is not None and words.abs().sum() > 0) == changes.get("category_text", True)


def test_shares_leave_out_subject_and_caption_in_expectation() -> None:
    torch.manual_seed(0)
    for count in (1, 2, 3, 16):
        drawn = np.array([Shares(0.15, 0.1).split(count) for _ in range(4000)])
        assert (drawn.sum(1) == count).all() and (drawn >= 0).all()
        assert np.allclose(drawn.mean(0) / count, (0.75, 0.15, 0.1), atol=0.025)
    assert Shares(0.25, 0.25).split(8) == [4, 2, 2] and Shares(0.0, 0.0).split(5) == [5, 0, 0]


def test_the_subject_is_left_out_as_often_as_in_the_paper() -> None:
    shares = SubjectLearning().shares
    assert np.isclose(shares.caption_only + shares.neither, 0.15)


@pytest.mark.parametrize("split", [[0, 1, 0], [0, 0, 1], [1, 0, 0], [2, 0, 0], [0, 2, 1]])
def test_no_network_is_called_without_rows(cache, monkeypatch, split: list[int]) -> None:
    """Fused kernels on GPUs refuse such calls; every process has gradients of the same weights, whatever its rows are."""
    torch.manual_seed(0)
    trainer = miniature_trainer(replace(LEARNING, attention_weight=0.05)).train()
    monkeypatch.setattr(Shares, "split", lambda self, count: split)

    def refuse(module, inputs, named) -> None:
        given = [value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor) and value.ndim]
        assert all(len(value) > 0 for value in given), type(module).__name__

    for module in list(trainer.modules())[1:]:
        module.register_forward_pre_hook(refuse, with_kwargs=True)
    losses = trainer(**cache.batch(np.arange(sum(split)), np.zeros(sum(split))))
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    for part in (trainer.unet, trainer.text_encoder, trainer.qformer.visual_encoder, trainer.qformer.proj_layer):
        assert any(parameter.grad is not None for parameter in part.parameters())


def test_rows_are_told_what_the_pipelines_would_tell_them(cache, miniature_folder) -> None:
    pipeline = BlipDiffusionPipeline.from_pretrained(miniature_folder)
    model = Model.of(pipeline)
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.qformer, pipeline.scheduler.config, empty_prompt(pipeline))
    trainer = SubjectTrainer(*parts).eval()
    batch = cache.batch(np.arange(5), np.zeros(5))
    rows = {name: batch[name] for name in ("references", "ids", "category_ids", "category_mask")}
    captions = [world.sample("train", index).caption() for index in range(5)]
    with torch.no_grad():
        subject, context = trainer.encoded(**rows, split=[2, 2, 1])
        expected = [model.encode(model.layout(text, subject=True), own[None]).tokens for text, own in zip(captions, subject)]
        expected += [model.encode(model.layout(text)).tokens for text in captions[2:4]] + [model.unconditional().tokens]
    assert len(subject) == 2 and torch.allclose(context, torch.cat(expected), atol=1e-5)


def test_pictures_train_as_their_latents_do(cache) -> None:
    """With an autoencoder in the trainer, batches hold pictures; its weights are in no checkpoint."""
    torch.manual_seed(0)
    vae = VAETrainer().vae
    trainer = SubjectTrainer(**networks(), **SETTINGS, vae=vae)
    pixels = scene_batch(np.arange(4))
    drawn = trainer.clean(pixels, None)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    assert drawn.shape == (4, 4, 16, 16) and torch.allclose(drawn, posterior.mean, atol=6 * float(posterior.std.max()))
    assert not any(name.startswith("vae.") for name in trainer.state_dict())
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    trainer.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("max_snr", [None, 5.0])
def test_the_denoising_loss_is_that_of_the_formula(prediction: str, max_snr: float | None) -> None:
    """In each way of predicting, min-SNR weighs the error of the clean latents by min(SNR, 5) (Hang et al. 2023)."""
    torch.manual_seed(0)
    denoising = Denoising({**SETTINGS["scheduler"], "prediction_type": prediction}, max_snr)
    clean, guess = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    seen = {}

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = denoising.alphas[t].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        # What a network answers whose guess of the clean latents is `guess`.
        guessed_noise = (noisy - alpha.sqrt() * guess) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * guessed_noise - (1 - alpha).sqrt() * guess
        answer = {"epsilon": guessed_noise, "v_prediction": velocity, "sample": guess}[prediction]
        true = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean, "sample": clean}
        snr = alpha / (1 - alpha)
        error = (guess - clean).square()
        plain = (answer - true[prediction]).square()
        seen["loss"] = (plain if max_snr is None else error * snr.clamp(max=max_snr)).mean()
        return answer

    loss = denoising(predict, clean)
    assert torch.allclose(loss, seen["loss"], rtol=1e-2)


def test_explicit_attention_computes_what_the_network_does() -> None:
    torch.manual_seed(0)
    unet = networks()["unet"].eval()
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


def test_training_can_go_on_from_a_model_folder_and_from_runs_of_any_stage(miniature_folder, tmp_path) -> None:
    trainer = miniature_trainer()
    start(trainer, miniature_folder)
    stored = load_file(miniature_folder / "qformer" / "model.safetensors")["query_tokens"]
    assert torch.equal(trainer.qformer.query_tokens, stored)
    unet = {name: value.clone() for name, value in trainer.unet.state_dict().items()}
    other = networks()["qformer"]
    save_file({f"qformer.{name}": value for name, value in other.state_dict().items()}, tmp_path / "ema.safetensors")
    start(trainer, tmp_path / "ema.safetensors")
    assert torch.equal(trainer.qformer.query_tokens, other.query_tokens)
    assert all(torch.equal(value, unet[name]) for name, value in trainer.unet.state_dict().items())
    save_file({"word": torch.zeros(1)}, tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds none of unet, text_encoder, qformer"):
        start(trainer, tmp_path / "nothing.safetensors")


def test_batches_that_are_accumulated_make_the_step_of_one_large_batch(tmp_path) -> None:
    class Exact(Line):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x) - x.sum(-1, keepdim=True)).square().mean()}

    def config(name: str, **changes) -> RunConfig:
        return RunConfig(tmp_path / name, 6, 0.05, warmup=1, decay_from=1.0, checkpoint_every=6, precision="no", **changes)

    def large(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        return {"x": torch.cat([line_batches(2 * step + part, 0, 1)["x"] for part in (0, 1)])}

    def split(step: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        return {"x": large(step, 0, 1)["x"].chunk(world_size)[rank]}

    run(config("large"), Exact, large)
    run(config("accumulated", accumulate=2), Exact, line_batches)
    run(config("two", processes=2), Exact, split)
    weights = [load_file(tmp_path / name / "ema.safetensors")["layer.weight"] for name in ("large", "accumulated", "two")]
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and torch.allclose(weights[0], weights[2], atol=1e-6)


def test_where_a_row_stands_says_nothing_of_its_timestep() -> None:
    """The last rows of a batch have no caption: they must meet every noise level as the others do."""
    torch.manual_seed(0)
    denoising = Denoising(SETTINGS["scheduler"], central=0.5)
    times = torch.stack([denoising.timesteps(16) for _ in range(2000)])
    late = (times >= 950).float().mean(0)
    assert late.min() > 0.6 * late.mean() and late.max() < 1.5 * late.mean()
    assert (times[:, 0] < 50).float().mean() > 0.01


SHORT = {"learning_rate": 1e-3, "warmup": 1, "precision": "no", "processes": 2, "checkpoint_every": 1}


class TestRunsOfTheRealTrainers:
    """Two processes, with and without accumulation: some weights have no gradient, and others never take part."""

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_stage_two(self, cache, tmp_path, accumulate: int) -> None:
        config = RunConfig(tmp_path, 2, accumulate=accumulate, **SHORT)
        run(config, lambda: miniature_trainer(SubjectLearning()), cache.batches(4, 0))
        assert all(value.isfinite().all() for value in load_file(tmp_path / "ema.safetensors").values())

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_stage_one_goes_on_where_it_was(self, tmp_path, accumulate: int) -> None:
        save_word_piece_tokenizer(tmp_path / "pieces")
        pieces = BertTokenizer.from_pretrained(tmp_path / "pieces")

        def build() -> MultimodalTrainer:
            torch.manual_seed(0)
            return MultimodalTrainer(networks()["qformer"], pieces.convert_tokens_to_ids("[DEC]"))

        for steps, name in ((2, "whole"), (1, "parts"), (2, "parts")):
            config = RunConfig(tmp_path / name, steps, accumulate=accumulate, decay_from=1.0, **SHORT)
            run(config, build, caption_batches(pieces, 4, 0))
        whole, parts = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
        assert all(torch.allclose(whole[key].float(), parts[key].float(), atol=1e-6) for key in whole)


def test_a_run_goes_on_with_its_own_settings_alone(cache, tmp_path) -> None:
    config = RunConfig(tmp_path, 1, warmup=1, precision="no", checkpoint_every=1)
    first, frozen = SubjectLearning(), SubjectLearning(train_text_encoder=False)
    train(config, lambda: miniature_trainer(first), cache.batches(2, 0), learning=asdict(first))
    longer = replace(config, steps=2)
    with pytest.raises(ArgumentError, match="holds a run of other settings .learning"):
        train(longer, lambda: miniature_trainer(frozen), cache.batches(2, 0), learning=asdict(frozen))
    with pytest.raises(ArgumentError, match="is of a run that trained text_encoder"):
        run(longer, lambda: miniature_trainer(frozen), cache.batches(2, 0))
    train(longer, lambda: miniature_trainer(first), cache.batches(2, 0), learning=asdict(first))
    assert int(load_file(tmp_path / "checkpoint.safetensors")["step"]) == 2


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_taken(tmp_path) -> None:
    class Steep(Line):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            # The root of nought is nought, and its slope is none.
            return {"loss": ((self.layer(x) * 0).sum()).abs().sqrt()}

    with pytest.raises(FloatingPointError, match="gradient is no number at step 0"):
        run(RunConfig(tmp_path, 2, precision="no"), Steep, line_batches)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_batch_that_cannot_be_shared_out_is_refused(cache) -> None:
    with pytest.raises(ArgumentError, match="a batch of 5 cannot be shared by 2 processes"):
        cache.batches(5, 0)(0, 0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate must be 1 or more"),
        ({"precision": "half"}, "expected 'no', 'bf16' or 'fp16'"),
        ({"processes": 2, "device": "cuda"}, "accelerate launch --num_processes 2"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(tmp_path, 5, **changes)
