"""Captions with a place for the subject, as ids of the prompt's tokenizer: the two templates of BLIP-Diffusion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import normalize

from p2p_subject.errors import ArgumentError, PromptTooLongError
from p2p_subject.tokens import TokenLayout, layout
from p2p_subject.training.world import with_article

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RELEASED, PAPER = "released", "paper"
TEMPLATES = (RELEASED, PAPER)
"""Names of the templates; see `sentence`."""


@dataclass(frozen=True)
class Caption:
    """A caption as the text encoder takes it.

    `ids`: of the start token, the text, the end token and padding, one for each column that the subject leaves. `position`:
    how many of them stand before the subject. `text`: what was encoded. `cut`: words at its end did not fit.
    """

    ids: tuple[int, ...]
    position: int
    text: str
    cut: bool


def sentence(text: str, subject: str, template: str) -> tuple[str, int]:
    """A caption in the words of a template, and the number of its characters before the subject's embeddings.

    "released", what the released model is given: an article, the embeddings, the subject and what surrounds it. A caption
    that begins so is taken as it is; another gets "a [subject], " in front. "paper" (Li et al. 2023, section 3.2):
    "[text], the [subject] is", and then the embeddings.
    """
    text = normalize("NFC", text).strip().rstrip(".,;: ")
    if template == PAPER:
        whole = f"{text}, the {subject} is" if text else f"the {subject} is"
        return whole, len(whole)
    begins = rf"(an?|the)\s+{re.escape(subject)}(?![^\W_]|['’-])"
    if not re.match(begins, text, re.IGNORECASE):
        text = f"{with_article(subject)}, {text}" if text else with_article(subject)
    return text, re.match(r"\S+\s+", text).end()


def caption(tokenizer: PreTrainedTokenizerBase, text: str, subject: str, template: str, window: int, queries: int) -> Caption:
    """Encode a caption for a text encoder of `window` columns, of which the subject takes `queries`.

    Words of `text` that do not fit are left out from its end; the subject stays.

    Raises:
        PromptTooLongError: not even the subject fits.
        PromptError: the tokenizer does not know a character.
        ArgumentError: there is no such template.
    """
    if template not in TEMPLATES:
        raise ArgumentError(f"template={template!r}; expected one of {', '.join(TEMPLATES)}")
    words = text.split()
    # A word is a token or more, so that no more words than columns can fit.
    for count in range(min(len(words), window), 0, -1):
        try:
            return _encoded(tokenizer, words, count, subject, template, window - queries)
        except PromptTooLongError:
            continue
    return _encoded(tokenizer, words, 0, subject, template, window - queries)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, words: list[str], count: int, subject: str, template: str, columns: int
) -> Caption:
    whole, before = sentence(" ".join(words[:count]), subject, template)
    laid_out = layout(tokenizer, whole, max_length=columns)
    return Caption(laid_out.prompt_ids, _position(laid_out, before), whole, count < len(words))


def _position(laid_out: TokenLayout, before: int) -> int:
    behind = laid_out.columns_in(before, len(laid_out.prompt))
    return behind[0] if behind else laid_out.end
