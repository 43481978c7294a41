"""From a source's layout and an edit to the target's prompt and layout, and to the columns that make the mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from p2p_subject.alignment import Alignment, align, is_identity, refinement, replacement
from p2p_subject.blend import competitors, rule_of
from p2p_subject.edits import Blend, EditSpec, Word
from p2p_subject.errors import EditSpecError, PromptError, WordNotFoundError
from p2p_subject.tokens import TokenLayout

Columns = tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """Columns that make the mask in one prompt: those of the edited words, and those they compete with.

    `labels` names each edited word with its own columns, for heat maps. `subtract` are the words whose region is taken out.
    """

    columns: Columns = ()
    others: Columns = ()
    labels: tuple[tuple[str, Columns], ...] = ()
    subtract: Words | None = None


@dataclass(frozen=True)
class Plan:
    """The target's layout, its alignment with the source's, and the words of both prompts whose attention makes the mask.

    `swapped` is the source's word that gives way to another, or to a subject, if there is one.
    """

    layout: TokenLayout
    alignment: Alignment
    source_words: Words
    target_words: Words
    swapped: Words

    @property
    def makes_mask(self) -> bool:
        """Whether there are words whose attention makes a mask, or is taken out of one."""
        return any(words.columns or words.subtract for words in (self.source_words, self.target_words))


def describe(source: TokenLayout, spec: EditSpec, layout: Callable[..., TokenLayout]) -> Plan:
    """Work out what an edit means for a source; `layout(prompt, subject=bool)` makes the target's layout.

    Raises `WordNotFoundError`, `AmbiguousWordError`, `PromptTooLongError` and `EditSpecError`; runs no network.
    """
    prompt, place = target_prompt(source, spec)
    # A subject that the source was generated with stays, unless the edit brings another or takes it out.
    edited = _with_subject(source, _edited_words(spec))
    taken_out = spec.erase and any(set(own) & set(source.subject) for _, own in edited)
    target = layout(prompt, subject=spec.subject is not None or (len(source.subject) > 0 and not taken_out))
    if spec.subject is not None:
        require_subject_first(target, spec.subject.category)
    for word in (*spec.weights, *spec.cross_windows()[1]):
        target.columns(*word_and_index(word))
    alignment = aligned(source, target, spec)
    if spec.blend is None:
        return Plan(target, alignment, Words(), Words(), Words())
    rule_of(spec.blend.rule)
    if spec.blend.target_words is not None:
        labels = _labelled(target, spec.blend.target_words)
    else:
        labels = _target_label(source, target, spec, place)
    ours, theirs = _subtracted(source, target, spec.blend.subtract)
    plan = Plan(
        layout=target,
        alignment=alignment,
        source_words=_words(source, edited, ours),
        target_words=_words(target, labels, theirs),
        swapped=Words() if spec.swap is None else _words(source, _with_subject(source, (spec.swap,))),
    )
    if spec.erase and spec.blend.mask is None and not plan.source_words.columns:
        raise EditSpecError("erase needs to know what to take out; name it as remove('cat', prompt) does, or pass a mask")
    if not plan.makes_mask and spec.blend.mask is None and spec.blend != Blend():
        raise EditSpecError(
            f"blend={spec.blend} shapes a mask, but nothing says which words make it; name them in source_words or "
            "target_words, or pass swap= or a mask"
        )
    return plan


def aligned(source: TokenLayout, target: TokenLayout, spec: EditSpec) -> Alignment:
    """The alignment that an edit asks for; `EditSpecError` where the prompts do not allow it."""
    if spec.alignment == "replace":
        return replacement(source, target, padding=spec.padding)
    if spec.alignment == "refine":
        return refinement(source, target, padding=spec.padding)
    return align(source, target, replaced="map", padding=spec.padding)


def changes_nothing(source: TokenLayout, plan: Plan, spec: EditSpec) -> bool:
    """Whether an edit is the identity: the same tokens, aligned with themselves, no weight and no other subject."""
    unweighted = all(factor == 1 for factor in spec.weights.values())
    kept = spec.subject is None and not spec.erase
    return kept and unweighted and plan.layout.ids == source.ids and is_identity(plan.alignment)


def target_prompt(source: TokenLayout, spec: EditSpec) -> tuple[str, tuple[int, int] | None]:
    """The prompt of the edited picture, and the characters where the subject's category stands, if it was derived.

    Derived, it is the source's, with the category in place of the swapped word if there is a subject; an article before the
    word follows: "a cat on grass" becomes "an owl on grass".
    """
    columns = source.columns(*word_and_index(spec.swap)) if spec.swap is not None else ()
    if spec.prompt is not None:
        return spec.prompt, None
    if spec.subject is None:
        return source.prompt, None
    spans = [source.spans[column] for column in columns]
    before, after = source.prompt[: min(a for a, _ in spans)], source.prompt[max(b for _, b in spans) :]
    category = spec.subject.category
    article = re.search(r"\b(an?)(\s+)$", before, re.IGNORECASE)
    if article:
        fitting = "an" if category[0].lower() in "aeiou" else "a"
        fitting = fitting.capitalize() if article[1][0].isupper() else fitting
        before = before[: article.start()] + fitting + article[2]
    return before + category + after, (len(before), len(before) + len(category))


def require_subject_first(layout: TokenLayout, category: str) -> None:
    """Raise `PromptError` where the category stands before the inserted subject, as in a prompt without an article."""
    for word, columns in zip(layout.words(), layout.word_columns()):
        if columns and columns[0] < layout.subject.start and word.lower() == category.split()[0].lower():
            raise PromptError(
                f"the prompt {layout.prompt!r} begins with the subject's category; the subject is inserted after the first "
                f"word, which should be an article: 'a {layout.prompt}'"
            )


def word_and_index(word: Word) -> tuple[str, int | None]:
    """A word as (text, index), the index None where it was not given."""
    return (word, None) if isinstance(word, str) else (word[0], word[1])


def _edited_words(spec: EditSpec) -> tuple[Word, ...]:
    """Words of the source whose region the blend takes: those that it names, or the one that is swapped."""
    if spec.blend is not None and spec.blend.source_words is not None:
        return spec.blend.source_words
    return () if spec.swap is None else (spec.swap,)


def _with_subject(source: TokenLayout, words: tuple[Word, ...]) -> tuple[tuple[str, Columns], ...]:
    """Words of the source with their columns; the one behind the subject that the source was generated with has its too."""
    return tuple(
        (word, (*source.subject, *own) if source.subject and own[0] == source.subject.stop else own)
        for word, own in _labelled(source, words)
    )


def _labelled(layout: TokenLayout, words: tuple[Word, ...]) -> tuple[tuple[str, Columns], ...]:
    return tuple((word_and_index(word)[0], layout.columns(*word_and_index(word))) for word in words)


def _target_label(
    source: TokenLayout, target: TokenLayout, spec: EditSpec, place: tuple[int, int] | None
) -> tuple[tuple[str, Columns], ...]:
    """What the mask is read from in the target: the inserted columns and those of the category, where it was put or where a
    given prompt has it; without a subject, the words that stand in the place of the swapped one."""
    if spec.subject is None:
        return _followers(source, target, spec)
    category = spec.subject.category
    if place is not None:
        named = target.columns_in(*place)
    else:
        # A given prompt need not repeat the category; the inserted columns speak for the subject, and the first after them.
        behind = (own for own in target.all_columns(category) if own[0] >= target.subject.stop)
        named = next(behind, ())
    return ((category, (*target.subject, *named)),)


def _followers(source: TokenLayout, target: TokenLayout, spec: EditSpec) -> tuple[tuple[str, Columns], ...]:
    """Words of the target that the swapped word of the source is aligned with."""
    if spec.swap is None:
        return ()
    followed = align(source, target, replaced="map").matrix[list(source.columns(*word_and_index(spec.swap)))].sum(0) > 0
    found = [(word, own) for word, own in zip(target.words(), target.word_columns()) if any(followed[c] for c in own)]
    return tuple(found)


def _subtracted(source: TokenLayout, target: TokenLayout, words: tuple[Word, ...]) -> tuple[Words | None, Words | None]:
    """The words to subtract in each prompt; a word need not be in both, but in one of them."""
    found: list[list[tuple[str, Columns]]] = [[], []]
    for word in words:
        missing = []
        for own, layout in zip(found, (source, target)):
            try:
                own += _labelled(layout, (word,))
            except WordNotFoundError as error:
                missing.append(error)
        if len(missing) == 2:
            raise missing[0]
    ours, theirs = (_words(layout, tuple(own)) if own else None for own, layout in zip(found, (source, target)))
    return ours, theirs


def _words(layout: TokenLayout, labels: tuple[tuple[str, Columns], ...], subtract: Words | None = None) -> Words:
    columns = tuple(sorted({column for _, own in labels for column in own}))
    return Words(columns, competitors(layout, columns) if columns else (), labels, subtract)
