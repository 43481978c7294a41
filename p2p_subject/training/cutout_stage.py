"""The stage `cutouts` of the command line: fills a cache of cut-outs, and draws a sheet of how some of them came about."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from p2p_subject.outputs import IMAGE_FORMATS, check_target, save_image
from p2p_subject.training.clipseg import DEFAULT_CLIPSEG, ClipSeg
from p2p_subject.training.composing import Composition, compose, draw_background
from p2p_subject.training.cutout_cache import Segmenter, loaded, make_cutouts, read_cutouts
from p2p_subject.training.cutouts import Cutout, CutoutSettings, cut_out
from p2p_subject.training.listing import Entry, read_backgrounds, read_folder
from p2p_subject.viz import Panel, contact_sheet, overlay

PANEL = 224
"""Side of a panel of the sheet, and of the composition on it, in pixels: that of the public image encoder."""

_ABOUT = {
    "foreground": "CLIPSeg's confidence from which on a pixel is the subject",
    "background": "the confidence below which it is not",
    "refine": "pixels to both sides of a mask's edge in which its alpha is looked for",
    "side": "short side in pixels to which pictures are made smaller",
    "smallest": "least share of the picture that is a subject",
    "largest": "greatest share of the picture that is a subject",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the stage."""
    parser.add_argument("folder", type=Path, help="pictures with captions and subjects, as training/listing.py says")
    parser.add_argument("--out", type=Path, required=True, help="the cache, a folder of its own; an interrupted run goes on")
    parser.add_argument(
        "--clipseg", metavar="NAME", help=f"finds subjects without mask or transparency: a folder, or such as {DEFAULT_CLIPSEG}"
    )
    parser.add_argument("--revision", help="branch, tag or commit of CLIPSeg on the hub")
    parser.add_argument("--subject", default="", help="category of the pictures that do not name theirs")
    for field in fields(CutoutSettings):
        about = f"{_ABOUT[field.name]} (default %(default)s)"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=about)
    parser.add_argument("--processes", type=int, default=1, help="each with a CLIPSeg of its own (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where CLIPSeg runs: cpu or cuda (default %(default)s)")
    parser.add_argument("--sheet", type=Path, help="draw some pictures with the steps to their cut-outs")
    parser.add_argument("--backgrounds", type=Path, help="folder of backgrounds, for the sheet (default: procedural ones)")


def command(arguments: argparse.Namespace) -> None:
    """Run the stage and print what became of the pictures; raises a `P2PSubjectError`."""
    if arguments.sheet:
        check_target(arguments.sheet, IMAGE_FORMATS)
    backgrounds = read_backgrounds(arguments.backgrounds) if arguments.backgrounds else []
    settings = CutoutSettings(**{field.name: getattr(arguments, field.name) for field in fields(CutoutSettings)})
    segmenter = Segmenter(arguments.clipseg, arguments.revision, arguments.device) if arguments.clipseg else None
    entries = read_folder(arguments.folder, subject=arguments.subject)
    with warnings.catch_warnings():
        # The lines below name every skipped picture, where the warnings name a few.
        warnings.simplefilter("ignore")
        report = make_cutouts(entries, arguments.out, settings, segmenter, arguments.processes)
        found = [entry for entry, _ in read_cutouts(entries, arguments.out)]
    print("\n".join(report.lines()))
    if arguments.sheet:
        save_image(sheet(found, settings, segmenter and loaded(segmenter), backgrounds), arguments.sheet)


def sheet(
    entries: Sequence[Entry],
    settings: CutoutSettings,
    clipseg: ClipSeg | None = None,
    backgrounds: Sequence[Path] = (),
    count: int = 8,
) -> Image.Image:
    """A row for each of up to `count` entries, spread evenly: picture, confidence, trimap, alpha, composition."""
    chosen = np.unique(np.linspace(0, len(entries) - 1, count).astype(int))
    rows = [_row(entries[at], cut_out(entries[at], settings, clipseg), backgrounds, int(at)) for at in chosen]
    return contact_sheet(rows, panel=PANEL)


def _row(entry: Entry, cutout: Cutout, backgrounds: Sequence[Path], seed: int) -> list[Panel]:
    rng = np.random.default_rng(seed)
    none = Image.new("L", cutout.picture.size, 255)
    given = {"mask": "a mask is given", "alpha": "it is transparent", "clipseg": ""}[cutout.source]
    composed = compose(cutout.rgba, draw_background(backgrounds, PANEL, rng), Composition(), rng)
    confidence = none if cutout.confidence is None else overlay(cutout.picture, cutout.confidence)
    trimap = none if cutout.trimap is None else _grey(cutout.trimap)
    return [
        (entry.text, cutout.picture),
        (f"confidence: “{entry.subject}”" if cutout.confidence is not None else f"no confidence: {given}", confidence),
        ("trimap" if cutout.trimap is not None else f"no trimap: {given}", trimap),
        (f"alpha: {cutout.alpha.mean():.0%} of the picture", _grey(cutout.alpha)),
        ("what the encoder sees", Image.fromarray(composed)),
    ]


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
