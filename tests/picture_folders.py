"""Folders of pictures that tests of training sets and of cut-outs read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from p2p_subject.training import world
from p2p_subject.training.listing import Entry

SIDE = 96


def scene(index: int, size: int = SIDE) -> world.Scene:
    return world.draw(world.sample("train", index), size)


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def transparent(index: int, size: int = SIDE) -> Image.Image:
    """A subject alone, with the alpha it was drawn with."""
    spec = world.sample("train", index)
    empty = np.zeros((size, size, 3), np.float32)
    subject = world.cut_out(spec.look, round(spec.pose.extent * size), spec.pose.angle, spec.pose.mirrored)
    _, alpha = world.paste(empty, subject, spec.pose.x, spec.pose.y)
    colour, _ = world.paste(empty, np.concatenate([subject[..., :3], subject[..., 3:] > 0], -1), spec.pose.x, spec.pose.y)
    return Image.fromarray(np.rint(np.concatenate([colour, alpha[..., None]], -1) * 255).astype(np.uint8))


def make_folder(folder: Path, count: int = 5, masks: bool = True, size: int = SIDE) -> Path:
    """Scenes with captions in metadata.jsonl and, if wanted, their true alpha as masks; the last one is transparent."""
    (folder / "masks").mkdir(parents=True)
    lines = []
    for index in range(count):
        name = f"{index:02}.png"
        last = masks and index == count - 1
        (transparent(index, size) if last else scene(index, size).picture).save(folder / name)
        spec = world.sample("train", index)
        line = {"file_name": name, "text": spec.caption(), "subject": spec.look.category, "source": "drawn"}
        if masks and not last:
            grey(scene(index, size).alpha).save(folder / "masks" / name)
            line["mask"] = f"masks/{name}"
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def entry_of(folder: Path, name: str, subject: str = "dog", mask: str | None = None) -> Entry:
    return Entry(folder, name, f"a {subject}", subject, mask and folder / mask, (SIDE, SIDE))
