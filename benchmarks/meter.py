"""What an edit costs: calls and rows of the U-Net, gradients, time and peak memory, around any piece of work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.memory import forget_resident_peak, resident_peak

Cost = dict[str, float | None]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def metered(unet: nn.Module, device: torch.device) -> Iterator[Cost]:
    """Fill the dict that is yielded when the block ends.

    `nfe`: calls of the U-Net, however many rows each has; `rows`: the rows of all calls, so a guided prediction counts two;
    `backward_rows`: rows that a gradient came back through (about twice the work of a forward row); `seconds` of wall time,
    the device waited for; `cpu_seconds` of this process, which a busy machine stretches less; `peak`: bytes over what was held
    before, allocated by torch on a GPU, resident of the process on Linux, None elsewhere.
    """
    cost: Cost = {"nfe": 0, "rows": 0, "backward_rows": 0, "seconds": None, "cpu_seconds": None, "peak": None}

    def count(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        cost["nfe"] += 1
        cost["rows"] += len(sample)
        if sample.requires_grad:
            sample.register_hook(returned)

    def returned(gradient: torch.Tensor) -> None:
        cost["backward_rows"] += len(gradient)

    handle = unet.register_forward_hook(count)
    before = _begin(device)
    synchronise(device)
    began, used = time.perf_counter(), time.process_time()
    try:
        yield cost
        synchronise(device)
        cost["seconds"], cost["cpu_seconds"] = time.perf_counter() - began, time.process_time() - used
        cost["peak"] = None if before is None else _peak(device) - before
    finally:
        handle.remove()


def _begin(device: torch.device) -> int | None:
    """Begin the peak of memory anew; what is held now, in bytes, or None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    try:
        forget_resident_peak()
    except OSError:  # a container may not let a process write there
        return None
    return resident_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()
