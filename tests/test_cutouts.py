"""Subjects are cut out of pictures: by mask, by transparency, by CLIPSeg; what was cut out is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_tiny import prompt_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from p2p_subject.errors import ArgumentError, DatasetError, MissingPackageError, ModelError, SubjectError
from p2p_subject.outputs import atomic_path, dilate
from p2p_subject.training import cutout_cache
from p2p_subject.training.clipseg import ClipSeg
from p2p_subject.training.cutout_cache import INDEX, Segmenter, make_cutouts, read_cutouts
from p2p_subject.training.cutout_stage import sheet
from p2p_subject.training.cutouts import CutoutSettings, band, cut_out, matted, require_pymatting, trimap, unmixed
from p2p_subject.training.listing import read_folder
from tests.picture_folders import SIDE, entry_of, grey, make_folder, scene, transparent


@pytest.fixture(scope="module")
def clipseg_folder(tmp_path_factory) -> Path:
    """CLIPSeg of sixteen thousand random weights, large enough for its confidence to vary over a picture."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    folder = tmp_path_factory.mktemp("clipseg")
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = CLIPSegConfig(
        text_config=dict(**sizes, **special, num_hidden_layers=1, vocab_size=60, max_position_embeddings=16),
        vision_config=dict(**sizes, num_hidden_layers=3, image_size=32, patch_size=8),
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPSegForImageSegmentation(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    prompt_tokenizer(folder, positions=16)
    processor = dict(do_normalize=True, do_resize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    processor |= dict(resample=2, size=32, feature_extractor_type="ViTFeatureExtractor")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# Cut-outs


@pytest.mark.parametrize("index", range(3))
def test_matting_finds_the_alpha_that_the_scene_was_drawn_with(index) -> None:
    pytest.importorskip("pymatting")
    drawn = scene(index, 160)
    image = drawn.image / 255
    unknown = band(drawn.alpha, 4)
    assert set(np.unique(unknown)) == {0, 0.5, 1}
    assert (drawn.alpha[unknown == 1] > 0.9).mean() > 0.99 and (drawn.alpha[unknown == 0] < 0.1).mean() > 0.99
    alpha = matted(image, unknown)
    assert np.abs(alpha - drawn.alpha).mean() < 0.01
    middle = np.abs(unknown - drawn.alpha)[unknown == 0.5].mean()
    assert np.abs(alpha - drawn.alpha)[unknown == 0.5].mean() < 0.2 * middle


@pytest.mark.parametrize("index", range(3))
def test_no_colour_of_the_background_is_left_at_the_edge(index) -> None:
    pytest.importorskip("pymatting")
    drawn = scene(index, 160)
    true = np.asarray(transparent(index, 160), np.float32)[..., :3] / 255
    edge = (drawn.alpha > 0.1) & (drawn.alpha < 0.8)
    colours = unmixed(drawn.image / 255, drawn.alpha)
    assert colours.shape == true.shape and colours.min() >= 0 and colours.max() <= 1
    assert np.abs(colours - true)[edge].mean() < 0.6 * np.abs(drawn.image / 255 - true)[edge].mean()


def test_a_confidence_becomes_a_trimap_and_the_trimap_a_cut_out(tmp_path) -> None:
    pytest.importorskip("pymatting")
    from scipy.ndimage import gaussian_filter

    drawn = scene(1, 160)
    drawn.picture.save(tmp_path / "a.png")
    asked = []

    def blurred(picture: Image.Image, category: str) -> np.ndarray:
        asked.append(category)
        return np.clip(gaussian_filter(drawn.alpha, 3), 0, 1)

    cut = cut_out(entry_of(tmp_path, "a.png"), CutoutSettings(0.9, 0.05), blurred)
    assert cut.source == "clipseg" and asked == ["dog"]
    assert np.array_equal(cut.trimap, trimap(cut.confidence, 0.9, 0.05))
    assert np.abs(cut.alpha - drawn.alpha).mean() < 0.01 < np.abs(cut.confidence - drawn.alpha).mean()
    rgba = np.asarray(cut.rgba)
    assert rgba.shape == (160, 160, 4) and not rgba[rgba[..., 3] == 0].any()


@given(foreground=st.floats(0.2, 1), background=st.floats(0, 0.19), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_trimaps_follow_their_thresholds(foreground, background, seed) -> None:
    confidence = np.random.default_rng(seed).random((6, 7), dtype=np.float32)
    found = trimap(confidence, foreground, background)
    assert np.array_equal(found == 1, confidence >= foreground) and np.array_equal(found == 0, confidence < background)


def test_a_picture_without_subject_or_with_nothing_else_is_none(tmp_path) -> None:
    pytest.importorskip("pymatting")
    scene(0).picture.save(tmp_path / "a.png")
    entry = entry_of(tmp_path, "a.png")
    for confidence, message in ((0.3, "no dog was found.*highest is 0.30"), (0.9, "certain to be background")):
        with pytest.raises(DatasetError, match=message):
            cut_out(entry, CutoutSettings(), lambda picture, _, level=confidence: np.full((SIDE, SIDE), level, np.float32))
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "m.png")
    with pytest.raises(DatasetError, match="covers 100"):
        cut_out(entry_of(tmp_path, "a.png", mask="m.png"), CutoutSettings())
    with pytest.raises(DatasetError, match="no CLIPSeg"):
        cut_out(entry, CutoutSettings())


def test_a_mask_may_be_refined_and_large_pictures_are_made_smaller(tmp_path) -> None:
    pytest.importorskip("pymatting")
    drawn = scene(2, 160)
    drawn.picture.save(tmp_path / "a.png")
    hard = (drawn.alpha > 0.5).astype(np.float32)
    grey(dilate(hard, 2)).save(tmp_path / "m.png")  # a mask that is two pixels too wide
    entry = entry_of(tmp_path, "a.png", mask="m.png")
    plain, refined = (cut_out(entry, CutoutSettings(refine=pixels)) for pixels in (0, 5))
    assert np.array_equal(plain.alpha, dilate(hard, 2))
    assert np.abs(refined.alpha - drawn.alpha).mean() < 0.5 * np.abs(plain.alpha - drawn.alpha).mean()
    small = cut_out(entry, CutoutSettings(side=64))
    assert small.picture.size == small.rgba.size == (64, 64) and small.alpha.shape == (64, 64)


def test_matting_leaves_the_number_of_torchs_threads_alone(tmp_path, monkeypatch) -> None:
    # As the real one does by starting numba's threads, which takes long.
    (tmp_path / "pymatting.py").write_text("import torch; torch.set_num_threads(torch.get_num_threads() + 1)")
    monkeypatch.syspath_prepend(tmp_path)
    # Set first, so that what was there, or that nothing was, comes back afterwards.
    monkeypatch.setitem(sys.modules, "pymatting", None)
    del sys.modules["pymatting"]
    before = torch.get_num_threads()
    assert require_pymatting().__file__.startswith(str(tmp_path)) and torch.get_num_threads() == before


def test_transparency_is_taken_as_it_is_and_without_pymatting(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pymatting", None)
    alone = transparent(3)
    alone.save(tmp_path / "a.png")
    cut = cut_out(entry_of(tmp_path, "a.png"), CutoutSettings())
    assert cut.source == "alpha" and np.array_equal(np.asarray(cut.rgba)[..., 3], np.asarray(alone)[..., 3])
    assert make_cutouts([entry_of(tmp_path, "a.png")], tmp_path.parent / "cache").made == {"alpha": 1}
    Image.new("L", (SIDE, SIDE), 0).save(tmp_path / "m.png")
    with pytest.raises(MissingPackageError, match="pip install"):
        make_cutouts([entry_of(tmp_path, "a.png", mask="m.png")], tmp_path.parent / "cache")


@pytest.mark.parametrize(
    "wrong",
    [dict(foreground=0.1), dict(background=-1), dict(foreground=2.0), dict(side=4), dict(refine=0.5), dict(largest=0.0)],
)
def test_settings_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(ArgumentError):
        CutoutSettings(**wrong)


# CLIPSeg


def test_confidence_is_what_transformers_own_processor_gives(clipseg_folder) -> None:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    picture = scene(0).picture.resize((80, 60))
    clipseg = ClipSeg.load(clipseg_folder)
    confidence = clipseg(picture, "dog")
    assert confidence.shape == (60, 80) and confidence.dtype == np.float32 and confidence.std() > 0.05
    try:
        given = CLIPSegProcessor.from_pretrained(clipseg_folder)(text=["dog"], images=[picture], return_tensors="pt")
    except ImportError as error:
        pytest.skip(f"its processor needs more than is installed: {error}")
    with torch.no_grad():
        logits = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).eval()(**given).logits
    expected = torch.nn.functional.interpolate(logits.sigmoid().reshape(1, 1, 32, 32), (60, 80), mode="bilinear")[0, 0]
    assert np.abs(confidence - expected.numpy()).max() < 1e-4
    assert not np.array_equal(confidence, clipseg(picture, "cat"))


def test_what_is_no_clipseg_is_refused(clipseg_folder, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(SubjectError, match="tokens"):
        ClipSeg.load(clipseg_folder).require(["dog", "a very long name of a dog"])
    copy = Path(shutil.copytree(clipseg_folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights.pop("decoder.film_mul.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="film_mul"):
        ClipSeg.load(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        ClipSeg.load(copy)
    with pytest.raises(ModelError, match="no folder and cannot be downloaded"):
        ClipSeg.load(tmp_path / "none")


# The cache


def test_clipseg_fills_the_cache_and_skips_loudly(clipseg_folder, tmp_path) -> None:
    pytest.importorskip("pymatting")
    folder, cache = make_folder(tmp_path / "set", 6, masks=False, size=48), tmp_path / "cache"
    entries = read_folder(folder)
    with pytest.raises(DatasetError, match="6 of 6 pictures have neither mask nor transparency"):
        make_cutouts(entries, cache)
    clipseg = ClipSeg.load(clipseg_folder)
    confidences = [clipseg(Image.open(entry.picture), entry.subject) for entry in entries]
    # What the network is sure of depends on its random weights, which releases of transformers draw in other orders.
    low, high = (float(level) for level in np.quantile(np.concatenate([own.ravel() for own in confidences]), (0.3, 0.7)))
    shares = [(own >= high).mean() for own in confidences]
    # Half of the pictures have enough of it.
    chosen = CutoutSettings(high, low, smallest=float(sum(sorted(shares)[2:4])) / 2, largest=1.0)
    expected = [entry.file for entry, share in zip(entries, shares) if share < chosen.smallest]
    with pytest.warns(UserWarning, match=r"3 of 6 pictures are skipped"):
        report = make_cutouts(entries, cache, chosen, Segmenter(str(clipseg_folder)))
    assert report.made == {"clipseg": 3} and [row.split()[0] for row in report.skipped] == expected and len(expected) == 3
    assert all("was found" in reason for reason in report.skipped.values())
    lines = report.lines()
    assert lines[0] == "3 cut-outs (3 by clipseg), 3 pictures skipped" and len(lines) == 4
    with pytest.warns(UserWarning, match="3 of 6 pictures are left out"):
        found = read_cutouts(entries, cache)
    for entry, file in found:
        expected = cut_out(entry, chosen, clipseg).rgba
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))
    with pytest.raises(DatasetError, match="no picture of 6 has a subject"):
        make_cutouts(entries, tmp_path / "other", CutoutSettings(smallest=0.94), Segmenter(str(clipseg_folder)))


def test_a_run_that_was_killed_goes_on_where_it_was(pictures, tmp_path, monkeypatch) -> None:
    entries, made = read_folder(pictures), []

    def counted(entry, *given):
        made.append(entry.file)
        return cut_out(entry, *given)

    def killed(entry, *given):
        if len(made) == 2:
            raise KeyboardInterrupt
        return counted(entry, *given)

    class HalfWritten(KeyboardInterrupt):
        """A kill in the middle of writing the third one."""

    def half_written(cutout, place):
        if len(made) == 3:
            with atomic_path(place) as temporary:
                temporary.write_bytes(b"half of a picture")
                raise HalfWritten
        write(cutout, place)

    write = cutout_cache._write
    monkeypatch.setattr(cutout_cache, "cut_out", killed)
    with pytest.raises(KeyboardInterrupt):
        make_cutouts(entries, tmp_path / "killed")
    assert made == ["00.png", "01.png"] and not (tmp_path / "killed" / INDEX).exists()
    with pytest.raises(DatasetError, match="run it first"):
        read_cutouts(entries, tmp_path / "killed")
    monkeypatch.setattr(cutout_cache, "cut_out", counted)
    monkeypatch.setattr(cutout_cache, "_write", half_written)
    with pytest.raises(HalfWritten):
        make_cutouts(entries, tmp_path / "killed")
    monkeypatch.setattr(cutout_cache, "_write", write)
    make_cutouts(entries, tmp_path / "killed")
    assert made == ["00.png", "01.png", "02.png", "02.png", "03.png", "04.png"]
    make_cutouts(entries, tmp_path / "whole")
    files = {name: {p.relative_to(tmp_path / name): p for p in (tmp_path / name).rglob("*.*")} for name in ("killed", "whole")}
    assert files["killed"].keys() == files["whole"].keys() and len(files["whole"]) == 6
    assert all(path.read_bytes() == files["whole"][name].read_bytes() for name, path in files["killed"].items())


def test_a_changed_picture_mask_or_setting_is_cut_out_again(tmp_path) -> None:
    pytest.importorskip("pymatting")
    folder, cache = make_folder(tmp_path / "set", 3), tmp_path / "cache"

    def keys(**chosen) -> list[str]:
        make_cutouts(read_folder(folder), cache, CutoutSettings(**chosen))
        return [file.name for _, file in read_cutouts(read_folder(folder), cache)]

    first = keys()
    assert keys() == first and keys(refine=2)[0] != first[0]
    grey(dilate(scene(1).alpha, 1)).save(folder / "masks" / "01.png")
    assert [a == b for a, b in zip(first, keys())] == [True, False, True]
    scene(7).picture.save(folder / "00.png")
    with pytest.raises(DatasetError, match=r"1 pictures \(00.png \(.*as they are now"):
        read_cutouts(read_folder(folder), cache)
    assert [a == b for a, b in zip(first, keys())] == [False, False, True]


def test_a_picture_that_cannot_be_read_is_skipped_until_it_can(tmp_path) -> None:
    pytest.importorskip("pymatting")
    folder, cache = make_folder(tmp_path / "set", 3), tmp_path / "cache"
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="1 of 3"):
        report = make_cutouts(read_folder(folder), cache)
    assert "cannot be read" in next(iter(report.skipped.values())) and not list(cache.rglob("*.txt"))
    (folder / "00.png").write_bytes(whole)
    assert not make_cutouts(read_folder(folder), cache).skipped


def test_several_processes_make_the_same_cut_outs(pictures, cutouts, tmp_path) -> None:
    make_cutouts(read_folder(pictures), tmp_path / "cache", processes=2)
    assert (tmp_path / "cache" / INDEX).read_text() == (cutouts / INDEX).read_text()


def test_the_cache_and_the_pictures_lie_apart(pictures) -> None:
    for wrong in (pictures, pictures / "cache", pictures.parent):
        with pytest.raises(DatasetError, match="apart"):
            make_cutouts(read_folder(pictures), wrong)
    with pytest.raises(ArgumentError, match="processes"):
        make_cutouts(read_folder(pictures), pictures.parent.parent / "cache", processes=0)


def test_the_sheet_shows_the_steps_of_clipseg(tmp_path) -> None:
    pytest.importorskip("pymatting")
    drawn = scene(1, 160)
    drawn.picture.save(tmp_path / "a.png")
    picture = sheet([entry_of(tmp_path, "a.png")], CutoutSettings(), lambda *_: drawn.alpha)
    assert picture.width > 5 * 224 and len(np.unique(np.asarray(picture))) > 100
