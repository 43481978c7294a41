"""Methods are what was published, are named with settings, and their cost is counted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.meter import metered
from benchmarks.method_names import applies, described, method_of, names_of, takes_mask
from benchmarks.methods import METHODS, Method, Paste
from benchmarks.suite import Options, SuiteError
from benchmarks.worker import finite
from benchmarks.world_suite import WorldSuite
from p2p_subject import Editor, EditResult, EditSpec, Source
from p2p_subject.blip_diffusion import PAPER
from p2p_subject.controller import steps_of
from p2p_subject.errors import ArgumentError


def test_ancestors_edit_with_published_settings() -> None:
    swap, words = (WorldSuite(Options()).case(id) for id in ("swap-0000", "replace-0000"))
    windows = {"ddim+p2p": 0.4, "null-text+p2p": 0.5, "negative-prompt+p2p": 0.5, "direct+p2p-2022": 0.4}
    for name, self_replace in windows.items():
        spec = METHODS[name].spec(swap, True)
        assert (spec.cross_replace, spec.self_replace, spec.room) == ((0, 0.8), (0, self_replace), 0)
        assert dict(METHODS[name].spec(words, True).weights) == ({words.target_words[0]: 2.0} if self_replace == 0.5 else {})
        assert (spec.alignment, spec.padding) == ("refine", "reference")
        assert (spec.blend.rule, spec.blend.threshold, spec.blend.start, spec.blend.maps) == ("peak", 0.3, 0.2, "running")
        assert METHODS[name].spec(words, True).alignment == "replace" and METHODS[name].steps == 50
        on_pie = METHODS[name].spec(replace(words, suite="pie"), True)
        assert (on_pie.cross_replace, on_pie.self_replace, on_pie.alignment) == ((0, 0.4), (0, 0.6), "refine")
        assert dict(on_pie.weights) == {words.target_words[0]: 2.0}
    # They come before Ju et al.'s idea of reading the source from its inversion.
    sources = {"ddim+p2p": "stored", "null-text+p2p": "guided", "negative-prompt+p2p": "unguided", "direct+p2p": "stored"}
    assert {name: METHODS[name].source for name in sources} == sources and METHODS["lavis"].source == "unguided"
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


def test_a_source_that_is_generated_again_is_what_the_edit_keeps(miniature_folder: Path) -> None:
    editor, case = Editor.from_pretrained(miniature_folder), WorldSuite(Options()).case("swap-0000")
    shown, rows = {}, {}
    for name, options in (("negative-prompt+p2p", {}), ("null-text+p2p", {"inner_steps": 1})):
        method = replace(method_of(f"{name}[steps=2,feather=0,threshold=1]"), options=options)
        for source in ("stored", "unguided", "guided"):
            with metered(editor.model.unet, editor.model.device) as cost:
                edited = replace(method, source=source)(editor, case)
            shown[name, source] = np.asarray(edited.image).astype(int)
            rows[name, source] = cost["rows"]
        assert [rows[name, source] - rows[name, "stored"] for source in ("unguided", "guided")] == [2, 4]
    # Guidance of a source against its own prompt cancels, so that its generation without is the same picture, for less.
    own = [shown["negative-prompt+p2p", source] for source in ("stored", "unguided", "guided")]
    assert abs(own[1] - own[2]).max() <= 2 < abs(own[0] - own[1]).max()
    # null-text inversion has embeddings that were found for guidance.
    own = [shown["null-text+p2p", source] for source in ("stored", "unguided", "guided")]
    assert all(abs(a - b).max() > 2 for a, b in itertools.combinations(own, 2))


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
    # Null-text inversion optimises for the scale of the edit, wherever that and the inversion are named.
    for name, scale in (
        ("ours[inversion=null_text]", 4),
        ("ours[guidance_scale=4,inversion=null_text]", 2),
        ("ours[inversion=null_text,guidance_scale=4]", None),
    ):
        assert method_of(name, guidance_scale=scale).options == {"guidance_scale": 4}
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


def test_a_users_method_is_known_by_its_own_file_beneath_what_wraps_it() -> None:
    def mine(editor, case, strength: float = 1.0, at: object = None) -> None: ...

    class Mine:
        def __call__(self, editor, case) -> None: ...

    plain = described(mine)
    assert plain["function"].endswith("mine") and plain["digest"] == described(Mine())["digest"] is not None
    assert described(torch.no_grad()(mine)) == plain
    # Objects have addresses, which no two processes share.
    assert described(Mine()) == described(Mine()) and "0x" not in json.dumps(described(Mine()))
    half, other = (partial(mine, strength=np.float32(strength), at=object()) for strength in (0.5, 0.6))
    assert described(half)["digest"] == plain["digest"] and described(half) != described(other)
    assert described(half) == described(partial(mine, strength=0.5, at=object()))
    assert described(partial(mine, at=Path("a"))) != described(partial(mine, at=Path("b")))
    with pytest.raises(ArgumentError, match="name them so"):
        described(partial(mine, at={("a", "b"): 1}))
    # What the function says of itself holds for its partials.
    mine.mask_input, mine.applies = True, lambda case: case == "this"
    assert described(half)["mask_input"] and takes_mask(partial(half)) and not takes_mask(Mine())
    assert applies(half, "this") and not applies(half, "that") and applies(Mine(), "that")


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
        ("ours[source=inverted]", "source='inverted'; expected one of stored, unguided, guided"),
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
