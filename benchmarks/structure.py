"""Structure control and style transfer of the miniature, on scenes and looks that its ControlNet was not trained on.

    python -m benchmarks.structure --count 64 --out runs/structure_figures

Structure: the edges of a test scene and its caption, with and without the ControlNet, from the same noise. Told are how well
the edges of the result are the given ones (F1, an edge within one pixel counts), and whether the judge sees the caption's
category. Style: the same, with the subject of another scene, of another category and in a held-out hue, as the style; told is
whether the result is of the structure's category in the style's hue. The autoencoder's reconstruction is the ceiling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.judge import HUE_TOLERANCE, Judge, right_category
from benchmarks.metrics import outline_f
from benchmarks.statistics import mean
from p2p_subject import Editor, Subject
from p2p_subject.control_images import control_image
from p2p_subject.outputs import atomic_write, save_image
from p2p_subject.training import world
from p2p_subject.viz import contact_sheet

SHOWN = 10
Row = dict[str, Any]


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of edges (H, W) bool, 0 to 1, higher is closer; an edge counts beside one of the other picture.

    The boundary measure of Martin, Fowlkes and Malik (2004) without one-to-one matching; 1 where neither has an edge.
    """
    # As far as the corner of a pixel's neighbours, and no farther.
    return outline_f(found, wanted, 1.5)


def edges(picture: Image.Image) -> np.ndarray:
    """Edges of a picture as the ControlNet is given them, (H, W) bool."""
    return np.asarray(control_image(picture, "canny").convert("L")) > 127


def case(editors: tuple[Editor, Editor], judge: Judge, index: int, steps: int) -> Row:
    """One scene under control, without, and in the style of another subject."""
    controlled, plain = editors
    spec = world.sample("test", index)
    scene, look = world.draw(spec), _style(spec, index)
    style = Subject(Image.fromarray(world.reference(look, "new_hue", index)), look.category)
    drawn = control_image(scene.picture, "canny")
    prompt = spec.caption(tint=True)
    options = {"seed": index, "steps": steps}
    made = {
        "control": controlled.generate(prompt, control=drawn, **options).image,
        "no control": plain.generate(prompt, **options).image,
        "style": controlled.stylize(scene.picture, style=style, prompt=spec.caption(), **options).image,
        "vae": plain.model.decode(plain.model.encode_images([scene.picture]))[0],
    }
    row: Row = {"index": index, "prompt": prompt}
    for (name, image), verdict in zip(made.items(), judge.verdicts(list(made.values()))):
        row[f"{name} edges"] = edge_f1(edges(image), edges(scene.picture))
        row[f"{name} category"] = right_category(verdict, spec.look)
        if name == "style":
            hued = verdict.hue is not None and world.hue_distance(verdict.hue, look.hue) <= HUE_TOLERANCE
            row["style hue"], row["style both"] = hued, hued and row["style category"]
    shown = {"edges": drawn, "control": made["control"], "no control": made["no control"], "style of": style.pictures[0]}
    return row | {"panels": [(prompt, scene.picture), *shown.items(), ("stylized", made["style"])]}


def _style(spec: world.SceneSpec, index: int) -> world.Look:
    """A look in a held-out hue of another category than the scene's."""
    for draw in range(index, index + 10_000, 1000):
        look = world.sample("new_hue", draw).look
        if look.category != spec.look.category:
            return look
    raise AssertionError("ten looks of one category in a row")


def table(rows: Sequence[Row]) -> str:
    """Markdown: the mean of each figure with its 95 % interval: Wilson's of shares of scenes, by bootstrap of the rest."""
    lines = ["| figure | mean | 95 % |", "| --- | --- | --- |"]
    for name in (key for key in rows[0] if key not in ("index", "prompt")):
        found = mean([row[name] for row in rows], share=isinstance(rows[0][name], bool))
        lines.append(f"| {name} | {found.value:.2f} | {found.low:.2f} to {found.high:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__.split("\n\n")[0])
    parser.add_argument("--controlnet", default="edges", help="folder of a ControlNet (default: the miniature's)")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    place = Path("runs/structure_figures")
    parser.add_argument("--out", type=Path, default=place, help="folder of the results (default %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    editors = Editor.from_pretrained(controlnet=arguments.controlnet), Editor.from_pretrained()
    judge, rows, sheet = Judge.load(), [], []
    for index in tqdm(range(arguments.count), desc="scenes", disable=None):
        row = case(editors, judge, index, arguments.steps)
        panels = row.pop("panels")
        sheet += [panels] if index < SHOWN else []
        rows.append(row)
    save_image(contact_sheet(sheet, panel=128, title="structure control and style transfer"), arguments.out / "sheet.png")
    report = {"environment": environment(None), "settings": vars(arguments), "rows": rows, "table": table(rows)}
    atomic_write(arguments.out / "structure.json", json.dumps(report, indent=2, default=str))
    print(table(rows))


if __name__ == "__main__":
    main()
