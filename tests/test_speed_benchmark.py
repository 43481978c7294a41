"""The speed benchmark: its peer is the published method, it counts and compares what it says, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks import explicit, sd15, speed, speed_cases, speed_report
from benchmarks.explicit import published_loop
from benchmarks.memory import allocated_on_cpu, in_fresh_process
from inversion import Move
from p2p_subject import Blend, Editor, EditSpec, replace
from tests.conftest import golden
from tests.test_prompt_to_prompt import spec_of
from tests.tiny_pipelines import stable_diffusion_1

STEPS = 4


pytestmark = pytest.mark.usefixtures("own_threads")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    stable_diffusion_1().save_pretrained(folder)
    return folder


def run(model: Path, out: Path, *options: str) -> int:
    given = ["--model", str(model), "--steps", str(STEPS), "--threads", "1", "--out", str(out)]
    return speed.main([*given, *options])


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["replace_blend", "refine_blend", "reweight_blend"])
def test_the_peer_is_the_published_method(name: str) -> None:
    model = Editor.from_pretrained(golden("prompt_to_prompt/checkpoint")).model
    values = load_file(golden("prompt_to_prompt/golden.safetensors"))
    cases = json.loads(golden("prompt_to_prompt/cases.json").read_text())["cases"]
    case = next(case for case in cases if case["name"] == name)
    schedule, scale = model.schedule(case["steps"]), case["guidance_scale"]
    latents = published_loop(model, case["prompts"][0], spec_of(case), values[f"{name}.noise"], schedule, scale)
    assert (latents - values[f"{name}.latents"]).abs().max() < 1e-3
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_maps_that_are_not_needed_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Editor.from_pipeline(stable_diffusion_1()).model
    spec = replace("a dog on grass", padding="reference", blend=None)
    noise, schedule = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), model.schedule(2)
    whole = published_loop(model, "a cat on grass", spec, noise, schedule, 7.5)
    monkeypatch.setattr(explicit, "KEPT_PIXELS", 16)
    calls = []
    fused = explicit.F.scaled_dot_product_attention
    monkeypatch.setattr(explicit.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    spared = published_loop(model, "a cat on grass", spec, noise, schedule, 7.5, fused=True)
    assert calls and (whole - spared).abs().max() < 1e-4


@pytest.mark.parametrize(
    "spec",
    [
        replace("a dog on grass"),
        replace("a dog on grass", padding="reference"),
        replace("a dog on grass", padding="reference", cross_replace={"dog": 0.4}, blend=None),
        replace("a dog on grass", padding="reference", blend=Blend(("cat",), ("dog",), rule="peak", maps="running")),
    ],
)
def test_the_peer_refuses_what_the_published_code_does_not_have(spec: EditSpec) -> None:
    model = Editor.from_pipeline(stable_diffusion_1()).model
    with pytest.raises(ValueError, match="expected"):
        explicit.published_run(model, "a cat on grass", spec, 2, (8, 8), 7.5)


def test_sd15_has_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        published = UNet2DConditionModel(**sd15.UNET)
    assert sum(weight.numel() for weight in published.parameters()) == sd15.PARAMETERS
    monkeypatch.setitem(sd15.TEXT, "num_hidden_layers", 1)
    small = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 2}
    model = Editor.from_pipeline(sd15.pipeline(**small)).model
    assert (model.scale_factor, model.window, model.area) == (8, 77, 512 * 512)
    context, latents = model.encode(model.layout("a cat on grass")), torch.randn(1, 4, 16, 16)
    assert context.tokens.shape == (1, 77, 768) and len(model.layout("a cat on grass").content) == 4
    noise = model.noise(latents, Move(0, 500, 0.1, 0.2), context)
    assert noise.isfinite().all() and 0.01 < noise.std() < 100


def test_everything_is_measured_and_rows_are_counted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(speed, "in_fresh_process", lambda function, *arguments: function(*arguments))
    assert run(tiny, tmp_path, "--repeats", "1") == 0
    rows = {row["case"]: row for row in rows_of(tmp_path)}
    assert set(rows) == set(speed.CASES) - {"run published-fused"}
    a_step = {
        "run generate": 2,
        "run edit-recorded": 2,
        "run edit-generated": 3,
        "run edit-inverted": 3,
        "run published": 4,
        "run generate-4": 8,
        "run edit-recorded-4": 8,
        "run record": 1,
    }
    assert {case: rows[case]["rows"] / STEPS for case in a_step} == a_step
    assert all(rows[case]["rows"] == int(case[-1]) and rows[case]["unet_calls"] == 1 for case in speed.STEPS)
    assert all(rows[case]["seconds"] > 0 for case in speed.TIMED if case in rows) and rows["run record"]["recording"] > 0
    held = {case: rows[case]["allocated"] for case in speed.PEAKS}
    assert held["peak plain-2"] < held["peak plain-3"] < held["peak plain-4"] < held["peak explicit-4"]
    assert held["peak edit-3"] < held["peak explicit-4"] and all(rows[case]["peak"] >= 0 for case in speed.PEAKS)
    assert rows["equality"]["equal"] and rows["equality"]["deviation"] < 1e-3 and rows["equality"]["mask"] > 0
    assert rows["startup inversion"]["beside_torch"] == [] and rows["startup help"]["torch"] is False
    assert rows["step edit-3"]["settings"]["steps"] == STEPS and rows["step edit-3"]["environment"]["versions"]["torch"]
    text = capsys.readouterr().out
    assert "published loop / edit of a recorded source" in text and "refused" not in text
    assert all(label in text for case, label in speed_report.LABELS.items() if case in rows)
    assert len([line for line in text.splitlines() if line.startswith("U-Net rows a step") and line.endswith(" met")]) == 4


def test_a_rerun_goes_on_where_the_last_one_stopped(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = speed.environment("cpu")
    monkeypatch.setattr(speed, "environment", lambda device: same)
    chosen = ("--cases", "step plain-2", "run generate")
    run(tiny, tmp_path, *chosen, "--repeats", "1")
    first = (tmp_path / "cases.jsonl").read_text()
    (tmp_path / "cases.jsonl").write_text(first + '{"case": "run gen')  # killed while it wrote
    run(tiny, tmp_path, *chosen, "--repeats", "2")
    after = (tmp_path / "cases.jsonl").read_text()
    assert after.startswith(first)
    rows = [json.loads(line) for line in after.splitlines() if line.endswith("}")]
    names = ["step plain-2", "run generate"]
    assert [(row["case"], row["round"]) for row in rows] == [(name, number) for number in (1, 2) for name in names]

    def nothing(*_: object) -> None:
        pytest.fail("all of it was measured")

    monkeypatch.setattr(speed, "_open", nothing)
    run(tiny, tmp_path, *chosen, "--repeats", "2")
    assert (tmp_path / "cases.jsonl").read_text() == after


def test_rows_of_other_code_or_settings_are_measured_anew(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, steps in (("a", "3"), ("b", "3"), ("b", "4"), ("b", "4")):
        monkeypatch.setattr(speed, "environment", lambda device, code=code: speed.machine() | {"code": code})
        run(tiny, tmp_path, "--cases", "step plain-2", "--repeats", "1", "--steps", steps)
    measured = [(row["environment"]["code"], row["settings"]["steps"]) for row in rows_of(tmp_path)]
    assert measured == [("a", 3), ("b", 3), ("b", 4)]


def test_no_ratio_to_a_loop_of_another_output(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = speed_cases.Bench.published
    monkeypatch.setattr(speed_cases.Bench, "published", lambda bench, *a, **k: right(bench, *a, **k) + 0.01)
    assert run(tiny, tmp_path, "--repeats", "1", "--cases", "run published", "run edit-recorded") == 1
    assert not rows_of(tmp_path)[0]["equal"]
    text = capsys.readouterr().out
    assert "refused: outputs differ by 1.0e-02" in text and text.count("NOT MET") >= 2


def test_equality_needs_an_edit_that_changes_something(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = speed_cases.Bench.open(str(tiny), "cpu", torch.float32, STEPS)
    clean = bench.generated.trajectory.clean
    monkeypatch.setattr(bench, "published", lambda noise, fused=False: clean.expand(2, -1, -1, -1))
    monkeypatch.setattr(bench, "edit", lambda source, count=1: clean)
    unchanged = type("Unchanged", (), {"latents": clean, "mask": bench.generated.image})
    monkeypatch.setattr(bench.editor, "edit", lambda *_, **__: unchanged)
    found = speed_cases.equality(bench)
    assert found["deviation"] == 0 and not found["equal"]


def test_rows_are_counted_where_they_are_run_and_no_hook_is_left(tiny: Path) -> None:
    model = Editor.from_pretrained(tiny).model
    context = model.encode(model.layout("a cat")).expand(5)
    with speed_cases.counted_rows(model.unet) as rows:
        model.noise(torch.zeros(5, 4, 8, 8), Move(0, 500, 0.1, 0.2), context)
    model.noise(torch.zeros(5, 4, 8, 8), Move(0, 500, 0.1, 0.2), context)
    assert rows == [5] and not model.unet._forward_pre_hooks


def test_ratios_are_taken_within_a_round_and_judged() -> None:
    pairs = [(1.0, 1.02), (10.0, 10.4), (2.0, 2.5)]
    rows = [
        {"case": case, "round": number, "seconds": pair[which], "rows": rows}
        for number, pair in enumerate(pairs, 1)
        for which, (case, rows) in enumerate((("step plain-3", 3), ("step edit-3", 3)))
    ]
    (figure,) = speed_report.figures(rows, "cpu", 50)
    assert (figure.measured, figure.bound, figure.met) == ("1.040 (1.020 to 1.250)", "<= 1.05", True)
    assert speed_report.figures(rows, "cuda", 50)[0].met is False
    sizes = {"peak plain-2": 100 * 2**20, "peak recorded-2": 105 * 2**20}
    peaks = [{"case": case, "round": 1, "peak": size} for case, size in sizes.items()]
    (figure,) = speed_report.figures(peaks, "cpu", 50)
    assert (figure.measured, figure.met) == ("+5.0 % (+5.0 MiB)", False)


def test_without_matplotlib_there_is_no_plot_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in ("matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    speed_report.plot({}, tmp_path / "speed.png")
    assert "p2p_subject[benchmarks]" in capsys.readouterr().err and not (tmp_path / "speed.png").exists()


def test_with_matplotlib_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = speed.Settings("miniature", "cpu", "float32", 50, 1)
    rows = [{"case": "run generate", "round": number, "seconds": number} for number in (1, 2)]
    speed_report.plot({settings: rows}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_what_torch_allocates_is_counted() -> None:
    def two_and_one() -> None:
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first, second
        torch.empty(500)

    torch.empty(5000)
    assert allocated_on_cpu(two_and_one) == pytest.approx(12_000, abs=256)


def test_fresh_processes_are_others() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()


def test_cases_are_chosen_by_name_or_by_how_they_begin() -> None:
    assert speed.chosen(["run generate"]) == ["run generate"]
    assert speed.chosen(["run gen", "startup"]) == ["run generate", "run generate-4", *speed.STARTUP]
    assert speed.chosen(["run published"]) == ["equality", "run published"]
    assert speed.chosen([""]) == list(speed.CASES) and speed.chosen(["nothing"]) == []


@pytest.mark.parametrize("options", [["--cases", "nothing"], ["--steps", "2"], ["--repeats", "0"]])
def test_wrong_arguments_are_refused_at_once(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        speed.main(options)
    assert options[0] in capsys.readouterr().err
