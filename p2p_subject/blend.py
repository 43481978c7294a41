"""From words' attention maps to masks, and from masks to blended latents. Pure functions; never NaN.

A rule is `rule(maps (T, h, w), columns, others) -> score (h, w) in [0, 1]`, whose maximum is 1 unless the word receives no
attention at all. `columns` are those of the edited words, `others` those of the remaining content words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2p_subject.errors import EditSpecError, did_you_mean
from p2p_subject.tokens import TokenLayout

Rule = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]

FUNCTION_WORDS = frozenset(
    """a an the on in at of to by for from with and or is are was its it this that into over under near next""".split()  # noqa: SIM905
)
"""Words that name no region; they are no competitors in "share"."""


def _over_maximum(score: Tensor) -> Tensor:
    return score / score.amax().clamp_min(torch.finfo(score.dtype).tiny)


def peak(maps: Tensor, columns: Sequence[int], others: Sequence[int]) -> Tensor:
    """The published rule: the words' map, max-pooled 3x3, over its maximum (Hertz et al. 2022, section 3.3, "LocalBlend").

    Maps are peaky: at the published threshold of 0.3 the mask is often a patch inside the object.
    """
    summed = maps[list(columns)].sum(0)
    return _over_maximum(F.max_pool2d(summed[None, None], 3, 1, 1)[0, 0])


def heat(maps: Tensor, columns: Sequence[int], others: Sequence[int]) -> Tensor:
    """The words' map over its maximum, as it is: what a heat map shows."""
    return _over_maximum(maps[list(columns)].sum(0))


def share(maps: Tensor, columns: Sequence[int], others: Sequence[int]) -> Tensor:
    """The words' share among the content words at each pixel, over its maximum.

    Where attention is weak for all words, as inside a large object, the competition between words still says whose the
    pixel is, so the region is covered and not only its peak. The edited columns enter by their mean, so that a subject of many
    queries does not win everywhere by their number.
    """
    mine = maps[list(columns)].sum(0) / max(1, len(columns))
    total = mine + maps[list(others)].sum(0)
    return _over_maximum(mine / total.clamp_min(torch.finfo(maps.dtype).tiny))


@dataclass(frozen=True)
class MaskRule:
    """How a mask is read from maps: the `score`, the `threshold` that is its own, how scores are enlarged (`mode` of
    `torch.nn.functional.interpolate`), and the score of words whose region is taken out (None: the same)."""

    score: Rule
    threshold: float
    mode: str = "bilinear"
    subtracted: Rule | None = None


RULES = {
    "peak": MaskRule(peak, 0.3, "nearest", heat),
    "share": MaskRule(share, 0.6),
    "heat": MaskRule(heat, 0.3),
}
"""Rules by name.

The threshold of "share" was chosen on validation scenes of the miniature world, with a model trained without attention
supervision, for the source's region and for the union with the new subject's together.
"""


def rule_of(name: str) -> MaskRule:
    """Look up a rule; `EditSpecError` lists the names for an unknown one."""
    if name not in RULES:
        raise EditSpecError(f"mask rule {name!r};{did_you_mean(name, RULES)} expected one of {sorted(RULES)}")
    return RULES[name]


def rule_and_threshold(name: str, threshold: float | None) -> tuple[MaskRule, float]:
    """A rule by name with the threshold that holds: the rule's own for None."""
    rule = rule_of(name)
    return rule, rule.threshold if threshold is None else threshold


def competitors(layout: TokenLayout, columns: Iterable[int]) -> tuple[int, ...]:
    """Columns of the content words other than `columns`; the end token and padding where the prompt has no others."""
    taken = {*columns, *layout.subject}
    others = [
        column
        for word, own in zip(layout.words(), layout.word_columns())
        if word.lower() not in FUNCTION_WORDS and not taken.intersection(own)
        for column in own
    ]
    return tuple(others or range(layout.end, layout.length))


def region(maps: Tensor, columns: Sequence[int], others: Sequence[int], rule: MaskRule, size: tuple[int, int]) -> Tensor:
    """Score of the edited words at every pixel of `size` (H, W), from maps (T, h, w); float32 in [0, 1]."""
    return _enlarged(rule.score(maps.float(), columns, others), rule.mode, size)


def subtracted_region(
    maps: Tensor, columns: Sequence[int], others: Sequence[int], rule: MaskRule, size: tuple[int, int]
) -> Tensor:
    """The same for words whose region is taken out of the mask."""
    return _enlarged((rule.subtracted or rule.score)(maps.float(), columns, others), rule.mode, size)


def _enlarged(score: Tensor, mode: str, size: tuple[int, int]) -> Tensor:
    if tuple(size) == tuple(score.shape):
        return score
    options = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(score[None, None], size, mode=mode, **options)[0, 0]


def binary_mask(scores: Iterable[Tensor], threshold: float, grow: int = 0, subtract: Iterable[Tensor] = ()) -> Tensor:
    """Union of the regions whose scores (H, W) exceed `threshold` without those of `subtract`, dilated by `grow` pixels;
    float32 of 0 and 1."""
    mask = torch.stack([score > threshold for score in scores]).any(0)
    for score in subtract:
        mask = mask & ~(score > threshold)
    mask = mask.float()
    return F.max_pool2d(mask[None], 2 * grow + 1, 1, grow)[0] if grow else mask


def squares_around(mask: Tensor) -> Tensor:
    """The squares around the connected parts of a mask (H, W), each centred on its part and about as large as that extends.

    float32 of 0 and 1, on the CPU. A side that cannot be centred is one longer; a square ends where the picture does.
    """
    from scipy.ndimage import find_objects, label

    inside = mask.cpu() > 0.5
    found = torch.zeros(inside.shape)
    # Diagonal neighbours are connected: the outline of one object may be thin.
    parts, _ = label(inside.numpy(), [[1, 1, 1]] * 3)
    for spans in find_objects(parts):
        side = max(span.stop - span.start for span in spans)
        found[tuple(_of_length(span, side) for span in spans)] = 1
    return found


def attended_pixels(mask: Tensor) -> dict[int, Tensor]:
    """Which pixels lie outside a mask (h, w) at every resolution of a U-Net, by their number Q: (Q,) bool.

    Sides are halved, rounded up. A pixel is hidden if any of what it covers is in the mask; where nothing would be left of a
    resolution, if all of it is; and where that leaves nothing either, none is.
    """
    found, touched, filled = {}, (mask > 0.5).float()[None], (mask > 0.5).float()[None]
    while True:
        choices = (~hidden.flatten().bool() for hidden in (touched, filled))
        seen = next((own for own in choices if own.any()), torch.ones_like(touched.flatten(), dtype=torch.bool))
        found[seen.numel()] = seen
        if seen.numel() == 1:
            return found
        touched = F.max_pool2d(touched, 2, 2, ceil_mode=True)
        filled = -F.max_pool2d(-filled, 2, 2, ceil_mode=True)


def _of_length(span: slice, length: int) -> slice:
    """The span, widened as much before as behind to `length` or one more; it begins with the picture at the earliest."""
    wider = (length - (span.stop - span.start) + 1) // 2
    return slice(max(0, span.start - wider), span.stop + wider)


def blend(edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Edited latents where `mask` (h, w) is 1, the source's elsewhere; selected, not multiplied, so 0 x inf cannot occur."""
    return torch.where(mask > 0.5, edited, source)
