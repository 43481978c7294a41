"""Methods are what was published, runs resume with nothing lost or doubled, reports say all that the rows hold."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import lanes, report, run
from benchmarks.meter import metered
from benchmarks.method_names import described, method_of, names_of
from benchmarks.methods import METHODS, Method, Paste
from benchmarks.report_tables import grouped, sections, shared, worst_first
from benchmarks.run_folder import RunError, RunFolder, file_name, read_rows, read_settings
from benchmarks.suite import Case, Options, SuiteError
from benchmarks.worker import Settings, finite
from benchmarks.world_suite import WorldSuite
from p2p_subject import Editor, EditResult, EditSpec, Source
from p2p_subject.blip_diffusion import PAPER
from p2p_subject.controller import steps_of
from p2p_subject.errors import ArgumentError, ModelError
from tests.tiny_pipelines import stable_diffusion_1

MINE = """
import os, signal
from pathlib import Path
from PIL import Image
from benchmarks.suite import Edited

def copied(editor, case):
    return Edited(case.source)

def answer(editor, case):
    return Edited(case.truth, Image.fromarray(case.mask).convert("L"), cost={"rows": 7})

answer.mask_input = True

def picky(editor, case):
    if case.id.endswith("1"):
        raise RuntimeError("not this one")
    return Edited(case.source)

def bare(editor, case):
    assert case.mask is case.truth is case.source_mask is case.reference_mask is case.facts is None
    return Edited(case.source)

def dear(editor, case):
    return Edited(case.source, cost={"rows": "7"})

def traced(editor, case):
    return Edited(case.source, trajectory=case.source)

def wrong(editor, case):
    return Edited(case.source.resize((32, 32))) if case.id.endswith("1") else case.source

def deadly(editor, case):
    os.kill(os.getpid(), signal.SIGKILL)

def leaving(editor, case):
    raise SystemExit(3)

def killed(editor, case):
    if case.id.endswith("2") and not Path(__file__).with_name("lives").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return Edited(case.source)
"""


pytestmark = pytest.mark.usefixtures("own_threads")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a user's methods, found by new processes as well."""
    (tmp_path / "my_methods.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_methods", raising=False)
    return tmp_path


def settings_of(folder: Path, out: Path, methods: str, **options: object) -> Settings:
    asked = Options(**{"count": 2, "kinds": ("swap",)} | options)
    return Settings("world", tuple(names_of(methods)), out, asked, model=str(folder), steps=3)


# Methods


def test_ancestors_edit_with_published_settings() -> None:
    swap, words = (WorldSuite(Options()).case(id) for id in ("swap-0000", "replace-0000"))
    for name in ("ddim+p2p", "null-text+p2p", "negative-prompt+p2p", "direct+p2p-2022"):
        spec = METHODS[name].spec(swap, True)
        assert (spec.cross_replace, spec.self_replace, spec.room) == ((0, 0.8), (0, 0.4), 0)
        assert (spec.alignment, spec.padding) == ("refine", "reference")
        assert (spec.blend.rule, spec.blend.threshold, spec.blend.start, spec.blend.maps) == ("peak", 0.3, 0.2, "running")
        assert METHODS[name].spec(words, True).alignment == "replace" and METHODS[name].steps == 50
        on_pie = METHODS[name].spec(replace(words, suite="pie"), True)
        assert (on_pie.cross_replace, on_pie.self_replace, on_pie.alignment) == ((0, 0.4), (0, 0.6), "refine")
        assert dict(on_pie.weights) == {words.target_words[0]: 2.0}
    # Ju et al. edit any picture as those of PIE-Bench.
    for spec in (METHODS["direct+p2p"].spec(words, True), METHODS["direct+p2p"].spec(replace(words, suite="pie"), True)):
        assert (spec.cross_replace, spec.self_replace, spec.alignment) == ((0, 0.4), (0, 0.6), "refine")
        assert dict(spec.weights) == {words.target_words[0]: 2.0} and spec.blend.start == 0.2
    assert METHODS["direct+p2p"].spec(swap, True).self_replace == (0, 0.6)
    assert METHODS["null-text+p2p"].options == {"optimiser": "adam", "inner_steps": 10}
    lavis = METHODS["lavis"].spec(swap, True)
    assert lavis.blend.source_words == swap.source_words and lavis.blend.target_words == () and lavis.blend.start == 0
    assert (lavis.alignment, lavis.room) == ("refine", 0) and lavis.subject.category == swap.category
    friendly = METHODS["edit-friendly+p2p"]
    assert friendly.spec(replace(words, suite="pie"), True).alignment == "replace"
    # 20 and 30 of 50 steps, counted from the first after the 12 that are left out.
    spec = friendly.spec(words, True)
    for window, count in ((spec.cross_replace, 20), (spec.self_replace, 30)):
        assert list(steps_of(window, 50))[12:] == list(range(12, 12 + count))
    assert friendly.spec(swap, True).blend is None and friendly.skip == 0.24 and friendly.options == {"guidance_scale": 1.0}
    assert not any(method.paste for name, method in METHODS.items() if isinstance(method, Method) and "ours" not in name)


def test_the_published_sides_of_self_attention_are_shares_of_the_latents(miniature_folder: Path, monkeypatch) -> None:
    editor, seen, edit = Editor.from_pretrained(miniature_folder), [], Editor.edit

    def told(self: Editor, source: Source, spec: EditSpec, **options: object) -> EditResult:
        seen.append(spec.self_resolution)
        return edit(self, source, spec, **options)

    monkeypatch.setattr(Editor, "edit", told)
    # Of latents of 64 they are 32 and 16; the miniature's are of 16.
    assert method_of("lavis[self_resolution=6]").self_share is None
    for name, side in (("direct+p2p", 8), ("negative-prompt+p2p", 8), ("lavis", 4), ("edit-friendly+p2p", 4), ("ours", None)):
        method_of(f"{name}[steps=5]")(editor, WorldSuite(Options()).case("swap-0000"))
        assert seen.pop() == side and METHODS[name].self_share == {8: 32 / 64, 4: 16 / 64, None: None}[side]


def test_ours_edits_with_the_editors_defaults() -> None:
    from p2p_subject import Subject, add, remove, swap_subject

    suite = WorldSuite(Options())
    case = suite.case("swap-0000")
    expected = swap_subject(case.source_words[0], Subject(list(case.references), case.category))
    spec = METHODS["ours"].spec(case, True)
    assert spec == replace(expected, blend=replace(expected.blend, source_words=case.source_words), subject=spec.subject)
    roomier, words = method_of("ours[room=0.25]"), suite.case("recolour-0000")
    assert roomier.spec(case, True) == replace(spec, room=0.25) and roomier.spec(words, True).room == 0
    best = METHODS["ours-best"]
    assert best.spec(case, True) == spec and best.spec(words, True).cross_replace == (0, 0.4)
    assert method_of("ours-best[cross_replace=0.6]").spec(words, True).cross_replace == (0, 0.6)
    empty = suite.case("add-0000")
    assert METHODS["ours"].spec(empty, True) == add(list(empty.target_words), empty.target_prompt)
    assert method_of("ours[room=0.5,cross_replace=0.6]").spec(empty, True).cross_replace == (0, 0.6)
    out, removal = suite.case("remove-0000"), METHODS["ours"].spec(suite.case("remove-0000"), True)
    assert removal == best.spec(out, True) == remove(list(out.source_words), out.target_prompt)
    assert out.removes and not METHODS["ours"].spec(replace(out, removes=False), True).erase
    assert not METHODS["direct+p2p"].spec(out, True).erase and method_of("ours[grow=0]").spec(out, True).grow == 0
    assert METHODS["ours+mask"].spec(out, True).erase and method_of("ours+mask[feather=3]").spec(out, True).blend.feather == 3
    assert not replace(METHODS["ours"], blend=None).spec(out, True).erase
    assert method_of("ours[self_replace=0.2]").spec(out, True).self_replace == (0, 0.2)
    assert METHODS["ours"].paste and not METHODS["ours"].mask_input
    given = METHODS["ours+mask"].spec(case, True).blend
    assert given.mask is not None and METHODS["ours+mask"].mask_input
    # A model without subjects is given the word, a prompt without words to blend all of the picture.
    assert METHODS["ours"].spec(case, False).subject is None and METHODS["ours"].spec(case, False).prompt == case.target_prompt
    plain = replace(suite.case("replace-0000"), source_words=(), target_words=())
    assert METHODS["ours"].spec(plain, True).blend is None
    assert [kind for kind in suite.kinds if METHODS["lavis"].applies(suite.case(f"{kind}-0000"))] == ["swap"]


def test_paste_shows_the_reference_in_the_old_place() -> None:
    case = WorldSuite(Options()).case("swap-0001")
    edited = Paste()(None, case)
    mask, picture, source = np.asarray(edited.mask) > 127, np.asarray(edited.image), np.asarray(case.source)
    assert np.array_equal(picture[~mask], source[~mask]) and (picture != source).any(-1)[mask].mean() > 0.8
    old, new = Image.fromarray(case.source_mask).getbbox(), edited.mask.getbbox()
    assert all(abs((a[0] + a[2]) - (b[0] + b[2])) <= 4 for a, b in ((old, new),))
    assert abs(max(old[2] - old[0], old[3] - old[1]) - max(new[2] - new[0], new[3] - new[1])) <= 3


def test_methods_are_named_with_settings() -> None:
    text = "ours, ours[steps=20,threshold=0.5] ,a.b:c,ours[cross_replace=[0.1, 0.5],steps=3]"
    assert names_of(text) == ["ours", "ours[steps=20,threshold=0.5]", "a.b:c", "ours[cross_replace=[0.1, 0.5],steps=3]"]
    case = WorldSuite(Options()).case("replace-0000")
    assert method_of(names_of(text)[3]).spec(case, True).cross_replace == (0.1, 0.5) and method_of(names_of(text)[3]).steps == 3
    changed = method_of("direct+p2p[cross_replace=0.6,threshold=0.4,skip=0.2,rule=share]")
    assert changed.edit["cross_replace"] == changed.pie["cross_replace"] == 0.6 and changed.skip == 0.2
    assert changed.blend["threshold"] == 0.4 and changed.blend["rule"] == "share" and METHODS["direct+p2p"].skip == 0
    guided = method_of("null-text+p2p", steps=4, guidance_scale=2.0)
    assert (guided.steps, guided.guidance_scale, guided.options["guidance_scale"]) == (4, 2.0, 2.0)
    assert method_of("generate-only[steps=3]").steps == 3
    assert described(changed)["blend"]["threshold"] == 0.4
    assert json.dumps(described(method_of("null-text+p2p"))) and described(METHODS["blip-diffusion"])["call"] == PAPER
    assert method_of("ours[paste=false,guidance_scale=null,skip=0.2]").paste is False


def test_what_a_method_leaves_to_the_library_is_among_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = described(METHODS["ours"])["edits"]
    assert (edits["words"]["cross_replace"], edits["words"]["room"]) == ([0, 0.8], 0)
    assert (edits["words"]["blend"]["grow"], edits["removal"]["blend"]["grow"]) == (0, 1)
    assert described(METHODS["direct+p2p"])["edits"]["pie"]["weights"] == [["dog", 2.0]]
    assert (edits["subject"]["cross_replace"], edits["subject"]["room"]) == ([0, 0.2], 0.5)
    assert edits["subject"]["blend"]["source_words"] == ["cat"] and described(METHODS["lavis"])["edits"].keys() == {"subject"}
    # Another default of the library is another method, whatever its own fields say.
    other = lambda word, subject, **changes: EditSpec(swap=word, subject=subject, **{"room": 0.25, **changes})  # noqa: E731
    monkeypatch.setattr("benchmarks.methods.swap_subject", other)
    assert described(METHODS["ours"]) != json.loads(json.dumps(described(METHODS["ours"]) | {"edits": edits}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("our", "Did you mean 'ours'"),
        ("ours[window=3]", "no setting 'window'"),
        ("ours[treshold=0.3]", "Did you mean 'threshold'"),
        ("ours+mask[threshold=0.3]", "no setting 'threshold'"),
        ("generate-only[paste=true]", "expected one of guidance_scale, steps"),
        ("direct+p2p[weight=3]", "no setting 'weight'"),
        ("lavis[self_share=x]", "self_share='x'; expected a share above 0"),
        ("lavis[self_share=0]", "self_share=0; expected a share above 0"),
        ("ours[steps]", "expected settings such as"),
        ("ours[steps=3", "expected settings such as"),
        ("paste[steps=3]", "has no settings"),
        ("edit-friendly+p2p[threshold=0.2]", "no setting 'threshold'"),
        ("ours[mask_input=true]", "no setting 'mask_input'"),
        ("ours[steps=abc]", "steps='abc'; expected a whole number"),
        ("ours[steps=true]", "steps=True; expected a whole number"),
        ("ours[paste=False]", "paste='False'; expected true or false"),
        ("direct+p2p[published=null]", "published=None; expected true or false"),
        ("ours[skip=1]", "skip=1; expected a fraction"),
        ("ours[erase=true]", "no setting 'erase'"),
        ("ours[guidance_scale=NaN]", "guidance_scale=nan; expected a number"),
        ("null-text+p2p[guidance_scale=x]", "guidance_scale='x'; expected a number"),
        ("ours[inversion=directly]", "method='directly'"),
        ("null-text+p2p[inversion=ddim]", "no option 'optimiser'"),
        ("ours[cross_replace=2]", "cross_replace"),
        ("ours[threshold=x]", "threshold"),
        ("no_such_module:f", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("json:decoder", "expected a function"),
    ],
)
def test_methods_that_do_not_exist_are_refused(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method_of(name)


def test_the_meter_counts_calls_rows_and_gradients() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (2 * x,)

    net = Net()
    with metered(net, torch.device("cpu")) as cost:
        net(torch.ones(3, 2))
        leaf = torch.ones(2, 2, requires_grad=True)
        net(leaf)[0].sum().backward()
    assert (cost["nfe"], cost["rows"], cost["backward_rows"]) == (2, 5, 2)
    assert cost["seconds"] > 0 and cost["cpu_seconds"] >= 0
    net(torch.ones(3, 2))
    assert cost["nfe"] == 2 and finite(None, "rows") is None and finite(True, "rows") == 1.0
    for value in (float("nan"), float("-inf")):
        with pytest.raises(SuiteError, match="measure 'rows' is"):
            finite(value, "rows")


# Runs


@pytest.fixture(scope="module")
def everything(miniature_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every method on a swap and a change of words, 3 steps of a random model."""
    out = tmp_path_factory.mktemp("runs") / "all"
    settings = settings_of(miniature_folder, out, ",".join(METHODS), count=1, kinds=("swap", "replace"))
    run.measure(settings)
    return out


def test_every_method_runs_and_its_rows_say_what_made_them(everything: Path) -> None:
    rows = {(row["method"], row["kind"]): row for row in read_rows(everything)}
    assert not [row["error"] for row in rows.values() if "error" in row]
    only_swaps = {"lavis", "paste"}
    asked = METHODS.keys() - {"blip-diffusion"}  # which generates without a source
    assert rows.keys() == {(n, k) for n in asked for k in ("swap", "replace") if k == "swap" or n not in only_swaps}
    assert {name for (name, _), row in rows.items() if row["pasted"]} == {n for n in asked if n.startswith("ours")}
    assert {name for (name, _), row in rows.items() if row["mask_input"]} == {"ours+mask", "paste"}
    for (name, _), row in rows.items():
        values = row["metrics"]
        assert values.keys() == {measure.name for measure in WorldSuite.measures}
        assert row["device"] == "cpu" and row["versions"]["torch"] and row["code"] and row["model"] and row["seed"] is not None
        assert (everything / row["pictures"]["edited"]).is_file() and (everything / row["pictures"]["truth"]).is_file()
        assert (row["trajectory"] is None) == (name == "paste") and (values["nfe"] == 0) == (name == "paste")
        assert values["backward_rows"] > 0 or name != "null-text+p2p"
        assert values["work"] == values["rows"] + 2 * values["backward_rows"]
    swaps = {name: row["metrics"] for (name, kind), row in rows.items() if kind == "swap"}
    # The published windows follow the source for longer than ours; LAVIS generates it again, and DDIM with guidance.
    assert swaps["ours"]["rows"] < swaps["direct+p2p"]["rows"] < swaps["lavis"]["rows"] < swaps["ddim+p2p"]["rows"]
    assert swaps["generate-only"]["rows"] == 6 and swaps["null-text+p2p"]["rows"] > 20
    assert swaps["ours+mask"]["exact_outside_mask"] == swaps["ours+mask"]["mask_iou"] == 1
    assert swaps["direct+p2p"]["exact_outside_truth"] < 0.5 < swaps["ours+mask"]["exact_outside_truth"]
    assert swaps["ours+mask"]["unpasted_psnr"] < swaps["ours+mask"]["outside_psnr"]
    assert swaps["direct+p2p"]["unpasted_psnr"] == swaps["direct+p2p"]["outside_psnr"]
    assert swaps["generate-only"]["mask_iou"] is None and swaps["edit-friendly+p2p"]["exact_outside_mask"] is None
    kept = read_settings(everything)
    assert kept["methods"]["lavis"]["blend"]["target_words"] == [] and kept["settings"]["steps"] == 3


def test_a_run_that_is_there_already_runs_nothing_and_adds_what_is_new(
    everything: Path, miniature_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = (everything / "rows.jsonl").read_bytes()
    monkeypatch.setattr(run, "rows_of", lambda *given: pytest.fail("nothing is missing"))
    settings = settings_of(miniature_folder, everything, "paste,ours", count=1)
    assert [row["method"] for row in run.measure(settings)] == ["paste", "ours"]
    assert (everything / "rows.jsonl").read_bytes() == before
    options = ["--suite", "world", "--model", str(miniature_folder), "--steps", "3", "--out", str(everything), "--dry-run"]
    monkeypatch.setattr(run.Editor, "from_pretrained", lambda *given: pytest.fail("a dry run loads no model"))
    assert run.main([*options, "--cases", "swap,add", "--count", "2", "--methods", "ours,lavis,paste"]) == 0
    said = capsys.readouterr().out
    assert "swap: 2 cases by ours, lavis, paste" in said and "add: 2 cases by ours\n" in said
    assert "8 rows in" in said and "3 of them done, 5 to run" in said


def test_other_settings_are_refused(everything: Path, miniature_folder: Path, mine: Path) -> None:
    before = (everything / "rows.jsonl").read_bytes()
    same = settings_of(miniature_folder, everything, "paste", count=1)
    for changed, message in (
        (replace(same, steps=4), "steps: 3 there, 4 now"),
        (replace(same, guidance_scale=2.0), "guidance_scale"),
        (replace(same, options=replace(same.options, seed=1)), "seed: 0 there, 1 now"),
        (replace(same, options=replace(same.options, split="validation")), "split"),
    ):
        with pytest.raises(RunError, match=message):
            run.measure(changed)
    out = mine / "out"
    run.measure(replace(same, out=out, methods=("my_methods:copied",)))
    (mine / "my_methods.py").write_text(MINE + "\n# changed\n")
    with pytest.raises(RunError, match="my_methods:copied with other settings"):
        run.measure(replace(same, out=out, methods=("my_methods:copied",)))
    assert (everything / "rows.jsonl").read_bytes() == before


def test_users_functions_run_and_failures_are_rows_that_count(miniature_folder: Path, mine: Path) -> None:
    names = "my_methods:answer,my_methods:picky,my_methods:wrong"
    rows = run.measure(settings_of(miniature_folder, mine / "out", names))
    by = {(row["method"].removeprefix("my_methods:"), row["case"]): row for row in rows}
    assert by["answer", "swap-0000"]["mask_input"] and by["answer", "swap-0000"]["metrics"]["mask_iou"] == 1
    assert by["answer", "swap-0000"]["metrics"]["rows"] == by["answer", "swap-0000"]["metrics"]["work"] == 7
    assert "error" not in by["picky", "swap-0000"] and by["picky", "swap-0001"]["error"] == "RuntimeError: not this one"
    assert "line" in by["picky", "swap-0001"]["traceback"]
    assert set(by["picky", "swap-0001"]["metrics"].values()) == {None}
    assert "returned Image; expected" in by["wrong", "swap-0000"]["error"]
    wrong = "picture of method 'my_methods:wrong': Image of mode 'RGB' and size (32, 32); expected mode 'RGB', size (64, 64)"
    assert wrong in by["wrong", "swap-0001"]["error"]
    found = {s.kind: s for s in sections(rows, WorldSuite, names_of(names), "my_methods:answer")}["swap"]
    line = next(line for line in found.tables[0].lines if line[0] == "my_methods:picky")
    assert line[-1] == "1" and line[1].startswith("0.000 (") and "; 2)" in line[1]
    # Failed cases are run again where that is asked for, and only they: those of other methods stay.
    before = {key: row for key, row in by.items() if "error" not in row or key[0] == "wrong"}
    again = run.measure(settings_of(miniature_folder, mine / "out", "my_methods:picky"), retry=True)
    assert len(again) == 2 and sum("error" in row for row in again) == 1
    kept = read_rows(mine / "out")
    assert len(kept) == 6 and all(row in kept for row in before.values())


def test_a_method_sees_the_answer_only_if_it_says_so(miniature_folder: Path, mine: Path) -> None:
    names = "my_methods:bare,my_methods:dear,my_methods:traced,my_methods:leaving"
    rows = run.measure(settings_of(miniature_folder, mine / "out", names, count=1))
    errors = {row["method"].removeprefix("my_methods:"): row.get("error") for row in rows}
    assert errors["bare"] is None and rows[0]["metrics"]["outside_psnr"] == 100
    assert "cost of method 'my_methods:dear': {'rows': '7'}; expected numbers" in errors["dear"]
    assert "trajectory of method 'my_methods:traced': Image; expected a string" in errors["traced"]
    assert errors["leaving"] == "SystemExit: 3"


def test_a_first_case_that_cannot_be_read_is_a_row(miniature_folder: Path, tmp_path: Path, monkeypatch) -> None:
    case = WorldSuite.case

    def broken(self: WorldSuite, id: str) -> Case:
        if id == "swap-0000":
            raise OSError("cannot identify image file")
        return case(self, id)

    monkeypatch.setattr(WorldSuite, "case", broken)
    rows = run.measure(settings_of(miniature_folder, tmp_path, "paste,lavis", count=2))
    assert [(row["method"], row["case"], "error" in row) for row in rows] == [
        ("paste", "swap-0000", True),
        ("lavis", "swap-0000", True),
        ("paste", "swap-0001", False),
        ("lavis", "swap-0001", False),
    ]
    assert "2 failed" in report.report(tmp_path)


def test_cases_of_one_subject_count_as_one() -> None:
    class BySubject(WorldSuite):
        @staticmethod
        def group(id: str) -> str:
            return id.split("-")[0]

    values = {"a-1": 1.0, "a-2": None, "a-3": 0.0, "b-1": 1.0, "c-1": None}
    assert grouped(values, BySubject) == {"a": 0.5, "b": 1.0, "c": None} and grouped(values, WorldSuite) == values
    ours, theirs = shared(values, {"a-1": 0.0, "a-2": 1.0, "b-1": None, "c-1": 1.0}, BySubject)
    assert ours == {"a": 1.0, "b": None, "c": None} and theirs == {"a": 0.0, "b": None, "c": None}


def test_a_torn_line_is_dropped_and_its_case_run_again(miniature_folder: Path, tmp_path: Path) -> None:
    settings = settings_of(miniature_folder, tmp_path, "paste", count=3)
    whole = run.measure(settings)
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert len(read_rows(tmp_path)) == 2
    again = run.measure(settings)
    assert path.read_bytes().splitlines(keepends=True)[:2] == lines[:2] and len(read_rows(tmp_path)) == 3
    assert [row["case"] for row in again] == [row["case"] for row in whole]
    path.write_bytes(lines[0] + lines[0])
    with pytest.raises(RunError, match="line 2: a second row"):
        run.measure(settings)
    path.write_bytes(b"{}\n" + lines[0])
    with pytest.raises(RunError, match="line 1: no row"):
        run.measure(settings)


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(miniature_folder: Path, mine: Path) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:killed", count=4)
    process = multiprocessing.get_context("spawn").Process(target=run.measure, args=(settings,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = (mine / "out" / "rows.jsonl").read_bytes()
    assert [row["case"] for row in read_rows(mine / "out")] == ["swap-0000", "swap-0001"]
    (mine / "lives").touch()
    rows = run.measure(settings)
    assert [row["case"] for row in rows] == [f"swap-000{n}" for n in range(4)] and not any("error" in row for row in rows)
    after = (mine / "out" / "rows.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 4


def test_a_folder_that_cannot_be_a_runs_is_refused_before_a_model_is_loaded(
    miniature_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Editor, "from_pretrained", lambda *given: pytest.fail("no model is needed to refuse this"))
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(RunError, match=r"file is a file; expected a folder"):
            run.measure(settings_of(miniature_folder, out, "paste"))
    for device, message in (("cuda:99", "is not to be had here"), ("gpu", "is none")):
        with pytest.raises(ModelError, match=f"device '{device}' {message}"):
            run.measure(settings_of(miniature_folder, tmp_path / "out", "paste"), devices=("cpu", device))
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_rows_without_their_settings_are_not_added_to(tmp_path: Path) -> None:
    with RunFolder(tmp_path).opened({"steps": 50}, {}) as folder:
        folder.add({"method": "m", "case": "c"})
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"holds rows but no run.json"), RunFolder(tmp_path).opened({"steps": 3}, {}):
        pass
    assert not (tmp_path / "run.json").exists() and len(read_rows(tmp_path)) == 1


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RunFolder(tmp_path).opened({}, {}) as folder:
        with pytest.raises(RunError, match="in use"), RunFolder(tmp_path).opened({}, {}):
            pass
        folder.add({"method": "m", "case": "c"})
        with pytest.raises(RunError, match="there already"):
            folder.add({"method": "m", "case": "c"})
    with RunFolder(tmp_path).opened({}, {}) as folder:
        assert list(folder.rows) == [("m", "c")]


def test_several_processes_give_the_same_rows_and_pictures(miniature_folder: Path, tmp_path: Path) -> None:
    kept = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        rows = run.measure(settings_of(miniature_folder, out, "ours,generate-only"), processes=processes)
        costs = {"seconds", "cpu_seconds", "peak"}
        values = [{k: v for k, v in row["metrics"].items() if k not in costs} | {"t": row["trajectory"]} for row in rows]
        pictures = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.png"))}
        kept.append((values, pictures))
    assert kept[0] == kept[1] and len(kept[0][0]) == 4


def test_a_case_that_ends_its_process_is_a_failure_and_the_others_run(miniature_folder: Path, mine: Path) -> None:
    settings = settings_of(miniature_folder, mine / "out", "my_methods:killed,paste", count=4)
    rows = run.measure(settings, processes=2)
    died = [row for row in rows if "error" in row]
    whole, (dead,) = rows[0], died
    assert (dead["method"], dead["case"], dead["error"][:12]) == ("my_methods:killed", "swap-0002", "ProcessDied:")
    assert len(rows) == 8 and set(dead) == set(whole) - {"networks", "prompt", "target_prompt"} | {"error", "traceback"}
    assert set(dead["metrics"]) == set(whole["metrics"]) and set(dead["metrics"].values()) == {None}
    # Its row does not say what was asked; the others of the case do.
    assert report.main([str(mine / "out")]) == 0
    text = Page((mine / "out" / "report.html").read_text()).text
    assert f"“{rows[5]['prompt']}”" in text and rows[5]["case"] == "swap-0002"


def test_processes_that_die_time_after_time_end_the_run(miniature_folder: Path, mine: Path, monkeypatch) -> None:
    monkeypatch.setattr(lanes, "MOST_DEATHS", 2)
    settings = settings_of(miniature_folder, mine / "out", "my_methods:deadly", count=4)
    with pytest.raises(RunError, match="died in 2 cases in a row.*--processes.*goes on"):
        run.measure(settings, processes=2)
    assert all(row["error"].startswith("ProcessDied") for row in read_rows(mine / "out"))


def test_a_process_that_died_between_two_cases_fails_neither(miniature_folder: Path, mine: Path) -> None:
    class Broken:
        def submit(self, *task: object) -> None:
            raise BrokenProcessPool("killed while it waited")

        def shutdown(self) -> None:
            pass

    lane = lanes.Lane(settings_of(miniature_folder, mine / "out", "my_methods:copied"), "cpu", "")
    lane.pool = Broken()
    try:
        assert "error" not in lane.row(("my_methods:copied", "swap", "swap-0001")) and lane.deaths == 0
    finally:
        lane.close()


def test_a_process_that_cannot_begin_ends_the_run_with_a_word_on_how_to_go_on(
    everything: Path, miniature_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Called with settings and a device it raises, as a model that is not there does.
    monkeypatch.setattr(lanes, "begin", os.getpid)
    with pytest.raises(RunError, match="the same command goes on"):
        run.measure(settings_of(miniature_folder, everything, "ours", count=2), processes=2)
    assert ("ours", "swap-0001") not in {(row["method"], row["case"]) for row in read_rows(everything)}


def test_what_needs_subjects_is_refused_for_a_model_without(tmp_path: Path) -> None:
    stable_diffusion_1().save_pretrained(tmp_path / "sd")
    settings = settings_of(tmp_path / "sd", tmp_path / "out", "lavis")
    with pytest.raises(ModelError, match="which method lavis needs"):
        run.measure(settings)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        (["--suite", "wrld"], "Did you mean 'world'"),
        (["--suite", "pie"], "--data FOLDER"),
        (["--suite", "world", "--methods", "ourss"], "Did you mean 'ours'"),
        (["--suite", "world", "--cases", "swop"], "has no cases"),
        (["--suite", "world", "--processes", "0"], "one or more each"),
    ):
        assert run.main([*options, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 1 and "no folder of a run" in capsys.readouterr().err


# Reports


def made_run(folder: Path) -> Path:
    """A run written by hand: a good method, a bad one that fails once and has no masks."""
    prompts = {"prompt": "a <b>cat</b> on grass", "target_prompt": "a dog on grass"}
    rows = []
    for number in range(6):
        for name, success, psnr in (("good", 1.0, 30.0 + number), ("bad", float(number % 2), 20.0 + number)):
            pictures = {}
            for what in ("source", "edited"):
                path = folder / "pictures" / f"{name}-{number}-{what}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
                pictures[what] = f"pictures/{path.name}"
            values = dict.fromkeys((m.name for m in WorldSuite.measures), None) | {"success": success, "outside_psnr": psnr}
            values |= {"mask_iou": 0.5 if name == "good" else None, "rows": 10.0, "work": 10.0}
            row = {"suite": "world", "kind": "swap", "case": f"swap-{number:04d}", "method": name, "mask_input": name == "bad"}
            row |= {"device": "cpu", "machine": "here", "threads": 1, "code": "c", "versions": {"torch": "2"}}
            row |= {"metrics": values} | prompts
            rows.append(row | {"pictures": pictures})
    failed = rows[-1]
    failed |= {"error": "ValueError: <oops>", "metrics": dict.fromkeys(failed["metrics"]), "pictures": {}}
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"settings": {"suite": "world", "steps": 50}, "methods": {"good": {}, "bad": {}}, "commands": ["python -m x"]}
    (folder / "run.json").write_text(json.dumps(kept))
    return folder


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text, self.tags = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tables_hold_mean_interval_n_and_paired_differences(tmp_path: Path) -> None:
    rows = read_rows(made_run(tmp_path))
    (section,) = sections(rows, WorldSuite, ["good", "bad"], "good")
    (means, differences), rest = section.tables, section.rest
    cells = {line[0]: dict(zip(means.columns, line)) for line in means.lines}
    assert cells["good"]["edit achieved ↑"] == "1.000 (0.610 to 1.000; 6)" and cells["good"]["failed"] == "0"
    # The failed case counts as not achieved: 2 of 6. It has no PSNR, and what makes no masks has no IoU to fail in.
    assert cells["bad *"]["edit achieved ↑"].startswith("0.333 (") and cells["bad *"]["failed"] == "1"
    assert cells["bad *"]["PSNR outside, dB ↑"].startswith("22.00 (") and "5 of 6)" in cells["bad *"]["PSNR outside, dB ↑"]
    assert cells["bad *"]["mask IoU ↑"] == "- (0 of 6)" and cells["good"]["mask IoU ↑"].startswith("0.500")
    (line,) = differences.lines
    told = dict(zip(differences.columns, line))
    assert told["PSNR outside, dB ↑"] == "+10.00 (5 of 6) +"
    assert told["edit achieved ↑"].endswith("+") and told["work in rows ↓"].endswith("=") and told["mask IoU ↑"] == "- (0 of 6)"
    assert {c for t in (means, rest) for c in t.columns} > {"right look ↑", "peak memory, MiB ↓"}
    assert section.cases == 6


def test_methods_of_other_cases_are_compared_on_those_of_all(tmp_path: Path) -> None:
    rows = [row for row in read_rows(made_run(tmp_path)) if row["method"] == "good" or row["case"] < "swap-0002"]
    (section,) = sections(rows, WorldSuite, ["good", "bad"], "good")
    whole, alike, differences = section.tables
    assert alike.title == "the same over the 2 cases that every method has"
    values = {table.title: {line[0]: dict(zip(table.columns, line)) for line in table.lines} for table in (whole, alike)}
    assert values[whole.title]["good"]["PSNR outside, dB ↑"].startswith("32.50 (")
    assert values[alike.title]["good"]["PSNR outside, dB ↑"].startswith("30.50 (")
    assert values[alike.title]["bad *"] == values[whole.title]["bad *"]
    assert differences.title.startswith("good less") and section.rest.title == "the other measures"


def test_the_worst_cases_of_a_method_come_first(tmp_path: Path) -> None:
    (section,) = sections(read_rows(made_run(tmp_path)), WorldSuite, ["good", "bad"], "good")
    order = [int(case[-1]) for case in worst_first(section, WorldSuite, "bad")]
    # The one that failed, then those not achieved from the lowest PSNR on, then the rest.
    assert order == [5, 0, 2, 4, 1, 3]
    assert [int(case[-1]) for case in worst_first(section, WorldSuite, "good")] == list(range(6))
    # A method that ran none of these cases leads none of them, and nothing says that it does.
    assert section.leading("bad") == "bad" and section.leading("other") == "good"
    assert worst_first(section, WorldSuite, "other") == worst_first(section, WorldSuite, "good")


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    text = report.report(made_run(tmp_path), against="bad", shown=4)
    assert (tmp_path / "report.md").read_text() == text and "## swap (6 cases)" in text and "1 failed" in text
    assert "command: python -m x" in text
    brief = report.report(tmp_path, against="bad", shown=4, brief=True)
    assert "mask IoU" in brief and "### bad less the method" in brief and "SSIM outside" in text and "SSIM outside" not in brief
    assert (tmp_path / "report.md").read_text() == text
    html = (tmp_path / "report.html").read_text()
    found = Page(html)
    assert found.sources and all(source.startswith("data:image/") for source in found.sources)
    assert "http" not in html.lower().replace("<!doctype html>", "") and "script" not in found.tags and "link" not in found.tags
    # What comes from rows is shown as text, never as markup.
    assert "a <b>cat</b> on grass" in found.text and "ValueError: <oops>" in found.text
    assert found.text.count("swap-000") == 4 and found.text.index("swap-0005") < found.text.index("swap-0000")
    assert "swap-0003" not in found.text and "5 of 6)" in found.text
    assert Image.open(tmp_path / "plots" / "swap.png").width > 800
    assert Image.open(tmp_path / "sheets" / "swap.png").height > 6 * 112
    again = made_run(tmp_path / "again")
    report.report(again, against="bad", shown=4)
    assert (again / "report.html").read_text() == html


def test_a_report_goes_without_pictures_that_are_gone(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    rows = read_rows(folder)
    rows[1]["pictures"]["source"] = rows[0]["pictures"]["source"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / rows[0]["pictures"]["source"]).unlink()
    (folder / "pictures" / "good-1-edited.png").unlink()
    assert "2 pictures are missing in the folder" in report.report(folder)
    assert Page((folder / "report.html").read_text()).text.count("missing in the folder") == 1


def test_a_report_of_real_rows_is_written(everything: Path) -> None:
    assert report.main([str(everything), "--shown", "1"]) == 0
    found = Page((everything / "report.html").read_text())
    assert "replace (1 cases)" in found.text and "null-text+p2p" in found.text and "paste *" in found.text
    assert sum(source.startswith("data:image/png") for source in found.sources) > 40


def test_a_report_names_a_method_that_is_not_there_and_mixed_code(tmp_path: Path) -> None:
    folder = made_run(tmp_path)
    with pytest.raises(ArgumentError, match="holds the methods good, bad"):
        report.report(folder, against="other")
    rows = read_rows(folder)
    rows[0]["code"] = "d"
    assert any("MIXED: 2" in line for line in report.facts(read_settings(folder), rows))


def test_file_names_stay_apart() -> None:
    names = ["ours", "ours[a=1]", "ours[a=2]", "m:f", "m_f", "ddim+p2p"]
    assert len({file_name(name) for name in names}) == len(names) and file_name("ddim+p2p") == "ddim+p2p"
