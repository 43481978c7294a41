"""What tests of the benchmarks share: a user's methods, settings of a tiny run, a run written by hand, a page that is read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from benchmarks.method_names import names_of
from benchmarks.suite import Options
from benchmarks.worker import Settings
from benchmarks.world_suite import WorldSuite

MINE = """
import os, signal
from pathlib import Path
from PIL import Image
from benchmarks.suite import Edited

def copied(editor, case):
    return Edited(case.source)

def answer(editor, case):
    return Edited(case.truth, Image.fromarray(case.mask).convert("L"), cost={"rows": 7})

answer.mask_input = True

def picky(editor, case):
    if case.id.endswith("1"):
        raise RuntimeError("not this one")
    return Edited(case.source)

def bare(editor, case):
    assert case.mask is case.truth is case.source_mask is case.reference_mask is case.facts is None
    return Edited(case.source)

def dear(editor, case):
    return Edited(case.source, cost={"rows": "7"})

def traced(editor, case):
    return Edited(case.source, trajectory=case.source)

def wrong(editor, case):
    return Edited(case.source.resize((32, 32))) if case.id.endswith("1") else case.source

def deadly(editor, case):
    os.kill(os.getpid(), signal.SIGKILL)

def leaving(editor, case):
    raise SystemExit(3)

def painting(editor, case):
    case.source.paste((128, 128, 128), (0, 0, 32, 64))
    return Edited(case.source)

def choosy(editor, case):
    return Edited(case.source)

def wanted(case):
    assert case.truth is None
    return case.id.endswith("1")

choosy.applies = wanted

def killed(editor, case):
    if case.id.endswith("2") and not Path(__file__).with_name("lives").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return Edited(case.source)
"""


def settings_of(folder: Path, out: Path, methods: str, **options: object) -> Settings:
    asked = Options(**{"count": 2, "kinds": ("swap",)} | options)
    return Settings("world", tuple(names_of(methods)), out, asked, model=str(folder), steps=3)


def made_run(folder: Path) -> Path:
    """A run written by hand: a good method, a bad one that fails once and has no masks."""
    prompts = {"prompt": "a <b>cat</b> on grass", "target_prompt": "a dog on grass"}
    rows = []
    for number in range(6):
        for name, success, psnr in (("good", 1.0, 30.0 + number), ("bad", float(number % 2), 20.0 + number)):
            pictures = {}
            for what in ("source", "edited"):
                path = folder / "pictures" / f"{name}-{number}-{what}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
                pictures[what] = f"pictures/{path.name}"
            values = dict.fromkeys((m.name for m in WorldSuite.measures), None) | {"success": success, "outside_psnr": psnr}
            values |= {"mask_iou": 0.5 if name == "good" else None, "rows": 10.0, "work": 10.0}
            row = {"suite": "world", "kind": "swap", "case": f"swap-{number:04d}", "method": name, "mask_input": name == "bad"}
            row |= {"device": "cpu", "machine": "here", "threads": 1, "code": "c", "versions": {"torch": "2"}}
            row |= {"metrics": values} | prompts
            rows.append(row | {"pictures": pictures})
    failed = rows[-1]
    failed |= {"error": "ValueError: <oops>", "metrics": dict.fromkeys(failed["metrics"]), "pictures": {}}
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"settings": {"suite": "world", "steps": 50}, "methods": {"good": {}, "bad": {}}, "commands": ["python -m x"]}
    (folder / "run.json").write_text(json.dumps(kept))
    return folder


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text, self.tags = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data
