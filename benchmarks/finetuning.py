"""Fidelity to a subject against steps of fine-tuning: from its embedding (ours), DreamBooth, Textual Inversion.

    python -m benchmarks.finetuning --subjects 6 --out runs/finetuning --processes 2

Subjects are drawings that the model was not trained on (split "new_art"), each given by a few views. All methods see the same
views in the same order, the same noise, timesteps, batch and optimiser ("dreambooth prior" as many pictures of the category
again), and are asked for the same pictures from the same seeds, which the independent judge sees. Learning rates: see
`benchmarks.finetuning_methods`; `--tune` compares them, on other drawings than the reported ones. A run that was stopped goes
on when its command is given again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import machine
from benchmarks.finetuning_methods import METHODS, encoded
from benchmarks.finetuning_report import plot, tables
from benchmarks.judge import Judge, marks, to_batch
from p2p_subject.context import Context
from p2p_subject.drawing import sample_contexts
from p2p_subject.finetuning.pictures import Views, encode, read_pictures
from p2p_subject.finetuning.prior import Prior
from p2p_subject.finetuning.result import with_unet
from p2p_subject.finetuning.trainer import Trainer
from p2p_subject.models import Model
from p2p_subject.outputs import atomic_write, save_image
from p2p_subject.training import world
from p2p_subject.viz import contact_sheet

Row = dict[str, Any]
MILESTONES = (0, 20, 40, 80, 120, 200, 300, 400, 600, 800, 1000)
"""Steps after which pictures are drawn, by default."""
ART = tuple(sorted(world.HELD_OUT_ART))
TUNING = 3
"""How many of the held-out drawings rates are chosen on; the others are reported."""
RANK = 8


@dataclass(frozen=True)
class Settings:
    """What is run: model (None: the miniature), views a subject, pictures a milestone, sampling steps, rank, generated pictures
    of the category for methods that learn those, and the steps after which pictures are drawn."""

    model: str | None = None
    views: int = 4
    pictures: int = 12
    sampling: int = 25
    rank: int = RANK
    prior: int = 48
    milestones: tuple[int, ...] = MILESTONES


@dataclass(frozen=True)
class Case:
    """One run of one method: the rate is of the weights that the method trains, None the method's own."""

    method: str
    subject: int
    seed: int
    rate: float | None = None
    tuning: bool = False

    @property
    def name(self) -> str:
        """Name of the file of its rows."""
        kind = f"{'tuning' if self.tuning else 'subject'}{self.subject}"
        rate = "" if self.rate is None else f"_{self.rate:g}"
        return f"{self.method.replace(' ', '-')}{rate}_{kind}_seed{self.seed}"


def look_of(index: int, tuning: bool = False) -> world.Look:
    """Subject number `index`: a held-out drawing in its natural colours or a hue of its own; tuning has drawings of its own."""
    art = ART[:TUNING] if tuning else ART[TUNING:]
    category, _ = art[index % len(art)]
    return world.sample_look("new_art", np.random.default_rng((index, tuning)), category=category)


def pictures_of(look: world.Look, index: int, count: int, held_out: bool = False) -> list[Image.Image]:
    """Views of a subject on backgrounds of their own; those held out are others than those that are learned."""
    first = 10_000 + 1000 * index + (500 if held_out else 0)
    return [Image.fromarray(world.reference(look, "new_art", first + at)) for at in range(count)]


OURS_MOST = 120
"""Steps of ours: the most that the paper takes."""


class Bench:
    """Model and judge of one process."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self.settings, self.judge = settings, Judge.load()
        self.model = Model.load(settings.model)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """The judge's features of pictures, (B, F) of length 1; it has never seen a generated picture."""
        with torch.no_grad():
            found = self.judge.network.body(to_batch(images))
        return F.normalize(torch.cat([found.mean((2, 3)), found.amax((2, 3))], 1))

    def measured(self, images: Sequence[Image.Image], look: world.Look, grounds: Sequence[str], real: Tensor) -> Row:
        """Shares of right pictures, and `likeness`, the mean cosine of their features to those of held-out views."""
        each = [marks(verdict, look, ground) for verdict, ground in zip(self.judge.verdicts(images), grounds, strict=True)]
        names = {"fidelity": "both", "category": "category", "look": "look", "background": "background"}
        shares = {name: float(np.mean([one[mark] for one in each])) for name, mark in names.items()}
        return shares | {"likeness": float((self.features(images) @ real.T).mean())}


bench_of = cache(Bench)
"""The bench of this process, loaded once."""


def milestones(method: str, settings: Settings) -> list[int]:
    """The steps at which a method is measured."""
    return [step for step in settings.milestones if step <= OURS_MOST or not method.startswith("ours")]


def run_case(settings: Settings, case: Case, out: Path) -> None:
    """Run a case and write its rows, and a sheet of its pictures, milestone by milestone."""
    bench, path = bench_of(settings), out / "rows" / f"{case.name}.jsonl"
    model, look = bench.model, look_of(case.subject, case.tuning)
    views = pictures_of(look, case.subject, settings.views)
    real = bench.features(pictures_of(look, case.subject, 16, held_out=True))
    grounds = [world.BACKGROUNDS[at % len(world.BACKGROUNDS)] for at in range(settings.pictures)]
    phrases, seeds = [world.PHRASES[ground] for ground in grounds], range(settings.pictures)
    build, options, own_rate = METHODS[case.method]
    rate = own_rate if case.rate is None else case.rate

    clock = Clock()
    learner = build(model, look, views, rate=rate, rank=settings.rank, seed=case.seed, **options)
    sets = [Views(encode(model, read_pictures(views, "views")), ("",), learner.contexts)]
    if learner.prior is not None:
        made = Prior(None, settings.prior).pictures(model, world.with_article(look.category), None)
        sets.append(Views(encode(model, made), ("",), learner.prior))
    trainer = Trainer(
        unet=learner.unet,
        groups=learner.groups,
        sets=sets,
        scheduler=model.noise_levels(),
        seed=case.seed,
    )
    clock.stop()
    tuned = with_unet(model, learner.unet)
    rows, panels = [], [[("given", view) for view in views]]
    for step in range(milestones(case.method, settings)[-1] + 1):
        if step in milestones(case.method, settings):
            with torch.no_grad():
                told, away = (Context(tokens) for tokens in (learner.contexts(phrases), encoded(model, learner.encoder, [""])))
                images = sample_contexts(tuned, told, seeds, settings.sampling, model.guidance_scale, away)
            spent = {"seconds": clock.wall, "cpu_seconds": clock.cpu, "unet_rows": trainer.calls, "steps": step}
            known = asdict(case) | {"rate": rate, "category_word": look.category, "source": look.source, "hue": look.hue}
            rows.append(known | spent | bench.measured(images, look, grounds, real))
            panels.append([(f"step {step}, {phrase}", image) for phrase, image in zip(phrases, images)][:8])
        if step < milestones(case.method, settings)[-1]:
            with clock:
                trainer.step(step)
    save_image(contact_sheet(panels, panel=96, title=case.name), out / "sheets" / f"{case.name}.png")
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


class Clock:
    """Seconds spent, of the wall and of this process; runs from the start, and then within `with` blocks."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.__enter__()

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def stop(self, *_: object) -> None:
        """Stop counting."""
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]

    __exit__ = stop


def ceiling(settings: Settings, subjects: Sequence[int], tuning: bool) -> Row:
    """The judge on real scenes of the subjects, as the autoencoder gives them back: what a perfect method would get."""
    bench, rows = bench_of(settings), []
    for index in subjects:
        look = look_of(index, tuning)
        specs = [world.sample("test", 100 * index + at).with_look(look) for at in range(settings.pictures)]
        images = [world.draw(spec).picture for spec in specs]
        rebuilt = bench.model.decode(bench.model.encode_images(images))
        real = bench.features(pictures_of(look, index, 16, held_out=True))
        rows.append(bench.measured(rebuilt, look, [spec.background for spec in specs], real))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def run(settings: Settings, cases: Sequence[Case], out: Path, processes: int) -> None:
    """Run the cases that have no rows yet, in `processes` processes of one thread (1: in this one)."""
    left = [case for case in cases if not (out / "rows" / f"{case.name}.jsonl").exists()]
    with tqdm(total=len(cases), initial=len(cases) - len(left), desc="cases", disable=None) as bar:
        if processes == 1:
            for case in left:
                run_case(settings, case, out)
                bar.update()
            return
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(run_case, settings, case, out) for case in left]):
                done.result()
                bar.update()


def rows_of(cases: Sequence[Case], out: Path) -> list[Row]:
    """The rows of all cases."""
    texts = [(out / "rows" / f"{case.name}.jsonl").read_text() for case in cases]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def measure(settings: Settings, cases: Sequence[Case], out: Path, processes: int) -> str:
    """Run the cases; write rows, sheets, `figures.json` and the plot to `out`; return the tables."""
    rates = {method: rate for method, (_, _, rate) in METHODS.items()}
    stated = json.dumps(asdict(settings) | {"fingerprint": bench_of(settings).model.fingerprint, "rates": rates}, indent=1)
    known = out / "settings.json"
    if known.exists() and known.read_text() != stated:
        raise SystemExit(f"{out} holds a run of other settings ({known}); give another folder")
    for folder in ("rows", "sheets"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    atomic_write(known, stated)
    run(settings, cases, out, processes)
    rows = rows_of(cases, out)
    subjects = sorted({case.subject for case in cases})
    best = ceiling(settings, subjects, cases[0].tuning)
    atomic_write(out / "figures.json", json.dumps({"environment": machine(), "ceiling": best, "rows": rows}, indent=1))
    plot(rows, best, out / "fidelity.png")
    return "\n\n".join(tables(rows, best))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model folder or hub name of the miniature's kind (default: the miniature)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--subjects", type=int, default=6, help="held-out drawings (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs a subject (default %(default)s)")
    parser.add_argument("--max-steps", type=int, default=800, help="of methods but ours (default %(default)s)")
    parser.add_argument("--views", type=int, default=Settings.views, help="pictures a subject (default %(default)s)")
    parser.add_argument("--pictures", type=int, default=Settings.pictures, help="drawn at each milestone (default %(default)s)")
    parser.add_argument("--sampling", type=int, default=Settings.sampling, help="sampling steps (default %(default)s)")
    parser.add_argument("--rank", type=int, default=RANK, help="of the low-rank additions (default %(default)s)")
    parser.add_argument("--tune", nargs="+", type=float, metavar="RATE", help="compare rates, on drawings for that alone")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"), help="folder of the run (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes of one thread each (default %(default)s)")
    given = parser.parse_args(argv)
    most = ART[:TUNING] if given.tune else ART[TUNING:]
    if not 1 <= given.subjects <= len(most):
        parser.error(f"--subjects {given.subjects}: there are {len(most)} drawings")
    if given.max_steps < 0:
        parser.error(f"--max-steps {given.max_steps}: expected 0 or more")
    reached = tuple(step for step in MILESTONES if step <= given.max_steps)
    settings = Settings(given.model, given.views, given.pictures, given.sampling, given.rank, milestones=reached)
    cases = [
        Case(method, subject, seed, rate, tuning=given.tune is not None)
        for subject in range(given.subjects)
        for seed in range(given.seeds)
        for method in given.methods
        for rate in given.tune or [None]
    ]
    print(measure(settings, cases, given.out, given.processes))


if __name__ == "__main__":
    main()
