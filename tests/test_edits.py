"""Edit specifications: validation, JSON, and the target prompts they lead to."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from p2p_subject import Blend, EditSpec, EmbeddedSubject, Subject, add, combine, edits, refine, remove, reweight, swap_subject
from p2p_subject.errors import AmbiguousWordError, EditSpecError, ImageError, MaskError, SubjectError, WordNotFoundError
from p2p_subject.prompts import changes_nothing, describe, target_prompt
from p2p_subject.tokens import layout
from p2p_subject.training.tokenizers import save_clip_tokenizer

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
fractions = st.floats(0, 1)
windows = fractions | st.tuples(fractions, fractions).map(lambda pair: tuple(sorted(pair)))
blends = st.builds(
    Blend,
    source_words=st.none() | st.lists(st.sampled_from(["cat", ("cat", 1)]), max_size=2).map(tuple),
    subtract=st.lists(st.sampled_from(["hat", ("hat", 1)]), max_size=2).map(tuple),
    rule=st.sampled_from(["peak", "share"]),
    threshold=st.none() | fractions,
    start=fractions,
    grow=st.none() | st.integers(0, 3),
    feather=st.none() | st.floats(0, 9),
    maps=st.sampled_from(["recorded", "running"]),
    mask=st.none(),
)
masks = st.integers(1, 255).map(lambda level: Blend(mask=np.full((2, 3), level, np.uint8)))
words = st.text(min_size=1, max_size=5).filter(str.strip)
# Not empty: weights act within it.
full = st.floats(0.1, 1) | st.tuples(st.floats(0, 0.4), st.floats(0.5, 1))
specs = st.builds(
    EditSpec,
    prompt=st.text(min_size=1, max_size=20),
    alignment=st.sampled_from(["words", "replace", "refine"]),
    padding=st.sampled_from(["shifted", "reference"]),
    cross_replace=full | st.dictionaries(st.none() | words | st.tuples(words, st.integers(0, 3)), full, min_size=1, max_size=3),
    self_replace=windows,
    self_resolution=st.none() | st.integers(1, 64),
    weights=st.dictionaries(words | st.tuples(words, st.integers(0, 3)), st.floats(-9, 9), max_size=2),
    blend=st.none() | blends | masks,
)
with_room = st.builds(lambda spec, room: replace(spec, swap="cat", room=room), specs, fractions)
erasing = st.builds(lambda spec, blend: replace(spec, erase=True, blend=blend), specs, blends | masks)


@given(spec=specs | with_room | erasing)
@settings(deadline=None)
def test_specs_survive_json(spec: EditSpec) -> None:
    assert EditSpec.from_json(spec.to_json()) == spec


def test_what_is_added_counts_twice_and_makes_the_mask() -> None:
    spec = add("hat", "a cat in a hat")
    assert dict(spec.weights) == {"hat": 2.0} and (spec.blend.source_words, spec.blend.target_words) == ((), ("hat",))
    assert (spec.prompt, spec.swap, spec.room, spec.erase) == ("a cat in a hat", None, 0, False)
    blend = Blend(subtract=["cat"], feather=2.0)
    several = add(["hat", ("cat", 1)], "a cat, a cat and a hat", weights={"hat": 1.0}, blend=blend)
    assert several.blend == Blend(source_words=(), target_words=("hat", ("cat", 1)), subtract=("cat",), feather=2.0)
    assert dict(several.weights) == {"hat": 1.0, ("cat", 1): 2.0}
    named = Blend(target_words=["mat"], source_words=["cat"])
    assert add("hat", "a hat on a mat", blend=named).blend == named
    assert dict(add("hat", "a cat in a hat", weights={"cat": 3.0}).weights) == {"hat": 2.0, "cat": 3.0}
    with pytest.raises(EditSpecError, match="nothing to put in"):
        add([], "a hat")
    with pytest.raises(EditSpecError, match="can have no effect"):
        add("hat", "a hat", cross_replace=0.0)


def test_a_mask_that_is_grown_by_nothing_is_the_default() -> None:
    assert EditSpec(prompt="a dog", blend=Blend(grow=0)) == EditSpec(prompt="a dog")
    both = combine(EditSpec(prompt="a dog", blend=Blend(grow=0)), reweight({"dog": 2.0}, blend=Blend(source_words=["dog"])))
    assert both.blend == Blend(source_words=["dog"])
    assert remove("cat", "grass", blend=Blend(grow=0)).blend.grow == 0


def test_a_removal_names_its_region_follows_nothing_and_takes_a_blend_of_yours() -> None:
    spec = remove("cat", "grass")
    assert spec.erase and spec.prompt == "grass" and spec.cross_replace == spec.self_replace == (0.0, 0.0)
    assert (spec.blend.source_words, spec.blend.target_words, spec.grow) == (("cat",), (), 1)
    assert remove([("cat", 0), ("cat", 1)], "grass").blend.source_words == (("cat", 0), ("cat", 1))
    own = remove("cat", "grass", blend=Blend(feather=4.0, subtract=["hat"]), self_replace=0.2)
    assert own.blend == Blend(source_words=("cat",), target_words=(), feather=4.0, subtract=("hat",))
    assert own.self_replace == (0.0, 0.2)
    assert own.grow == 1 and remove("cat", "grass", blend=Blend(grow=0)).grow == 0 and EditSpec(prompt="a dog").grow == 0
    with pytest.raises(EditSpecError, match=r"source_words=\('dog',\) in the blend; leave these out"):
        remove("cat", "grass", blend=Blend(source_words=["dog"]))
    masked = Blend(mask=np.full((2, 3), 255, np.uint8))
    assert remove("cat", "grass", blend=masked).blend == replace(masked, source_words=("cat",), target_words=())
    with pytest.raises(EditSpecError, match="nothing to take out"):
        remove([], "grass")
    with pytest.raises(EditSpecError, match="all of the picture"):
        remove("cat", "grass", blend=None)
    with pytest.raises(EditSpecError, match="a word of|expected a"):
        remove(3, "grass")


def test_subjects_survive_json_with_their_pixels() -> None:
    spec = swap_subject(("cat", 1), Subject([PICTURE, PICTURE.rotate(90)], "  red   panda "), self_replace=0.2)
    read = EditSpec.from_json(spec.to_json())
    assert read.subject.category == "red panda" and read.swap == ("cat", 1) and read.self_replace == (0.0, 0.2)
    assert all(np.array_equal(a, b) for a, b in zip(read.subject.pictures, spec.subject.pictures))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a prompt, or a swap and a subject"),
        ({"prompt": "x", "alignment": "refin"}, "alignment='refin'; Did you mean 'refine'.* expected one of"),
        ({"prompt": "x", "padding": None}, "padding=None; expected one of"),
        ({"prompt": "x", "cross_replace": {}}, "cross_replace={}; expected a fraction"),
        ({"prompt": "x", "cross_replace": {"cat": 2}}, r"cross_replace\['cat'\]=2; expected a fraction"),
        ({"prompt": "x", "cross_replace": {3: 0.2}}, "a word of cross_replace=3; expected a word"),
        ({"prompt": "x", "cross_replace": {None: 0, "cat": 0}, "weights": {"cat": 2}}, "can have no effect"),
        ({"prompt": "x", "cross_replace": 1.5}, r"cross_replace=1.5; expected a fraction"),
        ({"prompt": "x", "self_replace": (0.8, 0.2)}, r"start <= stop"),
        ({"prompt": "x", "self_resolution": 0}, "self_resolution=0"),
        ({"prompt": "x", "erase": 1}, "erase=1; expected True or False"),
        ({"prompt": "x", "erase": True, "blend": None}, "blend=None, which is all of the picture"),
        ({"swap": "cat", "subject": Subject(PICTURE, "dog"), "erase": True}, "a subject to put there; leave one out"),
        ({"prompt": "x", "room": 0.5}, "room=0.5 is for what comes in the place of a word; pass swap='cat'"),
        ({"prompt": "x", "swap": "cat", "room": 1.5}, "room=1.5; expected a number between 0 and 1"),
        ({"prompt": "x", "swap": "cat", "room": "all"}, "room='all'; expected a number between 0 and 1"),
        ({"prompt": "x", "weights": {"cat": float("nan")}}, "expected a finite number"),
        ({"prompt": "x", "weights": {"cat": float("inf")}}, "expected a finite number"),
        ({"prompt": "x", "weights": {"cat": True}}, "expected a finite number"),
        ({"prompt": "x", "weights": {"cat": 10**400}}, "expected a finite number"),
        ({"prompt": "x", "weights": {"": 2.0}}, "a word of weights=''; expected a word"),
        ({"prompt": "x", "weights": {("cat", "1"): 2.0}}, r"\('cat', '1'\); expected a word"),
        ({"prompt": "x", "weights": None}, "weights=None; expected a mapping"),
        ({"prompt": "x", "weights": {"cat": 2.0}, "cross_replace": 0}, "can have no effect.*cross_replace"),
        ({"prompt": "x", "weights": {"cat": 2.0}, "cross_replace": (0.5, 0.5)}, "can have no effect.*cross_replace"),
        ({"prompt": "x", "cross_replace": None}, "cross_replace=None; expected a fraction"),
        ({"prompt": "x", "cross_replace": True}, "cross_replace=True; expected a fraction"),
        ({"prompt": "x", "self_replace": float("nan")}, "self_replace=nan; expected a fraction"),
        ({"prompt": "x", "self_replace": "0.4"}, "self_replace='0.4'; expected a fraction"),
        ({"prompt": "x", "self_resolution": "a"}, "self_resolution='a'; expected 1 or more"),
        ({"prompt": "x", "self_resolution": 8.0}, "self_resolution=8.0; expected 1 or more"),
        ({"prompt": "x", "self_resolution": True}, "self_resolution=True; expected 1 or more"),
        ({"prompt": 3}, "prompt=3; expected a text"),
        ({"prompt": "x", "swap": ("cat",)}, r"swap=\('cat',\); expected a word"),
        ({"prompt": "x", "swap": ("cat", "x")}, r"swap=\('cat', 'x'\); expected a word"),
        ({"prompt": "x", "swap": ("cat", -1)}, "swap=.*expected a word"),
        ({"prompt": "x", "swap": " "}, "swap=' '; expected a word"),
        ({"prompt": "x", "blend": "share"}, "blend='share'; expected Blend"),
        ({"prompt": "x", "subject": Subject(PICTURE, "dog")}, "no word for it to replace"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(EditSpecError, match=message):
        EditSpec(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 2}, {"threshold": True}, {"start": -0.1}, {"start": None}, {"grow": -1}, {"grow": 1.5}, {"grow": True},
        {"rule": 3}, {"rule": ["peak"]}, {"source_words": "cat"}, {"target_words": 3}, {"subtract": "hat"}, {"subtract": None},
        {"feather": -1}, {"feather": float("nan")}, {"feather": True}, {"maps": "late"}, {"maps": None},
    ],
)  # fmt: skip
def test_blends_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(EditSpecError, match=f"{next(iter(fields))}="):
        Blend(**fields)


def test_a_word_of_a_blend_is_named_by_its_place() -> None:
    with pytest.raises(EditSpecError, match=r"source_words\[1\]=3; expected a word"):
        Blend(source_words=("cat", 3))


def test_a_spec_keeps_its_weights_whatever_becomes_of_the_callers() -> None:
    weights = {"cat": 2.0}
    spec = EditSpec(prompt="a cat", weights=weights)
    weights["cat"] = 3.0
    assert spec.weights == {"cat": 2.0}
    with pytest.raises(TypeError):
        spec.weights["cat"] = 3.0
    for copied in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), replace(spec)):
        assert copied == spec and hash(copied) == hash(spec)


def test_numbers_of_numpy_are_numbers() -> None:
    blend = Blend(threshold=np.float32(0.5), grow=np.int64(2))
    spec = EditSpec(prompt="x", cross_replace=np.float32(0.5), weights={"cat": np.float32(2)}, blend=blend)
    assert EditSpec.from_json(spec.to_json()) == spec
    spec = swap_subject("cat", Subject.mix(Subject(PICTURE, "dog"), Subject(PICTURE, "cat"), np.float32(0.25)))
    assert EditSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("category", ["", "   ", None, 3])
def test_an_empty_category_is_refused(category) -> None:
    with pytest.raises(SubjectError, match="expected the word for what the picture shows"):
        Subject(PICTURE, category)


def test_subject_pictures_are_read_at_once() -> None:
    with pytest.raises(ImageError):
        Subject("no/such/file.png", "dog")
    with pytest.raises(SubjectError, match="at least one picture"):
        Subject([], "dog")
    with pytest.raises(SubjectError, match=r"expected Subject\(picture, category\)"):
        swap_subject("cat", PICTURE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list"),
        ('{"promt": "x"}', "Did you mean 'prompt'"),
        ('{"prompt": "x", "blend": {"rul": "peak"}}', "'rule'"),
        (None, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "x", "cross_replace": null}', "cross_replace=None"),
        ('{"prompt": "x", "cross_replace": NaN}', "cross_replace=nan"),
        ('{"prompt": "x", "blend": 3}', "blend=3; expected an object"),
        ('{"prompt": "x", "blend": ""}', "blend=''; expected an object"),
        ('{"prompt": "x", "weights": [["cat", 2.0]]}', r"\['cat', 2.0\]; expected \[word, index or null, value\]"),
        ('{"prompt": "x", "cross_replace": [["cat", 0.5]]}', r"\['cat', 0.5\]; expected \[word, index or null, value\]"),
        ('{"prompt": "x", "blend": {"mask": 3}}', "mask: not base64"),
        ('{"prompt": "x", "blend": {"mask": "??"}}', "mask: not base64"),
        ('{"prompt": "x", "weights": [["cat", null, "2"]]}', "weights.*'2'; expected a finite number"),
        ('{"prompt": "x", "swap": ["cat"]}', r"swap=\['cat'\]; expected a word"),
    ],
)
def test_json_that_is_no_edit_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(EditSpecError, match=message):
        EditSpec.from_json(text)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("3", "subject: a int given"),
        ('{"category": "dog"}', r"\['category'\] given; expected .*'pictures'"),
        ('{"category": "dog", "pictures": []}', r"pictures=\[\]; expected a list of one or more"),
        ('{"category": "dog", "pictures": "AAAA"}', "pictures='AAAA'; expected a list"),
        ('{"category": "dog", "pictures": [3]}', "not base64"),
        ('{"category": "dog", "pictures": ["not base64"]}', "not base64"),
    ],
)
def test_json_whose_subject_is_none_is_refused(subject: str, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        EditSpec.from_json(f'{{"swap": "cat", "subject": {subject}}}')
    with pytest.raises(SubjectError, match="subject='dog'; expected Subject"):
        EditSpec(swap="cat", subject="dog")


def test_a_mask_that_is_none_is_refused_when_the_spec_is_made() -> None:
    for bad in (PICTURE.convert("RGB"), np.full((4, 4), np.nan), "no/such/mask.png"):
        with pytest.raises(MaskError):
            Blend(mask=bad)


def test_builders_make_the_published_edits() -> None:
    assert refine("a fluffy cat").alignment == "refine" and edits.replace("a dog").alignment == "replace"
    weighted = reweight({"cat": -2.0}, cross_replace=0.5)
    assert weighted.prompt is None and weighted.weights == {"cat": -2.0} and weighted.cross_replace == (0.0, 0.5)


def test_edits_combine() -> None:
    swap = swap_subject("cat", Subject(PICTURE, "dog"))
    blend = Blend(source_words=("cat", "hat"))
    both = combine(swap, reweight({"snowy": 2.0}), reweight({"hat": -1.0}, blend=blend))
    assert both.subject == swap.subject and both.swap == "cat" and both.cross_replace == (0.0, 0.2)
    assert both.room == 0.5
    assert both.weights == {"snowy": 2.0, "hat": -1.0} and both.blend == blend
    assert combine(refine("a snowy cat", blend=None), reweight({"snowy": 2.0})).blend is None
    with pytest.raises(EditSpecError, match="two edits give snowy: 2.0 and 3.0"):
        combine(reweight({"snowy": 2.0}), reweight({"snowy": 3.0}))
    with pytest.raises(EditSpecError, match="two edits give cross_replace"):
        combine(swap, refine("a cat", cross_replace=0.5))


def test_edits_with_two_learned_subjects_do_not_combine() -> None:
    one, same, other = (EmbeddedSubject(torch.full((1, 2, 3), value), "dog") for value in (0.0, 0.0, 1.0))
    assert one == same and hash(one) == hash(same) and one != other and one != EmbeddedSubject(one.embedding, "cat")
    assert one != EmbeddedSubject(torch.zeros(1, 3, 3), "dog") and one != Subject(PICTURE, "dog")
    assert combine(swap_subject("cat", one), swap_subject("cat", same)).subject == one
    with pytest.raises(EditSpecError, match="two edits give subject"):
        combine(swap_subject("cat", one), swap_subject("cat", other))


def test_weights_in_json_name_places_of_words() -> None:
    spec = EditSpec(prompt="x", weights={"cat": 2.0, ("cat", 1): 0.5})
    assert json.loads(spec.to_json())["weights"] == [["cat", None, 2.0], ["cat", 1, 0.5]]
    assert EditSpec.from_json('{"prompt": "x", "weights": {"cat": 2}}').weights == {"cat": 2.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_clip_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("prompt", "word", "category", "expected"),
    [
        ("a cat on grass", "cat", "dog", "a dog on grass"),
        ("a cat on grass", "cat", "owl", "an owl on grass"),
        ("An owl, at night", "owl", "red panda", "A red panda, at night"),
        ("a big Cat.", "cat", "owl", "a big owl."),
        ("the cat and a cat", ("cat", 1), "owl", "the cat and an owl"),
        ("a red panda on sand", "red panda", "fox", "a fox on sand"),
    ],
)
def test_the_target_prompt_follows_from_the_source(tokenizer, prompt, word, category, expected) -> None:
    source = layout(tokenizer, prompt, max_length=48)
    text, (start, stop) = target_prompt(source, swap_subject(word, Subject(PICTURE, category)))
    assert text == expected and text[start:stop] == category


def test_weights_alone_keep_the_prompt(tokenizer) -> None:
    source = layout(tokenizer, "a snowy hill", max_length=48)
    assert target_prompt(source, reweight({"snowy": 2.0})) == ("a snowy hill", None)


def test_an_edit_that_changes_nothing_is_known(tokenizer) -> None:
    def made(prompt: str, subject: bool = False):
        return layout(tokenizer, prompt, max_length=48)

    source = made("a cat on grass")
    for spec, nothing in (
        (EditSpec(prompt="a cat on grass"), True),
        (EditSpec(prompt="A cat  on grass", weights={"cat": 1.0}), True),
        (refine("a cat on grass", padding="reference"), True),
        (EditSpec(prompt="a cat on sand"), False),
        (reweight({"cat": 2.0}), False),
    ):
        assert changes_nothing(source, describe(source, spec, made), spec) is nothing


def test_subtracted_words_may_be_in_either_prompt_but_in_one(tokenizer) -> None:
    source = layout(tokenizer, "a cat and a hat", max_length=48)

    def target(prompt: str, subject: bool):
        return layout(tokenizer, prompt, max_length=48)

    def plan(*subtract: str):
        return describe(source, EditSpec(prompt="a fox and a cap", swap="cat", blend=Blend(subtract=subtract)), target)

    both = plan("hat", "cap")
    assert both.source_words.subtract.columns == source.columns("hat")
    assert both.target_words.subtract.columns == both.layout.columns("cap")
    assert plan("cap").source_words.subtract is None
    with pytest.raises(WordNotFoundError, match="'bag' is not in the prompt"):
        plan("bag")


def test_words_are_checked_before_any_network_runs(tokenizer) -> None:
    source = layout(tokenizer, "a cat and a cat", max_length=48)

    def target(prompt: str, subject: bool):
        return layout(tokenizer, prompt, subject_queries=2 * subject, max_length=48)

    subject = Subject(PICTURE, "dog")
    with pytest.raises(WordNotFoundError, match="Did you mean 'cat'"):
        describe(source, swap_subject("catt", subject), target)
    with pytest.raises(AmbiguousWordError):
        describe(source, swap_subject("cat", subject), target)
    with pytest.raises(WordNotFoundError):
        describe(source, swap_subject(("cat", 0), subject, weights={"snowy": 2.0}), target)
    plan = describe(source, swap_subject(("cat", 0), subject), target)
    assert plan.layout.prompt == "a dog and a cat" and plan.source_words.columns == source.columns("cat", 0)
    assert set(plan.target_words.columns) == {*plan.layout.subject, *plan.layout.columns("dog")}
    # The other cat competes for pixels; the subject's own columns never do.
    assert plan.target_words.others == plan.layout.columns("cat")


def test_a_given_prompt_need_not_repeat_the_category(tokenizer) -> None:
    source = layout(tokenizer, "a cat", max_length=48)
    spec = swap_subject("cat", Subject(PICTURE, "dog"), prompt="a pet")
    plan = describe(source, spec, lambda prompt, subject: layout(tokenizer, prompt, subject_queries=2, max_length=48))
    assert plan.target_words.columns == tuple(plan.layout.subject)


def test_of_a_category_that_a_given_prompt_repeats_the_first_is_the_subjects(tokenizer) -> None:
    source = layout(tokenizer, "a cat", max_length=48)
    spec = swap_subject("cat", Subject(PICTURE, "dog"), prompt="a dog and a dog")
    plan = describe(source, spec, lambda prompt, subject: layout(tokenizer, prompt, subject_queries=2, max_length=48))
    first, second = plan.layout.all_columns("dog")
    assert plan.target_words.columns == (*plan.layout.subject, *first) and plan.target_words.others == second
    assert plan.layout.all_columns("cat") == () and first == plan.layout.columns("dog", 0)
