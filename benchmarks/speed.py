"""Time, memory and U-Net rows of edits, beside plain generation and the published way, measured interleaved in one run.

    python -m benchmarks.speed --model miniature sd15 --steps 50 --repeats 5 --out runs/speed

In every round every case runs once, so that a slow spell of the machine meets all; ratios are taken within a round, and
medians over the rounds. All is of latents: text encoding and sampling, no autoencoder. What is measured is written to
`cases.jsonl` at once, and a rerun with the same settings goes on from there. Speed is compared with the published loop only if
its latents are the same, which is checked first, in single precision.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.environment import machine
from benchmarks.memory import allocated_on_cpu, allocated_on_gpu, forget_resident_peak, in_fresh_process, resident_peak
from benchmarks.meter import synchronise
from benchmarks.speed_cases import EQUALITY, PEAKS, RUNS, STEPS, Bench, Work, counted_rows, equality
from benchmarks.speed_report import plot, report
from benchmarks.startup import STARTUP, startup
from p2p_subject.source import Source

Row = dict[str, Any]
TIMED = STEPS | RUNS
CASES = (EQUALITY, *TIMED, *PEAKS, *STARTUP)
CALLS, STEP_SECONDS = 50, 0.5
"""U-Net calls are repeated up to so often, or for about so long, and their mean is taken."""


@dataclass(frozen=True)
class Settings:
    """What is measured: a model ("miniature", "sd15", a folder, or "none" for what needs no model), where, and how long."""

    model: str
    device: str
    dtype: str
    steps: int
    threads: int


class Log:
    """The rows of one setting in `cases.jsonl`, those of earlier runs included if versions, machine and code are the same."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.path = out / "cases.jsonl"
        self.key = {"settings": asdict(settings), "environment": environment(settings.device)}
        written = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows = [row for row in map(_parsed, written) if self.key.items() <= row.items()]

    def has(self, case: str, number: int = 1) -> bool:
        """Whether round `number` of a case is there."""
        return any((row["case"], row["round"]) == (case, number) for row in self.rows)

    def add(self, case: str, number: int, values: Row) -> None:
        """Write a row, whole and at once."""
        row = {"case": case, "round": number} | values | self.key
        with self.path.open("a+b") as file:
            # A run that was killed may have left half a line.
            whole = file.tell() == 0 or self.path.read_bytes().endswith(b"\n")
            file.write(b"" if whole else b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        self.rows.append(row)
        told = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        print(self.key["settings"]["model"], f"round {number}", case, told, file=sys.stderr, flush=True)


def _parsed(line: str) -> Row:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def environment(device: str) -> Row:
    """Versions, machine and code: what makes rows of two runs comparable."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in ("inversion", "p2p_subject", "benchmarks"):
        for file in sorted((root / folder).rglob("*.py")):
            if folder != "benchmarks" or file.stem in ("explicit", "sd15", "speed_cases"):
                digest.update(file.read_bytes())
    accelerator = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return machine() | accelerator | {"code": digest.hexdigest()[:12]}


def time_rounds(bench: Bench, log: Log, names: Sequence[str], repeats: int) -> None:
    """Run the cases in turns, `repeats` times, and note seconds and U-Net rows."""
    missing = {n: [name for name in names if not log.has(name, n)] for n in range(1, repeats + 1)}
    wanted = [name for name in names if any(name in of_round for of_round in missing.values())]
    works = {name: TIMED[name](bench) for name in wanted}
    calls: dict[str, int] = {}
    for name, work in works.items():
        # Untimed: what starts up on the first call. A whole run is worth it on a GPU alone, whose kernels are chosen by size.
        once = name in STEPS or bench.model.device.type == "cuda"
        seconds = _timed(bench, work, 1)["seconds"] if once else STEP_SECONDS
        calls[name] = max(1, min(CALLS, int(STEP_SECONDS / seconds))) if name in STEPS else 1
    for number, of_round in missing.items():
        for name in of_round:
            log.add(name, number, _timed(bench, works[name], calls[name]))


@torch.no_grad()
def _timed(bench: Bench, work: Work, calls: int) -> Row:
    device = bench.model.device
    with counted_rows(bench.model.unet) as rows, work.around():
        synchronise(device)
        began = time.perf_counter()
        for _ in range(calls):
            made = work.call()
        synchronise(device)
        seconds = (time.perf_counter() - began) / calls
    recording = {"recording": made.recording.bytes} if isinstance(made, Source) else {}
    return {"seconds": seconds, "calls": calls, "rows": sum(rows) / calls, "unet_calls": len(rows) / calls} | recording


@torch.no_grad()
def peak_on_gpu(bench: Bench, name: str) -> Row:
    """Peak of allocated memory while a case runs, over what is allocated before it, in bytes."""
    work = PEAKS[name](bench)
    with work.around():
        return {"peak": allocated_on_gpu(work.call, bench.model.device)}


@torch.no_grad()
def peak_on_cpu(settings: Settings, name: str, folder: Path) -> Row:
    """Peak of resident memory while a case runs, over the model and sources in memory; call it in a fresh process.

    Resident memory is uncertain by a few MiB, so what torch allocates in one step of the case is counted as well. This runs
    first, and loads code; the peak of it is forgotten where the system can (Linux).
    """
    bench = _open(settings, getattr(torch, settings.dtype), folder)
    work, step = PEAKS[name](bench), STEPS[name.replace("peak", "step")](bench)
    with step.around():
        allocated = allocated_on_cpu(step.call)
    if sys.platform == "linux":
        forget_resident_peak()
    before = resident_peak()
    with work.around():
        work.call()
    return {"peak": resident_peak() - before, "allocated": allocated}


def _open(settings: Settings, dtype: torch.dtype, folder: Path | None = None) -> Bench:
    torch.set_num_threads(settings.threads)
    return Bench.open(settings.model, settings.device, dtype, settings.steps, folder)


def save_sources(settings: Settings, folder: Path) -> None:
    """Make the sources of a setting and write them to `folder`."""
    _open(settings, getattr(torch, settings.dtype)).save(folder)


def compare(settings: Settings) -> Row:
    """The row of the equality check, in single precision."""
    reduced = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return equality(_open(settings, torch.float32))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = reduced


def measure(settings: Settings, repeats: int, names: Sequence[str], out: Path) -> list[Row]:
    """Measure what `out` does not have yet; return all rows of the setting."""
    log = Log(out, settings)
    if EQUALITY in names and not log.has(EQUALITY):
        log.add(EQUALITY, 1, compare(settings))
        gc.collect()
    peaks = [name for name in names if name in PEAKS and not log.has(name)]
    timed = [name for name in names if name in TIMED]
    on_gpu = settings.device.startswith("cuda")
    if (peaks and on_gpu) or not all(log.has(name, n) for name in timed for n in range(1, repeats + 1)):
        bench = _open(settings, getattr(torch, settings.dtype))
        if not bench.has_large_layers:
            timed = [name for name in timed if name != "run published-fused"]
        time_rounds(bench, log, timed, repeats)
        for name in peaks if on_gpu else ():
            log.add(name, 1, peak_on_gpu(bench, name))
        del bench
        gc.collect()
    if peaks and not on_gpu:
        with TemporaryDirectory() as folder:
            in_fresh_process(save_sources, settings, Path(folder))
            for name in peaks:
                log.add(name, 1, in_fresh_process(peak_on_cpu, settings, name, Path(folder)))
    for name in (name for name in names if name in STARTUP):
        for number in (n for n in range(1, repeats + 1) if not log.has(name, n)):
            log.add(name, number, startup(name))
    return [row for row in log.rows if row["round"] <= repeats and row["case"] in names]


def chosen(given: Sequence[str]) -> list[str]:
    """The cases of these names, or that begin so; the published loop does not run without the check of its output."""
    wanted = {name for name in CASES for text in given if name == text or (text not in CASES and name.startswith(text))}
    if any("published" in name for name in wanted):
        wanted.add(EQUALITY)
    return [name for name in CASES if name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if the published loop's output is not ours."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    models = '"miniature" (default), "sd15" (of random weights), or folders'
    parser.add_argument("--model", nargs="+", default=["miniature"], help=models)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32, float16 on a GPU")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps, 3 or more (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the CPU (default: all, %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the results (default %(default)s)")
    cases = "names, or beginnings of names, of: " + ", ".join(CASES)
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=[""], help=cases)
    given = parser.parse_args(argv)
    names = chosen(given.cases)
    if not names:
        parser.error(f"--cases {' '.join(given.cases)} names no case; cases: {', '.join(CASES)}")
    if given.steps < 3 or given.repeats < 1:
        parser.error(f"--steps {given.steps} --repeats {given.repeats}; expected 3 or more steps, 1 or more repeats")
    dtype = given.dtype or ("float16" if given.device.startswith("cuda") else "float32")
    given.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for model in given.model:
        settings = Settings(model, given.device, dtype, given.steps, given.threads)
        results[settings] = measure(settings, given.repeats, [name for name in names if name not in STARTUP], given.out)
    if any(name in STARTUP for name in names):
        without = replace(settings, model="none", device="cpu", dtype="none", steps=0)
        results[without] = measure(without, given.repeats, [name for name in names if name in STARTUP], given.out)
    print(report(results))
    plot(results, given.out / "speed.png")
    return int(any(row["case"] == EQUALITY and not row["equal"] for rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
