"""Pictures about pictures: contact sheets and heat-map overlays. Pure functions; sizes are (width, height) in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from p2p_subject.errors import ImageError
from p2p_subject.prompts import word_and_index
from p2p_subject.visible import SUBJECT, TARGET, of_target

if TYPE_CHECKING:
    from p2p_subject.editor import EditResult

Panel = tuple[str, Image.Image]
"""A caption and the picture above it."""

MARGIN, GAP = 20, 12
_INK, _PALE, _EDGE = (32, 33, 36), (95, 99, 104), (218, 220, 224)
_CAPTION_LINES = 2

# Lightness rises evenly in the OKLab space while the hue turns from blue over red to yellow, so that equal steps of heat
# look equal, also in grey and to the colour-blind.
_HEAT = np.float32(
    [
        (17, 2, 86), (64, 6, 116), (117, 8, 127), (172, 15, 118), (222, 41, 89),
        (252, 93, 44), (252, 155, 58), (253, 204, 89), (251, 252, 43),
    ]
)  # fmt: skip


def colours(heat: np.ndarray) -> np.ndarray:
    """Colours of a heat map: (H, W) in [0, 1] to (H, W, 3) float32 in [0, 255], from dark blue to yellow."""
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(heat, stops, _HEAT[:, channel]) for channel in range(3)], -1).astype(np.float32)


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lay a heat map (H, W) in [0, 1] over a picture of the same size; the picture shows through, in grey.

    Raises `ImageError` for a map of another shape or with values outside [0, 1].
    """
    heat = np.asarray(heat, np.float32)
    if heat.shape != (image.height, image.width) or not (heat.min() >= 0 and heat.max() <= 1):
        raise ImageError(f"heat map of shape {heat.shape}; expected ({image.height}, {image.width}) with values in [0, 1]")
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    mixed = grey + (0.45 + 0.3 * heat[..., None]) * (colours(heat) - grey)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def edit_sheet(result: EditResult, prompt: str) -> Image.Image:
    """One row that explains an edit of a source with `prompt`: source, subject, attention to each word, mask and result."""
    subject = result.spec.subject
    category = None if subject is None else subject.category
    blend = result.spec.blend
    named = [result.spec.swap] if blend is None or blend.source_words is None else blend.source_words
    sources = [word_and_index(word)[0] for word in named if word is not None]
    row: list[Panel] = [(f"source: “{prompt}”", result.source_image)]
    # A subject that was learned has no pictures any more.
    row += [(f"subject: this {category}", picture) for picture in getattr(subject, "pictures", ())]
    for key, heat in result.maps.items():
        # The maps of the target's words tell where the new subject is.
        in_result = of_target(key, sources)
        picture, where = (result.image, "result") if in_result else (result.source_image, "source")
        word = key.removesuffix(SUBJECT).removesuffix(TARGET)
        row.append((f"attention to “{word}” in the {where}", overlay(picture, np.asarray(heat, np.float32) / 255)))
    if result.mask is not None:
        row.append((f"mask: {mask_area(result.mask):.0%} may change", result.mask))
    row.append((f"edited: “{result.prompt}”", result.image))
    return contact_sheet([row], panel=panel_for(result.source_image))


def panel_for(image: Image.Image) -> int:
    """A panel size at which a picture is seen well: a tiny one enlarged, a photo made smaller."""
    return min(max(192, *image.size), 384)


def mask_area(mask: Image.Image) -> float:
    """The share of a mask (mode "L") that is selected, 0 to 1."""
    return float(np.asarray(mask, np.float64).mean() / 255)


def contact_sheet(
    rows: Sequence[Sequence[Panel]],
    *,
    panel: int = 192,
    title: str | None = None,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Rows of captioned pictures on white, each scaled to `panel` pixels on its longer side.

    `columns` are headings above the first row. Rows may differ in length. Captions are wrapped to two lines, then cut with an
    ellipsis. Masks (modes "1" and "L") are enlarged without smoothing. Raises `ImageError` if there is nothing to show.
    """
    if not any(rows) or panel < 16:
        raise ImageError(f"{sum(map(len, rows))} pictures in panels of {panel} pixels; expected 1 or more, in 16 or more")
    small, bold = _font(max(10, panel // 14)), _font(max(11, panel // 13), bold=True)
    large = _font(max(14, panel // 9), bold=True)
    count = max(len(columns or ()), *map(len, rows))
    width = 2 * MARGIN + count * panel + (count - 1) * GAP
    headings = [_wrapped(text, bold, panel, 2) for text in columns or ()]
    heading = _wrapped(title, large, width - 2 * MARGIN, 2) if title else []
    scaled = [[(_wrapped(text, small, panel, _CAPTION_LINES), _scaled(image, panel)) for text, image in row] for row in rows]

    top = MARGIN
    titles_top = top + (len(heading) * _line(large) + GAP if heading else 0)
    rows_top = titles_top + (max(map(len, headings)) * _line(bold) + GAP // 2 if headings else 0)
    heights = [max((image.height for _, image in row), default=0) for row in scaled]
    captions = [max((len(lines) for lines, _ in row), default=0) * _line(small) for row in scaled]
    below = [GAP // 3 + lines if lines else 0 for lines in captions]
    height = rows_top + sum(heights) + sum(below) + GAP * (len(rows) - 1) + MARGIN

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, (MARGIN, top), large, _INK)
    for at, lines in enumerate(headings):
        # Headings stand on a common base line, next to their pictures.
        lowered = rows_top - GAP // 2 - len(lines) * _line(bold)
        _write(draw, lines, (MARGIN + at * (panel + GAP), lowered), bold, _INK)
    y = rows_top
    for row, tall, under in zip(scaled, heights, below):
        for at, (lines, image) in enumerate(row):
            x = MARGIN + at * (panel + GAP)
            corner = (x + (panel - image.width) // 2, y + (tall - image.height) // 2)
            sheet.paste(image, corner)
            # Around the picture, not on it: a white background would otherwise run into the sheet.
            draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + image.width, corner[1] + image.height), outline=_EDGE)
            _write(draw, lines, (x, y + tall + GAP // 3), small, _PALE)
        y += tall + under + GAP
    return sheet


def _scaled(image: Image.Image, panel: int) -> Image.Image:
    """The picture in RGB with its longer side at `panel` pixels."""
    factor = panel / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    hard = image.mode in ("1", "L") and factor > 1
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if hard else Image.Resampling.LANCZOS)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _line(font: ImageFont.FreeTypeFont) -> int:
    """Height of a line of text."""
    ascent, descent = font.getmetrics()
    return ascent + descent + 2


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], corner: tuple[int, int], font: ImageFont.FreeTypeFont, ink: tuple
) -> None:
    for at, line in enumerate(lines):
        draw.text((corner[0], corner[1] + at * _line(font)), line, fill=ink, font=font)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break text between words into at most `most` lines no wider than `width`; what is left over becomes an ellipsis."""
    # Half a surrogate pair, as an argument of undecodable bytes holds, cannot be drawn.
    words = text.encode("utf-8", "replace").decode().split()
    lines: list[str] = []
    while words and len(lines) < most:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        if len(lines) == most - 1:
            taken = len(words)
        line, words = " ".join(words[:taken]), words[taken:]
        lines.append(_cut(line, font, width))
    return lines


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The line, or as many of its first characters as fit with an ellipsis."""
    if font.getlength(line) <= width:
        return line
    low, high = 0, len(line)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(line[:middle].rstrip() + "…") <= width else (low, middle - 1)
    return line[:low].rstrip() + "…"
