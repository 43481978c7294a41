"""One training loop for every stage: several processes, EMA, checkpoints, resume after a kill, a log.

A stage brings a module whose `forward(**batch)` returns named losses (the first is minimised) and a `batches(step, rank,
world)` function that makes the batch of a step from nothing but these numbers, so a resumed run sees the data that an
uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from p2p_subject.outputs import atomic_path

Batch = dict[str, Tensor]
Batches = Callable[[int, int, int], Batch]
Evaluate = Callable[[int, Path], dict[str, float]]


@dataclass(frozen=True)
class RunConfig:
    """How a stage is run. `steps` optimiser steps; `decay_from` is the fraction of them after which the rate falls."""

    out: Path
    steps: int
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200
    decay_from: float = 0.4
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    processes: int = 1
    device: str = "cpu"
    log_every: int = 50
    checkpoint_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.processes < 1:
            raise ValueError(f"steps and processes must be 1 or more, got {self.steps} and {self.processes}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"decay_from must lie in [0, 1], got {self.decay_from}")


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, constant, then a cosine to 2 % of the rate over what is left after `decay_from`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    start = config.decay_from * config.steps
    if step <= start:
        return config.learning_rate
    progress = min(1.0, (step - start) / max(1.0, config.steps - start))
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def run(config: RunConfig, build: Callable[[], nn.Module], batches: Batches, evaluate: Evaluate | None = None) -> Path:
    """Train to `config.steps` and return the folder; goes on from the last checkpoint in `config.out` if there is one.

    `build()` makes the module in each process; `evaluate(step, folder)` is called in the first process after a checkpoint and
    returns figures for the log. The averaged weights are `out/ema.safetensors`.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    if config.processes == 1:
        _worker(0, config, build, batches, evaluate, None)
    else:
        # A name of its own: a killed run leaves its file behind, and a second run must not meet it.
        meeting = (config.out / f".rendezvous-{uuid4().hex}").resolve()
        arguments = (config, build, batches, evaluate, f"file://{meeting}")
        try:
            mp.start_processes(_worker, arguments, nprocs=config.processes, start_method="fork")
        finally:
            meeting.unlink(missing_ok=True)
    return config.out


def _worker(rank: int, config: RunConfig, build, batches: Batches, evaluate, rendezvous: str | None) -> None:
    device = torch.device(config.device)
    if rendezvous:
        # One thread a process: threads of one pool spin while they wait, and lose most of their time once cores are shared.
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.processes)
    torch.manual_seed(config.seed)
    module = build().to(device)
    if device.type == "cpu":
        module = module.to(memory_format=torch.channels_last)
    parameters = [p for p in module.parameters() if p.requires_grad]
    average = {name: value.detach().clone().float() for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    first = _resume(config.out, module, optimizer, average)
    trained = module
    if rendezvous:
        trained = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True)
    bar = tqdm(total=config.steps, initial=first, desc=config.out.name, disable=None if rank == 0 else True)
    sums: dict[str, float] = {}
    began = time.monotonic()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        torch.manual_seed(hash((config.seed, step, rank)) % 2**31)
        batch = {key: value.to(device) for key, value in batches(step, rank, config.processes).items()}
        with torch.autocast(device.type, torch.bfloat16) if device.type != "mps" else nullcontext():
            losses = trained(**batch)
        loss = next(iter(losses.values()))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; resume with a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        _average(average, module, min(config.ema, (step + 1) / (step + 10)))
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step + 1
        if rank == 0:
            bar.update()
            if done % config.log_every == 0:
                row = {key: value / config.log_every for key, value in sums.items()}
                _log(config.out, {"step": done, "seconds": round(time.monotonic() - began, 1), **row})
                bar.set_postfix({key: f"{value:.4f}" for key, value in list(row.items())[:3]})
            due = config.evaluate_every and done % config.evaluate_every == 0
            if due or done % config.checkpoint_every == 0 or done == config.steps:
                _checkpoint(config.out, done, module, optimizer, average)
            if evaluate and (due or done == config.steps):
                _log(config.out, {"step": done, **evaluate(done, config.out)})
        if done % config.log_every == 0:
            sums = {}
    bar.close()
    if rendezvous:
        dist.destroy_process_group()


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    names, values = zip(*((n, v) for n, v in module.state_dict().items() if v.is_floating_point()))
    torch._foreach_lerp_([average[name] for name in names], [value.float() for value in values], 1 - decay)


def _log(out: Path, row: dict) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _checkpoint(out: Path, step: int, module: nn.Module, optimizer, average: dict[str, Tensor]) -> None:
    """Weights, average and moments of one step in one file, so that a kill never leaves parts of two steps."""
    state: dict[str, Tensor] = {"step": torch.tensor(step)}
    state |= {f"model.{k}": v.contiguous() for k, v in module.state_dict().items()}
    state |= {f"average.{k}": v.contiguous() for k, v in average.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v.contiguous() for k, v in moments.items()}
    # The averaged weights first: a kill in between costs steps that are run again, never a stale average at the end.
    with atomic_path(out / "ema.safetensors") as path:
        save_file({k: v.contiguous() for k, v in average.items()}, path)
    with atomic_path(out / "checkpoint.safetensors") as path:
        save_file(state, path)


def _resume(out: Path, module: nn.Module, optimizer, average: dict[str, Tensor]) -> int:
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    state = load_file(path)
    module.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for key, value in average.items():
        value.copy_(state[f"average.{key}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state["step"])
