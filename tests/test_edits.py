"""Edit specifications: validation, JSON, and the target prompts they lead to."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from p2p_subject import Blend, EditSpec, Subject, swap_subject
from p2p_subject.errors import AmbiguousWordError, EditSpecError, ImageError, SubjectError, WordNotFoundError
from p2p_subject.prompts import describe, target_prompt
from p2p_subject.tokens import layout
from p2p_subject.training.tokenizers import save_clip_tokenizer

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
fractions = st.floats(0, 1)
windows = fractions | st.tuples(fractions, fractions).map(lambda pair: tuple(sorted(pair)))
blends = st.builds(
    Blend,
    source_words=st.none() | st.lists(st.sampled_from(["cat", ("cat", 1)]), max_size=2).map(tuple),
    rule=st.sampled_from(["peak", "share"]),
    threshold=st.none() | fractions,
    start=fractions,
    grow=st.integers(0, 3),
)
words = st.text(min_size=1, max_size=5).filter(str.strip)
specs = st.builds(
    EditSpec,
    prompt=st.text(min_size=1, max_size=20),
    # Not empty: weights act within it.
    cross_replace=st.floats(0.1, 1) | st.tuples(st.floats(0, 0.4), st.floats(0.5, 1)),
    self_replace=windows,
    self_resolution=st.none() | st.integers(1, 64),
    weights=st.dictionaries(words | st.tuples(words, st.integers(0, 3)), st.floats(-9, 9), max_size=2),
    blend=st.none() | blends,
)


@given(spec=specs)
@settings(deadline=None)
def test_specs_survive_json(spec: EditSpec) -> None:
    assert EditSpec.from_json(spec.to_json()) == spec


def test_subjects_survive_json_with_their_pixels() -> None:
    spec = swap_subject(("cat", 1), Subject([PICTURE, PICTURE.rotate(90)], "  red   panda "), self_replace=0.2)
    read = EditSpec.from_json(spec.to_json())
    assert read.subject.category == "red panda" and read.swap == ("cat", 1) and read.self_replace == (0.0, 0.2)
    assert all(np.array_equal(a, b) for a, b in zip(read.subject.pictures, spec.subject.pictures))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a prompt, or a swap and a subject"),
        ({"prompt": "x", "cross_replace": 1.5}, r"cross_replace=1.5; expected a fraction"),
        ({"prompt": "x", "self_replace": (0.8, 0.2)}, r"start <= stop"),
        ({"prompt": "x", "self_resolution": 0}, "self_resolution=0"),
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
        {"rule": 3}, {"rule": ["peak"]}, {"source_words": "cat"}, {"target_words": 3},
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
        ('{"prompt": "x", "weights": [["cat", 2.0]]}', r"\['cat', 2.0\]; expected \[word, index or null, factor\]"),
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
