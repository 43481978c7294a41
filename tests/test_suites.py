"""Suites hold what they say: the world's true answers, the public formats of the others on tiny folders, tiny CLIP and DINO."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from benchmarks import dreambench, dreamedit, features, metrics, pie_bench, run, world_suite
from benchmarks.methods import METHODS
from benchmarks.pie_bench import PieBench, bordered, decoded, square_around
from benchmarks.run_folder import read_rows
from benchmarks.suite import Case, Edited, Options, SuiteError, occurrences
from benchmarks.suites import SUITES, open_suite, suite_class
from benchmarks.world_suite import WorldSuite
from p2p_subject import BlipDiffusionPipeline, Editor
from p2p_subject.errors import ModelError, PromptTooLongError
from p2p_subject.training import world
from p2p_subject.training.tokenizers import save_clip_tokenizer
from tests.tiny_pipelines import stable_diffusion_1

pytestmark = pytest.mark.usefixtures("own_threads")


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def answered(case: Case) -> Edited:
    """What a perfect method would return."""
    return Edited(case.truth, Image.fromarray(case.mask.astype(np.uint8) * 255))


# The world


@pytest.mark.parametrize("kind", WorldSuite.kinds)
def test_cases_of_the_world_are_fixed_and_their_answers_true(kind: str) -> None:
    suite = WorldSuite(Options(count=40))
    ids = suite.ids()[kind]
    assert len(ids) == 40 and ids[7] == f"{kind}-0007"
    for id in ids[:4]:
        case, again = suite.case(id), WorldSuite(Options(count=40)).case(id)
        assert (case.id, case.kind, case.prompt) == (id, kind, again.prompt) and case.prompt != case.target_prompt
        assert np.array_equal(case.source, again.source) and np.array_equal(case.truth, again.truth)
        assert case.mask.any() and not case.mask.all()
        # Outside the region the true answer is the source, but for soft edges.
        outside = metrics.psnr(np.asarray(case.source), np.asarray(case.truth), ~case.mask)
        assert outside > 18 and outside > 6 + metrics.psnr(np.asarray(case.source), np.asarray(case.truth), case.mask)
        words = [*case.source_words, *case.target_words]
        assert words and all(word in f"{case.prompt} {case.target_prompt}".split() for word in words)


def test_the_worlds_swaps_are_those_of_the_figures_and_validation_has_others() -> None:
    test, validation = WorldSuite(Options()), WorldSuite(Options(split="validation"))
    case = test.case("swap-0003")
    scene, look = world.sample("test", 3), world.sample("new_hue", 3).look
    assert np.array_equal(case.source, world.draw(scene).image)
    assert np.array_equal(case.truth, world.draw(scene.with_look(look)).image)
    assert np.array_equal(case.references[0], world.reference(look, "new_hue", 3)) and case.category == look.category
    assert len(test.ids()["swap"]) == world_suite.COUNT == 200
    seen = {np.asarray(test.case(f"{kind}-{n:04d}").source).tobytes() for kind in test.kinds for n in range(4)}
    others = [validation.case(f"swap-{n:04d}") for n in range(4)] + [WorldSuite(Options(seed=1)).case("swap-0000")]
    assert not {np.asarray(other.source).tobytes() for other in others} & seen
    assert not {other.facts.look for other in others} & {test.case(f"swap-{n:04d}").facts.look for n in range(4)}


@pytest.mark.parametrize("kind", WorldSuite.kinds)
def test_the_true_answer_measures_as_perfect_and_the_source_does_not(kind: str) -> None:
    suite = WorldSuite(Options(count=12))
    right, wrong = [], []
    for id in suite.ids()[kind]:
        case = suite.case(id)
        values = suite.measure(case, answered(case), mask_input=True)
        assert values["mask_iou"] == values["boundary_f"] == values["changed_iou"] == 1
        if kind in ("replace", "background"):
            assert "truth_psnr" not in values and "truth_ssim" not in values
        else:
            assert values["truth_psnr"] == metrics.CEILING and values["truth_ssim"] == pytest.approx(1)
        assert values["outside_psnr"] == values["unpasted_psnr"] == metrics.CEILING and values["exact_outside_truth"] == 1
        untouched = suite.measure(case, Edited(case.source), mask_input=True)
        assert untouched["outside_psnr"] == metrics.CEILING and untouched["exact_outside_truth"] == 1
        assert untouched["changed_iou"] < 0.2 and "mask_iou" not in untouched
        right.append(values["success"])
        wrong.append(untouched["success"])
    # The judge itself is right in .98 of real scenes.
    assert np.mean(right) >= 0.9 and np.mean(wrong) <= 0.1


def test_an_object_is_not_removed_by_another_or_by_paint() -> None:
    suite = WorldSuite(Options(count=30))
    others, painted = [], []
    for id in suite.ids()["remove"]:
        case = suite.case(id)
        number = int(id.split("-")[1])
        spec = world.sample("test", 10_000 * suite.kinds.index("remove") + number)
        look = world.sample_look("test", np.random.default_rng(number))
        other = world.draw(spec.with_look(look)).picture
        flat = np.asarray(case.truth).copy()
        flat[case.mask] = 128
        for picture, found in ((other, others), (Image.fromarray(flat), painted)):
            found.append(suite.measure(case, Edited(picture), mask_input=True)["success"])
    assert np.mean(others) < 0.2 and np.mean(painted) < 0.35


def test_an_added_object_is_measured_by_what_else_changed() -> None:
    suite = WorldSuite(Options())
    case = suite.case("add-0002")
    mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
    inside = suite.measure(case, Edited(case.truth, mask, reach=3.0), False)
    everywhere = suite.measure(case, Edited(suite.case("add-0003").truth), False)
    assert inside["own_outside_psnr"] > 40 > 25 > everywhere["own_outside_psnr"] and "outside_psnr" not in everywhere


def test_an_object_without_a_place_is_measured_only_where_the_place_was_told() -> None:
    suite = WorldSuite(Options())
    case = suite.case("add-0002")
    blind, told = (suite.measure(case, answered(case), mask_input) for mask_input in (False, True))
    assert not case.placed and "mask_iou" not in blind and told["mask_iou"] == 1
    assert blind["success"] == told["success"] and blind["exact_outside_mask"] > 0.9


def test_pixels_outside_a_methods_own_mask_are_compared_bit_for_bit() -> None:
    suite = WorldSuite(Options())
    case = suite.case("recolour-0001")
    mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
    spoilt = np.asarray(case.source).copy()
    spoilt[0, 0] ^= 1
    for reach in (0.0, 2.5):
        values = suite.measure(case, Edited(Image.fromarray(spoilt), mask, reach=reach), False)
        assert 1 - 1e-3 < values["exact_outside_mask"] < 1
    spread = np.asarray(case.source).copy()
    near = np.asarray(Image.fromarray(case.mask).convert("L")) > 0
    spread[np.roll(near, 2, 0) & ~near] ^= 1
    edges = [suite.measure(case, Edited(Image.fromarray(spread), mask, reach=reach), False) for reach in (0.0, 2.0)]
    assert edges[0]["exact_outside_mask"] < 1 == edges[1]["exact_outside_mask"]
    unpasted = suite.measure(case, Edited(case.source, mask, unpasted=lambda: suite.case("recolour-0002").truth), False)
    assert unpasted["outside_psnr"] == metrics.CEILING > unpasted["unpasted_psnr"]


def test_what_the_world_adds_for_edits_changes_one_thing_each() -> None:
    spec = world.sample("test", 5)
    assert spec.with_hue(10.0) == spec.with_look(world.Look(spec.look.category, spec.look.source, 10.0))
    other = spec.with_background("snow", 3)
    assert (other.look, other.pose, other.background, other.background_seed) == (spec.look, spec.pose, "snow", 3)
    scene, empty = world.draw(spec), world.draw_empty(spec)
    assert np.array_equal(scene.image[scene.alpha == 0], empty[scene.alpha == 0])
    assert [world.empty_caption(name) for name in ("grass", "sky", "sunset")] == ["grass", "the sky", "sunset"]
    assert world.reference_scene(spec.look, "test", 5).mask.mean() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(kinds=("swp",)), "has no cases"),
        (Options(count=0), "1 or more"),
        (Options(split="train"), "validation"),
        (Options(seed=-1), "from 0 to"),
        (Options(seed=2**63), "from 0 to 184467440737094"),
        # Cases beyond would be scenes of another kind, and looks of the validation.
        (Options(count=10_001), "10000 cases a kind"),
        (Options(clip="x"), "clip='x' means nothing to the suite 'world'; leave it out"),
        (Options(data=Path("x")), "data='x' means nothing"),
    ],
)
def test_the_world_refuses_what_it_has_not(options: Options, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        WorldSuite(options)


def test_cases_and_suites_that_do_not_exist_are_refused_by_name() -> None:
    with pytest.raises(SuiteError, match="swap-0007"):
        WorldSuite(Options()).case("swop-3")
    with pytest.raises(SuiteError, match="Did you mean 'world'"):
        suite_class("wrld")
    assert list(SUITES) == ["world", "pie", "dreambench", "dreamedit"]
    with pytest.raises(SuiteError, match="lpips='alex' means nothing to the suite 'dreambench'"):
        open_suite("dreambench", Options(lpips="alex"))
    with pytest.raises(SuiteError, match="split='validation' means nothing to the suite 'pie'"):
        open_suite("pie", Options(split="validation"))
    for name in ("pie", "dreambench", "dreamedit"):
        with pytest.raises(SuiteError, match="not shipped.*from https"):
            open_suite(name, Options())


def test_words_are_named_at_each_of_their_places() -> None:
    assert occurrences("a cat on a mat", "cat") == ("cat",)
    assert occurrences("a cat, a Cat and a caterpillar", "cat") == (("cat", 0), ("cat", 1))
    assert occurrences("a cat", "dog") == () == occurrences("a cat", " ")


# Networks, tiny and random, in the layout of the public ones


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    save_clip_tokenizer(folder / "clip")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=sizes | text | {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id},
            vision_config=sizes | {"image_size": 32, "patch_size": 8},
            projection_dim=12,
        )
        CLIPModel(config).save_pretrained(folder / "clip")
        ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    return {"clip": str(folder / "clip"), "dino": str(folder / "dino"), "lpips": "none"}


def test_clip_features_are_the_models_own(networks: dict[str, str]) -> None:
    clip = features.Clip(networks["clip"])
    image, text = clip.image(picture(0, (50, 40))), clip.text("a dog on grass")
    assert image.shape == text.shape == (12,) and image.dtype == np.float32
    tokens = clip.tokenizer(["a dog on grass"], return_tensors="pt")
    pixels = features.prepared(picture(0, (50, 40)), 32, 32, features.CLIP_MEAN, features.CLIP_DEVIATION)
    with torch.no_grad():
        whole = clip.model(**{name: tokens[name] for name in ("input_ids", "attention_mask")}, pixel_values=pixels)
    assert metrics.cosine(image, whole.image_embeds[0].numpy()) == pytest.approx(1, abs=1e-5)
    assert metrics.cosine(text, whole.text_embeds[0].numpy()) == pytest.approx(1, abs=1e-5)
    assert metrics.cosine(text, clip.text("a cat on snow")) < 1 - 1e-4
    assert clip.text("a dog on grass " * 20).shape == (12,)


def test_dino_keys_are_the_last_layers_and_tell_structures_apart(networks: dict[str, str]) -> None:
    dino = features.Dino(networks["dino"])
    keys = dino.keys(picture(1, (40, 30)))
    assert keys.shape == (1 + 16, 16) and dino.image(picture(1)).shape == (16,)
    pixels = torch.from_numpy(np.asarray(picture(1, (40, 30)).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255)
    mean, deviation = (torch.tensor(values) for values in (features.IMAGENET_MEAN, features.IMAGENET_DEVIATION))
    layers = dict(dino.model.named_modules())
    norm = [layer for name, layer in layers.items() if name.endswith("layernorm_before")][-1]
    with torch.no_grad():
        states = dino.model(((pixels - mean) / deviation).permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        expected = dino._last_keys(norm(states[-2]))[0].numpy()
    np.testing.assert_allclose(keys, expected, atol=1e-5)
    assert metrics.structure_distance(keys, dino.keys(picture(1, (40, 30)))) == 0
    assert metrics.structure_distance(keys, dino.keys(picture(2, (40, 30)))) > 0
    # The published code takes levels up to 255 for values up to 1, and resizes by plain interpolation.
    levels = torch.from_numpy(np.asarray(picture(1, (64, 64)), np.float32)).permute(2, 0, 1)[None]
    smaller = (levels[..., ::2, ::2] + levels[..., 1::2, ::2] + levels[..., ::2, 1::2] + levels[..., 1::2, 1::2]) / 4
    seen = (smaller - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        states = dino.model(seen, output_hidden_states=True).hidden_states
        expected = dino._last_keys(norm(states[-2]))[0].numpy()
    np.testing.assert_allclose(dino.published_keys(picture(1, (64, 64))), expected, atol=1e-4)


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([224, 256, 32]))
@settings(max_examples=200)
def test_sides_keep_their_ratio_and_squares_stay_squares(side: int, longer: int, shorter: int) -> None:
    assert features.with_shorter_side((side, side), shorter) == (shorter, shorter)
    assert features.with_shorter_side((277, 277), 224) == (224, 224)
    side, longer = sorted((side, longer))
    expected = shorter * longer // side
    assert features.with_shorter_side((side, longer), shorter) == (shorter, expected)
    assert features.with_shorter_side((longer, side), shorter) == (expected, shorter)


def test_a_white_picture_has_no_black_edge() -> None:
    for side in (277, 380, 440):
        white = Image.new("RGB", (side, side), "white")
        assert (features.prepared(white, 224, 224, (0.0,) * 3, (1.0,) * 3) == 1).all()


def test_pictures_are_cut_to_their_middle(networks: dict[str, str]) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    shown = features.prepared(Image.fromarray(wide), 20, 20, (0.0,) * 3, (1.0,) * 3)
    assert shown.shape == (1, 3, 20, 20) and (shown == 1).all()


def test_networks_that_are_not_there_are_named(networks: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"CLIPModel .*safetensors.*'none'"):
        features.Clip(tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'squeeze'"):
        features.Lpips("sqeeze")
    (tmp_path / "config.json").write_text((Path(networks["dino"]) / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=r"ViTModel .* cannot be loaded"):
        features.Dino(tmp_path)
    # Weights of other names would be left as they are drawn, and measure noise.
    weights = load_file(Path(networks["dino"]) / "model.safetensors")
    save_file({f"backbone.{name}": w for name, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"is not the weights of ViTModel: \d+ are missing, such as "):
        features.Dino(tmp_path)
    made = features.Networks("none", networks["dino"], None, "cpu")
    assert made.clip is None and made.lpips is None and made.dino is made.dino
    assert features.versions()["torch"] == torch.__version__


def test_networks_that_are_not_there_are_refused_before_anything_is_edited(
    pie: Path, miniature_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--suite", "pie", "--data", str(pie), "--clip", "none", "--dino", str(tmp_path), "--lpips", "none"]
    model = ["--model", str(miniature_folder), "--methods", "ours", "--steps", "2"]
    assert run.main([*options, *model, "--out", str(tmp_path / "out")]) == 1
    assert "ViTModel" in capsys.readouterr().err and (tmp_path / "out" / "rows.jsonl").read_bytes() == b""
    # What was refused has no rows, so that its folder takes what the message says to pass.
    assert run.main([*options, *model, "--out", str(tmp_path / "out"), "--dino", "none", "--cases", "change-object"]) == 0
    (row,) = read_rows(tmp_path / "out")
    assert "error" not in row and row["metrics"]["published_psnr"] > 0 and row["metrics"]["clip_whole"] is None
    assert row["networks"] == {}


def test_a_missing_torchmetrics_is_said_before_anything_is_edited(pie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = PieBench(Options(data=pie, clip="none", dino="none", lpips="none"))
    suite.prepare()
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ModelError, match=r"install the extra p2p_subject\[benchmarks\]"):
        suite.prepare()


class Weighed(torch.nn.Module):
    """In the place of `lpips.LPIPS`, with its arguments and shapes: squared differences, a weight a channel."""

    def __init__(self, net: str, pretrained: bool = True, pnet_rand: bool = False, spatial: bool = False, verbose: bool = True):
        super().__init__()
        self.weight, self.spatial = torch.nn.Parameter(torch.zeros(3)), spatial

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape != b.shape:
            raise RuntimeError("pictures of two sizes")
        assert a.dtype == torch.float32 and a.min() >= -1 and a.max() <= 1
        found = ((a - b) ** 2 * self.weight[:, None, None]).sum(1, keepdim=True)
        return found if self.spatial else found.mean((2, 3), keepdim=True)


def test_lpips_is_given_pictures_from_minus_one_to_one_and_weights_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("lpips")
    package.LPIPS = Weighed
    monkeypatch.setitem(sys.modules, "lpips", package)
    made = Weighed("squeeze")
    made.weight.data = torch.tensor([1.0, 2.0, 3.0])
    save_model(made, str(tmp_path / "squeeze.safetensors"))
    network = features.Lpips(str(tmp_path))
    a, b = np.array(picture(0, (8, 6))), np.array(picture(1, (8, 6)))
    expected = ((a / 127.5 - b / 127.5) ** 2 @ [1, 2, 3]).astype(np.float32)
    assert network.map(a, b).shape == (6, 8) and np.allclose(network.map(a, b), expected, atol=1e-5)
    assert network.distance(a, b) == pytest.approx(expected.mean(), rel=1e-5) and network.distance(a, a) == 0
    with pytest.raises(RuntimeError, match="two sizes"):
        network.distance(a, b[:4])
    assert network.map(a, b).shape == (6, 8)
    suite = features.Networks(None, None, str(tmp_path), "cpu")
    assert suite.fingerprints.keys() == {"lpips"} and "lpips_weights" in suite.record()
    save_file({"weight": torch.ones(2)}, tmp_path / "squeeze.safetensors")
    with pytest.raises(ModelError, match="is not the weights of LPIPS"):
        features.Lpips(str(tmp_path))


def test_lpips_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ModelError, match="LPIPS needs the package 'lpips': install lpips"):
        features.Lpips("squeeze")


def test_lpips_is_the_packages(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    lpips = pytest.importorskip("lpips")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False)
    for name, values in made.named_parameters():
        if ".lin" in name or name.startswith("lin"):
            values.data.abs_()  # as trained ones are
    save_model(made, str(tmp_path / "squeeze.safetensors"))
    network = features.Lpips(str(tmp_path))
    a, b = np.asarray(picture(0)), np.asarray(picture(1))
    pair = [torch.from_numpy(p).permute(2, 0, 1)[None] / 127.5 - 1 for p in (a, b)]
    assert network.distance(a, b) == pytest.approx(made.eval()(*pair).item(), rel=1e-5)
    save_file({"weight": torch.ones(2)}, tmp_path / "squeeze.safetensors")
    with pytest.raises(ModelError, match="is not the weights of LPIPS"):
        features.Lpips(str(tmp_path))
    assert network.distance(a, a) == 0 < network.distance(a, b) == pytest.approx(network.map(a, b).mean(), rel=0.1)


# PIE-Bench


def runs(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, as the public file writes them."""
    flat = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel().astype(int), [0]])))
    return [int(x) for start, stop in flat.reshape(-1, 2) for x in (start, stop - start)]


@pytest.fixture(scope="module")
def pie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pie")
    mask = np.zeros((512, 512), bool)
    mask[160:320, 80:240] = True
    entries = {
        "111000000000": {
            "image_path": "1_change_object_80/1_artificial/1_animal/111000000000.jpg",
            "original_prompt": "a [cat] on grass",
            "editing_prompt": "a [dog] on grass",
            "editing_instruction": "Change the cat to a dog",
            "editing_type_id": "1",
            "blended_word": "cat dog",
            "mask": runs(mask),
        },
        "900000000001": {
            "image_path": "9_change_style_80/900000000001.jpg",
            "original_prompt": "a cat and a cat",
            "editing_prompt": "[watercolor of] a cat and a cat",
            "editing_instruction": "Make it a watercolor",
            "editing_type_id": "9",
            "blended_word": "",
            "mask": [0, 512 * 512],
        },
    }
    for number, entry in enumerate(entries.values()):
        path = folder / "annotation_images" / entry["image_path"]
        path.parent.mkdir(parents=True)
        picture(number).resize((512, 512)).save(path, quality=95)
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


@given(st.integers(4, 40), st.data())
@settings(max_examples=60)
def test_a_square_around_a_region_holds_it_and_lies_in_the_picture(size: int, data: st.DataObject) -> None:
    spans = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for _ in range(2)]
    (left, right), (top, bottom) = spans
    mask = np.zeros((size, size), bool)
    mask[top:bottom, left:right] = True
    box = square_around(mask)
    assert box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom and min(box) >= 0 and max(box) <= size
    assert box[2] - box[0] == box[3] - box[1] == max(right - left, bottom - top)
    assert square_around(np.zeros((size, size), bool)) == (0, 0, size, size)


@given(st.lists(st.booleans(), min_size=24, max_size=24))
@settings(max_examples=50)
def test_run_lengths_are_read_back_and_get_the_published_border(pixels: list[bool]) -> None:
    mask = np.array(pixels).reshape(4, 6)
    assert np.array_equal(decoded(runs(mask), (4, 6)), mask)
    read = bordered(mask)
    assert read[[0, -1]].all() and read[:, [0, -1]].all() and np.array_equal(read[1:-1, 1:-1], mask[1:-1, 1:-1])


def test_run_lengths_beyond_the_picture_are_cut_and_odd_ones_refused() -> None:
    assert decoded([10, 1000], (4, 6)).ravel()[10:].all()
    for wrong in ([1], [0, -3], [0.5, 2], None, "[0, 10]", [[0], [1, 2]], 4):
        with pytest.raises(SuiteError, match="pairs"):
            decoded(wrong, (4, 6))


def test_pie_bench_is_read_in_its_public_format(pie: Path) -> None:
    suite = PieBench(Options(data=pie))
    assert suite.ids() == {"change-object": ["111000000000"], "change-style": ["900000000001"]}
    case = suite.case("111000000000")
    assert (case.prompt, case.target_prompt, case.kind) == ("a cat on grass", "a dog on grass", "change-object")
    assert (case.source_words, case.target_words) == (("cat",), ("dog",))
    assert case.mask[160:320, 80:240].all() and case.mask.sum() == 160 * 160 and case.source.size == (512, 512)
    styled = suite.case("900000000001")
    assert styled.source_words == styled.target_words == () and styled.mask.all()
    assert suite.record()["clip"] == pie_bench.CLIP and suite.record()["entries"] == "2 of 700"
    entry = suite.entries["111000000000"]
    for words, expected in (("cat dog grass", ("cat",)), ("cat", ())):
        suite.entries["other"] = entry | {"blended_word": words}
        assert suite.case("other").source_words == expected
    # What goes has a word in the source's prompt alone.
    suite.entries["other"] = entry | {"blended_word": "nothing dog", "editing_type_id": "2"}
    assert suite.case("other").adds and not case.adds
    named = {("3", "cat nothing"): True, ("3", "cat dog"): False, ("3", ""): False, ("1", "cat nothing"): False}
    for (kind, words), goes in named.items():
        suite.entries["other"] = entry | {"blended_word": words, "editing_type_id": kind}
        assert suite.case("other").removes is goes


def test_pie_bench_measures_as_published_and_by_area(pie: Path, networks: dict[str, str]) -> None:
    suite = PieBench(Options(data=pie, **networks))
    case = suite.case("111000000000")
    edited, kept = np.asarray(case.source).copy(), ~bordered(case.mask)
    edited[~case.mask] = np.clip(edited[~case.mask].astype(int) + 20, 0, 255)
    values = suite.measure(case, Edited(Image.fromarray(edited), Image.fromarray(case.mask.astype(np.uint8) * 255)), False)
    expected = {measure.name for measure in PieBench.measures if measure not in world_suite.COSTS}
    assert values.keys() == expected - {"published_lpips", "lpips"} and values["mask_iou"] == 1
    assert values["published_mse"] == pytest.approx(values["mse"] * kept.mean()) and values["published_psnr"] > values["psnr"]
    torch_pair = [torch.from_numpy(p * kept[..., None]).permute(2, 0, 1)[None] / 255 for p in (edited, np.asarray(case.source))]
    assert values["published_psnr"] == pytest.approx(-10 * torch.log10(((torch_pair[0] - torch_pair[1]) ** 2).mean()).item())
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)(*torch_pair).item()
    assert values["published_ssim"] == pytest.approx(ssim, abs=1e-5) and values["ssim"] < ssim < 1
    pasted = suite.measure(case, Edited(case.source, unpasted=lambda: Image.fromarray(edited)), False)
    assert pasted["psnr"] == metrics.CEILING and pasted["unpasted_psnr"] == values["psnr"] == values["unpasted_psnr"]
    assert pasted["ssim"] == 1 and pasted["unpasted_ssim"] == values["ssim"]
    clip, text = suite.networks.clip, suite.networks.clip.text(case.target_prompt)
    black, box = Image.fromarray(edited * bordered(case.mask)[..., None]), Image.fromarray(edited[160:320, 80:240])
    for name, shown in (("clip_whole", Image.fromarray(edited)), ("published_clip_edited", black), ("clip_edited", box)):
        assert values[name] == pytest.approx(metrics.clip_score(clip.image(shown), text), abs=1e-4)
    assert suite.fingerprints().keys() == {"clip", "dino"} and suite.fingerprints()["clip"] != suite.fingerprints()["dino"]
    same = suite.measure(case, Edited(case.source), False)
    assert same["structure"] == same["published_structure"] == 0 and same["psnr"] == metrics.CEILING
    whole = suite.measure(suite.case("900000000001"), Edited(picture(3, (512, 512))), False)
    # Without a background there is no value of it; the published code writes "nan" there.
    assert "psnr" not in whole and "published_ssim" not in whole and whole["published_clip_edited"] == whole["clip_whole"]


def test_pie_bench_gives_the_perceptual_distance_of_the_background(pie: Path) -> None:
    """Published: of both pictures with the edited region black. Beside it, the mean over the background alone."""

    class Levels:
        """In the place of LPIPS: the difference of levels, at every pixel, and its mean."""

        def map(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.abs(a.astype(float) - b).mean(-1)

        def distance(self, a: np.ndarray, b: np.ndarray) -> float:
            return float(self.map(a, b).mean())

    suite = PieBench(Options(data=pie, clip="none", dino="none", lpips="none"))
    suite.networks.lpips = Levels()
    case = suite.case("111000000000")
    source = np.asarray(case.source)
    moved = np.where(case.mask[..., None], 255 - source, np.where(source < 128, source + 100, source - 100)).astype(np.uint8)
    edge = bordered(case.mask)
    values = suite.measure(case, Edited(Image.fromarray(moved)), False)
    assert values["lpips"] == pytest.approx(100)
    assert values["published_lpips"] == pytest.approx(100 * (~edge).mean())


def test_networks_in_folders_are_recorded_by_their_weights(networks: dict[str, str], tmp_path: Path) -> None:
    made = features.Networks(networks["clip"], networks["dino"], "none", "cpu").record()
    assert made["clip"] == networks["clip"] and len(made["clip_weights"]) == 16 != made["dino_weights"]
    assert features.Networks("openai/clip-vit-large-patch14", None, None, "cpu").record().keys() == {"clip", "dino", "lpips"}


def test_pie_bench_says_what_is_missing_and_where_it_comes_from(pie: Path, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no mapping_file.json, annotation_images.*PnPInversion"):
        PieBench(Options(data=tmp_path))
    (tmp_path / "annotation_images").mkdir()
    text = (pie / "mapping_file.json").read_text()
    for content, message in [
        (text, r"2 of 2 pictures are missing.*111000000000.jpg"),
        ("not json", "not JSON"),
        (text.replace("blended_word", "blend"), "lacks blended_word"),
        (text.replace('"editing_type_id": "9"', '"editing_type_id": "12"'), "'0' to '9'"),
        (text, "entry '111000000000': a picture of 64x64; expected 512x512"),
        (text.replace("[0, 262144]", "[0]"), "entry '900000000001': a mask of 1 values; expected a list of pairs"),
        ("[]", "an entry for each"),
    ]:
        (tmp_path / "mapping_file.json").write_text(content)
        if "entry '" in message:
            shutil.copytree(pie / "annotation_images", tmp_path / "annotation_images", dirs_exist_ok=True)
        if "64x64" in message:
            path = tmp_path / "annotation_images" / json.loads(text)["111000000000"]["image_path"]
            kept = path.read_bytes()
            picture(0).save(path)
        with pytest.raises(SuiteError, match=message):
            PieBench(Options(data=tmp_path))
        if "64x64" in message:
            path.write_bytes(kept)


def test_folders_of_pictures_know_them(pie: Path, dreambooth: Path, tmp_path: Path) -> None:
    shutil.copytree(pie, tmp_path / "pie")
    shutil.copytree(dreambooth, tmp_path / "dream")
    pictures = {
        PieBench: (tmp_path / "pie", "annotation_images"),
        dreambench.DreamBench: (tmp_path / "dream", "dataset"),
        dreamedit.DreamEditBench: (tmp_path / "dream", "data/replacement_source"),
    }
    for suite, (folder, part) in pictures.items():
        before = suite(Options(data=folder)).record()
        assert before == suite(Options(data=folder)).record()
        path = next((folder / part).rglob("*.jpg"))
        with Image.open(path) as kept:
            kept.convert("RGB").save(path, quality=30)
        assert suite(Options(data=folder)).record() != before


# DreamBench and DreamEditBench

LIST = """Classes

subject_name,class
backpack,backpack
dog2,dog
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture(scope="module")
def dreambooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dreamedit")
    for seed, subject in enumerate(("backpack", "dog2", "bear_plushie")):
        (folder / "dataset" / subject).mkdir(parents=True)
        for number in range(2):
            picture(10 * seed + number).save(folder / "dataset" / subject / f"0{number}.jpg")
    (folder / "dataset" / "prompts_and_classes.txt").write_text(LIST)
    for seed, name in enumerate(("backpack", "dog", "bear_plushie")):
        (folder / "data" / "replacement_source" / name).mkdir(parents=True)
        for number in range(10):
            path = folder / "data" / "replacement_source" / name / f"found{number}.jpg"
            picture(100 * (seed + 1) + number, (40, 60)).save(path)
    return folder


def test_dreambench_is_read_and_measured_as_published(dreambooth: Path, networks: dict[str, str]) -> None:
    suite = dreambench.DreamBench(Options(data=dreambooth, **networks))
    assert {kind: len(ids) for kind, ids in suite.ids().items()} == {"object": 2 * 2 * 4, "live": 2 * 4}
    case = suite.case("bear_plushie-01-2")
    assert case.prompt == "a cube shaped stuffed animal" and case.category == "stuffed animal" and case.source is None
    assert suite.case("dog2-01-0").prompt == "a dog wearing a red hat" and len(case.references) == 2
    assert len({suite.case(f"dog2-0{p}-{k}").seed for p in range(2) for k in range(4)}) == 8
    dino, clip = suite.networks.dino, suite.networks.clip
    values = suite.measure(case, Edited(case.references[0]), False)
    cosines = [metrics.cosine(dino.image(case.references[0]), dino.image(other)) for other in case.references]
    assert cosines[0] == pytest.approx(1) and values["dino"] == pytest.approx(np.mean(cosines))
    cosines = [metrics.cosine(clip.image(case.references[0]), clip.image(other)) for other in case.references]
    assert values["clip_i"] == pytest.approx(np.mean(cosines)) and np.mean(cosines) < 1 - 1e-4
    assert suite.record()["subjects"] == "3 of 30" and suite.record()["prompts"] == "2+2 of 25+25"
    assert values["clip_t"] == pytest.approx(metrics.cosine(clip.image(case.references[0]), clip.text(case.prompt)))
    assert dreambench.DreamBench(Options(data=dreambooth / "dataset")).ids() == suite.ids()


def test_dreamedit_is_read_and_measured_as_published(dreambooth: Path, networks: dict[str, str]) -> None:
    suite = dreamedit.DreamEditBench(Options(data=dreambooth, **networks))
    assert len(suite.ids()["swap"]) == 30
    case = suite.case("dog2-4")
    assert (case.prompt, case.source_words, case.category) == ("a dog", ("dog",), "dog") and case.source.size == (40, 60)
    # Other dogs are put into the pictures of the one dog.
    assert np.array_equal(case.source, Image.open(dreambooth / "data/replacement_source/dog/found4.jpg"))
    values = suite.measure(case, Edited(case.source), False)
    assert values["dino_background"] == pytest.approx(1) and values["clip_i_background"] == pytest.approx(1)
    assert values["dino_subject"] < 1 and values["clip_i_subject"] < 1
    # With every real picture of the subject, all squeezed to 512x512 first.
    edited = case.references[0].resize(case.size)
    mixed, large = suite.measure(case, Edited(edited), False), lambda shown: shown.resize((512, 512), Image.Resampling.BICUBIC)
    for name, network in (("dino", suite.networks.dino), ("clip_i", suite.networks.clip)):
        vector = network.image(large(edited))
        cosines = [metrics.cosine(vector, network.image(large(other))) for other in case.references]
        assert mixed[f"{name}_subject"] == pytest.approx(np.mean(cosines)) and abs(cosines[0] - cosines[1]) > 1e-5
        whole = metrics.cosine(vector, network.image(large(case.source)))
        assert mixed[f"{name}_background"] == pytest.approx(whole)
        unsqueezed = metrics.cosine(network.image(edited), network.image(case.source))
        assert abs(whole - unsqueezed) > 1e-5


def test_subjects_are_generated_as_we_do_and_as_published(
    dreambooth: Path, networks: dict[str, str], miniature_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, call = [], BlipDiffusionPipeline.__call__

    def told(self, *given, **options):
        asked.append((given, options["num_inference_steps"], options["prompt_reps"]))
        return call(self, *given, **options | {"num_inference_steps": 2})

    monkeypatch.setattr(BlipDiffusionPipeline, "__call__", told)
    case = dreambench.DreamBench(Options(data=dreambooth)).case("bear_plushie-01-2")
    editor = Editor.from_pretrained(miniature_folder)
    method, live = METHODS["blip-diffusion"], dreambench.DreamBench(Options(data=dreambooth)).case("dog2-01-0")
    # The miniature's words are short; the call is what counts.
    with pytest.raises(PromptTooLongError):
        method(editor, case)
    ((words, pictures, category, target), steps, repeats) = asked[0]
    assert (words, category, target, steps, repeats) == ("", "stuffed animal", "cube shaped stuffed animal", 100, 1)
    assert pictures == [list(case.references)]
    assert np.array_equal(method(editor, live).image, method(editor, live).image)
    assert asked[-1][0][0::2] == ("wearing a red hat", "dog") and asked[-1][0][3] == "dog"
    # What edits is not asked to generate.
    options = ["--suite", "dreambench", "--data", str(dreambooth), "--clip", networks["clip"], "--dino", networks["dino"]]
    options += ["--count", "1", "--cases", "live", "--methods", "ours,generate-only,blip-diffusion", "--steps", "2"]
    assert run.main([*options, "--model", str(miniature_folder), "--out", str(tmp_path / "out")]) == 0
    rows = read_rows(tmp_path / "out")
    assert [row["method"] for row in rows] == ["generate-only", "blip-diffusion"] and not any("error" in row for row in rows)


def test_photos_need_a_model_for_photos(pie: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run.main(["--suite", "pie", "--data", str(pie), "--out", str(tmp_path / "out")]) == 1
    assert "which the miniature cannot draw; pass --model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_method_that_is_asked_for_nothing_asks_nothing_of_the_model(pie: Path, tmp_path: Path) -> None:
    stable_diffusion_1().save_pretrained(tmp_path / "sd")
    options = ["--suite", "pie", "--data", str(pie), "--clip", "none", "--dino", "none", "--lpips", "none", "--count", "1"]
    options += ["--cases", "change-object", "--methods", "lavis,generate-only", "--steps", "2", "--model", str(tmp_path / "sd")]
    assert run.main([*options, "--out", str(tmp_path / "out")]) == 0
    assert [row["method"] for row in read_rows(tmp_path / "out")] == ["generate-only"]


def test_the_subject_suites_say_what_is_missing_and_where_it_comes_from(dreambooth: Path, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no prompts_and_classes.txt.*google/dreambooth"):
        dreambench.DreamBench(Options(data=tmp_path))
    with pytest.raises(SuiteError, match=r"replacement_source.*tianleliphoebe"):
        dreamedit.DreamEditBench(Options(data=tmp_path))
    (tmp_path / "prompts_and_classes.txt").write_text(LIST)
    with pytest.raises(SuiteError, match="no pictures of backpack, dog2, bear_plushie"):
        dreambench.DreamBench(Options(data=tmp_path))
    (tmp_path / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(SuiteError, match="two lists"):
        dreambench.DreamBench(Options(data=tmp_path))
    (tmp_path / "ref_images" / "dog").mkdir(parents=True)
    with pytest.raises(SuiteError, match=r"no folder dataset or cvpr_dataset.*google/dreambooth"):
        dreamedit.DreamEditBench(Options(data=tmp_path))
    (tmp_path / "cvpr_dataset").symlink_to(dreambooth / "dataset")
    with pytest.raises(SuiteError, match=r"30 pictures are missing, such as backpack/found0.jpg"):
        dreamedit.DreamEditBench(Options(data=tmp_path))
    with pytest.raises(SuiteError, match="backpack-00-0"):
        dreambench.DreamBench(Options(data=dreambooth)).case("backpack")
