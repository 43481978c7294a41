"""Token layouts: columns of words by characters, the subject's columns, and the messages of every refusal."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, CLIPTokenizerFast

from p2p_subject.errors import (
    AmbiguousWordError,
    ModelError,
    PromptError,
    PromptTooLongError,
    WordNotFoundError,
)
from p2p_subject.tokens import SUBJECT_ID, TokenLayout, layout

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
GOLDEN_TOKENIZERS = [GOLDEN / name / "checkpoint" / "tokenizer" for name in ("prompt_to_prompt", "blip_diffusion")]
START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = string.ascii_lowercase + string.digits + string.punctuation
MERGES = [
    "c a",
    "ca t</w>",
    "d o",
    "do g</w>",
    "o n</w>",
    "p an",
    "a n",
    "r e",
    "re d</w>",
    "g r",
    "gr a",
    "s s</w>",
]


def write_tiny_tokenizer(folder):
    """Write a CLIP tokenizer that knows characters and a few merges; other words fall apart."""
    tokens = [
        START,
        END,
        *ALPHABET,
        *(letter + "</w>" for letter in ALPHABET),
        *(m.replace(" ", "") for m in MERGES),
    ]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    settings_ = {
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **settings_}))


class SlowTokenizer:
    """The interface of a slow tokenizer over a fast one: pieces, but no offsets."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        self.byte_decoder = {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}

    def __getattr__(self, name):
        return getattr(self._fast, name)

    def tokenize(self, text):
        return self._fast.tokenize(text)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return CLIPTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def slow(tiny):
    real = CLIPTokenizer.from_pretrained(tiny.name_or_path)
    return SlowTokenizer(tiny) if real.is_fast else real


@pytest.fixture(scope="session", params=["tiny", *GOLDEN_TOKENIZERS], ids=["tiny", "golden-p2p", "golden-blip"])
def tokenizer(request, tiny):
    if request.param == "tiny":
        return tiny
    if not request.param.exists():
        pytest.skip("the golden tokenizers are not here")
    return CLIPTokenizerFast.from_pretrained(request.param)


WORDS = [
    "a",
    "cat",
    "Cat",
    "dog",
    "category",
    "red",
    "don't",
    "cat's",
    "red-panda",
    "2023",
    "GRASS",
    "dachshund",
    "x_y",
]
MARKS = ["", "", "", ",", ".", '"', "!?", ")", " (", " -"]
SPACES = [" ", "  ", "\n", "\t "]
LEADS = ["", "", "", "'", '"', "("]
prompts = st.lists(st.tuples(*map(st.sampled_from, (LEADS, WORDS, MARKS, SPACES))).map("".join), min_size=0, max_size=7).map(
    "".join
)
subjects = st.sampled_from([0, 0, 3, 16])


def spelled(seen: TokenLayout, columns) -> str:
    return "".join(seen.prompt[slice(*seen.spans[column])] for column in columns)


def test_layout_is_what_the_tokenizer_pads(tokenizer):
    prompt = 'A photo, of "red-panda\'s" (dachshund)\n 2023.'
    seen = layout(tokenizer, prompt)
    assert list(seen.ids) == tokenizer(prompt, padding="max_length", max_length=77)["input_ids"]
    assert seen.length == 77 and seen.ids[seen.end] == tokenizer.eos_token_id
    assert seen.content == tuple(range(1, seen.end)) and len(seen.subject) == 0
    assert seen.prompt_ids == seen.ids


def test_subject_is_inserted_after_the_padded_prompt(tokenizer):
    seen = layout(tokenizer, "a dog on grass", subject_queries=16)
    shorter = tokenizer("a dog on grass", padding="max_length", max_length=61)["input_ids"]
    assert list(seen.ids) == shorter[:2] + [SUBJECT_ID] * 16 + shorter[2:]
    assert list(seen.prompt_ids) == shorter
    assert seen.subject == range(2, 18) and seen.subject_position == 2
    assert seen.columns("a") == (1,) and seen.columns("dog")[0] == 18
    assert seen.ids[seen.end] == tokenizer.eos_token_id and seen.end == 1 + 16 + len(seen.content)


def test_empty_prompt_is_unconditional(tokenizer):
    seen = layout(tokenizer, "")
    assert seen.content == () and seen.end == 1 and seen.words() == ()
    assert list(seen.ids) == tokenizer("", padding="max_length", max_length=77)["input_ids"]
    with pytest.raises(WordNotFoundError):
        seen.columns("cat")


def test_pad_token_of_its_own(tiny):
    padded = CLIPTokenizerFast.from_pretrained(tiny.name_or_path, pad_token="!")
    assert layout(padded, "a cat").ids[4:] == (padded.convert_tokens_to_ids("!"),) * 73
    # What it pads with is also a word.
    assert len(layout(padded, "a cat!").content) > len(layout(padded, "a cat").content)


@settings(max_examples=150, deadline=None)
@given(prompt=prompts, subject=subjects)
def test_words_own_disjoint_columns_that_spell_them(tiny, prompt, subject):
    seen = layout(tiny, "a " + prompt, subject_queries=subject, max_length=160)
    words, columns = seen.words(), seen.word_columns()
    for word, own in zip(words, columns, strict=True):
        assert word in spelled(seen, own) and spelled(seen, own).strip("'") == word
    flat = [column for own in columns for column in own]
    assert len(flat) == len(set(flat)) and set(flat) <= set(seen.content)
    assert not any(c.isalnum() for column in set(seen.content) - set(flat) for c in spelled(seen, [column]))
    assert not set(seen.content) & set(seen.subject)
    assert len(seen.ids) == len(seen.spans) == seen.length == 160
    assert seen.end == max((*seen.content, *seen.subject)) + 1
    assert seen.ids[seen.end] == tiny.eos_token_id and tiny.eos_token_id not in seen.ids[1 : seen.end]


@settings(max_examples=150, deadline=None)
@given(prompt=prompts, subject=subjects)
def test_columns_find_every_word_again(tiny, prompt, subject):
    seen = layout(tiny, "a " + prompt, subject_queries=subject, max_length=160)
    for word, own in zip(seen.words(), seen.word_columns(), strict=True):
        count = len(seen._occurrences(word))
        assert own in [seen.columns(word.upper(), index) for index in range(count)]
        if count == 1:
            assert seen.columns(f"{word},") == own


@settings(max_examples=100, deadline=None)
@given(prompt=prompts)
def test_slow_and_fast_tokenizers_agree(tiny, slow, prompt):
    assert layout(slow, prompt, max_length=160) == layout(tiny, prompt, max_length=160)


@pytest.mark.parametrize("prompt", ["naïve 😀 cats", "ÀÉ café İstanbul x", "“quoted” – dash… ½", "cafe\u0301 on grass"])
def test_slow_and_fast_agree_on_bytes(prompt):
    folder = GOLDEN_TOKENIZERS[1]
    if not folder.exists():
        pytest.skip("the golden tokenizers are not here")
    fast = CLIPTokenizerFast.from_pretrained(folder)
    assert layout(SlowTokenizer(fast), prompt) == layout(fast, prompt)


def test_slow_spans_survive_a_repaired_text(tiny):
    class Repairing(SlowTokenizer):
        def tokenize(self, text):
            return super().tokenize(text.replace("&amp;", "&").replace("“", '"').replace("…", "...").replace("~", " x"))

    seen = layout(Repairing(tiny), "“cat &amp; dog… on~ red")
    assert [spelled(seen, seen.columns(word)) for word in ("cat", "dog", "on", "red")] == [
        "cat",
        "dog",
        "on",
        "red",
    ]
    with pytest.raises(WordNotFoundError, match="drops 'amp'"):
        seen.columns("amp")


def test_word_columns_of_a_known_prompt(tiny):
    seen = layout(tiny, "a cat, a category of CAT's (dogs)")
    assert seen.words() == ("a", "cat", "a", "category", "of", "CAT's", "dogs")
    assert seen.columns("cat", 0) == (2,) and seen.columns("CATEGORY,") == (5, 6, 7, 8, 9, 10, 11)
    assert seen.columns("cat's") == (*seen.columns("cat", 1), 15, 16)
    assert seen.columns("a cat") == (1, 2)
    assert seen.columns(",") == (3,)
    with pytest.raises(WordNotFoundError):
        seen.columns("cat", 2)
    with pytest.raises(WordNotFoundError):
        seen.columns("s")


def test_phrases_cross_any_white_space(tokenizer):
    seen = layout(tokenizer, "a red  panda and a\nred-panda")
    assert spelled(seen, seen.columns("Red Panda")) == "redpanda"
    assert spelled(seen, seen.columns("red-panda")) == "red-panda"
    assert seen.columns("panda", 1) == seen.columns("red-panda")[-len(seen.columns("panda", 1)) :]
    assert spelled(seen, seen.columns("a\tred", 1)) == "ared"


def test_contraction_tokens_inside_a_quoted_word(tokenizer):
    seen = layout(tokenizer, "the 'select' few")
    assert spelled(seen, seen.columns("select")).strip("'") == "select"


def test_composed_and_decomposed_letters_are_the_same_word():
    folder = GOLDEN_TOKENIZERS[1]
    if not folder.exists():
        pytest.skip("the golden tokenizers are not here")
    full = CLIPTokenizerFast.from_pretrained(folder)
    assert layout(full, "a cafe\u0301").columns("caf\u00e9") == layout(full, "a caf\u00e9").columns("cafe\u0301")
    assert len(layout(full, "a 😀 cat").columns("😀")) == 1


def test_messages_of_unknown_and_ambiguous_words(tiny):
    seen = layout(tiny, "a cat and a cat on grass")
    with pytest.raises(WordNotFoundError, match=r"'gras' is not in the prompt .* Did you mean 'grass'\? Its words are"):
        seen.columns("gras")
    with pytest.raises(AmbiguousWordError, match=r"2 times.*0: 'a \[cat\] and a cat on grass'; 1: 'a cat and a \[cat\]"):
        seen.columns("cat")
    with pytest.raises(WordNotFoundError, match="no occurrence -1"):
        seen.columns("cat", -1)
    for empty in ("", "  ", None):
        with pytest.raises(PromptError, match="word of the prompt was expected"):
            seen.columns(empty)


def test_long_prompts_are_refused_with_the_words_that_do_not_fit(tiny):
    with pytest.raises(PromptTooLongError, match=r"needs 6 tokens and 5 are available.*\['\"dog\"'\]"):
        layout(tiny, 'a cat on "dog"', max_length=7)
    assert layout(tiny, 'a cat on "dog"', max_length=8).length == 8
    with pytest.raises(PromptTooLongError, match=r"4 tokens and 3 .*16 subject embeddings.*\['dog'\]"):
        layout(tiny, "a cat on dog", max_length=21, subject_queries=16)
    with pytest.raises(PromptTooLongError, match=r"'dog', .*and 13 more"):
        layout(tiny, "a dog " * 50)
    with pytest.raises(PromptTooLongError):
        layout(tiny, "", max_length=1)


def test_a_subject_needs_an_article(tiny):
    assert layout(tiny, "a", subject_queries=3).end == 5
    for prompt in ("", "grass is wet"):
        with pytest.raises(PromptError, match="Begin the prompt with an article such as 'a'"):
            layout(tiny, prompt, subject_queries=3)
    assert layout(tiny, "grass", subject_queries=3, subject_position=1).subject == range(1, 4)


def test_unusable_prompts(tiny):
    for prompt in (None, 3, ["a cat"], b"a cat", "a \ud83d cat"):
        with pytest.raises(PromptError, match="must be a text"):
            layout(tiny, prompt)
    with pytest.raises(PromptError, match="no ordinary token"):
        layout(tiny, f"a cat {END} on")
    with pytest.raises(PromptError, match="'😀'"):
        layout(tiny, "a 😀 cat")


def test_unknown_window_is_refused(tiny):
    endless = CLIPTokenizerFast.from_pretrained(tiny.name_or_path, model_max_length=10**30)
    with pytest.raises(ModelError, match="max_length"):
        layout(endless, "a cat")
    assert layout(endless, "a cat", max_length=77) == layout(tiny, "a cat")
