"""The columns that the text encoder sees for a prompt, and which of them belong to which word.

Attention maps have one column per token, so every edit of a word is an edit of columns (Prompt-to-Prompt,
Hertz et al. 2022, section 3). Words are found by the characters they cover, never by the decoded lengths of
tokens. With a subject, the layout holds the inserted query embeddings as well (BLIP-Diffusion, Li et al.
2023, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING
from unicodedata import normalize

from p2p_subject.errors import (
    AmbiguousWordError,
    ModelError,
    PromptError,
    PromptTooLongError,
    WordNotFoundError,
    did_you_mean,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SUBJECT_ID", "TokenLayout", "layout"]

SUBJECT_ID = -1
"""Stands in `TokenLayout.ids` for an inserted query embedding, which has no vocabulary id."""

Span = tuple[int, int]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SURROUNDING = " \t\r\n.,;:!?\"'()[]{}…“”‘’«»"
# No tokenizer states a window this long; transformers writes 1e30 where none is known.
_NO_WINDOW = 10**6
# Words named in an error message at most.
_NAMED = 12


@dataclass(frozen=True)
class TokenLayout:
    """What the text encoder sees, column by column.

    Attributes:
        prompt: the prompt, in the composed Unicode form (NFC) that the tokenizer reads.
        ids: one vocabulary id per column: start, prompt, end and padding; `SUBJECT_ID` for inserted columns.
        spans: for each column its `(start, stop)` characters in `prompt`; None for start, end, padding and
            subject.
        subject: columns of the inserted query embeddings; empty without a subject.
    """

    prompt: str
    ids: tuple[int, ...]
    spans: tuple[Span | None, ...]
    subject: range

    @property
    def length(self) -> int:
        """The number of columns: the text encoder's whole window."""
        return len(self.ids)

    @property
    def content(self) -> tuple[int, ...]:
        """The columns that carry tokens of the prompt, in order."""
        return tuple(column for column, span in enumerate(self.spans) if span is not None)

    @property
    def end(self) -> int:
        """The column of the end token; every column after it is padding."""
        return 1 + len(self.content) + len(self.subject)

    @property
    def subject_position(self) -> int:
        """The number of columns before the inserted query embeddings."""
        return self.subject.start

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids without the subject's columns: what is fed to the encoder's token embedding."""
        return self.ids[: self.subject.start] + self.ids[self.subject.stop :]

    def columns_in(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the columns whose token covers any character of `prompt[start:stop]`."""
        return tuple(column for column, span in enumerate(self.spans) if span and span[0] < stop and span[1] > start)

    def words(self) -> tuple[str, ...]:
        """Return the words of the prompt in order, as written, without punctuation."""
        return tuple(match.group() for match in _WORD.finditer(self.prompt))

    def word_columns(self) -> tuple[tuple[int, ...], ...]:
        """Return the columns of each of `words()`, in the same order."""
        return tuple(self.columns_in(*match.span()) for match in _WORD.finditer(self.prompt))

    def columns(self, word: str, index: int | None = None) -> tuple[int, ...]:
        """Return the columns of a word or phrase, every token that it is split into included.

        Case and the punctuation around the word are ignored; "cat" is not found inside "category". `index`
        picks one of several occurrences, counted from 0.

        Raises:
            PromptError: the word is empty.
            WordNotFoundError: the prompt does not hold the word, or not as often as `index` asks.
            AmbiguousWordError: it occurs more than once and `index` is None.
        """
        found = self._occurrences(word)
        if index is None and len(found) > 1:
            raise AmbiguousWordError(
                f"{word!r} occurs {len(found)} times in the prompt {self.prompt!r}. "
                f"Pick one with its index: {self._choices(found)}."
            )
        if index is not None and not 0 <= index < len(found):
            raise WordNotFoundError(
                f"There is no occurrence {index} of {word!r} in the prompt {self.prompt!r}. "
                f"Occurrences, counted from 0: {self._choices(found)}."
            )
        columns = self.columns_in(*found[index or 0])
        if not columns:
            raise WordNotFoundError(f"The tokenizer drops {word!r} from the prompt {self.prompt!r}. Name another word.")
        return columns

    def all_columns(self, word: str) -> tuple[tuple[int, ...], ...]:
        """Return the columns of every occurrence of a word or phrase, in order; none where the prompt lacks it."""
        found = (self.columns_in(*match.span()) for match in phrase_pattern(word).finditer(self.prompt))
        return tuple(columns for columns in found if columns)

    def _occurrences(self, word: str) -> list[Span]:
        """Return the character spans of `word`, at least one."""
        if not isinstance(word, str) or not word.strip():
            raise PromptError(f"A word of the prompt was expected, got {word!r}. Name one of {list(self.words())}.")
        found = [match.span() for match in phrase_pattern(word).finditer(self.prompt)]
        if not found:
            raise WordNotFoundError(
                f"{word!r} is not in the prompt {self.prompt!r}.{did_you_mean(word, self.words())} "
                f"Its words are {list(self.words())}."
            )
        return found

    def _choices(self, found: list[Span]) -> str:
        """Return the occurrences with their surroundings, for an error message."""
        text = self.prompt
        return "; ".join(
            f"{index}: '{text[max(0, start - 20) : start]}[{text[start:stop]}]{text[stop : stop + 20]}'"
            for index, (start, stop) in enumerate(found)
        )


def layout(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    subject_queries: int = 0,
    subject_position: int = 2,
    max_length: int | None = None,
) -> TokenLayout:
    """Return the layout of `prompt` in a window of `max_length` columns (by default the tokenizer's own).

    With a subject, the prompt is padded to `max_length - subject_queries` and the query embeddings are
    inserted at `subject_position`, after the start token and the article; every later column moves behind
    them.

    Args:
        tokenizer: a CLIP tokenizer, fast or slow.
        prompt: any text; the empty prompt gives the unconditional layout.
        subject_queries: the number of inserted query embeddings, >= 0.
        subject_position: the number of columns before them, >= 1.
        max_length: the number of columns in all.

    Raises:
        PromptError: the prompt is not a text, holds something that the vocabulary does not know, or has no
            article for a subject to follow.
        PromptTooLongError: the prompt does not fit; nothing is cut off.
        ModelError: neither `max_length` nor the tokenizer states a window.
    """
    # Half a surrogate pair, as JSON may hold, is no character and cannot be encoded.
    if not isinstance(prompt, str) or re.search(r"[\ud800-\udfff]", prompt):
        raise PromptError(f"A prompt must be a text, got {prompt!r:.80}.")
    window = tokenizer.model_max_length if max_length is None else max_length
    if window > _NO_WINDOW:
        raise ModelError("The tokenizer does not state the window of its text encoder. Give `max_length`, 77 for CLIP.")
    prompt = normalize("NFC", prompt)
    ids, spans = _tokenize(tokenizer, prompt)
    _check_known(tokenizer, prompt, ids, spans)
    _check_fits(prompt, spans, window, subject_queries)
    if subject_queries:
        _check_article(prompt, spans, subject_position)

    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padding = window - subject_queries - len(ids) - 2
    all_ids = (tokenizer.bos_token_id, *ids, end, *[pad] * padding)
    all_spans = (None, *spans, None, *[None] * padding)
    at = subject_position
    return TokenLayout(
        prompt=prompt,
        ids=(*all_ids[:at], *[SUBJECT_ID] * subject_queries, *all_ids[at:]),
        spans=(*all_spans[:at], *[None] * subject_queries, *all_spans[at:]),
        subject=range(at, at + subject_queries),
    )


def phrase_pattern(word: str) -> re.Pattern[str]:
    """Return the pattern that finds a word or phrase as whole words."""
    word = normalize("NFC", word)
    word = word.strip(_SURROUNDING) or word.strip()
    # The second look-behind keeps the "s" of "cat's" from being a word; only "cat" is one.
    before = r"(?<![^\W_])(?<![^\W_]['’])" if word[0].isalnum() else ""
    after = r"(?![^\W_])" if word[-1].isalnum() else ""
    return re.compile(before + r"\s+".join(map(re.escape, word.split())) + after, re.IGNORECASE)


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[Span]]:
    """Return the ids of the prompt and the characters that each covers, without start, end or padding."""
    if tokenizer.is_fast:
        read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(read["input_ids"]), [tuple(span) for span in read["offset_mapping"]]
    pieces = tokenizer.tokenize(prompt)
    return tokenizer.convert_tokens_to_ids(pieces), list(_piece_spans(prompt, pieces, tokenizer.byte_decoder))


def _piece_spans(prompt: str, pieces: list[str], byte_decoder: dict[str, int]) -> Iterator[Span]:
    """Yield the characters that each piece of a slow tokenizer covers.

    The pieces spell the bytes of the prompt in lower case without white space. Both sides are matched as
    bytes, so that a tokenizer which also repairs the text (quotes, ligatures, HTML entities) costs precision
    only where it did.
    """
    given = [(byte, at) for at, char in enumerate(prompt) if not char.isspace() for byte in char.lower().encode()]
    letters = [piece.removesuffix("</w>") for piece in pieces]
    seen = bytes(byte_decoder.get(letter, 0) for letter in "".join(letters))
    covered: list[Span] = []
    matcher = SequenceMatcher(None, bytes(byte for byte, _ in given), seen, autojunk=False)
    for tag, first, last, start, stop in matcher.get_opcodes():
        chars = [at for _, at in given[first:last]]
        if tag == "equal":
            covered += [(at, at + 1) for at in chars]
        elif chars:
            covered += [(chars[0], chars[-1] + 1)] * (stop - start)
        else:
            here = given[first][1] if first < len(given) else len(prompt)
            covered += [(here, here)] * (stop - start)
    for piece in letters:
        own, covered = covered[: len(piece)], covered[len(piece) :]
        yield min(start for start, _ in own), max(stop for _, stop in own)


def _check_known(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], spans: list[Span]) -> None:
    # CLIP's token for the unknown is its end token: left in the prompt, the encoder would stop reading there.
    # Not the padding: Stable Diffusion 2 and XL pad with "!", which is also a word of theirs.
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    unknown = dict.fromkeys(prompt[slice(*span)] for id_, span in zip(ids, spans) if id_ in special)
    if unknown:
        raise PromptError(f"The tokenizer has no ordinary token for {list(unknown)} in {prompt!r}. Remove it.")


def _check_fits(prompt: str, spans: list[Span], window: int, subject_queries: int) -> None:
    room = window - 2 - subject_queries
    if len(spans) <= room:
        return
    over = spans[max(room, 0) :]
    start = over[0][0] if over else len(prompt)
    while start and not prompt[start - 1].isspace():
        start -= 1
    words = prompt[start:].split()
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    taken = f"start, end and {subject_queries} subject embeddings" if subject_queries else "start and end"
    raise PromptTooLongError(
        f"The prompt needs {len(spans)} tokens and {room} are available: the text encoder's window of "
        f"{window} also holds {taken}. These words do not fit: {words[:_NAMED]}{more}. Shorten the prompt."
    )


def _check_article(prompt: str, spans: list[Span], position: int) -> None:
    before, after = spans[: position - 1], spans[position - 1 : position]
    if len(before) == position - 1 and not (before and after and _inside_word(prompt, before[-1], after[0])):
        return
    raise PromptError(
        f"The subject is inserted after {position} tokens, the start token and an article, which {prompt!r} "
        f"does not have. Begin the prompt with an article such as 'a': {('a ' + prompt).strip()!r}."
    )


def _inside_word(prompt: str, left: Span, right: Span) -> bool:
    """Whether two neighbouring tokens are parts of the same word (or of the same character)."""
    touching = right[0] <= left[1]
    return touching and (right[0] < left[1] or (prompt[right[0] - 1].isalnum() and prompt[right[0]].isalnum()))
