"""Cost of null-text inversion against the published loop, and at what error, on the same pictures and model in one run.

    python -m benchmarks.null_text --pictures 4

Methods are given clean latents and captions. Counted are U-Net rows, forward and backward; a backward row is taken as two
forward ones, as with gradients of weights, which the published loop computes and does not use: its authors' code leaves weights
as they are loaded. "published, frozen" spares them. The error is that of guided sampling with the embeddings found: mean square
against the inverted latents over all steps, and PSNR of the picture.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.meter import metered
from benchmarks.metrics import psnr
from inversion import Move, Schedule, Trajectory, ddim, ddim_move, guide, null_text_batch, reconstruct
from p2p_subject.context import Context
from p2p_subject.models import Model
from p2p_subject.training import world


@dataclass(frozen=True)
class Network:
    """A model's noise for token contexts (B, L, D); `null` is the context of no prompt."""

    model: Model
    null: Context

    def __call__(self, latents: Tensor, move: Move, tokens: Tensor) -> Tensor:
        return self.model.noise(latents, move, self.null.expand(len(tokens)).with_tokens(tokens))


@dataclass(frozen=True)
class Cost:
    """Rows and seconds of all pictures together; mean squared error of their latents, and mean PSNR in dB."""

    method: str
    forward: int
    backward: int
    seconds: float
    error: float
    psnr: float

    @property
    def rows(self) -> int:
        """What it costs in forward rows."""
        return self.forward + 2 * self.backward


Method = Callable[[Network, Tensor, Sequence[str], Schedule, float], list[Trajectory]]
"""`method(network, clean latents (P, C, h, w), captions, schedule, guidance scale) -> trajectories`, texts encoded within."""


def published(network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float) -> list[Trajectory]:
    """The loop of Mokady et al. 2023 as its authors' code runs it, picture by picture.

    At each step: the conditional prediction; up to 10 times an unconditional prediction, its way back and a step of Adam, which
    is new at each step and ends after a loss under 1e-5 + 2e-5 i; then both predictions again, for the step that is taken.
    """
    return [_published(network, x[None], caption, schedule, scale) for x, caption in zip(latents, captions)]


def _published(network: Network, latents: Tensor, caption: str, schedule: Schedule, scale: float) -> Trajectory:
    model = network.model
    with torch.no_grad():
        null, context = (model.encode(model.layout(text)).tokens.float() for text in ("", caption))
        path = ddim(lambda x, move: network(x, move, context), latents, schedule)
    x, found = path.noise, []
    for move in schedule.sampling():
        null = null.clone().detach().requires_grad_()
        optimiser = torch.optim.Adam([null], lr=1e-2 * max(1 - move.index / 100, 0))
        with torch.no_grad():
            conditional = network(x, move, context)
        for _ in range(10):
            predicted = guide(network(x, move, null), conditional, scale)
            moved = ddim_move(x, predicted, move.alpha_from, move.alpha_to)
            loss = F.mse_loss(moved, path.after(move.index))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if loss.item() < 1e-5 + 2e-5 * move.index:
                break
        found.append(null.detach())
        with torch.no_grad():
            predicted = guide(*network(x.repeat(2, 1, 1, 1), move, torch.cat([found[-1], context])).chunk(2), scale)
            x = ddim_move(x, predicted, move.alpha_from, move.alpha_to)
    return Trajectory(path.latents, schedule, caption, "published", scale, null_embeddings=torch.cat(found))


def ours(network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float) -> list[Trajectory]:
    """This library's, picture by picture."""
    return [in_one_batch(network, x[None], [text], schedule, scale)[0] for x, text in zip(latents, captions)]


def in_one_batch(
    network: Network, latents: Tensor, captions: Sequence[str], schedule: Schedule, scale: float
) -> list[Trajectory]:
    """This library's, all pictures at once."""
    model = network.model
    with torch.no_grad():
        null, *contexts = (model.encode(model.layout(text)).tokens.float() for text in ("", *captions))
    return null_text_batch(network, latents, schedule, torch.cat(contexts), null, guidance_scale=scale, prompts=captions)


METHODS: dict[str, Method] = {
    "published": published,
    "published, frozen": published,
    "ours": ours,
    "ours, one batch": in_one_batch,
}


@torch.no_grad()
def errors(network: Network, found: Trajectory, picture: np.ndarray) -> tuple[float, float]:
    """Mean squared error of the latents that guided sampling with the embeddings gives, and PSNR of the picture, in dB."""
    model = network.model
    context = model.encode(model.layout(found.prompt)).tokens.float()

    def predict(x: Tensor, move: Move) -> Tensor:
        rows = torch.cat([found.unconditional(move.index), context])
        return guide(*network(x.repeat(2, 1, 1, 1), move, rows).chunk(2), found.guidance_scale)

    sampled = reconstruct(predict, found)
    error = F.mse_loss(sampled.latents[:-1], found.latents[:-1]).item()
    return error, psnr(np.asarray(model.decode(sampled.clean)[0]), picture)


def measure(model: Model, pictures: int, steps: int, scale: float, methods: Sequence[str] = tuple(METHODS)) -> list[Cost]:
    """Run the methods on the same test scenes."""
    scenes = [world.draw(world.sample("test", index)) for index in range(pictures)]
    captions = [scene.spec.caption() for scene in scenes]
    latents = model.encode_images([scene.picture for scene in scenes])
    schedule = model.schedule(steps)
    costs, network = [], Network(model, model.unconditional())
    for name in methods:
        with nullcontext() if name == "published" else model.frozen(), metered(model.unet, model.device) as cost:
            found = METHODS[name](network, latents, captions, schedule, scale)
        model.unet.zero_grad()
        spent = cost["rows"], cost["backward_rows"], cost["seconds"]
        missed, likeness = zip(*(errors(network, one, scene.image) for one, scene in zip(found, scenes)))
        costs.append(Cost(name, *spent, mean(missed), mean(likeness)))
    return costs


def table(costs: Sequence[Cost]) -> list[str]:
    """The costs as lines of text, with how many times less than the first each takes."""
    head = f"{'method':<19}{'forward':>8}{'backward':>9}{'seconds':>9}{'error':>10}{'PSNR':>7}{'rows':>8}{'time':>8}"
    first, lines = costs[0], [head]
    for cost in costs:
        lines.append(
            f"{cost.method:<19}{cost.forward:>8}{cost.backward:>9}{cost.seconds:>9.1f}{cost.error:>10.1e}{cost.psnr:>7.2f}"
            f"{first.rows / cost.rows:>7.2f}x{first.seconds / cost.seconds:>7.2f}x"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_text", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model folder or hub name (default: the miniature)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the CPU)")
    parser.add_argument("--pictures", type=int, default=4, help="test scenes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default %(default)s)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance scale (default %(default)s, the paper's)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the CPU (default: all, %(default)s)")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    model = Model.load(given.model, device=given.device)
    print(f"model {model.fingerprint}, {given.pictures} pictures, {given.steps} steps, guidance {given.scale:g}")
    print("\n".join(table(measure(model, given.pictures, given.steps, given.scale))))


if __name__ == "__main__":
    main()
