"""Run methods on the cases of a suite: one row a case and method, pictures beside, resumable.

    python -m benchmarks.run --suite world --methods ours,direct+p2p --out runs/x
    python -m benchmarks.report runs/x

The same command goes on where a killed run stopped; more methods, kinds or cases may be added to a folder, other settings not.
A case that raises an error is a row with its error, and counts as failed; so does one that ends its process (out of memory),
where several processes or devices share the work: with one, it ends the run, and so does a GPU that then takes no more work.
Methods: see `benchmarks.methods`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.lanes import Task, in_lanes
from benchmarks.method_names import applies, chooses, described, names_of
from benchmarks.methods import METHODS, MethodFunction
from benchmarks.run_folder import Row, RunError, RunFolder, held_settings, merged_settings, read_rows, require_folder
from benchmarks.suite import Case, Options, Suite
from benchmarks.suites import SUITES, open_suite
from benchmarks.worker import Settings, Worker, lost, require_possible, shown_to
from p2p_subject.editor import Editor
from p2p_subject.errors import ArgumentError, ModelError, P2PSubjectError


def plan(suite: Suite, methods: Mapping[str, MethodFunction]) -> list[Task]:
    """What there is to run: case by case, of all kinds in turn, so that a run cut short has compared all methods.

    Cases that cannot be read become rows with their error.
    """
    ids = suite.ids()
    asked = {(name, kind): asked_for(suite, own, method) for name, method in methods.items() for kind, own in ids.items()}
    longest = max(map(len, ids.values()), default=0)
    turns = [(kind, own[at]) for at in range(longest) for kind, own in ids.items() if at < len(own)]
    return [(name, kind, id) for kind, id in turns for name in methods if id in asked[name, kind]]


def asked_for(suite: Suite, ids: Sequence[str], method: MethodFunction) -> set[str]:
    """Those of the cases of a kind that a method is asked for, and those that cannot be read.

    Cases of one kind are alike in what the library's own methods go by, so the first that can be read speaks for all.
    """
    if chooses(method):
        return {id for id in ids if (case := _readable(suite, id)) is None or applies(method, shown_to(method, case))}
    case = next(filter(None, (_readable(suite, id) for id in ids)), None)
    return set(ids) if case is None or applies(method, shown_to(method, case)) else set()


def _readable(suite: Suite, id: str) -> Case | None:
    try:
        return suite.case(id)
    except Exception:
        return None


def record(settings: Settings, suite: Suite, methods: Mapping[str, MethodFunction]) -> dict[str, Any]:
    """What the rows of a folder have in common: suite and model with all that makes them what they are.

    Raises `ModelError` where the suite, or the `methods` that are asked for cases, can do nothing with the model.
    """
    require_drawable(settings, suite)
    editor = Editor.from_pretrained(settings.model)
    require_possible(editor, suite, methods)
    own = {"fingerprint": editor.model.fingerprint, "model_guidance_scale": editor.model.guidance_scale}
    return asked_settings(settings, suite) | own


def asked_settings(settings: Settings, suite: Suite) -> dict[str, Any]:
    """The part of `record` that needs no model."""
    return {
        "suite": settings.suite,
        **suite.record(),
        "model": settings.model,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "dtype": settings.dtype,
    }


def require_drawable(settings: Settings, suite: Suite) -> None:
    """Raise `ModelError` for photographs without a model for them."""
    if suite.of_photos and settings.model is None:
        raise ModelError(f"suite {suite.name!r} is of photographs, which the miniature cannot draw; pass --model NAME|FOLDER")


def require_devices(devices: Sequence[str]) -> None:
    """Raise `ModelError` for a device that is not to be had, which would end a process of a pool without a word.

    Asks without using the devices: a context here would take memory beside the processes that do.
    """
    for device in devices:
        try:
            asked = torch.device(device)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise ModelError(f"device {device!r} is none ({said}); expected such as cpu or cuda:0") from error
        if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
            raise ModelError(f"device {device!r} is not to be had here ({torch.cuda.device_count()} CUDA devices); try cpu")


def rows_of(
    settings: Settings, tasks: Sequence[Task], devices: Sequence[str], processes: int, fingerprint: str
) -> Iterator[Row]:
    """Rows of the tasks as they are done, by `processes` processes on each device; one alone is this process."""
    if len(devices) * processes > 1:
        yield from in_lanes(settings, tasks, devices, processes, fingerprint)
        return
    worker = Worker(settings, devices[0])
    worker.warm_up()
    failed = None
    for task in tasks:
        if failed is not None and lost(devices[0]):
            raise RunError(f"{devices[0]} takes no more work after {failed}; the same command goes on")
        row = worker.row(*task)
        failed = f"{row['case']} by {row['method']}" if "error" in row else None
        yield row


def measure(
    settings: Settings,
    devices: Sequence[str] = ("cpu",),
    processes: int = 1,
    retry: bool = False,
    command: str | None = None,
) -> list[Row]:
    """Run what the folder does not hold yet; returns the rows of the call's methods and cases.

    `retry` runs again the cases that failed, whose rows stay until others replace them; `command` is how to repeat the run, for
    its report.
    """
    suite, methods = open_suite(settings.suite, settings.options), settings.named_methods()
    tasks = plan(suite, methods)
    folder = RunFolder(settings.out)
    require_folder(settings.out)
    require_devices(devices)
    asked = {name for name, _, _ in tasks}
    recorded = record(settings, suite, {name: method for name, method in methods.items() if name in asked})
    with folder.opened(recorded, {name: described(method) for name, method in methods.items()}, command):
        missing = [task for task in tasks if folder.lacks((task[0], task[2]), retry)]
        if missing:
            if len(devices) * processes > 1:
                # Here as well as in every process, where an error would have no name.
                open_suite(settings.suite, settings.options).prepare()
            rows = rows_of(settings, missing, devices, processes, recorded["fingerprint"])
            for row in tqdm(rows, desc="cases", total=len(missing), disable=None):
                folder.add(row)
        return [folder.rows[name, id] for name, _, id in tasks]


def preview(settings: Settings, retry: bool = False) -> str:
    """What a run would do, as text: cases and methods by kind, and how much of it the folder holds.

    Raises as the run would for suites, methods, and a folder of other settings. Models and networks are not loaded, so whether
    they are there, and whether the folder is of the same model, it does not say.
    """
    suite, methods = open_suite(settings.suite, settings.options), settings.named_methods()
    require_drawable(settings, suite)
    require_folder(settings.out)
    tasks = plan(suite, methods)
    known = held_settings(settings.out)
    if known is not None:
        unseen = {name: known["settings"].get(name) for name in ("fingerprint", "model_guidance_scale")}
        merged_settings(
            known,
            asked_settings(settings, suite) | unseen,
            {name: described(method) for name, method in methods.items()},
            settings.out,
        )
    rows = [] if known is None else read_rows(settings.out)
    held = {(row["method"], row["case"]) for row in rows if not (retry and "error" in row)}
    lines = [f"suite {settings.suite}: " + ", ".join(f"{name} {value}" for name, value in suite.record().items())]
    for kind, ids in suite.ids().items():
        names = [name for name in methods if any(task[:2] == (name, kind) for task in tasks)]
        lines.append(f"{kind}: {len(ids)} cases by {', '.join(names) or 'no method'}")
    idle = [name for name in methods if not any(task[0] == name for task in tasks)]
    lines += [f"asked for none of these cases: {', '.join(idle)}"] if idle else []
    done = sum((name, id) in held for name, _, id in tasks)
    return "\n".join([*lines, f"{len(tasks)} rows in {settings.out}, {done} of them done, {len(tasks) - done} to run"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 for bad input, with its message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    every = ",".join(METHODS)
    parser.add_argument("--methods", default=every, help=f"of: {every}; or module:function (default: all of these)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--count", type=int, help="cases a kind (default: all; of the world 200)")
    parser.add_argument("--cases", default="", metavar="KINDS", help="kinds of edit, with commas (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which cases, and which noise (default %(default)s)")
    parser.add_argument("--split", default="test", help="of the world: test, or validation to choose settings on")
    parser.add_argument("--data", type=Path, help="folder of the suite's data, where it is not drawn")
    parser.add_argument("--model", help="model folder or hub name (default: the miniature)")
    parser.add_argument("--steps", type=int, help="sampling steps of all but blip-diffusion (default: each one's own, 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale of the same (default: the model's own)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model")
    for name, expected in (("clip", "name, folder"), ("dino", "name, folder"), ("lpips", "squeeze, alex, vgg, folder")):
        parser.add_argument(f"--{name}", help=f"network of the metrics: {expected}, or 'none' (default: the published one)")
    parser.add_argument("--devices", default="cpu", help="with commas, such as cuda:0,cuda:1 (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes a device (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads a process on a CPU (default %(default)s)")
    parser.add_argument("--retry", action="store_true", help="run again the cases that failed")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    given = parser.parse_args(argv)
    kinds = tuple(part.strip() for part in given.cases.split(",") if part.strip())
    networks = {"clip": given.clip, "dino": given.dino, "lpips": given.lpips}
    options = Options(given.count, kinds, given.seed, given.split, given.data, **networks)
    methods = tuple(dict.fromkeys(names_of(given.methods)))
    settings = Settings(
        given.suite, methods, given.out, options, given.model, given.steps, given.guidance, given.dtype, given.threads
    )
    try:
        devices = [device.strip() for device in given.devices.split(",") if device.strip()]
        if not methods or not devices or given.processes < 1 or given.threads < 1:
            raise ArgumentError("--methods, --devices, --processes and --threads need one or more each")
        if given.dry_run:
            require_devices(devices)
            print(preview(settings, given.retry))
            return 0
        command = shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)])
        rows = measure(settings, devices, given.processes, given.retry, command)
    except P2PSubjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    failed = sum("error" in row for row in rows)
    print(f"{len(rows)} rows in {given.out}, {failed} failed; python -m benchmarks.report {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
