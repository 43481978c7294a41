"""Which source columns an edited prompt's columns take their attention maps from.

After Prompt-to-Prompt (Hertz et al. 2022, section 3.3: "Word Swap", "Adding a New Phrase") and its published
code. With source maps `A` of shape (..., Q, S) and target maps `B` of shape (..., Q, T), the edited maps are

    edited = A @ matrix + B * (1 - covered)          matrix: (S, T), covered: (T,)

Shape letters: `S` source columns, `T` target columns, `Q` pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain
from typing import Literal

import torch

from p2p_subject.errors import EditSpecError
from p2p_subject.tokens import TokenLayout

__all__ = ["Alignment", "align", "is_identity", "refinement", "replacement"]

Columns = tuple[int, ...]
Link = tuple[Columns, Columns]
Padding = Literal["shifted", "reference"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the columns of a target prompt follow those of a source prompt.

    Attributes:
        matrix: (S, T) float32, >= 0. Column `j` weighs the source maps that target column `j` takes.
        covered: (T,) float32 in {0, 1}. 0 where the column of `matrix` is zero: the target keeps its own map
            there.
    """

    matrix: torch.Tensor
    covered: torch.Tensor


def replacement(source: TokenLayout, target: TokenLayout, *, padding: Padding = "shifted") -> Alignment:
    """Return the word-by-word alignment of two prompts with the same number of words ("Word Swap").

    Words are what white space separates, as in the published code. A word of n tokens that replaces one of n
    tokens takes its maps one by one; otherwise each of its m tokens takes the sum of the word's source maps
    divided by m, so that the attention a source word receives is kept. Every column but those of a subject is
    covered.

    Args:
        source: (S columns) layout of the source prompt.
        target: (T columns) layout of the target prompt.
        padding: see `align`. "reference" here takes everything after the last replaced word as padding, as
            the published code does; words there lose their own counterpart where token counts differ.

    Raises:
        EditSpecError: the prompts have different numbers of words.
    """
    ours, theirs = _chunks(source), _chunks(target)
    if len(ours) != len(theirs):
        raise EditSpecError(
            f"A replace edit needs prompts with the same number of words: {source.prompt!r} has {len(ours)}, "
            f"{target.prompt!r} has {len(theirs)}. Use a refine edit, or make the prompts match word by word."
        )
    tail = target.end + 1
    # The published code knows no subjects; behind one, equal places would be unrelated words.
    if padding == "reference" and len(source.subject) == len(target.subject):
        replaced = [max(b, default=0) for (word, _), (other, b) in zip(ours, theirs) if word != other]
        tail = max(replaced, default=target.end) + 1
    return _compile(source, target, [(a, b) for (_, a), (_, b) in zip(ours, theirs)], padding, tail)


def refinement(source: TokenLayout, target: TokenLayout, *, padding: Padding = "shifted") -> Alignment:
    """Return the token-by-token alignment of two prompts ("Adding a New Phrase").

    The longest common subsequence of tokens is aligned (Needleman-Wunsch, match 1, mismatch -1, gap 0); every
    other token of the target keeps its own maps. `source` has S columns, `target` T; `padding` as in `align`.
    """
    ours, theirs = source.content, target.content
    common = _common([source.ids[column] for column in ours], [target.ids[column] for column in theirs])
    return _compile(source, target, [((ours[i],), (theirs[j],)) for i, j in common], padding)


def align(
    source: TokenLayout,
    target: TokenLayout,
    *,
    replaced: Literal["free", "map"] = "free",
    padding: Padding = "shifted",
) -> Alignment:
    """Return the alignment of any two prompts, by matching words: some inserted, some removed, some replaced.

    Equal words (and punctuation) are mapped token by token; inserted ones keep their own maps. The columns of
    a subject are skipped and keep their own maps, unless both prompts hold a subject of the same size: then
    they are mapped one to one.

    Args:
        source: (S columns) layout of the source prompt.
        target: (T columns) layout of the target prompt.
        replaced: "free": a word that stands where another stood keeps its own maps, as in `refinement`.
            "map": it takes the maps of what it replaces by the rule of `replacement`.
        padding: "shifted": the k-th padding column takes the k-th of the source, or its last one.
            "reference": it takes the source column at its own place, as the published code does, even where
            a longer source prompt has a word there.
    """
    ours, theirs = _units(source), _units(target)
    matcher = SequenceMatcher(None, _unit_ids(source, ours), _unit_ids(target, theirs), autojunk=False)
    links: list[Link] = []
    for tag, i, i_stop, j, j_stop in matcher.get_opcodes():
        run = ours[i:i_stop], theirs[j:j_stop]
        if tag == "equal" or (tag == "replace" and replaced == "map" and len(run[0]) == len(run[1])):
            links += zip(*run)
        elif tag == "replace" and replaced == "map":
            links.append((tuple(chain(*run[0])), tuple(chain(*run[1]))))
    return _compile(source, target, links, padding)


def is_identity(alignment: Alignment) -> bool:
    """Return whether the edited maps are the source's maps, unchanged."""
    matrix = alignment.matrix
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def _compile(
    source: TokenLayout, target: TokenLayout, links: Iterable[Link], padding: Padding, tail: int | None = None
) -> Alignment:
    """Return the alignment of linked columns, with start, end, subject and, from `tail` on, padding."""
    matrix = torch.zeros(source.length, target.length)
    frame = [((0,), (0,)), ((source.end,), (target.end,))]
    if len(source.subject) == len(target.subject):
        frame.append((tuple(source.subject), tuple(target.subject)))
    for ours, theirs in chain(links, frame):
        if len(ours) == len(theirs):
            matrix[list(ours), list(theirs)] = 1.0
        elif ours and theirs:
            matrix[torch.tensor(ours)[:, None], torch.tensor(theirs)] = 1.0 / len(theirs)

    shift = source.end - target.end if padding == "shifted" else 0
    for column in range(target.end + 1 if tail is None else tail, target.length):
        matrix[:, column] = 0.0
        matrix[min(column + shift, source.length - 1), column] = 1.0
    return Alignment(matrix, (matrix > 0).any(dim=0).to(matrix.dtype))


def _chunks(layout: TokenLayout) -> list[tuple[str, Columns]]:
    """Return what white space separates in the prompt, with its columns."""
    return [(match.group(), layout.columns_in(*match.span())) for match in re.finditer(r"\S+", layout.prompt)]


def _units(layout: TokenLayout) -> list[Columns]:
    """Return the columns of each word and of each token of punctuation, in order."""
    words = [columns for columns in layout.word_columns() if columns]
    in_words = set(chain(*words))
    return sorted(words + [(column,) for column in layout.content if column not in in_words])


def _unit_ids(layout: TokenLayout, units: list[Columns]) -> list[tuple[int, ...]]:
    return [tuple(layout.ids[column] for column in unit) for unit in units]


def _common(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of indices that the global alignment matches, in order.

    Among equal scores a target token is skipped first, then a source token: the published order, which
    decides where repeated words go.
    """
    score = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, a in enumerate(ours, 1):
        for j, b in enumerate(theirs, 1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if a == b else -1))
    pairs = []
    i, j = len(ours), len(theirs)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
