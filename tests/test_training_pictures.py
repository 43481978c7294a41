"""A folder of pictures becomes a training set: what is read, how subjects are cut out and composed, what a batch holds."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blip_tiny import tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from p2p_subject.errors import ArgumentError, DatasetError, ModelError, PromptTooLongError, SubjectError
from p2p_subject.images import load_image
from p2p_subject.outputs import to_pil
from p2p_subject.training import __main__ as stages
from p2p_subject.training import world
from p2p_subject.training.backgrounds import paint
from p2p_subject.training.captions import PAPER, RELEASED, caption, sentence
from p2p_subject.training.composing import Composition, compose, draw_background, square_box, subject_box
from p2p_subject.training.cutout_cache import make_cutouts
from p2p_subject.training.inputs import ModelInputs
from p2p_subject.training.listing import read_backgrounds, read_folder
from p2p_subject.training.pictures import CaptionedPictures, PictureFolder, batches
from tests.picture_folders import make_folder, scene, transparent


@pytest.fixture(scope="module")
def inputs(miniature_folder) -> ModelInputs:
    return ModelInputs.of(miniature_folder)


# Folders


def test_both_forms_of_a_folder_say_the_same(tmp_path) -> None:
    listed = make_folder(tmp_path / "listed", 4)
    beside = tmp_path / "beside"
    (beside / "deep").mkdir(parents=True)
    (beside / ".hidden").mkdir()
    for line in (listed / "metadata.jsonl").read_text().splitlines():
        values = json.loads(line)
        stem = Path(values.pop("file_name")).stem
        (listed / f"{stem}.png").rename(beside / "deep" / f"{stem}.png")
        if "mask" in values:
            # Beside the picture itself: it has no caption, and needs none.
            (listed / values["mask"]).rename(beside / "deep" / f"{stem}-mask.png")
            values["mask"] = f"{stem}-mask.png"
        (beside / "deep" / f"{stem}.txt").write_text(f"{values.pop('text')}\n")
        (beside / "deep" / f"{stem}.json").write_text(json.dumps(values))
    scene(9).picture.save(beside / ".hidden" / "x.png")
    again = make_folder(tmp_path / "again", 4)
    for one, other in zip(read_folder(again), read_folder(beside), strict=True):
        assert f"deep/{one.file}" == other.file and (one.text, one.subject, one.size) == (other.text, other.subject, other.size)
        assert (one.mask is None) == (other.mask is None) and (other.mask is None or other.mask.is_file())


def test_a_folder_that_lacks_things_says_which_and_how_many(tmp_path) -> None:
    folder = make_folder(tmp_path / "set", 12)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[:7]:
        del line["text"]
    del lines[7]["subject"]
    lines[8]["mask"] = "masks/none.png"
    lines[9]["file_name"] = "none.png"
    (folder / "10.png").write_bytes(b"no picture")
    Image.new("RGB", (300, 8)).save(folder / "11.png")
    rows = [json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join([*rows[:3], "{", *rows[3:]]))
    with pytest.raises(DatasetError) as raised:
        read_folder(folder)
    message = str(raised.value)
    assert "7 pictures have no caption (00.png, 01.png, 02.png, 03.png, 04.png and 2 more)" in message
    assert "1 pictures have no subject (07.png)" in message and "Of 12 rows" in message
    assert "1 pictures name a mask" in message and "(08.png)" in message
    assert "do not exist (none.png)" in message and "(10.png, 11.png)" in message and "1 lines" in message and "(4)" in message


def test_a_subject_for_all_and_none_for_captions_alone(tmp_path) -> None:
    scene(0).picture.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a  dog\non grass")
    with pytest.raises(DatasetError, match="no subject"):
        read_folder(tmp_path)
    assert [(e.text, e.subject) for e in read_folder(tmp_path, subject=" wild  dog ")] == [("a dog on grass", "wild dog")]
    assert [entry.subject for entry in read_folder(tmp_path, need_subject=False)] == [""]


def test_folders_that_are_none(tmp_path) -> None:
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(DatasetError):
            read_folder(wrong)
        with pytest.raises(DatasetError, match="backgrounds"):
            read_backgrounds(wrong)
    scene(0).picture.save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DatasetError, match="no JSON object"):
        read_folder(tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot be opened"):
        read_backgrounds(tmp_path)


def test_a_mask_of_another_aspect_is_refused(tmp_path) -> None:
    scene(0).picture.resize((120, 83)).save(tmp_path / "a.png")
    for size, fits in (((60, 42), True), ((42, 60), True), ((1200, 828), True), ((60, 60), False), ((120, 70), False)):
        Image.new("L", size, 255).save(tmp_path / "m.png")
        (tmp_path / "a.json").write_text(json.dumps({"text": "a dog", "subject": "dog", "mask": "m.png"}))
        if fits:
            assert read_folder(tmp_path)[0].mask == tmp_path / "m.png"
        else:
            with pytest.raises(DatasetError, match="mask"):
                read_folder(tmp_path)


# Composition


@given(index=st.integers(0, 500), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_a_composition_shows_the_subject_whole_and_the_background_around_it(index, seed) -> None:
    cutout = transparent(index, 64)
    flat = np.full((64, 64, 3), 0.5, np.float32)
    picture = compose(cutout, flat, Composition(extent=(0.4, 0.9)), np.random.default_rng(seed))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, compose(cutout, flat, Composition(extent=(0.4, 0.9)), np.random.default_rng(seed)))
    rows, columns = np.nonzero(np.ptp(picture, axis=2) + np.abs(picture[..., 0].astype(int) - 128))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.3 * 64 < extent <= 0.9 * 64 + 1


def test_a_composition_of_the_same_size_keeps_every_pixel_of_the_subject() -> None:
    cutout = transparent(4, 64)
    left, top, right, bottom = subject_box(cutout)
    extent = max(right - left, bottom - top) / 64
    background = paint("water", 1, 64)
    how = Composition(extent=(extent, extent), mirror=0)
    picture = compose(cutout, background, how, np.random.default_rng(5))
    pixels = np.asarray(cutout.crop((left, top, right, bottom)))
    height, width = pixels.shape[:2]
    solid = pixels[..., 3] == 255
    matches = [
        (y, x)
        for y in range(64 - height + 1)
        for x in range(64 - width + 1)
        if np.array_equal(picture[y : y + height, x : x + width][solid], pixels[solid][:, :3])
    ]
    assert len(matches) == 1 and solid.mean() > 0.3
    y, x = matches[0]
    outside = np.ones((64, 64), bool)
    outside[y : y + height, x : x + width] = pixels[..., 3] == 0
    assert np.array_equal(picture[outside], np.rint(np.clip(background, 0, 1) * 255).astype(np.uint8)[outside])


def test_mirroring_and_the_backgrounds_of_a_folder(tmp_path) -> None:
    flat, cutout = np.zeros((64, 64, 3), np.float32), transparent(4, 64)
    full = dict(extent=(1.0, 1.0))
    plain, mirrored = (
        compose(cutout, flat, Composition(**full, mirror=share), np.random.default_rng(0)) for share in (0.0, 1.0)
    )
    rows = (plain > 0).any((1, 2))
    assert np.array_equal(plain[rows][:, (plain > 0).any((0, 2))], mirrored[rows][:, (mirrored > 0).any((0, 2))][:, ::-1])
    Image.new("RGB", (40, 70), (10, 200, 30)).save(tmp_path / "b.png")
    drawn = draw_background(read_backgrounds(tmp_path), 32, np.random.default_rng(0))
    assert drawn.shape == (32, 32, 3) and np.allclose(drawn, np.float32((10, 200, 30)) / 255)
    assert draw_background([], 32, np.random.default_rng(0)).shape == (32, 32, 3)
    for wrong in (dict(extent=(0.0, 0.5)), dict(extent=(0.9, 0.5)), dict(mirror=2), dict(crop="left")):
        with pytest.raises(ArgumentError):
            Composition(**wrong)


@given(data=st.data(), width=st.integers(8, 300), height=st.integers(8, 300), how=st.sampled_from(["random", "center"]))
@settings(deadline=None)
def test_the_square_holds_the_subject_as_far_as_it_fits(data, width, height, how) -> None:
    left, top = data.draw(st.floats(0, width - 1)), data.draw(st.floats(0, height - 1))
    right, bottom = data.draw(st.floats(left, width)), data.draw(st.floats(top, height))
    box = square_box((width, height), (left, top, right, bottom), how, np.random.default_rng(0))
    side = min(width, height)
    assert box[2] - box[0] == box[3] - box[1] == side
    assert box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
    for begin, end, low, high in ((left, right, box[0], box[2]), (top, bottom, box[1], box[3])):
        # A pixel is lost to whole corners where the subject is as wide as the square.
        if end - begin <= side - 2:
            assert low <= begin and end <= high
        elif end - begin >= side:
            assert abs((low + high) - (begin + end)) <= 1.01 or low == 0 or high in (width, height)


# Captions


@pytest.mark.parametrize(
    ("text", "subject", "released", "paper"),
    [
        ("a dog on grass.", "dog", "a dog on grass", "a dog on grass, the dog is"),
        ("The Dog sleeps", "dog", "The Dog sleeps", "The Dog sleeps, the dog is"),
        ("a brown dog", "dog", "a dog, a brown dog", "a brown dog, the dog is"),
        ("a dogsled in snow", "dog", "a dog, a dogsled in snow", "a dogsled in snow, the dog is"),
        ("two owls", "owl", "an owl, two owls", "two owls, the owl is"),
        ("a hot dog on a plate", "hot dog", "a hot dog on a plate", "a hot dog on a plate, the hot dog is"),
        ("", "dog", "a dog", "the dog is"),
    ],
)
def test_both_templates(text, subject, released, paper) -> None:
    assert sentence(text, subject, RELEASED)[0] == released
    whole, before = sentence(text, subject, PAPER)
    assert whole == paper and before == len(paper)


@pytest.mark.parametrize("template", [RELEASED, PAPER])
def test_a_caption_is_encoded_as_the_pipeline_does_with_the_subject_in_its_place(inputs, template) -> None:
    given = inputs.tokenizer, "a dog on grass", "dog", template, inputs.window, inputs.queries
    own = caption(*given)
    room = inputs.window - inputs.queries
    assert list(own.ids) == inputs.tokenizer(own.text, padding="max_length", max_length=room).input_ids and not own.cut
    before, behind = (
        inputs.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).split()
        for ids in (own.ids[: own.position], own.ids[own.position :])
    )
    released = ["a"], ["dog", "on", "grass"]
    assert (before, behind) == (released if template == RELEASED else (own.text.replace(",", " ,").split(), []))
    with pytest.raises(ArgumentError, match="template"):
        caption(*given[:3], "other", *given[4:])


@given(count=st.integers(1, 60))
@settings(deadline=None, max_examples=20)
def test_long_captions_lose_their_end_and_never_their_subject(inputs, count) -> None:
    text = " ".join(["a dog", *["grass"] * count])
    for template in (RELEASED, PAPER):
        own = caption(inputs.tokenizer, text, "dog", template, inputs.window, inputs.queries)
        assert len(own.ids) == inputs.window - inputs.queries and own.cut == (own.text != sentence(text, "dog", template)[0])
        used = sum(id_ != inputs.tokenizer.eos_token_id for id_ in own.ids) + 1
        assert own.text.startswith("a dog") and (not own.cut or used == len(own.ids))
        assert own.position == (2 if template == RELEASED else used - 1)
    with pytest.raises(PromptTooLongError):
        caption(inputs.tokenizer, text, "zeppelin over the grass of the", PAPER, 16, inputs.queries)


# Data sets


@pytest.mark.parametrize("template", [RELEASED, PAPER])
def test_a_batch_of_the_second_stage(pictures, cutouts, inputs, template) -> None:
    dataset = PictureFolder(pictures, cutouts, inputs, template=template)
    batch = batches(dataset, 5)(0, 0, 1)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "pixels": ((5, 3, 64, 64), torch.float32),
        "mask": ((5, 16, 16), torch.float32),
        "references": ((5, 3, 64, 64), torch.float32),
        "ids": ((5, 20), torch.int64),
        "position": ((5,), torch.int64),
        "category_ids": ((5, 3), torch.int64),
        "category_mask": ((5, 3), torch.int64),
    }
    order = np.random.default_rng((0, 0)).permutation(5)
    for row, index in enumerate(order):
        spec, drawn = world.sample("train", int(index)), scene(int(index))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (inputs.mean, inputs.std))
        shown = batch["references"][row] * std + mean
        assert shown.min() > -1e-3 and shown.max() < 1 + 1e-3
        if index < 4:  # the last is transparent, and lies on white
            expected = drawn.picture.resize((64, 64), Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(to_pil(batch["pixels"][row : row + 1])[0]), np.asarray(expected))
        alpha = drawn.alpha.reshape(16, 6, 16, 6).mean((1, 3))
        assert np.abs(batch["mask"][row].numpy() - alpha).max() < 0.01
        words = inputs.word_pieces.decode(batch["category_ids"][row], skip_special_tokens=True)
        assert words == spec.look.category and batch["category_mask"][row].tolist() == [1, 1, 1]
        expected = caption(inputs.tokenizer, spec.caption(), words, template, inputs.window, inputs.queries)
        assert batch["ids"][row].tolist() == list(expected.ids) and batch["position"][row] == expected.position


def test_the_picture_and_its_mask_are_cropped_alike_around_the_subject(inputs, tmp_path) -> None:
    pytest.importorskip("pymatting")
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[20:50, 150:180] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "m.png")
    (tmp_path / "a.json").write_text(json.dumps({"text": "a dog", "subject": "dog", "mask": "m.png"}))
    make_cutouts(read_folder(tmp_path), tmp_path.parent / "cache")
    for crop in ("random", "center"):
        dataset = PictureFolder(tmp_path, tmp_path.parent / "cache", inputs, composition=Composition(crop=crop))
        items = [dataset.at(0, epoch) for epoch in range(8)]
        for item in items:
            white = ((item["pixels"][0] + 1) / 2).reshape(16, 4, 16, 4).mean((1, 3))
            assert torch.allclose(item["mask"], white, atol=0.02) and white.sum() * 16 == pytest.approx(30 * 30, rel=0.02)
        assert (len({item["mask"].numpy().tobytes() for item in items}) > 3) == (crop == "random")


def test_a_row_is_a_function_of_seed_epoch_and_index(pictures, cutouts, inputs) -> None:
    def rows(seed: int, epoch: int, **given) -> list[torch.Tensor]:
        dataset = pickle.loads(pickle.dumps(PictureFolder(pictures, cutouts, inputs, seed=seed, **given)))
        return [dataset.at(index, epoch)["references"] for index in (3, 1)]

    first = rows(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, rows(1, 2)))
    assert not any(torch.equal(a, b) for other in (rows(2, 2), rows(1, 3)) for a, b in zip(first, other))
    backgrounds = pictures / "masks"
    assert not any(torch.equal(a, b) for a, b in zip(first, rows(1, 2, backgrounds=backgrounds)))
    dataset = PictureFolder(pictures, cutouts, inputs)
    assert torch.equal(dataset[1]["references"], dataset.at(1, 0)["references"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("threads", [0, 2])
def test_any_step_is_known_from_its_number_alone(pictures, cutouts, inputs, threads) -> None:
    dataset = PictureFolder(pictures, cutouts, inputs)
    straight = batches(dataset, 4, seed=3)
    whole = [straight(step, 0, 1) for step in range(4)]  # 16 rows: three epochs of 5, and one more
    resumed = batches(dataset, 4, seed=3, threads=threads)
    for step in (2, 3, 1):
        parts = [resumed(step, rank, 2) for rank in range(2)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert all(torch.equal(joined[name], whole[step][name]) for name in joined)
    seen = torch.cat([batch["ids"] for batch in whole])[:15].reshape(3, 5, -1)
    epochs = [sorted(map(tuple, epoch.tolist())) for epoch in seen]
    assert epochs[0] == epochs[1] == epochs[2] and not torch.equal(seen[0], seen[1])
    references = torch.cat([batch["references"] for batch in whole])
    assert len({row.numpy().tobytes() for row in references}) == 16
    with pytest.raises(ArgumentError, match="3 processes"):
        resumed(0, 0, 3)
    with pytest.raises(ArgumentError, match="batch_size"):
        batches(dataset, 0)


def test_a_data_loader_takes_the_sets_as_they_are(pictures, cutouts, inputs) -> None:
    dataset = PictureFolder(pictures, cutouts, inputs)
    rows = [batch["references"] for batch in DataLoader(dataset, batch_size=2, num_workers=1)]
    assert torch.equal(torch.cat(rows), torch.stack([dataset[index]["references"] for index in range(5)]))


def test_a_batch_of_the_first_stage(pictures, inputs) -> None:
    dataset = CaptionedPictures(pictures, inputs, length=8)
    batch = batches(dataset, 3, seed=1)(1, 0, 1)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "references": ((3, 3, 64, 64), torch.float32),
        "text_ids": ((3, 8), torch.int64),
        "text_mask": ((3, 8), torch.int64),
    }
    order = [*np.random.default_rng((1, 0)).permutation(5)[3:], np.random.default_rng((1, 1)).permutation(5)[0]]
    pieces = inputs.word_pieces
    for row, index in enumerate(order):
        entry = dataset.entries[index]
        expected = pieces(entry.text, padding="max_length", max_length=8)
        assert batch["text_ids"][row].tolist() == expected.input_ids
        assert batch["text_mask"][row].tolist() == expected.attention_mask
        assert expected.input_ids[0] == pieces.cls_token_id and pieces.sep_token_id in expected.input_ids
        # The last one is transparent, and lies on white.
        shown = scene(int(index)).picture if index < 4 else load_image(transparent(4))
        assert torch.equal(batch["references"][row], inputs.reference(shown))
    with pytest.warns(UserWarning, match=r"5 of 5 pictures are captioned with more than 4"):
        short = CaptionedPictures(pictures, inputs, length=4)
    assert (short[0]["text_ids"][-1] == pieces.sep_token_id) and short[0]["text_mask"].all()
    with pytest.raises(ArgumentError, match="length"):
        CaptionedPictures(pictures, inputs, length=17)


def test_the_sets_fit_the_networks(pictures, cutouts, tmp_path) -> None:
    pipeline = tiny_pipeline(tmp_path / "vocabularies", positions=60)
    pipeline.save_pretrained(tmp_path / "model")
    inputs = ModelInputs.of(tmp_path / "model")
    assert (inputs.window, inputs.queries, inputs.factor, inputs.resolution, inputs.side) == (60, 4, 2, 16, 32)
    batch = batches(PictureFolder(pictures, cutouts, inputs, template=PAPER, resolution=32), 3)(0, 0, 1)
    assert batch["pixels"].shape == (3, 3, 32, 32) and batch["mask"].shape == (3, 16, 16)
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [8, 12]}))
    with pytest.raises(ModelError, match="sample_size"):
        ModelInputs.of(tmp_path / "model")
    with torch.no_grad():
        latents = pipeline.vae.encode(batch["pixels"]).latent_dist.mean
        subjects = pipeline.qformer(batch["references"], batch["category_ids"], batch["category_mask"])
        contexts = pipeline.text_encoder(batch["ids"], subjects, batch["position"])
    assert latents.shape[2:] == batch["mask"].shape[1:] and contexts.shape == (3, 60, 24)


def test_sets_say_what_they_change_and_refuse_what_they_cannot_use(pictures, cutouts, inputs) -> None:
    with pytest.warns(UserWarning, match="5 of 5 pictures are smaller than 128 pixels"):
        PictureFolder(pictures, cutouts, inputs, resolution=128)
    for wrong in (dict(resolution=30), dict(resolution=0), dict(seed=-1), dict(template="none")):
        with pytest.raises(ArgumentError):
            PictureFolder(pictures, cutouts, inputs, **wrong)
    with pytest.raises(DatasetError, match="backgrounds"):
        PictureFolder(pictures, cutouts, inputs, backgrounds=cutouts / "none")
    with pytest.raises(SubjectError, match="word pieces"):
        inputs.categories(["dog", "a dog with a very long name that nobody can remember who has to call it"])


# The command line


def test_the_stage_on_the_command_line(pictures, tmp_path, monkeypatch, capsys) -> None:
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["training", "cutouts", *map(str, arguments)])
        stages.main()

    run(pictures, "--out", tmp_path / "cache", "--refine", "2", "--sheet", tmp_path / "sheet.png")
    assert capsys.readouterr().out.splitlines() == ["5 cut-outs (1 by alpha, 4 by mask), 0 pictures skipped"]
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width > 5 * 224 and drawn.height > 5 * 224
    with pytest.raises(SystemExit) as raised:
        run(tmp_path / "none", "--out", tmp_path / "cache")
    assert raised.value.code == 2 and "is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(pictures, "--out", tmp_path / "cache", "--sheet", tmp_path / "sheet.doc")
    assert "unknown suffix" in capsys.readouterr().err
