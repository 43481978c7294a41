"""Few-step fine-tuning: its loss, its loop, what it leaves alone, and the folder that keeps the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_tiny import picture, tiny_pipeline
from diffusers import ControlNetModel, DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import SCHEDULE, stable_diffusion_1

from p2p_subject import BlipDiffusionPipeline, Editor, Subject, swap_subject
from p2p_subject.errors import (
    ArgumentError,
    ImageError,
    MaskError,
    ModelError,
    ModelMismatchError,
    NonFiniteError,
    OutputError,
    PromptError,
    PromptTooLongError,
    SubjectError,
)
from p2p_subject.finetuning import Settings, network
from p2p_subject.finetuning.loss import row_losses, target
from p2p_subject.finetuning.pictures import encode, read_pictures, split
from p2p_subject.finetuning.result import load_finetuned
from p2p_subject.finetuning.settings import filled
from p2p_subject.finetuning.trainer import Row, Trainer, _order

pytest.importorskip("peft")

PICTURES = [picture(seed) for seed in range(4)]
FAST = {"steps": 3, "grid_prompts": ["a {category}"], "checkpoint_every": 2}
METHODS = {"lora": {"method": "lora", "learning_rate": 1e-2}, "full": {"method": "full", "learning_rate": 1e-3}}


@pytest.fixture(autouse=True)
def small_grids(monkeypatch) -> None:
    """Two sampling steps for the pictures that runs draw."""
    for module in ("grids", "prior", "plan"):
        monkeypatch.setattr(f"p2p_subject.finetuning.{module}.GRID_STEPS", 2)


def pipeline_of(folder: Path, seed: int = 0) -> BlipDiffusionPipeline:
    pipeline = tiny_pipeline(folder, seed)
    pipeline.scheduler = DDIMScheduler(**SCHEDULE)
    return pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved pipeline of random weights."""
    folder = tmp_path_factory.mktemp("base")
    pipeline_of(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def editor(base) -> Editor:
    return Editor.from_pretrained(base)


@pytest.fixture(scope="module", params=METHODS)
def tuned(request, editor):
    return editor.finetune(PICTURES, "dog", steps=4, **METHODS[request.param])


def snapshot(editor: Editor) -> dict[str, torch.Tensor]:
    parts = ("unet", "text_encoder", "vae", "qformer")
    return {
        f"{part}.{name}": weight.clone()
        for part in parts
        for name, weight in getattr(editor.model.pipeline, part).state_dict().items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights_of(result) -> dict[str, torch.Tensor]:
    return result.model.unet.state_dict() | {"embedding": result.subject.embedding}


def drawn(editor: Editor) -> np.ndarray:
    return np.asarray(editor.generate("a dog", subject=editor.subject, seed=0, steps=2).image)


class Killed(BaseException):
    """Stands for a process that is ended."""


def killer(step: int):
    def callback(done: int, loss: float) -> None:
        if done == step:
            raise Killed

    return callback


def watched(monkeypatch) -> list[Row]:
    """Receives the rows whose loss is computed."""
    seen: list[Row] = []
    losses = Trainer.losses
    monkeypatch.setattr(Trainer, "losses", lambda self, rows: seen.extend(rows) or losses(self, rows))
    return seen


class TestLoss:
    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_equals_a_computation_by_hand(self, kind) -> None:
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
        latents, noise, predicted = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        weight = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        times = [7, 900]
        found = row_losses(predicted, target(scheduler, latents, noise, torch.tensor(times)), weight)
        for row, time in enumerate(times):
            betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
            alpha = np.cumprod(1 - betas)[time]
            x, e = (values[row].double().numpy() for values in (latents, noise))
            answers = {"epsilon": e, "v_prediction": alpha**0.5 * e - (1 - alpha) ** 0.5 * x, "sample": x}
            error = ((predicted[row].double().numpy() - answers[kind]) ** 2).mean(0)
            own = weight[row, 0].double().numpy()
            assert float(found[row]) == pytest.approx((error * own).sum() / own.sum(), rel=1e-5)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_the_loss_of_a_step_is_that_of_the_subjects_prompt(self, base, kind, monkeypatch) -> None:
        """One step against the same step written out, with the noise, timesteps and pictures that it drew."""
        editor = Editor.from_pretrained(base)
        editor.model.pipeline.scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
        seen = watched(monkeypatch)
        result = editor.finetune(PICTURES, "dog", steps=1, method="full")
        assert len(seen) == 3
        scheduler = editor.model.pipeline.scheduler
        total = 0.0
        with torch.no_grad():
            subject = editor.model.embed(Subject(PICTURES, "dog"))
            tokens = editor.model.encode(editor.model.layout("a dog", subject=True), subject).tokens
            for row in seen:
                assert torch.allclose(row.tokens, tokens[0], atol=1e-6)
                alpha = scheduler.alphas_cumprod[row.time]
                noisy = alpha.sqrt() * row.view.latents + (1 - alpha).sqrt() * row.noise
                predicted = editor.model.unet(noisy, torch.tensor([row.time]), encoder_hidden_states=tokens).sample
                wanted = {
                    "epsilon": row.noise,
                    "v_prediction": alpha.sqrt() * row.noise - (1 - alpha).sqrt() * row.view.latents,
                    "sample": row.view.latents,
                }[kind]
                total += (predicted - wanted).square().mean().item() / 3
        assert result.history[0]["loss"] == pytest.approx(total, rel=1e-4)
        assert not same(result.model.unet.state_dict(), editor.model.unet.state_dict())

    def test_only_what_the_mask_shows_is_learned(self, editor) -> None:
        mask = np.zeros((28, 40), np.uint8)
        mask[:, :20] = 255
        (masked,) = encode(editor.model, read_pictures([PICTURES[0]], "pictures", [mask]))
        assert masked.weight[..., : masked.weight.shape[-1] // 2 - 1].min() == 1
        assert masked.weight[..., masked.weight.shape[-1] // 2 + 1 :].max() == 0
        predicted = torch.randn(masked.latents.shape, generator=torch.Generator().manual_seed(0))
        elsewhere = masked.latents.clone()
        elsewhere[..., -2:] += 5
        assert row_losses(predicted, elsewhere, masked.weight) == row_losses(predicted, masked.latents, masked.weight)

    @given(count=st.integers(1, 7), seed=st.integers(0, 5))
    @settings(deadline=None, max_examples=25)
    def test_every_picture_counts_equally_often(self, count, seed) -> None:
        rounds = 3
        order = _order(count, range(rounds * count), seed)
        assert all(sorted(order[k * count : (k + 1) * count]) == list(range(count)) for k in range(rounds))


class TestTraining:
    def test_the_model_that_it_starts_from_stays_as_it_is(self, base) -> None:
        editor = Editor.from_pretrained(base)
        before, picture_before = snapshot(editor), np.asarray(editor.generate("a dog", seed=0, steps=2).image)
        locked = {name: weight.requires_grad for name, weight in editor.model.unet.named_parameters()}
        for options in METHODS.values():
            state = torch.random.get_rng_state()
            result = editor.finetune(PICTURES, "dog", steps=2, train_embedding=True, prior_weight=1.0, prior_count=2, **options)
            assert torch.equal(torch.random.get_rng_state(), state)
            assert result.model.fingerprint != editor.model.fingerprint and editor.subject is None
        assert same(snapshot(editor), before)
        assert locked == {name: weight.requires_grad for name, weight in editor.model.unet.named_parameters()}
        assert all(weight.grad is None for weight in editor.model.pipeline.text_encoder.parameters())
        assert np.array_equal(np.asarray(editor.generate("a dog", seed=0, steps=2).image), picture_before)

    def test_lora_shares_the_memory_of_the_model(self, tuned, editor) -> None:
        own, theirs = dict(tuned.model.unet.named_parameters()), dict(editor.model.unet.named_parameters())
        key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        shared = own.get(f"{key}.base_layer.weight", own.get(f"{key}.weight"))
        assert (shared.data_ptr() == theirs[f"{key}.weight"].data_ptr()) is (tuned.settings.method == "lora")

    def test_it_learns(self, editor) -> None:
        for options in METHODS.values():
            history = editor.finetune(PICTURES[:1], "dog", steps=10, validation=PICTURES[:1], **options).history
            measured = [row["validation"] for row in history if "validation" in row]
            assert measured[-1] < 0.99 * measured[0]

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_seed_gives_the_same_weights_and_another_does_not(self, editor, method) -> None:
        first, again, other = (editor.finetune(PICTURES, "dog", steps=2, seed=seed, **METHODS[method]) for seed in (0, 0, 1))
        assert same(weights_of(first), weights_of(again)) and first.history == again.history
        assert not same(weights_of(first), weights_of(other))

    def test_the_encoder_runs_once_and_the_embedding_is_the_mean_unless_it_is_trained(self, base) -> None:
        editor = Editor.from_pretrained(base)
        mean = editor.model.embed(Subject(PICTURES, "dog"))
        calls: list[object] = []
        editor.model.pipeline.qformer.register_forward_hook(lambda *_: calls.append(1))
        plain, trained = (editor.finetune(PICTURES, "dog", steps=3, train_embedding=train) for train in (False, True))
        assert len(calls) == 2
        tuned = plain.editor
        source = tuned.invert(PICTURES[0], "a cat", steps=2)
        tuned.edit(source, swap_subject("cat", tuned.subject))
        drawn(tuned)
        assert len(calls) == 2
        assert torch.equal(plain.subject.embedding, mean) and plain.subject.category == "dog"
        moved = (trained.subject.embedding - mean).abs().max()
        assert 1e-4 < moved < 1e-2

    def test_pictures_of_several_shapes_and_several_prompts(self, editor) -> None:
        mixed = [picture(0, 40, 28), picture(1, 24, 48), np.asarray(picture(2, 16, 16))]
        prompts = ["a {category}", "a {category} on a sofa"]
        result = editor.finetune(mixed, "dog", steps=3, prompts=prompts, batch=4)
        assert len(result.history) == 3 and all(np.isfinite(row["loss"]) for row in result.history)

    def test_gradient_checkpointing_changes_nothing(self, editor) -> None:
        plain, saving = (
            editor.finetune(PICTURES, "dog", steps=2, gradient_checkpointing=on, **METHODS["full"]) for on in (False, True)
        )
        assert [row["loss"] for row in plain.history] == pytest.approx([row["loss"] for row in saving.history], rel=1e-5)
        assert not saving.model.unet.is_gradient_checkpointing

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", METHODS)
    def test_half_precision_trains_float32_weights(self, base, method, half) -> None:
        editor = Editor.from_pretrained(base, dtype=half)
        before = snapshot(editor)
        result = editor.finetune(PICTURES, "dog", steps=3, **METHODS[method])
        assert same(snapshot(editor), before)
        assert all(np.isfinite(row["loss"]) for row in result.history)
        dtypes = {name: weight.dtype for name, weight in result.model.unet.named_parameters()}
        assert all(dtype == (torch.float32 if "lora" in name else half) for name, dtype in dtypes.items())
        assert drawn(result.editor).std() > 0

    def test_a_loss_that_is_no_number_is_an_error(self, editor) -> None:
        with pytest.raises(NonFiniteError, match="learning rate"):
            editor.finetune(PICTURES, "dog", steps=20, method="full", learning_rate=1e30)


class TestPrior:
    def test_pictures_of_the_category_are_learned_with_their_weight(self, editor, monkeypatch) -> None:
        seen = watched(monkeypatch)
        editor.finetune(PICTURES, "dog", steps=1, prior_weight=0.5, prior_count=2)
        assert [row.factor for row in seen] == [1.0] * 3 + [0.5] * 3
        with torch.no_grad():
            plain = editor.model.encode(editor.model.layout("a dog")).tokens[0]
        assert all(torch.equal(row.tokens, plain) for row in seen[3:])
        assert not any(torch.equal(row.tokens, plain) for row in seen[:3])

    def test_generated_pictures_are_the_models_own_and_kept_for_further_runs(self, editor, tmp_path, monkeypatch) -> None:
        options = {"steps": 2, "prior_weight": 1.0, "prior_count": 3}
        first = editor.finetune(PICTURES, "dog", prior=tmp_path / "dogs", **options)
        files = sorted((tmp_path / "dogs").iterdir())
        assert [path.name[-9:] for path in files] == ["-0000.png", "-0001.png", "-0002.png"]
        own = editor.generate("a dog", seed=1, steps=2, guidance_scale=editor.model.guidance_scale).image
        assert np.array_equal(np.asarray(Image.open(files[1])), np.asarray(own))
        fresh = editor.finetune(PICTURES, "dog", **options)
        monkeypatch.setattr("p2p_subject.finetuning.prior.sample_batch", lambda *_: pytest.fail("generated again"))
        again = editor.finetune(PICTURES, "dog", prior=tmp_path / "dogs", **options)
        assert same(weights_of(first), weights_of(again)) and same(weights_of(first), weights_of(fresh))

    def test_a_folder_of_generated_pictures_mixes_no_categories(self, editor, tmp_path) -> None:
        options = {"steps": 1, "prior_weight": 1.0, "prior_count": 1}
        for category in ("dog", "cat"):
            editor.finetune(PICTURES, category, prior=tmp_path / "both", **options)
        alone = editor.finetune(PICTURES, "cat", **options)
        again = editor.finetune(PICTURES, "cat", prior=tmp_path / "both", **options)
        assert len(list((tmp_path / "both").iterdir())) == 2 and same(weights_of(alone), weights_of(again))

    def test_given_pictures_are_used_as_they_are(self, editor, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("p2p_subject.finetuning.prior.sample_batch", lambda *_: pytest.fail("generated"))
        picture(9).save(tmp_path / "mine.png")
        folder, listed = (
            editor.finetune(PICTURES, "dog", steps=1, prior_weight=1.0, prior=prior) for prior in (tmp_path, [picture(9)])
        )
        assert same(weights_of(folder), weights_of(listed))


class TestHeldOut:
    def test_the_best_weights_are_kept_and_the_run_ends(self, editor, monkeypatch) -> None:
        measured = iter([5.0, 4.0, 3.0, 3.5, 3.2])
        monkeypatch.setattr(Trainer, "held_out_loss", lambda self, views: next(measured))
        options = {"validate_every": 2, "patience": 2, **METHODS["lora"]}
        result = editor.finetune(PICTURES, "dog", steps=20, validation=0.25, **options)
        assert result.step == 4 and [row["step"] for row in result.history] == list(range(9))
        assert [row.get("validation") for row in result.history] == [5.0, None, 4.0, None, 3.0, None, 3.5, None, 3.2]
        learned, _ = split(read_pictures(PICTURES, "pictures"), 0.25, 0)
        shorter = editor.finetune([one.image for one in learned], "dog", steps=4, **METHODS["lora"])
        assert same(weights_of(result), weights_of(shorter))

    def test_weights_of_before_the_first_step_can_be_best(self, editor, monkeypatch) -> None:
        measured = iter([1.0, 2.0])
        monkeypatch.setattr(Trainer, "held_out_loss", lambda self, views: next(measured))
        result = editor.finetune(PICTURES, "dog", steps=2, validation=[picture(8)], **METHODS["full"])
        assert result.step == 0 and same(result.model.unet.state_dict(), editor.model.unet.state_dict())

    def test_the_measure_is_the_same_each_time(self, editor) -> None:
        options = {"steps": 2, "validation": [picture(8)], "validate_every": 1, "learning_rate": 1e-12}
        history = editor.finetune(PICTURES, "dog", **options).history
        first, *others = [row["validation"] for row in history]
        assert others == pytest.approx([first] * 2, rel=1e-5)

    def test_shares_hold_out_pictures_that_are_not_learned(self) -> None:
        pictures = read_pictures(PICTURES, "pictures")
        for share, count in ((0.25, 1), (0.5, 2), (0.1, 1)):
            learned, held_out = split(pictures, share, 0)
            assert len(held_out) == count and not {*map(id, learned)} & {*map(id, held_out)}
            assert len(learned) + len(held_out) == 4
        for bad in (0.0, 1.0, -0.1, float("nan"), True, 2):
            with pytest.raises(ArgumentError, match="share"):
                split(pictures, bad, 0)


LONGER = {**FAST, "steps": 5, "train_embedding": True, "prior_weight": 1.0, "prior_count": 2, "validate_every": 2}


def forbidden(step: int, loss: float) -> None:
    pytest.fail("a step was taken again")


class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_run_that_was_killed_ends_as_if_it_had_not_been(self, editor, tmp_path, method) -> None:
        options = {**LONGER, **METHODS[method], "validation": [picture(8)]}
        whole = editor.finetune(PICTURES, "dog", **options)
        for step in (1, 3, 4):
            folder = tmp_path / str(step)
            with pytest.raises(Killed):
                editor.finetune(PICTURES, "dog", out=folder, callback=killer(step), **options)
            taken: list[int] = []
            result = editor.finetune(PICTURES, "dog", out=folder, callback=lambda done, _, to=taken: to.append(done), **options)
            assert taken == list(range(step // 2 * 2 + 1, 6))
            assert same(weights_of(result), weights_of(whole))
            assert (result.step, result.history) == (whole.step, whole.history)

    def test_the_folder_holds_the_result_and_grids_and_no_pictures(self, editor, tmp_path) -> None:
        result = editor.finetune(PICTURES, "dog", out=tmp_path / "dog", **LONGER)
        files = sorted(str(path.relative_to(tmp_path / "dog")) for path in (tmp_path / "dog").rglob("*") if path.is_file())
        grids = [f"run/grid-0000{step}.png" for step in (2, 4, 5)]
        models = ["finetune.json", "lora.safetensors", "subject.safetensors"]
        steps = [f"run/step-0000{step}/{name}" for step in (2, 4, 5) for name in models]
        assert files == sorted([*models, *grids, "run/settings.json", *steps])
        with Image.open(tmp_path / "dog" / grids[0]) as grid:
            assert grid.size[1] > 3 * 192
        again = editor.finetune(PICTURES, "dog", out=tmp_path / "dog", callback=forbidden, **LONGER)
        assert same(weights_of(again), weights_of(result)) and again.history == result.history

    def test_every_checkpoint_of_a_lora_is_a_model(self, editor, tmp_path) -> None:
        editor.finetune(PICTURES, "dog", out=tmp_path / "dog", **LONGER)
        short = editor.finetune(PICTURES, "dog", **{**LONGER, "steps": 2})
        loaded = load_finetuned(tmp_path / "dog" / "run" / "step-00002", base=editor)
        assert (loaded.step, loaded.history) == (2, short.history)
        assert same(weights_of(loaded), weights_of(short))

    def test_a_run_that_was_killed_in_a_checkpoint_makes_all_of_it(self, editor, tmp_path, monkeypatch) -> None:
        from p2p_subject.finetuning import run

        def kill(*_) -> None:
            raise Killed

        monkeypatch.setattr(run, "save_image", kill)
        with pytest.raises(Killed):
            editor.finetune(PICTURES, "dog", out=tmp_path / "dog", **LONGER)
        monkeypatch.undo()
        editor.finetune(PICTURES, "dog", out=tmp_path / "dog", **LONGER)
        for step in (2, 4, 5):
            assert load_finetuned(tmp_path / "dog" / "run" / f"step-0000{step}", base=editor).step == step
            assert (tmp_path / "dog" / "run" / f"grid-0000{step}.png").is_file()

    def test_the_encoder_does_not_run_again_when_a_run_goes_on(self, base, tmp_path, monkeypatch) -> None:
        editor = Editor.from_pretrained(base)
        with pytest.raises(Killed):
            editor.finetune(PICTURES, "dog", out=tmp_path / "run", callback=killer(2), **FAST)
        monkeypatch.setattr(editor.model.pipeline.qformer, "forward", lambda *_, **__: pytest.fail("encoded again"))
        assert editor.finetune(PICTURES, "dog", out=tmp_path / "run", **FAST).step == 3

    def test_a_folder_of_another_run_or_with_anything_else_is_refused(self, editor, tmp_path) -> None:
        with pytest.raises(Killed):
            editor.finetune(PICTURES, "dog", out=tmp_path / "run", callback=killer(1), **FAST)
        for changes, told in (({"rank": 4}, "rank: 8 there, 4 now"), ({"seed": 1}, "seed")):
            with pytest.raises(OutputError, match=told):
                editor.finetune(PICTURES, "dog", out=tmp_path / "run", **{**FAST, **changes})
        with pytest.raises(OutputError, match="pictures"):
            editor.finetune(PICTURES[:2], "dog", out=tmp_path / "run", **FAST)
        with pytest.raises(OutputError, match="category"):
            editor.finetune(PICTURES, "cat", out=tmp_path / "run", **FAST)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            editor.finetune(PICTURES, "dog", out=tmp_path / "other", **FAST)
        with pytest.raises(OutputError, match="cannot make"):
            editor.finetune(PICTURES, "dog", out=tmp_path / "other" / "thesis.txt" / "run", **FAST)

    def test_a_result_is_there_whole_or_not_at_all(self, editor, tmp_path, monkeypatch) -> None:
        from p2p_subject.finetuning import result

        write = result.write_tensors

        def fail(path, *given):
            if path == tmp_path / "run" / "subject.safetensors":
                raise OutputError("no space left")
            write(path, *given)

        monkeypatch.setattr(result, "write_tensors", fail)
        with pytest.raises(OutputError, match="no space"):
            editor.finetune(PICTURES, "dog", out=tmp_path / "run", **FAST)
        with pytest.raises(ModelError, match="model_index"):
            Editor.from_pretrained(tmp_path / "run")
        monkeypatch.undo()
        assert editor.finetune(PICTURES, "dog", out=tmp_path / "run", callback=forbidden, **FAST).step == 3
        assert Editor.from_pretrained(tmp_path / "run").subject.category == "dog"


class TestSaved:
    def test_a_loaded_result_draws_the_same_pictures(self, tuned, editor, base, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        kept = {"lora": "lora.safetensors", "full": "unet.safetensors"}[tuned.settings.method]
        assert {path.name for path in (tmp_path / "dog").iterdir()} == {"finetune.json", kept, "subject.safetensors"}
        told = json.loads((tmp_path / "dog" / "finetune.json").read_text())
        assert told["base"] == {"name": str(base.resolve()), "fingerprint": editor.model.fingerprint}
        for loaded in (Editor.from_pretrained(tmp_path / "dog"), Editor.from_pretrained(tmp_path / "dog", base=editor)):
            assert loaded.model.fingerprint == tuned.model.fingerprint
            assert torch.equal(loaded.subject.embedding, tuned.subject.embedding)
            assert np.array_equal(drawn(loaded), drawn(tuned.editor))
            source = loaded.invert(PICTURES[0], "a cat", steps=2)
            assert loaded.edit(source, swap_subject("cat", loaded.subject)).prompt == "a dog"
        plain = np.asarray(editor.generate("a dog", subject=tuned.subject, seed=0, steps=2).image)
        assert not np.array_equal(plain, drawn(tuned.editor))

    def test_files_are_readable_by_others(self, tuned, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        (tmp_path / "plain").touch()
        modes = {path.stat().st_mode for path in (tmp_path / "dog").iterdir()}
        assert modes == {(tmp_path / "plain").stat().st_mode}

    def test_a_lora_is_small_and_diffusers_reads_it(self, editor, tmp_path) -> None:
        result = editor.finetune(PICTURES, "dog", steps=2, **METHODS["lora"])
        result.save(tmp_path / "dog")
        unet = tiny_pipeline(tmp_path / "parts").unet
        unet.load_lora_adapter(load_file(tmp_path / "dog" / "lora.safetensors"), prefix="unet")
        latents, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 24)
        with torch.no_grad():
            theirs, ours = (own(latents, 5, encoder_hidden_states=tokens).sample for own in (unet, result.model.unet))
        assert torch.allclose(theirs, ours, atol=1e-5)

    def test_half_precision_and_single_load_from_one_folder(self, tuned, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        loaded = Editor.from_pretrained(tmp_path / "dog", dtype=torch.bfloat16)
        assert loaded.model.unet.dtype == torch.bfloat16 and drawn(loaded).std() > 0

    def test_a_base_of_other_weights_is_refused(self, tuned, tmp_path, base) -> None:
        tuned.save(tmp_path / "dog")
        other = Editor.from_pipeline(pipeline_of(tmp_path / "parts", seed=5))
        with pytest.raises(ModelMismatchError, match="fingerprint"):
            Editor.from_pretrained(tmp_path / "dog", base=other)
        other.model.pipeline.save_pretrained(tmp_path / "other")
        with pytest.raises(ModelMismatchError, match="Name the model it was made from"):
            Editor.from_pretrained(tmp_path / "dog", base=tmp_path / "other")

    def test_a_base_that_moved_is_named(self, tuned, base, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        told = json.loads((tmp_path / "dog" / "finetune.json").read_text())
        told["base"]["name"] = str(tmp_path / "gone")
        (tmp_path / "dog" / "finetune.json").write_text(json.dumps(told))
        with pytest.raises(ModelError, match=r"gone.*base="):
            Editor.from_pretrained(tmp_path / "dog")
        assert Editor.from_pretrained(tmp_path / "dog", base=base).subject.category == "dog"

    def test_options_that_a_loaded_base_cannot_follow_are_refused(self, tuned, editor, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        with pytest.raises(ModelError, match="is loaded already, so dtype can have no effect"):
            Editor.from_pretrained(tmp_path / "dog", base=editor, dtype=torch.float16)

    def test_damage_is_told(self, tuned, tmp_path) -> None:
        tuned.save(tmp_path / "dog")
        weights = tmp_path / "dog" / {"lora": "lora.safetensors", "full": "unet.safetensors"}[tuned.settings.method]

        def copied(name: str) -> Path:
            return Path(shutil.copytree(tmp_path / "dog", tmp_path / name))

        tensors = load_file(weights)
        name = next(iter(tensors))
        one = copied("one")
        save_file({key: value for key, value in tensors.items() if key != name}, one / weights.name)
        with pytest.raises(ModelError, match="missing"):
            Editor.from_pretrained(one)
        two = copied("two")
        save_file({key: -value for key, value in tensors.items()}, two / weights.name)
        with pytest.raises(ModelMismatchError, match="not of one run"):
            Editor.from_pretrained(two)
        three = copied("three")
        (three / "subject.safetensors").unlink()
        with pytest.raises(ModelError, match=r"subject\.safetensors"):
            Editor.from_pretrained(three)
        for change in ({"format": "later/2"}, {"settings": {"rang": 3}}, {"base": None}):
            four = copied(f"four-{next(iter(change))}")
            told = json.loads((four / "finetune.json").read_text())
            (four / "finetune.json").write_text(json.dumps(told | change))
            with pytest.raises(ModelError, match="finetune.json"):
                Editor.from_pretrained(four)

    def test_a_result_is_not_written_over_anything(self, tuned, tmp_path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            tuned.save(tmp_path)

    def test_a_fully_tuned_model_can_be_tuned_again_and_one_with_a_lora_is_refused(self, tuned, tmp_path) -> None:
        if tuned.settings.method == "lora":
            with pytest.raises(ModelError, match="carries the adapter"):
                tuned.editor.finetune(PICTURES, "dog", steps=1)
            with pytest.raises(ModelError, match="has no place for; save a fine-tuned model by Finetuned.save"):
                tuned.editor.model.pipeline.save_pretrained(tmp_path / "dog")
            assert not (tmp_path / "dog").exists()
            return
        tuned.save(tmp_path / "dog")
        again = Editor.from_pretrained(tmp_path / "dog").finetune(PICTURES, "dog", steps=1)
        again.save(tmp_path / "again")
        assert np.array_equal(drawn(Editor.from_pretrained(tmp_path / "again")), drawn(again.editor))


def test_the_miniature_is_found_wherever_the_library_lies(tmp_path) -> None:
    from p2p_subject.training import world

    look = world.Look("dog", "google", 250)
    pictures = [Image.fromarray(world.reference(look, "new_hue", index)) for index in range(2)]
    result = Editor.from_pretrained().finetune(pictures, "dog", steps=1, batch=1, rank=2)
    result.save(tmp_path / "dog")
    assert json.loads((tmp_path / "dog" / "finetune.json").read_text())["base"]["name"] == "miniature"
    assert Editor.from_pretrained(tmp_path / "dog").model.fingerprint == result.model.fingerprint
    assert sum(path.stat().st_size for path in (tmp_path / "dog").iterdir()) < 200_000


class TestPictures:
    def test_a_mask_too_small_for_the_models_size_still_counts(self, editor) -> None:
        mask = np.zeros((640, 640), np.float32)
        mask[101:104, 201:204] = 1
        (view,) = encode(editor.model, read_pictures([Image.new("RGB", (640, 640))], "pictures", [mask]))
        cell = 640 // view.weight.shape[-1]
        assert view.weight.sum().item() == pytest.approx(9 / cell**2) and view.weight[0, 0, 101 // cell, 201 // cell] > 0

    def test_masks_and_transparency(self, tmp_path) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "masks").mkdir()
        seen = np.zeros((28, 40), np.uint8)
        seen[5:20, 5:20] = 255
        clear = picture(0).convert("RGBA")
        clear.putalpha(Image.fromarray(seen))
        clear.save(tmp_path / "pictures" / "a.png")
        picture(1).save(tmp_path / "pictures" / "b.jpg")
        (tmp_path / "pictures" / "notes.txt").write_text("no picture")
        (tmp_path / "pictures" / ".hidden.png").write_text("no picture")
        first, second = read_pictures(tmp_path / "pictures", "pictures")
        assert np.array_equal(first.mask, seen / np.float32(255)) and second.mask is None
        assert np.asarray(first.image)[0, 0].tolist() == [255, 255, 255]
        for name in "ab":
            Image.fromarray(seen).save(tmp_path / "masks" / f"{name}.png")
        masked = read_pictures(str(tmp_path / "pictures"), "pictures", str(tmp_path / "masks"))
        assert [one.mask.max() for one in masked] == [1, 1]
        (tmp_path / "masks" / "b.png").unlink()
        with pytest.raises(MaskError, match=r"b\.jpg"):
            read_pictures(tmp_path / "pictures", "pictures", tmp_path / "masks")

    def test_arrays_with_opacity(self) -> None:
        values = np.zeros((16, 16, 4), np.float32)
        values[4:12, 4:12, 3] = 1
        (array,) = read_pictures(values, "pictures")
        (tensor,) = read_pictures(torch.from_numpy(values).permute(2, 0, 1), "pictures")
        assert np.array_equal(array.mask, values[..., 3]) and np.array_equal(tensor.mask, values[..., 3])
        values[..., 3] = 1
        assert read_pictures(values, "pictures")[0].mask is None
        values[..., 3] = 0.2
        with pytest.raises(ImageError, match="transparent"):
            read_pictures(values, "pictures")

    def test_articles_fit_the_category(self) -> None:
        prompts = ("a {category}", "A {category} on grass", "an {category} and a cat")
        assert filled(prompts, "owl") == ("an owl", "An owl on grass", "an owl and a cat")
        assert filled(prompts, "dog") == ("a dog", "A dog on grass", "a dog and a cat")


MISTAKES = {
    "no pictures": (ArgumentError, "no pictures", [], "dog", {}),
    "empty folder": (ArgumentError, "has no picture", "{tmp}", "dog", {}),
    "no such file": (ImageError, "no such file", ["nowhere.png"], "dog", {}),
    "broken picture": (ImageError, "cannot be read", [b"GIF89a"], "dog", {}),
    "no category": (SubjectError, "expected the word", PICTURES, " ", {}),
    "category that is no text": (SubjectError, "category=7", PICTURES, 7, {}),
    "long category": (PromptTooLongError, "Shorten", PICTURES, "x" * 30, {}),
    "no steps": (ArgumentError, "steps=0; expected a whole number of 1 or more", PICTURES, "dog", {"steps": 0}),
    "steps that are no number": (ArgumentError, "steps=True", PICTURES, "dog", {"steps": True}),
    "no rank": (ArgumentError, "rank=0", PICTURES, "dog", {"rank": 0}),
    "no batch": (ArgumentError, "batch=0", PICTURES, "dog", {"batch": 0}),
    "method": (ArgumentError, "Did you mean 'lora'", PICTURES, "dog", {"method": "loara"}),
    "option": (ArgumentError, "takes no 'rang'. Did you mean 'rank'", PICTURES, "dog", {"rang": 4}),
    "rate": (ArgumentError, "learning_rate=0", PICTURES, "dog", {"learning_rate": 0}),
    "rate that is no number": (ArgumentError, "learning_rate=nan", PICTURES, "dog", {"learning_rate": float("nan")}),
    "embedding rate": (ArgumentError, "embedding_rate=None", PICTURES, "dog", {"embedding_rate": None}),
    "decay": (ArgumentError, "weight_decay=-1", PICTURES, "dog", {"weight_decay": -1}),
    "flag": (ArgumentError, "train_embedding='yes'", PICTURES, "dog", {"train_embedding": "yes"}),
    "prompts without a place": (ArgumentError, r"hold \{category\}", PICTURES, "dog", {"prompts": ["a dog"]}),
    "prompts as one text": (ArgumentError, "prompts='a", PICTURES, "dog", {"prompts": "a {category}"}),
    "prompt without an article": (PromptError, "begins with the subject", PICTURES, "d", {"prompts": ["{category} x"]}),
    "long prompt": (PromptTooLongError, "Shorten", PICTURES, "dog", {"prompts": ["a {category}" + " very" * 9]}),
    "masks for others": (MaskError, "1 given for 4", PICTURES, "dog", {"masks": [np.ones((8, 8))]}),
    "nothing left": (ArgumentError, "leaves one", PICTURES[:1], "dog", {"validation": 0.5}),
    "validation": (ImageError, "no such file", PICTURES, "dog", {"validation": ["nowhere.png"]}),
    "prior without weight": (ArgumentError, "prior_weight is 0", PICTURES, "dog", {"prior": PICTURES}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_a_network_runs(editor, tmp_path, monkeypatch, name) -> None:
    error, message, pictures, category, options = MISTAKES[name]
    for network_of in ("embed", "encode", "encode_images", "decode", "noise"):
        monkeypatch.setattr(type(editor.model), network_of, lambda *_, **__: pytest.fail("a network ran"))
    (tmp_path / "empty").mkdir()
    given_pictures = tmp_path / "empty" if pictures == "{tmp}" else pictures
    with pytest.raises(error, match=message):
        editor.finetune(given_pictures, category, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_without_subjects_are_refused() -> None:
    with pytest.raises(SubjectError, match="takes no pictures of a subject"):
        Editor.from_pipeline(stable_diffusion_1()).finetune(PICTURES, "dog")


def test_without_peft_lora_says_what_to_install_and_full_works(editor, tuned, tmp_path, monkeypatch) -> None:
    tuned.save(tmp_path / "dog")
    find = network.importlib.util.find_spec
    monkeypatch.setattr(network.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ArgumentError, match=r"pip install 'p2p_subject\[finetune\]'"):
        editor.finetune(PICTURES, "dog", steps=1)
    assert editor.finetune(PICTURES, "dog", steps=1, method="full").step == 1
    if tuned.settings.method == "lora":
        with pytest.raises(ArgumentError, match="peft"):
            Editor.from_pretrained(tmp_path / "dog", base=editor)


def test_an_offloaded_network_is_refused(base) -> None:
    from accelerate import cpu_offload

    editor = Editor.from_pretrained(base)
    cpu_offload(editor.model.unet, torch.device("cpu"))
    with pytest.raises(ModelError, match="offloaded"):
        editor.finetune(PICTURES, "dog", steps=1)


def test_settings_survive_json() -> None:
    rates = {"learning_rate": np.float32(0.5), "weight_decay": np.float32(0.25)}
    made = Settings(method="full", prompts=("a {category}", "a {category} asleep"), seed=3, **rates)
    assert Settings.of(**json.loads(json.dumps(made.to_dict()))) == made
    assert (made.rate, made.weight_decay) == (0.5, 0.25)
    assert (Settings(method="full").rate, Settings().lora_alpha, Settings(rank=4, alpha=8).lora_alpha) == (5e-5, 8.0, 8.0)


class TestCommandLine:
    @pytest.fixture
    def shell(self, base, tmp_path, capsys):
        from p2p_subject import cli

        (tmp_path / "pictures").mkdir()
        for number, one in enumerate(PICTURES):
            one.save(tmp_path / "pictures" / f"{number}.png")

        def run(*arguments: str, model: Path = base) -> tuple[int, dict, str]:
            words = [argument.format(tmp=tmp_path) for argument in arguments]
            code = cli.main([*words, "--model", str(model), "--json"])
            out, err = capsys.readouterr()
            return code, json.loads(out), err

        return run

    LEARN = ("finetune", "{tmp}/pictures", "--category", "dog", "--out", "{tmp}/dog", "--steps", "2")

    def test_learn_generate_and_swap(self, shell, base, tmp_path) -> None:
        options = ("--rank", "2", "--alpha", "4", "--validation", "0.25", "--prompts", "a {{category}}", "--train-embedding")
        code, report, err = shell(*self.LEARN, *options)
        assert (code, err) == (0, "") and report["outputs"] == {"folder": str(tmp_path / "dog")}
        assert (report["category"], report["method"], report["steps"], report["seed"]) == ("dog", "lora", 2, 0)
        told = json.loads((tmp_path / "dog" / "finetune.json").read_text())
        assert told["settings"]["alpha"] == 4 and told["settings"]["train_embedding"] is True
        assert report["validation"] > 0 and report["kept_step"] == told["step"]

        learned = tmp_path / "dog"
        generate = ("generate", "a dog", "--steps", "2", "--seed", "3", "--out", "{tmp}/a.png")
        assert shell(*generate, model=learned)[0] == 0
        editor = Editor.from_pretrained(learned)
        own = editor.generate("a dog", subject=editor.subject, seed=3, steps=2).image
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(own))

        swap = ("edit", "{tmp}/pictures/0.png", "--prompt", "a cat", "--steps", "2", "--swap", "cat", "--out", "{tmp}/b.png")
        code, report, err = shell(*swap, "--sheet", "{tmp}/sheet.png", model=learned)
        assert (code, err, report["prompt"]) == (0, "", "a dog") and (tmp_path / "sheet.png").is_file()
        code, report, err = shell(*swap[:-4], "--target-prompt", "a hat", "--out", "{tmp}/c.png", model=learned)
        assert (code, report["prompt"]) == (0, "a hat")
        assert shell("info", model=learned)[1]["subject"] == "dog" and shell("info")[1]["subject"] is None

    def test_a_given_subject_comes_before_the_learned_one(self, shell, tmp_path) -> None:
        shell(*self.LEARN)
        given = ("--subject", "{tmp}/pictures/1.png", "--category", "cat")
        swap = ("edit", "{tmp}/pictures/0.png", "--prompt", "a hat", "--steps", "2", "--swap", "hat", "--out", "{tmp}/b.png")
        assert shell(*swap, *given, model=tmp_path / "dog")[1]["prompt"] == "a cat"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("finetune", "{tmp}/nowhere", *LEARN[2:]), "ArgumentError", "no folder"),
            ((*LEARN, "--steps", "0"), "ArgumentError", "steps=0"),
            ((*LEARN, "--rank", "0"), "ArgumentError", "rank=0"),
            ((*LEARN, "--validation", "few"), "ArgumentError", "no share"),
            ((*LEARN, "--category", ""), "SubjectError", "expected the word"),
            ((*LEARN, "--out", "{tmp}/pictures"), "OutputError", "not empty"),
            ((*LEARN, "--method", "some"), "UsageError", "invalid choice"),
            (LEARN[:2], "UsageError", "required"),
        ],
    )
    def test_mistakes_are_one_line(self, shell, tmp_path, arguments, error, message) -> None:
        code, report, err = shell(*arguments)
        assert code == 2 and report["error"] == error and message in err and err.count("\n") == 1
        assert not (tmp_path / "dog").exists()


def test_a_fine_tuned_model_takes_a_controlnet_as_its_base_does(miniature_folder, tmp_path) -> None:
    """The ControlNet is no part of what was tuned: it can come later, or have been there and be gone."""
    editor = Editor.from_pretrained(miniature_folder)
    controlnet = ControlNetModel.from_unet(editor.model.unet, conditioning_embedding_out_channels=(16, 32, 64))
    tuned = editor.finetune(PICTURES[:2], "dog", steps=1, method="full")
    tuned.save(tmp_path / "dog")
    loaded = Editor.from_pretrained(tmp_path / "dog", controlnet=controlnet)
    edges = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    made = loaded.generate("a dog", subject=loaded.subject, control=edges, seed=0, steps=2)
    assert made.structure is not None and loaded.subject.category == "dog"
    again = loaded.finetune(PICTURES[:1], "dog", steps=1, method="full")
    again.save(tmp_path / "again")
