"""One training loop for every stage, on `accelerate`: several GPUs or processes, mixed precision, gradient accumulation, EMA,
checkpoints, resume after a kill, a log.

A stage brings a module whose `forward(**batch)` returns named losses (the first is minimised) and a `batches(step, rank,
world)` function that makes the batch of a step from nothing but these numbers, so a resumed run sees the data that an
uninterrupted one would have seen. On several GPUs a stage is started by `accelerate launch -m p2p_subject.training ...`.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from p2p_subject.errors import ArgumentError
from p2p_subject.outputs import atomic_path, atomic_write

Batch = dict[str, Tensor]
Batches = Callable[[int, int, int], Batch]
Evaluate = Callable[[int, Path], dict[str, float]]


FREE = {
    "out",
    "steps",
    "processes",
    "device",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "threads",
    "validation",
    "vae",
    "checkpointing",
}
"""Settings that may change when a run goes on."""


@dataclass(frozen=True)
class RunConfig:
    """How a stage is run.

    `steps` optimiser steps, each of `accumulate` batches; `decay_from` is the fraction of them after which the rate falls
    (1: constant). `ema` is the decay of the averaged weights. `processes` are started here, on a CPU only; on GPUs
    `accelerate launch` starts them. `precision` is that of the networks' arithmetic, "no" for single; weights, moments and
    losses are in single precision.
    """

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
    precision: str = "bf16"
    accumulate: int = 1
    log_every: int = 50
    checkpoint_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "processes", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ArgumentError(f"precision={self.precision!r}; expected 'no', 'bf16' or 'fp16'")
        if self.processes > 1 and self.device != "cpu":
            raise ArgumentError(
                f"{self.processes} processes on {self.device}; on GPUs start the same command by "
                f"`accelerate launch --num_processes {self.processes} -m p2p_subject.training ...`"
            )
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ArgumentError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ArgumentError(f"betas={tuple(self.betas)}; expected two numbers from 0 to below 1")
        if not 0 <= self.decay_from <= 1:
            raise ArgumentError(f"decay_from must lie in [0, 1], got {self.decay_from}")


def share(size: int, processes: int) -> int:
    """Rows of one process of a batch of `size`; `ArgumentError` where they cannot be shared out."""
    if size < 1 or size % processes:
        raise ArgumentError(f"a batch of {size} cannot be shared by {processes} processes; take a multiple of {processes}")
    return size // processes


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, constant, then a cosine to 2 % of the rate over what is left after `decay_from`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    start = config.decay_from * config.steps
    if step <= start:
        return config.learning_rate
    progress = min(1.0, (step - start) / max(1.0, config.steps - start))
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    config: RunConfig,
    build: Callable[[], nn.Module],
    batches: Batches,
    evaluate: Evaluate | None = None,
    **record: Any,
) -> Path:
    """Run a stage; `record` is written into `settings.json` of the run beside the configuration.

    Raises `ArgumentError` where the folder holds a run of other settings.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(config) | record, default=str))
    path = config.out / "settings.json"
    if path.exists() and (config.out / "checkpoint.safetensors").exists():
        before = json.loads(path.read_text())
        if told := changed_settings(before, settings, FREE):
            raise ArgumentError(f"{config.out} holds a run of other settings ({told}); go on with those, or give another --out")
    atomic_write(path, json.dumps(settings, indent=2))
    return run(config, build, batches, evaluate)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """Which settings differ, `free` ones aside, with both values, for a message; empty where none does."""
    names = [name for name in sorted((before.keys() | now.keys()) - set(free)) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def run(config: RunConfig, build: Callable[[], nn.Module], batches: Batches, evaluate: Evaluate | None = None) -> Path:
    """Train to `config.steps` and return the folder; goes on from the last checkpoint in `config.out` if there is one.

    `build()` makes the module in each process; `evaluate(step, folder)` is called in the first process after a checkpoint and
    returns figures for the log. The averaged weights are `out/ema.safetensors`.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    arguments = (config, build, batches, evaluate)
    if config.processes == 1:
        try:
            _worker(*arguments)
        finally:
            _forget()
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(_process, (port, *arguments), nprocs=config.processes, start_method="fork")
    return config.out


def _process(rank: int, port: int, config: RunConfig, *rest: object) -> None:
    """One of several processes on this machine, told of the others by the variables that `accelerate` reads."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.processes, "LOCAL_WORLD_SIZE": config.processes}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "yes"}
    os.environ.update({name: str(value) for name, value in told.items()})
    # One thread a process: threads of one pool spin while they wait, and lose most of their time once cores are shared.
    torch.set_num_threads(1)
    _forget()
    _worker(config, *rest)


def _forget() -> None:
    """Let go of what `accelerate` keeps for a whole process, so that a run with other settings can follow."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(config: RunConfig) -> Accelerator:
    # Some weights have no gradient in some stages (the last layer's text of a Q-Former); which, never changes within a run.
    unused = {"static_graph": True} if config.accumulate == 1 else {"find_unused_parameters": True}
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        cpu=config.device == "cpu",
        # The others wait while the first process evaluates and writes.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, **unused),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ArgumentError(f"{accelerator.distributed_type.value} shards weights, which these checkpoints do not; use DDP")
    return accelerator


def _worker(config: RunConfig, build: Callable[[], nn.Module], batches: Batches, evaluate: Evaluate | None) -> None:
    accelerator = _accelerator(config)
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(config.seed)
    module = build().to(accelerator.device)
    if accelerator.device.type == "cpu":
        module = module.to(memory_format=torch.channels_last)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    average = {name: value.detach().clone().float() for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    first = _resume(config.out, module, optimizer, average, list(named), accelerator)
    trained, stepper = accelerator.prepare(module, optimizer)
    bar = tqdm(total=config.steps, initial=first, desc=config.out.name, disable=None if rank == 0 else True)
    sums: dict[str, float] = {}
    counted = 0
    began = time.monotonic()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        torch.manual_seed(hash((config.seed, step, rank)) % 2**31)
        for part in range(step * config.accumulate, (step + 1) * config.accumulate):
            batch = {key: value.to(accelerator.device) for key, value in batches(part, rank, world).items()}
            with accelerator.accumulate(trained):
                losses = trained(**batch)
                loss = next(iter(losses.values()))
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss.item()} at step {step}; resume with a lower learning rate")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    # In half precision the scaler leaves out such steps.
                    if accelerator.scaler is None and not torch.isfinite(norm):
                        raise FloatingPointError(f"a gradient is no number at step {step}; resume with a lower learning rate")
                stepper.step()
                stepper.zero_grad()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) / config.accumulate
        _average(average, module, min(config.ema, (step + 1) / (step + 10)))
        done, counted = step + 1, counted + 1
        if rank == 0:
            bar.update()
            if done % config.log_every == 0:
                row = {key: value / counted for key, value in sums.items()}
                _log(config.out, {"step": done, "seconds": round(time.monotonic() - began, 1), **row})
                bar.set_postfix({key: f"{value:.4f}" for key, value in list(row.items())[:3]})
            due = config.evaluate_every and done % config.evaluate_every == 0
            if due or done % config.checkpoint_every == 0 or done == config.steps:
                _checkpoint(config.out, done, module, optimizer, average, list(named), accelerator)
            if evaluate and (due or done == config.steps):
                _log(config.out, {"step": done, **evaluate(done, config.out)})
        if done % config.log_every == 0:
            sums, counted = {}, 0
    bar.close()
    accelerator.end_training()


@torch.no_grad()
def _average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    names, values = zip(*((n, v) for n, v in module.state_dict().items() if v.is_floating_point()))
    torch._foreach_lerp_([average[name] for name in names], [value.float() for value in values], 1 - decay)


def _log(out: Path, row: dict) -> None:
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _checkpoint(
    out: Path, step: int, module: nn.Module, optimizer, average: dict[str, Tensor], names: list[str], accelerator: Accelerator
) -> None:
    """Weights, average and moments of one step in one file, so that a kill never leaves parts of two steps."""
    state: dict[str, Tensor] = {"step": torch.tensor(step)}
    state |= {f"model.{k}": v.contiguous() for k, v in module.state_dict().items()}
    state |= {f"average.{k}": v.contiguous() for k, v in average.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{k}.{names[index]}": v.contiguous() for k, v in moments.items()}
    if accelerator.scaler is not None:
        state["scale"] = torch.tensor(accelerator.scaler.get_scale())
    # The averaged weights first: a kill in between costs steps that are run again, never a stale average at the end.
    with atomic_path(out / "ema.safetensors") as path:
        save_file({k: v.contiguous() for k, v in average.items()}, path)
    with atomic_path(out / "checkpoint.safetensors") as path:
        save_file(state, path)


def _resume(
    out: Path, module: nn.Module, optimizer, average: dict[str, Tensor], names: list[str], accelerator: Accelerator
) -> int:
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
            _, name, weight = key.split(".", 2)
            if weight not in names:
                raise ArgumentError(f"{path} is of a run that trained {weight} too; go on with its settings, or elsewhere")
            moments.setdefault(names.index(weight), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if accelerator.scaler is not None and "scale" in state:
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": float(state["scale"])})
    return int(state["step"])
