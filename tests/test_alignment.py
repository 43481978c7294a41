"""Alignments: parity with the published formulas, and what holds for every pair of prompts."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2p_subject.alignment import align, is_identity, refinement, replacement
from p2p_subject.errors import EditSpecError
from p2p_subject.tokens import layout

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


class PieceTokenizer:
    """Splits words into pieces of at most four letters, and marks; enough of a fast tokenizer."""

    is_fast = True
    model_max_length = 48
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 0, 1, 1, 1

    def __init__(self):
        self._ids = {}

    def __call__(self, text, **_):
        spans = [match.span() for match in re.finditer(r"[^\W_]{1,4}|[^\w\s]|_", text)]
        ids = [self._ids.setdefault(text[a:b].lower(), 2 + len(self._ids)) for a, b in spans]
        return {"input_ids": ids, "offset_mapping": spans}


TOKENIZER = PieceTokenizer()
WORDS = [
    "a",
    "the",
    "cat",
    "Cat",
    "dog",
    "dachshund",
    "squirrel",
    "lasagna,",
    "(red)",
    "don't",
    "on",
    "grass.",
    "x_y",
]
texts = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
pairs = st.tuples(texts, texts)
paddings = st.sampled_from(["shifted", "reference"])
kinds = [refinement, align, lambda *a, **k: align(*a, replaced="map", **k)]


def seen(text, subject=0, tokenizer=TOKENIZER):
    return layout(tokenizer, text, subject_queries=subject)


def mapped(alignment):
    """The alignment as {target column: {source column: weight}}."""
    return {j: {i: round(w, 6) for i, w in enumerate(column.tolist()) if w} for j, column in enumerate(alignment.matrix.T)}


def token_columns(source, target):
    """The alignment over prompt tokens, as source columns by target column, numbered from the start token."""
    return {j: sorted(rows) for j, rows in mapped(align(source, target, replaced="map")).items() if j in target.content}


# The published formulas, written again from their description, on token ids and word columns.


def published_refinement(ours, theirs, length):
    """Needleman-Wunsch over whole sequences with start and end; -1 where a target token is not aligned."""
    n, m = len(ours), len(theirs)
    score = torch.zeros(n + 1, m + 1)
    move = {**{(0, j): "left" for j in range(1, m + 1)}, **{(i, 0): "up" for i in range(1, n + 1)}}
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = 1 if ours[i - 1] == theirs[j - 1] else -1
            choices = {"left": score[i, j - 1], "up": score[i - 1, j], "diagonal": score[i - 1, j - 1] + same}
            move[i, j] = max(choices, key=choices.get)  # the first of equals
            score[i, j] = choices[move[i, j]]
    source_of = list(range(length))
    i, j = n, m
    while i or j:
        step = move[i, j]
        i, j = i - (step != "left"), j - (step != "up")
        if step != "up":
            source_of[j] = i if step == "diagonal" else -1
    matrix = torch.zeros(length, length)
    for j, i in enumerate(source_of):
        if i >= 0:
            matrix[i, j] = 1
    return matrix, torch.tensor([float(i >= 0) for i in source_of])


def published_replacement(ours, theirs, length):
    """`ours`, `theirs`: (word, columns) in order. Equal places follow the last replaced word."""
    replaced = [(a, b) for (word, a), (other, b) in zip(ours, theirs, strict=True) if word != other]
    matrix = torch.zeros(length, length)
    i = j = 0
    for a, b in replaced:
        while i < a[0]:
            matrix[i, j] = 1
            i, j = i + 1, j + 1
        for k, row in enumerate(a):
            for n, column in enumerate(b):
                if len(a) != len(b):
                    matrix[row, column] = 1 / len(b)
                elif k == n:
                    matrix[row, column] = 1
        i, j = i + len(a), j + len(b)
    for column in range(j, length):
        matrix[column, column] = 1
    return matrix


def word_columns(tokens):
    return [(m.group(), list(tokens.columns_in(*m.span()))) for m in re.finditer(r"\S+", tokens.prompt)]


def sequence(tokens):
    return tokens.ids[: tokens.end + 1]


def golden_cases():
    path = GOLDEN / "prompt_to_prompt" / "cases.json"
    return json.loads(path.read_text())["cases"] if path.exists() else []


@pytest.mark.parametrize("case", golden_cases(), ids=[case["name"] for case in golden_cases()])
def test_golden_prompts_match_the_published_formulas(case):
    from transformers import CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(GOLDEN / "prompt_to_prompt" / "checkpoint" / "tokenizer")
    source, target = (seen(prompt, tokenizer=tokenizer) for prompt in case["prompts"])
    matrix, covered = published_refinement(sequence(source), sequence(target), 77)
    ours = refinement(source, target, padding="reference")
    assert torch.equal(ours.matrix, matrix) and torch.equal(ours.covered, covered)
    if len(source.prompt.split()) == len(target.prompt.split()):
        ours = replacement(source, target, padding="reference")
        assert torch.equal(ours.matrix, published_replacement(word_columns(source), word_columns(target), 77))


@settings(max_examples=150, deadline=None)
@given(texts=pairs)
def test_refinement_matches_the_published_formula(texts):
    source, target = map(seen, texts)
    matrix, covered = published_refinement(sequence(source), sequence(target), 48)
    ours = refinement(source, target, padding="reference")
    assert torch.equal(ours.matrix, matrix) and torch.equal(ours.covered, covered)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), min_size=1, max_size=8))
def test_replacement_matches_the_published_formula(words):
    source, target = (seen(" ".join(text)) for text in zip(*words))
    expected = published_replacement(word_columns(source), word_columns(target), 48)
    assert torch.allclose(replacement(source, target, padding="reference").matrix, expected)


@settings(max_examples=100, deadline=None)
@given(text=texts, subject=st.sampled_from([0, 4]), padding=paddings)
def test_a_prompt_aligned_with_itself_is_the_identity(text, subject, padding):
    tokens = seen("a " + text, subject)
    for kind in [*kinds, replacement]:
        alignment = kind(tokens, tokens, padding=padding)
        assert is_identity(alignment) and alignment.covered.eq(1).all()


@settings(max_examples=150, deadline=None)
@given(texts=pairs, subjects=st.tuples(*[st.sampled_from([0, 4, 16])] * 2), padding=paddings)
def test_what_holds_for_every_pair(texts, subjects, padding):
    source, target = (seen("a " + text, subject) for text, subject in zip(texts, subjects))
    for kind in kinds:
        alignment = kind(source, target, padding=padding)
        matrix, covered = alignment.matrix, alignment.covered
        assert matrix.shape == (source.length, target.length) and covered.shape == (target.length,)
        assert matrix.dtype == covered.dtype == torch.float32 and matrix.min() >= 0
        assert torch.equal(covered, matrix.any(dim=0).float())
        assert mapped(alignment)[0] == {0: 1} and mapped(alignment)[target.end] == {source.end: 1}
        assert covered[target.end :].all()
        same = source.subject and len(source.subject) == len(target.subject)
        assert covered[list(target.subject)].eq(float(bool(same))).all()
        if padding == "shifted":
            assert matrix[: source.end, target.end + 1 :].sum() == 0


@settings(max_examples=150, deadline=None)
@given(texts=pairs, subject=st.sampled_from([0, 4]))
def test_unreplaced_columns_follow_one_equal_token_in_order(texts, subject):
    source, target = seen("a " + texts[0]), seen("a " + texts[1], subject)
    for kind in (refinement, align):
        columns = mapped(kind(source, target))
        followed = [(next(iter(rows)), j) for j, rows in columns.items() if j in target.content and rows]
        assert all(columns[j] == {i: 1} and source.ids[i] == target.ids[j] for i, j in followed)
        assert followed == sorted(set(followed)) and len({i for i, _ in followed}) == len(followed)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), min_size=1, max_size=8))
def test_replacement_covers_all_and_keeps_every_words_attention(words):
    source, target = (seen(" ".join(text)) for text in zip(*words))
    alignment = replacement(source, target)
    assert alignment.covered.all()
    kept = alignment.matrix[:, : target.end].sum(dim=1)[: source.end]
    assert torch.allclose(kept, torch.ones(source.end))
    maps = torch.rand(3, source.length).softmax(-1)
    edited = (maps @ alignment.matrix)[:, : target.end]
    assert torch.allclose(edited.sum(-1), maps[:, : source.end].sum(-1), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(texts=pairs, subject=st.sampled_from([4, 16]), replaced=st.sampled_from(["free", "map"]))
def test_a_subject_moves_columns_and_changes_nothing_else(texts, subject, replaced):
    source, plain = seen("a " + texts[0]), seen("a " + texts[1])
    without, with_subject = (
        mapped(align(source, target, replaced=replaced)) for target in (plain, seen("a " + texts[1], subject))
    )
    assume(plain.end + subject < 48)
    for column in range(1, plain.end + 1):
        assert with_subject[column + subject * (column >= 2)] == without[column]


def test_inserted_words_keep_their_own_maps():
    source, target = seen("a house on a hill"), seen("a snowy wooden house on a hill")
    for alignment in (
        refinement(source, target),
        align(source, target),
        align(source, target, replaced="map"),
    ):
        new = target.columns("snowy wooden")
        assert [j for j in range(48) if not alignment.covered[j]] == list(new)
        assert alignment.matrix[:, list(new)].sum() == 0
        assert mapped(alignment)[target.columns("hill")[0]] == {source.columns("hill")[0]: 1}
    assert is_identity(align(source, source)) and not is_identity(align(source, target))


def test_removed_words_leave_the_rest_in_place():
    source, target = seen("a big red cat on grass"), seen("a cat on grass")
    alignment = align(source, target)
    assert alignment.covered.all()
    assert [list(mapped(alignment)[j]) for j in range(6)] == [[0], [1], [4], [5], [6], [7]]
    # 'gras' 's' is split: the end token stands at 6 and at 8; padding follows it.
    assert (source.end, target.end) == (8, 6)
    assert list(mapped(alignment)[7]) == [9] and list(mapped(alignment)[47]) == [47]
    by_place = mapped(align(source, target, padding="reference"))
    assert list(by_place[7]) == [7] and list(by_place[47]) == [47]


def test_a_shorter_source_lends_its_last_padding():
    source, target = seen("a cat"), seen("a cat on the wall")
    alignment = mapped(align(source, target))
    assert list(alignment[target.end + 1]) == [source.end + 1] and list(alignment[45]) == [42]
    assert list(mapped(align(target, source))[47]) == [47]


def test_replaced_words_are_free_or_mapped():
    source, target = seen("a cat on grass"), seen("a dachshund on grass")
    own = target.columns("dachshund")
    assert own == (2, 3, 4)
    assert align(source, target).covered[list(own)].eq(0).all()
    split = mapped(align(source, target, replaced="map"))
    assert all(split[j] == {2: round(1 / 3, 6)} for j in own)
    joined = mapped(align(target, source, replaced="map"))
    assert joined[2] == {2: 1, 3: 1, 4: 1}
    assert torch.equal(align(source, target, replaced="map").matrix, replacement(source, target).matrix)


def test_runs_of_replaced_words():
    source = seen("a red cat on grass")
    assert token_columns(source, seen("a blue dog on grass")) == {
        1: [1],
        2: [2],
        3: [3],
        4: [4],
        5: [5],
        6: [6],
    }
    assert token_columns(source, seen("a dog on grass")) == {1: [1], 2: [2, 3], 3: [4], 4: [5], 5: [6]}
    uneven = seen("a big blue dog on grass")
    assert token_columns(source, uneven)[2] == token_columns(source, uneven)[4] == [2, 3]


def test_swapping_in_a_subject():
    source, target = seen("a cat on grass"), seen("a dog on grass", 16)
    dog = target.columns("dog")[0]
    free, swap = align(source, target), align(source, target, replaced="map")
    assert [j for j in range(48) if not free.covered[j]] == [*target.subject, dog]
    assert [j for j in range(48) if not swap.covered[j]] == list(target.subject)
    assert mapped(swap)[dog] == {source.columns("cat")[0]: 1}
    assert mapped(swap)[target.columns("on")[0]] == {source.columns("on")[0]: 1}


def test_subjects_of_the_same_size_follow_each_other():
    source, target = seen("a cat on grass", 4), seen("a fluffy cat on grass", 4)
    alignment = mapped(align(source, target))
    assert [alignment[j] for j in target.subject] == [{j: 1} for j in source.subject]
    assert not align(source, seen("a cat on grass", 3)).covered[[2, 3, 4]].any()


def test_replacement_shifts_the_words_behind_a_longer_one():
    source, target = seen("a cat on grass"), seen("a dachshund on grass")
    on = target.columns("on")[0]
    assert mapped(replacement(source, target))[on] == {source.columns("on")[0]: 1}
    assert mapped(replacement(source, target, padding="reference"))[on] == {on: 1}
    subject = seen("a dachshund on grass", 16)
    alignment = replacement(source, subject, padding="reference")
    assert mapped(alignment)[on + 16] == {source.columns("on")[0]: 1}
    assert alignment.covered[list(subject.subject)].eq(0).all()


def test_replacement_needs_equal_numbers_of_words():
    with pytest.raises(EditSpecError, match=r"'a cat' has 2, 'a big cat' has 3\. Use a refine edit"):
        replacement(seen("a cat"), seen("a big cat"))


def test_windows_may_differ():
    source, target = layout(TOKENIZER, "a cat", max_length=20), layout(TOKENIZER, "a dog", max_length=9)
    alignment = align(source, target)
    assert alignment.matrix.shape == (20, 9) and list(mapped(align(target, source))[19]) == [8]
    assert not is_identity(alignment)
