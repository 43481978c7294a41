"""An independent judge of scenes: which subject, which look, which background.

    python -m benchmarks.judge train --out FOLDER --minutes 15 --ship
    python -m benchmarks.judge measure

A small convolutional network trained on real scenes of the split "judge" only, never on the output of a diffusion model,
with blur and noise, so that the softness of an autoencoder is not mistaken for another subject.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from p2p_subject.outputs import atomic_path
from p2p_subject.training import world
from p2p_subject.training.world import BACKGROUNDS, CATEGORIES, SOURCES, Look

WEIGHTS = Path(__file__).with_name("judge.safetensors")
HUE_TOLERANCE = 25.0
"""Degrees by which a hue may be off and still be called right."""

HEADS = (len(CATEGORIES) * len(SOURCES), 1, 2, len(BACKGROUNDS))
"""Outputs: art (category and source together), natural or not, hue as (cos, sin), background."""


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: `hue` in degrees, None for natural colours; `confidences` in [0, 1], by field."""

    category: str
    source: str
    hue: float | None
    background: str
    confidences: dict[str, float] = field(default_factory=dict)


def right_category(verdict: Verdict, look: Look) -> bool:
    """Whether the category is that of `look`."""
    return verdict.category == look.category


def right_look(verdict: Verdict, look: Look) -> bool:
    """Whether source of art and colours are those of `look`: both natural, or hues at most 25 degrees apart."""
    if verdict.source != look.source or (verdict.hue is None) != (look.hue is None):
        return False
    return look.hue is None or world.hue_distance(verdict.hue, look.hue) <= HUE_TOLERANCE


def marks(verdict: Verdict, look: Look, background: str) -> dict[str, bool]:
    """What of a picture is right: category, look, both at once, and background."""
    category, alike = right_category(verdict, look), right_look(verdict, look)
    return {"category": category, "look": alike, "both": category and alike, "background": verdict.background == background}


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        return F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))


def _halve(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class JudgeNet(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] to the logits of `HEADS`; 1.1 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        deeper = [(_halve(a, b), Residual(b)) for a, b in ((32, 64), (64, 128), (128, 160))]
        self.body = nn.Sequential(_halve(3, 32, 5), *(layer for pair in deeper for layer in pair))
        self.heads = nn.Linear(2 * 160, sum(HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of art, natural, hue and background, float32."""
        features = self.body(images)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.heads(pooled).float().split(HEADS, 1)


def to_batch(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Pictures, or uint8 (B, 64, 64, 3), to (B, 3, 64, 64) float32 in [-1, 1]."""
    stacked = np.stack([np.asarray(image, np.uint8) for image in images])
    if stacked.shape[1:] != (world.SIZE, world.SIZE, 3):
        raise ValueError(f"pictures of shape {stacked.shape[1:]}; expected ({world.SIZE}, {world.SIZE}, 3), RGB")
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """The trained network and its words."""

    def __init__(self, network: JudgeNet) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: str | Path | None = None) -> Judge:
        """Read weights; None for those beside this file."""
        network = JudgeNet()
        saved = {name: value.float() for name, value in load_file(path or WEIGHTS).items()}
        # Everything but the norms' step counters, which are not stored.
        network.load_state_dict(network.state_dict() | saved)
        return cls(network)

    @torch.no_grad()
    def verdicts(self, images: Sequence[Image.Image] | np.ndarray, batch: int = 64) -> list[Verdict]:
        """Judge pictures of 64x64: PIL images, or uint8 (B, 64, 64, 3)."""
        return [v for start in range(0, len(images), batch) for v in self._judge(to_batch(images[start : start + batch]))]

    def _judge(self, images: Tensor) -> list[Verdict]:
        art, natural, hue, background = self.network(images)
        joint = art.softmax(1).unflatten(1, (len(CATEGORIES), len(SOURCES)))
        parts = zip(joint.sum(2), joint.sum(1), natural[:, 0].sigmoid().tolist(), hue.tolist(), background.softmax(1))
        found = []
        for category, source, plain, (cos, sin), ground in parts:
            sure = {"category": category, "source": source, "background": ground}
            confidences = {name: values.max().item() for name, values in sure.items()} | {"natural": max(plain, 1 - plain)}
            angle = None if plain > 0.5 else math.degrees(math.atan2(sin, cos)) % 360
            names = CATEGORIES[category.argmax()], SOURCES[source.argmax()], angle, BACKGROUNDS[ground.argmax()]
            found.append(Verdict(*names, confidences))
        return found


def labels_of(specs: Sequence[world.SceneSpec]) -> dict[str, Tensor]:
    """Targets of scenes: `art` and `background` as indices (B,), `natural` 0 or 1 (B, 1), `hue` (B, 2) on the circle."""
    looks = [spec.look for spec in specs]
    angles = torch.tensor([math.radians(look.hue or 0.0) for look in looks])
    return {
        "art": torch.tensor([CATEGORIES.index(k.category) * len(SOURCES) + SOURCES.index(k.source) for k in looks]),
        "natural": torch.tensor([[float(look.hue is None)] for look in looks]),
        "hue": torch.stack([angles.cos(), angles.sin()], 1),
        "background": torch.tensor([BACKGROUNDS.index(spec.background) for spec in specs]),
    }


def loss_of(outputs: tuple[Tensor, ...], labels: dict[str, Tensor]) -> Tensor:
    """Sum of the heads' losses; the hue counts in tinted scenes only."""
    art, natural, hue, background = outputs
    tinted = 1 - labels["natural"]
    return (
        F.cross_entropy(art, labels["art"])
        + F.binary_cross_entropy_with_logits(natural, labels["natural"])
        + 2 * (tinted * (hue - labels["hue"]).square()).mean()
        + 0.3 * F.cross_entropy(background, labels["background"])
    )


def soften(images: Tensor) -> Tensor:
    """Blur and noise of random strength, per picture: (B, 3, S, S) in [-1, 1] to about the same range."""
    # Squared, so that half of the pictures stay nearly as they are.
    blur, fine, low = (most * torch.rand(len(images), 1, 1, 1).square() for most in (1.0, 0.15, 0.2))
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    coarse = F.interpolate(torch.randn_like(images[..., ::4, ::4]), images.shape[-2:], mode="bilinear")
    return torch.lerp(images, blurred, blur) + fine * torch.randn_like(images) + low * coarse


def scene_batch(split: str, indices: Sequence[int]) -> tuple[np.ndarray, list[world.SceneSpec]]:
    """Draw scenes: uint8 (B, 64, 64, 3) and their specs."""
    specs = [world.sample(split, int(index)) for index in indices]
    return np.stack([world.draw(spec).image for spec in specs]), specs


def accuracy(verdicts: Sequence[Verdict], specs: Sequence[world.SceneSpec]) -> dict[str, float]:
    """Shares in [0, 1] of right categories, looks, both at once, and backgrounds."""
    each = [marks(verdict, spec.look, spec.background) for verdict, spec in zip(verdicts, specs, strict=True)]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def train(out: Path, minutes: float, batch: int = 64, rate: float = 3e-3) -> Path:
    """Train for `minutes` of wall time in all and return the averaged weights' file; goes on from a checkpoint in `out`.

    The learning rate falls as a cosine of the time used, every scene is a new one.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = JudgeNet().to(memory_format=torch.channels_last).train()
    average = {name: value.float().clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    step, used, path = 0, 0.0, out / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        step, used, average = state["step"], state["used"], state["average"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    began = time.monotonic() - used

    def checkpoint() -> None:
        # Everything of one step in one file, so that a kill leaves no parts of two.
        state = {"step": step, "used": time.monotonic() - began, "average": average}
        state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    bar = tqdm(desc="judge", initial=step, disable=None)
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        warmth = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warmth * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        pictures, specs = scene_batch("judge", range(step * batch, (step + 1) * batch))
        images = soften(to_batch(pictures)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(network(images), labels_of(specs))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 10))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value.float(), 1 - decay)
        bar.update()
        if step % 100 == 0:
            checkpoint()
            row = {"step": step, "seconds": round(time.monotonic() - began), "loss": round(loss.item(), 4)}
            row |= _validate(average) if step % 300 == 0 else {}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    bar.close()
    checkpoint()
    with atomic_path(out / "average.safetensors") as temporary:
        save_file(average, temporary)
    return out / "average.safetensors"


def _validate(average: dict[str, Tensor], count: int = 200) -> dict[str, float]:
    network = JudgeNet()
    network.load_state_dict(average)
    pictures, specs = scene_batch("validation", range(count))
    return accuracy(Judge(network).verdicts(pictures), specs)


def ship(average: Path, path: Path = WEIGHTS) -> None:
    """Write averaged weights in half precision, without the norms' step counters."""
    weights = {name: value.half() for name, value in load_file(average).items() if not name.endswith("num_batches_tracked")}
    with atomic_path(path) as temporary:
        save_file(weights, temporary)


def measure(count: int = 2000, model: Path | None = None, weights: Path | None = None) -> dict[str, dict[str, float]]:
    """Accuracy on real scenes that training never saw, and on their reconstructions by the model's autoencoder."""
    from p2p_subject.models import Model

    judge, loaded, results = Judge.load(weights), Model.load(model), {}
    for split in ("test", "new_hue", "new_art"):
        pictures, specs = scene_batch(split, range(count))
        results[f"{split}, real"] = accuracy(judge.verdicts(pictures), specs)
        rebuilt = [loaded.decode(loaded.encode_images([Image.fromarray(picture)]))[0] for picture in pictures]
        results[f"{split}, reconstructed"] = accuracy(judge.verdicts(rebuilt), specs)
    return results


def main() -> None:
    """Command line: `train` or `measure`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=__doc__.split("\n\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    training = stages.add_parser("train", help="train on real scenes; an interrupted run goes on")
    training.add_argument("--out", type=Path, required=True, help="folder of the run")
    training.add_argument("--minutes", type=float, default=15, help="wall time of the whole run (default %(default)s)")
    training.add_argument("--ship", action="store_true", help=f"write {WEIGHTS.name} beside this file at the end")
    measuring = stages.add_parser("measure", help="accuracy on real and on reconstructed scenes")
    measuring.add_argument("--model", type=Path, help="model folder with the autoencoder (default: the miniature)")
    measuring.add_argument("--weights", type=Path, help="weights of a judge (default: the shipped ones)")
    measuring.add_argument("--count", type=int, default=2000, help="scenes a split (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.stage == "train":
        average = train(arguments.out, arguments.minutes)
        if arguments.ship:
            ship(average)
        return
    torch.set_num_threads(1)
    for name, row in measure(arguments.count, arguments.model, arguments.weights).items():
        print(f"{name:24}" + "".join(f"  {key} {value:.4f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
