"""Schedule, walk, trajectory and DDIM inversion, on predictors that are plain functions."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inversion import (
    ModelMismatchError,
    Move,
    NonFiniteError,
    OutputError,
    P2PSubjectError,
    Schedule,
    ScheduleError,
    StepsError,
    Trajectory,
    TrajectoryError,
    ddim,
    ddim_move,
    to_epsilon,
    walk,
)


def make_schedule(steps: int, prediction_type: str = "epsilon") -> Schedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    timesteps = tuple(int(i * (1000 // steps)) + 1 for i in reversed(range(steps)))
    return Schedule(timesteps, tuple(float(alphas[min(t, 999)]) for t in timesteps), float(alphas[0]), prediction_type)


@given(steps=st.integers(1, 200))
@settings(deadline=None)
def test_moves_form_one_chain_and_inversion_is_its_mirror(steps: int) -> None:
    schedule = make_schedule(steps)
    forth, back = schedule.sampling(), schedule.inverting()
    assert len(forth) == len(back) == schedule.steps == steps
    assert all(a.alpha_to == b.alpha_from for a, b in zip(forth, forth[1:]))
    assert forth[-1].alpha_to == schedule.final_alpha
    for move, mirror in zip(forth, reversed(back)):
        assert (move.t, move.index, move.alpha_from, move.alpha_to) == (
            mirror.t,
            mirror.index,
            mirror.alpha_to,
            mirror.alpha_from,
        )
        assert move.alpha_t == mirror.alpha_t == move.alpha_from < move.alpha_to


levels = st.floats(0.005, 0.999)


@given(a=levels, b=levels, c=levels, seed=st.integers(0, 99))
@settings(deadline=None)
def test_ddim_moves_compose_and_invert_for_a_fixed_noise(a: float, b: float, c: float, seed: int) -> None:
    x, eps = torch.randn(2, 1, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(ddim_move(ddim_move(x, eps, a, b), eps, b, c), ddim_move(x, eps, a, c), atol=1e-9)
    assert torch.allclose(ddim_move(ddim_move(x, eps, a, b), eps, b, a), x, atol=1e-9)
    assert torch.allclose(ddim_move(x, eps, a, a), x, atol=1e-12)


@given(alpha=levels, seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_three_kinds_of_prediction_mean_the_same_noise(alpha: float, seed: int) -> None:
    clean, eps = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps
    velocity = alpha**0.5 * eps - (1 - alpha) ** 0.5 * clean
    for output, kind in ((eps, "epsilon"), (velocity, "v_prediction"), (clean, "sample")):
        assert torch.allclose(to_epsilon(output, x, alpha, kind), eps, atol=1e-8)


@given(steps=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_inversion_then_sampling_returns_for_a_noise_that_does_not_depend_on_the_latents(steps: int, seed: int) -> None:
    schedule = make_schedule(steps)
    clean = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(seed))

    def predict(latents: torch.Tensor, move: Move) -> torch.Tensor:
        return torch.full_like(latents, move.t / 1000)

    trajectory = ddim(predict, clean, schedule, prompt="x")
    assert torch.equal(trajectory.clean, clean) and len(trajectory.latents) == steps + 1
    returned = walk(predict, trajectory.noise, schedule.sampling())
    assert torch.allclose(returned, clean, atol=1e-4)


def test_a_linear_predictor_is_inverted_to_first_order_in_the_step() -> None:
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def error(steps: int) -> float:
        schedule = make_schedule(steps)
        trajectory = ddim(lambda x, move: 0.5 * x, clean, schedule)
        return float((walk(lambda x, move: 0.5 * x, trajectory.noise, schedule.sampling()) - clean).abs().max())

    assert error(200) < 0.3 * error(50)


def test_trajectory_indexes_steps_from_the_noise() -> None:
    schedule = make_schedule(3)
    latents = torch.arange(4.0).view(4, 1, 1, 1)
    trajectory = Trajectory(latents, schedule, "", "ddim")
    assert [float(trajectory.before(i)) for i in range(3)] == [3, 2, 1]
    assert [float(trajectory.after(i)) for i in range(3)] == [2, 1, 0]


@given(
    steps=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    null=st.sampled_from(["none", "one", "each"]),
    noisy=st.booleans(),
    proximal=st.none() | st.floats(0.01, 0.99),
    replay=st.booleans(),
    prompt=st.text(max_size=20),
)
@settings(deadline=None, max_examples=30)
def test_save_and_load_round_trip(tmp_path_factory, steps, height, width, null, noisy, proximal, replay, prompt) -> None:
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    embeddings = {"none": None, "one": torch.randn(1, 7, 3), "each": torch.randn(steps, 7, 3)}[null]
    noises = torch.randn(steps, 4, height, width) if noisy else None
    prompt = prompt.encode("utf-8", "ignore").decode()
    made = Trajectory(
        torch.randn(steps + 1, 4, height, width),
        make_schedule(steps),
        prompt,
        "ddim",
        2.5,
        "abc",
        null_embeddings=embeddings,
        noises=noises,
        proximal=proximal,
        replay=replay,
    )
    made.save(path)
    read = Trajectory.load(path)
    assert read.schedule == made.schedule and (read.proximal, read.replay) == (proximal, replay)
    assert (read.prompt, read.method, read.guidance_scale, read.fingerprint) == (prompt, "ddim", 2.5, "abc")
    for name, tensor in made.tensors().items():
        assert (getattr(read, name) is None) if tensor is None else torch.equal(getattr(read, name), tensor)
    for index in range(steps):
        expected = None if embeddings is None else embeddings[index % len(embeddings)][None]
        assert read.unconditional(index) is expected or torch.equal(read.unconditional(index), expected)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_of_before_sources_could_be_replayed_is_read() -> None:
    tensors, metadata = made().pack()
    values = json.loads(metadata["trajectory"])
    del values["replay"], values["proximal"]
    read = Trajectory.unpack(tensors, metadata | {"trajectory": json.dumps(values)})
    assert not read.replay and read.proximal is None


def test_bad_trajectories_and_files_are_refused(tmp_path) -> None:
    schedule = make_schedule(3)
    with pytest.raises(TrajectoryError, match=r"needs \(4, C, h, w\)"):
        Trajectory(torch.zeros(3, 4, 2, 2), schedule, "", "ddim")
    with pytest.raises(TrajectoryError, match=r"null embeddings of shape \(2, 5, 3\) for 3 steps"):
        Trajectory(torch.zeros(4, 4, 2, 2), schedule, "", "ddim", null_embeddings=torch.zeros(2, 5, 3))
    with pytest.raises(
        TrajectoryError, match=r"noise maps of shape \(2, 4, 2, 2\); expected one for each step, \(3, 4, 2, 2\)"
    ):
        Trajectory(torch.zeros(4, 4, 2, 2), schedule, "", "ddim", noises=torch.zeros(2, 4, 2, 2))
    with pytest.raises(TrajectoryError, match="proximal=2; expected a quantile"):
        Trajectory(torch.zeros(4, 4, 2, 2), schedule, "", "ddim", proximal=2)
    for name, tensor in (("latents", (4, 4, 2, 2)), ("null_embeddings", (3, 5, 3)), ("noises", (3, 4, 2, 2))):
        with pytest.raises(NonFiniteError, match=f"{name} of the trajectory"):
            tensors = {"latents": torch.zeros(4, 4, 2, 2), name: torch.full(tensor, torch.nan)}
            Trajectory(schedule=schedule, prompt="", method="ddim", **tensors)
    with pytest.raises(TrajectoryError, match="no such file"):
        Trajectory.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(TrajectoryError, match="not a readable safetensors file"):
        Trajectory.load(tmp_path / "junk.safetensors")
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(TrajectoryError, match="not a saved trajectory"):
        Trajectory.load(tmp_path / "other.safetensors")
    with pytest.raises(TrajectoryError, match="one picture"):
        ddim(lambda x, move: x, torch.zeros(2, 4, 2, 2), schedule)


def made(steps: int = 3) -> Trajectory:
    return Trajectory(torch.zeros(steps + 1, 4, 2, 2), make_schedule(steps), "a cat", "ddim", 2.5, "abc")


def test_trajectories_are_compared_by_identity() -> None:
    one, other = made(), made()
    assert one == one and one != other and other in [one, other] and len({one, other}) == 2


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    for name, message in (("missing/a.safetensors", "create it first"), ("folder", "is a directory")):
        with pytest.raises(OutputError, match=message) as caught:
            made().save(tmp_path / name)
        assert isinstance(caught.value, OSError) and isinstance(caught.value, P2PSubjectError)

    from safetensors import SafetensorError

    def fail(tensors, path, metadata):
        path.write_bytes(b"part")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"a\.safetensors.*No space left"):
        made().save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "folder"]


def test_a_saved_file_is_as_readable_as_any_other(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    (tmp_path / "plain").touch()
    made().save(path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    made().save(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_name_of_the_longest_length_can_be_saved(tmp_path) -> None:
    path = tmp_path / ("a" * 243 + ".safetensors")
    made().save(path)
    assert Trajectory.load(path).prompt == "a cat"


def test_threads_may_save_to_one_place_at_once(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: made().save(path), range(64)))
    assert Trajectory.load(path).prompt == "a cat" and len(list(tmp_path.iterdir())) == 1


def damaged(**changes) -> str:
    values = json.loads(made().pack()[1]["trajectory"])
    return json.dumps({key: value for key, value in (values | changes).items() if value is not ...})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "entry 'trajectory' is missing"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("3", "damaged"),
        ("[" * 100_000, "damaged"),
        (damaged(schedule=...), "entry 'schedule' is missing"),
        (damaged(schedule=3), "damaged"),
        (damaged(schedule={"timesteps": [1]}), "entry 'alphas' is missing"),
        (damaged(schedule={"timesteps": [1], "alphas": ["x"], "final_alpha": 1}), "damaged"),
        (damaged(schedule={"timesteps": [1], "alphas": [0.5], "final_alpha": 1}), "needs"),
        (damaged(schedule={"timesteps": [1], "alphas": [0.5], "final_alpha": 1, "x": 1}), "damaged"),
        (damaged(prompt=3), "prompt is 3, expected a text"),
        (damaged(guidance_scale=None), "damaged"),
        (damaged(surplus=1), "surplus"),
        (damaged(replay="no"), "replay is 'no', expected true or false"),
        (damaged(proximal="much"), "expected a quantile"),
    ],
)
def test_a_damaged_header_is_a_trajectory_error(header, message) -> None:
    tensors, metadata = made().pack()
    metadata = {"format": metadata["format"]} | ({} if header is None else {"trajectory": header})
    with pytest.raises(TrajectoryError, match=f"(?s)^file: .*{message}"):
        Trajectory.unpack(tensors, metadata, "file")


def test_another_model_is_refused_by_both_names() -> None:
    trajectory = Trajectory(torch.zeros(2, 4, 2, 2), make_schedule(1), "", "ddim", fingerprint="aaaa")
    trajectory.require_model("aaaa")
    with pytest.raises(ModelMismatchError, match=r"aaaa.*bbbb"):
        trajectory.require_model("bbbb")


def test_nan_in_a_prediction_raises_the_named_error_with_its_timestep() -> None:
    schedule = make_schedule(4)
    seen = []

    def predict(x: torch.Tensor, move: Move) -> torch.Tensor:
        seen.append(move.index)
        return x * (torch.nan if move.index == 1 else 0.1)

    with pytest.raises(NonFiniteError, match=f"timestep {schedule.timesteps[1]}:"):
        walk(predict, torch.ones(1, 4, 2, 2), schedule.sampling(), lambda x, move: torch.zeros_like(x))
    assert seen == [0, 1]  # it stops there, even though what follows would hide it
    with pytest.raises(NonFiniteError):
        walk(lambda x, move: x, torch.full((1, 4, 2, 2), torch.inf), schedule.sampling())


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (((), (), 1.0), StepsError),
        (((1, 2), (0.5,), 1.0), ScheduleError),
        (((1,), (0.0,), 1.0), ScheduleError),
        (((2, 1), (0.5, 0.4), 1.0), ScheduleError),
        (((1,), (0.5,), 1.0, "flow"), ScheduleError),
    ],
)
def test_schedules_that_cannot_be_walked_are_refused(fields, error) -> None:
    with pytest.raises(error) as caught:
        Schedule(*fields)
    assert isinstance(caught.value, P2PSubjectError) and isinstance(caught.value, ValueError)


def test_importing_inversion_loads_torch_and_no_other_part_of_the_stack() -> None:
    code = "import sys, inversion; print([m for m in ('diffusers', 'transformers', 'PIL', 'p2p_subject') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
