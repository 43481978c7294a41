"""Contact sheets keep to their layout whatever they are given; heat shows where the heat is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from p2p_subject import viz
from p2p_subject.alignment import Alignment
from p2p_subject.context import Context
from p2p_subject.edits import Blend, EditSpec, Subject, swap_subject
from p2p_subject.errors import ImageError
from p2p_subject.images import Frame
from p2p_subject.prompts import Plan, Words
from p2p_subject.results import EditResult
from p2p_subject.sampling import Target
from p2p_subject.tokens import TokenLayout
from p2p_subject.visible import heat_maps, pixel_mask
from p2p_subject.viz import GAP, MARGIN, colours, contact_sheet, edit_sheet, mask_area, overlay, panel_for

sides = st.integers(1, 90)
pictures = st.builds(
    lambda mode, width, height: Image.new(mode, (width, height), 0), st.sampled_from(["RGB", "L", "1"]), sides, sides
)
panels = st.tuples(st.text(max_size=60), pictures)
sheets = st.lists(st.lists(panels, max_size=4), min_size=1, max_size=3).filter(any)


def dark_box(sheet: Image.Image) -> tuple[int, int, int, int]:
    """The box of the black pictures on a sheet without texts."""
    return Image.fromarray((np.asarray(sheet).max(-1) < 40).astype(np.uint8) * 255).getbbox()


class TestContactSheet:
    @given(sheets, st.integers(16, 80), st.none() | st.text(max_size=80), st.lists(st.text(max_size=30), max_size=5))
    @settings(max_examples=40, deadline=None)
    def test_width_follows_from_the_panels_and_the_border_stays_white(self, rows, panel, title, columns):
        sheet = contact_sheet(rows, panel=panel, title=title, columns=columns)
        count = max(len(columns or ()), *map(len, rows))
        assert sheet.mode == "RGB"
        assert sheet.width == 2 * MARGIN + count * panel + (count - 1) * GAP
        assert sheet.height >= 2 * MARGIN + sum(1 for row in rows if row)
        pixels = np.asarray(sheet)
        # One pixel of the margin belongs to the frames of the pictures.
        for border in (pixels[: MARGIN // 2], pixels[-MARGIN // 2 :], pixels[:, : MARGIN // 2]):
            assert (border == 255).all()

    @given(st.integers(8, 200), st.integers(8, 200), st.integers(32, 160))
    @settings(max_examples=40, deadline=None)
    def test_a_picture_keeps_its_shape_and_fills_its_panel(self, width, height, panel):
        sheet = contact_sheet([[("", Image.new("RGB", (width, height)))]], panel=panel)
        left, top, right, bottom = dark_box(sheet)
        assert max(right - left, bottom - top) == panel
        assert abs((right - left) * height - (bottom - top) * width) <= max(width, height)
        assert top == MARGIN and sheet.height == bottom + MARGIN
        assert abs((left + right) - sheet.width) <= 1

    @given(st.text(min_size=61, max_size=400), st.integers(32, 200))
    @settings(max_examples=25, deadline=None)
    def test_a_caption_never_takes_more_than_two_lines(self, text, panel):
        picture = Image.new("RGB", (8, 8))
        most = contact_sheet([[("word " * 200, picture)]], panel=panel).height
        assert contact_sheet([[(text, picture)]], panel=panel).height <= most

    def test_captions_stay_within_their_panels(self):
        white = Image.new("RGB", (8, 8), "white")
        sheet = np.asarray(contact_sheet([[("W" * 300 + " words" * 90, white), ("", white)]], panel=100))
        assert (sheet[MARGIN + 102 :, MARGIN + 100 + GAP :] == 255).all()
        assert (sheet[MARGIN + 102 :, MARGIN : MARGIN + 100] < 255).any()

    def test_texts_take_room_and_ink(self):
        row = [("", Image.new("RGB", (8, 8), "white"))]
        plain, full = contact_sheet([row]), contact_sheet([row], title="Title", columns=["heading"])
        assert full.height > plain.height and np.asarray(full).min() < 60 < np.asarray(plain).min()

    def test_masks_stay_hard_when_enlarged(self):
        mask = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
        sheet = contact_sheet([[("", mask)]], panel=64).crop((MARGIN, MARGIN, MARGIN + 64, MARGIN + 64))
        assert set(np.unique(sheet)) == {0, 255}

    def test_text_that_cannot_be_encoded_is_drawn_all_the_same(self):
        contact_sheet([[("a \udcff b\n\tc", Image.new("RGB", (8, 8)))]], title="\ud800")

    @pytest.mark.parametrize(("rows", "panel"), [([], 64), ([[]], 64), ([[("", Image.new("RGB", (8, 8)))]], 15)])
    def test_nothing_to_show_is_refused(self, rows, panel):
        with pytest.raises(ImageError, match="expected 1 or more"):
            contact_sheet(rows, panel=panel)


class TestOverlay:
    def test_lightness_rises_evenly_with_heat(self):
        levels = colours(np.linspace(0, 1, 65)[None])[0] / 255
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        lightness = np.cbrt(linear @ (0.2126, 0.7152, 0.0722))
        steps = np.diff(lightness)
        assert (steps > 0).all() and steps.max() < 4 * steps.min()

    def test_the_picture_shows_through(self):
        image = Image.fromarray(np.uint8([[[0] * 3, [255] * 3]] * 2).repeat(2, 1))
        even = np.asarray(overlay(image, np.full((2, 4), 0.5)), int)
        assert (even[:, 2:] - even[:, :2] > 60).all()

    def test_heat_shows_on_any_picture(self):
        heat = np.zeros((4, 4))
        heat[1, 2] = 1
        for shade in (0, 128, 255):
            shown = np.asarray(overlay(Image.new("RGB", (4, 4), (shade,) * 3), heat), int)
            assert np.abs(shown[1, 2] - shown[0, 0]).max() > 80

    @pytest.mark.parametrize("heat", [np.zeros((4, 5)), np.full((5, 4), 1.01), np.full((5, 4), np.nan), np.full((5, 4), -0.1)])
    def test_heat_that_does_not_fit_is_refused(self, heat):
        with pytest.raises(ImageError, match=r"expected \(5, 4\)"):
            overlay(Image.new("RGB", (4, 5)), heat)


def test_sizes_and_shares():
    assert [panel_for(Image.new("L", size)) for size in ((64, 64), (300, 20), (4000, 3000))] == [192, 300, 384]
    assert mask_area(Image.fromarray(np.uint8([[255, 0], [0, 0]]))) == 0.25


def plan_of(source: tuple, target: tuple, subject: range = range(0)) -> Plan:
    layout = TokenLayout("", (0,) * 8, (None,) * 8, subject)
    alignment = Alignment(torch.eye(8), torch.ones(8))
    return Plan(layout, alignment, Words(labels=source), Words(labels=target), Words())


class TestHeatMaps:
    @pytest.fixture
    def maps(self) -> torch.Tensor:
        """Column c of the source's prompt lies in row c, of the target's in column c."""
        maps = torch.zeros(2, 8, 8, 8)
        for at in range(8):
            maps[0, at, at] = maps[1, at, :, at] = 1
        return maps

    @pytest.mark.parametrize(
        ("plan", "expected"),
        [
            (plan_of((("cat", (1,)),), (("dog", (2,)),)), {"cat": (0, 1), "dog": (1, 2)}),
            (plan_of((("dog", (1,)),), (("dog", (2, 3)),), range(2, 3)), {"dog": (0, 1), "dog (subject)": (1, 2)}),
            (plan_of((("dog", (1,)),), (("dog", (2,)),)), {"dog": (0, 1), "dog (target)": (1, 2)}),
            (plan_of((("cat", (5,)), ("cat", (1,))), ()), {"cat#1": (0, 5), "cat#0": (0, 1)}),
            (plan_of((("cat", (1,)), ("cat", (1,))), ()), {"cat": (0, 1)}),
            (
                plan_of((("cat", (5,)), ("cat", (1,))), (("cat", (6,)),)),
                {"cat#1": (0, 5), "cat#0": (0, 1), "cat (target)": (1, 6)},
            ),
        ],
    )
    def test_no_word_hides_another(self, maps, plan, expected):
        found = heat_maps(*maps, plan, (8, 8))
        assert list(found) == list(expected)
        for key, (prompt, column) in expected.items():
            heat = np.asarray(found[key])
            heat = heat if prompt == 0 else heat.T
            assert heat[column].min() == 255, key

    def test_the_sheet_lays_each_over_the_picture_it_is_of(self, maps, monkeypatch):
        source, edited = (Image.new("RGB", (8, 8), shade) for shade in ("black", "white"))
        seen = []
        monkeypatch.setattr(viz, "overlay", lambda picture, heat: seen.append(picture) or picture)
        captions = []
        monkeypatch.setattr(viz, "contact_sheet", lambda rows, **_: captions.extend(text for text, _ in rows[0]))
        swap = swap_subject("dog", Subject(source, "dog"))
        for plan, spec in (
            (plan_of((("dog", (1,)),), (("dog", (2,)),), range(2, 3)), swap),
            (plan_of((("cat", (5,)), ("cat", (1,))), (("dog", (2,)),)),
             replace(swap, blend=Blend(source_words=(("cat", 0), ("cat", 1))))),
            (plan_of((("cat", (1,)),), (("bus", (2,)),)), EditSpec(prompt="a bus", swap="cat")),
        ):  # fmt: skip
            seen.clear()
            found = heat_maps(*maps, plan, (8, 8))
            edit_sheet(EditResult(edited, None, found, source, torch.zeros(1), "", 0, spec), "")
            assert seen == [source] * (len(found) - 1) + [edited]
        assert "attention to “dog” in the source" in captions and "attention to “dog” in the result" in captions


def test_a_mask_of_a_photo_grows_without_a_wait():
    maps = torch.zeros(2, 2, 16, 16)
    maps[0, 1, 8, 8] = maps[:, 0, 0, 0] = 1
    target = Target(Context(torch.zeros(1, 2, 1)), Blend(rule="peak"), Words((1,), (0,)), Words(), grow=6)
    mask = pixel_mask(target, *maps, Frame((2400, 1600), (128, 64)), 150.0)
    assert mask.shape == (1600, 2400) and set(np.unique(mask)) == {0, 1} and mask[:, 900:].any()
    assert not pixel_mask(replace(target, blend=Blend(rule="peak")), *maps, Frame((24, 16), (24, 16)), 1.0).all()
