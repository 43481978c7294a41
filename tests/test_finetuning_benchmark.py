"""The fine-tuning benchmark: its methods train what they say, its subjects are held out, it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import finetuning as benchmark
from benchmarks import finetuning_report as report
from benchmarks.finetuning import Case, Settings
from benchmarks.finetuning_methods import RARE
from p2p_subject.training import world
from p2p_subject.training.tokenizers import WORDS

pytest.importorskip("peft")
pytest.importorskip("matplotlib")


pytestmark = pytest.mark.usefixtures("own_threads")


@pytest.fixture(autouse=True)
def few_sampling_steps(monkeypatch) -> None:
    """Two for the pictures of the category."""
    monkeypatch.setattr("p2p_subject.finetuning.prior.GRID_STEPS", 2)


@pytest.fixture(scope="module")
def small(miniature_folder) -> Settings:
    return Settings(str(miniature_folder), views=2, pictures=2, sampling=2, rank=2, prior=2, milestones=(0, 1, 2))


def test_reported_drawings_are_neither_trained_on_nor_tuned_on() -> None:
    reported = {(look.category, look.source) for look in map(benchmark.look_of, range(9))}
    tuning = {(look.category, look.source) for look in (benchmark.look_of(at, True) for at in range(3))}
    assert len(reported) == 9 and len(tuning) == 3 and not reported & tuning
    assert reported | tuning == world.HELD_OUT_ART


def test_held_out_views_are_other_pictures() -> None:
    look = benchmark.look_of(0)
    learned, held_out = (benchmark.pictures_of(look, 0, 4, held) for held in (False, True))
    assert not {one.tobytes() for one in learned} & {one.tobytes() for one in held_out}
    assert [one.tobytes() for one in learned] == [one.tobytes() for one in benchmark.pictures_of(look, 0, 4)]


def test_the_rare_word_is_one_token_that_no_caption_of_the_training_has() -> None:
    assert RARE in WORDS
    captions = {world.sample("train", at).caption(tint=tint) for at in range(3000) for tint in (False, True)}
    assert not any(RARE in caption.split() for caption in captions)


@pytest.mark.parametrize("method", benchmark.METHODS)
def test_a_method_trains_what_it_says_on_a_copy(small, method, tmp_path, monkeypatch) -> None:
    model = benchmark.bench_of(small).model
    before = {name: weight.clone() for name, weight in [*_weights(model.unet), *_weights(model.pipeline.text_encoder)]}
    trainers = []
    made = benchmark.Trainer
    monkeypatch.setattr(benchmark, "Trainer", lambda **given: trainers.append(made(**given)) or trainers[-1])
    for folder in ("rows", "sheets"):
        (tmp_path / folder).mkdir()
    case = Case(method, 0, 0, rate=1e-2)
    benchmark.run_case(small, case, tmp_path)

    rows = benchmark.rows_of([case], tmp_path)
    a_step = 6 if method == "dreambooth prior" else 3
    assert [(row["steps"], row["unet_rows"]) for row in rows] == [(0, 0), (1, a_step), (2, 2 * a_step)]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("fidelity", "category", "look", "background"))
    assert rows[0]["seconds"] < rows[2]["seconds"] and rows[0]["rate"] == 1e-2
    assert (tmp_path / "sheets" / f"{case.name}.png").is_file()

    names = set(trainers[0].weights)
    trained = {
        "text encoder": any(name.startswith("text.") for name in names),
        "additions": any("lora" in name for name in names),
        "token": names == {"token"},
    }
    told = {
        "text encoder": method in ("dreambooth text", "dreambooth prior"),
        "additions": "lora" in method,
        "token": method == "textual inversion",
    }
    assert trained == told
    assert any(name.startswith("conv_in") for name in names) is (method.split()[-1] in ("full", "text", "prior"))
    after = dict([*_weights(model.unet), *_weights(model.pipeline.text_encoder)])
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    learned = trainers[0].weights
    assert all(weight.grad is None for weight in model.pipeline.text_encoder.parameters())
    assert all(weight.isfinite().all() for weight in learned.values())


def _weights(part: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(f"{type(part).__name__}.{name}", weight) for name, weight in part.named_parameters()]


def test_all_methods_see_the_same_pictures_noise_and_timesteps(small, tmp_path, monkeypatch) -> None:
    seen: dict[str, list] = {}
    losses, method = benchmark.Trainer.losses, ""

    def spy(self, rows):
        seen.setdefault(method, []).extend(rows)
        return losses(self, rows)

    monkeypatch.setattr(benchmark.Trainer, "losses", spy)
    for folder in ("rows", "sheets"):
        (tmp_path / folder).mkdir()
    for method in ("ours lora", "dreambooth full", "textual inversion"):
        benchmark.run_case(small, Case(method, 0, 0), tmp_path)
    first, *others = seen.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.time == b.time and torch.equal(a.noise, b.noise) and torch.equal(a.view.latents, b.view.latents)


def test_prior_preservation_learns_the_category_under_its_own_name(small, tmp_path, monkeypatch) -> None:
    rows: list = []
    losses = benchmark.Trainer.losses
    monkeypatch.setattr(benchmark.Trainer, "losses", lambda self, given: rows.append(given) or losses(self, given))
    for folder in ("rows", "sheets"):
        (tmp_path / folder).mkdir()
    benchmark.run_case(small, Case("dreambooth prior", 0, 0), tmp_path)
    model, word = benchmark.bench_of(small).model, benchmark.look_of(0).category
    own, kept = (model.encode(model.layout(world.with_article(noun))).tokens[0] for noun in (f"{RARE} {word}", word))
    first = rows[0]
    assert len(first) == 6 and all(row.factor == 1 for row in first)
    assert all(torch.allclose(row.tokens, own, atol=1e-5) for row in first[:3])
    assert all(torch.allclose(row.tokens, kept, atol=1e-5) for row in first[3:])
    assert not any(torch.equal(a.view.latents, b.view.latents) for a in first[:3] for b in first[3:])


def test_guidance_leads_away_from_what_the_trained_text_encoder_says(small, tmp_path, monkeypatch) -> None:
    """Not from what the untrained one did: a direction between two encoders is no direction of the prompt."""
    sample, seen = benchmark.sample_contexts, []
    monkeypatch.setattr(benchmark, "sample_contexts", lambda *given: seen.append(given[-1].tokens) or sample(*given))
    for folder in ("rows", "sheets"):
        (tmp_path / folder).mkdir()
    benchmark.run_case(small, Case("dreambooth text", 0, 0, rate=1e-2), tmp_path)
    before = benchmark.bench_of(small).model.unconditional().tokens
    assert torch.equal(seen[0], before) and not torch.allclose(seen[-1], before, atol=1e-3)


def test_the_command_line_goes_on_where_it_stopped(small, tmp_path, capsys, monkeypatch) -> None:
    options = [
        "--model",
        small.model,
        "--subjects",
        "1",
        "--max-steps",
        "0",
        "--pictures",
        "2",
        "--sampling",
        "2",
        "--rank",
        "2",
    ]
    given = [*options, "--methods", "ours lora", "dreambooth lora", "--out", str(tmp_path)]
    benchmark.main(given)
    told = capsys.readouterr().out
    assert "ours lora" in told and "real, reconstructed" in told and (tmp_path / "fidelity.png").is_file()
    assert len(json.loads((tmp_path / "figures.json").read_text())["rows"]) == 2
    (done, left) = sorted((tmp_path / "rows").iterdir())
    left.unlink()
    ran = []
    run_case = benchmark.run_case
    monkeypatch.setattr(benchmark, "run_case", lambda s, case, out: ran.append(case.name) or run_case(s, case, out))
    benchmark.main(given)
    assert ran == [left.stem] and done.exists()
    assert "ours lora" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.main([*given, "--sampling", "4"])
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--subjects", "10"])


def _row(method: str, steps: int, fidelity: float, seconds: float) -> dict:
    figures = {"fidelity": fidelity, "category": 1.0, "look": 1.0, "background": 1.0, "likeness": 0.9}
    return {"method": method, "tuning": False, "rate": 1e-3, "steps": steps, "cpu_seconds": seconds, **figures}


def test_equal_fidelity_is_counted_at_the_first_milestone_that_reaches_it(tmp_path: Path) -> None:
    rows = [_row("ours lora", 40, 0.5, 10.0), _row("ours lora", 80, 0.9, 20.0)]
    rows += [
        _row("dreambooth full", steps, fidelity, steps / 2)
        for steps, fidelity in ((40, 0.1), (200, 0.4), (200, 0.7), (400, 0.8))
    ]
    costs = report.tables(rows, _row("real", 0, 1.0, 0.0))[1].splitlines()
    assert costs[1] == "ours lora at 40 steps, 10.0 s: fidelity 0.50"
    assert costs[2] == "  dreambooth full: 200 steps (5.0 x), 100.0 s (10.0 x)"
    assert costs[4] == "  dreambooth full: not in 400 steps"
