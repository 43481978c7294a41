"""Results on their way out: decoded pictures, feathered masks, exact compositing, whole files or none."""

from __future__ import annotations

import json
import math
import os
import stat
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage.morphology import dilation, disk

from p2p_subject.errors import ImageError, MaskError, NonFiniteError, OutputError
from p2p_subject.outputs import (
    IMAGE_FORMATS,
    atomic_path,
    atomic_write,
    check_target,
    dilate,
    feather,
    paste_back,
    save_image,
    to_pil,
)

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
levels = shapes.flatmap(lambda shape: arrays(np.uint8, (2, *shape, 3)))
hard_masks = shapes.flatmap(lambda shape: arrays(bool, shape))


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Pixels to the nearest selected one, by brute force."""
    rows, columns = np.indices(mask.shape)
    gaps = [np.hypot(rows - row, columns - column) for row, column in np.argwhere(mask)]
    return np.min(gaps, axis=0)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


class TestToPil:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_values_are_not_painted(self, value):
        with pytest.raises(NonFiniteError, match="float32"):
            to_pil(torch.full((1, 3, 2, 2), value))

    @pytest.mark.parametrize("shape", [(3, 2, 2), (1, 4, 2, 2), (1, 2, 2, 3)])
    def test_shape(self, shape):
        with pytest.raises(ImageError, match=r"expected a tensor \(B, 3, h, w\)"):
            to_pil(torch.zeros(shape))

    def test_half_precision(self):
        assert to_pil(torch.ones(2, 3, 1, 1, dtype=torch.bfloat16))[1].getpixel((0, 0)) == (255, 255, 255)


class TestFeather:
    @given(hard_masks.filter(np.any), st.integers(0, 6), st.floats(0, 8))
    @example(np.array([[True, False, False]]), 1, 1.0000000000000002)
    @settings(max_examples=100, deadline=None)
    def test_support(self, mask, dilate, width):
        alpha = feather(mask.astype(np.float32), dilate, width)
        distance = distance_to(mask)
        assert alpha.dtype == np.float32 and alpha.shape == mask.shape
        assert (alpha[distance <= dilate] == 1).all()
        assert (alpha[(distance > dilate) & (distance >= dilate + width)] == 0).all()
        assert alpha.min() >= 0 and alpha.max() <= 1

    @given(hard_masks.filter(np.any), st.integers(0, 5))
    @settings(max_examples=30, deadline=None)
    def test_without_feather_it_is_dilation_by_a_disk(self, mask, radius):
        np.testing.assert_array_equal(feather(mask, radius, 0), dilation(mask, disk(radius)))

    def test_falls_linearly(self):
        mask = np.zeros((1, 9))
        mask[0, 0] = 1
        np.testing.assert_allclose(feather(mask, 2, 4)[0], [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0])

    def test_nothing_to_do_returns_the_mask(self):
        mask = np.random.default_rng(0).random((20, 30)) > 0.7
        np.testing.assert_array_equal(feather(mask, 0, 0), mask)

    def test_mask_of_zeros_stays_one(self):
        assert not feather(np.zeros((4, 5)), 2, 3).any()

    def test_faint_noise_outside_is_not_kept(self):
        mask = np.full((1, 9), 0.02)
        mask[0, 0] = 0.98
        np.testing.assert_array_equal(feather(mask, 1, 0)[0], [1, 1, 0, 0, 0, 0, 0, 0, 0])

    def test_refused(self):
        for mask, widening, width in ((1.0, -1, 0), (1.0, 0, -0.5), (0.4, 1, 1)):
            with pytest.raises(MaskError):
                feather(np.full((4, 4), mask), widening, width)


class TestDilate:
    @given(mask=hard_masks, pixels=st.integers(0, 30))
    @settings(deadline=None)
    def test_is_max_pooling(self, mask, pixels):
        pooled = torch.nn.functional.max_pool2d(torch.from_numpy(mask[None]).float(), 2 * pixels + 1, 1, pixels)[0]
        widened = dilate(mask, pixels)
        assert widened.dtype == np.float32 and np.array_equal(widened, pooled.numpy())

    def test_a_photo_takes_no_longer_for_a_large_width(self):
        mask = np.zeros((3000, 4000), np.float32)
        mask[1500, 2000] = 0.5
        assert dilate(mask, 900).sum() == 1801**2

    def test_negative_widths_are_refused(self):
        with pytest.raises(MaskError, match="0 or more"):
            dilate(np.ones((2, 2)), -1)


class TestPasteBack:
    @given(levels, st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_ends_are_bit_exact_and_the_rest_is_between(self, pair, seed):
        original, edited = pair
        alpha = np.random.default_rng(seed).random(original.shape[:2], dtype=np.float32) * 3 - 1
        alpha = alpha.clip(0, 1)
        result = np.asarray(paste_back(Image.fromarray(original), Image.fromarray(edited), alpha))
        np.testing.assert_array_equal(result[alpha == 0], original[alpha == 0])
        np.testing.assert_array_equal(result[alpha == 1], edited[alpha == 1])
        exact = original + alpha[..., None] * (edited.astype(np.float64) - original)
        assert np.abs(result - exact).max() <= 1.01

    def test_feathered_paste_keeps_the_background(self, photo):
        edited = Image.new("RGB", photo.size, "white")
        mask = np.zeros((12, 16), np.float32)
        mask[4:6, 4:6] = 1
        alpha = feather(mask, 1, 2)
        result = np.asarray(paste_back(photo, edited, alpha))
        np.testing.assert_array_equal(result[alpha == 0], np.asarray(photo)[alpha == 0])
        assert (result[mask == 1] == 255).all()

    def test_inputs_that_do_not_fit(self, photo):
        ones = np.ones((12, 16))
        for other in (photo.resize((8, 8)), photo.convert("L")):
            with pytest.raises(ImageError, match="expected pictures alike"):
                paste_back(photo, other, ones)
        for alpha in (ones.T, ones[..., None], ones * 1.1, ones * -1, ones * math.nan):
            with pytest.raises(MaskError, match=r"expected \(12, 16\)"):
                paste_back(photo, photo, alpha)


class TestSaveImage:
    @pytest.mark.parametrize("suffix", [*IMAGE_FORMATS, ".PNG"])
    def test_formats(self, photo, tmp_path, suffix):
        path = tmp_path / f"result{suffix}"
        save_image(photo, path)
        with Image.open(path) as loaded:
            assert loaded.size == photo.size
            if "jp" not in suffix:
                assert loaded.convert("RGB").tobytes() == photo.tobytes()
        assert os.listdir(tmp_path) == [path.name]

    def test_jpeg_is_of_high_quality(self, tmp_path):
        smooth = Image.linear_gradient("L").convert("RGB")
        save_image(smooth, tmp_path / "smooth.jpg")
        with Image.open(tmp_path / "smooth.jpg") as loaded:
            assert np.abs(np.asarray(loaded, int) - np.asarray(smooth)).max() <= 4

    @pytest.mark.parametrize("name", ["result", "result.xyz", "result.gif", "png"])
    def test_unknown_suffix(self, photo, tmp_path, name):
        with pytest.raises(OutputError, match=r"unknown suffix .*; use .png, .jpg"):
            save_image(photo, tmp_path / name)
        assert not os.listdir(tmp_path)

    def test_mode_that_the_format_cannot_hold(self, photo, tmp_path):
        with pytest.raises(OutputError, match="cannot write .*RGBA"):
            save_image(photo.convert("RGBA"), tmp_path / "result.jpg")
        assert not os.listdir(tmp_path)


class TestCheckTarget:
    def test_returns_the_absolute_path_and_creates_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert check_target("new.json") == tmp_path.resolve() / "new.json"
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("", "is a directory"),
            ("missing/a.png", "no folder .*missing'; create it"),
            ("file.txt/a.png", "no folder"),
            ("/dev/null", "not a regular file"),
        ],
    )
    def test_wrong_places(self, tmp_path, name, message):
        (tmp_path / "file.txt").touch()
        with pytest.raises(OutputError, match=message):
            check_target(tmp_path / name)
        with pytest.raises(OutputError, match=message):
            atomic_write(tmp_path / name, "x")

    @pytest.mark.parametrize("forbidden", ["file.txt", ""])
    def test_no_permission(self, tmp_path, monkeypatch, forbidden):
        target = tmp_path / "file.txt"
        target.touch()
        locked = (tmp_path / forbidden).resolve()
        # Simulated, because a superuser may write anything.
        monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(locked))
        with pytest.raises(OutputError, match="no permission"):
            check_target(target)


class TestAtomicPath:
    def test_writes_bytes_and_text(self, tmp_path):
        atomic_write(tmp_path / "a.json", json.dumps({"word": "é"}, ensure_ascii=False))
        atomic_write(tmp_path / "b.bin", b"\x00\r\n")
        assert (tmp_path / "a.json").read_bytes() == '{"word": "é"}'.encode()
        assert (tmp_path / "b.bin").read_bytes() == b"\x00\r\n"

    def test_temporary_file_has_the_suffix_and_the_folder(self, tmp_path):
        with atomic_path(tmp_path / "weights.safetensors") as temporary:
            assert (temporary.parent, temporary.suffix) == (tmp_path.resolve(), ".safetensors")
            assert not (tmp_path / "weights.safetensors").exists()
            temporary.write_text("whole")
        assert (tmp_path / "weights.safetensors").read_text() == "whole"
        assert os.listdir(tmp_path) == ["weights.safetensors"]

    @given(st.binary(max_size=64), st.binary(max_size=64), st.sampled_from([ValueError, KeyboardInterrupt, None]))
    @settings(max_examples=30, deadline=None)
    def test_old_or_new_never_between(self, tmp_path_factory, old, new, failure):
        target = tmp_path_factory.mktemp("atomic") / "a.bin"
        target.write_bytes(old)
        try:
            with atomic_path(target) as temporary:
                temporary.write_bytes(new)
                assert target.read_bytes() == old
                if failure:
                    raise failure
        except (ValueError, KeyboardInterrupt) as error:
            assert type(error) is failure
        assert target.read_bytes() == (old if failure else new)
        assert os.listdir(target.parent) == ["a.bin"]

    def test_system_errors_are_named(self, tmp_path):
        def full_disk():
            with atomic_path(tmp_path / "a.txt"):
                raise OSError(28, "No space left on device")

        def lost_file():
            with atomic_path(tmp_path / "a.txt") as temporary:
                temporary.unlink()

        def long_name():
            atomic_write(tmp_path / ("x" * 300 + ".txt"), "x")

        for fail, message in (
            (full_disk, "No space left"),
            (lost_file, "No such file"),
            (long_name, "too long"),
        ):
            with pytest.raises(OutputError, match=f"cannot write '.*txt': .*{message}"):
                fail()
        assert not os.listdir(tmp_path)

    def test_library_errors_pass(self, tmp_path):
        with pytest.raises(MaskError), atomic_path(tmp_path / "a.txt"):
            raise MaskError("inside")
        assert not os.listdir(tmp_path)

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real.txt").write_text("old")
        (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
        atomic_write(tmp_path / "link.txt", "new")
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "real.txt").read_text() == "new"

    def test_permissions(self, tmp_path):
        (tmp_path / "plain").touch()
        atomic_write(tmp_path / "new", "x")
        (tmp_path / "secret").touch(mode=0o600)
        atomic_write(tmp_path / "secret", "x")
        modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
        assert modes["new"] == modes["plain"]
        assert modes["secret"] == 0o600


def test_a_feather_of_next_to_nothing_is_a_hard_edge() -> None:
    mask = np.zeros((5, 5), np.float32)
    mask[2, 2] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(feather(mask, 0, 1e-310), mask)
