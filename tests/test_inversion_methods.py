"""The inversion methods, on predictors that are plain functions and against the published implementation's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inversion import (
    Move,
    NonFiniteError,
    Predict,
    Schedule,
    ScheduleError,
    StepsError,
    Trajectory,
    TrajectoryError,
    ddim,
    ddim_move,
    ddpm_sigma,
    direct,
    direct_offsets,
    edit_friendly,
    fixed_point,
    guide,
    negative_prompt,
    null_text,
    null_text_batch,
    reconstruct,
    to_epsilon,
    trace,
    walk,
)
from inversion.null_text import published_tolerance
from tests.conftest import golden
from tests.test_inversion import make_schedule

METHODS = {"ddim": ddim, "direct": direct, "fixed_point": fixed_point, "edit_friendly": edit_friendly}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(x: Tensor, move: Move) -> Tensor:
    """The ideal network of pictures whose values are normal of standard deviation 0.6, bent a little."""
    alpha = move.alpha_t
    return (1 - alpha) ** 0.5 / (0.36 * alpha + 1 - alpha) * x + 0.05 * x.roll(1, -1).sin()


# guidance


@given(seed=st.integers(0, 99), scale=st.floats(-2, 10), quantile=st.floats(0.05, 0.95))
@settings(deadline=None)
def test_proximal_guidance_is_guidance_by_what_of_each_row_is_over_its_quantile(seed, scale, quantile) -> None:
    unconditional, conditional = normal(2, 3, 4, 5, 6, seed=seed, dtype=torch.float64)
    conditional = conditional * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1)
    guided = guide(unconditional, conditional, scale, quantile)
    for row in range(3):
        difference = conditional[row] - unconditional[row]
        limit = difference.abs().flatten().quantile(quantile)
        expected = torch.nn.functional.softshrink(difference, float(limit))
        assert torch.allclose(guided[row], unconditional[row] + scale * expected, atol=1e-4)
        assert abs(float((expected == 0).double().mean()) - quantile) < 0.02
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.equal(guide(conditional, conditional, scale, quantile), conditional)


@pytest.mark.parametrize("quantile", [0, 1, -0.5, 7, float("nan"), "much"])
def test_what_is_no_quantile_is_refused(quantile) -> None:
    with pytest.raises(TrajectoryError, match="expected a quantile between 0 and 1, such as 0.7"):
        guide(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 2.0, quantile)
    with pytest.raises(TrajectoryError, match="expected a quantile"):
        negative_prompt(gaussian, normal(1, 4, 2, 2), make_schedule(2), torch.zeros(1, 2, 3), proximal=quantile)


# stochastic moves


@given(a=st.floats(0.01, 0.9), share=st.floats(0.01, 1))
@settings(deadline=None)
def test_stochastic_moves_have_the_posterior_mean_and_variance_of_ddpm(a: float, share: float) -> None:
    b = a + share * (1 - a)
    clean, eps, noise = normal(3, 1, 2, 3, 3, dtype=torch.float64)
    x = a**0.5 * clean + (1 - a) ** 0.5 * eps
    # Ho et al. 2020, eq. 7, with a / b in the place of one step's alpha.
    mean = b**0.5 * (1 - a / b) / (1 - a) * clean + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
    deviation = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    assert torch.allclose(ddim_move(x, eps, a, b, noise), mean + deviation * noise, atol=1e-9)
    assert ddpm_sigma(a, b) == pytest.approx(deviation)


def test_stochastic_moves_are_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(10)
    levels = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    x, eps, noise = normal(3, 1, 4, 5, 6)
    theirs = scheduler.step(eps, scheduler.timesteps[3], x, eta=1.0, variance_noise=noise).prev_sample
    assert torch.allclose(ddim_move(x, eps, levels[3], levels[4], noise), theirs, atol=1e-5)


def test_stochastic_moves_lead_to_the_picture_only() -> None:
    schedule = make_schedule(3)
    with pytest.raises(ScheduleError, match="noise maps are for moves to the picture"):
        walk(gaussian, normal(1, 4, 2, 2), schedule.inverting(), noises=torch.zeros(3, 4, 2, 2))


def test_a_walk_adds_the_noise_map_of_each_sampling_step_to_every_row() -> None:
    schedule, noises = make_schedule(3), normal(3, 4, 2, 2)
    x = expected = normal(2, 4, 2, 2, seed=1)
    for move in schedule.sampling():
        expected = ddim_move(expected, gaussian(expected, move), move.alpha_from, move.alpha_to, noises[move.index])
    assert torch.equal(walk(gaussian, x, schedule.sampling(), noises=noises), expected)
    kept = trace(gaussian, x, schedule.sampling(), noises=noises)
    assert len(kept) == 4 and torch.equal(kept[0], x) and torch.equal(kept[-1], expected)


# what holds for every method


def as_type(predict: Predict, kind: str) -> Predict:
    """`predict` by way of a network whose output is of another kind."""

    def output(x: Tensor, move: Move) -> Tensor:
        eps, alpha = predict(x, move), move.alpha_t
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        return {"epsilon": eps, "sample": clean, "v_prediction": alpha**0.5 * eps - (1 - alpha) ** 0.5 * clean}[kind]

    return lambda x, move: to_epsilon(output(x, move), x, move.alpha_t, kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", METHODS)
def test_the_kind_of_prediction_makes_no_difference(method: str, kind: str) -> None:
    schedule, clean = make_schedule(8, kind), normal(1, 4, 6, 5)
    made = METHODS[method](as_type(gaussian, kind), clean, schedule)
    plain = METHODS[method](gaussian, clean, schedule)
    assert torch.allclose(made.latents, plain.latents, atol=1e-3)
    assert made.method == method and made.schedule.prediction_type == kind


@pytest.mark.parametrize("method", METHODS)
def test_methods_record_what_they_are_told_need_no_gradients_and_keep_the_picture(method: str, tmp_path) -> None:
    seen: list[int] = []

    def progress(moves):
        for move in moves:
            seen.append(move.index)
            yield move

    weight = torch.ones((), requires_grad=True)
    clean = normal(1, 4, 6, 5).double()
    made = METHODS[method](
        lambda x, move: weight * gaussian(x, move), clean, make_schedule(4), prompt="a cat", fingerprint="f", progress=progress
    )
    assert (made.prompt, made.fingerprint, made.replay) == ("a cat", "f", method == "ddim")
    assert made.latents.dtype == torch.float32 and not made.latents.requires_grad and sorted(seen) == [0, 1, 2, 3]
    assert torch.allclose(made.clean, clean.float(), atol=1e-5)
    made.save(tmp_path / "a.safetensors")
    read = Trajectory.load(tmp_path / "a.safetensors")
    assert torch.equal(read.latents, made.latents) and (read.method, read.replay) == (made.method, made.replay)


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_several_pictures_are_refused_by_name(method: str) -> None:
    schedule = make_schedule(4)
    bad = schedule.timesteps[2]
    with pytest.raises(NonFiniteError, match=f"timestep {bad}:"):
        METHODS[method](lambda x, move: x * (torch.nan if move.t == bad else 1), normal(1, 4, 2, 2), schedule)
    with pytest.raises(TrajectoryError, match=r"\(1, C, h, w\)"):
        METHODS[method](gaussian, normal(2, 4, 2, 2), schedule)


def test_a_network_of_half_precision_keeps_latents_in_single() -> None:
    for method in METHODS.values():
        made = method(lambda x, move: gaussian(x.bfloat16(), move), normal(1, 4, 6, 6), make_schedule(5))
        assert made.latents.dtype == torch.float32 and torch.isfinite(made.latents).all()


# one by one


def test_direct_offsets_are_what_guided_steps_miss_the_stored_latents_by() -> None:
    schedule = make_schedule(6)
    trajectory = direct(gaussian, normal(1, 4, 5, 5), schedule)

    def guided(x: Tensor, move: Move) -> Tensor:
        return guide(0.9 * gaussian(x, move), gaussian(x, move), 7.5)

    offsets = direct_offsets(guided, trajectory)
    assert offsets.shape == (6, 4, 5, 5)
    walked = trace(guided, trajectory.noise, schedule.sampling())
    corrected = []

    def correct(x: Tensor, move: Move) -> Tensor:
        corrected.append(x + offsets[move.index])
        return corrected[-1]

    walk(guided, trajectory.noise, schedule.sampling(), correct)
    assert torch.allclose(torch.cat(corrected[::-1]), trajectory.latents[:-1], atol=1e-5)
    assert (walked[-1] - trajectory.clean).abs().max() > 0.01


def test_replaying_ddim_drifts_and_reconstruct_says_where_to() -> None:
    trajectory = ddim(gaussian, normal(1, 4, 5, 5), make_schedule(6), prompt="a cat")
    replayed = reconstruct(gaussian, trajectory)
    assert trajectory.replay and not replayed.replay and replayed.prompt == "a cat"
    assert torch.equal(replayed.noise, trajectory.noise)
    assert torch.equal(replayed.clean, walk(gaussian, trajectory.noise, trajectory.schedule.sampling()))
    assert 0.001 < (replayed.clean - trajectory.clean).abs().max() < 1


@pytest.mark.parametrize("steps", [5, 20])
def test_fixed_point_inversion_returns_far_closer_than_ddim(steps: int) -> None:
    clean, schedule = normal(1, 4, 6, 6), make_schedule(steps)

    def missed(method: Callable[..., Trajectory], **options) -> float:
        made = method(gaussian, clean, schedule, **options)
        return float((reconstruct(gaussian, made).clean - clean).abs().mean())

    assert missed(fixed_point, iterations=20, tolerance=0.0) < 1e-5
    assert missed(fixed_point) < missed(fixed_point, iterations=1) < missed(ddim)
    assert missed(fixed_point) < missed(ddim) / 8


def test_fixed_point_inversion_stops_when_it_has_arrived_or_leads_away() -> None:
    schedule, calls = make_schedule(4), []

    def counted(predict: Predict) -> Predict:
        return lambda x, move: calls.append(move.index) or predict(x, move)

    fixed_point(counted(lambda x, move: torch.ones_like(x)), normal(1, 4, 2, 2), schedule)
    assert len(calls) == 4 * 2
    calls.clear()
    steep = fixed_point(counted(lambda x, move: 20 * x.sin()), normal(1, 4, 2, 2), schedule, iterations=50)
    assert torch.isfinite(steep.latents).all() and len(calls) < 4 * 20
    with pytest.raises(StepsError, match="expected 1 or more"):
        fixed_point(gaussian, normal(1, 4, 2, 2), schedule, iterations=0)


def test_negative_prompt_inversion_cancels_guidance_for_the_source() -> None:
    schedule, clean, context = make_schedule(6), normal(1, 4, 5, 5), normal(1, 3, 4, seed=1)

    def of_context(x: Tensor, move: Move, tokens: Tensor) -> Tensor:
        return gaussian(x, move) + 0.1 * tokens.mean((1, 2)).view(-1, 1, 1, 1)

    made = negative_prompt(lambda x, move: of_context(x, move, context), clean, schedule, context.half(), proximal=0.7)
    assert made.null_embeddings.shape == (1, 3, 4) and made.null_embeddings.dtype == torch.float32
    assert (made.proximal, made.method, made.replay) == (0.7, "negative_prompt", False)
    assert all(made.unconditional(i) is not None and torch.equal(made.unconditional(i), made.null_embeddings) for i in range(6))
    for proximal in (None, 0.7):
        guided = reconstruct(
            lambda x, move: guide(*(of_context(x, move, context),) * 2, 7.5, proximal),  # noqa: B023
            made,
        )
        plain = reconstruct(lambda x, move: of_context(x, move, context), ddim(gaussian, clean, schedule))
        assert guided.proximal == 0.7 and plain.proximal is None
        expected = walk(lambda x, move: of_context(x, move, context), made.noise, schedule.sampling())
        assert torch.allclose(guided.clean, expected, atol=1e-6)


@given(steps=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(0, 8), data=st.data())
@settings(deadline=None, max_examples=30)
def test_edit_friendly_noise_maps_give_the_stored_latents_back_from_any_step(steps, seed, scale, data) -> None:
    schedule, clean = make_schedule(steps), normal(1, 4, 5, 4, seed=seed)

    def guided(x: Tensor, move: Move) -> Tensor:
        return guide(0.9 * gaussian(x, move), gaussian(x, move), scale)

    made = edit_friendly(guided, clean, schedule, guidance_scale=scale, seed=seed)
    assert made.noises.shape == (steps, 4, 5, 4) and made.guidance_scale == scale
    first = data.draw(st.integers(0, steps - 1))
    kept = trace(guided, made.before(first), schedule.sampling()[first:], noises=made.noises)
    assert torch.equal(torch.cat(kept[::-1]), made.latents[: steps - first + 1])
    assert torch.allclose(made.clean, clean, atol=1e-4)


def test_edit_friendly_latents_are_noised_independently_to_each_level() -> None:
    schedule, clean = make_schedule(5), normal(1, 4, 32, 32)
    made = edit_friendly(gaussian, clean, schedule)
    own = [(made.before(m.index) - m.alpha_from**0.5 * clean) / (1 - m.alpha_from) ** 0.5 for m in schedule.sampling()]
    together = torch.corrcoef(torch.cat(own).flatten(1))
    assert torch.allclose(together, torch.eye(5), atol=0.06) and all(abs(float(x.std()) - 1) < 0.05 for x in own)
    assert torch.equal(edit_friendly(gaussian, clean, schedule, seed=0).noises, made.noises)
    assert not torch.allclose(edit_friendly(gaussian, clean, schedule, seed=1).noises, made.noises)


def test_an_edit_friendly_last_step_to_no_noise_at_all_has_no_map() -> None:
    plain = make_schedule(4)
    schedule = Schedule(plain.timesteps, plain.alphas, 1.0)
    made = edit_friendly(gaussian, normal(1, 4, 4, 4), schedule)
    assert not made.noises[-1].any() and torch.isfinite(made.noises).all()
    assert torch.equal(walk(gaussian, made.noise, schedule.sampling(), noises=made.noises), made.clean)


# null-text


class TextNetwork:
    """A differentiable noise that depends on its context, nonlinearly; the start token's gradient is far the largest."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.mix, self.dtype = normal(6 * 8, 4 * 6 * 6, seed=3).to(dtype) / 30, dtype
        self.weights = torch.tensor([20.0, 1, 1, 0.5, 0.5, 0.5], dtype=dtype).view(1, 6, 1)
        self.calls: list[tuple[int, int, bool]] = []

    def __call__(self, latents: Tensor, move: Move, context: Tensor) -> Tensor:
        self.calls.append((move.index, len(latents), context.requires_grad))
        text = ((self.weights * context.to(self.dtype)).flatten(1) @ self.mix).tanh().unflatten(1, (4, 6, 6))
        return gaussian(latents, move) + 0.5 * text.float()

    def rows(self) -> int:
        return sum(rows for _, rows, _ in self.calls)


def texts(count: int = 1) -> tuple[Tensor, Tensor]:
    """Contexts of `count` prompts, and of none."""
    return 0.3 * normal(count, 6, 8, seed=4), 0.3 * normal(1, 6, 8, seed=5)


def replayed(noise: TextNetwork, made: Trajectory, context: Tensor) -> Trajectory:
    def predict(x: Tensor, move: Move) -> Tensor:
        return guide(noise(x, move, made.unconditional(move.index)), noise(x, move, context), made.guidance_scale)

    return reconstruct(predict, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimiser", ["conjugate", "adam"])
def test_null_text_embeddings_make_guided_sampling_follow_the_picture(optimiser: str, dtype: torch.dtype) -> None:
    noise, schedule, (context, null) = TextNetwork(dtype), make_schedule(10), texts()
    clean = normal(1, 4, 6, 6)
    made = null_text(noise, clean, schedule, context, null, optimiser=optimiser, prompt="a cat", fingerprint="f")
    assert (made.method, made.guidance_scale, made.prompt, made.fingerprint) == ("null_text", 7.5, "a cat", "f")
    assert made.null_embeddings.shape == (10, 6, 8) and made.null_embeddings.dtype == torch.float32
    assert not made.null_embeddings.requires_grad and not made.replay
    path = ddim(lambda x, move: noise(x, move, context), clean, schedule)
    assert torch.equal(made.latents, path.latents)

    def missed(trajectory: Trajectory) -> float:
        return float((replayed(noise, trajectory, context).latents - path.latents).square().mean())

    plain = null_text(noise, clean, schedule, context, null, inner_steps=0)
    assert torch.equal(plain.null_embeddings, null.expand(10, -1, -1))
    assert missed(made) < missed(plain) * (0.4 if optimiser == "adam" else 0.05)


def test_conjugate_gradients_miss_by_less_than_the_published_descent_at_a_third_of_the_cost() -> None:
    schedule, (context, null) = make_schedule(20), texts()
    cost, error = {}, {}
    for optimiser in ("conjugate", "adam"):
        noise = TextNetwork()
        made = null_text(noise, normal(1, 4, 6, 6), schedule, context, null, optimiser=optimiser)
        cost[optimiser] = sum(rows * (3 if differentiable else 1) for _, rows, differentiable in noise.calls)
        error[optimiser] = float((replayed(noise, made, context).latents - made.latents).square().mean())
    assert cost["conjugate"] < cost["adam"] / 2.5 and error["conjugate"] < error["adam"]


@pytest.mark.parametrize("optimiser", ["conjugate", "adam"])
def test_pictures_in_one_batch_are_inverted_as_they_are_alone(optimiser: str) -> None:
    schedule, (contexts, null) = make_schedule(8), texts(3)
    # The second's prompt is none, so there is nothing to optimise in it.
    contexts[1] = null[0]
    clean = normal(3, 4, 6, 6)
    noise = TextNetwork()
    together = null_text_batch(
        noise, clean, schedule, contexts, null, optimiser=optimiser, prompts=["a", "b", "c"], guidance_scale=4.0
    )
    rows = noise.rows()
    assert [made.prompt for made in together] == ["a", "b", "c"]
    noise.calls.clear()
    for made, x, context in zip(together, clean, contexts):
        alone = null_text(noise, x[None], schedule, context[None], null, optimiser=optimiser, guidance_scale=4.0)
        assert torch.allclose(made.latents, alone.latents, atol=1e-5)
        assert torch.allclose(made.null_embeddings, alone.null_embeddings, atol=2e-3)
    assert abs(rows - noise.rows()) <= 2


def test_what_is_close_enough_costs_two_rows_a_step() -> None:
    calls, schedule, (_, null) = [], make_schedule(8), texts()

    def noise(latents: Tensor, move: Move, context: Tensor) -> Tensor:
        calls.append(move.index)
        return torch.full_like(latents, move.t / 1000) + 0 * context.sum()

    made = null_text(noise, normal(1, 4, 6, 6), schedule, null, null)
    assert calls == [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert torch.equal(made.null_embeddings, null.expand(8, -1, -1))
    assert published_tolerance(0) == 1e-5 and published_tolerance(49) == pytest.approx(9.9e-4)


def test_the_prompts_prediction_may_depend_on_more_than_its_context() -> None:
    schedule, (context, null), noise = make_schedule(5), texts(), TextNetwork()

    def conditional(x: Tensor, move: Move) -> Tensor:
        return noise(x, move, context) + 0.01

    made = null_text(noise, normal(1, 4, 6, 6), schedule, context, null, conditional=conditional)
    assert torch.equal(made.latents, ddim(conditional, normal(1, 4, 6, 6), schedule).latents)


def test_the_published_descent_is_adam_of_torch() -> None:
    schedule, (context, null) = make_schedule(3), texts()
    noise, clean = TextNetwork(), normal(1, 4, 6, 6)
    made = null_text(noise, clean, schedule, context, null, optimiser="adam", inner_steps=4)
    x, tokens = made.noise, null
    for move in schedule.sampling():
        tokens = tokens.clone().requires_grad_()
        adam = torch.optim.Adam([tokens], lr=1e-2 * (1 - move.index / 100))
        towards = noise(x, move, context)
        for _ in range(4):
            moved = ddim_move(x, guide(noise(x, move, tokens), towards, 7.5), move.alpha_from, move.alpha_to)
            loss = (moved - made.after(move.index)).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss < published_tolerance(move.index):
                break
        tokens = tokens.detach()
        assert torch.allclose(made.unconditional(move.index), tokens, atol=1e-5)
        x = ddim_move(x, guide(noise(x, move, tokens), towards, 7.5), move.alpha_from, move.alpha_to)


def test_overflow_at_a_trial_point_is_survived_and_nan_elsewhere_is_named() -> None:
    schedule, (context, null), network = make_schedule(6), texts(), TextNetwork()

    def narrow(latents: Tensor, move: Move, tokens: Tensor) -> Tensor:
        far = (tokens - null).abs().amax((1, 2)) > 0.02
        return torch.where(far.view(-1, 1, 1, 1) & tokens.requires_grad, torch.inf, network(latents, move, tokens))

    made = null_text(narrow, normal(1, 4, 6, 6), schedule, context, null)
    assert torch.isfinite(made.null_embeddings).all()

    def broken(latents: Tensor, move: Move, tokens: Tensor) -> Tensor:
        return network(latents, move, tokens) * (torch.nan if tokens.requires_grad else 1)

    for optimiser in ("conjugate", "adam"):
        with pytest.raises(NonFiniteError, match=f"timestep {schedule.timesteps[0]}"):
            null_text(broken, normal(1, 4, 6, 6), schedule, context, null, optimiser=optimiser)


def test_null_text_refuses_what_cannot_work() -> None:
    schedule, (context, null), clean, noise = make_schedule(3), texts(), normal(1, 4, 6, 6), TextNetwork()
    for options, error, message in (
        ({"optimiser": "newton"}, TrajectoryError, "expected one of"),
        ({"guidance_scale": 1}, TrajectoryError, "nothing to optimise"),
        ({"inner_steps": -1}, StepsError, "expected 0 or more"),
    ):
        with pytest.raises(error, match=message):
            null_text(noise, clean, schedule, context, null, **options)
    with pytest.raises(TrajectoryError, match=r"latents of shape \(2, 4, 6, 6\), contexts of shape \(1, 6, 8\) and 2 prompts"):
        null_text_batch(noise, normal(2, 4, 6, 6), schedule, context, null)
    with pytest.raises(TrajectoryError, match=r"null context of shape \(1, 5, 8\); expected \(1, 6, 8\)"):
        null_text(noise, clean, schedule, context, null[:, :5])
    with pytest.raises(TrajectoryError, match="cannot be differentiated"):
        null_text(torch.no_grad()(noise), clean, schedule, context, null)


# the published implementation's numbers


@pytest.fixture(scope="module")
def published():
    """Values of the published implementation, and what they were computed from."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import load_file

    from p2p_subject.loading import load_pipeline

    folder = golden("prompt_to_prompt/checkpoint")
    values = {
        key.removeprefix("invert."): value for key, value in load_file(golden("prompt_to_prompt/golden.safetensors")).items()
    }
    if "null_embeddings" not in values:
        pytest.skip("the golden values here lack those of inversion")
    # By the library's own loader, which reads the files of every release of transformers.
    parts = load_pipeline(folder, torch.float32)
    unet, vae, encoder = (part.requires_grad_(False) for part in (parts.unet, parts.vae, parts.text_encoder))
    tokenizer, scheduler = parts.tokenizer, parts.scheduler
    scheduler.set_timesteps(5)
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    schedule = Schedule(
        timesteps, tuple(float(scheduler.alphas_cumprod[t]) for t in timesteps), float(scheduler.final_alpha_cumprod)
    )
    context, null = (
        encoder(tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids)[0]
        for text in ("a cat sitting next to a mirror", "")
    )
    with Image.open(golden("prompt_to_prompt/image.png")) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    clean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    def noise(x: Tensor, move: Move, tokens: Tensor) -> Tensor:
        return unet(x, move.t, encoder_hidden_states=tokens).sample

    def guided(unconditional: Callable[[int], Tensor]) -> Predict:
        def predict(x: Tensor, move: Move) -> Tensor:
            tokens = torch.cat([unconditional(move.index), context])
            return guide(*noise(x.repeat(2, 1, 1, 1), move, tokens).chunk(2), 7.5)

        return predict

    return values, clean, schedule, context, null, noise, guided


def deviation(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def test_paths_and_offsets_are_the_published_ones(published) -> None:
    values, clean, schedule, context, null, noise, guided = published
    made = direct(lambda x, move: noise(x, move, context), clean, schedule)
    assert deviation(made.latents, values["ddim_trajectory"]) < 1e-4
    unconditional = guided(lambda index: null)
    assert deviation(direct_offsets(unconditional, made), values["direct_offsets"]) < 2e-3
    assert deviation(reconstruct(unconditional, made).clean, values["ddim_reconstruction"]) < 2e-3
    made = negative_prompt(lambda x, move: noise(x, move, context), clean, schedule, context)
    assert deviation(reconstruct(guided(made.unconditional), made).clean, values["negative_prompt_reconstruction"]) < 2e-3


def test_null_embeddings_are_the_published_ones_with_the_published_descent(published) -> None:
    values, clean, schedule, context, null, noise, guided = published
    made = null_text(noise, clean, schedule, context, null, optimiser="adam", inner_steps=4)
    assert deviation(made.null_embeddings, values["null_embeddings"]) < 1e-3
    assert deviation(reconstruct(guided(made.unconditional), made).clean, values["null_reconstruction"]) < 2e-3
