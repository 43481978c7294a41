"""What the tests share: where the golden values are, and what takes long to make."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from p2p_subject import Editor, Source, Subject

# The tests' networks are tiny: threads would only wait for each other, for minutes where a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# numba's as well, which a test may start: they would set the number of torch's in the main thread alone, and another number
# means other kernels, so that results differ from those of other threads in their last bits.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

_TESTS = Path(__file__).resolve().parent


def golden_dir() -> Path | None:
    """Return the folder of golden values: named by P2P_SUBJECT_GOLDEN, beside the repository, or the few within it."""
    named = os.environ.get("P2P_SUBJECT_GOLDEN")
    if named and not Path(named).is_dir():
        pytest.fail(f"P2P_SUBJECT_GOLDEN names {named!r}, which is no folder")
    places = (_TESTS.parents[1] / "shared" / "golden", _TESTS / "data" / "golden")
    return Path(named) if named else next((place for place in places if place.is_dir()), None)


def golden(path: str) -> Path:
    """Return a golden file or folder, or skip the test that needs it."""
    folder = golden_dir()
    if folder is None or not (folder / path).exists():
        pytest.skip(f"golden values {path!r} are not here: {folder or 'no folder of golden values'} lacks them")
    return folder / path


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Benchmarks set the number of threads of their process; give it back."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def miniature_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the miniature's layout and sizes, with random weights."""
    # Imported here, so that tests that need no model do not wait for diffusers.
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from p2p_subject.training import export, miniature, vae

    folder = tmp_path_factory.mktemp("miniature")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(**vae.CONFIG).save_pretrained(folder / "parts" / "vae")
        save_file(torch.nn.ModuleDict(miniature.networks()).state_dict(), folder / "parts" / "ema.safetensors")
    model = folder / "model"
    export.export(folder / "parts", folder / "parts" / "vae", model, torch.float32)
    return model


@pytest.fixture(scope="session")
def edges_folder(miniature_folder: Path) -> Path:
    """A ControlNet with random weights in the sizes of the miniature's own: four pixels a side of a latent."""
    from diffusers import UNet2DConditionModel
    from tiny_pipelines import controlnet

    folder = miniature_folder.parent / "edges"
    unet = UNet2DConditionModel.from_pretrained(miniature_folder / "unet")
    controlnet(unet, halvings=2).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def editor(miniature_folder: Path) -> Editor:
    """An editor of the model with random weights."""
    from p2p_subject import Editor

    return Editor.from_pretrained(miniature_folder)


@pytest.fixture(scope="module")
def source(editor: Editor) -> Source:
    """A picture that the editor inverted, of "a cat on grass"."""
    from tests.editing import STEPS, picture

    return editor.invert(picture(), "a cat on grass", steps=STEPS)


@pytest.fixture(scope="module")
def dog() -> Subject:
    """A subject to swap in."""
    from p2p_subject import Subject
    from tests.editing import picture

    return Subject(picture(seed=1), "dog")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of a user's methods, found by new processes as well."""
    from tests.benchmarking import MINE

    (tmp_path / "my_methods.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def everything(miniature_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every method on a swap and a change of words, 3 steps of a random model."""
    import torch

    from benchmarks import run
    from benchmarks.methods import METHODS
    from tests.benchmarking import settings_of

    out, threads = tmp_path_factory.mktemp("runs") / "all", torch.get_num_threads()
    run.measure(settings_of(miniature_folder, out, ",".join(METHODS), count=1, kinds=("swap", "replace")))
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures with captions and masks, to train on."""
    from tests.picture_folders import make_folder

    pytest.importorskip("pymatting")
    return make_folder(tmp_path_factory.mktemp("pictures") / "set")


@pytest.fixture(scope="session")
def cutouts(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cut-outs of `pictures`."""
    from p2p_subject.training.cutout_cache import make_cutouts
    from p2p_subject.training.listing import read_folder

    cache = tmp_path_factory.mktemp("cutouts")
    report = make_cutouts(read_folder(pictures), cache)
    assert report.made == {"mask": 4, "alpha": 1} and not report.skipped
    return cache
