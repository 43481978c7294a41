"""Pictures and masks as users give them: read right or refused with a named error, and fitted to a model."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from p2p_subject.errors import ImageError, MaskError
from p2p_subject.images import MAX_ASPECT, MIN_SIDE, Frame, fit, load_alpha, load_image, load_mask, to_tensor
from p2p_subject.outputs import feather, restore, to_pil
from p2p_subject.visible import latent_mask

LEFT_SIDE_DOWN = 6  # EXIF: the camera was turned, the picture has to be rotated by 270 degrees
ORIENTATION = 0x0112

sides = st.integers(MIN_SIDE, 300)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def half_mask(height: int = 12, width: int = 16) -> np.ndarray:
    """Left half selected."""
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = True
    return mask


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def png_16_bit(levels: np.ndarray) -> bytes:
    """A (H, W, 3) uint16 picture as a PNG file, which Pillow can read but not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(noise(12, 16, 3))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"same").replace(b"gXYZ", b"rXYZ").replace(b"same", b"gXYZ")
"""sRGB's profile with the places of red and green exchanged."""


class TestLoadImage:
    def test_path_str_bytes_and_image_give_the_same_fresh_picture(self, photo, tmp_path):
        path = saved(photo, tmp_path / "photo.png")
        for source in (photo, path, str(path), path.read_bytes()):
            picture = load_image(source)
            assert picture is not photo
            assert (picture.mode, picture.size) == ("RGB", (16, 12))
            assert picture.tobytes() == photo.tobytes()

    @pytest.mark.parametrize("shape", [(12, 16), (12, 16, 1), (12, 16, 3)])
    def test_arrays_of_any_depth_agree(self, shape):
        levels = noise(*shape)
        expected = np.broadcast_to(levels.reshape(12, 16, -1), (12, 16, 3))
        for array in (
            levels,
            levels.astype(np.uint16) * 257,
            levels / 255,
            (levels / 255).astype(np.float16),
        ):
            np.testing.assert_array_equal(load_image(array), expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    @pytest.mark.parametrize("batched", [False, True])
    def test_tensors_are_channels_first(self, photo, dtype, batched):
        levels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
        tensor = levels if dtype == torch.uint8 else (levels.to(dtype) / 255).requires_grad_()
        assert load_image(tensor[None] if batched else tensor).tobytes() == photo.tobytes()

    def test_bfloat16_tensor(self):
        assert load_image(torch.ones(3, 8, 8, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)

    def test_exif_orientation_is_applied_once(self, photo, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION] = LEFT_SIDE_DOWN
        path = saved(photo, tmp_path / "turned.png", exif=exif)
        turned = load_image(path)
        assert turned.tobytes() == photo.transpose(Image.Transpose.ROTATE_270).tobytes()
        assert load_image(turned).tobytes() == turned.tobytes()

    def test_transparency_is_composited_on_white(self, tmp_path):
        levels = noise(12, 16, 4)
        levels[..., 3] = np.repeat([0, 128, 255, 64], 4)
        expected = np.rint(255 + (levels[..., :3] - 255.0) * levels[..., 3:] / 255)
        for source in (
            levels,
            Image.fromarray(levels),
            saved(Image.fromarray(levels), tmp_path / "alpha.png"),
        ):
            assert np.abs(np.asarray(load_image(source)) - expected).max() <= 1
        clear_and_solid = np.asarray(load_image(levels))[:, [0, 8]]
        np.testing.assert_array_equal(clear_and_solid, expected[:, [0, 8]])

    def test_grey_with_alpha(self):
        levels = np.stack([noise(12, 16), np.tile(np.uint8([0, 255]), (12, 8))], axis=-1)
        picture = np.asarray(load_image(Image.fromarray(levels, "LA")))
        assert (picture[:, ::2] == 255).all()
        np.testing.assert_array_equal(picture[:, 1::2, 0], levels[:, 1::2, 0])

    def test_palette_with_and_without_transparency(self, tmp_path):
        indices = Image.fromarray(np.tile(np.uint8([0, 1]), (8, 4)), "P")
        indices.putpalette([10, 20, 30, 200, 100, 50])
        plain = load_image(saved(indices, tmp_path / "plain.png"))
        assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
        clear = load_image(saved(indices, tmp_path / "clear.png", transparency=0))
        assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]

    def test_one_bit(self, tmp_path):
        path = saved(Image.fromarray(half_mask()), tmp_path / "bits.png")
        np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], half_mask() * 255)

    def test_cmyk_jpeg(self, tmp_path):
        path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "print.jpg", quality=100)
        red, green, blue = load_image(path).getpixel((8, 8))
        assert red > 240 and green < 15 and blue < 15

    @pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path, name):
        levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
        path = tmp_path / name
        if name.endswith("pgm"):
            path.write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
        else:
            Image.fromarray(levels).save(path)
        expected = np.rint(levels / 257)
        np.testing.assert_array_equal(np.asarray(load_image(path))[..., 1], expected)
        np.testing.assert_array_equal(load_mask(path, (16, 16)), levels / np.float32(65535))

    def test_16_bit_grey_with_a_transparent_level(self, tmp_path):
        levels = np.tile(np.uint16([1000, 30000]), (8, 4))
        path = saved(Image.fromarray(levels), tmp_path / "keyed.png", transparency=1000)
        picture = np.asarray(load_image(path))
        assert (picture[:, ::2] == 255).all() and (picture[:, 1::2] == round(30000 / 257)).all()

    def test_turned_16_bit_pgm_keeps_its_depth(self):
        levels = np.linspace(0, 65535, 128, dtype=np.uint16).reshape(8, 16)
        deep = Image.open(io.BytesIO(b"P5 16 8 65535\n" + levels.astype(">u2").tobytes()))
        deep.getexif()[ORIENTATION] = LEFT_SIDE_DOWN
        np.testing.assert_array_equal(np.asarray(load_image(deep))[..., 0], np.rint(np.rot90(levels, -1) / 257))

    def test_16_bit_colour_png(self):
        levels = noise(12, 16, 3)
        np.testing.assert_array_equal(load_image(png_16_bit(levels.astype(np.uint16) * 257)), levels)

    def test_float_image(self):
        assert load_image(Image.new("F", (8, 8), 0.5)).getpixel((0, 0)) == (128, 128, 128)

    def test_camera_jpeg_with_a_second_view_is_its_first(self, tmp_path):
        first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        path = saved(first, tmp_path / "camera.mpo", save_all=True, append_images=[second])
        red, _, blue = load_image(path).getpixel((8, 8))
        assert red > 240 and blue < 15

    def test_metadata_is_dropped(self, photo, tmp_path):
        path = saved(photo, tmp_path / "tagged.png", icc_profile=SRGB, dpi=(300, 300))
        assert load_image(path).info == {}
        # Of sRGB already, the pixels stay what they are.
        assert np.array_equal(load_image(path), photo)

    @pytest.mark.parametrize(("mode", "suffix"), [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "jpg")])
    def test_colour_profiles_are_applied(self, tmp_path, mode, suffix):
        """In a profile whose red is green, red pixels are green ones; its name, which says sRGB, does not count."""
        picture = Image.new("RGBA", (16, 16), (200, 10, 30, 255)).convert(mode)
        read = load_image(saved(picture, tmp_path / f"wide.{suffix}", icc_profile=SWAPPED))
        assert read.mode == "RGB" and read.info == {}
        assert np.abs(np.asarray(read).astype(int) - (10, 200, 30)).max() <= 3

    @pytest.mark.parametrize("options", [{}, {"transparency": (200, 10, 30)}])
    def test_profiles_leave_transparency(self, tmp_path, options):
        picture = Image.new("RGB" if options else "RGBA", (16, 16), (200, 10, 30, 0)[: 3 if options else 4])
        path = saved(picture, tmp_path / "clear.png", icc_profile=SWAPPED, **options)
        assert load_image(path).getpixel((0, 0)) == (255, 255, 255) and load_alpha(path).max() == 0
        half = Image.new("RGBA", (16, 16), (200, 10, 30, 128))
        read = load_image(saved(half, tmp_path / "half.png", icc_profile=SWAPPED)).getpixel((0, 0))
        assert np.abs(np.subtract(read, (132, 227, 142))).max() <= 3

    # With ids of their own: profiles say when they were made, which differs between the processes that collect tests.
    @pytest.mark.parametrize(
        ("profile", "mode"),
        [(b"profile", "L"), (SRGB, "L"), (SRGB, "LA"), (SRGB, "CMYK")],
        ids=["broken", "grey", "grey with alpha", "print"],
    )
    def test_a_profile_that_does_not_fit_is_said_and_left(self, tmp_path, profile, mode):
        if mode == "CMYK":
            path = saved(Image.new("CMYK", (8, 8)), tmp_path / "print.jpg", icc_profile=profile)
            with pytest.warns(UserWarning, match=r"print\.jpg.*its colour profile cannot be applied"):
                assert load_image(path).getpixel((0, 0)) == (255, 255, 255)
            return
        path = saved(Image.new("L", (8, 8), 70).convert(mode), tmp_path / "grey.png", icc_profile=profile)
        with pytest.warns(UserWarning, match=r"grey\.png.*its colour profile cannot be applied"):
            assert load_image(path).getpixel((0, 0)) == (70, 70, 70)

    def test_60_megapixels_are_accepted_and_capped(self):
        picture = load_image(np.broadcast_to(np.uint8(7), (6000, 10000)))
        assert picture.size == (10000, 6000)
        small, frame = fit(picture, multiple=8, max_pixels=512 * 512)
        assert small.width * small.height <= 512 * 512 and frame.original_size == (10000, 6000)


class TestRefusedImages:
    @pytest.mark.parametrize("source", [None, 3, ["a.png"], {"path": "a.png"}, object()])
    def test_not_a_picture(self, source):
        with pytest.raises(ImageError, match=rf"subject is a {type(source).__name__}, expected"):
            load_image(source, what="subject")

    def test_missing_file(self, tmp_path):
        with pytest.raises(ImageError, match="image '.*nowhere.png': there is no such file"):
            load_image(tmp_path / "nowhere.png")

    @pytest.mark.parametrize("name", ["", "/dev/null"])
    def test_directory_and_device(self, tmp_path, name):
        with pytest.raises(ImageError, match="directory or device"):
            load_image(tmp_path / name)

    @pytest.mark.parametrize("content", [b"", b"a text, not a picture", b"\x89PNG\r\n\x1a\n"])
    def test_not_a_picture_file(self, tmp_path, content):
        (tmp_path / "fake.png").write_bytes(content)
        for source in (tmp_path / "fake.png", content):
            with pytest.raises(ImageError, match="cannot be read"):
                load_image(source)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
    def test_truncated_file(self, tmp_path, suffix):
        whole = saved(Image.fromarray(noise(64, 64, 3)), tmp_path / f"whole.{suffix}").read_bytes()
        for length in (20, len(whole) // 2):
            (tmp_path / f"cut.{suffix}").write_bytes(whole[:length])
            with pytest.raises(ImageError, match="cannot be read"):
                load_image(tmp_path / f"cut.{suffix}")

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
    def test_animation_names_its_frames(self, tmp_path, suffix):
        first, *rest = (Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue"))
        path = saved(first, tmp_path / f"moving.{suffix}", save_all=True, append_images=rest)
        for load in (load_image, lambda source: load_mask(source, (16, 16))):
            with pytest.raises((ImageError, MaskError), match="has 3 frames, expected a still"):
                load(path)
        with Image.open(path) as opened, pytest.raises(ImageError, match="3 frames"):
            load_image(opened)

    def test_one_frame_picked_from_an_animation(self, tmp_path):
        first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        with Image.open(saved(first, tmp_path / "a.gif", save_all=True, append_images=[second])) as opened:
            opened.seek(1)
            assert load_image(opened.copy()).getpixel((0, 0)) == (0, 0, 255)

    def test_drawing_is_not_run(self, photo, tmp_path):
        with pytest.raises(ImageError, match="drawing"):
            load_image(saved(photo, tmp_path / "page.eps"))

    def test_closed_image(self, photo, tmp_path):
        with Image.open(saved(photo, tmp_path / "photo.png")) as opened:
            pass
        with pytest.raises(ImageError, match="cannot be read"):
            load_image(opened)

    @pytest.mark.parametrize("size", [(1, 1), (MIN_SIDE - 1, 64), (1, 5000), (5000, 1), (0, 0)])
    def test_tiny_sides(self, size):
        for source in (Image.new("RGB", size), np.zeros((size[1], size[0], 3), np.uint8)):
            with pytest.raises(ImageError, match=f"is {size[0]}x{size[1]} pixels, expected sides of at least"):
                load_image(source)

    def test_aspect_limit(self):
        assert load_image(Image.new("L", (8 * MAX_ASPECT, 8))).width == 8 * MAX_ASPECT
        with pytest.raises(ImageError, match="aspect ratio"):
            load_image(Image.new("L", (8 * MAX_ASPECT + 1, 8)))

    def test_too_many_pixels(self, tmp_path):
        with pytest.raises(ImageError, match="at most 179 million"):
            load_image(np.broadcast_to(np.uint8(0), (15000, 15000)))
        bomb = tmp_path / "bomb.ppm"
        bomb.write_bytes(b"P6 20000 20000 255\n")
        with pytest.raises(ImageError, match="cannot be read .*400000000 pixels"):
            load_image(bomb)

    @pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, math.nan, math.inf])
    def test_floats_out_of_range(self, value):
        array = np.full((8, 8, 3), 0.5)
        array[3, 3, 0] = value
        for source in (
            array,
            torch.from_numpy(array).permute(2, 0, 1),
            Image.fromarray(np.float32(array[..., 0])),
        ):
            with pytest.raises(ImageError, match=r"values from .*, expected \[0, 1\]"):
                load_image(source)

    @pytest.mark.parametrize("dtype", [bool, np.int64, np.int8, np.complex64, object])
    def test_value_types_without_a_known_range(self, dtype):
        with pytest.raises(ImageError, match=f"{np.dtype(dtype)} values"):
            load_image(np.zeros((8, 8, 3), dtype))

    def test_32_bit_integer_picture_has_no_known_range(self):
        with pytest.raises(ImageError, match="int32"):
            load_image(Image.new("I", (8, 8), 200))

    @pytest.mark.parametrize("shape", [(64,), (3, 64, 64), (8, 8, 2), (2, 64, 64, 3), ()])
    def test_array_shapes(self, shape):
        with pytest.raises(ImageError, match="has shape"):
            load_image(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (2, 3, 8, 8), (3,)])
    def test_tensor_shapes(self, shape):
        with pytest.raises(ImageError, match="expected a tensor"):
            load_image(torch.zeros(shape))


class TestLoadMask:
    def test_every_kind_agrees(self, tmp_path):
        mask = half_mask()
        grey = Image.fromarray(mask).convert("L")
        path = saved(grey, tmp_path / "mask.png")
        floats = mask.astype(np.float64)
        arrays = [
            mask,
            mask.astype(np.uint8),
            mask.astype(np.int64),
            np.uint8(mask * 255),
            np.uint16(mask * 65535),
        ]
        shapes = [floats, floats[..., None], torch.from_numpy(mask)[None, None], torch.from_numpy(floats)]
        modes = [grey.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA")]
        files = [path, str(path), path.read_bytes()]
        for source in arrays + shapes + modes + files:
            loaded = load_mask(source, (16, 12))
            assert loaded.dtype == np.float32
            np.testing.assert_array_equal(loaded, mask)

    def test_jpeg_noise_is_no_colour(self, tmp_path):
        path = saved(Image.fromarray(half_mask(64, 64)).convert("RGB"), tmp_path / "mask.jpg", quality=40)
        assert np.abs(load_mask(path, (64, 64)) - half_mask(64, 64)).max() < 0.5

    def test_soft_values_are_kept(self):
        loaded = load_mask(np.full((4, 4), 51, np.uint8) * np.uint8([1, 1, 1, 4]), (4, 4))
        np.testing.assert_array_equal(loaded, np.float32([[0.2, 0.2, 0.2, 0.8]] * 4))

    @given(st.integers(2, 40), st.integers(1, 40), st.booleans())
    @settings(max_examples=50, deadline=None)
    def test_resize(self, width, height, hard):
        mask = half_mask().astype(np.float32) * (1 if hard else 0.75)
        loaded = load_mask(mask, (width, height))
        assert loaded.shape == (height, width) and loaded.dtype == np.float32
        assert loaded.min() >= 0 and loaded.max() <= mask.max()
        if hard:
            assert set(np.unique(loaded)) <= {0, 1}

    def test_input_is_not_changed(self):
        mask = half_mask().astype(np.float32)
        load_mask(mask, (16, 12))[:] = 7
        np.testing.assert_array_equal(mask, half_mask())

    @pytest.mark.parametrize("shape", [(), (5,), (4, 4, 3), (2, 4, 4), (0, 4)])
    def test_rank(self, shape):
        with pytest.raises(MaskError, match=r"expected \(H, W\)"):
            load_mask(np.ones(shape), (4, 4))

    @pytest.mark.parametrize("value", [-0.1, 1.5, 255.0, math.nan])
    def test_range(self, value):
        with pytest.raises(MaskError, match=r"values from .*, expected \[0, 1\]"):
            load_mask(np.full((4, 4), value), (4, 4))

    def test_labels_above_one_and_odd_types(self):
        for array in (
            np.full((4, 4), 2),
            np.full((4, 4), -1),
            np.full((4, 4), "x"),
            np.ones((4, 4), complex),
        ):
            with pytest.raises(MaskError, match="mask has"):
                load_mask(array, (4, 4))

    def test_empty(self):
        with pytest.raises(MaskError, match="selects nothing"):
            load_mask(np.zeros((4, 4)), (4, 4))
        speck = np.zeros((64, 64), bool)
        speck[0, 0] = True
        with pytest.raises(MaskError, match="selects nothing at 4x4"):
            load_mask(speck, (4, 4))

    def test_colours_and_transparency(self):
        for source, fault in (
            (Image.new("RGB", (8, 8), "red"), "colours"),
            (Image.new("RGBA", (8, 8)), "transparency"),
        ):
            with pytest.raises(MaskError, match=fault):
                load_mask(source, (8, 8))

    @pytest.mark.parametrize("source", [None, 1, [[0, 1]]])
    def test_not_a_mask(self, source):
        with pytest.raises(MaskError, match="mask is a"):
            load_mask(source, (8, 8))

    def test_files_raise_mask_errors(self, tmp_path):
        (tmp_path / "fake.png").write_bytes(b"no picture")
        for name in ("fake.png", "nowhere.png", ""):
            with pytest.raises(MaskError):
                load_mask(tmp_path / name, (8, 8))


class TestInsideOfMasks:
    def test_a_mask_without_an_inside_is_refused_before_it_is_used(self):
        with pytest.raises(MaskError, match=r"reaches only 0\.4, .*at least 0\.5"):
            load_mask(np.full((64, 64), 0.4), (64, 64))
        with pytest.raises(MaskError, match="reaches only"):
            load_mask(Image.new("L", (8, 8), 127), (8, 8))

    @pytest.mark.parametrize("value", [0.5, 0.51, 1.0])
    def test_what_is_taken_has_the_same_inside_everywhere(self, value):
        mask = np.full((8, 8), 0.49)
        mask[2:6, 4:] = value
        taken = load_mask(mask, (8, 8))
        assert np.array_equal(feather(taken, 0, 0) == 1, mask == value)
        assert np.array_equal(latent_mask(taken, (4, 4)).numpy() == 1, (mask == value)[::2, ::2])


class TestFit:
    @given(sides, sides, st.sampled_from([1, 8, 16, 64]))
    @settings(max_examples=100, deadline=None)
    def test_native_size_moves_less_than_a_multiple(self, width, height, multiple):
        picture, frame = fit(Image.new("RGB", (width, height)), multiple=multiple)
        assert frame == Frame((width, height), picture.size)
        for side, original in zip(picture.size, (width, height), strict=True):
            assert side % multiple == 0 and side > 0
            assert abs(side - original) < multiple

    @given(sides, sides, st.sampled_from([1, 8, 64]), st.integers(64 * 64, 300 * 300))
    @settings(max_examples=100, deadline=None)
    def test_cap_is_never_passed(self, width, height, multiple, max_pixels):
        for aim in ({}, {"area": 512 * 512}, {"size": (width * 3, height)}):
            picture, _ = fit(Image.new("RGB", (width, height)), multiple=multiple, max_pixels=max_pixels, **aim)
            assert 0 < picture.width * picture.height <= max_pixels
            assert picture.width % multiple == picture.height % multiple == 0

    @given(sides, sides, st.sampled_from([8, 16]), st.integers(64 * 64, 300 * 300), st.booleans())
    @settings(max_examples=100, deadline=None)
    def test_aspect_error_is_below_one_multiple(self, width, height, multiple, area, capped):
        """Rounding both sides down is always allowed; the choice made is no worse than that."""
        scale = math.sqrt(area / (width * height))
        smallest = math.floor(min(width, height) * scale / multiple)
        if smallest == 0:
            return
        image = Image.new("RGB", (width, height))
        picture, _ = fit(image, multiple=multiple, area=area, max_pixels=area if capped else None)
        error = abs(math.log(picture.width / picture.height) - math.log(width / height))
        assert error <= math.log1p(1 / smallest) + 1e-9

    @pytest.mark.parametrize(
        ("original", "options", "expected"),
        [
            ((512, 768), {}, (512, 768)),
            ((500, 300), {}, (504, 304)),
            ((5, 3), {}, (8, 8)),
            ((4000, 3000), {"area": 512 * 512}, (584, 440)),
            ((40, 30), {"area": 512 * 512}, (584, 440)),
            ((1000, 1000), {"area": 64 * 64}, (64, 64)),
            ((1000, 1000), {"area": 512 * 512, "max_pixels": 512 * 512}, (512, 512)),
            ((640, 480), {"size": (512, 256)}, (512, 256)),
            ((640, 480), {"size": (500, 300)}, (504, 304)),
            ((640, 480), {"size": (1024, 1024), "max_pixels": 256 * 256}, (256, 256)),
            ((2000, 100), {"max_pixels": 8 * 64}, (64, 8)),
        ],
    )
    def test_sizes(self, original, options, expected):
        assert fit(Image.new("RGB", original), multiple=8, **options)[0].size == expected

    def test_equal_size_changes_no_pixel(self, photo):
        picture, frame = fit(photo, multiple=4)
        assert picture.tobytes() == photo.tobytes()
        assert restore(picture, frame) is picture

    @given(sides, sides)
    @settings(max_examples=30, deadline=None)
    def test_restore_returns_to_the_original_size(self, width, height):
        picture, frame = fit(Image.new("RGB", (width, height), (9, 99, 199)), multiple=8, area=64 * 64)
        restored = restore(picture, frame)
        assert restored.size == (width, height)
        assert restored.getextrema() == ((9, 9), (99, 99), (199, 199))

    @pytest.mark.parametrize(
        "options",
        [
            {"multiple": 0},
            {"multiple": 8, "area": 0},
            {"multiple": 8, "max_pixels": -1},
            {"multiple": 8, "max_pixels": 63},
            {"multiple": 8, "size": (0, 64)},
            {"multiple": 8, "size": (64, 64), "area": 4096},
        ],
    )
    def test_impossible_requests(self, photo, options):
        with pytest.raises(ImageError):
            fit(photo, **options)


class TestTensors:
    @given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
    @settings(max_examples=50, deadline=None)
    def test_round_trip_is_exact(self, rows, height, width, seed):
        pictures = [Image.fromarray(levels) for levels in noise(rows, height, width, 3, seed=seed)]
        tensor = to_tensor(pictures)
        assert tensor.shape == (rows, 3, height, width) and tensor.dtype == torch.float32
        assert tensor.is_contiguous() and tensor.abs().max() <= 1
        assert [picture.tobytes() for picture in to_pil(tensor)] == [picture.tobytes() for picture in pictures]

    def test_every_level_makes_the_round_trip(self):
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
        tensor = to_tensor([ramp])
        assert (tensor.min(), tensor.max()) == (-1, 1)
        assert to_pil(tensor)[0].tobytes() == ramp.tobytes()
        assert to_pil(tensor.double())[0].tobytes() == ramp.tobytes()

    def test_values_are_clamped_and_rounded(self):
        values = torch.tensor([-3.0, 3.0, 100.6 / 127.5 - 1]).view(1, 3, 1, 1)
        assert to_pil(values.requires_grad_())[0].getpixel((0, 0)) == (0, 255, 101)

    @pytest.mark.parametrize("pictures", [[], [("RGB", (8, 8)), ("RGB", (8, 9))], [("L", (8, 8))]])
    def test_pictures_that_do_not_stack(self, pictures):
        with pytest.raises(ImageError, match="RGB pictures of one size"):
            to_tensor([Image.new(*picture) for picture in pictures])
