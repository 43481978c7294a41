"""What runs cases: a process with the model, the suite and the methods, on one device."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import parent_process
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import machine
from benchmarks.features import versions
from benchmarks.meter import metered, synchronise
from benchmarks.method_names import method_of, takes_mask
from benchmarks.methods import BlipDiffusion, Method, MethodFunction
from benchmarks.run_folder import Row, RunFolder
from benchmarks.suite import Case, Edited, Options, Suite, SuiteError, Values
from benchmarks.suites import open_suite, suite_class
from p2p_subject.blip_diffusion import BlipDiffusionPipeline
from p2p_subject.editor import Editor
from p2p_subject.errors import ModelError

MEASURING = (
    *("suite", "world_suite", "pie_bench", "dreambench", "dreamedit", "methods"),
    *("metrics", "judge", "features", "meter", "memory", "worker"),
)
"""Modules of the benchmarks that values depend on."""


@dataclass(frozen=True)
class Settings:
    """What is run: a suite and its options, methods by name, model (None: the miniature), where to, and how.

    `steps` and `guidance_scale` None are each method's own.
    """

    suite: str
    methods: tuple[str, ...]
    out: Path
    options: Options
    model: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "float32"
    threads: int = 1

    def named_methods(self) -> dict[str, MethodFunction]:
        """The methods by name; `ArgumentError` for one there is not."""
        return {name: method_of(name, steps=self.steps, guidance_scale=self.guidance_scale) for name in self.methods}


@cache
def code() -> str:
    """Short hash of the code that values depend on."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    files = [file for folder in ("inversion", "p2p_subject") for file in sorted((root / folder).rglob("*.py"))]
    # What the world draws with.
    files += sorted((root / "p2p_subject").rglob("*.png"))
    for file in [*files, *(root / "benchmarks" / f"{name}.py" for name in MEASURING)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@cache
def environment() -> dict[str, Any]:
    """Versions, machine and code, for every row."""
    found = machine()
    return {**found, "versions": found["versions"] | versions(), "code": code()}


class Worker:
    """The model, the suite and the methods of one process."""

    def __init__(self, settings: Settings, device: str) -> None:
        torch.set_num_threads(settings.threads)
        # float32 means float32: convolutions of recent GPUs would else be of ten bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.settings, self.device = settings, device
        self.editor = Editor.from_pretrained(settings.model, device=device, dtype=getattr(torch, settings.dtype))
        self.suite = open_suite(settings.suite, replace(settings.options, device=device))
        self.methods = settings.named_methods()
        self.fingerprint = self.editor.model.fingerprint
        on_cuda = torch.device(device).type == "cuda"
        self.accelerator = torch.cuda.get_device_name(device) if on_cuda else None
        self.folder = RunFolder(settings.out)

    def warm_up(self) -> None:
        """Load networks and code and choose kernels before the first case is timed."""
        self.suite.prepare()
        self.editor.generate("a photo", seed=0, steps=2)

    def row(self, name: str, kind: str, id: str) -> Row:
        """Run a method on a case, measure and save what it returns; a failure is a row with its error and no values."""
        method = self.methods[name]
        row = begun(self.settings, self.device, self.fingerprint, takes_mask(method), name, kind, id)
        row["accelerator"] = self.accelerator
        values: Values = {}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            try:
                case = self.suite.case(id)
                row["networks"] = self.suite.fingerprints()
                row |= {"seed": case.seed, "prompt": case.prompt, "target_prompt": case.target_prompt}
                row["pictures"] = self.folder.save_case(case)
                asked = shown_to(method, case)
                with metered(self.editor.model.unet, self.editor.model.device) as cost:
                    edited = method(self.editor, asked)
                require_fitting(edited, case, name)
                row |= {"trajectory": edited.trajectory, "pasted": edited.unpasted is not None}
                row["pictures"] |= self.folder.save_edited(name, case, edited)
                found = self.suite.measure(case, edited, row["mask_input"]) | with_work(cost | dict(edited.cost))
                values = {name: finite(value, name) for name, value in found.items()}
            except (Exception, SystemExit) as error:
                row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-4)}
        row["metrics"] = {measure.name: values.get(measure.name) for measure in self.suite.measures}
        return row | {"warnings": sorted({str(warning.message) for warning in told})}


def with_work(cost: Mapping[str, Any]) -> dict[str, Any]:
    """A cost with its `work`, unless a method gave its own: the rows, a gradient through one counted as two more."""
    counted = cost["rows"], cost["backward_rows"]
    return {"work": None if None in counted else counted[0] + 2 * counted[1], **cost}


def begun(settings: Settings, device: str, fingerprint: str, mask_input: bool, name: str, kind: str, id: str) -> Row:
    """What the row of a case says before the case is read."""
    row: Row = {"suite": settings.suite, "kind": kind, "case": id, "method": name, "mask_input": mask_input, "pasted": False}
    row |= {"seed": None, "device": device, "threads": settings.threads, "model": fingerprint, "trajectory": None}
    # Its name is known to the process that uses it. Asking here would load it in the one that hands out the work, too.
    row["accelerator"] = None
    return row | {"pictures": {}, "began": round(time.time(), 3)} | environment()


def row_of_death(settings: Settings, device: str, fingerprint: str, name: str, kind: str, id: str) -> Row:
    """The row of a case that ended its process: a failure like others, without a traceback."""
    why = "ProcessDied: the case ended its process (out of memory?), which left no traceback"
    metrics = dict.fromkeys(measure.name for measure in suite_class(settings.suite).measures)
    row = begun(settings, device, fingerprint, takes_mask(settings.named_methods()[name]), name, kind, id)
    return row | {"error": why, "traceback": "", "metrics": metrics, "warnings": []}


def shown_to(method: MethodFunction, case: Case) -> Case:
    """A case as a method sees it: without what is known of its answer, unless the method says that it looks at it; and a
    copy, so that one that paints into a picture is not measured against what it painted."""
    if not takes_mask(method):
        case = replace(case, mask=None, truth=None, source_mask=None, reference_mask=None, facts=None)
    return deepcopy(case)


def finite(value: Any, name: str) -> float | None:
    """A value as a number, or None where a case has none. Raises `SuiteError` for NaN and infinity, which are failures."""
    if value is not None and not math.isfinite(value):
        raise SuiteError(f"the measure {name!r} is {value}; expected a finite number, or None for what the case has none of")
    return None if value is None else float(value)


def require_fitting(edited: Any, case: Case, name: str) -> None:
    """Raise `SuiteError` for what a method returned that cannot be measured."""
    if not isinstance(edited, Edited):
        raise SuiteError(f"method {name!r} returned {type(edited).__name__}; expected benchmarks.suite.Edited")
    for what, picture, mode in (("picture", edited.image, "RGB"), ("mask", edited.mask, "L")):
        if picture is None and what == "mask":
            continue
        size = getattr(picture, "size", None)
        if getattr(picture, "mode", None) != mode or (case.size is not None and size != case.size):
            given = f"{type(picture).__name__} of mode {getattr(picture, 'mode', None)!r} and size {size}"
            raise SuiteError(f"{what} of method {name!r}: {given}; expected mode {mode!r}, size {case.size}")
    if not isinstance(edited.trajectory, str | None):
        raise SuiteError(f"trajectory of method {name!r}: {type(edited.trajectory).__name__}; expected a string")
    wrong = {key: value for key, value in edited.cost.items() if not isinstance(value, Real | None)}
    if wrong:
        raise SuiteError(f"cost of method {name!r}: {wrong}; expected numbers")


def require_possible(editor: Editor, suite: Suite, methods: Mapping[str, MethodFunction]) -> None:
    """Raise `ModelError` where suite or methods need subjects and the model takes none."""
    wanting = [name for name, method in methods.items() if isinstance(method, Method) and method.subjects]
    if editor.model.queries == 0 and (suite.needs_subjects or wanting):
        who = f"suite {suite.name!r}" if suite.needs_subjects else f"method {', '.join(wanting)}"
        raise ModelError(f"{editor.model.name} takes no pictures of a subject, which {who} needs; load BLIP-Diffusion")
    published = any(isinstance(method, BlipDiffusion) for method in methods.values())
    if published and not isinstance(editor.model.pipeline, BlipDiffusionPipeline):
        raise ModelError(f"{editor.model.name} is not BLIP-Diffusion, whose own generation a method is; leave that out")


_WORKER: Worker | None = None


def begin(settings: Settings, device: str) -> None:
    """Initialise a process of a run, which ends when its parent does."""
    global _WORKER
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORKER = Worker(settings, device)
    _WORKER.warm_up()


def _end_with_parent() -> None:
    # The processes of a run wait for work for ever if their parent is killed.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def lost(device: str) -> bool:
    """Whether a GPU takes no more work from this process: after a fault of its own, every call of it fails."""
    try:
        synchronise(torch.device(device))
    except RuntimeError:
        return True
    return False


def work(name: str, kind: str, id: str) -> Row:
    """The row of a case, in a process of a run."""
    return _WORKER.row(name, kind, id)
