"""Time and memory of an edit against plain generation, measured interleaved in one run.

    python -m benchmarks.cost --repeats 3

Times are medians. Memory is the peak over the loaded model: on a CPU that of a fresh process for each job, on a GPU that of
the allocator. The ratios against plain generation are also given for each U-Net row, because jobs run different numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from p2p_subject.editor import Editor
from p2p_subject.edits import Subject, swap_subject
from p2p_subject.models import Model
from p2p_subject.training import world

JOBS = ("generation", "inversion", "edit")
PROMPT_INDEX = 0
"""Number of the test scene, and of the new look, that is edited."""


@dataclass(frozen=True)
class Cost:
    """Cost of a job: median seconds, U-Net rows a step, and peak bytes over the loaded model."""

    job: str
    seconds: float
    rows: float
    peak: int


def machine() -> dict[str, object]:
    """Versions and machine, for the record."""
    packages = ("torch", "diffusers", "transformers", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def environment(model: str | None) -> dict[str, object]:
    """Versions, machine, fingerprint and guidance scale of the model, for the record."""
    loaded = Model.load(model)
    return machine() | {"fingerprint": loaded.fingerprint, "guidance_scale": loaded.guidance_scale}


def jobs(editor: Editor, steps: int) -> dict[str, Callable[[], float]]:
    """The three jobs by name; each runs once and returns its U-Net rows a step."""
    spec = world.sample("test", PROMPT_INDEX)
    look = world.sample("new_hue", PROMPT_INDEX).look
    picture, prompt = world.draw(spec).picture, spec.caption()
    subject = Subject(Image.fromarray(world.reference(look, "new_hue", PROMPT_INDEX)), look.category)
    edit = swap_subject(spec.look.category, subject)
    source = editor.invert(picture, prompt, steps=steps)

    def generation() -> float:
        editor.generate(prompt, seed=0, steps=steps)
        return 1.0 if editor.model.guidance_scale == 1 else 2.0

    def inversion() -> float:
        editor.invert(picture, prompt, steps=steps)
        return 1.0

    return {
        "generation": generation,
        "inversion": inversion,
        "edit": lambda: editor.edit(source, edit).unet_rows / steps,
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(editor: Editor, steps: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds and U-Net rows a step of each job; jobs take turns, so that a slow spell of the machine meets all."""
    work, device = jobs(editor, steps), editor.model.device
    seconds: dict[str, list[float]] = {name: [] for name in JOBS}
    rows = {name: job() for name, job in work.items()}  # the first round warms up and is not timed
    for _ in range(repeats):
        for name, job in work.items():
            synchronise(device)
            began = time.perf_counter()
            job()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: (median(seconds[name]), rows[name]) for name in JOBS}


def resident_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        # getrusage also counts what the parent held when it started this process.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a new process that nothing has run in before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_on_cpu(model: str | None, name: str, steps: int, threads: int) -> int:
    """Peak of resident memory over the loaded model while a job runs, in bytes; call it in a fresh process.

    The edit's includes the inversion that it starts from, if that needed more.
    """
    torch.set_num_threads(threads)
    editor = Editor.from_pretrained(model)
    before = resident_peak()
    jobs(editor, steps)[name]()
    return resident_peak() - before


def peak_on_gpu(editor: Editor, name: str, steps: int) -> int:
    """Peak of allocated memory of a job over what is allocated before it, in bytes."""
    device = editor.model.device
    job = jobs(editor, steps)[name]
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job()
    return torch.cuda.max_memory_allocated(device) - before


def measure(model: str | None, device: str | None, steps: int, repeats: int, threads: int) -> list[Cost]:
    """Cost of the three jobs."""
    torch.set_num_threads(threads)
    editor = Editor.from_pretrained(model, device=device)
    times = timed(editor, steps, repeats)
    if editor.model.device.type == "cuda":
        peaks = {name: peak_on_gpu(editor, name, steps) for name in JOBS}
    else:
        peaks = {name: in_fresh_process(peak_on_cpu, model, name, steps, threads) for name in JOBS}
    return [Cost(name, *times[name], peaks[name]) for name in JOBS]


def table(costs: list[Cost]) -> str:
    """The costs as text, with the ratios to plain generation in time, in time a U-Net row, and in peak memory."""
    plain = costs[0]
    text = [f"{'job':12}  {'seconds':>8}  {'rows a step':>11}  {'peak, MiB':>9}  {'time':>6}  {'time a row':>10}  {'peak':>6}"]
    for cost in costs:
        time_ratio = cost.seconds / plain.seconds
        row_ratio = time_ratio * plain.rows / cost.rows
        peak_ratio = cost.peak / plain.peak if plain.peak else float("nan")
        text.append(
            f"{cost.job:12}  {cost.seconds:8.3f}  {cost.rows:11.2f}  {cost.peak / 2**20:9.1f}"
            f"  {time_ratio:6.2f}  {row_ratio:10.2f}  {peak_ratio:6.2f}"
        )
    return "\n".join(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="model folder or hub name (default: the miniature)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the CPU)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the CPU (default: all, %(default)s)")
    given = parser.parse_args()
    record = environment(given.model)
    print(f"model {record['fingerprint']}, torch {record['versions']['torch']}, {record['machine']}, {given.steps} steps")
    print(table(measure(given.model, given.device, given.steps, given.repeats, given.threads)))


if __name__ == "__main__":
    main()
