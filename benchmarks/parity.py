"""Largest deviations of the BLIP-Diffusion pipeline from the original implementation's numbers, value by value.

    python -m benchmarks.parity [--golden FOLDER]

FOLDER holds `blip_diffusion/` with `cases.json`, `golden.safetensors`, the pictures and the checkpoint that the original
implementation wrote them with. The exit code is 1 if a deviation is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_subject.errors import ArgumentError, P2PSubjectError

if TYPE_CHECKING:
    from torch import Tensor

    from p2p_subject.blip_diffusion import BlipDiffusionPipeline

VARIABLE = "P2P_SUBJECT_GOLDEN"
"""The environment variable that names the folder of golden values."""

TOLERANCES = {"pixel_values": 0.0, "subject_embeddings": 5e-6, "text_embeddings": 5e-5, "image": 1e-4}
"""Largest absolute difference of each value that is taken as rounding, in float32 on a CPU."""

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"
"""Where it is looked for if that is not set: beside the repository."""


@dataclass(frozen=True)
class Deviation:
    """The largest absolute difference of one value of one case from the original's."""

    case: int
    value: str
    largest: float

    @property
    def tolerance(self) -> float:
        """What is taken as rounding."""
        return TOLERANCES[self.value]

    @property
    def within(self) -> bool:
        """Whether this is rounding; NaN is not."""
        return self.largest <= self.tolerance


def measure(golden: Path) -> list[Deviation]:
    """Run every generation of the golden values with the pipeline; `ArgumentError` where they are incomplete.

    Each value is computed from the original's values before it, so that a deviation shows where it arises.
    """
    from PIL import Image
    from safetensors.torch import load_file

    from p2p_subject.blip_diffusion import BlipDiffusionPipeline

    folder = golden / "blip_diffusion"
    needed = ("cases.json", "golden.safetensors", "checkpoint/unet", "qformer_tokenizer")
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise ArgumentError(f"{folder} lacks {', '.join(missing)}; name a complete folder with --golden or {VARIABLE}")
    pipeline = BlipDiffusionPipeline.from_pretrained(
        folder / "checkpoint", qformer_tokenizer=folder / "qformer_tokenizer", local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    stored = load_file(folder / "golden.safetensors")
    rows = []
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        if case["kind"] == "generate":
            index = case["index"]
            expected = {name: stored[f"case{index}.{name}"] for name in (*TOLERANCES, "latents")}
            with Image.open(folder / f"reference_{index}.png") as picture:
                found = computed(pipeline, case, picture, expected)
            rows += [Deviation(index, name, largest_difference(found[name], expected[name])) for name in TOLERANCES]
    return rows


def computed(
    pipeline: BlipDiffusionPipeline, case: dict[str, Any], picture: Any, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The values of one case as this library computes them; `given` are the original's."""
    prompt = ", ".join([f"a {case['target_subject']} {case['prompt']}"] * int(case["prompt_strength"] * case["prompt_reps"]))
    return {
        "pixel_values": pipeline.image_processor.preprocess(
            picture, image_mean=pipeline.config.mean, image_std=pipeline.config.std
        ),
        "subject_embeddings": pipeline.subject_embeddings(picture, case["source_subject"]),
        "text_embeddings": pipeline.encode_prompt(prompt, given["subject_embeddings"], truncate=True),
        "image": pipeline(
            case["prompt"],
            picture,
            case["source_subject"],
            case["target_subject"],
            given["latents"],
            case["guidance_scale"],
            case["height"],
            case["width"],
            case["steps"],
            None,
            case["negative_prompt"],
            case["prompt_strength"],
            case["prompt_reps"],
            output_type="pt",
        ).images,
    }


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite for tensors of different shapes."""
    return (actual - expected).abs().max().item() if actual.shape == expected.shape else float("inf")


def table(rows: Sequence[Deviation]) -> list[str]:
    """The deviations as lines of text."""
    lines = [f"{'case':<6}{'value':<20}{'largest deviation':>18}{'tolerance':>11}"]
    for row in rows:
        verdict = "" if row.within else "  beyond"
        lines.append(f"{row.case:<6}{row.value:<20}{row.largest:>18.1e}{row.tolerance:>11.0e}{verdict}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if every deviation is within its tolerance, 1 if not, 2 if there is nothing to compare with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    place = Path(os.environ.get(VARIABLE) or BESIDE)
    about = f"the original's numbers (default: what {VARIABLE} names, or shared/golden beside the repository)"
    parser.add_argument("--golden", type=Path, default=place, metavar="FOLDER", help=about)
    try:
        rows = measure(parser.parse_args(argv).golden)
    except P2PSubjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    return 0 if all(row.within for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
