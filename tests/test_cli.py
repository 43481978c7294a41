"""The command line from its arguments to its files, exit codes and the two output streams."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from p2p_subject import cli, commands, demo, generation_commands, inverting, progress
from p2p_subject.edits import Blend, EditSpec, Subject, add, remove, swap_subject
from p2p_subject.source import Source
from p2p_subject.training import world


def test_the_command_line_offers_every_inversion_method() -> None:
    assert list(cli.METHODS) == list(inverting.METHODS)


COMMANDS = ("edit", "generate", "interpolate", "stylize", "finetune", "heatmap", "demo", "info")
HEAVY = ("torch", "diffusers", "transformers", "scipy", "numpy", "PIL")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scene, two pictures of a subject and a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    scene = world.draw(world.SceneSpec(world.Look("cat", "google"), world.Pose(0.5, 0.5, 0.5), "grass", 0))
    scene.picture.save(folder / "scene.png")
    for index in range(2):
        Image.fromarray(world.reference(world.Look("dog", "google", 140.0), "new_hue", index)).save(folder / f"dog{index}.png")
    Image.fromarray(scene.mask).save(folder / "mask.png")
    return folder


class Shell:
    """Runs the command line in this process, in a folder of its own, with the random model of the tests."""

    def __init__(self, model: Path, pictures: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.folder, self.capsys = model, folder, capsys
        self.paths = {path.stem: str(path) for path in pictures.iterdir()}

    def __call__(self, *arguments: str, model: Path | None = None) -> tuple[int, str, str]:
        words = [argument.format(**self.paths, tmp=self.folder) for argument in arguments]
        code = cli.main([*words, "--model", str(model or self.model)])
        return code, *self.capsys.readouterr()

    def report(self, *arguments: str) -> dict:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def written(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def shell(miniature_folder, pictures, tmp_path, capsys) -> Shell:
    return Shell(miniature_folder, pictures, tmp_path, capsys)


EDIT = ("edit", "{scene}", "--prompt", "a cat on grass", "--steps", "2", "--out", "{tmp}/out.png")
SWAP = (*EDIT, "--swap", "cat", "--subject", "{dog0}", "--category", "dog")


class TestEdit:
    def test_swap_with_every_output(self, shell):
        extra = ("--mask-out", "{tmp}/mask.png", "--sheet", "{tmp}/sheet.png", "--save-source", "{tmp}/scene.safetensors")
        report = shell.report(*SWAP, "--subject", "{dog1}", *extra)
        assert report["outputs"] == {
            "image": str(shell.folder / "out.png"),
            "mask": str(shell.folder / "mask.png"),
            "sheet": str(shell.folder / "sheet.png"),
            "source": str(shell.folder / "scene.safetensors"),
        }
        assert shell.written() == ["mask.png", "out.png", "scene.safetensors", "sheet.png"]
        assert (report["prompt"], report["source_prompt"]) == ("a dog on grass", "a cat on grass")
        assert (report["command"], report["steps"], report["device"]) == ("edit", 2, "cpu")
        assert report["unet_rows"] > 0 and report["seconds"] > 0
        mask = np.asarray(Image.open(shell.folder / "mask.png"))
        assert report["mask_area"] == pytest.approx((mask > 0).mean())
        with Image.open(shell.folder / "out.png") as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
        # Source, two pictures of the subject, attention to two words, mask, result.
        with Image.open(shell.folder / "sheet.png") as sheet:
            assert sheet.width == 2 * 20 + 7 * 192 + 6 * 12

    def test_a_saved_source_gives_the_same_edit(self, shell):
        shell.report(*SWAP, "--save-source", "{tmp}/scene.safetensors")
        first = (shell.folder / "out.png").read_bytes()
        swap = ("--swap", "cat", "--subject", "{dog0}", "--category", "dog", "--out", "{tmp}/again.png")
        report = shell.report("edit", "{tmp}/scene.safetensors", *swap)
        assert (report["source_prompt"], report["steps"]) == ("a cat on grass", 2)
        assert (shell.folder / "again.png").read_bytes() == first

    def test_an_inversion_is_given_the_seed_and_scale_that_it_goes_by(self, shell):
        made = [("--method", "edit_friendly", "--seed", seed, "--skip", "0.5", "--no-paste") for seed in ("1", "2")]
        pictures = []
        for options in made:
            shell.report(*EDIT, "--target-prompt", "a dog on grass", *options)
            pictures.append((shell.folder / "out.png").read_bytes())
        assert pictures[0] != pictures[1]
        saved = ("--save-source", "{tmp}/scene.safetensors", "--target-prompt", "a dog on grass")
        shell.report(*EDIT, *saved, "--method", "null_text", "--guidance-scale", "6")
        assert Source.load(shell.folder / "scene.safetensors").trajectory.guidance_scale == 6
        with pytest.warns(UserWarning, match="serves guidance_scale=6, which this edit's 2 is not"):
            shell.report("edit", "{tmp}/scene.safetensors", *SWAP[-6:], "--out", "{tmp}/b.png", "--guidance-scale", "2")
        message = "guidance_scale=1 is no guidance, which null-text inversion is for"
        code, _, told = shell(*EDIT, *saved, "--method", "null_text", "--guidance-scale", "1")
        assert code == 2 and message in told

    def test_a_mask_of_the_user_keeps_what_is_outside(self, shell):
        shell.report(*SWAP, "--mask", "{mask}", "--mask-out", "{tmp}/mask.png")
        source, edited, mask = (
            np.asarray(Image.open(path)) for path in (shell.paths["scene"], shell.folder / "out.png", shell.paths["mask"])
        )
        assert (np.asarray(Image.open(shell.folder / "mask.png")) > 0).tolist() == mask.tolist()
        assert (edited[:4] == source[:4]).all() and (edited[mask] != source[mask]).any()

    def test_by_prompt_alone_all_of_the_picture_may_change(self, shell):
        report = shell.report(*EDIT, "--target-prompt", "a dog on grass", "--sheet", "{tmp}/sheet.png")
        assert (report["prompt"], report["mask_area"]) == ("a dog on grass", None)

    def test_options_reach_the_specification(self, shell, monkeypatch):
        seen = {}

        class Recorder:
            def __init__(self, editor):
                self.editor = editor
                self.model, self.invert, self.guidance_scale = editor.model, editor.invert, editor.guidance_scale

            def edit(self, source, spec, **options):
                seen.update(spec=spec, **options)
                return self.editor.edit(source, spec, **options)

        load = commands.load_editor
        monkeypatch.setattr(commands, "load_editor", lambda *arguments: Recorder(load(*arguments)))
        options = ("--cross-replace", "0.2,0.9", "--self-replace", "0.1", "--threshold", "0.5", "--rule", "peak", "--no-paste")
        shell.report(*SWAP, *options, "--room", "0.3", "--guidance-scale", "2", "--negative-prompt", "a tree")
        assert (seen["spec"].cross_replace, seen["spec"].self_replace, seen["spec"].room) == ((0.2, 0.9), (0.0, 0.1), 0.3)
        assert seen["spec"].blend == Blend(rule="peak", threshold=0.5)
        assert (seen["paste"], seen["guidance_scale"], seen["negative_prompt"]) == (False, 2.0, "a tree")
        # A subject is swapped with the settings of swap_subject, an edit by words with those of EditSpec.
        shell.report(*SWAP)
        subject = seen["spec"].subject
        assert seen["spec"] == swap_subject("cat", subject) != EditSpec(swap="cat", subject=subject)
        shell.report(*EDIT, "--remove", "cat", "--target-prompt", "grass", "--mask-out", "{tmp}/mask.png", "--rule", "peak")
        assert seen["spec"] == remove("cat", "grass", blend=Blend(rule="peak")) and "mask.png" in shell.written()
        shell.report(*EDIT, "--remove", "cat", "--target-prompt", "grass", "--mask", "{mask}")
        assert seen["spec"] == remove("cat", "grass") and seen["mask"] is not None
        shell.report(*EDIT, "--add", "dog", "--target-prompt", "a cat and a dog on grass", "--mask-out", "{tmp}/mask.png")
        assert seen["spec"] == add("dog", "a cat and a dog on grass")
        shell.report(*EDIT, "--add", "dog", "--target-prompt", "a cat and a dog", "--weight", "dog=3", "--mask", "{mask}")
        assert seen["spec"] == add("dog", "a cat and a dog", weights={"dog": 3.0}) and seen["mask"] is not None
        shell.report(*EDIT, "--swap", "cat", "--target-prompt", "a bus on grass")
        assert seen["spec"] == EditSpec(prompt="a bus on grass", swap="cat")

    def test_defaults_are_the_librarys_and_help_states_them(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["edit", "--help"])
        told = " ".join(capsys.readouterr().out.split())
        spec = EditSpec(prompt="a dog")
        assert (spec.cross_replace, spec.self_replace, spec.blend.rule) == ((0.0, 0.8), (0.0, 0.4), "share")
        swap = swap_subject("cat", Subject(Image.new("RGB", (8, 8)), "dog"))
        assert (swap.cross_replace, swap.self_replace, spec.room, swap.room) == ((0.0, 0.2), (0.0, 0.2), 0.0, 0.5)
        gone = remove("cat", "grass")
        assert gone.cross_replace == gone.self_replace == (0.0, 0.0)
        windows = ("(0.8; subjects: 0.2; --remove: 0)", "(0.4; subjects: 0.2; --remove: 0)")
        for default in (*windows, "(0; subjects: 0.5)", "(default share)", "take out what WORD of the prompt shows"):
            assert default in told

    @pytest.mark.parametrize("terminal", [False, True])
    def test_progress_shows_on_a_terminal_only(self, shell, monkeypatch, terminal):
        bar = progress.tqdm
        monkeypatch.setattr(progress, "tqdm", lambda *given, **options: bar(*given, **(options | {"delay": 0})))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        code, _, err = shell(*SWAP)
        assert code == 0 and ("inverting" in err and "editing" in err if terminal else err == "")

    def test_text_for_people(self, shell):
        code, out, err = shell(*SWAP)
        assert (code, err) == (0, "")
        first, *files = out.splitlines()
        assert first.startswith("'a cat on grass' -> 'a dog on grass'; ") and files == [f"image: {shell.folder / 'out.png'}"]


class TestControl:
    """A control picture, or the kind of it; the miniature's own ControlNet unless another is named."""

    @pytest.fixture
    def control(self, edges_folder) -> tuple[str, ...]:
        return ("--controlnet", str(edges_folder), "--steps", "1", "--out", "{tmp}/out.png")

    def test_edit_under_the_structure_of_the_picture_and_again_from_the_saved_source(self, shell, control):
        edit = ("--target-prompt", "a dog on grass", *control)
        first = ("edit", "{scene}", "--prompt", "a cat on grass", "--control", "canny", "--control-strength", "0.5")
        report = shell.report(*first, "--save-source", "{tmp}/s.safetensors", *edit)
        assert report["control_strength"] == 0.5
        pixels = (shell.folder / "out.png").read_bytes()
        assert shell.report("edit", "{tmp}/s.safetensors", *edit)["control_strength"] == 0.5
        assert (shell.folder / "out.png").read_bytes() == pixels
        shell.report("heatmap", "{tmp}/s.safetensors", "--words", "cat", *control)
        code, _, err = shell("edit", "{tmp}/s.safetensors", "--control", "canny", *edit)
        assert code == 2 and "keeps to the structure that it was made with; leave --control out" in err

    def test_generate_along_a_drawing_or_one_made_from_a_picture(self, shell, control):
        from p2p_subject import control_image

        control_image(Image.open(shell.paths["scene"]), "canny").save(shell.folder / "edges.png")
        made = []
        for given in ("{tmp}/edges.png", "canny:{scene}", "scribble:{scene}"):
            shell.report("generate", "a dog", "--seed", "3", "--control", given, *control)
            made.append((shell.folder / "out.png").read_bytes())
        assert made[0] == made[1] != made[2]

    def test_a_strip_keeps_to_one_structure(self, shell, control):
        strip = ("interpolate", "a dog", "--subject", "{dog0}", "--to", "{dog1}", "--category", "dog", "--frames", "2")
        report = shell.report(*strip, "--seed", "3", "--control", "canny:{scene}", "--control-strength", "0.5", *control)
        assert report["control_strength"] == 0.5

    def test_stylize(self, shell, control):
        style = ("--style", "{dog0}", "--style", "{dog1}", "--category", "dog", "--prompt", "a bell on sand", "--seed", "1")
        report = shell.report("stylize", "{scene}", *style, *control)
        assert (report["command"], report["prompt"], report["control_strength"]) == ("stylize", "a bell on sand", 1.0)
        first = (shell.folder / "out.png").read_bytes()
        shell.report("stylize", "{scene}", *style, "--control", "scribble", "--control-strength", "2", *control)
        assert (shell.folder / "out.png").read_bytes() != first
        code, _, err = shell("stylize", "{scene}", "--style", "{dog0}", "--prompt", "a bell", *control)
        assert code == 2 and "--category" in err

    def test_the_miniature_has_its_own(self, shell, control, miniature_folder, edges_folder, monkeypatch):
        monkeypatch.setattr("p2p_subject.loading.miniature_folder", lambda: miniature_folder)
        monkeypatch.setattr("p2p_subject.models.miniature_folder", lambda: miniature_folder)
        monkeypatch.setattr("p2p_subject.controlnets.edges_folder", lambda: edges_folder)
        scene, out = shell.paths["scene"], str(shell.folder / "own.png")
        common = ("--control", f"canny:{scene}", "--seed", "3", "--steps", "1", "--out", out)
        assert cli.main(["generate", "a dog", *common]) == 0
        shell.capsys.readouterr()
        shell.report("generate", "a dog", "--seed", "3", "--control", "canny:{scene}", *control)
        assert (shell.folder / "own.png").read_bytes() == (shell.folder / "out.png").read_bytes()

    @pytest.mark.parametrize(
        "arguments",
        [
            ("edit", "{tmp}/own.png", "--prompt", "a cat", "--target-prompt", "a dog"),
            ("edit", "{scene}", "--prompt", "a cat", "--target-prompt", "a dog", "--mask", "{tmp}/own.png"),
            ("generate", "a dog", "--subject", "{dog0}", "--subject", "{tmp}/own.png", "--category", "dog"),
            ("generate", "a dog", "--control", "canny:{tmp}/./own.png"),
            ("interpolate", "a dog", "--subject", "{dog0}", "--category", "dog", "--to", "{tmp}/own.png"),
            ("stylize", "{tmp}/own.png", "--style", "{dog0}", "--category", "dog", "--prompt", "a bell"),
            ("heatmap", "{tmp}/own.png", "--prompt", "a cat", "--words", "cat"),
        ],
    )
    def test_a_command_does_not_replace_what_it_reads(self, shell, monkeypatch, arguments):
        monkeypatch.setattr(commands, "load_editor", lambda *_: pytest.fail("a model was loaded"))
        own = shell.folder / "own.png"
        own.write_bytes(Path(shell.paths["scene"]).read_bytes())
        code, _, err = shell(*arguments, "--out", "{tmp}/own.png")
        assert code == 2 and "own.png' is read by the same command" in err
        assert own.read_bytes() == Path(shell.paths["scene"]).read_bytes()

    @pytest.mark.parametrize("output", ["--sheet", "--mask-out"])
    def test_nor_does_any_of_its_outputs(self, shell, output):
        code, _, err = shell(*EDIT, "--swap", "cat", "--target-prompt", "a dog on grass", output, "{scene}")
        assert code == 2 and "is read by the same command" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("generate", "a dog", "--controlnet", "x"), "--controlnet without a control picture; add"),
            (("generate", "a", "--control-strength", "1", "--controlnet", "x"), "--control-strength and --controlnet without"),
            (("generate", "a dog", "--control", "canny"), "no picture to make it of"),
            (("generate", "a dog", "--control", "cany"), "Did you mean 'canny'?"),
            (("generate", "a dog", "--control", "canny:nowhere.png"), "there is no such file"),
            (("generate", "a dog", "--control", "depth:{scene}"), "takes more than a picture"),
            (("generate", "a dog", "--control-strength", "-1"), "--control-strength: '-1'; expected a number of 0 or more"),
            (("stylize", "no.png", "--style", "{dog0}", "--category", "dog", "--prompt", "a bell"), "structure 'no.png'"),
        ],
    )
    def test_what_is_wrong_is_said_before_a_model_is_loaded(self, shell, monkeypatch, arguments, message):
        monkeypatch.setattr(commands, "load_editor", lambda *_: pytest.fail("a model was loaded"))
        code, _, err = shell(*arguments, "--out", "{tmp}/out.png")
        assert code == 2 and message in err and err.count("\n") == 1

    def test_a_model_without_a_controlnet_says_so(self, shell):
        code, _, err = shell("generate", "a dog", "--control", "{scene}", "--out", "{tmp}/out.png")
        assert code == 2 and "carries no ControlNet" in err


class TestOtherCommands:
    def test_generate_reproduces_bit_for_bit_from_the_seed_it_tells(self, shell):
        generate = ("generate", "a dog on grass", "--subject", "{dog0}", "--category", "dog", "--steps", "2")
        first = shell.report(*generate, "--out", "{tmp}/a.png", "--save-source", "{tmp}/a.safetensors")
        again = shell.report(*generate, "--out", "{tmp}/b.png", "--seed", str(first["seed"]))
        other = shell.report(*generate, "--out", "{tmp}/c.png", "--seed", str(first["seed"] + 1))
        a, b, c = ((shell.folder / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
        assert a == b != c
        assert (again["seed"], other["seed"]) == (first["seed"], first["seed"] + 1)
        edited = shell.report("edit", "{tmp}/a.safetensors", "--target-prompt", "a cat on grass", "--out", "{tmp}/d.png")
        assert edited["source_prompt"] == "a dog on grass"

    def test_heatmap_has_a_panel_for_each_word(self, shell):
        prompt = ("--prompt", "a cat and a cat on grass", "--steps", "2", "--out", "{tmp}/heat.png")
        report = shell.report("heatmap", "{scene}", *prompt, "--words", "cat#1", "grass", "--rule", "share")
        assert report["words"] == ["cat#1", "grass"]
        with Image.open(shell.folder / "heat.png") as sheet:
            assert sheet.width == 2 * 20 + 3 * 192 + 2 * 12

    def test_demo_writes_a_sheet_and_every_picture(self, shell):
        report = shell.report("demo", "--out", "{tmp}/deep/demo", "--steps", "2")
        names = ("edited", "heatmap", "mask", "source", "subject", "truth")
        pictures = [f"deep/demo/row-{row}/{name}.png" for row in (1, 2, 3, 4) for name in names]
        assert shell.written() == sorted([*pictures, "deep/demo/sheet.png"])
        assert report["seed"] == 0 and report["outputs"]["sheet"] == str(shell.folder / "deep/demo/sheet.png")
        for row, told in enumerate(report["edits"], 1):
            assert told["word"] != told["category"] and told["category"] in told["target_prompt"]
            with Image.open(shell.folder / f"deep/demo/row-{row}/edited.png") as image:
                assert image.size == (64, 64)

    def test_demo_scenes_are_held_out_and_follow_from_the_seed(self):
        chosen = [(scene, look) for seed in range(20) for scene, look, _ in demo.choose(seed)]
        assert chosen == [(scene, look) for seed in range(20) for scene, look, _ in demo.choose(seed)]
        assert len({scene for scene, _ in chosen}) == len(chosen)
        for scene, look in chosen:
            assert look.category != scene.look.category
            assert any(low <= look.hue <= high for low, high in world.HELD_OUT_HUES)

    def test_info(self, shell):
        report = shell.report("info")
        assert (report["device"], report["picture"], report["latent"]) == ("cpu", [64, 64], [4, 16, 16])
        assert report["folder"] == str(shell.model) and report["devices"][-1] == "cpu"
        assert report["parameters"] == sum(network["parameters"] for network in report["networks"].values()) > 10**6
        assert {"torch", "diffusers", "transformers", "python", "p2p_subject"} <= report["versions"].keys()
        _, out, _ = shell("info")
        assert f"{report['parameters']:,}" in out and "UNet2DConditionModel" in out


def without(name: str, arguments: tuple[str, ...] = SWAP) -> tuple[str, ...]:
    """The arguments without an option and its value."""
    at = arguments.index(name)
    return arguments[:at] + arguments[at + 2 :]


MISTAKES = {
    "no such picture": ("ImageError", "no such file", ("edit", "nowhere.png", *SWAP[2:])),
    "no such subject": ("ImageError", "no such file", (*SWAP, "--subject", "nowhere.png")),
    "no such saved source": ("TrajectoryError", "no such file", ("edit", "a.safetensors", *SWAP[2:])),
    "misspelt word": ("WordNotFoundError", "Did you mean 'cat'?", (*SWAP, "--swap", "cats")),
    "word occurs twice": ("AmbiguousWordError", "WORD#INDEX", (*SWAP, "--prompt", "a cat and a cat")),
    "no such occurrence": ("WordNotFoundError", "no occurrence 3", (*SWAP, "--swap", "cat#3")),
    "long prompt": ("PromptTooLongError", "Shorten the prompt", (*SWAP, "--prompt", "a cat " * 20)),
    "long negative prompt": ("PromptTooLongError", "Shorten the prompt", (*SWAP, "--negative-prompt", "a cat " * 20)),
    "no prompt": ("PromptError", "needs --prompt", without("--prompt")),
    "no steps": ("StepsError", "between 1 and ", (*SWAP, "--steps", "0")),
    "suffix": ("OutputError", "unknown suffix '.txt'", (*SWAP, "--out", "{tmp}/out.txt")),
    "suffix of the source": ("OutputError", "use .safetensors", (*SWAP, "--save-source", "{tmp}/a.pt")),
    "no such folder": ("OutputError", "create it first", (*SWAP, "--out", "{tmp}/missing/out.png")),
    "one file for two": ("OutputError", "name one for each", (*SWAP, "--mask-out", "{tmp}/out.png")),
    "empty category": ("SubjectError", "category=''", (*SWAP, "--category", "")),
    "no category": ("SubjectError", "expected the word", without("--category")),
    "no subject": ("SubjectError", "add --subject", without("--subject")),
    "subject without a place": ("EditSpecError", "no word for it", (*without("--swap"), "--target-prompt", "a dog")),
    "nothing to do": ("EditSpecError", "needs a prompt", EDIT),
    "removal and swap": ("EditSpecError", "leave --swap and --subject and --category out", (*SWAP, "--remove", "cat")),
    "removal and category": ("EditSpecError", "leave --category out", (*EDIT, "--remove", "cat", "--category", "dog")),
    "removal and room": ("EditSpecError", "leave --room out", (*EDIT, "--remove", "cat", "--room", "0.5")),
    "removal and addition": ("EditSpecError", "leave --remove out", (*EDIT, "--remove", "cat", "--add", "dog")),
    "addition of what": ("PromptError", "the picture with it", (*EDIT, "--add", "dog")),
    "addition to no prompt": ("WordNotFoundError", "'dog'", (*EDIT, "--add", "dog", "--target-prompt", "a cat on grass")),
    "removal of what to leave what": ("PromptError", "what is left", (*EDIT, "--remove", "cat")),
    "mask of nothing": ("OutputError", "there is no mask", (*EDIT, "--target-prompt", "a dog", "--mask-out", "{tmp}/m.png")),
    "colours as mask": ("MaskError", "expected grey", (*SWAP, "--mask", "{scene}")),
    "threshold": ("EditSpecError", "threshold", (*SWAP, "--threshold", "nan")),
    "rule without a word": ("EditSpecError", "give one and no --mask", (*EDIT, "--target-prompt", "a dog", "--rule", "peak")),
    "rule beside a mask": ("EditSpecError", "no --mask", (*SWAP, "--mask", "{mask}", "--threshold", "0.5", "--rule", "peak")),
    "window": ("EditSpecError", "start <= stop", (*SWAP, "--cross-replace", "0.5,0.2")),
    "room": ("UsageError", "'2'; expected a share", (*SWAP, "--room", "2")),
    "room without a word": ("EditSpecError", "give one and no --mask", (*EDIT, "--target-prompt", "a bus", "--room", "0.5")),
    "room and a mask": ("EditSpecError", "--room shape the mask of a word", (*SWAP, "--mask", "{dog0}", "--room", "0.5")),
    "share": ("UsageError", "'1.5'; expected a share", (*SWAP, "--cross-replace", "1.5")),
    "scale": ("UsageError", "expected a number of 0 or more", (*SWAP, "--guidance-scale", "nan")),
    "seed": ("UsageError", "'-1'; expected a whole number", (*SWAP, "--seed", "-1")),
    "number": ("UsageError", "argument --steps", (*SWAP, "--steps", "few")),
    "device": ("ModelError", "available: ", (*SWAP, "--device", "abacus")),
    "unknown option": ("UsageError", "unrecognized arguments: --swop", (*SWAP, "--swop", "cat")),
    "missing option": ("UsageError", "required: --out", without("--out", EDIT)),
    "article for a subject": ("PromptError", "with an article", ("generate", "", *SWAP[-4:], "--out", "{tmp}/out.png")),
    "word of a heat map": (
        "WordNotFoundError", "Did you mean 'grass'", (*without("--steps", EDIT), "--words", "cat", "gras"),
    ),
    "file as folder": ("OutputError", "cannot make the folder", ("demo", "--out", "{scene}")),
    "source without a folder": ("OutputError", "create it first", (*SWAP, "--save-source", "{tmp}/missing/a.safetensors")),
}  # fmt: skip


class TestMistakes:
    @pytest.mark.parametrize("name", MISTAKES)
    def test_one_line_code_2_nothing_run_and_nothing_written(self, shell, monkeypatch, name):
        error, message, arguments = MISTAKES[name]
        if name == "word of a heat map":
            arguments = ("heatmap", *arguments[1:])

        def run(*_):
            raise AssertionError("a network ran")

        monkeypatch.setattr("p2p_subject.models.Model.noise", run)
        monkeypatch.setattr("p2p_subject.models.Model.encode_images", run)
        code, out, err = shell(*arguments, "--json")
        assert code == 2
        assert err.startswith("p2p-subject: error: ") and err.count("\n") == 1 and message in err
        told = json.loads(out)
        assert told["error"] == error and message in told["message"]
        assert shell.written() == []

    @pytest.mark.parametrize("name", ["edit", "generate"])
    def test_a_folder_that_takes_no_file_is_refused_before_the_work(self, shell, monkeypatch, name):
        def refuse(*_, dir, **__):
            if dir.name == "locked":
                raise OSError(30, "Read-only file system")
            return nullcontext()

        # Simulated, because a superuser may write nearly anywhere.
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        for module in (commands, generation_commands):
            monkeypatch.setattr(module, "load_editor", lambda *_: pytest.fail("a model was loaded"))
        (shell.folder / "locked").mkdir()
        command = {"edit": SWAP, "generate": ("generate", "a dog", "--out", "{tmp}/out.png")}[name]
        code, _, err = shell(*command, "--save-source", "{tmp}/locked/a.safetensors")
        assert code == 2 and "locked" in err and "Read-only file system" in err and err.count("\n") == 1

    def test_a_full_disk_is_one_line(self, shell, monkeypatch):
        def fail(*_, **__):
            raise SafetensorError("No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        code, out, err = shell(*SWAP, "--save-source", "{tmp}/a.safetensors", "--json")
        assert code == 2 and json.loads(out)["error"] == "OutputError"
        assert "No space left" in err and err.count("\n") == 1

    @pytest.mark.parametrize("taken", ["demo/row-3", "demo/row-2/edited.png"])
    def test_every_place_of_the_demo_is_checked_before_the_work(self, shell, monkeypatch, taken):
        monkeypatch.setattr(demo, "load_editor", lambda *_: pytest.fail("a model was loaded"))
        place = shell.folder / taken
        if place.suffix:
            place.mkdir(parents=True)
        else:
            place.parent.mkdir()
            place.touch()
        code, _, err = shell("demo", "--out", "{tmp}/demo")
        assert code == 2 and place.name in err and err.count("\n") == 1

    def test_without_json_stdout_stays_empty(self, shell):
        code, out, err = shell(*SWAP, "--swap", "cats")
        assert (code, out) == (2, "") and "Did you mean 'cat'?" in err

    def test_folder_that_is_no_model(self, shell):
        code, _, err = shell("info", model=shell.folder)
        assert code == 2 and "model_index.json" in err and err.count("\n") == 1

    def test_weights_are_words_and_numbers(self, shell):
        for bad, told in (("cat", "'cat'"), ("=2", "'=2'"), ("cat=much", "'much'"), ("cat=inf", "'inf'"), ("cat=nan", "'nan'")):
            code, _, err = shell("edit", "{scene}", "--prompt", "a cat", "--weight", bad, "--out", "{tmp}/o.png")
            assert code == 2 and f"argument --weight: {told}; expected a" in err

    def test_a_saved_source_keeps_its_method(self, shell):
        kept = ("edit", "{scene}", "--prompt", "a cat on grass", "--weight", "cat=2", "--method", "negative_prompt")
        assert shell(*kept, "--steps", "2", "--out", "{tmp}/a.png", "--save-source", "{tmp}/s.safetensors")[0] == 0
        again = ("edit", "{tmp}/s.safetensors", "--weight", "cat=2", "--out", "{tmp}/b.png")
        assert shell(*again)[0] == 0
        code, _, err = shell(*again, "--method", "direct")
        assert code == 2 and "was made by 'negative_prompt', not 'direct'; leave --method out" in err

    def test_a_saved_source_knows_its_prompt_and_steps(self, shell):
        shell.report(*SWAP, "--save-source", "{tmp}/scene.safetensors")
        edit = ("edit", "{tmp}/scene.safetensors", "--target-prompt", "a dog on grass", "--out", "{tmp}/b.png")
        for extra, message in ((("--prompt", "a dog"), "leave --prompt out"), (("--steps", "3"), "leave --steps out")):
            code, _, err = shell(*edit, *extra)
            assert code == 2 and message in err

    def test_interrupted(self, shell, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("p2p_subject.editor.Editor.edit", interrupt)
        code, out, err = shell(*SWAP, "--json")
        assert code == 130 and json.loads(out)["error"] == "KeyboardInterrupt" and err.count("\n") == 1
        assert shell.written() == []

    def test_what_is_not_the_users_fault_keeps_its_traceback(self, shell, monkeypatch):
        def fail(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr("p2p_subject.editor.Editor.edit", fail)
        with pytest.raises(ZeroDivisionError):
            shell(*SWAP)


class TestDevices:
    def test_the_first_accelerator_is_the_default(self, monkeypatch):
        loaded = []
        monkeypatch.setattr("p2p_subject.editor.Editor.from_pretrained", lambda name, **given: loaded.append(given["device"]))
        monkeypatch.setattr(commands, "devices", lambda: ["cuda:0", "cuda:1", "cpu"])
        for asked in (None, "cuda", "cuda:1", "cpu"):
            commands.load_editor(Namespace(model=None, dtype="float32", device=asked))
        assert loaded == ["cuda:0", "cuda", "cuda:1", "cpu"]


class TestProcess:
    @pytest.mark.parametrize(
        "arguments",
        [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)],
    )
    def test_help_imports_nothing_heavy(self, arguments):
        code = (
            "import sys; from p2p_subject.cli import main\n"
            "try: main(sys.argv[1:])\n"
            f"except SystemExit as end: print(end.code, [m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "0 []" and "p2p-subject" in done.stdout

    def test_in_a_pipe_there_is_one_object_on_stdout_and_nothing_on_stderr(self, shell):
        words = [argument.format(**shell.paths, tmp=shell.folder) for argument in SWAP]
        command = [sys.executable, "-m", "p2p_subject", *words, "--model", str(shell.model), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == "" and json.loads(done.stdout)["prompt"] == "a dog on grass"


class TestSeveralPictures:
    GENERATE = ("generate", "a dog on grass", "--subject", "{dog0}", "--category", "dog", "--steps", "2", "--seed", "3")
    DOG = ("--subject", "{dog0}", "--category", "dog", "--steps", "2")
    STRIP = ("interpolate", "a {{category}} on grass", *DOG, "--to", "{dog1}")

    def test_pictures_of_one_seed_after_another_go_to_numbered_files(self, shell) -> None:
        report = shell.report(*self.GENERATE, "--count", "5", "--out", "{tmp}/dog.png")
        assert shell.written() == [f"dog_{k}.png" for k in range(1, 6)] and len(report["outputs"]) == 5
        shell.report(*self.GENERATE[:-1], "4", "--out", "{tmp}/alone.png")
        second, alone = (np.asarray(Image.open(shell.folder / name), int) for name in ("dog_2.png", "alone.png"))
        # In one batch with others, sums of float32 may round otherwise.
        assert np.abs(second - alone).max() <= 1

    def test_a_strip_goes_from_one_subject_to_the_other(self, shell) -> None:
        report = shell.report(*self.STRIP, "--to-category", "cat", "--frames", "5", "--spherical", "--out", "{tmp}/strip.png")
        assert report["amounts"] == [0, 0.25, 0.5, 0.75, 1]
        assert report["prompts"] == ["a dog on grass"] * 2 + ["a cat on grass"] * 3
        width, height = Image.open(shell.folder / "strip.png").size
        assert width > 5 * height

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((*GENERATE, "--count", "0"), "a whole number from 1 to 1000"),
            ((*GENERATE, "--count", "2", "--save-source", "{tmp}/s.safetensors"), "--save-source keeps one generation"),
            ((*STRIP, "--frames", "x"), "a whole number from 1 to 1000"),
            (("interpolate", "a dog", "--subject", "{dog0}", "--category", "dog", "--to", "no.png"), "there is no such file"),
            (("interpolate", "a dog", "--subject", "{dog0}", "--to", "{dog1}"), "--category"),
        ],
    )
    def test_wrong_arguments_write_nothing(self, shell, arguments, message: str) -> None:
        code, _, err = shell(*arguments, "--out", "{tmp}/out.png")
        assert code == 2 and message in err and shell.written() == []
